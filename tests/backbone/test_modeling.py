"""The forward pass on clips: masks, gradients, regularisation, sizes and types, configuration."""

import pytest
import torch
from torch import nn

from backbone import StreamformerConfig, StreamformerForVideoClassification, StreamformerModel
from backbone.modeling import TimePlan, drop_path


def test_outputs(make_model):
    model = make_model()
    clip = torch.randn(2, 5, 3, 16, 24)
    out = model(clip, output_hidden_states=True)
    assert out.last_hidden_state.shape == (2, 5, 6, 16)
    assert out.pooler_output.shape == (2, 5, 16)
    assert out.past_key_values is None
    assert [state.shape for state in out.hidden_states] == 3 * [(2, 5, 6, 16)]
    last = model.post_layernorm(out.hidden_states[-1])
    torch.testing.assert_close(last, out.last_hidden_state)
    assert model(clip).hidden_states is None
    plain = model(clip, return_dict=False)
    assert isinstance(plain, tuple)
    torch.testing.assert_close(plain[1], out.pooler_output)


@pytest.mark.parametrize("fields", [
    {}, {"window": 3}, {"causal": False}, {"temporal_positions": "reset"},
    {"temporal_positions": "reset", "window": 4}, {"qkv_bias": False}, {"lora_rank": 4},
])  # fmt: skip
def test_eager_equals_sdpa(make_model, difference, fields):
    model, eager = make_model(**fields), make_model(**fields, attn_implementation="eager")
    eager.load_state_dict(model.state_dict())
    assert model.config._attn_implementation == "sdpa"
    assert eager.config._attn_implementation == "eager"
    clip = torch.randn(2, 15, 3, 16, 16)
    assert difference(eager(clip).pooler_output, model(clip).pooler_output) < 1e-5


def test_gradient_checkpointing_gives_the_same_gradients(make_model):
    model = make_model(window=3, lora_rank=4).train()
    clip = torch.randn(2, 7, 3, 16, 16)

    def gradients():
        model.zero_grad()
        model(clip).pooler_output.square().mean().backward()
        return {name: weight.grad for name, weight in model.named_parameters()}

    expected = gradients()
    model.gradient_checkpointing_enable()
    calls = []
    model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    found = gradients()
    assert len(calls) == 2  # forward, and again in backward
    assert {name for name, gradient in found.items() if gradient is None} == {
        name for name, _ in model.named_parameters() if ".base_layer." in name
    }
    for name, gradient in expected.items():
        if gradient is not None:
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(found[name], gradient)


def test_gate_at_zero_is_the_image_encoder(make_model):
    model = make_model()
    with torch.no_grad():
        model.embeddings.time_embedding.zero_()
        for layer in model.layers:
            layer.temporal_gate.zero_()
    clip = torch.randn(1, 4, 3, 16, 16)
    alone = torch.cat([model(clip[:, i : i + 1]).pooler_output for i in range(4)], dim=1)
    torch.testing.assert_close(model(clip).pooler_output, alone)


@pytest.mark.parametrize("kind", [StreamformerModel, StreamformerForVideoClassification])
@pytest.mark.parametrize("temporal_attention", [True, False])
def test_a_fresh_model_is_an_image_encoder(make_model, kind, temporal_attention):
    fields = make_model(temporal_attention=temporal_attention).config.to_dict()
    model = kind(StreamformerConfig(**fields | {"lora_rank": 4})).base_model
    state = model.state_dict()
    zero = {name for name, weight in state.items() if not weight.any()}
    for end in ("temporal_gate", "time_embedding", "lora_B.default.weight"):
        names = {name for name in state if name.endswith(end)}
        assert names or not temporal_attention
        assert names <= zero
    for name in ("head.probe", "embeddings.position_embedding", "layers.0.mlp.fc1.weight",
                 "layers.0.spatial_attention.qkv.lora_A.default.weight"):  # fmt: skip
        assert state[name].std() > 0.01


# -- regularisation -------------------------------------------------------------------------------


def test_drop_path_statistics():
    ones = torch.ones(200, 5, 7, 3)
    kept = drop_path(ones, 0.3, training=True, shared=(1, 3))
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert kept.mean().item() == pytest.approx(1.0, abs=0.1)
    assert (kept == kept[:, :1, :, :1]).all()  # one draw for each (clip, patch)
    assert kept.var(dim=2).gt(0).any()
    assert torch.equal(drop_path(ones, 0.3, training=False, shared=(1, 3)), ones)
    assert torch.equal(drop_path(ones, 0.0, training=True, shared=(1, 3)), ones)


def test_drop_path_grows_with_depth(make_model):
    model = make_model(drop_path_rate=0.4, num_hidden_layers=3)
    assert [layer.drop_path for layer in model.layers] == pytest.approx([0.0, 0.2, 0.4])
    assert make_model(drop_path_rate=0.4, num_hidden_layers=1).layers[0].drop_path == 0.0


@pytest.mark.parametrize(
    ("branch", "drawn_for"),
    [("temporal", (0, 2)), ("spatial", (0, 1)), ("mlp", (0,))],  # clip and patch; clip and frame
)
def test_what_drop_path_drops_together(make_model, branch, drawn_for):
    layer = make_model(drop_path_rate=0.5).layers[-1].train()
    last = {"temporal": layer.temporal_dense, "spatial": layer.spatial_attention.out,
            "mlp": layer.mlp.fc2}  # fmt: skip
    for name, linear in last.items():
        if name != branch:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
    tokens = torch.randn(9, 7, 5, 16)
    kept = (layer(tokens, TimePlan()) != tokens).any(-1)  # (B, T, N)
    for dim in range(3):
        first = kept.select(dim, 0).unsqueeze(dim)
        assert bool((kept == first).all()) == (dim not in drawn_for)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "field", ["hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"]
)
def test_dropout_is_random_in_training_only(make_model, field, implementation):
    model = make_model(**{field: 0.5}, attn_implementation=implementation)
    clip = torch.randn(2, 4, 3, 16, 16)
    assert torch.equal(model(clip).pooler_output, model(clip).pooler_output)
    calm = model(clip).pooler_output
    model.train()
    draws = torch.stack([model(clip).pooler_output for _ in range(2)])
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(model.eval()(clip).pooler_output, calm)


# -- sizes and types ------------------------------------------------------------------------------


def test_other_sizes_resize_the_position_table(make_model):
    model = make_model(image_size=32)
    assert model.embeddings.positions(4, 4) is model.embeddings.position_embedding
    table = nn.Parameter(torch.arange(4.0).repeat_interleave(4)[None, :, None].expand(1, 16, 16))
    model.embeddings.position_embedding = table  # the row of the patch
    wide = model.embeddings.positions(4, 6).unflatten(1, (4, 6))
    assert wide.std(dim=2).max() < 1e-5  # constant along a row of patches
    assert (wide.diff(dim=1) > 0.5).all()
    assert model(torch.randn(1, 2, 3, 32, 48)).last_hidden_state.shape == (1, 2, 24, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(make_model, difference, dtype):
    model = make_model(window=3)
    clip = torch.randn(1, 9, 3, 16, 16)
    expected = model(clip).pooler_output
    found = model.to(dtype)(clip).pooler_output  # frames are cast
    assert found.dtype == dtype
    assert difference(found.float(), expected) < (0.1 if dtype.itemsize == 2 else 1e-5)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (torch.zeros(3, 16, 16), r"shape \(3, 16, 16\); expected \(B, T, 3, H, W\).*\(B, 1, C"),
        (torch.zeros(1, 2, 4, 16, 16), r"shape \(1, 2, 4, 16, 16\); expected \(B, T, 3, H, W\)"),
        (torch.zeros(1, 0, 3, 16, 16), r"\(1, 0, 3, 16, 16\) is empty"),
        (torch.zeros(1, 2, 3, 16, 20), "16 x 20 pixels do not divide into patches of 8"),
        (torch.zeros(1, 2, 3, 16, 16).byte(), "type torch.uint8; expected normalised floats"),
    ],
)
def test_refuses_frames_that_do_not_fit(make_model, clip, message):
    with pytest.raises(ValueError, match=message):
        make_model()(clip)


# -- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 10, "num_attention_heads": 3}, "hidden_size=10 .* num_attention_heads=3"),
        ({"image_size": 20}, "image_size=20 is not a multiple of patch_size=16"),
        ({"num_frames": 0}, "num_frames=0 must be at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be at least 1"),
        ({"window": 0}, "window=0: a frame always sees itself"),
        ({"lora_rank": -1}, "lora_rank=-1 must not be negative"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0 is no rate"),
        ({"hidden_act": "gelu_tanh"}, "hidden_act='gelu_tanh' is unknown.*did you mean 'gelu"),
        ({"temporal_positions": "clamp"}, "temporal_positions"),
        ({"window": "all"}, "window"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(Exception, match=message):
        StreamformerConfig(**fields)


@pytest.mark.parametrize(
    ("policy", "window", "span"),
    [("hold", None, None), ("hold", 9, 9), ("reset", None, 6), ("reset", 9, 6), ("reset", 4, 4)],
)
def test_span(policy, window, span):
    config = StreamformerConfig(num_frames=6, temporal_positions=policy, window=window)
    assert config.span == span


# -- classification -------------------------------------------------------------------------------


def test_classifier(make_model):
    fields = make_model().config.to_dict() | {"id2label": {0: "a", 1: "b", 2: "c"}}
    model = StreamformerForVideoClassification(StreamformerConfig(**fields)).eval()
    clip = torch.randn(4, 5, 3, 16, 16)
    labels = torch.tensor([0, 1, 2, 0])
    out = model(clip, labels=labels)
    assert out.logits.shape == (4, 3)
    assert out.hidden_states is None
    expected = nn.functional.cross_entropy(out.logits, labels)
    torch.testing.assert_close(out.loss, expected)
    loss, logits = model(clip, labels=labels, return_dict=False)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits, out.logits)
    out.loss.backward()
    assert model.classifier.weight.grad.abs().sum() > 0
    assert len(model(clip, output_hidden_states=True).hidden_states) == 3


def test_frames_of_a_clip_count_alike_for_the_classifier(make_model):
    """Without time in it the order of frames is nothing to a mean; with it, it is."""
    config = make_model(temporal_attention=False).config
    model = StreamformerForVideoClassification(config).eval()
    clip = torch.randn(1, 5, 3, 16, 16)
    torch.testing.assert_close(model(clip).logits, model(clip.flip(1)).logits)
    with pytest.raises(AssertionError):
        config.released_pooling = True
        torch.testing.assert_close(model(clip).logits, model(clip.flip(1)).logits)
