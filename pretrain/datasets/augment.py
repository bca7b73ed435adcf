"""Augmentation of whole clips with torchvision's transforms: every frame gets the same.

    none    short side to size, centre crop
    crop    short side to size, random crop                              retrieval, localization
    strong  RandAugment, random resized crop (area 0.08 to 1)            recognition
    things  short side to 8/7 of size, random crop around what masks     segmentation
            show; stills turn by up to 15 degrees from frame to frame

All but "strong" take masks along with the frames.
A horizontal flip is asked for by name, and never belongs to labels that tell left from right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from pretrain.datasets.masks import IGNORE
from pretrain.datasets.randaugment import rand_augment

KINDS = ("none", "crop", "strong", "things")
TURN, SHIFT = 15.0, 0.1  # degrees, and share of a side, by which stills turn and centres move


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

    def with_masks(
        self,
        frames: Tensor,
        masks: Tensor,
        size: int,
        rng: np.random.Generator | None,
        *,
        still: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Frames (T, 3, H, W) uint8 and masks (T, H, W) int32 to ``size``, both alike.

        still: all frames are one image, which "things" turns.
        """
        video, masks = tv_tensors.Video(frames), tv_tensors.Mask(masks)
        if rng is None or self == Augmentation("none"):
            both = [F.center_crop(resize_short_side(x, size), [size, size]) for x in (video, masks)]
        elif self.kind == "things":
            if still:
                video, masks = turned(video, masks, rng)
            both = crop_around_masks(video, masks, size, rng)
            if self.flip and rng.random() < 0.5:
                both = [F.horizontal_flip(x) for x in both]
        elif self.kind == "strong":
            raise ValueError("augmentation 'strong' would leave masks behind; use 'things'")
        else:
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(int(rng.integers(2**63)))
                both = _training(self.kind, self.flip, size)(video, masks)
        return tuple(x.as_subclass(Tensor) for x in both)


def turned(
    frames: Tensor, masks: Tensor, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Copies of a still, each turned by up to 15 degrees about a point near the middle.

    So an image becomes a video (T, 3, H, W) whose things move, with its masks (T, H, W). Nothing is
    known of the black corners.
    """
    height, width = frames.shape[-2:]
    images, shapes = [], []
    for frame, mask in zip(frames.as_subclass(Tensor), masks.as_subclass(Tensor), strict=True):
        angle, x, y = rng.uniform(-1, 1, 3) * (TURN, SHIFT * width, SHIFT * height)
        place = {"angle": angle, "center": [width / 2 + x, height / 2 + y]}
        images.append(F.rotate(frame, interpolation=v2.InterpolationMode.BILINEAR, **place))
        shapes.append(F.rotate(mask[None], fill=IGNORE, **place)[0])
    return tv_tensors.Video(torch.stack(images)), tv_tensors.Mask(torch.stack(shapes))


def crop_around_masks(
    frames: Tensor, masks: Tensor, size: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Squares of ``size`` about a point within the things that the masks (numbers from 0) show.

    Frames (T, 3, H, W) and masks (T, H, W) are resized first, short side to 8/7 of ``size``.
    """
    frames, masks = (resize_short_side(x, size + size // 7) for x in (frames, masks))
    things = (masks >= 0).any(0)  # (H, W)
    corner = []
    for axis, length in enumerate(masks.shape[1:]):
        shown = things.any(1 - axis).nonzero().flatten()
        low, high = crop_range(int(shown[0]), int(shown[-1]), length, size) if len(shown) else (
            0, length - size)  # fmt: skip
        corner.append(int(rng.integers(low, high, endpoint=True)))
    return tuple(F.crop(x, *corner, size, size) for x in (frames, masks))


def crop_range(first: int, last: int, length: int, size: int) -> tuple[int, int]:
    """Where a crop of ``size`` out of ``length`` pixels may begin: both ends included.

    Its middle lies within the thing, from pixel ``first`` to ``last``, as near as borders allow.
    """
    room = length - size
    return tuple(min(max(pixel - size // 2, 0), room) for pixel in (first, last))


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
    elif kind == "things":
        side = size + size // 7
        steps = [v2.Lambda(lambda x: resize_short_side(x, side)), v2.RandomCrop(size)]
    elif kind == "crop":
        steps = [v2.Lambda(lambda x: resize_short_side(x, size)), v2.RandomCrop(size)]
    else:
        crop = v2.RandomResizedCrop(size, scale=(0.08, 1.0), antialias=True)
        steps = [v2.Lambda(rand_augment), crop]
    return v2.Compose(steps + mirror)
