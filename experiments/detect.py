"""Watch a video or a camera frame by frame: encoder stream, live detector, and what they cost.

The path is the one that features and online protocol took in training (``integrations.oad``), with
one frame at a time: frames at the head's rate, the last one of each chunk gives the step's feature,
each step gives the scores of now. Nothing looks ahead, and memory stays bounded.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments import live
from experiments.config import UserError

logger = logging.getLogger(__name__)

ABOUT = """\
Prints what begins and ends as it sees it, writes an annotated MP4 and a timeline
PNG, and says what decoding, encoder and head cost per frame. Encoder and head are
those of the last comparison unless given; a head of miniworld knows miniworld's
actions only, so on other videos it shows the machinery, not understanding."""
EXAMPLES = """\
  python experiments/run.py detect video.mp4
  python experiments/run.py detect camera:0 --max-seconds 60
  python experiments/run.py detect rtsp://camera.local/stream --out watch/
  python experiments/run.py detect video.mp4 --head work_dirs/oad/siglip/seed0
  python experiments/run.py detect video.mp4 --head thumos_best_without_flow.pt \\
      --encoder streamformer:StreamFormer/streamformer-timesformer"""

HEAD_FILE = "head.safetensors"
RELEASED_HEADS = {22: "THUMOS", 31: "TVSeries"}  # classes -> entry of data_info.json
RELEASED_RULE = {"protocol": "clip", "video_fps": 24.0, "chunk_frames": 6, "resize": "crop"}
WRITTEN = {"annotated": "mp4", "timeline": "png", "detections": "json"}
END_SHARE = 0.6  # an action that is on ends below this share of the threshold
PICTURES = 64  # kept for the timeline, thinned out as the video grows
PICTURE_WIDTH = 160


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    live.add_arguments(parser, verb="oad")
    add = parser.add_argument
    add("--encoder", metavar="KIND:SOURCE", help="default: the one that the head was trained with")
    add("--head", type=Path, metavar="FOLDER|FILE", help="default: streamformer's in --work-dir")
    add("--fps", type=float, help="frames read per second; default: the rate that the head knows")
    add("--threshold", type=float, default=0.5, help="score at which an action begins, default 0.5")
    add("--out", type=Path, metavar="DIR", help="default: work_dirs/detect/<name of the video>")


@dataclass(frozen=True)
class Trained:
    """A head and what must be known to use it."""

    path: Path
    head: Any  # MatHead, in eval mode
    dataset: str
    classes: list[str]
    ignore_index: int
    rule: dict[str, Any]  # protocol, video_fps, chunk_frames, resize
    settings: dict[str, Any] | None  # of the encoder that it was trained with, if known
    encoder: str | None  # spec of that encoder, if known

    @property
    def actions(self) -> list[int]:
        """Columns of the actions: all but background and what was never trained."""
        return [c for c in range(1, len(self.classes)) if c != self.ignore_index]


@dataclass
class Switch:
    """Turns scores into actions that begin and end, with different levels for the two."""

    threshold: float
    on: dict[int, dict[str, Any]] = field(default_factory=dict)  # column -> segment so far
    segments: list[dict[str, Any]] = field(default_factory=list)  # in order of their beginning

    def step(self, names: Sequence[str], scores: np.ndarray, now: float) -> Iterator[str]:
        """Take the scores of one step; yield a line for each action that begins or ends."""
        for column, (name, score) in enumerate(zip(names, scores.tolist(), strict=True)):
            segment = self.on.get(column)
            if segment is None and score >= self.threshold:
                self.on[column] = {"action": name, "start": now, "end": now, "score": score}
                self.segments.append(self.on[column])
                yield f"{now:9.2f} s  {name} begins ({score:.2f})"
            elif segment is not None:
                segment["end"] = now
                segment["score"] = max(segment["score"], score)
                if score < END_SHARE * self.threshold:
                    del self.on[column]
                    yield f"{now:9.2f} s  {name} ends (after {now - segment['start']:.2f} s)"


@dataclass
class Seen:
    """What was seen so far: scores of every step, actions, and a few small pictures."""

    names: list[str]
    switch: Switch
    times: list[float] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)  # (actions,) scores of each step
    pictures: list[tuple[float, np.ndarray]] = field(default_factory=list)
    every: int = 1  # one frame in so many becomes a picture

    def add(self, frame: Any, scores: np.ndarray | None) -> list[str]:
        """Take a frame and, where it completes a step, its scores; return what changed."""
        if frame.index % self.every == 0:
            self._keep(frame)
        if scores is None:
            return []
        self.times.append(frame.time)
        self.rows.append(scores)
        return list(self.switch.step(self.names, scores, frame.time))

    def ranked(self) -> list[tuple[str, float, bool]]:
        """Name, latest score and whether it is on, of all actions, best first."""
        if not self.rows:
            return []
        order = np.argsort(-self.rows[-1], kind="stable").tolist()
        return [(self.names[c], float(self.rows[-1][c]), c in self.switch.on) for c in order]

    def finish(self, step: float) -> None:
        """Let actions that are still on end with the last step, ``step`` seconds long."""
        for segment in self.switch.on.values():
            segment["end"] = self.times[-1] + step

    def plot(self, path: Path, title: str) -> None:
        """Draw the timeline."""
        from experiments.drawing import plot_timeline

        plot_timeline(
            path,
            title=title,
            times=np.array(self.times),
            scores=np.stack(self.rows),
            names=self.names,
            segments=self.switch.segments,
            pictures=self.pictures,
        )

    def _keep(self, frame: Any) -> None:
        """Keep a small picture; where they are too many, keep every second one from now on."""
        from PIL import Image

        height, width = frame.image.shape[:2]
        size = (PICTURE_WIDTH, max(1, round(PICTURE_WIDTH * height / width)))
        self.pictures.append((frame.time, np.asarray(Image.fromarray(frame.image).resize(size))))
        if len(self.pictures) >= PICTURES:
            self.pictures, self.every = self.pictures[::2], 2 * self.every


class Watcher:
    """Encoder stream and detector behind one call: a frame in, the scores of now out."""

    def __init__(self, encoder: Any, trained: Trained) -> None:
        from integrations.oad.detector import OnlineDetector

        self.encoder, self.trained = encoder, trained
        self.detector = OnlineDetector(
            trained.head.to(encoder.device), ignore_index=trained.ignore_index
        )
        self.stream = encoder.stream() if trained.rule["protocol"] == "stream" else None
        self.chunk: list[Any] = []
        self.clock = live.Stopwatch(("encode", "head"), encoder.device)

    def push(self, image: np.ndarray) -> np.ndarray | None:
        """Take one frame (H, W, 3) uint8; return (actions,) scores when it completes a step."""
        import torch

        from backbone import video

        encoder, rule = self.encoder, self.trained.rule
        with self.clock("encode"):
            frame = video.preprocess(
                image[None],
                encoder.image_size,
                encoder.image_mean,
                encoder.image_std,
                rule["resize"],
            )  # (1, 3, size, size)
            self.chunk.append(frame)
            complete = len(self.chunk) == rule["chunk_frames"]
            if self.stream is not None:
                features = self.stream.push(frame)
            elif complete:
                features = encoder.encode(torch.cat(self.chunk)[None])
        if not complete:
            return None
        self.chunk.clear()
        with self.clock("head"):
            said = self.detector.push(features.frame_embeddings[:, -1].float())
            scores = said.scores[0, -1].cpu().numpy()  # (C,)
        return scores[self.trained.actions]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Resolve head and encoder, watch, write; returns segments, speed and files."""
    from backbone.video import VideoError

    trained = find_head(args.head, args.work_dir)
    encoder = build(args.encoder or trained.encoder, trained, args.window, args.device)
    out = args.out or Path("work_dirs/detect") / Path(args.video.replace(":", "-")).stem
    out.mkdir(parents=True, exist_ok=True)
    try:
        return watch(args, trained, encoder, out)
    except VideoError as error:
        raise UserError(str(error)) from error


def watch(args: argparse.Namespace, trained: Trained, encoder: Any, out: Path) -> dict[str, Any]:
    """Read the video to its end (or Ctrl-C, or ``--max-seconds``) and write what was seen."""
    from backbone import video
    from backbone.files import replacing, write_json

    names = [trained.classes[column] for column in trained.actions]
    watcher, seen = Watcher(encoder, trained), Seen(names, Switch(args.threshold))
    rate = args.fps or trained.rule["video_fps"]
    with video.open_video(args.video, rate, end=args.max_seconds, truncated="keep") as reader:
        fps = float(reader.fps)
        live.say(f"{reader.name}: {reader.width} x {reader.height}, read at {fps:g} fps")
        live.say(f"encoder {encoder.name}")
        live.say(f"head {trained.path}, {len(names)} actions of {trained.dataset}")
        _annotate(reader, watcher, seen, out / "annotated.mp4")
    seen.finish(trained.rule["chunk_frames"] / fps)
    if seen.rows:
        with replacing(out / "timeline.png") as temporary:
            seen.plot(temporary, f"{Path(args.video).name}: what is seen, from the past alone")
    else:
        logger.warning("%s ended before its first step: no timeline", args.video)
    costs = live.speed(watcher.clock.seconds)
    result = {
        "video": args.video,
        "encoder": encoder.name,
        "encoder_settings": encoder.settings(),
        "head": str(trained.path),
        "dataset": trained.dataset,
        "frames": watcher.clock.count,
        "steps": len(seen.rows),
        "segments": seen.switch.segments,
        "milliseconds_per_frame": costs,
        "files": {name: str(out / f"{name}.{kind}") for name, kind in WRITTEN.items()},
    }
    write_json(out / "detections.json", result)
    live.say_costs(costs, fps)
    live.say(", ".join(result["files"].values()))
    return result


def _annotate(reader: Any, watcher: Watcher, seen: Seen, path: Path) -> None:
    """Watch every frame, say what changes, and write the frames with the scores drawn on."""
    from backbone.video import VideoWriter
    from experiments.drawing import canvas_size, draw_scores

    size = canvas_size(reader.width, reader.height)
    with VideoWriter(path, reader.fps, size) as writer:
        try:
            for frame in watcher.clock.frames(reader):
                for line in seen.add(frame, watcher.push(frame.image)):
                    live.say(line)
                writer.write(draw_scores(frame.image, size, frame.time, seen.ranked()))
        except KeyboardInterrupt:
            logger.info("interrupted: writing what was seen so far")


def find_head(path: Path | None, work_dir: Path) -> Trained:
    """Load the head that was asked for, or the one of StreamFormer's first run in ``work_dir``.

    Raises:
        UserError: there is none, or it reads optical flow, which no live source has.
    """
    from backbone.checkpoints import CheckpointError

    file = live.find_trained(path, work_dir, HEAD_FILE, verb="oad", option="--head")
    try:
        trained = _own(file) if file.suffix == ".safetensors" else _released(file)
    except CheckpointError as error:
        raise UserError(f"--head: {error}") from error
    if trained.head.config.motion_size:
        raise UserError(
            f"--head: {file} reads optical flow, which is not computed live; use a "
            "head trained without (data.motion=None)"
        )
    return trained


def build(spec: str | None, trained: Trained, window: int | None, device: str) -> Any:
    """Build the encoder as the head knows it; what the head does not know is refused or logged.

    Raises:
        UserError: no encoder is named, it is not there, or its features have another width.
    """
    encoder = live.build_as_trained(spec, trained.path, trained.settings or {}, window, device)
    live.refuse_width(spec, encoder.embed_dim, trained.path, trained.head.config.visual_size)
    return encoder


def _own(file: Path) -> Trained:
    from integrations.oad.checkpoints import load_head, read_notes

    notes = read_notes(file)
    facts = notes["features"]
    if facts is None:
        raise UserError(
            f"--head: {file} was trained on features made elsewhere, so nothing tells "
            "which frames make a step; train it on features that the suite extracted"
        )
    return Trained(
        path=file,
        head=load_head(file),
        dataset=notes["dataset"],
        classes=notes["classes"],
        ignore_index=notes["ignore_index"],
        rule={name: facts[name] for name in RELEASED_RULE},
        settings=facts["encoder"],
        encoder=live.spec_beside(file),
    )


def _released(file: Path) -> Trained:
    """A released MAT checkpoint: classes by their number, frames as the release made them."""
    from integrations.oad.checkpoints import load_released
    from integrations.oad.data import read_data_info

    head = load_released(file)
    columns = head.config.num_classes
    if columns not in RELEASED_HEADS:
        known = ", ".join(f"{count} ({name})" for count, name in RELEASED_HEADS.items())
        raise UserError(
            f"--head: {file} has {columns} classes, whose names are not known ({known} are)"
        )
    dataset = RELEASED_HEADS[columns]
    info = read_data_info(file.parent, dataset)
    return Trained(
        path=file,
        head=head,
        dataset=dataset,
        classes=list(info["class_names"]),
        ignore_index=int(info["ignore_index"]),
        rule=RELEASED_RULE,
        settings=None,
        encoder=None,
    )
