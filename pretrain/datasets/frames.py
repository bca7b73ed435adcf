"""Which frames of a video make a clip: the sampling rules of the tasks, by name.

Every rule is ``rule(length, num_frames, rng, stride)`` -> frame numbers, ascending int64, with
``length`` the video's frames and ``rng`` None for the fixed choice of validation. They follow the
training recipes that StreamFormer's data sets come with:

    segments     num_frames equal segments, one random frame of each       Kinetics
    spread       as segments; validation evenly from first to last frame   localization
    blocks       whole-number blocks, one random frame of each             Something-Something
    intervals    whole-number intervals, sorted draw when they get short   retrieval
    consecutive  neighbouring frames from a random start                   motion frame to frame

`consecutive` gives fewer frames than asked for where a video is shorter; the batch is padded and
masked then. The others repeat frames, as their recipes do.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Rule = Callable[[int, int, "np.random.Generator | None", int], np.ndarray]


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


RULES: dict[str, Rule] = {
    rule.__name__: rule for rule in (segments, spread, blocks, intervals, consecutive)
}
