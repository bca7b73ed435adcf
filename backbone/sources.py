"""Where a video's pictures come from: files, folders of images, cameras and URLs, through PyAV.

A source yields every picture it holds, once, in order of showing, each with an exact time; rates,
trimming and everything a user calls lie in `backbone.video`, whose rules on time, rotation and
damage are kept here. Sources share these members:

    name, live, fps, width, height, num_frames, duration   what is known after opening
    slack      seconds that a picture may count as shown early, see `backbone.video`
    damaged    packets and pictures found damaged so far
    reached    end of the latest picture, in seconds
    length()   seconds from the first picture to the end of the last
    pictures(start)   iterator of `Picture`, from the one shown at ``start`` or an earlier one on;
                      to be called once
    close()
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import re
import struct
import sys
import time as clock
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from numbers import Rational
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from PIL import Image, ImageOps

logger = logging.getLogger(__name__)

Rate = int | float | str | Fraction
Source = str | int | os.PathLike

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}
FILE_SCHEMES = {"http", "https"}  # have an end, are checked like files
LIVE_SCHEMES = {"rtsp", "rtsps", "rtmp", "rtmps", "rtp", "srt", "tcp", "udp"}
CAMERAS = {  # platform: (ffmpeg's input format, how it calls camera number or name {}, options)
    "linux": ("v4l2", "/dev/video{}", {}),
    "darwin": ("avfoundation", "{}:none", {"framerate": "30"}),
    "win32": ("dshow", "video={}", {}),
}
INDEXED_FORMATS = {"mov", "matroska"}  # containers in which a jump to a time can be trusted
DATED_FORMATS = {"mov", "matroska", "flv", "avi"}  # containers whose header tells the length
NTSC_RATES = [Fraction(n * 1000, 1001) for n in (24, 30, 48, 60, 120)]
MOST_SLACK = Fraction(1, 2000)  # seconds a picture may count early, see above
SEEK_MARGIN = 1  # seconds: files are indexed by decoding time, which runs a little ahead
LEAST_SHORTFALL = Fraction(1, 2)  # seconds a file may end before its stated length
THREADED_PIXELS = 512 * 512  # smaller pictures cost more to share among threads than to decode


class VideoError(RuntimeError):
    """A source that cannot be read, or a file that cannot be written, as asked."""


@dataclass(frozen=True)
class Picture:
    """A decoded picture, not yet converted to RGB."""

    time: Fraction  # seconds since the first picture
    span: Fraction  # seconds it is shown if nothing follows
    read: Callable[[], np.ndarray]  # -> (H, W, 3) uint8


def as_fps(rate: Rate) -> Fraction:
    """Frame rate as an exact fraction; 23.976, 29.97, 59.94 become their thousand-and-first parts.

    Raises:
        VideoError: The rate is not a positive, finite number.
    """
    try:
        exact = Fraction(rate if isinstance(rate, str | Rational) else float(rate))
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        exact = Fraction(0)
    if isinstance(rate, bool) or exact <= 0:
        raise VideoError(f"fps={rate!r} is no frame rate; give a positive number or '30000/1001'")
    if isinstance(rate, Rational) or (isinstance(rate, str) and "/" in rate):
        return exact
    for ntsc in NTSC_RATES:
        if abs(float(exact / ntsc) - 1) < 5e-6:
            return ntsc
    return exact.limit_denominator(1_000_000)


def as_seconds(value: float, what: str) -> Fraction:
    """Exact seconds; floats are read to the microsecond, so that 0.1 means a tenth."""
    try:
        exact = Fraction(value if isinstance(value, Rational) else float(value))
    except (TypeError, ValueError, OverflowError):
        raise VideoError(f"{what}={value!r} is no time; give seconds as a finite number") from None
    return exact.limit_denominator(1_000_000)


def open_source(
    source: Source,
    fps: Fraction | None,
    image_fps: Rate | None,
    tolerant: bool = False,
    timeout: float = 10.0,
    options: Mapping[str, str] | None = None,
) -> Container | Folder:
    """Tell what kind of source this is and open it."""
    options = dict(options or {})
    if isinstance(source, int) and not isinstance(source, bool):
        return _open_camera(str(source), timeout, options)
    if not isinstance(source, str | os.PathLike):
        raise VideoError(f"{source!r} is no video; give a path, a folder, a camera number or a URL")
    text = os.fspath(source)
    if text == "camera" or text.startswith("camera:"):
        return _open_camera(text[len("camera:") :] or "0", timeout, options)
    url = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", text)
    if url:
        scheme = url[1].lower()
        if scheme not in FILE_SCHEMES | LIVE_SCHEMES:
            known = ", ".join(sorted(FILE_SCHEMES | LIVE_SCHEMES))
            raise VideoError(f"{text}: scheme {scheme!r} is not read here; use a path, {known}")
        if scheme.startswith("rtsp"):
            options.setdefault("rtsp_transport", "tcp")
        arguments = {"timeout": timeout, "options": options}
        return Container(text, text, arguments, live=scheme in LIVE_SCHEMES, tolerant=tolerant)
    path = Path(text)
    if path.is_dir():
        return Folder(path, fps if image_fps is None else as_fps(image_fps))
    if not path.exists():
        nearest = next((p for p in path.absolute().parents if p.is_dir()), path.absolute().parent)
        raise VideoError(f"{path}: no such file; what exists is {nearest}, so check the rest")
    # The prefix keeps ffmpeg from reading a colon in the name as a protocol.
    return Container(f"file:{path}", str(path), {"options": options}, tolerant=tolerant)


def _open_camera(name: str, timeout: float, options: dict[str, str]) -> Container:
    """Open a camera through this platform's input format."""
    if sys.platform not in CAMERAS:
        raise VideoError(f"camera {name}: cameras on {sys.platform!r} are not read here; use files")
    driver, pattern, defaults = CAMERAS[sys.platform]
    device = name if name.startswith("/") else pattern.format(name)
    if sys.platform == "linux" and not Path(device).exists():
        found = ", ".join(sorted(map(str, Path("/dev").glob("video*")))) or "none at all"
        raise VideoError(f"camera {name}: there is no {device}; devices here: {found}")
    if sys.platform == "win32" and name.isdigit():
        raise VideoError(
            f"camera {name}: DirectShow knows cameras by name; use 'camera:NAME' with a name from "
            "`ffmpeg -list_devices true -f dshow -i dummy`"
        )
    arguments = {"format": driver, "options": {**defaults, **options}, "timeout": timeout}
    return Container(device, f"camera {name}", arguments, live=True)


class Folder:
    """Images of a folder as a video of constant rate."""

    live = False
    slack = Fraction(0)
    damaged = 0

    def __init__(self, path: Path, rate: Fraction | None) -> None:
        self.name = str(path)
        files = [p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")]
        images = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
        self._images = sorted(images, key=_natural)
        if not images:
            raise VideoError(
                f"{path} is a folder without images ({len(files)} other files); images end in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}; for videos give one file"
            )
        if rate is None:
            raise VideoError(
                f"{path} is a folder of images, which have no clock; "
                "say how many were taken per second by fps= or image_fps="
            )
        self.fps = rate
        self.num_frames = len(images)
        self.duration = self.num_frames / rate
        self.reached = Fraction(0)
        self.height, self.width = self._read(self._images[0]).shape[:2]

    def length(self) -> Fraction:
        """Seconds from the first picture to the end of the last."""
        return self.duration

    def pictures(self, start: Fraction) -> Iterator[Picture]:
        """Pictures from the one shown at ``start`` on."""
        for i in range(math.floor(start * self.fps), self.num_frames):
            self.reached = (i + 1) / self.fps
            yield Picture(i / self.fps, 1 / self.fps, partial(self._sized, self._images[i]))
        self.reached = self.duration

    def close(self) -> None:
        """Nothing is open."""

    def _sized(self, path: Path) -> np.ndarray:
        image = self._read(path)
        if image.shape[:2] != (self.height, self.width):
            raise VideoError(
                f"{path} is {image.shape[1]}x{image.shape[0]} pixels, the first image is "
                f"{self.width}x{self.height}; a video has one size: resize it or take it out"
            )
        return image

    @staticmethod
    def _read(path: Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                return np.array(ImageOps.exif_transpose(image).convert("RGB"))
        except (OSError, SyntaxError) as error:  # some broken PNGs are a SyntaxError to Pillow
            raise VideoError(
                f"{path} is not a readable image ({error}); replace it or take it out"
            ) from error


def _natural(path: Path) -> tuple:
    """Sort key that counts: 'a2' before 'a10'."""
    parts = re.split(r"(\d+)", path.name.lower())  # text and digits in turn
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name


class Container:
    """What ffmpeg opens: a file, a URL or a device."""

    def __init__(
        self, address: str, name: str, arguments: dict, live: bool = False, tolerant: bool = False
    ) -> None:
        self.name, self.live = name, live
        self._address, self._arguments, self._tolerant = address, arguments, tolerant or live
        self._start_reading()
        try:
            self._inspect()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close file or device."""
        self._container.close()

    def length(self) -> Fraction:
        """Seconds from the first picture to the end of the last."""
        if self._video.duration is not None:
            return self.duration
        # Some containers only tell the length of sound and video together: read the packets' times.
        with self._connect() as scan:
            ends = [
                (packet.pts + (packet.duration or 0)) * self._tick - self._origin
                for packet in scan.demux(scan.streams[self._video.index])
                if packet.pts is not None
            ]
        if not ends:
            raise VideoError(
                f"{self.name} carries no times to spread frames over; give times=, or write them "
                f"into a container: `ffmpeg -i {self.name} -c copy out.mp4`"
            )
        return max(ends)

    def pictures(self, start: Fraction) -> Iterator[Picture]:
        """All pictures from the one shown at ``start``, or an earlier one, on."""
        if start <= SEEK_MARGIN or not self._formats & INDEXED_FORMATS:
            return itertools.chain([self._first], self._rest)
        target = math.floor((start - SEEK_MARGIN + self._origin) / self._tick)
        with contextlib.suppress(av.FFmpegError):  # where it landed is looked at below
            self._container.seek(target, stream=self._video, backward=True)
        self._last = None
        pictures = self._pictures(self._frames())
        landed = next(pictures, None)
        if landed is not None and landed.time <= start:
            return itertools.chain([landed], pictures)
        self.close()
        self._start_reading()
        return self._pictures(self._frames())

    # -- opening

    def _connect(self) -> av.container.InputContainer:
        timeout = self._arguments.get("timeout")
        began = clock.monotonic()
        try:
            return av.open(self._address, **self._arguments)
        except (av.FFmpegError, ValueError) as error:
            # Some protocols report the end of patience as an error of their own.
            if timeout is not None and clock.monotonic() - began >= timeout:
                raise VideoError(
                    f"{self.name} did not answer within {timeout} s; check that it is there, or "
                    "give it longer with timeout="
                ) from error
            raise VideoError(
                f"{self.name} cannot be opened as a video: {_reason(error)}; it is no video, or "
                "broken, or a recording that was cut off: check it, copy it again, or convert it"
            ) from error

    def _start_reading(self) -> None:
        """Connect, choose the video stream, and stand before its first packet."""
        self.damaged = 0
        self.reached = Fraction(0)  # end of the latest picture, in seconds
        self._last: Fraction | None = None  # its time
        self._decoded = 0  # pictures so far, for messages
        self._met: dict[int, int] = {}  # stream -> end of its packets so far, in its own ticks
        self._container = self._connect()
        try:
            self._video = self._choose_stream()
        except BaseException:
            self.close()
            raise
        self._tick = Fraction(self._video.time_base)
        codec = self._video.codec_context
        if codec.width * codec.height < THREADED_PIXELS:
            codec.thread_count = 1
        elif not self.live:  # frame threads hold pictures back, which a live source must not
            codec.thread_type = "AUTO"

    def _choose_stream(self) -> av.VideoStream:
        self._formats = set(self._container.format.name.split(","))
        streams = self._container.streams
        moving = [s for s in streams.video if not s.disposition & Disposition.attached_pic]
        if "tty" in self._formats:  # ffmpeg draws any text file as terminal art
            raise VideoError(f"{self.name} is a text file, not a video; check the path")
        if not moving:
            kinds = ", ".join(sorted({s.type for s in streams}))
            finding = f"no video, only {kinds}" if kinds else "neither video nor sound"
            raise VideoError(f"{self.name} holds {finding}; check that it is the file you mean")
        best = streams.best("video")
        stream = best if best in moving else moving[0]
        if stream.codec_context is None:
            raise VideoError(f"{self.name}: its video codec is unknown here; convert it to H.264")
        return stream

    def _inspect(self) -> None:
        """Note what the container claims, and decode the first picture."""
        video = self._video
        # Without times the average is a mere default, while the guess looks into the codec's data.
        rates = [video.average_rate, video.guessed_rate]
        rates = rates[::-1] if video.start_time is None else rates
        self.fps = next((Fraction(rate) for rate in rates if rate), None)
        self._nominal = 1 / self.fps if self.fps else Fraction(1, 25)
        self._spans: dict[int | None, Fraction] = {}  # of the durations met
        exact = (self._nominal / self._tick).denominator == 1
        self.slack = Fraction(0) if exact else min(self._tick / 2, MOST_SLACK)
        self.num_frames = video.frames or None
        claimed = self._container.duration
        self.duration = Fraction(claimed, av.time_base) if claimed else None
        if video.duration is not None:
            self.duration = video.duration * self._tick

        frames = self._frames()
        first = next(frames, None)
        if first is None:
            raise VideoError(
                f"{self.name} has a video stream without any frame that can be decoded; "
                "record or copy it again"
            )
        self._zero = first.pts or 0  # in ticks
        self._origin = self._zero * self._tick
        self._coded_size = (first.width, first.height)
        self._turn = _display_turn(first)
        self.width, self.height = first.width, first.height
        if self._turn.transpose:
            self.width, self.height = self.height, self.width
        self._rest = self._pictures(itertools.chain([first], frames))
        self._first = next(self._rest)

    # -- decoding

    def _pictures(self, frames: Iterator[av.VideoFrame]) -> Iterator[Picture]:
        """Give every frame its time, by the rules at the head of this file."""
        for frame in frames:
            self._decoded += 1
            if (frame.width, frame.height) != self._coded_size:
                raise VideoError(
                    f"{self.name}: the frame at {float(self.reached):.3f} s is {frame.width}x"
                    f"{frame.height} pixels after {self._coded_size[0]}x{self._coded_size[1]} "
                    "before; cut the video where its size changes, or convert it to one size"
                )
            time = None if frame.pts is None else (frame.pts - self._zero) * self._tick
            if self._last is None:
                time = time or Fraction(0)
            elif time is None or time <= self._last:
                time = self._last + self._nominal
            span = self._spans.get(frame.duration)  # fractions are exact, but slow
            if span is None:
                span = self._spans[frame.duration] = self._span(frame.duration)
            self._last, self.reached = time, time + span
            yield Picture(time, span, partial(self._rgb, frame))

    def _span(self, ticks: int | None) -> Fraction:
        """Seconds that a frame is shown."""
        span = ticks * self._tick if ticks else self._nominal
        coarse = abs(span - self._nominal) < self._tick  # the clock cuts durations
        return self._nominal if coarse else span

    def _rgb(self, frame: av.VideoFrame) -> np.ndarray:
        return self._turn.apply(frame.to_ndarray(format="rgb24"))

    def _frames(self) -> Iterator[av.VideoFrame]:
        """Frames in order of showing; damage is counted where tolerated, and raised elsewhere."""
        for frame, damage in self._decode():
            if damage is not None:
                self.damaged += 1
                where = f"after {self._decoded} decoded frames, at {float(self.reached):.3f} s"
                if not self._tolerant:
                    raise VideoError(
                        f"{self.name} is damaged or cut off {where}: {damage}; copy it again, "
                        "re-encode it, or use what can be decoded with truncated='keep'"
                    )
                level = logging.WARNING if self.damaged == 1 else logging.DEBUG
                logger.log(level, "%s: damage %s: %s", self.name, where, damage)
            if frame is not None:
                yield frame

    def _decode(self) -> Iterator[tuple[av.VideoFrame | None, str | None]]:
        """Pairs of a frame and what is wrong with it; no frame where one is lost."""
        try:
            for packet in self._packets():
                try:
                    frames = packet.decode()
                except av.FFmpegError as error:
                    if not self._tolerant:
                        yield from self._delayed()
                    yield None, f"a packet cannot be decoded ({_reason(error)})"
                    continue
                for frame in frames:
                    yield frame, "a frame is only partly there" if frame.is_corrupt else None
        except av.FFmpegError as error:
            if self.live:
                raise VideoError(
                    f"{self.name} stopped sending after {self._decoded} frames: {_reason(error)}; "
                    "check the device or the line, and open it again"
                ) from error
            yield from self._delayed()
            yield None, f"reading stops ({_reason(error)})"
            return
        bases = [stream.time_base for stream in self._container.streams]
        ends = [ticks * bases[stream] for stream, ticks in self._met.items()]
        missing = self._stated_end() - max(ends, default=Fraction(0))
        if missing > max(LEAST_SHORTFALL, 3 * self._nominal):
            yield None, f"it ends {float(missing):.2f} s before the length that it states"

    def _packets(self) -> Iterator[av.Packet]:
        """Packets of the video; in files those of sound are looked at, as they tell its length."""
        streams = [self._video] if self.live else self._container.streams
        while True:
            try:
                for packet in self._container.demux(*streams):
                    number = packet.stream.index
                    if packet.pts is not None:
                        end = packet.pts + (packet.duration or 0)
                        self._met[number] = max(self._met.get(number, 0), end)
                    if number == self._video.index:
                        yield packet
                return
            except av.error.BlockingIOError:  # some devices answer "not yet" between pictures
                if not self.live:
                    raise
                clock.sleep(0.005)

    def _delayed(self) -> Iterator[tuple[av.VideoFrame | None, str | None]]:
        """Whole frames that the decoder still holds back."""
        with contextlib.suppress(av.FFmpegError):
            for frame in self._video.decode(None):
                if not frame.is_corrupt:
                    yield frame, None

    def _stated_end(self) -> Fraction:
        """Container's time at which it says to end; 0 if it says nothing reliable."""
        duration = self._container.duration
        if self.live or not duration or not self._formats & DATED_FORMATS:
            return Fraction(0)
        return Fraction(duration + (self._container.start_time or 0), av.time_base)


def _reason(error: Exception) -> str:
    if isinstance(error, av.error.ExitError):
        return "no answer in time"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()


@dataclass(frozen=True)
class _Turn:
    """How coded pictures are turned to be shown: transposed first, then mirrored."""

    transpose: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Turn an (H, W, 3) image."""
        if not (self.transpose or self.mirror_x or self.mirror_y):
            return image
        image = image.transpose(1, 0, 2) if self.transpose else image
        steps = (-1 if self.mirror_y else 1, -1 if self.mirror_x else 1)
        return np.ascontiguousarray(image[:: steps[0], :: steps[1]])


def _display_turn(frame: av.VideoFrame) -> _Turn:
    """Read the display matrix: x' = a x + c y, y' = b x + d y, to the nearest quarter turn."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return _Turn()
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    if abs(a) >= abs(b):
        return _Turn(mirror_x=a < 0, mirror_y=d < 0)
    return _Turn(transpose=True, mirror_x=c < 0, mirror_y=b < 0)
