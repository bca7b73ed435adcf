"""The ViT-Adapter: parity with the original, causality, odd encoders, gradients, refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from backbone import SiglipEncoder, StreamformerConfig, StreamformerEncoder, StreamformerModel
from backbone.checkpoints import RELEASED_RENAMES, load_strict, rename
from integrations.ovis.adapter import (
    AdapterConfig,
    Extractor,
    SpatialPrior,
    ViTAdapter,
    adapt_clip,
    cell_centres,
    encode_taps,
)
from integrations.ovis.head import LEVELS
from integrations.ovis.weights import (
    RELEASED_ADAPTER,
    ReleasedGridEncoder,
    adapter_from_released,
    adapter_to_released,
)


@pytest.fixture(scope="module")
def parts(golden):
    config = json.loads((golden / "ovis/adapter_parts.json").read_text())
    return config, load_file(golden / "ovis/adapter_parts.safetensors")


def state_of(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def load(module: nn.Module, state, prefix_there: str, prefix_here: str) -> None:
    """Load a part of the adapter from the original's layout, through the whole adapter's table."""
    there = {f"{prefix_there}{key}": value for key, value in state.items()}
    renamed = rename(there, RELEASED_ADAPTER, {}, "golden")
    module.load_state_dict({k.removeprefix(prefix_here): v for k, v in renamed.items()})


@pytest.mark.golden
def test_spatial_prior_equals_the_original(parts):
    config, tensors = parts
    sizes = config["spm_config"]
    prior = SpatialPrior(sizes["inplanes"], sizes["embed_dim"]).eval()
    load(prior, state_of(tensors, "spm.state."), "spm.", "prior.")
    finest, *coarse = prior(tensors["spm.x"])
    found = [finest, *(level.flatten(2).transpose(1, 2) for level in coarse)]
    for name, level in zip(("c1", "c2", "c3", "c4"), found, strict=True):
        torch.testing.assert_close(
            level, tensors[f"spm.{name}"], rtol=0, atol=config["tolerance"]["abs"]
        )


@pytest.mark.golden
def test_extractor_and_its_feed_forward_part_equal_the_original(parts):
    config, tensors = parts
    sizes = config["block_config"]
    grid = tuple(sizes["token_grid_HW"])
    shapes = [(2 * grid[0], 2 * grid[1]), grid, (grid[0] // 2, grid[1] // 2)]
    extractor = Extractor(
        AdapterConfig(
            embed_dim=sizes["dim"],
            patch_size=16,
            taps=(1, 2, 3, 4),
            num_heads=sizes["num_heads"],
            num_points=sizes["n_points"],
            ffn_ratio=sizes["cffn_ratio"],
        )
    ).eval()
    there = "interactions.0.extractor."
    load(extractor, state_of(tensors, "extractor.state."), there, "extractors.0.0.")
    query, tokens = tensors["extractor.query"], tensors["extractor.feat"]
    atol = config["tolerance"]["abs"]
    torch.testing.assert_close(
        extractor.ffn(query, shapes), tensors["convffn.output"], rtol=0, atol=atol
    )
    torch.testing.assert_close(
        extractor(query, shapes, tokens, grid), tensors["extractor.output"], rtol=0, atol=atol
    )
    centres = cell_centres(shapes, query)[None, :, None]
    torch.testing.assert_close(centres, tensors["deform_inputs_extractor.reference_points"])


# -- the whole ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(golden):
    config = json.loads((golden / "ovis/adapter_full.json").read_text())
    tensors = load_file(golden / "ovis/adapter_full.safetensors")
    sizes = dict(config["encoder_config"])
    sizes["causal"] = sizes.pop("enable_causal_temporal")
    model = StreamformerModel(StreamformerConfig(**sizes)).eval()
    state = state_of(tensors, "state.")
    encoder = {k: v for k, v in state.items() if k.startswith(("emb", "encoder.", "post"))}
    renamed = rename(encoder, RELEASED_RENAMES, {}, "golden")
    load_strict(model, renamed, "golden", layout="the release", created=r"head\..*")
    sizes = config["adapter_config"]
    adapter_config = AdapterConfig(
        embed_dim=model.config.hidden_size,
        patch_size=model.config.patch_size,
        taps=tuple(block[-1] + 1 for block in sizes["interaction_indexes"]),
        stem_width=sizes["spm_inplanes"],
        num_heads=sizes["deform_num_heads"],
        num_points=sizes["n_points"],
        ffn_ratio=sizes["cffn_ratio"],
        extra_extractors=sizes["extra_extractors_in_last_block"],
    )
    adapter = ViTAdapter(adapter_config).eval()
    load_strict(
        adapter,
        adapter_from_released(state, "golden"),
        "golden",
        layout="the release",
        created=r".*num_batches_tracked",
    )
    return config, tensors, model, adapter


@pytest.mark.golden
@pytest.mark.parametrize(
    "case",
    ["square", "full_clip", "larger_square", "nonsquare_row_major", "nonsquare_reference"],
)
def test_encoder_and_adapter_equal_the_original(whole, case):
    config, tensors, model, adapter = whole
    kind = ReleasedGridEncoder if case == "nonsquare_reference" else StreamformerEncoder
    stored = "nonsquare_reference" if case.startswith("nonsquare") else case
    clip = tensors[f"{stored}.pixel_values"]
    maps = adapt_clip(kind(model), adapter, clip)
    assert list(maps) == list(LEVELS)
    for name, level in maps.items():
        torch.testing.assert_close(
            level, tensors[f"{case}.{name}"], rtol=0, atol=config["tolerance"]["abs"]
        )


@pytest.mark.golden
def test_taps_of_an_encoder_are_those_of_the_original(whole):
    _, _, model, adapter = whole
    assert AdapterConfig.for_encoder(StreamformerEncoder(model), num_heads=4).taps == adapter.taps


@pytest.mark.golden
def test_adapter_weights_survive_the_way_there_and_back(whole):
    _, tensors, _, adapter = whole
    there = adapter_to_released(adapter.state_dict())
    state = state_of(tensors, "state.")
    for key, value in there.items():
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(value, state[key], rtol=0, atol=0)
    back = adapter_from_released(there)
    assert back.keys() == adapter.state_dict().keys()


@pytest.mark.golden
def test_a_transposed_grid_is_told_by_the_settings_and_leaves_square_frames_alone(whole):
    _, tensors, model, adapter = whole
    plain, transposed = StreamformerEncoder(model), ReleasedGridEncoder(model)
    assert plain.settings() != transposed.settings()
    clip = tensors["larger_square.pixel_values"]
    torch.testing.assert_close(
        adapt_clip(plain, adapter, clip), adapt_clip(transposed, adapter, clip)
    )


# -- properties -----------------------------------------------------------------------------------


def small_streamformer(**fields) -> StreamformerEncoder:
    config = StreamformerConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=24, num_frames=4, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    model = StreamformerModel(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "gate" in name or "time_embedding" in name:
                weight.normal_()
    return StreamformerEncoder(model, fused=False)


def small_adapter(encoder, **options) -> ViTAdapter:
    torch.manual_seed(1)
    return ViTAdapter(AdapterConfig.for_encoder(encoder, num_heads=4, stem_width=4, **options))


@pytest.mark.parametrize("size", [(32, 32), (32, 96), (64, 32)])
def test_every_encoder_and_patch_size_gives_the_four_maps(size):
    siglip = SiglipEncoder(
        SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=12,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=32,
                patch_size=16,
            )  # fmt: skip
        )
    )
    for encoder in (small_streamformer(), siglip):
        adapter = small_adapter(encoder).eval()
        maps = adapt_clip(encoder, adapter, torch.randn(2, 3, 3, *size))
        for name, stride in zip(LEVELS, (4, 8, 16, 32), strict=True):
            shape = (6, encoder.embed_dim, size[0] // stride, size[1] // stride)
            assert maps[name].shape == shape


def test_a_stream_gives_the_maps_of_the_clip_and_later_frames_change_nothing():
    encoder = small_streamformer(window=3, temporal_positions="cycle")
    adapter = small_adapter(encoder).eval()
    clip = torch.randn(1, 6, 3, 32, 64)
    with torch.no_grad():
        whole = adapt_clip(encoder, adapter, clip)
        stream = encoder.stream(layers=adapter.taps)
        for index in range(6):
            frame = clip[:, index : index + 1]
            maps = adapter(frame, stream.push(frame).layers)
            for name in LEVELS:
                scale = whole[name].abs().max()
                torch.testing.assert_close(
                    maps[name][0], whole[name][index], rtol=0, atol=1e-5 * scale.item()
                )
        clip[:, 4:] = torch.randn(1, 2, 3, 32, 64)
        changed = adapt_clip(encoder, adapter, clip)
    for name in LEVELS:
        assert torch.equal(changed[name][:4], whole[name][:4])
        assert not torch.allclose(changed[name][4:], whole[name][4:])


def test_the_encoder_stays_frozen_unless_asked():
    encoder = small_streamformer()
    adapter = small_adapter(encoder)
    encoder.requires_grad_(True)
    clip = torch.randn(1, 2, 3, 32, 32)
    frozen = encode_taps(encoder, clip, adapter.taps)
    assert not any(tokens.requires_grad for tokens in frozen.values())
    open_ = encode_taps(encoder, clip, adapter.taps, gradients=True)
    torch.testing.assert_close(open_, frozen, check_stride=False)

    sum(level.square().mean() for level in adapt_clip(encoder, adapter, clip).values()).backward()
    assert all(weight.grad is None for weight in encoder.parameters())
    assert all(weight.grad is not None for weight in adapter.parameters())
    maps = adapt_clip(encoder, adapter, clip, gradients=True)
    sum(level.square().mean() for level in maps.values()).backward()
    layer = encoder.model.layers[0]
    assert layer.temporal_attention.qkv.weight.grad.abs().max() > 0
    assert encoder.model.embeddings.patch_embedding.weight.grad.abs().max() > 0


def test_a_fresh_adapter_keeps_the_directions_of_its_heads():
    adapter = small_adapter(small_streamformer())
    for extractors in adapter.extractors:
        for extractor in extractors:
            assert extractor.attention.sampling_offsets.bias.abs().max() == 4
    assert [len(extractors) for extractors in adapter.extractors] == [1, 1, 1, 3]


def test_a_half_precision_encoder_feeds_a_single_precision_adapter():
    encoder = small_streamformer().to(torch.bfloat16)
    adapter = small_adapter(encoder).eval()
    maps = adapt_clip(encoder, adapter, torch.randn(1, 2, 3, 32, 32))
    assert {level.dtype for level in maps.values()} == {torch.float32}


def test_refusals_name_what_does_not_fit():
    encoder = small_streamformer()
    adapter = small_adapter(encoder)
    layers = encode_taps(encoder, torch.randn(1, 1, 3, 32, 32), adapter.taps)
    with pytest.raises(ValueError, match="40 x 32 pixels: the adapter needs multiples of 32; pad"):
        adapter(torch.zeros(1, 1, 3, 40, 32), layers)
    with pytest.raises(ValueError, match=r"frames of shape \(1, 3, 32, 32\); expected"):
        adapter(torch.zeros(1, 3, 32, 32), layers)
    with pytest.raises(ValueError, match=r"layer 3 is missing among \[1, 2\]; ask for .*1, 2, 3"):
        adapter(torch.zeros(1, 1, 3, 32, 32), {k: v for k, v in layers.items() if k != 3})
    with pytest.raises(ValueError, match=r"layer 1 have shape \(1, 1, 16, 16\), expected \(1, 2"):
        adapter(torch.zeros(1, 2, 3, 32, 32), layers)
    with pytest.raises(ValueError, match="num_heads=5 does not divide the encoder's width 16"):
        AdapterConfig.for_encoder(encoder, num_heads=5)
    with pytest.raises(ValueError, match=r"taps=\(2, 1, 3, 3\): needs 4 layers in ascending"):
        AdapterConfig.for_encoder(encoder, num_heads=4, taps=(2, 1, 3, 3))
    with pytest.raises(ValueError, match=r"ffn_ratio=0.01 of 16"):
        AdapterConfig.for_encoder(encoder, num_heads=4, ffn_ratio=0.01)
