"""From patch tokens to tokens of the LLM, against the published code and by properties."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from integrations.videoqa import visual

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def part(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def projector(tensors, prefix, kind="mlp2x_gelu"):
    weights = part(tensors, prefix)
    first = weights.get("0.weight", weights.get("weight"))
    module = visual.build_projector(kind, first.shape[1], first.shape[0])
    module.load_state_dict(weights)
    return module


@pytest.mark.golden
def test_pooling(golden_file):
    cases, tensors = golden_file("pooling")
    for case in cases:
        stem = f"case{case['case']}"
        pooled = visual.pool_patches(tensors[f"{stem}.input"], case["mode"], case["stride"])
        assert_close(pooled, tensors[f"{stem}.output"], **CLOSE, msg=str(case))


@pytest.mark.golden
def test_projectors(golden_file):
    cases, tensors = golden_file("projector")
    for case in cases:
        stem = f"case{case['case']}"
        module = projector(tensors, f"{stem}.weights.", case["mm_projector_type"])
        assert list(module.state_dict()) == case["weight_keys"]
        assert_close(module(tensors[f"{stem}.input"]), tensors[f"{stem}.output"], **CLOSE)


@pytest.mark.golden
def test_video_layouts(golden_file):
    description, tensors = golden_file("video_tokens")
    projected = projector(tensors, "projector.")(tensors["features"])
    assert_close(projected, tensors["projected"], **CLOSE)
    for case in description["cases"]:
        merge, position = case["mm_patch_merge_type"], case["mm_newline_position"]
        newline = tensors["image_newline"]
        pooled = visual.pool_patches(projected, case["mm_spatial_pool_mode"], case["stride"])
        frames = visual.lay_out_frames(pooled, newline, merge, position)
        tokens = visual.join_frames(frames, newline, merge, position)
        assert len(tokens) == case["n_tokens"]
        assert_close(tokens, tensors[f"case{case['case']}.output"], **CLOSE, msg=str(case))


@pytest.mark.golden
def test_tiles_of_an_image(golden_file):
    description, tensors = golden_file("anyres")
    tile, points = description["tile"], description["grid_pinpoints"]
    for case in description["best"]:
        best = visual.best_resolution(case["image_size_wh"], points)
        assert list(best) == case["best_resolution_wh"], case
        assert [side // tile for side in best] == case["grid_wh"]
    project = projector(tensors, "projector.")
    for case in description["token_cases"]:
        stem = f"case{case['case']}"
        tokens = visual.lay_out_image(
            project(tensors[f"{stem}.features"]),
            case["grid_wh"],
            case["image_size_wh"],
            tensors["image_newline"],
            case["mm_patch_merge_type"],
        )
        assert_close(tokens, tensors[f"{stem}.output"], **CLOSE, msg=str(case))


def test_tiles_hold_the_picture_once():
    pixels = np.random.default_rng(0).integers(1, 256, (32, 128, 3), dtype=np.uint8)
    tiles = visual.tile_image(Image.fromarray(pixels), [(64, 64), (128, 32)], 32)
    assert tiles.shape == (5, 32, 32, 3)
    assert np.array_equal(np.concatenate(tiles[1:], axis=1), pixels)  # four tiles in a row


def test_tiles_keep_the_aspect_on_black():
    image = Image.new("RGB", (100, 50), "white")
    tiles = visual.tile_image(image, [(64, 64)], 32)
    assert (tiles[0] == 255).all()  # the whole, squashed
    canvas = np.concatenate(
        [np.concatenate(tiles[1:3], axis=1), np.concatenate(tiles[3:5], axis=1)]
    )
    lit = (canvas > 0).all(axis=(1, 2))
    assert lit.nonzero()[0].tolist() == list(range(16, 48))  # 64 x 32, in the middle


def test_unpadding_keeps_what_the_tiles_show():
    """A tile's rows that are black by construction are those which the layout cuts off."""
    size, points = (100, 50), [(64, 64)]
    tiles = visual.tile_image(Image.new("RGB", size, "white"), points, 32)
    lit = torch.from_numpy((tiles > 0).all(axis=3)).float()  # (5, 32, 32): a token a pixel
    tokens = visual.lay_out_image(
        lit.flatten(1).unsqueeze(2), (2, 2), size, torch.tensor([7.0]), "spatial_unpad"
    )
    rows = tokens[32 * 32 :, 0].unflatten(0, (-1, 65))
    assert len(rows) == 32
    assert (rows[:, :64] == 1).all()
    assert (rows[:, 64] == 7).all()


@pytest.mark.parametrize(
    ("call", "value"),
    [
        (lambda: visual.build_projector("mlp0x_gelu", 2, 2), "mlp0x_gelu"),
        (lambda: visual.pool_patches(torch.zeros(1, 16, 2), "median", 2), "median"),
        (lambda: visual.pool_patches(torch.zeros(1, 16, 2), "max", 5), "pool_stride=5"),
        (lambda: visual.pool_patches(torch.zeros(1, 15, 2), "max", 2), "15 patch tokens"),
        (lambda: visual.tile_image(Image.new("RGB", (9, 9)), [(50, 32)], 32), r"\(50, 32\)"),
        (
            lambda: visual.lay_out_image(torch.zeros(3, 4, 2), (2, 2), (9, 9), None, "spatial"),
            "2 tiles for a grid of 2 x 2",
        ),
    ],
)
def test_refusals_name_the_value(call, value):
    with pytest.raises(ValueError, match=value):
        call()
