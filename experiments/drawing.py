"""Pictures of an online detection: what is drawn onto each frame, and the timeline of a video."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, PAPER, ACCENT, QUIET = (34, 39, 46), (255, 255, 255), (0, 114, 178), (160, 168, 178)
TROUGH = (88, 95, 104, 220)  # the empty part of a bar
ROWS = 4  # actions shown on a frame
TIMELINE_ROWS = 12  # actions in a timeline
THUMBNAILS = 10


def canvas_size(width: int, height: int, short: int = 360, longest: int = 1280) -> tuple[int, int]:
    """Size of the annotated video: even numbers, large enough to read, whole steps for tiny frames.

    Frames with a short side below ``short`` are enlarged by a whole factor, so that their pixels
    stay square; frames longer than ``longest`` are reduced.
    """
    factor: float = max(1, -(-short // min(width, height)))
    factor = min(factor, longest / max(width, height)) if factor == 1 else factor
    return max(2, round(width * factor) // 2 * 2), max(2, round(height * factor) // 2 * 2)


def draw_scores(
    image: np.ndarray,
    size: tuple[int, int],
    time: float,
    scores: Sequence[tuple[str, float, bool]],
) -> np.ndarray:
    """Draw time and the leading actions onto one frame.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        size: width and height of the result, from ``canvas_size``.
        time: seconds, shown in the corner.
        scores: name, score in [0, 1] and whether it is on now, best first; empty before the
            detector's first answer.

    Returns:
        ``(height, width, 3)`` uint8 RGB.
    """
    tiny = size[0] >= 4 * image.shape[1]  # pixels of a rendered world stay squares
    resample = Image.Resampling.NEAREST if tiny else Image.Resampling.BICUBIC
    frame = Image.fromarray(image).resize(size, resample).convert("RGBA")
    unit = max(12, round(min(size) / 24))  # height of a line of text
    font = _font(unit)
    layer = Image.new("RGBA", size)
    draw = ImageDraw.Draw(layer)
    rows = list(scores[:ROWS]) or [("waiting for enough frames", 0.0, False)]
    line, pad = round(unit * 1.5), unit // 2
    label = max(draw.textlength(name, font=font) for name, _, _ in rows)
    bar = 0 if not scores else round(size[0] * 0.22)
    panel = (pad, size[1] - pad - line * len(rows) - pad, pad * 4 + label + bar, size[1] - pad)
    draw.rounded_rectangle(panel, radius=pad, fill=(*INK, 190))
    for row, (name, score, on) in enumerate(rows):
        top = panel[1] + pad / 2 + row * line
        colour = PAPER if on else QUIET
        draw.text((panel[0] + pad, top + line / 2), name, fill=colour, font=font, anchor="lm")
        if bar:
            left = panel[0] + 2 * pad + label
            middle = top + line / 2
            box = (left, middle - unit * 0.32, left + bar, middle + unit * 0.32)
            draw.rectangle(box, fill=TROUGH)
            if score > 0.005:
                filled = (*box[:2], left + bar * min(score, 1.0), box[3])
                draw.rectangle(filled, fill=(*(ACCENT if on else QUIET), 255))
    clock = f"{time:7.2f} s"
    width = draw.textlength(clock, font=font)
    corner = (size[0] - width - 3 * pad, pad, size[0] - pad, pad + line)
    draw.rounded_rectangle(corner, radius=pad, fill=(*INK, 150))
    place = (corner[0] + pad, (corner[1] + corner[3]) / 2)
    draw.text(place, clock, fill=PAPER, font=font, anchor="lm")
    return np.asarray(Image.alpha_composite(frame, layer).convert("RGB"))


def plot_timeline(
    path: Path,
    *,
    title: str,
    times: np.ndarray,
    scores: np.ndarray,
    names: Sequence[str],
    segments: Sequence[dict[str, Any]],
    pictures: Sequence[tuple[float, np.ndarray]],
) -> None:
    """Write the timeline of a video: a strip of frames above the scores of the leading actions.

    Args:
        path: PNG.
        title: one line.
        times: ``(S,)`` seconds of the steps.
        scores: ``(S, C)`` in [0, 1], a column per name.
        names: C actions.
        segments: ``{"action", "start", "end", "score"}`` each, framed in the plot.
        pictures: time and ``(H, W, 3)`` uint8 image of some frames, in order of time.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import LinearSegmentedColormap

    order = _leading(scores, names, segments)
    shades = LinearSegmentedColormap.from_list("scores", ["#ffffff", "#9cc9e6", "#0072b2"])
    style = {"font.size": 9.5, "axes.edgecolor": "#c9ced6", "text.color": "#22272e"}
    with pyplot.rc_context(style):
        figure = pyplot.figure(figsize=(12, 2.4 + 0.32 * len(order)), layout="constrained")
        try:
            grid = figure.add_gridspec(2, 1, height_ratios=[1.15, 0.32 * len(order)])
            strip = figure.add_subplot(grid[0])
            heat = figure.add_subplot(grid[1])
            _plot_strip(strip, pictures)
            figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
            shown = [names[column] for column in order]
            look = {"cmap": shades, "vmin": 0, "vmax": 1}
            draw_heat(figure, heat, times, scores[:, order], shown, "score now", **look)
            rows = {name: row for row, name in enumerate(shown)}
            for segment in segments:
                if segment["action"] in rows:
                    _frame(heat, segment, rows[segment["action"]], _step(times))
            figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, hspace=0.0)
            figure.savefig(path, dpi=130, facecolor="white")
        finally:
            pyplot.close(figure)


def draw_heat(
    figure: Any,
    axes: Any,
    times: np.ndarray,
    values: np.ndarray,
    names: Sequence[str],
    label: str,
    **look: Any,
) -> None:
    """Draw a row per name, its values over time as colours.

    Args:
        figure: matplotlib's, which gets a bar of colours.
        axes: to draw on.
        times: ``(S,)`` seconds.
        values: ``(S, C)``.
        names: C rows.
        label: of the bar.
        look: matplotlib's options of ``imshow``, such as ``cmap``.
    """
    step = _step(times)
    image = axes.imshow(
        values.T,
        aspect="auto",
        extent=(times[0] - step / 2, times[-1] + step / 2, len(names) - 0.5, -0.5),
        interpolation="nearest",
        **look,
    )
    axes.set_yticks(range(len(names)), names)
    axes.set_yticks(np.arange(len(names) - 1) + 0.5, minor=True)
    axes.grid(axis="y", which="minor", color="#e6e9ee")
    axes.tick_params(axis="y", which="both", length=0)
    axes.set_xlabel("seconds")
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03)
    bar.set_label(label)
    bar.outline.set_visible(False)


def _step(times: np.ndarray) -> float:
    """Seconds from one time to the next."""
    return float(np.median(np.diff(times))) if len(times) > 1 else 1.0


def _leading(scores: np.ndarray, names: Sequence[str], segments: Sequence[dict]) -> list[int]:
    """Columns to show: detected actions in order of appearance, then the highest scores."""
    detected = list(dict.fromkeys(names.index(segment["action"]) for segment in segments))
    others = [c for c in np.argsort(-scores.max(axis=0), kind="stable") if c not in detected]
    return [int(c) for c in [*detected, *others][: max(TIMELINE_ROWS, len(detected))]]


def _plot_strip(axes: Any, pictures: Sequence[tuple[float, np.ndarray]]) -> None:
    chosen = np.linspace(0, len(pictures) - 1, min(THUMBNAILS, len(pictures))).round().astype(int)
    size = (160, round(160 * pictures[0][1].shape[0] / pictures[0][1].shape[1]))
    gap = np.full((size[1], 6, 3), 255, np.uint8)
    parts: list[np.ndarray] = []
    for place in chosen:
        parts += [np.asarray(Image.fromarray(pictures[place][1]).resize(size)), gap]
    strip = np.concatenate(parts[:-1], axis=1)
    axes.imshow(strip, aspect="equal")
    axes.set_xticks(
        [size[0] / 2 + k * (size[0] + 6) for k in range(len(chosen))],
        [f"{pictures[place][0]:.1f} s" for place in chosen],
    )
    axes.set_yticks([])
    axes.tick_params(axis="x", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _frame(axes: Any, segment: dict[str, Any], row: int, step: float) -> None:
    from matplotlib.patches import Rectangle

    start = segment["start"] - step / 2
    width = segment["end"] - segment["start"]
    axes.add_patch(
        Rectangle((start, row - 0.44), width, 0.88, fill=False, edgecolor="#22272e", linewidth=1.3)
    )


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
