"""Which text fits a video: the whole clip, each frame, each patch, as table, JSON and heat map.

The computing is ``pretrain.align``'s; this file finds the encoder's text tower, reads the video,
and draws.
"""

from __future__ import annotations

import argparse
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from experiments import preflight
from experiments.config import UserError
from experiments.report import say

logger = logging.getLogger(__name__)

ABOUT = """\
Compares your video with your texts. Every number is a cosine similarity: compare
those of different texts with one another, their level alone says little. The clip
is read off its last frame, which has seen all others if the encoder has a memory;
for SigLIP it is one image. A mini encoder knows miniworld's shapes and moves only."""
EXAMPLES = """\
  python experiments/run.py align video.mp4 --encoder streamformer:work_dirs/pretrain/model \\
      --texts "a red circle moves left" "a blue square grows"
  python experiments/run.py align video.mp4 --texts "a dog" "a cat" --start 10 --end 14 \\
      --encoder siglip:google/siglip-base-patch16-224
  python experiments/run.py align video.mp4 --texts "a dog" --device cuda \\
      --encoder streamformer:StreamFormer/streamformer-timesformer \\
      --siglip google/siglip-base-patch16-224"""

TEACHER = "google/siglip-base-patch16-224"  # of the released StreamFormer
TABLE_FRAMES = 8  # columns of the printed table
PICTURES = 6  # frames whose patches are drawn
MOST_DRAWN = 8  # texts whose patches are drawn, those that fit best


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add = parser.add_argument
    add("video", help="file, folder of images, or an http address")
    add("--texts", nargs="+", required=True, metavar="TEXT", help="quoted, one or several")
    add("--encoder", required=True, metavar="KIND:SOURCE", help="source: a folder or a hub id")
    add(
        "--siglip",
        metavar="FOLDER|ID",
        help="whose text tower reads the texts; default: the one that the encoder was made with",
    )
    add("--frames", type=int, default=16, metavar="T", help="of the clip, default 16")
    add("--start", type=float, default=0.0, metavar="S", help="second at which the clip begins")
    add("--end", type=float, metavar="S", help="second at which it ends; default: with the video")
    add("--out", type=Path, metavar="DIR", help="default: work_dirs/align/<name of the video>")
    add("--device", default="auto", help="auto (the default), cpu, cuda, …")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read, align, print, write; returns what the JSON file holds."""
    if problems := preflight.encoder(args.encoder):
        raise UserError(problems[0])
    from backbone import build_encoder, video
    from backbone.files import replacing, write_json
    from experiments.environment import choose_device
    from pretrain import align
    from pretrain.text import load_siglip_text

    device = choose_device(args.device)
    source = args.siglip or teacher_of(args.encoder)
    try:
        frames, times = video.sample_frames(
            args.video, args.frames, start=args.start, end=args.end
        )
        tower, log_scale, bias = load_siglip_text(source, device=device)
        encoder = build_encoder(args.encoder, device=device)
        found = align(encoder, tower, frames, args.texts)
    except (video.VideoError, ValueError, OSError) as error:
        raise UserError(str(error)) from error
    log_scale, bias = trained_scalars(args.encoder) or (log_scale, bias)
    probable = found.probabilities(math.exp(log_scale), bias)
    result = {
        "video": args.video,
        "encoder": args.encoder,
        "encoder_settings": encoder.settings(),
        "siglip": source,
        "times": times.tolist(),
        "texts": list(found.texts),
        "cosine": _levels(found),
        "scale": math.exp(log_scale),
        "bias": bias,
        "probability": _levels(probable),
        "command": args.command,
    }
    out = args.out or Path("work_dirs/align") / Path(args.video).stem
    write_json(out / "alignment.json", result)
    shown = np.moveaxis(video.preprocess(frames, encoder.image_size, (0,) * 3, (1,) * 3).numpy(),
                        1, -1)  # (T, H, W, 3) in [0, 1], cropped as the encoder sees them
    with replacing(out / "alignment.png") as temporary:
        title = f"{Path(args.video).name} against {len(args.texts)} texts, {encoder.kind}"
        draw(temporary, title, times, shown, found)
    say(f"{table(times, found)}\n{out / 'alignment.json'}, .png")
    return result


def teacher_of(spec: str) -> str:
    """Folder or hub id of the SigLIP model whose texts an encoder was aligned with.

    Raises:
        UserError: it is not known; then the user has to say it.
    """
    kind, _, source = spec.partition(":")
    if kind == "siglip":
        return source
    made = Path(source) / "pretrain.json"
    if made.is_file():
        from backbone.files import read_json

        return read_json(made)["model"]["siglip"]
    if spec == preflight.RELEASED["streamformer"]:
        return TEACHER
    raise UserError(
        f"--encoder {spec}: nothing tells with which SigLIP model it was trained (there is no "
        f"{made}); name it, such as --siglip {TEACHER}"
    )


def trained_scalars(spec: str) -> tuple[float, float] | None:
    """Log scale and bias of a model of our own training, None for any other.

    Where tasks had scalars of their own, those of the first are taken.
    """
    file = Path(spec.partition(":")[2]) / "alignment.json"
    if not file.is_file():
        return None
    from backbone.files import read_json

    saved = read_json(file)
    return saved["log_scale"][0], saved["bias"][0]


def table(times: np.ndarray, found: Any) -> str:
    """Texts by clip, some frames and the best patch, cosines; the best text of a column starred."""
    chosen = _spread(len(times), TABLE_FRAMES)
    columns = {"clip": found.clip}
    columns |= {f"{times[t]:.2f} s": found.frames[t] for t in chosen}
    columns["best patch"] = found.patches.flatten(0, 2).amax(0)
    width = max(map(len, found.texts))
    sizes = [max(len(name), 7) for name in columns]
    header = "  ".join(name.rjust(size) for name, size in zip(columns, sizes, strict=True))
    lines = [f"{'cosine':<{width}}  {header}"]
    for row, text in enumerate(found.texts):
        cells = []
        for values, size in zip(columns.values(), sizes, strict=True):
            mark = "*" if len(found.texts) > 1 and int(values.argmax()) == row else " "
            cells.append(f"{values[row].item():+.3f}{mark}".rjust(size))
        lines.append(f"{text:<{width}}  {'  '.join(cells)}")
    rule = "-" * len(lines[0])
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def draw(path: Path, title: str, times: np.ndarray, images: np.ndarray, found: Any) -> None:
    """Write the PNG: texts over time below a strip of frames, then patches of some frames.

    Args:
        path: PNG.
        title: one line.
        times: ``(T,)`` seconds.
        images: ``(T, S, S, 3)`` in [0, 1], as the encoder sees them.
        found: ``pretrain.align.Alignment`` of cosines.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import LinearSegmentedColormap

    from experiments.drawing import draw_heat

    shades = LinearSegmentedColormap.from_list("fit", ["#ffffff", "#9cc9e6", "#0072b2"])
    chosen = _spread(len(times), PICTURES)
    best = found.clip.argsort(descending=True)[:MOST_DRAWN].tolist()
    rows, columns = len(best), len(chosen)
    labels = [_short(text) for text in found.texts]
    heights = [1.1 * 1.9, max(0.34 * len(labels), 1.0), *[1.75] * rows]
    style = {"font.size": 9.5, "axes.edgecolor": "#c9ced6", "text.color": "#22272e"}
    with pyplot.rc_context(style):
        figure = pyplot.figure(figsize=(12, sum(heights) + 1.6), layout="constrained")
        try:
            figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
            grid = figure.add_gridspec(2 + rows, columns, height_ratios=heights)
            for column, frame in enumerate(chosen):
                axes = figure.add_subplot(grid[0, column])
                axes.imshow(images[frame], interpolation=_interpolation(images))
                axes.set_title(f"{times[frame]:.2f} s", fontsize=9.5)
                _bare(axes)
            below = figure.add_subplot(grid[1, :])
            draw_heat(figure, below, times, found.frames.numpy(), labels, "cosine", cmap=shades)
            for row, text in enumerate(best):
                patches = found.patches[..., text].numpy()  # (T, h, w)
                low, high = float(patches.min()), float(patches.max())
                line = []
                for column, frame in enumerate(chosen):
                    axes = figure.add_subplot(grid[2 + row, column])
                    axes.imshow(images[frame].mean(-1), cmap="gray", vmin=-0.6, vmax=1.2,
                                interpolation=_interpolation(images))
                    heat = axes.imshow(
                        patches[frame], cmap="inferno", alpha=0.62, vmin=low, vmax=high,
                        extent=(-0.5, images.shape[2] - 0.5, images.shape[1] - 0.5, -0.5),
                        interpolation="nearest",
                    )  # fmt: skip
                    _bare(axes)
                    line.append(axes)
                if not row:
                    line[0].set_title("patches, each text on a scale of its own", loc="left",
                                      fontsize=9.5)  # fmt: skip
                line[0].set_ylabel(_wrapped(found.texts[text]), rotation=0, ha="right", va="center")
                bar = figure.colorbar(heat, ax=line, pad=0.01, fraction=0.02)
                bar.outline.set_visible(False)
            figure.get_layout_engine().set(w_pad=0.06, h_pad=0.05, hspace=0.02, wspace=0.02)
            figure.savefig(path, dpi=130, facecolor="white")
        finally:
            pyplot.close(figure)


def _levels(found: Any) -> dict[str, Any]:
    """Lists, in the order of the texts: clip (C), frames (T, C), patches (T, h, w, C)."""
    return {level: getattr(found, level).tolist() for level in ("clip", "frames", "patches")}


def _spread(count: int, most: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int)).tolist()


def _interpolation(images: np.ndarray) -> str:
    return "nearest" if images.shape[1] <= 64 else "bilinear"  # pixels of a tiny world stay squares


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _short(text: str) -> str:
    return text if len(text) <= 44 else f"{text[:43]}…"


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, 18)[:5])
