"""Pictures of video instance segmentation: masks with identities, on frames and in strips."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, PAPER = (34, 39, 46), (255, 255, 255)
LUMA = (0.299, 0.587, 0.114)  # how bright red, green and blue look
OPACITY = 0.45  # of a mask's inside
STRIP_FRAMES = 8  # of a video, evenly spaced
STRIP_HEIGHT = 128  # pixels of a frame in the strip
GAP, MARGIN = 6, 120  # pixels between frames, and for the labels of rows
TRUTH = "annotated"


def colour_of(identity: int) -> tuple[int, int, int]:
    """A colour that goes with an identity: hues a golden section apart, so neighbours differ."""
    hue = (0.58 + identity * 0.6180339887) % 1.0
    value = 0.95 if identity % 2 else 0.8
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.75, value))


def draw_masks(
    image: np.ndarray,
    size: tuple[int, int],
    masks: np.ndarray,
    ids: Sequence[int],
    names: Sequence[str],
) -> np.ndarray:
    """Draw objects onto one frame: a tint, an outline, and a tag with identity and name.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        size: width and height of the result.
        masks: ``(n, H, W)`` bool, the most certain first, which is drawn on top.
        ids: identity of each, which decides its colour.
        names: what its tag says beside it; empty for nothing.

    Returns:
        ``(height, width, 3)`` uint8 RGB.
    """
    tiny = size[0] >= 2 * image.shape[1]  # pixels of a rendered world stay squares
    resample = Image.Resampling.NEAREST if tiny else Image.Resampling.BILINEAR
    canvas = np.asarray(Image.fromarray(image).resize(size, resample), np.float32).copy()
    tags = []
    objects = list(zip(masks, ids, names, strict=True))
    for mask, identity, name in reversed(objects):
        inside = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        if not inside.any():
            continue
        colour = np.array(colour_of(int(identity)), np.float32)
        canvas[inside] = (1 - OPACITY) * canvas[inside] + OPACITY * colour
        canvas[_outline(inside, max(1, round(min(size) / 180)))] = colour
        rows, columns = np.nonzero(inside)
        tags.append((float(columns.mean()), float(rows.min()), int(identity), name))
    drawn = Image.fromarray(canvas.round().astype(np.uint8))
    _draw_tags(drawn, tags)
    return np.asarray(drawn)


def plot_strip(
    path: Path,
    videos: Sequence[tuple[Sequence[np.ndarray], Sequence[np.ndarray], Sequence[str], Mapping]],
    class_names: Sequence[str],
) -> None:
    """Write a PNG of some videos, frame by frame: as annotated, and as each encoder's run says.

    Args:
        path: PNG.
        videos: for each its frames (H, W, 3) uint8, the annotated masks (T, H, W) of its objects,
            their names, and label -> ``online.FrameResult`` of every frame.
        class_names: of the labels.
    """
    blocks = []
    for frames, truth, names, said in videos:
        count = min(STRIP_FRAMES, len(frames))
        chosen = np.linspace(0, len(frames) - 1, count).round().astype(int).tolist()
        height, width = frames[0].shape[:2]
        size = (max(1, round(STRIP_HEIGHT * width / height)), STRIP_HEIGHT)
        here = [
            (np.stack([mask[n] for mask in truth]) if truth else np.zeros((0, height, width), bool))
            for n in chosen
        ]
        lines = {
            TRUTH: [
                draw_masks(frames[n], size, masks, range(len(names)), names)
                for n, masks in zip(chosen, here, strict=True)
            ]
        }
        for label, results in said.items():
            lines[label] = [
                draw_masks(
                    frames[n],
                    size,
                    results[n].masks,
                    results[n].ids.tolist(),
                    [class_names[k] for k in results[n].labels.tolist()],
                )
                for n in chosen
            ]
        blocks.append((lines, chosen))
    _compose(blocks).save(path)


def _compose(blocks: Sequence[tuple[Mapping[str, list[np.ndarray]], list[int]]]) -> Image.Image:
    """Videos below each other, a row per label, a column per frame."""
    font, small = _font(15), _font(12)
    tile = max((row[0].shape[1] for lines, _ in blocks for row in lines.values()), default=1)
    columns = max((len(chosen) for _, chosen in blocks), default=1)
    width = MARGIN + columns * (tile + GAP) + GAP
    heights = [24 + len(lines) * (STRIP_HEIGHT + GAP) + 10 for lines, _ in blocks]
    sheet = Image.new("RGB", (width, sum(heights) + GAP), PAPER)
    draw, top = ImageDraw.Draw(sheet), GAP
    for (lines, chosen), height in zip(blocks, heights, strict=True):
        for column, number in enumerate(chosen):
            x = MARGIN + column * (tile + GAP) + tile / 2
            draw.text((x, top + 10), f"frame {number}", fill=INK, font=small, anchor="mm")
        for line, (label, pictures) in enumerate(lines.items()):
            y = top + 20 + line * (STRIP_HEIGHT + GAP)
            where = (MARGIN - 10, y + STRIP_HEIGHT / 2)
            draw.text(where, label, fill=INK, font=font, anchor="rm")
            for column, picture in enumerate(pictures):
                sheet.paste(Image.fromarray(picture), (MARGIN + column * (tile + GAP), y))
        top += height
    return sheet


def _outline(inside: np.ndarray, thickness: int) -> np.ndarray:
    """Pixels of a mask (H, W) bool within ``thickness`` of its edge."""
    kept = inside
    for _ in range(thickness):
        padded = np.pad(kept, 1)
        kept = kept & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~kept


def _draw_tags(image: Image.Image, tags: Sequence[tuple[float, float, int, str]]) -> None:
    """A small label above each object, kept inside the picture."""
    draw: Any = ImageDraw.Draw(image)
    unit = max(10, round(min(image.size) / 22))
    font = _font(unit)
    for x, y, identity, name in tags:
        text = f"{identity} {name}".strip()
        wide, high = draw.textlength(text, font=font) + unit * 0.6, unit * 1.35
        left = min(max(0.0, x - wide / 2), max(0.0, image.width - wide))
        top = min(max(0.0, y - high), image.height - high)
        box = (left, top, left + wide, top + high)
        draw.rounded_rectangle(box, radius=unit * 0.3, fill=colour_of(identity))
        middle = (left + wide / 2, top + high / 2)
        bright = sum(w * part for w, part in zip(LUMA, colour_of(identity), strict=True)) > 150
        draw.text(middle, text, fill=INK if bright else PAPER, font=font, anchor="mm")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
