"""RandAugment for whole clips, as recognition is trained with: ``rand-m7-n4-mstd0.5-inc1``.

Four operations (Cubuk et al. 2020) out of fifteen whose effect grows with their magnitude, drawn
with replacement, each applied with probability 0.5 at a magnitude from N(7, 0.5) of 10: the same to
all frames. torchvision's own RandAugment draws from another set, without noise, and posterizes to
five bits where this one goes to two. Where the recipe resamples bicubically, this is bilinear:
torchvision moves tensors no other way. Randomness comes from torch's global generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

OPERATIONS, MAGNITUDE, SPREAD, PROBABILITY = 4, 7.0, 0.5, 0.5
GREY = 128  # what comes in from beyond the border


def rand_augment(frames: Tensor) -> Tensor:
    """Augment frames (T, 3, H, W) uint8, all alike."""
    kinds = list(KINDS.values())
    for drawn in torch.randint(len(kinds), (OPERATIONS,)).tolist():
        applied, up = (torch.rand(2) < PROBABILITY).tolist()
        level = (MAGNITUDE + SPREAD * torch.randn(()).item()) / 10
        if applied:
            frames = kinds[drawn](frames, min(max(level, 0.0), 1.0), 1 if up else -1)
    return frames


def _moved(x: Tensor, turn=0.0, shear=(0.0, 0.0), translate=(0.0, 0.0), center=None) -> Tensor:
    """Turned and sheared by degrees, moved by pixels."""
    return F.affine(
        x,
        angle=turn,
        translate=list(translate),
        scale=1.0,
        shear=list(shear),
        interpolation=v2.InterpolationMode.BILINEAR,
        fill=GREY,
        center=center,
    )


def _tilt(level: float, sign: int) -> float:
    return -sign * math.degrees(math.atan(0.3 * level))


def _factor(level: float, sign: int) -> float:
    return 1.0 + sign * 0.9 * level


def _solarize_add(x: Tensor, amount: int) -> Tensor:
    return torch.where(x < 128, (x.int() + amount).clamp(max=255).to(x.dtype), x)


# By name: frames, level in 0 to 1, sign of those that go either way.
KINDS: dict[str, Callable[[Tensor, float, int], Tensor]] = {
    "AutoContrast": lambda x, level, sign: F.autocontrast(x),
    "Equalize": lambda x, level, sign: F.equalize(x),
    "Invert": lambda x, level, sign: F.invert(x),
    "Rotate": lambda x, level, sign: _moved(x, turn=-sign * 30 * level),
    "Posterize": lambda x, level, sign: F.posterize(x, 4 - int(4 * level)),
    "Solarize": lambda x, level, sign: F.solarize(x, float(256 - int(256 * level))),
    "SolarizeAdd": lambda x, level, sign: _solarize_add(x, int(110 * level)),
    "Color": lambda x, level, sign: F.adjust_saturation(x, _factor(level, sign)),
    "Contrast": lambda x, level, sign: F.adjust_contrast(x, _factor(level, sign)),
    "Brightness": lambda x, level, sign: F.adjust_brightness(x, _factor(level, sign)),
    "Sharpness": lambda x, level, sign: F.adjust_sharpness(x, _factor(level, sign)),
    "ShearX": lambda x, level, sign: _moved(x, shear=(_tilt(level, sign), 0.0), center=[0, 0]),
    "ShearY": lambda x, level, sign: _moved(x, shear=(0.0, _tilt(level, sign)), center=[0, 0]),
    "TranslateX": lambda x, level, sign: _moved(
        x, translate=(-sign * 0.45 * level * x.shape[-1], 0.0)
    ),
    "TranslateY": lambda x, level, sign: _moved(
        x, translate=(0.0, -sign * 0.45 * level * x.shape[-2])
    ),
}
