"""Segment and track the objects of a video, frame by frame, with a segmenter that ``ovis`` trained.

The path is the one of the online evaluation (``integrations.ovis.online``): encoder stream,
adapter, head, tracker. An identity, once drawn, is final; memory stays bounded however long the
video runs.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.config import UserError
from experiments.detect import speed

logger = logging.getLogger(__name__)

ABOUT = """\
Writes an MP4 with masks and identities drawn on, and says what decoding, encoder,
head and tracker cost per frame. Segmenter and encoder are those of the last
comparison unless given; a segmenter of miniworld knows coloured shapes only, so on
other videos it shows the machinery, not understanding."""
EXAMPLES = """\
  python experiments/run.py track video.mp4
  python experiments/run.py track camera:0 --max-seconds 60 --score 0.5
  python experiments/run.py track video.mp4 --segmenter work_dirs/ovis/siglip/seed0
  python experiments/run.py track video.mp4 --short-side 96 --fps 8"""

SEGMENTER = "segmenter.safetensors"
PARTS = ("decode", "encode", "head", "track")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add = parser.add_argument
    add("video", help="file, folder of images, camera:0, or an http, rtsp, … address")
    add(
        "--segmenter",
        type=Path,
        metavar="FOLDER|FILE",
        help="default: streamformer's in --work-dir",
    )
    add("--encoder", metavar="KIND:SOURCE", help="default: the one it was trained with")
    add(
        "--work-dir",
        type=Path,
        default=Path("work_dirs/ovis"),
        metavar="DIR",
        help="of the verb ovis",
    )
    add("--window", type=int, metavar="FRAMES", help="of the encoder; default: as trained with")
    add("--fps", type=float, help="frames read per second; default: all")
    add("--short-side", type=int, metavar="PIXELS", help="of the frames; default: as trained with")
    add("--score", type=float, default=0.3, help="least score of what is drawn, default 0.3")
    add("--max-seconds", type=float, metavar="S", help="stop after this much of the video")
    add("--out", type=Path, metavar="FILE", help="default: work_dirs/track/<name of the video>.mp4")
    add("--device", default="auto", help="auto (the default), cpu, cuda, …")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Find segmenter and encoder, track, write; returns numbers and the file."""
    from backbone.video import VideoError

    file = find_segmenter(args.segmenter, args.work_dir)
    watch = Stopwatch()
    segmenter, notes = _open(file, args, watch)
    name = Path(args.video.replace(":", "-")).stem
    out = args.out or Path("work_dirs/track") / f"{name}.mp4"
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        return track(args, segmenter, notes, watch, file, out)
    except VideoError as error:
        raise UserError(str(error)) from error


def track(
    args: argparse.Namespace,
    segmenter: Any,
    notes: dict[str, Any],
    watch: Stopwatch,
    file: Path,
    out: Path,
) -> dict[str, Any]:
    """Read the video to its end (or Ctrl-C, or ``--max-seconds``) and write what was found."""
    from backbone import video
    from experiments.drawing import canvas_size
    from experiments.masks import draw_masks

    encoder = segmenter.encoder
    seen: dict[int, int] = {}  # identity -> frames
    with video.open_video(args.video, args.fps, end=args.max_seconds, truncated="keep") as reader:
        size = canvas_size(reader.width, reader.height)
        rate = reader.fps or 25
        _say(f"{reader.name}: {reader.width} x {reader.height}, read at {float(rate):g} fps")
        _say(f"encoder {encoder.name}")
        _say(f"segmenter {file}, {len(notes['classes'])} categories of {notes['dataset']}")
        with video.VideoWriter(out, rate, size) as writer:
            try:
                for frame in watch.frames(reader):
                    result = segmenter.push(frame.image).above(args.score)
                    for identity in result.ids.tolist():
                        seen[identity] = seen.get(identity, 0) + 1
                    names = [notes["classes"][label] for label in result.labels.tolist()]
                    ids = result.ids.tolist()
                    writer.write(draw_masks(frame.image, size, result.masks, ids, names))
            except KeyboardInterrupt:
                logger.info("interrupted: writing what was found so far")
    costs = speed(watch.seconds)
    possible = 1000 / max(sum(costs.values()), 1e-9)
    _say("per frame: " + ", ".join(f"{part} {cost:.2f} ms" for part, cost in costs.items()))
    _say(f"so {possible:.0f} frames per second are possible, {float(rate):g} are needed live")
    _say(f"{len(seen)} identities in {len(watch.seconds['decode'])} frames: {out}")
    return {
        "video": args.video,
        "encoder": encoder.name,
        "segmenter": str(file),
        "frames": len(watch.seconds["decode"]),
        "identities": {str(identity): count for identity, count in sorted(seen.items())},
        "milliseconds_per_frame": costs,
        "memory_bytes": segmenter.memory_bytes,
        "file": str(out),
    }


def segmenter_of(file: Path, encoder: Any, short_side: int | None = None, **options: Any) -> Any:
    """An ``OnlineSegmenter`` with the rules that a segmenter's file notes.

    Args:
        file: of ``weights.save_segmenter``.
        encoder: that it was trained with.
        short_side: pixels; None as trained with.
        options: others of ``OnlineSegmenter``, such as ``keep_video``.
    """
    from integrations.ovis.online import OnlineSegmenter
    from integrations.ovis.tracker import TrackerConfig
    from integrations.ovis.weights import load_segmenter, read_notes

    notes = read_notes(file)
    adapter, head = load_segmenter(file)
    return OnlineSegmenter(
        encoder,
        adapter.to(encoder.device),
        head.to(encoder.device),
        short_side=short_side or notes["short"],
        long_side=notes["longest"],
        mode=notes["mode"],
        chunk_frames=notes["chunk_frames"],
        tracker=TrackerConfig(**notes["tracker"]),
        **options,
    )


def find_segmenter(path: Path | None, work_dir: Path) -> Path:
    """The file that was asked for, or that of StreamFormer's first run in ``work_dir``.

    Raises:
        UserError: there is none.
    """
    if path is not None:
        file = path / SEGMENTER if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"--segmenter: there is no {file}; give a run's folder, or its file")
        return file
    files = sorted(work_dir.glob(f"*/seed*/{SEGMENTER}"))
    files = [found for found in files if found.parent.name.removeprefix("seed").isdigit()]
    if not files:
        raise UserError(
            f"there is no trained segmenter under {work_dir}; run this first:\n  python "
            "experiments/run.py ovis\nor name one with --segmenter, or its folder with --work-dir"
        )
    ours = [found for found in files if found.parts[-3].startswith("streamformer")]
    return min(ours or files, key=lambda found: int(found.parent.name.removeprefix("seed")))


def _open(file: Path, args: argparse.Namespace, watch: Stopwatch) -> tuple[Any, dict[str, Any]]:
    """Segmenter and notes; the encoder must be the one that it was trained with.

    Raises:
        UserError: no encoder is named, it is not there, or another width than the segmenter's.
    """
    from backbone import build_encoder
    from backbone.checkpoints import CheckpointError
    from backbone.files import read_json
    from experiments.environment import choose_device
    from experiments.preflight import encoder as missing
    from integrations.ovis.weights import read_notes

    try:
        notes = read_notes(file)
    except CheckpointError as error:
        raise UserError(f"--segmenter: {error}") from error
    config = file.parent / "config.json"
    entry = read_json(config).get("encoder", {}) if config.is_file() else {}
    spec = args.encoder or entry.get("spec")
    if spec is None:
        raise UserError(
            f"--encoder: {file} does not say which encoder it was trained with; name it, such as "
            "--encoder streamformer:FOLDER"
        )
    if problems := missing(spec):
        raise UserError(problems[0])
    known = notes["encoder"]
    options = {name: known.get(name) for name in ("window", "temporal_positions")}
    if args.window is not None:
        options["window"] = args.window
    try:
        encoder = build_encoder(spec, **options, device=choose_device(args.device))
        found = encoder.settings()
        for name in sorted(known.keys() | found.keys()):
            if known.get(name) != found.get(name):
                logger.warning(
                    "the segmenter was trained with %s=%r, this encoder has %r: results may be "
                    "worse", name, known.get(name), found.get(name),
                )  # fmt: skip
        watch.device = encoder.device
        segmenter = segmenter_of(file, encoder, args.short_side, keep_video=False, timed=watch)
    except ValueError as error:
        raise UserError(f"--encoder {spec}: {error}") from error
    if segmenter.adapter.config.embed_dim != encoder.embed_dim:
        raise UserError(
            f"--encoder {spec}: its features are {encoder.embed_dim} wide, but the segmenter "
            f"{file} reads {segmenter.adapter.config.embed_dim}; use the encoder that it was "
            "trained with"
        )
    return segmenter, notes


class Stopwatch:
    """Seconds that each part of a frame took, by part."""

    def __init__(self, device: Any = None) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = {part: [] for part in PARTS}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time a block; work that a GPU still has to do counts, too."""
        start = time.perf_counter()
        yield
        if self.device is not None and self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        self.seconds[part].append(time.perf_counter() - start)

    def frames(self, reader: Any) -> Iterator[Any]:
        """Frames of the reader, with the time that each one took to come."""
        start = time.perf_counter()
        for frame in reader:
            self.seconds["decode"].append(time.perf_counter() - start)
            yield frame
            start = time.perf_counter()


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 (the verb's result, as it happens)
