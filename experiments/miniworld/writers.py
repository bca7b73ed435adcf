"""Files in public data sets' formats: H.264, JPEG, CSV, JSON, uncompressed RLE masks."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image


def write_video(path: Path, frames: np.ndarray, fps: int, crf: int) -> None:
    """H.264 in MP4, one encoded picture per frame; ``frames`` is ``(T, H, W, 3)`` uint8 RGB."""
    _, height, width, _ = frames.shape
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        # Without lookahead: on pictures this small x264's reads memory beyond them, and the file
        # would differ from one rendering to the next.
        stream.options = {"crf": str(crf), "preset": "veryfast", "bf": "0", "rc-lookahead": "0"}
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_still(path: Path, image: np.ndarray, quality: int) -> None:
    """JPEG without chroma subsampling; ``image`` is ``(H, W, 3)`` uint8 RGB."""
    Image.fromarray(image).save(path, quality=quality, subsampling=0)


def write_json(path: Path, value: object, indent: int | None = None) -> None:
    """One JSON document, ending in a newline."""
    path.write_text(json.dumps(value, indent=indent) + "\n")


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """One line each: JSON lines."""
    path.write_text("".join(f"{line}\n" for line in lines))


def write_csv(path: Path, rows: Iterable[Sequence], header: Sequence[str] | None = None) -> None:
    """Comma-separated, quoted where needed; Kinetics lists have no header."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if header is not None:
            writer.writerow(header)
        writer.writerows(rows)


def run_lengths(masks: np.ndarray) -> list[list[int] | None]:
    """COCO run lengths of masks ``(T, H, W)`` bool: column-major, zeros first; None if empty."""
    frames, height, width = masks.shape
    flat = masks.transpose(0, 2, 1).reshape(frames, height * width)
    padded = np.zeros((frames, height * width + 1), np.int8)
    padded[:, 1:] = flat
    frame_of, change = np.nonzero(np.diff(padded, axis=1))
    starts = np.searchsorted(frame_of, np.arange(frames + 1))
    out: list[list[int] | None] = []
    for frame in range(frames):
        changes = change[starts[frame] : starts[frame + 1]]
        if len(changes) == 0:
            out.append(None)
            continue
        out.append(np.diff(changes, prepend=0, append=height * width).tolist())
    return out


def instance(masks: np.ndarray, **fields: object) -> dict:
    """A YouTube-VIS annotation of one shape in ``(T, H, W)`` bool; null where it is not visible."""
    _, height, width = masks.shape
    counts = run_lengths(masks)
    areas = masks.sum((1, 2)).tolist()
    seen = [count is not None for count in counts]
    return {
        **fields,
        "iscrowd": 0,
        "height": height,
        "width": width,
        "segmentations": [
            {"size": [height, width], "counts": count} if count else None for count in counts
        ],
        "bboxes": [_box(mask) if here else None for mask, here in zip(masks, seen, strict=True)],
        "areas": [area if here else None for area, here in zip(areas, seen, strict=True)],
    }


def _box(mask: np.ndarray) -> list[int]:
    """x, y, width, height of a non-empty mask."""
    columns, rows = mask.any(0), mask.any(1)
    left, top = int(columns.argmax()), int(rows.argmax())
    right = len(columns) - int(columns[::-1].argmax())
    bottom = len(rows) - int(rows[::-1].argmax())
    return [left, top, right - left, bottom - top]
