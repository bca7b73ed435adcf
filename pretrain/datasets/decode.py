"""Video files to clips: which frames, decoded how, kept where, and what happens when it fails.

`ClipReader.read` is the one road from a file to a clip: sampling rule (`frames.py`), decoding
(`backbone.video`), masks (`masks.py`), augmentation (`augment.py`). With a `FrameStore` a video is
decoded once, resized, and stays in memory as uint8: for sets of small videos, where opening files
would cost more than the training step. A `FailureLedger` counts what could not be read and stops a
run that loses too much.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from backbone import video
from backbone.sources import IMAGE_SUFFIXES
from pretrain.datasets.augment import Augmentation, crop_place, resize_short_side
from pretrain.datasets.errors import ClipError
from pretrain.datasets.frames import RULES, VIEWS, View, choose

if TYPE_CHECKING:
    from pretrain.datasets.base import Entry

logger = logging.getLogger(__name__)

IMAGE_RATE = 1.0  # images have no clock: each counts as one second


class Clip(NamedTuple):
    """What `ClipReader.read` returns."""

    frames: Tensor  # (T, 3, size, size) uint8
    times: np.ndarray  # (T,) seconds
    masks: Tensor | None = None  # (T, size, size) int32, for entries with masks


class FrameStore:
    """Whole videos in memory: (L, 3, h, w) uint8 with the short side at ``size``, decoded once.

    One store serves all tasks that read the same videos. A video of L frames of 32 pixels takes
    L * 3 kB. Broken videos are remembered too and not opened again.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._videos: dict[tuple, tuple[Tensor, np.ndarray] | str] = {}

    def get(self, path: Path, files: tuple[str, ...] = ()) -> tuple[Tensor, np.ndarray]:
        """Frames (L, 3, h, w) uint8 and times (L,) in seconds. Raises ClipError.

        ``files`` are the images of a folder that are the video, all of them if it is empty.
        """
        key = path, files
        if key not in self._videos:
            try:
                self._videos[key] = self._decode(path, files)
            except ClipError as error:
                self._videos[key] = str(error)
        found = self._videos[key]
        if isinstance(found, str):
            raise ClipError(found)
        return found

    def _decode(self, path: Path, files: tuple[str, ...]) -> tuple[Tensor, np.ndarray]:
        images, times = [], []
        paths = image_paths(path, files)
        try:
            if paths:
                images, times = read_images(paths), np.arange(len(paths)) / IMAGE_RATE
            else:
                with video.open_video(path, image_fps=IMAGE_RATE) as reader:
                    for frame in reader:
                        images.append(frame.image)
                        times.append(frame.time)
        except (video.VideoError, OSError) as error:
            raise ClipError(f"{path}: {error}") from error
        if not len(images):
            raise ClipError(f"{path}: holds no frames")
        frames = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # (L, 3, H, W)
        return resize_short_side(frames, self.size).contiguous(), np.array(times)


@dataclass(frozen=True)
class ClipReader:
    """How the clips of one task are read.

    sampling: a name of `frames.RULES`; ``stride`` is the step of "consecutive".
    augment: what happens to a whole clip in training; validation crops the centre.
    store: keep videos in memory; None decodes the wanted frames each time.
    """

    size: int
    sampling: str
    stride: int = 1
    augment: Augmentation = field(default_factory=lambda: Augmentation("none"))
    store: FrameStore | None = None

    def __post_init__(self) -> None:
        if self.sampling not in RULES:
            raise ValueError(f"no sampling rule {self.sampling!r}; known: {', '.join(RULES)}")
        if self.stride < 1:
            raise ValueError(f"stride={self.stride} must be at least 1")

    def read(
        self,
        entry: Entry,
        num_frames: int,
        rng: np.random.Generator | None,
        view: View | None = None,
    ) -> Clip:
        """A clip of an entry's video, between its ``start`` and ``end``.

        ``rng`` None makes the fixed choices of validation, or of one ``view`` of a test. The clip
        has ``num_frames`` frames, less only where the rule allows it. Raises ClipError.
        """
        frames, times, chosen = self._read(entry, num_frames, rng, view)
        if view is not None:
            return Clip(crop_place(frames, self.size, view.place, view.places), times)
        if entry.masks is None:
            return Clip(self.augment(frames, self.size, rng), times)
        masks = torch.from_numpy(entry.masks.read(chosen, tuple(frames.shape[-2:])))  # (T, H, W)
        frames, masks = self.augment.with_masks(
            frames, masks, self.size, rng, still=is_still(entry.video)
        )
        return Clip(frames, times, masks)

    def lasts(self, entry: Entry, num_frames: int) -> bool:
        """Whether a clip of ``num_frames`` can be cut from a video without padding.

        Only "consecutive" clips need it; videos that cannot be read do not last.
        """
        if self.sampling != "consecutive":
            return True
        try:
            if self.store is not None:
                times = self.store.get(entry.video, entry.files)[1]
                length, fps = len(times), mean_rate(times)
            else:
                length, fps = count_frames(entry.video, entry.files)
            first, last = span(entry, length, fps)
        except (ClipError, video.VideoError, OSError):
            return False
        return (num_frames - 1) * self.stride < last - first

    def _read(
        self,
        entry: Entry,
        num_frames: int,
        rng: np.random.Generator | None,
        view: View | None,
    ) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Frames (T, 3, H, W), their times, and their numbers within the video."""
        path = entry.video
        if self.store is not None:
            frames, times = self.store.get(path, entry.files)  # (L, 3, h, w)
            chosen = self._choose(entry, len(times), mean_rate(times), num_frames, rng, view)
            if self.sampling == "consecutive":  # a view, no copy
                first, last = int(chosen[0]), int(chosen[-1])
                return frames[first : last + 1 : self.stride], times[chosen], chosen
            return frames[torch.from_numpy(chosen)], times[chosen], chosen
        try:
            length, fps = count_frames(path, entry.files)
            chosen = self._choose(entry, length, fps, num_frames, rng, view)
            paths = image_paths(path, entry.files)
            if paths:
                images, times = read_images([paths[i] for i in chosen]), chosen / fps
            else:
                # The middle of a frame's time is safe from rounding at its borders.
                moments = (chosen + 0.5) / fps
                images, times = video.sample_frames(path, times=moments, image_fps=IMAGE_RATE)
        except (video.VideoError, OSError) as error:
            raise ClipError(f"{path}: {error}") from error
        return torch.from_numpy(images).permute(0, 3, 1, 2), times, chosen  # (T, 3, H, W)

    def _choose(
        self,
        entry: Entry,
        length: int,
        fps: float,
        num_frames: int,
        rng: np.random.Generator | None,
        view: View | None,
    ) -> np.ndarray:
        """Frame numbers of a clip of an entry, within its video of ``length`` frames."""
        first, last = span(entry, length, fps)
        if view is not None:
            return first + VIEWS[self.sampling](last - first, num_frames, view.times)[view.time]
        focus = entry.focus and tuple(second - first / fps for second in entry.focus)
        return first + choose(
            self.sampling, last - first, num_frames, rng, stride=self.stride, fps=fps, focus=focus
        )


def span(entry: Entry, length: int, fps: float) -> tuple[int, int]:
    """First frame that an entry may use, and the one after its last.

    Raises ClipError for a stretch that begins behind the video's end.
    """
    hair = 1e-6  # measured rates are a hair beside the true one
    first = int(entry.start * fps + hair)
    if first >= length:
        raise ClipError(
            f"{entry.video}: the stretch from {entry.start:g} s begins behind the end at "
            f"{length / fps:g} s"
        )
    if entry.end is not None:
        length = min(length, max(int(entry.end * fps + hair), first + 1))
    return first, length


def mean_rate(times: np.ndarray) -> float:
    """Frames per second of a video whose frames have these times in seconds, (L,)."""
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 1.0


def is_still(path: Path) -> bool:
    """Whether a video is one image."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def image_paths(path: Path, files: tuple[str, ...]) -> list[Path]:
    """The images that are a video's frames, if they are known by name; else an empty list."""
    return [path / file for file in files] or ([path] if is_still(path) else [])


def read_images(paths: Sequence[Path]) -> np.ndarray:
    """Images of one size, (T, H, W, 3) uint8, each read once. Raises ClipError."""
    images: dict[Path, np.ndarray] = {}
    for path in dict.fromkeys(paths):
        try:
            with Image.open(path) as image:
                images[path] = np.array(ImageOps.exif_transpose(image).convert("RGB"))
        except (OSError, SyntaxError) as error:  # some broken PNGs are a SyntaxError to Pillow
            raise ClipError(f"{path}: image cannot be read ({error})") from error
        expected, found = images[paths[0]].shape[:2], images[path].shape[:2]
        if found != expected:
            raise ClipError(
                f"{path}: {found[1]} x {found[0]} pixels, but the video's frames are "
                f"{expected[1]} x {expected[0]}"
            )
    return np.stack([images[path] for path in paths])


def count_frames(path: Path, files: tuple[str, ...] = ()) -> tuple[int, float]:
    """Frames and frames per second of a video, decoded and counted if the container is silent."""
    paths = image_paths(path, files)
    if paths:
        return len(paths), IMAGE_RATE
    with video.open_video(path, image_fps=IMAGE_RATE) as reader:
        fps, length = reader.fps, reader.num_frames
        if not length and reader.duration and fps:
            length = round(reader.duration * fps)
        if not length or not fps:
            times = [frame.time for frame in reader]
            length, fps = len(times), mean_rate(np.array(times))
    return length, float(fps)


class FailureLedger:
    """Counts clips asked for and clips lost, names each lost file once in the log, and gives up.

    ``max_share`` of all clips may fail; the first ``grace`` failures are forgiven, so that one bad
    file at the start of a run does not end it.
    """

    def __init__(self, max_share: float, grace: int = 10) -> None:
        self.max_share, self.grace = max_share, grace
        self.asked = 0
        self.failed: dict[str, int] = {}  # message -> times

    def record(self, asked: int, errors: list[str]) -> None:
        """Take in a batch. Raises ClipError when more than the share has failed."""
        self.asked += asked
        for error in errors:
            if error not in self.failed:
                logger.warning("skipped a clip that cannot be read: %s", error)
            self.failed[error] = self.failed.get(error, 0) + 1
        lost = self.lost
        if errors and lost > max(self.grace, self.max_share * self.asked):
            examples = "; ".join(list(self.failed)[:3])
            raise ClipError(
                f"{lost} of {self.asked} clips could not be read, more than the allowed share of "
                f"{self.max_share:g}: {examples}. Repair or remove these videos, or raise "
                "max_failed_share"
            )

    @property
    def lost(self) -> int:
        """Clips that could not be read so far."""
        return sum(self.failed.values())

    def state_dict(self) -> dict:
        """What a checkpoint keeps."""
        return {"asked": self.asked, "failed": dict(self.failed)}

    def load_state_dict(self, state: dict) -> None:
        """Continue a saved count."""
        self.asked, self.failed = state["asked"], dict(state["failed"])
