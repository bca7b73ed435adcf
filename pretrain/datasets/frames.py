"""Which frames of a video make a clip: the sampling rules of the tasks, by name.

Every rule is ``rule(length, num_frames, rng, stride)`` -> frame numbers, ascending int64, with
``length`` the video's frames and ``rng`` None for the fixed choice of validation. They follow the
training recipes that StreamFormer's data sets come with:

    segments         num_frames equal segments, one random frame of each     Kinetics
    spread           as segments; validation evenly from first to last       localization
    blocks           whole-number blocks, one random frame of each           Something-Something
    padded_blocks    as blocks; short videos begin with copies of frame 0    instances, referring
    intervals        whole-number intervals, sorted draw when short          retrieval
    consecutive      neighbouring frames from a random start                 motion frame to frame
    fixfps           about a frame per second, around a moment               grounding
    fixfps_released  the same as the released code draws it                  grounding

`consecutive` gives fewer frames than asked for where a video is shorter; the batch is padded and
masked then. The others repeat frames, as their recipes do. The two rules around a moment also take
``fps`` and ``focus``, the moment's start and end in seconds; `choose` hands these to whoever wants
them.

`VIEWS` are the fixed looks at a video over whose scores a test averages, for the rules that come
with such a protocol: ``views(length, num_frames, count)`` -> (count, num_frames).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Rule = Callable[..., np.ndarray]


class View(NamedTuple):
    """One of ``times`` x ``places`` fixed looks at a video: which frames, and which square."""

    time: int
    times: int
    place: int
    places: int


def segments(length: int, num_frames: int, rng: np.random.Generator | None, stride: int = 1):
    """One frame out of each of ``num_frames`` equal segments, both ends included."""
    size = (length - 1) / num_frames
    edges = np.round(size * np.arange(num_frames + 1)).astype(np.int64)
    if rng is None:
        return np.minimum(edges[:-1] + int(size / 2), length - 1)
    return np.minimum(rng.integers(edges[:-1], edges[1:], endpoint=True), length - 1)


def spread(length: int, num_frames: int, rng: np.random.Generator | None, stride: int = 1):
    """As `segments`; validation takes evenly spaced frames from the first to the last."""
    if rng is None:
        return np.linspace(0, length - 1, num_frames).astype(np.int64)
    return segments(length, num_frames, rng)


def blocks(length: int, num_frames: int, rng: np.random.Generator | None, stride: int = 1):
    """One frame out of each block of ``length // num_frames``; a shorter video gives frame 0."""
    if rng is None:
        tick = length / num_frames
        return (tick / 2 + tick * np.arange(num_frames)).astype(np.int64)
    size = length // num_frames
    if size == 0:
        return np.zeros(num_frames, np.int64)
    return np.arange(num_frames) * size + rng.integers(0, np.full(num_frames, size))


def padded_blocks(length: int, num_frames: int, rng: np.random.Generator | None, stride: int = 1):
    """As `blocks`, validation in their middle; short videos are whole, after copies of frame 0."""
    size = length // num_frames
    if size == 0:
        return np.pad(np.arange(length), (num_frames - length, 0))
    if rng is None:
        return np.arange(num_frames) * size + size // 2
    return blocks(length, num_frames, rng)


def intervals(length: int, num_frames: int, rng: np.random.Generator | None, stride: int = 1):
    """One frame out of each interval, its last one never; short videos repeat their last frame."""
    count = min(num_frames, length)
    edges = np.linspace(0, length, count + 1).astype(np.int64)
    if rng is None:
        chosen = (edges[:-1] + edges[1:] - 1) // 2
    elif np.diff(edges).min() == 1:  # an interval of one frame has no frame but its last
        chosen = np.sort(rng.permutation(length)[:count])
    else:
        chosen = rng.integers(edges[:-1], edges[1:] - 2, endpoint=True)
    return np.pad(chosen, (0, num_frames - count), mode="edge")


def consecutive(length: int, num_frames: int, rng: np.random.Generator | None, stride: int = 1):
    """Every ``stride``-th frame from a random start (validation: the middle), as many as exist."""
    count = min(num_frames, (length - 1) // stride + 1)
    room = length - 1 - (count - 1) * stride
    start = room // 2 if rng is None else int(rng.integers(0, room, endpoint=True))
    return start + stride * np.arange(count)


def fixfps(
    length: int,
    num_frames: int,
    rng: np.random.Generator | None,
    stride: int = 1,
    fps: float = 1.0,
    focus: tuple[float, float] | None = None,
):
    """One frame a second on average, somewhere around ``focus`` (start, end) in seconds.

    The frames spread over a window of ``num_frames`` seconds, or of twice the moment's length if
    that is longer, so that there are frames outside of the moment; never beyond the video. Where
    in the window the moment lies is drawn, as a fixed place would tell the answer. Without a focus,
    and in validation, the window is the whole video.
    """
    if rng is None or focus is None:
        return spread(length, num_frames, rng)
    last = (length - 1) / fps  # seconds
    start, end = (min(max(second, 0.0), last) for second in focus)
    width = min(max(num_frames, 2 * (end - start)), last)
    low, high = max(end - width, 0.0), min(start, last - width)  # where the window may begin
    begin = (low + (high - low) * rng.random()) * fps
    edges = begin + width * fps / num_frames * np.arange(num_frames + 1)
    edges = np.clip(np.round(edges), 0, length - 1).astype(np.int64)
    return rng.integers(edges[:-1], edges[1:], endpoint=True)


def fixfps_released(
    length: int,
    num_frames: int,
    rng: np.random.Generator | None,
    stride: int = 1,
    fps: float = 1.0,
    focus: tuple[float, float] | None = None,
):
    """`fixfps` as released: the window is ``num_frames`` seconds centred on the moment.

    Shifted to the video's borders; or the moment alone, without any frame outside of it, if that
    is longer. Where the whole video is shorter than ``num_frames`` seconds the window may begin
    before it: negative numbers, for which a `ClipReader` takes the first frame.
    """
    if rng is None or focus is None:
        return spread(length, num_frames, rng)
    start, end = focus
    if end - start <= num_frames:
        middle, duration = (start + end) / 2, length / fps
        start, end = middle - num_frames / 2, middle + num_frames / 2
        if start < 0:
            start, end = 0.0, float(num_frames)
        elif end > duration:
            start, end = duration - num_frames, duration
    first, last = int(start * fps), int(end * fps)
    last = max(last, first + num_frames)
    edges = (first + (last - first) / num_frames * np.arange(num_frames + 1)).astype(np.int64)
    return np.minimum(rng.integers(edges[:-1], edges[1:], endpoint=True), length - 1)


FOCUSED: dict[str, Rule] = {rule.__name__: rule for rule in (fixfps, fixfps_released)}
RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (segments, spread, blocks, padded_blocks, intervals, consecutive)
} | FOCUSED


def choose(
    sampling: str,
    length: int,
    num_frames: int,
    rng: np.random.Generator | None,
    *,
    stride: int = 1,
    fps: float = 1.0,
    focus: tuple[float, float] | None = None,
) -> np.ndarray:
    """Frame numbers by the rule of that name, (num_frames,) int64, all within the video.

    fps: frames per second of the video. focus: the moment, in seconds, that matters, if any.
    """
    extra = (fps, focus) if sampling in FOCUSED else ()
    return np.maximum(RULES[sampling](length, num_frames, rng, stride, *extra), 0)


def segment_views(length: int, num_frames: int, count: int) -> np.ndarray:
    """The views of Kinetics: in each of `segments`, ``count`` evenly spaced places."""
    size = (length - 1) / num_frames
    starts = np.round(size * np.arange(num_frames)).astype(np.int64)
    return np.stack([starts + int(size / (count + 1) * (view + 1)) for view in range(count)])


def block_views(length: int, num_frames: int, count: int) -> np.ndarray:
    """The views of Something-Something: ``count`` frames per block, dealt out in turn."""
    tick = length / num_frames
    places = [tick * np.arange(num_frames) + tick * view / count for view in range(count)]
    dealt = np.sort(np.concatenate(places).astype(np.int64))
    return dealt.reshape(num_frames, count).T


VIEWS: dict[str, Callable[[int, int, int], np.ndarray]] = {
    "segments": segment_views,
    "blocks": block_views,
}
