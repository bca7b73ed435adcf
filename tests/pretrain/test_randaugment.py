"""RandAugment of clips: the operations are the recipe's, and what is drawn holds for all frames."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.datasets import randaugment
from pretrain.datasets.randaugment import KINDS, rand_augment

SIGNED = {
    "Rotate", "Color", "Contrast", "Brightness", "Sharpness",
    "ShearX", "ShearY", "TranslateX", "TranslateY",
}  # fmt: skip


@pytest.fixture
def image():
    """A smooth picture of 60 x 70 with every grey level, (60, 70, 3) uint8."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((70, 60), Image.BICUBIC))


def apply(name, image, level, sign):
    frames = torch.from_numpy(image).permute(2, 0, 1)[None]
    return KINDS[name](frames, level, sign)[0].permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize("level", [0.7, 0.55])
@pytest.mark.parametrize("name", KINDS)
def test_an_operation_equals_the_recipe_s_own(image, name, level):
    timm = pytest.importorskip("timm.data.auto_augment", reason="timm, whose recipe this is")
    suffix = {"Posterize": "Increasing", "Solarize": "Increasing", "Color": "Increasing",
              "Contrast": "Increasing", "Brightness": "Increasing", "Sharpness": "Increasing",
              "TranslateX": "Rel", "TranslateY": "Rel"}.get(name, "")  # fmt: skip
    hparams = {"magnitude_std": 0, "img_mean": (128,) * 3, "interpolation": Image.BILINEAR}
    operation = timm.AugmentOp(name + suffix, prob=1.0, magnitude=10 * level, hparams=hparams)
    theirs = {}
    for seed in range(20):  # the sign is drawn
        random.seed(seed)
        result = np.array(operation(Image.fromarray(image))).astype(int)
        theirs[result.tobytes()] = result
    assert len(theirs) == (2 if name in SIGNED else 1)
    for sign in (1, -1):
        mine = apply(name, image, level, sign)
        nearest = min(np.abs(mine - other).mean() for other in theirs.values())
        # What moves blends with the border in another way; else rounding. Wrong ones are off by
        # more than 40.
        assert nearest < (1.5 if name.startswith(("Rotate", "Shear", "Trans")) else 0.4)
    if name in SIGNED:
        assert np.abs(apply(name, image, level, 1) - apply(name, image, level, -1)).mean() > 0.5


def test_all_frames_get_the_same_and_draws_differ(image):
    frames = torch.from_numpy(image).permute(2, 0, 1).expand(5, -1, -1, -1)
    seen = set()
    for seed in range(30):
        torch.manual_seed(seed)
        out = rand_augment(frames)
        assert out.shape == frames.shape
        assert out.dtype == torch.uint8
        assert (out == out[:1]).all()
        seen.add(out[0].numpy().tobytes())
        torch.manual_seed(seed)
        assert torch.equal(rand_augment(frames), out)
    assert len(seen) > 20


def test_four_are_drawn_half_are_applied_at_magnitudes_around_seven(monkeypatch):
    calls = []

    def note(number):
        def operation(frames, level, sign):
            calls.append((number, level, sign))
            return frames

        return operation

    monkeypatch.setattr(randaugment, "KINDS", {str(i): note(i) for i in range(15)})
    torch.manual_seed(0)
    frames = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    for _ in range(1000):
        rand_augment(frames)
    numbers, levels, signs = map(np.array, zip(*calls, strict=True))
    assert 1900 < len(calls) < 2100
    assert np.bincount(numbers, minlength=15).min() > 90
    assert levels.mean() == pytest.approx(0.7, abs=0.005)
    assert levels.std() == pytest.approx(0.05, abs=0.005)
    assert abs(signs.mean()) < 0.1
