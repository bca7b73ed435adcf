"""Augmentation of whole clips with torchvision's transforms: every frame gets the same.

    none    short side to size, centre crop
    crop    short side to size, random crop                              retrieval, localization
    strong  RandAugment, random resized crop (area 0.08 to 1)            recognition

RandAugment stands in for timm's ``rand-m7-n4-mstd0.5-inc1``: four operations of magnitude 7 out of
10, each applied with probability 0.5, drawn from torchvision's set. A horizontal flip is asked for
by name, and never belongs to labels that tell left from right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

KINDS = ("none", "crop", "strong")


@dataclass(frozen=True)
class Augmentation:
    """A named augmentation, and whether clips are mirrored half of the time."""

    kind: str
    flip: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no augmentation {self.kind!r}; known: {', '.join(KINDS)}")

    def __call__(self, frames: Tensor, size: int, rng: np.random.Generator | None) -> Tensor:
        """Frames (T, 3, H, W) uint8 to (T, 3, size, size); ``rng`` None means validation."""
        if rng is None or self == Augmentation("none"):
            return F.center_crop(resize_short_side(frames, size), [size, size])
        # torchvision draws from torch's global generator: seed a private copy of it.
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(int(rng.integers(2**63)))
            return _training(self.kind, self.flip, size)(frames)


def resize_short_side(frames: Tensor, size: int) -> Tensor:
    """Resize (T, 3, H, W) so that its short side has ``size`` pixels; the long one rounds down."""
    height, width = frames.shape[-2:]
    if min(height, width) == size:
        return frames
    short = min(height, width)
    target = [size * height // short, size * width // short]
    return F.resize(frames, target, v2.InterpolationMode.BILINEAR, antialias=True)


def crop_place(frames: Tensor, size: int, place: int, places: int) -> Tensor:
    """One of ``places`` squares spread evenly along the long side, (T, 3, size, size); one: middle.

    Frames (T, 3, H, W) are resized first.
    """
    frames = resize_short_side(frames, size)
    if places == 1:
        return F.center_crop(frames, [size, size])
    top, left = (round((side - size) * place / (places - 1)) for side in frames.shape[-2:])
    return F.crop(frames, top, left, size, size)


@cache
def _training(kind: str, flip: bool, size: int) -> Callable[[Tensor], Tensor]:
    mirror = [v2.RandomHorizontalFlip(0.5)] if flip else []
    if kind == "none":
        steps = [v2.Lambda(lambda x: resize_short_side(x, size)), v2.CenterCrop(size)]
    elif kind == "crop":
        steps = [v2.Lambda(lambda x: resize_short_side(x, size)), v2.RandomCrop(size)]
    else:
        operation = v2.RandAugment(1, 7, 11, v2.InterpolationMode.BILINEAR, fill=128)
        steps = [v2.RandomApply([operation], 0.5) for _ in range(4)]
        steps += [v2.RandomResizedCrop(size, scale=(0.08, 1.0), antialias=True)]
    return v2.Compose(steps + mirror)
