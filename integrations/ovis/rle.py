"""Masks as files hold them: COCO's run lengths and polygons, a frame each, and null for absence.

A segmentation is ``{"size": [H, W], "counts": …}`` with counts as a list of run lengths (column by
column, zeros first) or as COCO's compressed text, or a list of polygons ``[x, y, x, y, …]``, or
None where the object is not seen. The format and its arithmetic are pycocotools'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco


class MaskError(ValueError):
    """A segmentation that is broken, or of another size than its video."""


def compress(
    segmentation: Any, size: tuple[int, int], where: str, frame: int | None = None
) -> dict | None:
    """A segmentation of any kind as compressed run lengths, or None.

    Args:
        segmentation: see the head of this file.
        size: ``(H, W)`` of the frame.
        where: what a message calls it, such as "annotation 7"; ``frame`` is added to it.
        frame: number of the frame.

    Raises:
        MaskError: another size, run lengths that do not fill the frame, or no such thing.
    """
    if segmentation is None:
        return None
    try:
        found, counts = segmentation["size"], segmentation["counts"]
    except (TypeError, KeyError):
        if isinstance(segmentation, list):
            return _from_polygons(segmentation, size, _place(where, frame))
        raise MaskError(
            f"{_place(where, frame)}: the segmentation is {str(segmentation)[:60]!r}; expected an "
            "object with 'size' and 'counts', a list of polygons, or null"
        ) from None
    if tuple(found) != size:
        raise MaskError(
            f"{_place(where, frame)}: the mask is {_named(found)}, but its video is "
            f"{_named(size)}; write masks at the size of the video"
        )
    if isinstance(counts, (str, bytes)):
        return segmentation
    if not isinstance(counts, list) or not all(isinstance(n, int) and n >= 0 for n in counts):
        raise MaskError(
            f"{_place(where, frame)}: counts {str(counts)[:60]} are neither run lengths nor a text"
        )
    if sum(counts) != size[0] * size[1]:
        raise MaskError(
            f"{_place(where, frame)}: run lengths cover {sum(counts)} pixels, but {_named(size)} "
            f"are {size[0] * size[1]}"
        )
    return coco.frPyObjects({"size": list(size), "counts": counts}, *size)


def decode(
    segmentations: Sequence[Any], size: tuple[int, int], where: str, first: int = 0
) -> np.ndarray:
    """Masks ``(T, H, W)`` bool of segmentations, one a frame; ``first`` numbers them in messages.

    Raises:
        MaskError: see :func:`compress`; also for a text that is not run lengths of this size.
    """
    masks = np.zeros((len(segmentations), *size), bool)
    for frame, segmentation in enumerate(segmentations):
        packed = compress(segmentation, size, where, first + frame)
        if packed is None:
            continue
        check_cover(packed, size, where, first + frame)
        masks[frame] = coco.decode([packed])[..., 0]
    return masks


def check_cover(packed: Mapping, size: tuple[int, int], where: str, frame: int) -> None:
    """Compare compressed run lengths with their size, which pycocotools takes on trust.

    Raises:
        MaskError: they cover more or less.
    """
    text = packed["counts"]
    try:
        covered = _covered(text.encode("ascii") if isinstance(text, str) else text)
    except (ValueError, IndexError):
        covered = None
    if covered != size[0] * size[1]:
        raise MaskError(
            f"{_place(where, frame)}: the compressed counts cover "
            f"{'nothing readable' if covered is None else f'{covered} pixels'}, but "
            f"{_named(size)} are {size[0] * size[1]}"
        )


def encode(masks: np.ndarray) -> list[dict | None]:
    """Compressed run lengths, JSON-able, of masks ``(T, H, W)`` bool; None for empty ones."""
    packed = coco.encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8))
    seen = masks.any((1, 2))
    return [
        {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")}
        if here
        else None
        for rle, here in zip(packed, seen, strict=True)
    ]


def areas(packed: Sequence[Mapping]) -> np.ndarray:
    """Pixels of compressed masks, ``(n,)``."""
    # pycocotools 2.0.11 counts its arguments in eight bits where NumPy is 2 or later.
    parts = [coco.area(list(packed[n : n + 255])) for n in range(0, len(packed), 255)]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint32)


def boxes(masks: np.ndarray) -> np.ndarray:
    """Boxes ``(…, 4)`` float32, x, y, width, height in pixels, of masks ``(…, H, W)``.

    A box holds its mask's pixels whole: one pixel at (x, y) has the box (x, y, 1, 1). An empty
    mask has the box (0, 0, 0, 0).
    """
    columns, rows = masks.any(-2), masks.any(-1)  # (…, W), (…, H)
    left, top = columns.argmax(-1), rows.argmax(-1)
    right = masks.shape[-1] - columns[..., ::-1].argmax(-1)
    bottom = masks.shape[-2] - rows[..., ::-1].argmax(-1)
    out = np.stack([left, top, right - left, bottom - top], -1).astype(np.float32)
    return out * columns.any(-1)[..., None]


def _from_polygons(polygons: list, size: tuple[int, int], where: str) -> dict | None:
    if not polygons:
        return None
    short = [p for p in polygons if not isinstance(p, list) or len(p) < 6 or len(p) % 2]
    if short:
        raise MaskError(
            f"{where}: polygon {str(short[0])[:60]} is not a list of three or more points x, y"
        )
    return coco.merge(coco.frPyObjects(polygons, *size))


def _covered(text: bytes) -> int:
    """Sum of compressed run lengths.

    A number is a row of characters of five bits each, the lowest first, 32 added to all but the
    last, whose highest bit is the sign; from the fourth on they are differences to the one before
    the last.
    """
    raw = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(raw < 32)
    starts = np.concatenate([[0], ends[:-1] + 1])
    shifts = 5 * (np.arange(len(raw)) - np.repeat(starts, ends - starts + 1))
    numbers = np.add.reduceat((raw & 31) << shifts, starts)
    numbers -= (raw[ends] & 16) // 16 << shifts[ends] + 5
    return int(numbers[0] + numbers[1::2].cumsum().sum() + numbers[2::2].cumsum().sum())


def _place(where: str, frame: int | None) -> str:
    return where if frame is None else f"{where}, frame {frame}"


def _named(size: Sequence[int]) -> str:
    return " x ".join(map(str, size)) + " (height x width)"
