"""Segment and track the objects of a video, frame by frame, with a segmenter that ``ovis`` trained.

The path is the one of the online evaluation (``integrations.ovis.online``): encoder stream,
adapter, head, tracker. An identity, once drawn, is final; memory stays bounded however long the
video runs.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from experiments import live
from experiments.config import UserError

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
PARTS = ("encode", "head", "track")  # of a frame, after it was decoded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    live.add_arguments(parser, verb="ovis")
    add = parser.add_argument
    add(
        "--segmenter",
        type=Path,
        metavar="FOLDER|FILE",
        help="default: streamformer's in --work-dir",
    )
    add("--encoder", metavar="KIND:SOURCE", help="default: the one it was trained with")
    add("--fps", type=float, help="frames read per second; default: all")
    add("--short-side", type=int, metavar="PIXELS", help="of the frames; default: as trained with")
    add("--score", type=float, default=0.3, help="least score of what is drawn, default 0.3")
    add("--out", type=Path, metavar="FILE", help="default: work_dirs/track/<name of the video>.mp4")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Find segmenter and encoder, track, write; returns numbers and the file."""
    from backbone.video import VideoError

    file = live.find_trained(
        args.segmenter, args.work_dir, SEGMENTER, verb="ovis", option="--segmenter"
    )
    watch = live.Stopwatch(PARTS)
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
    watch: live.Stopwatch,
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
        live.say(f"{reader.name}: {reader.width} x {reader.height}, read at {float(rate):g} fps")
        live.say(f"encoder {encoder.name}")
        live.say(f"segmenter {file}, {len(notes['classes'])} categories of {notes['dataset']}")
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
    costs = live.speed(watch.seconds)
    live.say_costs(costs, float(rate))
    live.say(f"{len(seen)} identities in {watch.count} frames: {out}")
    return {
        "video": args.video,
        "encoder": encoder.name,
        "segmenter": str(file),
        "frames": watch.count,
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


def _open(
    file: Path, args: argparse.Namespace, watch: live.Stopwatch
) -> tuple[Any, dict[str, Any]]:
    """Segmenter and notes; the encoder must be the one that it was trained with.

    Raises:
        UserError: no encoder is named, it is not there, or another width than the segmenter's.
    """
    from backbone.checkpoints import CheckpointError
    from integrations.ovis.weights import read_notes

    try:
        notes = read_notes(file)
    except CheckpointError as error:
        raise UserError(f"--segmenter: {error}") from error
    spec = args.encoder or live.spec_beside(file)
    encoder = live.build_as_trained(spec, file, notes["encoder"], args.window, args.device)
    watch.device = encoder.device
    try:
        segmenter = segmenter_of(file, encoder, args.short_side, keep_video=False, timed=watch)
    except ValueError as error:
        raise UserError(f"--encoder {spec}: {error}") from error
    live.refuse_width(spec, encoder.embed_dim, file, segmenter.adapter.config.embed_dim)
    return segmenter, notes
