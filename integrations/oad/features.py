"""Features of untrimmed videos from a frozen encoder: one row per step, in files that say how made.

A step is a chunk of frames (six at 24 per second make four steps a second), and its feature is the
encoder's embedding of the chunk's last frame. Two protocols read the very same frames and differ
only in what that last frame may have seen:

    frames   0  1  2  3  4  5 | 6  7  8  9 10 11 |12 13 ...
    clip                    ^                  ^               sees its own chunk, as released
    stream                  ^                  ^               sees all frames so far, or as many
                                                               as the encoder's window holds
    <out>/features.json         encoder, frame rule, fps (steps per second), dim of all features
    <out>/<video>.npy           (L, D) float32
    <out>/<video>.json          the same facts again, with frames, steps and source of this video

Chunk i begins at frame ``i * chunk_frames`` and ``L = frames // chunk_frames``; frames are those of
`backbone.video` at ``video_fps``, each lasting its whole 1 / fps. The release placed its chunks
otherwise (its extraction script resamples by index and spreads the starts up to the very end, so
that chunks run ahead of their step, by up to half a second); ``chunk_starts="released"`` does so,
for parity with its numbers.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from backbone import VideoEncoder
from backbone import video as media
from backbone.files import replacing, write_json

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = {
    *(".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".ts", ".webm", ".wmv"),
}


class FeatureError(RuntimeError):
    """Features that cannot be made, or must not be mixed with those that are there."""


@dataclass(frozen=True)
class FrameRule:
    """Which frames make a step, and which of them the encoder's memory reaches.

    Attributes:
        protocol: "clip" (each chunk alone) or "stream" (memory across chunks).
        video_fps: rate at which videos are read; None for their own.
        chunk_frames: frames in a step.
        chunk_starts: "exact", or "released" as in the head of this file (clip protocol only).
        resize: "crop" or "stretch", see `backbone.video.preprocess`.

    Raises:
        FeatureError: an unknown choice, or one that does not fit the others.
    """

    protocol: Literal["clip", "stream"]
    video_fps: Fraction | None = Fraction(24)
    chunk_frames: int = 6
    chunk_starts: Literal["exact", "released"] = "exact"
    resize: Literal["crop", "stretch"] = "crop"

    def __post_init__(self) -> None:
        choices = {
            "protocol": ("clip", "stream"),
            "chunk_starts": ("exact", "released"),
            "resize": ("crop", "stretch"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise FeatureError(f"{name}={getattr(self, name)!r} is not one of {known}")
        if self.chunk_frames < 1:
            raise FeatureError(f"chunk_frames={self.chunk_frames}: a step has one frame or more")
        if self.protocol == "stream" and self.chunk_starts == "released":
            raise FeatureError(
                "chunk_starts='released' leaves frames out between chunks, which a stream cannot; "
                "use it with protocol='clip', or chunk_starts='exact'"
            )
        if self.video_fps is not None:
            object.__setattr__(self, "video_fps", media.as_fps(self.video_fps))

    def describe(self, encoder: VideoEncoder) -> dict[str, Any]:
        """What decides the features of any video, as JSON: the content of ``features.json``."""
        fps = self.video_fps
        facts = {
            "encoder": encoder.settings(),
            "protocol": self.protocol,
            "fps": None if fps is None else float(fps / self.chunk_frames),
            "dim": encoder.embed_dim,
            "video_fps": None if fps is None else float(fps),
            "chunk_frames": self.chunk_frames,
            "chunk_starts": self.chunk_starts,
            "kept_frame_rule": "last frame of the chunk",
            "resize": self.resize,
            "image_size": encoder.image_size,
            "image_mean": encoder.image_mean,
            "image_std": encoder.image_std,
        }
        return json.loads(json.dumps(facts))  # as it will be read back: lists, not tuples


@dataclass
class ExtractionReport:
    """What became of each video (of this process's share, if there are several).

    Attributes:
        done: videos whose features were made now.
        reused: videos whose features were there and fit.
        failed: error by video.
    """

    done: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class ExtractionError(FeatureError):
    """More videos failed than allowed; ``report`` tells which."""

    def __init__(self, message: str, report: ExtractionReport) -> None:
        super().__init__(message)
        self.report = report


def extract_folder(
    videos: Path | str | Sequence[Path | str],
    encoder: VideoEncoder,
    out: Path | str,
    protocol: Literal["clip", "stream"],
    video_fps: media.Rate | None = 24,
    chunk_frames: int = 6,
    resize: Literal["crop", "stretch"] = "crop",
    batch_chunks: int = 8,
    overwrite: bool = False,
    *,
    chunk_starts: Literal["exact", "released"] = "exact",
    truncated: Literal["error", "keep"] = "error",
    max_failed_share: float = 0.0,
) -> ExtractionReport:
    """Write the features of every video, going on where an earlier run stopped.

    Under ``torchrun`` each process takes every WORLD_SIZE-th video. A video that cannot be read
    does not stop the others; at the end all failures (of the process, upon which ``torchrun`` ends
    the others: run again to go on) are raised together.

    Args:
        videos: folder of videos, or a list of videos (also folders of images).
        encoder: on the device and in the type to compute with.
        out: folder of features, made if need be.
        protocol: see `FrameRule`, as for the next three and ``chunk_starts``.
        video_fps: frames per second.
        chunk_frames: frames in a step.
        resize: how frames come to the encoder's ``image_size``.
        batch_chunks: chunks that go through the encoder together: speed and memory only.
        overwrite: make features anew that are there.
        chunk_starts: see `FrameRule`.
        truncated: for videos that break off: "error" lets them fail, "keep" takes what is there.
        max_failed_share: share of videos that may fail without an error at the end.

    Raises:
        FeatureError: nothing to extract, two videos of one name, or features in ``out`` that were
            made otherwise; nothing is written then.
        ExtractionError: more than ``max_failed_share`` of the videos failed.
    """
    rule = FrameRule(protocol, video_fps, chunk_frames, chunk_starts, resize)
    if batch_chunks < 1:
        raise FeatureError(f"batch_chunks={batch_chunks}: one chunk or more go through at once")
    recipe = rule.describe(encoder)
    sources = _list_videos(videos)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    share = dict(list(sources.items())[rank::world])
    out = Path(out)
    todo = share if overwrite else _lacking(share, out, recipe)
    report = ExtractionReport(reused=[name for name in share if name not in todo])
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "features.json", recipe)

    sizes = {name: _source_bytes(path) for name, path in todo.items()}
    bar = tqdm(
        total=sum(sizes.values()),
        desc=f"features, {len(todo)} videos",
        unit="B",
        unit_scale=True,
        disable=rank > 0 or not todo,
    )
    with bar:
        for name, path in todo.items():
            bar.set_postfix_str(name)
            try:
                features, facts = extract_video(path, encoder, rule, batch_chunks, truncated)
                write_features(out, name, features, {**recipe, **facts})
                report.done.append(name)
            except (media.VideoError, FeatureError) as error:
                report.failed[name] = str(error)
                logger.warning("%s has no features: %s", name, error)
            bar.update(sizes[name])
    if len(report.failed) > max_failed_share * len(share):
        listed = "\n".join(f"  {name}: {error}" for name, error in report.failed.items())
        raise ExtractionError(
            f"{len(report.failed)} of {len(share)} videos have no features in {out}:\n{listed}\n"
            "Mend or remove these videos and run again (finished ones are kept), or let a share "
            "of them be missing with max_failed_share=",
            report,
        )
    return report


def lacking_features(
    videos: Path | str | Sequence[Path | str],
    encoder: VideoEncoder,
    out: Path | str,
    rule: FrameRule,
) -> list[Path]:
    """The videos whose features `extract_folder` would still have to write into ``out``.

    Raises:
        FeatureError: as `extract_folder` does before it writes anything.
    """
    return list(_lacking(_list_videos(videos), Path(out), rule.describe(encoder)).values())


def extract_video(
    source: Path | str,
    encoder: VideoEncoder,
    rule: FrameRule,
    batch_chunks: int = 8,
    truncated: Literal["error", "keep"] = "error",
) -> tuple[np.ndarray, dict[str, Any]]:
    """Features of one video, read once with a bounded number of frames in memory.

    Returns:
        Features (L, D) float32, and facts as JSON: ``frames``, ``steps``, ``source``.

    Raises:
        backbone.video.VideoError: the video cannot be read to its end.
        FeatureError: it has no whole chunk, or a feature is not finite.
    """
    fps = rule.video_fps if rule.chunk_starts == "exact" or Path(source).is_dir() else None
    stream = encoder.stream() if rule.protocol == "stream" else None
    last = rule.chunk_frames - 1
    rows = []
    with media.open_video(source, fps=fps, truncated=truncated) as reader:
        chunks = _Chunks(reader, rule, source)
        batches = _batches(chunks, encoder, rule, batch_chunks)
        with contextlib.closing(media.prefetched(batches, size=2)) as ahead:
            for batch in ahead:  # (b, c, 3, H, W): chunks, frames of a chunk
                if stream is None:
                    embeddings = encoder.encode(batch).frame_embeddings  # (b, c, D)
                else:
                    pushed = stream.push(batch.flatten(0, 1)[None]).frame_embeddings
                    embeddings = pushed.unflatten(1, batch.shape[:2])[0]  # (b, c, D)
                rows.append(embeddings[:, last].float().cpu().numpy())  # (b, D)
        facts = {
            "frames": chunks.frames,
            "steps": sum(len(part) for part in rows),
            "source": {
                "file": Path(source).name,
                "bytes": _source_bytes(Path(source)),
                "fps": None if reader.source_fps is None else float(reader.source_fps),
                "width": reader.width,
                "height": reader.height,
                "damaged": reader.damaged,
            },
        }
    if not rows:
        raise FeatureError(
            f"{source} has {chunks.frames} frames at {rule.video_fps or 'its own'} fps, fewer than "
            f"a step of {rule.chunk_frames}; take it from the list, or use a smaller chunk_frames"
        )
    features = np.concatenate(rows)  # (L, D)
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        raise FeatureError(
            f"{source}: the features of {int(bad.sum())} of {len(bad)} steps are NaN or infinite, "
            f"the first is step {int(bad.argmax())}; check the encoder's weights and its dtype"
        )
    return features, facts


# -- frames to chunks


class _Chunks:
    """Iterator of chunks (c, H, W, 3) uint8; ``frames`` is their supply, known at the end."""

    def __init__(self, reader: media.VideoReader, rule: FrameRule, source: Path | str) -> None:
        self.reader, self.rule, self.source = reader, rule, source
        self.frames = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        return self._exact() if self.rule.chunk_starts == "exact" else self._released()

    def _exact(self) -> Iterator[np.ndarray]:
        """Chunk i is frames i * c to (i + 1) * c - 1."""
        frames = self._whole_frames()
        while len(chunk := list(islice(frames, self.rule.chunk_frames))) == self.rule.chunk_frames:
            yield np.stack(chunk)

    def _whole_frames(self) -> Iterator[np.ndarray]:
        """Frames of which the video shows the whole 1 / fps.

        So the steps of a video are those of its labels: a last frame that is cut off by the end
        could otherwise complete a step that the video does not fill.
        """
        held = None
        for frame in self.reader:
            if held is not None:
                yield held.image
            held = frame
        self.frames = self.reader.num_whole
        if held is not None and held.index < self.frames:
            yield held.image

    def _released(self) -> Iterator[np.ndarray]:
        """Chunks as the released extraction places them; see `released_indices`."""
        count, fps = self._count(), self.reader.source_fps
        if fps is None:
            raise FeatureError(
                f"{self.source} does not tell its frame rate, which chunk_starts='released' needs; "
                "use 'exact', or write the rate into the file"
            )
        self.frames = _resampled_length(count, fps, self.rule)
        held: dict[int, np.ndarray] = {}  # frames from the current chunk's first one on
        frames, read = iter(self.reader), 0
        for indices in released_indices(count, fps, self.rule):
            held = {index: image for index, image in held.items() if index >= indices[0]}
            for frame in islice(frames, max(0, indices[-1] + 1 - read)):
                read = frame.index + 1
                if frame.index >= indices[0]:
                    held[frame.index] = frame.image
            if read <= indices[-1]:
                raise FeatureError(
                    f"{self.source} claims {count} frames, but holds {read}; copy it again, or "
                    "use chunk_starts='exact', which needs no claim"
                )
            yield np.stack([held[index] for index in indices])

    def _count(self) -> int:
        """Frames of the video, counted where the container does not tell."""
        if self.reader.num_frames is not None:
            return self.reader.num_frames
        with media.open_video(self.source) as counted:
            return sum(1 for _ in counted)


def _resampled_length(count: int, fps: Fraction, rule: FrameRule) -> int:
    return count if rule.video_fps is None else int(count / float(fps) * float(rule.video_fps))


def released_indices(count: int, fps: Fraction, rule: FrameRule) -> np.ndarray:
    """Source frames of each chunk by the released rule, (L, chunk_frames) int.

    Frames are resampled by index, ``linspace(0, count - 1, n)`` with ``n = int(count / fps *
    video_fps)``; chunks begin at ``linspace(0, n, L)``, end point included, and one that would
    run over the end takes the last frames instead.
    """
    length, size = _resampled_length(count, fps, rule), rule.chunk_frames
    frames = np.linspace(0, count - 1, length).astype(int)
    starts = np.linspace(0, length, length // size).astype(int)
    starts = np.minimum(starts, length - size)
    return frames[starts[:, None] + np.arange(size)]


def _batches(
    chunks: _Chunks, encoder: VideoEncoder, rule: FrameRule, batch_chunks: int
) -> Iterator[torch.Tensor]:
    """Prepared chunks, (b, c, 3, size, size) float32 with b up to ``batch_chunks``."""
    prepared = (
        media.preprocess(
            chunk, encoder.image_size, encoder.image_mean, encoder.image_std, rule.resize
        )
        for chunk in chunks
    )
    while batch := list(islice(prepared, batch_chunks)):
        yield torch.stack(batch)


# -- files


def write_features(
    root: Path | str, video: str, features: np.ndarray, facts: dict[str, Any]
) -> None:
    """Write features (L, D) and their facts; the array comes last and so marks them complete."""
    array = Path(root) / f"{video}.npy"
    array.unlink(missing_ok=True)
    write_json(Path(root) / f"{video}.json", facts)
    with replacing(array) as temporary:
        np.save(temporary, features.astype(np.float32, copy=False))


def read_facts(path: Path | str) -> dict[str, Any]:
    """Facts of a folder (``features.json``) or of a video (``<video>.json``).

    Raises:
        FeatureError: the file cannot be read.
    """
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise FeatureError(
            f"{path} cannot be read ({error}); remove it and the features beside it, and extract "
            "them again"
        ) from error


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """``name: found, wanted`` of each fact in ``wanted`` that ``found`` does not share."""
    return [
        f"{name}: {found.get(name)!r} there, {value!r} here"
        for name, value in wanted.items()
        if found.get(name) != value
    ]


def _check_folder(out: Path, recipe: dict[str, Any]) -> None:
    """See that a ``features.json`` that is there says the same."""
    path = out / "features.json"
    unlike = differences(read_facts(path), recipe) if path.is_file() else []
    if unlike:
        raise FeatureError(
            f"{out} holds features made otherwise ({'; '.join(unlike)}); write to another folder, "
            "or make them anew with overwrite=True"
        )


def _lacking(sources: dict[str, Path], out: Path, recipe: dict[str, Any]) -> dict[str, Path]:
    """Those of the videos, by name, that have no features in ``out`` yet."""
    _check_folder(out, recipe)
    return {name: path for name, path in sources.items() if not _is_done(out, name, path, recipe)}


def _is_done(out: Path, name: str, source: Path, recipe: dict[str, Any]) -> bool:
    """Whether complete features of this video are there; others than these are refused."""
    array, facts = out / f"{name}.npy", out / f"{name}.json"
    if not array.is_file():
        return False
    if not facts.is_file():
        raise FeatureError(
            f"{array} has no {facts.name} beside it that tells how it was made; move it away, or "
            "make it anew with overwrite=True"
        )
    found = read_facts(facts)
    unlike = differences(found, recipe)
    unlike += differences(found["source"], {"bytes": _source_bytes(source)})
    if unlike:
        raise FeatureError(
            f"{array} was made otherwise than {source} would be now ({'; '.join(unlike)}); write "
            "to another folder, or make it anew with overwrite=True"
        )
    shape = np.load(array, mmap_mode="r").shape
    if shape != (found["steps"], found["dim"]):
        raise FeatureError(
            f"{array} is {shape}, but {facts.name} tells of {(found['steps'], found['dim'])}; "
            "make it anew with overwrite=True"
        )
    return True


def _list_videos(videos: Path | str | Sequence[Path | str]) -> dict[str, Path]:
    """Videos by name, in order of names."""
    if isinstance(videos, str | os.PathLike):
        folder = Path(videos)
        if not folder.is_dir():
            raise FeatureError(f"{folder} is no folder; give a folder of videos or a list of them")
        paths = [p for p in folder.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES]
    else:
        folder, paths = None, [Path(path) for path in videos]
    if not paths:
        where = f"{folder} (suffixes {', '.join(sorted(VIDEO_SUFFIXES))})" if folder else "the list"
        raise FeatureError(f"no video in {where}; check the path")
    named: dict[str, Path] = {}
    for path in sorted(paths):
        name = path.name if path.is_dir() else path.stem
        if name in named:
            raise FeatureError(
                f"{named[name]} and {path} would both be written as {name}.npy; rename one"
            )
        named[name] = path
    return dict(sorted(named.items()))


def _source_bytes(path: Path) -> int:
    """Size of a video, or of all images of a folder; 0 if it is missing, which reading reports."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return path.stat().st_size if path.is_file() else 0
