"""Augmentation: masks follow pixels, one choice for all frames, and the same clip each time."""

import numpy as np
import pytest
import torch

from integrations.ovis.augment import ClipAugmentation, augment_clip, resize_clip, resized

NOTHING = ClipAugmentation(crop=0, flip=0, sizes=(48,))


def clip(frames=6, height=48, width=80, moving=True):
    """Grey frames with a bright block that its mask covers exactly, moving to the right."""
    pixels = torch.full((frames, 3, height, width), 60, dtype=torch.uint8)
    masks = torch.zeros(1, frames, height, width, dtype=torch.bool)
    for frame in range(frames):
        left = 20 + (3 * frame if moving else 0)
        masks[0, frame, 14:32, left : left + 20] = True
    pixels[masks.expand(3, -1, -1, -1).transpose(0, 1)] = 250
    return pixels, masks


def agreement(frames, masks):
    """IoU of what is bright and what is masked."""
    bright = frames[:, 0] > 155
    return ((bright & masks[0]).sum() / (bright | masks[0]).sum()).item()


@pytest.mark.parametrize(
    "how",
    [
        NOTHING,
        ClipAugmentation(crop=0, flip=1, sizes=(48,)),
        ClipAugmentation(crop=0, flip=0, sizes=(33, 96)),
        ClipAugmentation(crop=1, flip=0, sizes=(48,), crop_scales=(60,), crop_sizes=(36, 44)),
        ClipAugmentation(crop=1, flip=0, sizes=(48,), crop_scales=(), crop_sizes=(200, 300)),
        ClipAugmentation(crop=0, flip=0, sizes=(96,), rotation=30),
        ClipAugmentation.for_pictures(sizes=(64,), crop_scales=(70,), crop_sizes=(40, 60)),
        ClipAugmentation.released(sizes=(64,), crop_sizes=(40, 40)),
    ],
)
def test_masks_follow_pixels(how):
    for seed in range(8):
        frames, masks = augment_clip(*clip(), how, np.random.default_rng(seed))
        assert frames.dtype == torch.uint8 and masks.dtype == torch.bool
        assert frames.shape[-2:] == masks.shape[-2:]
        assert frames.shape[:2] == (6, 3) and masks.shape[:2] == (1, 6)
        if masks.sum() > 200:
            assert agreement(frames, masks) > 0.85


def test_nothing_to_do_changes_nothing():
    frames, masks = clip()
    same, same_masks = augment_clip(frames, masks, NOTHING, np.random.default_rng(0))
    assert torch.equal(same, frames) and torch.equal(same_masks, masks)


def test_the_generator_decides_all():
    how = ClipAugmentation.for_pictures(sizes=(40, 50), crop_scales=(60,), crop_sizes=(30, 40))
    first, again, other = (
        augment_clip(*clip(), how, np.random.default_rng(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert first[0].shape != other[0].shape or not torch.equal(first[0], other[0])


def test_a_still_object_stays_still_without_drift_and_moves_with_it():
    fixed = ClipAugmentation(crop=1, crop_scales=(), crop_sizes=(40, 40), sizes=(40,), drift=False)
    moving = ClipAugmentation(crop=1, crop_scales=(), crop_sizes=(40, 40), sizes=(40,), flip=0)
    paths = []
    for seed in range(40):
        frames, _ = augment_clip(*clip(moving=False), fixed, np.random.default_rng(seed))
        assert (frames == frames[:1]).all()
        _, masks = augment_clip(*clip(moving=False), moving, np.random.default_rng(seed))
        if (masks[0].sum((1, 2)) == 18 * 20).all():  # wholly in view
            paths.append(masks[0].any(1).int().argmax(-1))  # its left edge
    steps = [path.diff() for path in paths]
    assert len(steps) > 5
    assert all((step >= 0).all() or (step <= 0).all() for step in steps)  # one way, never back
    assert any(step.any() for step in steps)


def test_rotation_turns_one_way():
    how = ClipAugmentation(crop=0, flip=0, sizes=(48,), rotation=25)
    for seed in range(6):
        frames, masks = clip(moving=False)
        _, turned = augment_clip(frames, masks, how, np.random.default_rng(seed))
        angles = []
        for mask in turned[0]:
            y, x = (axis.float() for axis in mask.nonzero(as_tuple=True))
            spread = torch.cov(torch.stack([x, y]))
            angles.append(0.5 * torch.atan2(2 * spread[0, 1], spread[0, 0] - spread[1, 1]))
        turns = torch.stack(angles).diff()
        turns = (turns + torch.pi / 2) % torch.pi - torch.pi / 2
        assert (turns > -0.06).all() or (turns < 0.06).all()


def test_a_mask_may_become_empty_and_clips_without_objects_pass():
    how = ClipAugmentation.for_pictures(crop=1, crop_scales=(), crop_sizes=(8, 8), sizes=(32,))
    frames, masks = clip(moving=False)
    counts = {
        int(augment_clip(frames, masks, how, np.random.default_rng(s))[1].any()) for s in range(20)
    }
    assert counts == {0, 1}
    empty = masks[:0]
    out, nothing = augment_clip(frames, empty, how, np.random.default_rng(0))
    assert out.shape == (6, 3, 32, 32) and nothing.shape == (0, 6, 32, 32)


@pytest.mark.parametrize(
    ("size", "short", "longest", "expected"),
    [((720, 1280), 224, 1333, (224, 398)), ((1280, 720), 224, 1333, (398, 224)),
     ((100, 1000), 224, 1333, (133, 1333)), ((64, 64), 64, 1333, (64, 64)),
     ((1, 900), 224, 300, (1, 300))],
)  # fmt: skip
def test_sides_keep_their_ratio(size, short, longest, expected):
    assert resized(*size, short, longest) == expected


def test_resizing_keeps_thin_masks_in_place():
    frames, masks = clip()
    larger = resize_clip(*resize_clip(frames, masks, 96, 999), 48, 999)
    assert torch.equal(larger[1], masks)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop": 1.5}, "crop=1.5 is no probability"),
        ({"sizes": ()}, r"sizes=\(\)"),
        ({"crop_scales": (0,)}, r"crop_scales=\(0,\)"),
        ({"crop_sizes": (9, 4)}, r"crop_sizes=\(9, 4\) must be the least and the greatest"),
        ({"rotation": -1}, "rotation=-1"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ClipAugmentation(**fields)


def test_settings_survive_json():
    how = ClipAugmentation.released(crop_sizes=[100, 200])
    assert ClipAugmentation(**how.to_dict()) == how
    assert how.crop_scales == () and not how.drift
    assert ClipAugmentation.released(pictures=True).drift
