"""Augmentation of clips with masks, the same for all frames; and pictures that become clips.

A clip is cut, resized and flipped as one, so that objects keep moving as they did. A picture shown
``T`` times over becomes a clip by what happens between the frames: the window of the cut drifts
from one place to another, and the picture turns (CTVIS, Ying et al., ICCV 2023, section 3.4). The
pixel work is torchvision's; here are the choices, all drawn from the generator that is given.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv


@dataclass(frozen=True, kw_only=True)
class ClipAugmentation:
    """What may happen to a clip, in this order; defaults are StreamFormer's for real videos.

    Attributes:
        crop: probability of cutting out a window, for the whole clip.
        crop_scales: before that, the short side is brought to one of these; empty, as released for
            real videos: the window is cut from the frame as it is, which of 720 lines leaves a
            twentieth.
        crop_sizes: least and greatest side of the window, height and width drawn apart.
        drift: the window moves in a straight line, at random speed; released: for pictures only.
        sizes: in the end the short side is brought to one of these.
        max_size: the long side never gets longer, here and before the cut.
        flip: probability of mirroring left and right.
        rotation: degrees to either side; frames turn one way in random steps around one point near
            the middle. 0 for real videos.
    """

    crop: float = 0.5
    crop_scales: tuple[int, ...] = (400, 500, 600)
    crop_sizes: tuple[int, int] = (224, 224)
    drift: bool = True
    sizes: tuple[int, ...] = (224,)
    max_size: int = 1333
    flip: float = 0.5
    rotation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("crop_scales", "crop_sizes", "sizes"):  # configs bring lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("crop", "flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augmentation {name}={getattr(self, name)} is no probability")
        if not self.sizes or min((*self.sizes, *self.crop_scales, self.max_size)) < 1:
            raise ValueError(
                f"augmentation sizes={self.sizes}, crop_scales={self.crop_scales}, "
                f"max_size={self.max_size}: needs at least one size, and all above 0"
            )
        if len(self.crop_sizes) != 2 or not 1 <= self.crop_sizes[0] <= self.crop_sizes[1]:
            raise ValueError(
                f"augmentation crop_sizes={self.crop_sizes} must be the least and the greatest side"
            )
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"augmentation rotation={self.rotation} must lie in 0..180 degrees")

    @classmethod
    def for_pictures(cls, **changes: Any) -> ClipAugmentation:
        """As for videos, and turning: what makes pseudo-videos of COCO's pictures."""
        return cls(**{"rotation": 15.0, **changes})

    @classmethod
    def released(cls, pictures: bool = False, **changes: Any) -> ClipAugmentation:
        """As StreamFormer's code does it: videos are cut before resizing, and nothing drifts."""
        if pictures:
            return cls.for_pictures(**changes)
        return cls(**{"crop_scales": (), "drift": False, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def augment_clip(
    frames: Tensor, masks: Tensor, how: ClipAugmentation, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Augment one clip.

    Args:
        frames: ``(T, 3, H, W)`` uint8.
        masks: ``(n, T, H, W)`` bool.
        how: what may happen.
        rng: decides all of it.

    Returns:
        Frames ``(T, 3, h, w)`` uint8 and masks ``(n, T, h, w)`` bool; a mask may have become empty.
    """
    if rng.random() < how.crop:
        if how.crop_scales:
            frames, masks = resize_clip(frames, masks, _choice(how.crop_scales, rng), how.max_size)
        frames, masks = _crop(frames, masks, how, rng)
    frames, masks = resize_clip(frames, masks, _choice(how.sizes, rng), how.max_size)
    if rng.random() < how.flip:
        frames, masks = frames.flip(-1), masks.flip(-1)
    if how.rotation:
        frames, masks = _turn(frames, masks, how.rotation, rng)
    return frames, masks


def resized(height: int, width: int, short: int, longest: int) -> tuple[int, int]:
    """Height and width with the short side at ``short``, or less if the long one gets too long."""
    scale = min(short / min(height, width), longest / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_clip(frames: Tensor, masks: Tensor, short: int, longest: int) -> tuple[Tensor, Tensor]:
    """Resize frames ``(T, 3, H, W)`` uint8, smoothed, and masks ``(n, T, H, W)`` bool, nearest."""
    size = list(resized(*frames.shape[-2:], short, longest))
    if size == list(frames.shape[-2:]):
        return frames, masks
    frames = tv.resize(frames, size, InterpolationMode.BILINEAR, antialias=True)
    flat = masks.flatten(0, 1).to(torch.uint8)  # (n * T, H, W)
    if len(flat):
        flat = tv.resize(flat, size, InterpolationMode.NEAREST_EXACT)
    return frames, flat.bool().reshape(*masks.shape[:2], *size)


def _choice(values: tuple[int, ...], rng: np.random.Generator) -> int:
    return int(values[rng.integers(len(values))])


def _crop(
    frames: Tensor, masks: Tensor, how: ClipAugmentation, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Cut out a window that goes from one random place to another."""
    sides = np.array(frames.shape[-2:])
    window = np.minimum(rng.integers(how.crop_sizes[0], how.crop_sizes[1] + 1, 2), sides)
    start, end = rng.integers(0, sides - window + 1, (2, 2))  # y, x each
    way = np.sort(rng.random(len(frames)))[:, None] if how.drift else np.zeros((len(frames), 1))
    corners = np.rint(start + way * (end - start)).astype(int)  # (T, 2)
    height, width = window.tolist()
    return tuple(
        torch.stack(
            [
                clip.select(time, frame)[..., y : y + height, x : x + width]
                for frame, (y, x) in enumerate(corners.tolist())
            ],
            time,
        )
        for clip, time in ((frames, 0), (masks, 1))
    )


def _turn(
    frames: Tensor, masks: Tensor, most: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Turn the frames one way, in random steps; what comes in from outside is black."""
    angles = np.sort(rng.uniform(-most, most, len(frames)))
    if rng.random() < 0.5:
        angles = angles[::-1]
    height, width = frames.shape[-2:]
    centre = (rng.uniform(0.4, 0.6, 2) * (width, height)).tolist()
    turned = [
        tv.rotate(frame, float(angle), InterpolationMode.BILINEAR, center=centre)
        for frame, angle in zip(frames, angles, strict=True)
    ]
    if not len(masks):
        return torch.stack(turned), masks
    shapes = [
        tv.rotate(mask.to(torch.uint8), float(angle), InterpolationMode.NEAREST, center=centre)
        for mask, angle in zip(masks.unbind(1), angles, strict=True)
    ]
    return torch.stack(turned), torch.stack(shapes, 1).bool()
