"""Frames out of files, folders of images, cameras and URLs, one at a time, each with its time.

Everything here decodes with PyAV (ffmpeg's libraries) and holds a handful of frames, however long
the source is. The rules, once for all sources:

* **Time** is in seconds since the first picture of the video; a container's own offset is removed.
* **A picture is shown** from its time to the time of the next one, the last one for its duration.
  At rate ``fps``, frame ``k`` is the picture shown at ``start + k / fps``: pictures repeat where
  the source is slower and drop out where it is faster, also at variable frame rates. A later
  picture is never taken, and times are exact fractions. One allowance: where a container's clock
  is too coarse for its own frame rate (Matroska rounds to milliseconds), a picture counts as
  shown half a tick, at most half a millisecond, early.
* **Missing or backward timestamps**: such a picture follows its predecessor by one nominal frame
  duration; the next one uses its own timestamp again as soon as that lies ahead.
* **Rotation and mirroring** written into the file are applied; pixels are taken as square.
* **Frame rates stay fractions**: 29.97 is 30000/1001.

Whatever cannot be read is refused with a :class:`VideoError` that names source, finding and mend.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, TypeVar

import av
import numpy as np
import torch

from .sources import (
    THREADED_PIXELS,
    Container,
    Folder,
    Picture,
    Rate,
    Source,
    VideoError,
    as_fps,
    as_seconds,
    open_source,
)

__all__ = [
    "Frame",
    "VideoError",
    "VideoReader",
    "VideoWriter",
    "as_fps",
    "open_video",
    "prefetched",
    "preprocess",
    "sample_frames",
]

logger = logging.getLogger(__name__)

PATIENCE = 5.0  # seconds to wait for a background reader that is to stop
WRITABLE_SUFFIXES = {".mp4", ".mov", ".mkv", ".m4v"}


@dataclass(frozen=True)
class Frame:
    """One frame of a video.

    Attributes:
        index: 0, 1, 2, ... in the order of reading.
        time: Seconds since the video's first picture. At a given ``fps`` this is the moment the
            frame stands for, ``start + index / fps``; otherwise the picture's own time.
        image: (H, W, 3) uint8 RGB. Frames that repeat one picture share one array: read only.
    """

    index: int
    time: float
    image: np.ndarray


class VideoReader:
    """Iterator over the frames of one source, and context manager; made by `open_video`.

    Attributes:
        name: The source as messages call it.
        fps: Rate of the frames that come out (Fraction): the one asked for, else the source's own
            average; None if the source does not tell.
        source_fps: The source's own average rate, or None.
        width, height: Pixels, after rotation.
        num_frames: How many pictures the container claims to hold, or None.
        duration: Seconds the container claims to last, or None.
    """

    def __init__(
        self,
        source: Container | Folder,
        fps: Fraction | None,
        start: Fraction,
        end: Fraction | None,
    ) -> None:
        self.name = source.name
        self.fps = fps or source.fps
        self.source_fps = source.fps
        self.width, self.height = source.width, source.height
        self.num_frames = source.num_frames
        self.duration = None if source.duration is None else float(source.duration)
        self._source = source
        self._rate, self._start, self._end = fps, start, end
        self._count = 0
        self._finished = False
        self._frames = self._read()

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        return next(self._frames)

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Release file or device and end the iteration. Closing twice is fine."""
        self._frames.close()
        self._source.close()

    @property
    def damaged(self) -> int:
        """Packets and pictures found damaged so far."""
        return self._source.damaged

    @property
    def num_whole(self) -> int | None:
        """Frames that the video covers for their whole ``1 / fps``; None until read to the end.

        One less than the frames that came if the video ends in the middle of the last one: ten
        pictures at 25 fps make ten frames at 24 fps, nine of them whole.
        """
        if not self._finished or self._rate is None:
            return self._count if self._finished else None
        reached = self._source.reached
        reached = reached if self._end is None else min(reached, self._end)
        length = reached + self._source.slack - self._start
        return min(self._count, math.floor(length * self._rate))

    def _read(self) -> Iterator[Frame]:
        pictures = self._source.pictures(self._start)
        slack = self._source.slack
        if self._rate is None:
            timed = _between(pictures, self._start, self._end, slack)
        else:
            timed = _shown_at(pictures, _moments(self._rate, self._start, self._end), slack)
        for time, _, image in _converted(timed):
            self._count += 1
            yield Frame(self._count - 1, float(time), image)
        if not self._count:
            raise VideoError(
                f"{self.name} shows no frame from {float(self._start):g} s "
                f"{'on' if self._end is None else f'to {float(self._end):g} s'}: "
                f"it was read up to {float(self._source.reached):.3f} s; choose other times"
            )
        self._finished = True


def open_video(
    source: Source,
    fps: Rate | None = None,
    start: float = 0.0,
    end: float | None = None,
    *,
    image_fps: Rate | None = None,
    truncated: Literal["error", "keep"] = "error",
    timeout: float = 10.0,
    options: Mapping[str, str] | None = None,
) -> VideoReader:
    """Open a source of frames and read its first picture, so that bad sources are refused here.

    Args:
        source: Path of a video; folder of images (read in natural order: 2 before 10); camera,
            as number (``0``) or ``"camera:0"``, ``"camera:/dev/video2"``, ``"camera:NAME"``;
            http(s), rtsp, rtmp, rtp, srt, tcp or udp URL.
        fps: Frames per second wanted, by the rule at the head of this file; None for every picture
            the source has, at its own times.
        start: Seconds; at a given ``fps`` the first frame stands for ``start`` itself.
        end: Seconds; only frames before it come. None for all.
        image_fps: Rate at which the images of a folder were taken. Defaults to ``fps``.
        truncated: What to do with a file that breaks off or is damaged inside. "error": the frames
            before the damage come, then a VideoError. "keep": all that can be decoded comes, the
            damage is counted in ``damaged`` and logged as a warning. Live sources (cameras and all
            URLs but http) lose packets by nature and always keep going.
        timeout: Seconds a camera or URL may stay silent.
        options: For ffmpeg's demuxer, such as ``{"video_size": "640x480"}`` for a camera.

    Raises:
        VideoError: Missing, unreadable or no video; no frame; a device or a rate that is absent.
    """
    if truncated not in ("error", "keep"):
        raise VideoError(f"truncated={truncated!r} is not known; choose 'error' or 'keep'")
    first = as_seconds(start, "start")
    last = None if end is None else as_seconds(end, "end")
    if first < 0 or (last is not None and last <= first):
        raise VideoError(
            f"no frame lies between start={start} and end={end} s of {source}: "
            "times count from 0, and end must come after start"
        )
    rate = None if fps is None else as_fps(fps)
    opened = open_source(source, rate, image_fps, truncated == "keep", timeout, options)
    return VideoReader(opened, rate, first, last)


def sample_frames(
    source: Source,
    num_frames: int | None = None,
    times: Sequence[float] | None = None,
    *,
    start: float = 0.0,
    end: float | None = None,
    image_fps: Rate | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Pick frames of a finished video, decoding it once and keeping only what is asked for.

    Args:
        source: As for `open_video`, but not live.
        num_frames: This many frames, each from the middle of one of ``num_frames`` equal parts of
            ``[start, end)``. Either this or ``times``.
        times: Seconds, in any order; the picture shown at each.
        start: Seconds from which on ``num_frames`` spreads.
        end: Seconds up to which it spreads; None for the end of the video.
        image_fps: Rate of a folder's images.

    Returns:
        Images (T, H, W, 3) uint8 RGB and the pictures' own times (T,) float64 in seconds.

    Raises:
        VideoError: As `open_video`; also for times past the end, and for live sources.
    """
    if (num_frames is None) == (times is None):
        raise VideoError(f"give either num_frames ({num_frames}) or times ({times}), not both")
    if num_frames is not None and num_frames < 1:
        raise VideoError(f"num_frames={num_frames} leaves nothing to sample; give 1 or more")
    with contextlib.closing(open_source(source, None, image_fps)) as opened:
        if opened.live:
            raise VideoError(f"{opened.name} is live and has no end to sample to; use open_video")
        if times is not None:
            asked = [as_seconds(time, "times") for time in times]
        else:
            first = as_seconds(start, "start")
            last = opened.length() if end is None else as_seconds(end, "end")
            part = (last - first) / num_frames
            asked = [first + part * (2 * i + 1) / 2 for i in range(num_frames) if part > 0]
        if not asked or min(asked) < 0:
            raise VideoError(
                f"{opened.name}: nothing to sample at times={times}, start={start}, end={end}; "
                "ask for times from 0 on, with start before end"
            )
        moments = sorted(set(asked))
        timed = _shown_at(opened.pictures(moments[0]), iter(moments), opened.slack)
        chosen = {time: (picture.time, image) for time, picture, image in _converted(timed)}
        if len(chosen) < len(moments):
            raise VideoError(
                f"{opened.name} shows nothing at {float(moments[len(chosen)]):.3f} s: it ends at "
                f"{float(opened.reached):.3f} s; ask for earlier times"
            )
    shown = [chosen[time] for time in asked]
    return np.stack([image for _, image in shown]), np.array([float(time) for time, _ in shown])


_Timed = Iterator[tuple[Fraction, Picture]]


def _moments(fps: Fraction, start: Fraction, end: Fraction | None) -> Iterator[Fraction]:
    moments = (start + k / fps for k in itertools.count())
    return moments if end is None else itertools.takewhile(lambda time: time < end, moments)


def _between(
    pictures: Iterator[Picture], start: Fraction, end: Fraction | None, slack: Fraction
) -> _Timed:
    """Every picture whose own time lies in [start, end)."""
    first, last = start - slack, None if end is None else end - slack
    for picture in pictures:
        if last is not None and picture.time >= last:
            return
        if picture.time >= first:
            yield picture.time, picture


def _shown_at(pictures: Iterator[Picture], moments: Iterator[Fraction], slack: Fraction) -> _Timed:
    """The picture shown at each of the ascending moments, until either of them ends."""
    moment = next(moments, None)
    shown: Picture | None = None
    for picture in pictures:
        # Until now the earlier one was shown; a picture that begins right at the moment need not
        # wait for its successor, so a live source answers at once.
        while shown is not None and moment is not None and moment + slack < picture.time:
            yield moment, shown
            moment = next(moments, None)
        shown = picture
        while moment == picture.time:
            yield moment, shown
            moment = next(moments, None)
        if moment is None:
            return
    while shown is not None and moment is not None and moment + slack < shown.time + shown.span:
        yield moment, shown
        moment = next(moments, None)


def _converted(timed: _Timed) -> Iterator[tuple[Fraction, Picture, np.ndarray]]:
    """Add the RGB image, converting each picture once however often it repeats."""
    shown, image = None, None
    for time, picture in timed:
        if picture is not shown:
            shown, image = picture, picture.read()
        yield time, picture, image


Item = TypeVar("Item")


def prefetched(items: Iterable[Item], size: int = 8) -> Iterator[Item]:
    """Iterate over ``items`` while a background thread reads up to ``size`` of them ahead.

    An exception in ``items`` reaches the caller after the items before it. A caller that stops
    early (``break``, ``close()``, an error of its own) ends the thread; should ``items`` be stuck
    waiting for a device just then, the thread is left to end with it.

    Raises:
        VideoError: ``size`` is below 1.
    """
    if size < 1:
        raise VideoError(f"size={size} reads nothing ahead; give 1 or more")
    return _prefetched(items, size)


def _prefetched(items: Iterable[Item], size: int) -> Iterator[Item]:
    buffer: deque[Item] = deque()
    changed = threading.Condition()
    ended = stopped = False
    failure: BaseException | None = None

    def work() -> None:
        nonlocal ended, failure
        try:
            for item in items:
                with changed:
                    changed.wait_for(lambda: stopped or len(buffer) < size)
                    if stopped:
                        return
                    buffer.append(item)
                    changed.notify_all()
        except BaseException as error:  # handed to the caller, whatever it is
            failure = error
        finally:
            with changed:
                ended = True
                changed.notify_all()

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: ended or buffer)
                if not buffer:
                    break
                item = buffer.popleft()
                changed.notify_all()
            yield item
        if failure is not None:
            raise failure
    finally:
        with changed:
            stopped = True
            changed.notify_all()
        thread.join(timeout=PATIENCE)
        if thread.is_alive():
            logger.warning("a source being read ahead did not stop within %g s", PATIENCE)


def preprocess(
    frames: np.ndarray | torch.Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    resize: Literal["crop", "stretch"] = "crop",
) -> torch.Tensor:
    """Resize and normalise frames for an image encoder: ``(x / 255 - mean) / std``.

    Resizing is bilinear with antialiasing, rounded to whole grey levels as in an image file.
    Frames that have the right size already are not resampled at all.

    Args:
        frames: (T, H, W, 3) uint8 RGB, on the CPU.
        size: Height and width that come out.
        mean: Per channel, in units of 0 to 1.
        std: Likewise.
        resize: "crop" brings the short side to ``size`` and cuts out the centre; "stretch" brings
            both sides to ``size``.

    Returns:
        (T, 3, size, size) float32.

    Raises:
        VideoError: Frames of another shape or type, an unknown ``resize``, an impossible size.
    """
    frames = torch.as_tensor(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
        raise VideoError(
            f"frames of shape {tuple(frames.shape)} and type {frames.dtype}: "
            "(T, H, W, 3) uint8 is needed"
        )
    if resize not in ("crop", "stretch") or size < 1:
        raise VideoError(f"resize={resize!r}, size={size}: choose 'crop' or 'stretch', size >= 1")
    pixels = frames.permute(0, 3, 1, 2)  # (T, 3, H, W)
    height, width = pixels.shape[-2:]
    target = (size, size)
    if resize == "crop":
        short = min(height, width)
        target = (height * size // short, width * size // short)
    if target != (height, width):
        pixels = torch.nn.functional.interpolate(
            pixels, size=target, mode="bilinear", antialias=True
        )
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    pixels = pixels[..., top : top + size, left : left + size]  # (T, 3, size, size)
    pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format) / 255
    mean, std = (torch.tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (mean, std))
    return (pixels - mean) / std


class VideoWriter:
    """Write RGB frames to an H.264 (yuv420p) file that any player opens; context manager.

    The file appears under its name when it is complete: on `close`, or at the end of the ``with``
    block. If the block fails, nothing is left behind.

    Args:
        path: File to write; its suffix (.mp4, .mov, .mkv) chooses the container.
        fps: Frames per second; kept exact.
        size: (width, height) in pixels; None takes the first frame's. An odd side, which yuv420p
            cannot hold, gains one pixel: its last row or column is repeated.
        crf: x264's quality, from 0 (lossless) to 51 (worst).

    Raises:
        VideoError: No H.264 encoder, a suffix without container, a frame of another size or type,
            a frame after `close`, or no frame at all.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        fps: Rate,
        size: tuple[int, int] | None = None,
        crf: int = 18,
    ) -> None:
        self.path = Path(path)
        self.fps = as_fps(fps)
        self.size = size
        self.num_frames = 0
        if self.path.suffix.lower() not in WRITABLE_SUFFIXES:
            raise VideoError(
                f"{self.path}: no container for suffix {self.path.suffix!r}; "
                f"choose one of {', '.join(sorted(WRITABLE_SUFFIXES))}"
            )
        if not self.path.parent.is_dir():
            raise VideoError(f"{self.path}: there is no folder {self.path.parent}; create it first")
        if "libx264" not in av.codecs_available:
            raise VideoError("this PyAV is built without libx264; install PyAV's own wheel")
        self._crf = crf
        name = f".{self.path.stem}.{os.getpid()}.partial{self.path.suffix}"
        self._partial = self.path.with_name(name)
        self._container: av.container.OutputContainer | None = None
        self._closed = False

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def write(self, image: np.ndarray) -> None:
        """Append one frame, (H, W, 3) uint8 RGB."""
        if self._closed:
            raise VideoError(f"{self.path} is closed already; open a new VideoWriter")
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise VideoError(
                f"{self.path}, frame {self.num_frames}: shape {image.shape}, type {image.dtype}; "
                "(H, W, 3) uint8 is needed"
            )
        height, width = image.shape[:2]
        self.size = self.size or (width, height)
        if (width, height) != tuple(self.size):
            raise VideoError(
                f"{self.path}, frame {self.num_frames} is {width}x{height} pixels, the video is "
                f"{self.size[0]}x{self.size[1]}; resize the frame"
            )
        if self._container is None:
            self._start()
        if height % 2 or width % 2:
            image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame.pts, frame.time_base = self.num_frames, 1 / self.fps
        self._container.mux(self._stream.encode(frame))
        self.num_frames += 1

    def close(self) -> None:
        """Finish the file and give it its name. Closing twice is fine."""
        if self._closed:
            return
        if self._container is None:
            self.discard()
            raise VideoError(f"{self.path}: no frame was written, and an empty video is no video")
        try:
            self._container.mux(self._stream.encode())
            self._container.close()
            os.replace(self._partial, self.path)
        finally:
            self.discard()

    def discard(self) -> None:
        """Give up: remove what was written so far. After `close` it does nothing."""
        self._closed = True
        if self._container is not None:
            with contextlib.suppress(av.FFmpegError):
                self._container.close()
        self._partial.unlink(missing_ok=True)

    def _start(self) -> None:
        index_first = {} if self.path.suffix.lower() == ".mkv" else {"movflags": "faststart"}
        self._container = av.open(f"file:{self._partial}", "w", options=index_first)
        width, height = self.size
        self._stream = self._container.add_stream("libx264", rate=self.fps)
        self._stream.width, self._stream.height = width + width % 2, height + height % 2
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": str(self._crf)}
        if width * height < THREADED_PIXELS:
            self._stream.codec_context.thread_count = 1
