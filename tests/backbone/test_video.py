"""Frames out of files, folders, devices and URLs; each picture carries its number as a bar code."""

from __future__ import annotations

import contextlib
import functools
import gc
import http.server
import itertools
import logging
import random
import socket
import struct
import threading
import time
import wave
import weakref
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from backbone import sources, video
from backbone.video import (
    VideoError,
    VideoWriter,
    open_video,
    prefetched,
    preprocess,
    sample_frames,
)

WIDTH, HEIGHT = 64, 48


def picture(number: int) -> np.ndarray:
    """(48, 64, 3) image: eight bars, white where the number's bit is set."""
    bits = [(number >> k) & 1 for k in range(8)]
    row = np.repeat(np.array(bits, dtype=np.uint8) * 215 + 20, WIDTH // 8)
    return np.broadcast_to(row[None, :, None], (HEIGHT, WIDTH, 3)).copy()


def number(image: np.ndarray) -> int:
    """Read the bar code of `picture`."""
    bars = image[HEIGHT // 2, 4::8, 0] > 127
    return sum(int(bar) << k for k, bar in enumerate(bars))


def encode(
    path: Path,
    ticks: list[int],
    clock: Fraction | int,
    codec: str = "libx264",
    options: dict | None = None,
    gop: int = 8,
) -> Path:
    """Write picture 0, 1, 2, ... at the given ticks of ``1 / clock`` seconds."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(clock))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = 1 / Fraction(clock)
        stream.codec_context.thread_count = 1
        for i, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            frame.pts, frame.time_base = tick, 1 / Fraction(clock)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def constant(path: Path, count: int, fps: Fraction | int = 30, **settings) -> Path:
    return encode(path, list(range(count)), fps, **settings)


def numbers(frames) -> list[int]:
    return [number(frame.image) for frame in frames]


def numbers_by_time(frames) -> list[int]:
    """What numbers should be where pictures come 30 per second, whichever are there."""
    return [round(frame.time * 30) for frame in frames]


@pytest.fixture
def movie(tmp_path: Path) -> Path:
    """40 pictures at 30 per second, its index in front."""
    return constant(tmp_path / "movie.mp4", 40, options={"movflags": "faststart"})


# -- plain reading


def test_every_picture_comes_once_with_its_time(movie: Path) -> None:
    with open_video(movie) as reader:
        assert (reader.fps, reader.source_fps) == (Fraction(30), Fraction(30))
        assert (reader.width, reader.height) == (WIDTH, HEIGHT)
        assert reader.num_frames == 40
        assert reader.duration == pytest.approx(4 / 3)
        assert reader.num_whole is None
        frames = list(reader)
        assert reader.num_whole == 40
    assert numbers(frames) == list(range(40))
    assert [frame.index for frame in frames] == list(range(40))
    assert [frame.time for frame in frames] == [float(Fraction(i, 30)) for i in range(40)]
    assert frames[0].image.dtype == np.uint8
    assert frames[0].image.shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "ts", "flv"])
def test_every_container_tells_the_same(tmp_path: Path, suffix: str) -> None:
    codec = "mpeg4" if suffix == "avi" else "libx264"
    with open_video(constant(tmp_path / f"movie.{suffix}", 20, codec=codec)) as reader:
        frames = list(reader)
    assert numbers(frames) == list(range(20))
    times = [frame.time for frame in frames]
    assert times == pytest.approx([i / 30 for i in range(20)], abs=1.01e-3)
    assert times[0] == 0


def test_ntsc_rate_stays_a_fraction(tmp_path: Path) -> None:
    ntsc = Fraction(30000, 1001)
    with open_video(constant(tmp_path / "movie.mp4", 10, ntsc)) as reader:
        assert reader.fps == ntsc
        assert [frame.time for frame in reader] == [float(i / ntsc) for i in range(10)]
    assert video.as_fps(29.97) == video.as_fps("29.97") == video.as_fps("30000/1001") == ntsc
    assert video.as_fps(23.976) == Fraction(24000, 1001)
    assert video.as_fps(12.5) == Fraction(25, 2)


def test_few_frames_are_alive_at_once(tmp_path: Path) -> None:
    alive: list[weakref.ref] = []
    with open_video(constant(tmp_path / "movie.mp4", 120), fps=24) as reader:
        for frame in reader:
            alive.append(weakref.ref(frame.image))
            assert len({id(ref()) for ref in alive if ref() is not None}) <= 2


def test_sound_that_outlasts_the_video(tmp_path: Path) -> None:
    path = tmp_path / "movie.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        sound = container.add_stream("aac", rate=8000)
        for i in range(20):
            image = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            container.mux(stream.encode(image))
        for _ in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.rate = 8000
            container.mux(sound.encode(frame))
        container.mux([*stream.encode(), *sound.encode()])
    with open_video(path) as reader:
        assert reader.duration > 2
        assert numbers(reader) == list(range(20))
    assert [number(image) for image in sample_frames(path, 4)[0]] == [2, 7, 12, 17]


def test_a_colon_in_the_name_is_no_protocol(tmp_path: Path) -> None:
    path = constant(tmp_path / "plain.mp4", 4).rename(tmp_path / "take:1.mp4")
    with open_video(path) as reader:
        assert numbers(reader) == [0, 1, 2, 3]


# -- resampling


def shown(times: list[Fraction], end: Fraction, fps: Fraction, start=Fraction(0)) -> list[int]:
    """The rule itself: the last picture that begins at or before start + k / fps."""
    moments = itertools.takewhile(lambda m: m < end, (start + k / fps for k in itertools.count()))
    return [max(i for i, begins in enumerate(times) if begins <= m) for m in moments]


@pytest.mark.parametrize("target", [1, 7, 8, 24, 25, 30, 60, Fraction(30000, 1001)])
@pytest.mark.parametrize("source", [24, 25, 30, Fraction(30000, 1001)])
def test_resampling_follows_the_clock(tmp_path: Path, source, target) -> None:
    source, target = Fraction(source), Fraction(target)
    with open_video(constant(tmp_path / "movie.mp4", 25, source), fps=target) as reader:
        assert reader.fps == target
        frames = list(reader)
        whole = reader.num_whole
    times = [i / source for i in range(25)]
    assert numbers(frames) == shown(times, 25 / source, target)
    assert [frame.time for frame in frames] == [float(k / target) for k in range(len(frames))]
    assert whole == 25 / source * target // 1


@pytest.mark.parametrize("fps", [24, 30, Fraction(30000, 1001), 60])
def test_a_clock_of_milliseconds_loses_no_picture(tmp_path: Path, fps) -> None:
    path = constant(tmp_path / "movie.mkv", 60, fps)
    with open_video(path, fps=fps) as reader:
        assert numbers(reader) == list(range(60))
        assert reader.num_whole == 60
    with open_video(path, fps=Fraction(fps) / 2) as reader:
        assert numbers(reader) == list(range(0, 60, 2))


@pytest.mark.parametrize("seed", range(3))
def test_resampling_at_a_variable_rate(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    ticks = list(itertools.accumulate([0] + [draw.choice([3, 20, 33, 40, 170]) for _ in range(39)]))
    path = encode(tmp_path / "movie.mp4", ticks, 1000)
    times = [Fraction(tick, 1000) for tick in ticks]
    with open_video(path) as reader:
        assert [frame.time for frame in reader] == [float(t) for t in times]
    with open_video(path, fps=Fraction(125, 8)) as reader:  # every 64 ms
        seen = numbers(reader)
    assert seen[: len(shown(times, times[-1], Fraction(125, 8)))] == shown(
        times, times[-1], Fraction(125, 8)
    )
    assert set(seen) - {39} <= set(range(39))


def test_no_frame_depends_on_later_pictures() -> None:
    draw = random.Random(0)
    times = list(itertools.accumulate(Fraction(draw.randint(1, 90), 1000) for _ in range(60)))
    pictures = [sources.Picture(t - times[0], Fraction(1, 30), lambda: None) for t in times]

    def run(count: int) -> list[tuple[Fraction, int]]:
        moments = video._moments(Fraction(24), Fraction(0), None)
        timed = video._shown_at(iter(pictures[:count]), moments, Fraction(0))
        return [(moment, pictures.index(p)) for moment, p in timed]

    full = run(60)
    for count in range(1, 60):
        known = [pair for pair in run(count) if pair[0] < pictures[count].time]
        assert known == full[: len(known)]
        assert all(pictures[i].time <= moment for moment, i in run(count))


def test_a_picture_that_begins_at_the_moment_is_not_held_back() -> None:
    read = []

    def live():
        for i in range(4):
            read.append(i)
            yield sources.Picture(Fraction(i, 8), Fraction(1, 8), lambda: None)

    timed = video._shown_at(live(), video._moments(Fraction(8), Fraction(0), None), Fraction(0))
    for i in range(4):
        next(timed)
        assert read == list(range(i + 1))


# -- trimming


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize(
    ("start", "end"), [(0, 1), (0.1, None), (2.0, 2.5), (4.51, 5), (5.9, None)]
)
def test_trimming_equals_reading_it_all(tmp_path: Path, suffix: str, start, end) -> None:
    path = constant(tmp_path / f"movie.{suffix}", 180)  # 6 s, so that late starts are sought
    with open_video(path) as reader:
        whole = [f for f in reader if start <= f.time and (end is None or f.time < end)]
    with open_video(path, start=start, end=end) as reader:
        cut = list(reader)
    assert numbers(cut) == numbers(whole)
    assert [frame.time for frame in cut] == [frame.time for frame in whole]
    assert [frame.index for frame in cut] == list(range(len(cut)))


@pytest.mark.parametrize("start", [0, 0.7, 3.35])
def test_trimming_and_resampling(tmp_path: Path, start: float) -> None:
    path = constant(tmp_path / "movie.mp4", 120)
    with open_video(path, fps=8, start=start, end=start + 0.6) as reader:
        frames = list(reader)
    moments = [Fraction(str(start)) + Fraction(k, 8) for k in range(5)]
    assert [frame.time for frame in frames] == [float(moment) for moment in moments]
    assert numbers(frames) == [int(moment * 30) for moment in moments]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"start": -1}, "start=-1"),
        ({"start": 1, "end": 1}, "end=1"),
        ({"start": float("nan")}, "start=nan"),
        ({"fps": 0}, "fps=0"),
        ({"fps": "fast"}, "fps='fast'"),
        ({"fps": True}, "fps=True"),
        ({"truncated": "maybe"}, "truncated='maybe'"),
    ],
)
def test_impossible_wishes_are_refused(movie: Path, settings: dict, text: str) -> None:
    with pytest.raises(VideoError, match=text):
        open_video(movie, **settings)


def test_a_start_past_the_end_is_refused(movie: Path) -> None:
    with open_video(movie, start=7, fps=4) as reader, pytest.raises(VideoError, match="1.333 s"):
        next(reader)


def test_a_closed_reader_ends(movie: Path) -> None:
    reader = open_video(movie)
    next(reader)
    reader.close()
    reader.close()
    assert list(reader) == []


# -- rotation, times that lie


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
        ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
        ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
        ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
        ((0, 1, 1, 0), lambda x: x.transpose(1, 0, 2)),
    ],
    ids=["right", "half", "left", "mirrored", "transposed"],
)
def test_rotation_is_applied(movie: Path, matrix: tuple, turn) -> None:
    with open_video(movie) as reader:
        upright = next(reader).image
    data = movie.read_bytes()
    place = data.index(b"tkhd") + 4 + 4 + 20 + 16  # version 0: times and ids, then layer and volume
    a, b, c, d = (value << 16 for value in matrix)
    entries = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    movie.write_bytes(data[:place] + entries + data[place + 36 :])
    with open_video(movie) as reader:
        image = next(reader).image
        assert image.shape == (reader.height, reader.width, 3)
    np.testing.assert_array_equal(image, turn(upright))


def test_pictures_without_times_follow_the_nominal_rate(tmp_path: Path) -> None:
    with open_video(constant(tmp_path / "movie.h264", 12)) as reader:
        frames = list(reader)
        assert reader.fps == 30
    assert numbers(frames) == list(range(12))
    assert [frame.time for frame in frames] == [float(Fraction(i, 30)) for i in range(12)]


def test_times_that_jump_back_go_on_at_the_nominal_rate(tmp_path: Path) -> None:
    part = constant(tmp_path / "part.ts", 10).read_bytes()
    joined = tmp_path / "joined.ts"
    joined.write_bytes(part + part)
    with open_video(joined, truncated="keep") as reader:
        frames = list(reader)
    assert numbers(frames) == [*range(10), *range(10)]
    assert [f.time for f in frames] == pytest.approx([i / 30 for i in range(20)])


# -- what cannot be read


def test_files_that_are_no_video(tmp_path: Path) -> None:
    for name, content in [("noise.mp4", b"\1\2\3" * 500), ("empty.mp4", b"")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VideoError, match=f"{name} cannot be opened as a video.*convert"):
            open_video(tmp_path / name)
    (tmp_path / "notes.txt").write_text("first line\n" * 40)
    with pytest.raises(VideoError, match=r"notes\.txt is a text file"):
        open_video(tmp_path / "notes.txt")


def test_missing_files_and_odd_sources(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=f"gone/a.mp4: no such file; what exists is {tmp_path}"):
        open_video(tmp_path / "gone" / "a.mp4")
    with pytest.raises(VideoError, match="None is no video"):
        open_video(None)
    with pytest.raises(VideoError, match="scheme 'gopher'"):
        open_video("gopher://host/video")


def test_sound_alone_is_named(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(8000))
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for name in ("sound.wav", "sound.mp4"):
        with pytest.raises(VideoError, match=rf"{name} holds no video, only audio"):
            open_video(tmp_path / name)


def test_zero_frames(tmp_path: Path) -> None:
    whole = constant(tmp_path / "a.mp4", 4, options={"movflags": "frag_keyframe+empty_moov"})
    data = whole.read_bytes()
    header = tmp_path / "header.mp4"
    header.write_bytes(data[: data.index(b"moof") - 4])
    with pytest.raises(VideoError, match=r"header\.mp4 has a video stream without any frame"):
        open_video(header)
    nothing = encode(tmp_path / "nothing.mp4", [], 30)
    with pytest.raises(VideoError, match=r"nothing\.mp4"):
        open_video(nothing)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_file_that_breaks_off(tmp_path: Path, suffix: str, caplog) -> None:
    options = {"movflags": "faststart"} if suffix == "mp4" else {}
    path = constant(tmp_path / f"movie.{suffix}", 90, options=options)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])

    frames = []
    with open_video(path) as reader, pytest.raises(VideoError) as caught:
        frames.extend(reader)
    assert 5 < len(frames) < 80
    assert numbers(frames) == numbers_by_time(frames)
    assert numbers(frames)[:-3] == list(range(len(frames) - 3))  # the last ones may have lost some
    text = str(caught.value)
    assert str(path) in text
    assert f"after {len(frames)} decoded frames" in text
    assert "truncated='keep'" in text

    with open_video(path, truncated="keep") as reader, caplog.at_level(logging.WARNING):
        kept = numbers(reader)
        assert reader.damaged >= 1
    assert kept == numbers(frames)
    assert str(path) in caplog.text


def test_damage_inside_a_file(movie: Path) -> None:
    data = bytearray(movie.read_bytes())
    with av.open(str(movie)) as container:
        packets = [p for p in container.demux() if p.pos is not None and p.size]
    hurt = packets[20]
    data[hurt.pos : hurt.pos + hurt.size] = b"\xff" * hurt.size
    movie.write_bytes(data)
    before = []
    with open_video(movie) as reader, pytest.raises(VideoError, match="damaged or cut off"):
        before.extend(reader)
    assert 10 < len(before) < 25
    assert numbers(before) == numbers_by_time(before)
    with open_video(movie, truncated="keep") as reader:
        kept = list(reader)
        assert reader.damaged >= 1
    assert len(kept) > len(before)
    assert number(kept[-1].image) == 39


# -- folders


def folder(path: Path, count: int) -> Path:
    path.mkdir()
    for i in range(count):
        Image.fromarray(picture(i)).save(path / f"image{i}.png")
    return path


def test_a_folder_is_read_in_natural_order(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", 12)
    (images / ".hidden.png").write_bytes(b"")
    (images / "notes.txt").write_text("x")
    with open_video(images, fps=4) as reader:
        assert (reader.fps, reader.num_frames, reader.duration) == (4, 12, 3.0)
        frames = list(reader)
    assert numbers(frames) == list(range(12))
    assert frames[5].time == 1.25
    with open_video(images, fps=2, image_fps=6, start=0.5) as reader:
        assert numbers(reader) == [3, 6, 9]
    with open_video(images, image_fps=4, start=1, end=2) as reader:
        assert numbers(reader) == [4, 5, 6, 7]


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"a folder without images \(0 other files\)"):
        open_video(tmp_path, fps=4)
    images = folder(tmp_path / "images", 3)
    with pytest.raises(VideoError, match="image_fps="):
        open_video(images)
    Image.fromarray(picture(0)[:40]).save(images / "image1.png")
    with (
        open_video(images, fps=4) as reader,
        pytest.raises(VideoError, match=r"image1\.png is 64x40"),
    ):
        list(reader)
    (images / "image1.png").write_bytes(b"no image")
    with (
        open_video(images, fps=4) as reader,
        pytest.raises(VideoError, match=r"image1\.png is not"),
    ):
        list(reader)


# -- devices and URLs


@pytest.mark.parametrize("camera", [97, "camera:97", "camera:/dev/video97"])
def test_an_absent_camera_is_named(camera) -> None:
    with pytest.raises(VideoError, match="camera .*97"):
        open_video(camera)


def test_http(movie: Path) -> None:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

    handler = functools.partial(Handler, directory=str(movie.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        with open_video(f"{base}/movie.mp4", fps=15) as reader:
            assert numbers(reader) == list(range(0, 40, 2))
        with pytest.raises(VideoError, match=r"absent\.mp4"):
            open_video(f"{base}/absent.mp4")
        server.shutdown()


@pytest.mark.parametrize("scheme", ["http", "rtsp"])
def test_a_silent_server_is_given_up(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"{scheme}://127.0.0.1:{server.getsockname()[1]}/movie.mp4"
        began = time.monotonic()
        with pytest.raises(VideoError, match="did not answer within 0.3 s.*timeout="):
            open_video(url, timeout=0.3)
        assert time.monotonic() - began < 5


@contextlib.contextmanager
def broadcast(data: bytes, then_silence: bool = False):
    """Address of a live stream that sends ``data`` to whoever connects."""
    over = threading.Event()

    def send() -> None:
        with server.accept()[0] as line:
            line.sendall(data)
            if then_silence:
                over.wait(10)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=send, daemon=True).start()
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        over.set()


def test_a_live_stream_may_lose_packets(tmp_path: Path) -> None:
    data = bytearray(constant(tmp_path / "movie.ts", 60).read_bytes())
    for packet in range(20, 40):  # of 188 bytes, padding first, the picture at the end
        data[188 * packet + 158 : 188 * (packet + 1)] = b"\xff" * 30
    with broadcast(data) as url, open_video(url) as reader:
        frames = list(reader)
        assert reader.damaged
    assert 50 < len(frames) <= 60
    assert number(frames[-1].image) == 59


def test_a_live_stream_that_falls_silent(tmp_path: Path) -> None:
    data = constant(tmp_path / "movie.ts", 60).read_bytes()
    frames = []
    with (
        broadcast(data, then_silence=True) as url,
        open_video(url, timeout=0.5) as reader,
        pytest.raises(VideoError, match=f"{url} stopped sending after .* no answer"),
    ):
        frames.extend(reader)
    assert len(frames) > 30


def test_a_live_stream_cannot_be_sampled(tmp_path: Path) -> None:
    data = constant(tmp_path / "movie.ts", 60).read_bytes()
    with broadcast(data) as url, pytest.raises(VideoError, match="is live and has no end"):
        sample_frames(url, 4)


# -- sampling


def test_sample_frames_by_count_and_by_time(movie: Path) -> None:
    images, times = sample_frames(movie, 4)  # parts of ten pictures each
    assert [number(image) for image in images] == [5, 15, 25, 35]
    assert images.shape == (4, HEIGHT, WIDTH, 3)
    assert times.tolist() == pytest.approx([5 / 30, 15 / 30, 25 / 30, 35 / 30])
    images, times = sample_frames(movie, times=[1.0, 0.02, 1.0, 0.04])
    assert [number(image) for image in images] == [30, 0, 30, 1]
    assert times.tolist() == pytest.approx([1, 0, 1, 1 / 30])
    images, _ = sample_frames(movie, 2, start=0.5, end=0.7)
    assert [number(image) for image in images] == [16, 19]
    assert len(sample_frames(movie, 100)[0]) == 100  # more than there are: repeats


@pytest.mark.parametrize("suffix", ["mkv", "ts"])
def test_sample_frames_where_the_container_states_no_length(tmp_path: Path, suffix: str) -> None:
    images, _ = sample_frames(constant(tmp_path / f"movie.{suffix}", 40), 8)
    assert [number(image) for image in images] == list(range(2, 40, 5))


def test_sample_frames_refuses(movie: Path, tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"nothing at 2\.000 s: it ends at 1\.333 s"):
        sample_frames(movie, times=[0.1, 2.0])
    with pytest.raises(VideoError, match="either num_frames"):
        sample_frames(movie)
    with pytest.raises(VideoError, match="num_frames=0"):
        sample_frames(movie, 0)
    with pytest.raises(VideoError, match="nothing to sample"):
        sample_frames(movie, times=[])
    with pytest.raises(VideoError, match="carries no times"):
        sample_frames(constant(tmp_path / "raw.h264", 8), 4)


# -- reading ahead


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetched_keeps_the_order(movie: Path) -> None:
    assert list(prefetched(range(100), size=3)) == list(range(100))
    assert list(prefetched([])) == []
    with open_video(movie) as reader:
        assert numbers(prefetched(reader, size=2)) == list(range(40))
    assert not prefetch_threads()


def test_prefetched_reads_ahead_within_its_bound() -> None:
    taken = []

    def source():
        for i in range(20):
            taken.append(i)
            yield i

    ahead = prefetched(source(), size=4)
    assert next(ahead) == 0
    deadline = time.monotonic() + 5
    while len(taken) < 6 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    assert len(taken) == 6  # one given, four waiting, one in hand
    assert list(ahead) == list(range(1, 20))


def test_prefetched_hands_on_an_exception() -> None:
    def source():
        yield 1
        yield 2
        raise KeyError("the reader failed")

    seen = []
    with pytest.raises(KeyError, match="the reader failed"):
        for item in prefetched(source()):
            seen.append(item)
    assert seen == [1, 2]
    assert not prefetch_threads()


@pytest.mark.parametrize("how", ["break", "close", "error"])
def test_prefetched_ends_with_its_consumer(how: str) -> None:
    ahead = prefetched(itertools.count(), size=2)
    if how == "error":
        with pytest.raises(ZeroDivisionError):
            for item in ahead:
                1 / (3 - item)
        ahead.close()
    elif how == "break":
        for item in ahead:
            if item == 3:
                break
        del ahead
    else:
        next(ahead)
        ahead.close()
    gc.collect()
    assert not prefetch_threads()


def test_prefetched_does_not_wait_for_a_stuck_source(monkeypatch, caplog) -> None:
    monkeypatch.setattr(video, "PATIENCE", 0.05)
    release = threading.Event()

    def source():
        yield 1
        release.wait()

    ahead = prefetched(source())
    assert next(ahead) == 1
    ahead.close()
    assert "did not stop" in caplog.text
    release.set()
    for thread in prefetch_threads():
        thread.join(5)
    assert not prefetch_threads()


def test_prefetched_refuses_no_room() -> None:
    with pytest.raises(VideoError, match="size=0"):
        prefetched([1], size=0)


# -- preparing

MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


@pytest.mark.parametrize("resize", ["crop", "stretch"])
def test_frames_of_the_right_size_are_not_resampled(resize: str) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    out = preprocess(frames, 32, MEAN, STD, resize)
    assert out.shape == (3, 3, 32, 32)
    assert out.is_contiguous()
    torch.testing.assert_close(
        out, normalised(torch.from_numpy(frames).permute(0, 3, 1, 2)), rtol=0, atol=0
    )


@pytest.mark.parametrize("height, width", [(48, 64), (64, 48), (33, 100), (20, 17)])
@pytest.mark.parametrize("resize", ["crop", "stretch"])
def test_resizing_is_bilinear_with_antialias(height: int, width: int, resize: str) -> None:
    frames = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8)
    pixels = frames.permute(0, 3, 1, 2).float()
    size = [32, 32] if resize == "stretch" else [32]
    expected = tv.resize(pixels, size, interpolation=tv.InterpolationMode.BILINEAR, antialias=True)
    top, left = ((side - 32) // 2 for side in expected.shape[-2:])
    expected = normalised(expected[..., top : top + 32, left : left + 32])
    out = preprocess(frames.numpy(), 32, MEAN, STD, resize)
    # One grey level: pixels are rounded, and the fast path works with 16-bit weights.
    torch.testing.assert_close(out, expected, rtol=0, atol=1.0 / 255 / min(STD))


def test_preprocess_refuses() -> None:
    with pytest.raises(VideoError, match=r"\(2, 3, 8, 8\)"):
        preprocess(np.zeros((2, 3, 8, 8), np.uint8), 8, MEAN, STD)
    with pytest.raises(VideoError, match="float32"):
        preprocess(np.zeros((2, 8, 8, 3), np.float32), 8, MEAN, STD)
    with pytest.raises(VideoError, match="resize='pad'"):
        preprocess(np.zeros((2, 8, 8, 3), np.uint8), 8, MEAN, STD, "pad")


# -- writing


def test_writing_and_reading_back(tmp_path: Path) -> None:
    ntsc = Fraction(30000, 1001)
    with VideoWriter(tmp_path / "out.mp4", 29.97, (WIDTH, HEIGHT)) as writer:
        for i in range(20):
            writer.write(picture(i))
        assert not (tmp_path / "out.mp4").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    with av.open(str(tmp_path / "out.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
    with open_video(tmp_path / "out.mp4") as reader:
        assert reader.fps == ntsc
        frames = list(reader)
    assert numbers(frames) == list(range(20))
    assert [frame.time for frame in frames] == [float(i / ntsc) for i in range(20)]


def test_odd_sides_gain_a_pixel(tmp_path: Path) -> None:
    image = picture(77)[:41, :63]
    with VideoWriter(tmp_path / "odd.mp4", 8) as writer:
        writer.write(image)
    with open_video(tmp_path / "odd.mp4") as reader:
        assert (reader.width, reader.height) == (64, 42)
        out = next(reader).image.astype(int)
    assert abs(out[:41, :63] - image).max() < 16
    assert abs(out[:, 63] - out[:, 62]).max() < 16
    assert abs(out[41] - out[40]).max() < 16


def test_a_failed_block_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), VideoWriter(path, 8) as writer:
        writer.write(picture(1))
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]
    assert path.read_bytes() == b"old"


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="no frame was written"):
        VideoWriter(tmp_path / "a.mp4", 8).close()
    with pytest.raises(VideoError, match=r"suffix '\.gif'"):
        VideoWriter(tmp_path / "a.gif", 8)
    with pytest.raises(VideoError, match="there is no folder"):
        VideoWriter(tmp_path / "gone" / "a.mp4", 8)
    with VideoWriter(tmp_path / "a.mp4", 8, (64, 48)) as writer:
        writer.write(picture(0))
        with pytest.raises(VideoError, match="frame 1 is 32x48 pixels, the video is 64x48"):
            writer.write(picture(0)[:, :32])
        with pytest.raises(VideoError, match="frame 1: .*float64"):
            writer.write(picture(0) / 255)
    with pytest.raises(VideoError, match="closed already"):
        writer.write(picture(0))
