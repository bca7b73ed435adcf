"""Frames for the model: which ones of a video, and how they become the encoder's input.

Both follow the released models: frames are picked by index, and squashed to a square with PIL's
bicubic filter (``backbone.video.preprocess`` crops and filters otherwise).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from backbone.video import VideoError, open_video

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """Frames picked of a video.

    Attributes:
        indices: numbers of the frames, ascending; short videos repeat some.
        times: their times in seconds.
        duration: of the video, in seconds.
    """

    indices: tuple[int, ...]
    times: tuple[float, ...]
    duration: float

    @property
    def times_text(self) -> str:
        """Times as prompts list them: ``0.00s,0.63s,…``."""
        return ",".join(f"{time:.2f}s" for time in self.times)


@dataclass(frozen=True)
class VideoClip:
    """A video, or the part of it from ``start`` to ``end`` seconds."""

    source: str | Path
    start: float = 0.0
    end: float | None = None

    @property
    def key(self) -> tuple:
        """What tells this clip from others, the file's state included."""
        path = Path(self.source)
        stat = path.stat() if path.exists() else None
        state = None if stat is None else (stat.st_mtime_ns, stat.st_size)
        return os.path.abspath(path) if stat else str(self.source), state, self.start, self.end


def sample_indices(
    total: int,
    fps: float,
    num_frames: int,
    video_fps: float = 1.0,
    force_sample: bool = False,
    released_times: bool = False,
) -> Sampling:
    """Pick frames of a video by the rule of the released models.

    One frame per ``round(fps / video_fps)``; if that gives more than ``num_frames``, or with
    ``force_sample``, as many spread evenly from the first frame to the last.

    Args:
        total: frames that the video has.
        fps: frames per second of the video.
        num_frames: most frames; 0 for no bound.
        video_fps: frames to pick per second.
        force_sample: always pick ``num_frames``.
        released_times: tell times as the released code does, which divides frames picked by step
            by that step and so drifts where a rate is not whole.

    Raises:
        ValueError: a video without frames or rate, or nothing to pick.
    """
    if total < 1 or fps <= 0:
        raise ValueError(f"a video of {total} frames at {fps} per second; nothing to pick from")
    if num_frames < 0 or (force_sample and not num_frames) or video_fps <= 0:
        raise ValueError(
            f"num_frames={num_frames}, video_fps={video_fps}, force_sample={force_sample}: nothing "
            "to pick; num_frames=0 (no bound) needs force_sample=False"
        )
    step = max(1, round(fps / video_fps))  # at least 1: slow videos give every frame
    indices = list(range(0, total, step))
    spread = force_sample or 0 < num_frames < len(indices)
    if spread:
        indices = np.linspace(0, total - 1, num_frames, dtype=int).tolist()
    unit = step if released_times and not spread else fps
    return Sampling(tuple(indices), tuple(index / unit for index in indices), total / fps)


def read_video(
    video: VideoClip | str | Path,
    num_frames: int,
    video_fps: float = 1.0,
    force_sample: bool = False,
    image_fps: float | None = None,
) -> tuple[np.ndarray, Sampling]:
    """Decode the frames that `sample_indices` picks, holding no others.

    Args:
        video: file, folder of images or URL, or a part of one.
        num_frames: see `sample_indices`.
        video_fps: likewise.
        force_sample: likewise.
        image_fps: rate of a folder's images.

    Returns:
        (T, H, W, 3) uint8 RGB, and the sampling; its indices and times count from the part's start.

    Raises:
        VideoError: the video cannot be read, or does not tell its frame rate.
    """
    clip = video if isinstance(video, VideoClip) else VideoClip(video)
    part = {"start": clip.start, "end": clip.end, "image_fps": image_fps}
    whole = clip.start == 0 and clip.end is None
    with open_video(clip.source, **part) as reader:
        rate, claimed = reader.source_fps, reader.num_frames if whole else None
    if rate is None:
        raise VideoError(
            f"{clip.source} does not tell its frame rate, by which frames are picked; for a folder "
            "of images give image_fps, or write the rate into the file"
        )
    rule = (float(rate), num_frames, video_fps, force_sample)
    for total in (claimed, None):
        total = total or _count(clip, part)
        sampling = sample_indices(total, *rule)
        wanted = set(sampling.indices)
        kept, seen = {}, 0
        with open_video(clip.source, **part) as reader:
            for frame in reader:
                seen = frame.index + 1
                if frame.index in wanted:
                    kept[frame.index] = frame.image
                if len(kept) == len(wanted):
                    return np.stack([kept[index] for index in sampling.indices]), sampling
        logger.warning("%s claims %d frames, but holds %d: sampled anew", clip.source, total, seen)
    raise VideoError(f"{clip.source} gave {seen} frames, and {total} before; read it again")


def _count(clip: VideoClip, part: dict) -> int:
    """Frames that there are, counted by decoding them."""
    with open_video(clip.source, **part) as reader:
        return sum(1 for _ in reader)


def preprocess(
    frames: np.ndarray | Tensor | Sequence[Image.Image],
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Squash frames to squares and normalise them: ``(x / 255 - mean) / std``.

    Args:
        frames: (T, H, W, 3) uint8 RGB, or PIL images.
        size: side of the squares, in pixels.
        mean: per channel, in units of 0 to 1.
        std: likewise.

    Returns:
        (T, 3, size, size) float32.

    Raises:
        ValueError: frames of another shape or type, or none.
    """
    if not isinstance(frames, np.ndarray | Tensor):
        frames = [np.asarray(image.convert("RGB")) for image in frames]
    shapes = {tuple(frame.shape) for frame in frames}
    kinds = {str(frame.dtype).removeprefix("torch.") for frame in frames}
    if not shapes or kinds != {"uint8"} or any(len(s) != 3 or s[2] != 3 for s in shapes):
        raise ValueError(
            f"frames of shapes {sorted(shapes)} and types {sorted(kinds)}: (T, H, W, 3) uint8 RGB "
            "is needed, at least one frame"
        )
    squares = []
    for frame in frames:
        image = Image.fromarray(np.asarray(frame))
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        squares.append(np.asarray(image))
    pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(value, dtype=torch.float32).view(3, 1, 1) for value in (mean, std))
    return (pixels - mean) / std  # (T, 3, size, size)
