"""Masks of a video's frames: what their numbers mean, and the forms in which data sets store them.

    RleMasks      run lengths or polygons out of a JSON file      YouTube-VIS, LV-VIS, COCO, MeViS
    RleFiles      one JSON file of run lengths per thing          MeViS as released
    PaletteMasks  a PNG per frame whose pixels number the things  Refer-YouTube-VOS

Run lengths are COCO's: down the columns, beginning with what is outside, as a list or packed into
text. All are read only when their frames are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from pretrain.datasets.errors import ClipError

BACKGROUND = -1  # no annotated thing is here
IGNORE = -2  # nothing is known about this pixel


class MaskSource(Protocol):
    """Masks of one video, read when its frames are."""

    def read(self, frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Masks of ``frames``, numbers within the video, (T,), scaled to ``size`` (H, W).

        Returns (T, H, W) int32: number of a label within the entry's label set, `BACKGROUND` where
        no annotated thing is, `IGNORE` where nothing is known. Raises ClipError for masks that are
        missing, damaged or of another shape than the frames.
        """


Segmentation = Mapping[str, Any] | Sequence | None  # run lengths, polygons, or not in this frame


@dataclass(frozen=True)
class RleMasks:
    """Things given frame by frame, painted in their order: what comes later is in front.

    source: what messages call them, such as the annotation file and the video.
    size: (H, W) of the annotated frames; None for that of the run lengths themselves.
    things: for each its number in the masks, and its segmentation in every frame.
    """

    source: str
    size: tuple[int, int] | None
    things: tuple[tuple[int, Sequence[Segmentation]], ...]

    def read(self, frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """See `MaskSource`."""
        shown, places = np.unique(frames, return_inverse=True)  # a frame may come several times
        painted = np.stack([fit(self._paint(int(frame)), size, self.source) for frame in shown])
        return painted[places]

    def _paint(self, frame: int) -> np.ndarray:
        """All things of a frame, (H, W) int32."""
        size, visible = self.size, []
        for number, segmentations in self.things:
            if frame >= len(segmentations):
                raise ClipError(
                    f"{self.source}: no mask for frame {frame}, there are {len(segmentations)}; "
                    "video and annotations are of different lengths"
                )
            if segmentations[frame]:  # an empty list of polygons shows nothing, as null does
                visible.append((number, segmentations[frame]))
        if size is None:
            size = next((_size_of(found, self.source) for _, found in visible), (1, 1))
        painted = np.full(size, BACKGROUND, np.int32)
        for number, found in visible:
            where = f"{self.source}, frame {frame}"
            painted[decode_segmentation(found, size, where)] = number
        return painted


@dataclass(frozen=True)
class RleFiles:
    """One thing in one or more JSON files, each a list with run lengths or null for every frame.

    length: frames of the video, which every file must have. The thing has number 0.
    """

    files: tuple[Path, ...]
    length: int

    def read(self, frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """See `MaskSource`."""
        things = []
        for file in self.files:
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ClipError(f"{file}: masks cannot be read ({error})") from error
            if not isinstance(found, list) or len(found) != self.length:
                what = f"{len(found)} entries" if isinstance(found, list) else "no list"
                raise ClipError(f"{file}: {what}; the video has {self.length} annotated frames")
            things.append((0, found))
        return RleMasks(str(self.files[0]), None, tuple(things)).read(frames, size)


@dataclass(frozen=True)
class PaletteMasks:
    """A PNG with a palette for every frame; pixels of the numbers in ``objects`` are the thing, 0.

    folder: of the images. stems: their names without ``.png``, one per frame.
    """

    folder: Path
    stems: tuple[str, ...]
    objects: tuple[int, ...]

    def read(self, frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """See `MaskSource`."""
        return np.stack([self._read(int(frame), size) for frame in frames])

    def _read(self, frame: int, size: tuple[int, int]) -> np.ndarray:
        if frame >= len(self.stems):
            raise ClipError(
                f"{self.folder}: no mask for frame {frame}, there are {len(self.stems)}; "
                "video and annotations are of different lengths"
            )
        file = self.folder / f"{self.stems[frame]}.png"
        try:
            with Image.open(file) as image:
                if image.mode not in ("P", "L"):
                    raise ClipError(
                        f"{file}: pixels are {image.mode}, but numbers of objects are expected "
                        "(mode P)"
                    )
                numbers = np.array(image)
        except (OSError, SyntaxError) as error:  # some broken PNGs are a SyntaxError to Pillow
            raise ClipError(f"{file}: mask cannot be read ({error})") from error
        thing = np.isin(numbers, self.objects)
        return fit(np.where(thing, 0, BACKGROUND).astype(np.int32), size, str(file))


def fit(mask: np.ndarray, size: tuple[int, int], source: str) -> np.ndarray:
    """A mask (h, w) at the size (H, W) of its frame, each pixel the nearest.

    Frames may have been resized since they were annotated, so sizes may differ, but not shapes:
    raises ClipError where a side is more than a pixel off, one of the coarser of the two. A mask of
    one pixel fits everything.
    """
    if mask.shape == size or mask.size == 1:
        return np.broadcast_to(mask, size)
    scale = min(size) / min(mask.shape)
    sides = zip(size, mask.shape, strict=True)
    if any(abs(old * scale - new) > max(scale, 1) for new, old in sides):
        raise ClipError(
            f"{source}: masks of {mask.shape[1]} x {mask.shape[0]} pixels do not fit frames of "
            f"{size[1]} x {size[0]}"
        )
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64)
        for new, old in zip(size, mask.shape, strict=True)
    )
    return mask[rows[:, None], columns]


def decode_segmentation(found: Any, size: tuple[int, int], where: str) -> np.ndarray:
    """Run lengths or polygons to a mask (H, W) bool of this size. Raises ClipError."""
    if isinstance(found, Mapping):
        if _size_of(found, where) != size:
            height, width = _size_of(found, where)
            raise ClipError(
                f"{where}: run lengths of {width} x {height} pixels in frames of "
                f"{size[1]} x {size[0]}"
            )
        return decode_rle(found.get("counts"), size, where)
    return fill_polygons(found, size, where)


def decode_rle(
    counts: Sequence[int] | str | bytes, size: tuple[int, int], where: str
) -> np.ndarray:
    """COCO's run lengths to a mask (H, W) bool. Raises ClipError if they are not of this size."""
    if isinstance(counts, str | bytes):
        lengths = unpack_counts(counts, where)
    else:
        try:
            lengths = np.asarray(counts, np.int64)
        except (TypeError, ValueError, OverflowError) as error:
            raise ClipError(f"{where}: counts={counts!r:.60} are no run lengths") from error
    height, width = size
    if lengths.ndim != 1 or (lengths < 0).any() or lengths.sum() != height * width:
        raise ClipError(
            f"{where}: run lengths cover {int(lengths.sum())} pixels of {width} x {height} = "
            f"{height * width}; the mask is damaged, or of another frame size"
        )
    inside = np.arange(len(lengths)) % 2 == 1
    return np.repeat(inside, lengths).reshape(width, height).T


def unpack_counts(counts: str | bytes, where: str) -> np.ndarray:
    """COCO's packed run lengths, (runs,) int64.

    Every number is a row of characters that carry five bits each, lowest first, from code 48 on;
    bit 32 says that it goes on, bit 16 of its last character is the sign. From the fourth on it is
    the difference to the number two before.
    """
    try:
        packed = counts.encode("ascii") if isinstance(counts, str) else counts
    except UnicodeEncodeError as error:
        raise ClipError(f"{where}: counts={counts!r:.60} are no packed run lengths") from error
    codes = np.frombuffer(packed, np.uint8).astype(np.int64) - 48
    last = codes & 32 == 0
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or not last[-1]:
        raise ClipError(f"{where}: counts={counts!r:.60} are no packed run lengths")
    ends = np.flatnonzero(last)
    starts = np.append(0, ends[:-1] + 1)
    sizes = ends - starts + 1
    if sizes.max() > 12:
        raise ClipError(f"{where}: counts={counts!r:.60} hold a number of {sizes.max()} characters")
    bits = 5 * (np.arange(len(codes)) - np.repeat(starts, sizes))
    numbers = np.add.reduceat((codes & 31) << bits, starts)
    numbers -= np.where(codes[ends] & 16 > 0, 1, 0) << (5 * sizes)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def fill_polygons(polygons: Any, size: tuple[int, int], where: str) -> np.ndarray:
    """Polygons [x, y, x, y, …] to a mask (H, W) bool: the pixels whose centres are inside of any.

    COCO's own rasterization differs by pixels that an edge cuts.
    """
    height, width = size
    filled = np.zeros(size, bool)
    for polygon in polygons:
        if not isinstance(polygon, Sequence) or len(polygon) < 6 or len(polygon) % 2:
            raise ClipError(
                f"{where}: {polygon!r:.60} is no polygon; it needs three or more x, y"
            )
        x, y = np.asarray(polygon, np.float64).reshape(-1, 2).T
        crossed = np.zeros((height, width + 1), np.int64)
        for x0, y0, x1, y1 in zip(x, y, np.roll(x, -1), np.roll(y, -1), strict=True):
            top, bottom = (int(np.clip(np.ceil(v - 0.5), 0, height)) for v in sorted((y0, y1)))
            rows = np.arange(top, bottom)  # whose centres lie between the edge's ends
            if len(rows):
                at = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
                crossed[rows, np.clip(np.ceil(at - 0.5), 0, width).astype(np.int64)] += 1
        filled |= crossed.cumsum(1)[:, :width] % 2 == 1  # right of an odd number of edges
    return filled


def _size_of(found: Any, where: str) -> tuple[int, int]:
    size = found.get("size") if isinstance(found, Mapping) else None
    if not isinstance(size, Sequence) or len(size) != 2:
        raise ClipError(f"{where}: {found!r:.60} has no size [height, width]")
    return int(size[0]), int(size[1])
