"""The segmentation head: parity with the original, a fresh start, gradients, refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file

from integrations.ovis.head import LEVELS, HeadConfig, SegmentationHead
from integrations.ovis.weights import head_from_detectron2, head_to_detectron2


def head_config(sizes: dict) -> HeadConfig:
    return HeadConfig(
        in_channels=sizes["in_channels"],
        num_classes=sizes["num_classes"],
        num_queries=sizes["num_queries"],
        width=sizes["hidden_dim"],
        mask_size=sizes["mask_dim"],
        num_heads=sizes["decoder_heads"],
        pixel_layers=sizes["encoder_layers"],
        pixel_feedforward=sizes["encoder_ffn"],
        decoder_layers=sizes["decoder_layers"],
        decoder_feedforward=sizes["decoder_ffn"],
        embedding_size=sizes["reid_mlp"][-1],
    )


@pytest.fixture(scope="module")
def stored(golden):
    config = json.loads((golden / "ovis/seg_head.json").read_text())
    tensors = load_file(golden / "ovis/seg_head.safetensors")
    head = SegmentationHead(head_config(config["config"])).eval()
    head.load_state_dict(head_from_detectron2(state_of(tensors)), strict=True)
    features = {name: tensors[f"features.{name}"] for name in LEVELS}
    return config["tolerance"]["abs"], tensors, head, features


def state_of(tensors) -> dict[str, torch.Tensor]:
    return {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}


@pytest.mark.golden
def test_everything_that_the_head_says_equals_the_original(stored):
    atol, tensors, head, features = stored
    pixels = head.pixel_decoder([features[name] for name in LEVELS])
    output = head(features)
    found = {
        "mask_features": pixels.mask_features,
        **{f"multi_scale.{i}": level for i, level in enumerate(pixels.multi_scale_features)},
        "pred_logits": output.class_logits,
        "pred_masks": output.mask_logits,
        "pred_embeds": output.query_embeddings,
        "pred_queries": output.queries,
    }
    for index, layer in enumerate(output.auxiliary):
        found[f"aux.{index}.pred_logits"] = layer.class_logits
        found[f"aux.{index}.pred_masks"] = layer.mask_logits
    expected = {k for k in tensors if not k.startswith(("state.", "features."))}
    assert expected <= found.keys()
    for name in sorted(expected):
        torch.testing.assert_close(found[name], tensors[name], rtol=0, atol=atol)
    assert len(output.auxiliary) == head.config.decoder_layers


@pytest.mark.golden
def test_weights_go_back_to_the_layout_they_came_from(stored):
    _, tensors, head, _ = stored
    there = head_to_detectron2(head.state_dict())
    state = state_of(tensors)
    assert there.keys() == state.keys()
    for key, value in there.items():
        assert torch.equal(value, state[key]), key


def small(**sizes) -> SegmentationHead:
    defaults = {
        "in_channels": 6, "num_classes": 3, "num_queries": 5, "width": 32, "mask_size": 16,
        "num_heads": 4, "pixel_layers": 1, "pixel_feedforward": 16, "decoder_layers": 2,
        "decoder_feedforward": 16, "embedding_size": 8,
    }  # fmt: skip
    return SegmentationHead(HeadConfig(**{**defaults, **sizes}))


def maps(frames=2, height=2, width=3, channels=6) -> dict[str, torch.Tensor]:
    return {
        name: torch.randn(frames, channels, scale * height, scale * width)
        for name, scale in zip(LEVELS, (8, 4, 2, 1), strict=True)
    }


def test_outputs_have_the_shapes_they_promise_and_frames_do_not_see_each_other():
    head, features = small().eval(), maps()
    output = head(features)
    assert output.class_logits.shape == (2, 5, 4)
    assert output.mask_logits.shape == (2, 5, 16, 24)
    assert output.query_embeddings.shape == (2, 5, 8)
    assert output.queries.shape == (2, 5, 32)
    alone = head({name: level[1:] for name, level in features.items()})
    torch.testing.assert_close(alone.mask_logits[0], output.mask_logits[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(
        alone.query_embeddings[0], output.query_embeddings[1], rtol=0, atol=1e-5
    )


def test_all_weights_get_gradients():
    head = small(mask_size=32).train()
    output = head(maps())
    spoken = [output, *output.auxiliary]
    loss = sum(p.class_logits.square().mean() + p.mask_logits.square().mean() for p in spoken)
    (loss + output.query_embeddings.square().mean()).backward()
    silent = [name for name, weight in head.named_parameters() if weight.grad is None]
    assert not silent


def test_a_fresh_head_starts_as_the_published_model_not_as_transformers_leaves_it():
    """Outside of its own models transformers initialises nothing, and without a word."""
    state = small(width=64, num_heads=8, pixel_layers=2).state_dict()
    for layer in range(2):
        prefix = f"pixel_decoder.encoder.layers.{layer}"
        assert state[f"{prefix}.self_attn.sampling_offsets.bias"].abs().max() == 4
        assert state[f"{prefix}.self_attn.sampling_offsets.weight"].abs().max() == 0
        bound = (6 / (64 + 16)) ** 0.5
        for name in ("fc1", "fc2"):
            assert 0.9 * bound < state[f"{prefix}.{name}.weight"].abs().max() <= bound
    bound = (6 / (64 + 3 * 64)) ** 0.5  # Xavier over the joint projection
    found = state["transformer.decoder.layers.1.cross_attn.in_proj_weight"].abs().max()
    assert 0.9 * bound < found <= bound
    assert 0.7 < state["pixel_decoder.level_embed"].std() < 1.3
    assert 0.7 < state["transformer.queries_features.weight"].std() < 1.3


def test_refusals_name_what_does_not_fit():
    with pytest.raises(ValueError, match="width=48 must be a multiple of 32 .* num_heads=4"):
        small(width=48)
    with pytest.raises(ValueError, match="num_queries=0: needs a whole number"):
        small(num_queries=0)
    head, features = small(), maps()
    with pytest.raises(ValueError, match="features lack 'res4'; they hold res2, res3, res5"):
        head({name: level for name, level in features.items() if name != "res4"})
    with pytest.raises(ValueError, match="one cell in res5, and a head of width 32: .* larger fra"):
        head(maps(1, 1, 1))
    features["res3"] = features["res3"][..., :-1]
    with pytest.raises(ValueError, match=r"res3 has shape \(2, 6, 8, 11\), expected \(2, 6, 8, 12"):
        head(features)
