"""Scripts: what happens in a video, decided before a pixel is drawn.

The actions come first, dealt from shuffled decks so that every class is as frequent as any other;
then the times; then shapes are placed so that the actions have room. A draw that does not fit is
thrown away whole, which keeps the odds of places and sizes symmetric (see `actions.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np

from .actions import ACTIONS, LARGEST, RADIUS, SMALLEST, Action, hold, inside
from .params import WorldParams
from .scene import COLOURS, ROUND_SHAPES, SHAPES, TEXTURES, Item

SHAPE_COUNTS = (1, 2, 2, 3, 3, 3)  # a draw of this gives the number of shapes of a scene
CROWDING = 0.8  # resting shapes keep this share of the sum of their radii apart
ATTEMPTS = 2000  # scenes tried before a plan is given up
DRAWS = 8  # draws of an action in a scene of many; where there are few, one keeps odds symmetric


@dataclass(frozen=True)
class Segment:
    """One action: frames ``start`` to ``end`` (exclusive) of the video, done by ``actors``."""

    action: str
    actors: tuple[int, ...]  # indices into the items of the scene
    start: int
    end: int


@dataclass(frozen=True)
class Scene:
    """A stretch of video without a cut. ``tracks`` is ``(K, end - start, 5)``, see `actions`."""

    start: int
    end: int
    background: str
    items: tuple[Item, ...]
    tracks: np.ndarray
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Script:
    """All scenes of a video, in order and without gaps."""

    scenes: tuple[Scene, ...]

    @property
    def frames(self) -> int:
        """Length of the video."""
        return self.scenes[-1].end

    @property
    def segments(self) -> list[Segment]:
        """The actions of all scenes, by start."""
        return [segment for scene in self.scenes for segment in scene.segments]


@dataclass(frozen=True)
class Slot:
    """A time reserved for an action: ``start`` to ``end`` (exclusive)."""

    start: int
    end: int


def deal(rng: Random, names: Sequence[str], counts: Sequence[int]) -> list[list[str]]:
    """Hands of ``counts`` names from shuffled decks: totals per name differ by one at most."""
    cards: list[str] = []
    while len(cards) < sum(counts):
        cards += rng.sample(list(names), len(names))
    hands, first = [], 0
    for count in counts:
        hands.append(cards[first : first + count])
        first += count
    return hands


def actions_for(frames: int, params: WorldParams) -> int:
    """How many actions of middle length fill the action share of a video."""
    busy = 1 - sum(params.background) / 2
    return max(1, round(frames * busy / (sum(params.action_frames) / 2)))


def write_script(
    rng: Random,
    frames: int,
    actions: Sequence[str],
    params: WorldParams,
    overlap: float = 0.0,
    shapes: Sequence[int] = SHAPE_COUNTS,
) -> Script:
    """A video of several actions with rests between them, cut into scenes if it is long.

    A draw of ``shapes`` gives the number of shapes of a scene, if its actions need no more.
    """
    slots = timetable(rng, frames, len(actions), params, overlap)
    return _stage(rng, frames, slots, list(actions), params, shapes)


def write_ending(rng: Random, frames: int, action: str, params: WorldParams) -> Script:
    """A clip whose only action ends with its last frame: the layout of recognition."""
    low, high = params.action_frames
    length = rng.randint(low, min(high, frames - 1))
    return _stage(rng, frames, [Slot(frames - length, frames)], [action], params)


def write_single(rng: Random, frames: int, action: str, params: WorldParams) -> Script:
    """A clip of one action that ends before the clip does."""
    low, high = params.action_frames
    length = rng.randint(low, min(high, frames - 3))
    start = rng.randint(1, frames - length - 1)
    return _stage(rng, frames, [Slot(start, start + length)], [action], params)


def timetable(
    rng: Random, frames: int, count: int, params: WorldParams, overlap: float = 0.0
) -> list[Slot]:
    """Times of ``count`` actions: random lengths, random rests (some of none), the drawn share
    of the video at rest. Raises ValueError if so many do not fit.
    """
    low, high = params.action_frames
    if count * low >= frames:
        raise ValueError(f"{count} actions of at least {low} frames do not fit {frames} frames")
    busy = round(frames * (1 - rng.uniform(*params.background)))
    busy = min(max(busy, count * low), count * high, frames - 1)
    lengths = [rng.randint(low, high) for _ in range(count)]
    while sum(lengths) != busy:
        step = 1 if sum(lengths) < busy else -1
        index = rng.randrange(count)
        if low <= lengths[index] + step <= high:
            lengths[index] += step
    weights = [rng.expovariate(1) * (rng.random() < 0.8) for _ in range(count)] + [1.0]
    edges = np.floor(np.cumsum(weights) / sum(weights) * (frames - busy - 1)).astype(int)
    slots: list[Slot] = []
    for index in range(count):
        start = 1 + int(edges[index]) + sum(lengths[:index])
        if slots and rng.random() < overlap:
            start = max(slots[-1].start + 2, min(start, slots[-1].end - rng.randint(2, 5)))
        slots.append(Slot(start, start + lengths[index]))
    return slots


def _stage(
    rng: Random,
    frames: int,
    slots: list[Slot],
    actions: list[str],
    params: WorldParams,
    shapes: Sequence[int] = SHAPE_COUNTS,
) -> Script:
    """Split the slots into scenes and fill each of them with shapes."""
    scenes, first = [], 0
    cuts = _cuts(rng, frames, slots, params)
    for start, end in zip([0, *cuts], [*cuts, frames], strict=True):
        here = [slot for slot in slots if start <= slot.start < end]
        names = actions[first : first + len(here)]
        first += len(here)
        scenes.append(_fill(rng, start, end, here, names, params, shapes))
    return Script(tuple(scenes))


def _cuts(rng: Random, frames: int, slots: list[Slot], params: WorldParams) -> list[int]:
    """Frames at which the scene changes: in rests only, every ``scene_frames`` or so.

    A stream is a stretch of an endless one: it enters its first scene at any moment of it, so that
    short streams have cuts as often as long ones and differ from them in length alone. Clips have
    none.
    """
    shortest, longest = params.scene_frames
    if frames < shortest:
        return []
    lengths = range(shortest, longest + 1)
    # A moment taken at random falls into long scenes more often than into short ones.
    wanted = rng.randint(0, rng.choices(lengths, weights=lengths)[0])
    cuts, last = [], 0
    for before, after in zip(slots, slots[1:], strict=False):
        busy_until = max(slot.end for slot in slots if slot.start <= before.start)
        middle = (busy_until + after.start) // 2
        if after.start - busy_until >= 2 and middle - last >= wanted:
            cuts.append(middle)
            last, wanted = middle, rng.choice(lengths)
    return cuts


def _fill(
    rng: Random,
    start: int,
    end: int,
    slots: list[Slot],
    actions: list[str],
    params: WorldParams,
    shapes: Sequence[int],
) -> Scene:
    for _ in range(ATTEMPTS):
        scene = _try_fill(rng, start, end, slots, actions, params, shapes)
        if scene is not None:
            return scene
    raise RuntimeError(
        f"no scene of {params.frame_size} pixels has room for {actions} in frames "
        f"{start}..{end} after {ATTEMPTS} attempts; lower `overlap`={params.overlap} or shorten "
        f"`scene_frames`={params.scene_frames}"
    )


def _try_fill(
    rng: Random,
    start: int,
    end: int,
    slots: list[Slot],
    actions: list[str],
    params: WorldParams,
    shapes: Sequence[int],
) -> Scene | None:
    size = params.frame_size
    count = max(rng.choice(shapes), *(ACTIONS[name].company for name in actions), 1)
    items = cast(rng, count, params.camouflaged)
    poses = place(rng, count, size)
    if poses is None:
        return None
    tracks = np.stack([hold(pose, end - start) for pose in poses])  # (K, T, 5)
    busy_until = [0] * count
    left, segments = list(actions), []
    for slot in slots:
        first, last = slot.start - start, slot.end - start
        free = [k for k in range(count) if busy_until[k] <= slot.start]
        for name in left * (1 if len(actions) <= 2 else DRAWS):
            actors = _actors(rng, ACTIONS[name], items, free)
            moved = actors and _perform(rng, ACTIONS[name], tracks, actors, first, last, size)
            if moved:
                break
        else:
            return None
        for actor, track in zip(actors, moved, strict=True):
            tracks[actor, first:last] = track
            tracks[actor, last:] = track[-1]
            busy_until[actor] = slot.end
        left.remove(name)
        segments.append(Segment(name, actors, slot.start, slot.end))
    hidden = any(item.camouflaged for item in items)
    background = "grain" if hidden else rng.choice(list(TEXTURES))
    return Scene(start, end, background, tuple(items), tracks, tuple(segments))


def _actors(
    rng: Random, action: Action, items: Sequence[Item], free: Sequence[int]
) -> tuple[int, ...]:
    """Who does it: free shapes, for turns only such as can be seen turning; () if too few."""
    able = [k for k in free if not (action.turning and items[k].shape in ROUND_SHAPES)]
    return tuple(rng.sample(able, action.actors)) if len(able) >= action.actors else ()


def _perform(
    rng: Random,
    action: Action,
    tracks: np.ndarray,
    actors: tuple[int, ...],
    first: int,
    last: int,
    size: int,
) -> list[np.ndarray] | None:
    """The actors' tracks, or None where one leaves the frame or comes to rest on another shape."""
    poses = [tracks[actor, first - 1] for actor in actors]
    moved = action.plan(rng, poses, last - first, size)
    if moved is None or not all(inside(track, size) for track in moved):
        return None
    ends = tracks[:, last - 1].copy()
    for actor, track in zip(actors, moved, strict=True):
        ends[actor] = track[-1]
    return moved if _apart(ends) else None


def cast(rng: Random, count: int, camouflaged: float) -> list[Item]:
    """Different shapes or colours for a scene; one may be camouflaged.

    ``camouflaged`` is the share of all shapes, so a scene of ``count`` hides one with ``count``
    times that probability.
    """
    looks = rng.sample([(shape, colour) for shape in SHAPES for colour in COLOURS], count)
    items = [Item(shape, colour) for shape, colour in looks]
    if rng.random() < camouflaged * count:
        index = rng.randrange(count)
        items[index] = replace(items[index], camouflaged=True)
    return items


def place(rng: Random, count: int, size: int) -> list[np.ndarray] | None:
    """Poses ``(5,)`` anywhere in the frame, of any size and angle, apart from each other."""
    poses: list[np.ndarray] = []
    for _ in range(count):
        radius = size * math.exp(rng.uniform(math.log(SMALLEST), math.log(LARGEST)))
        x, y = (rng.uniform(radius, size - radius) for _ in range(2))
        poses.append(np.array([x, y, radius, rng.uniform(-math.pi, math.pi), 1.0]))
    return poses if _apart(np.stack(poses)) else None


def _apart(poses: np.ndarray) -> bool:
    gaps = np.hypot(*(poses[:, None, :2] - poses[None, :, :2]).transpose(2, 0, 1))
    reach = CROWDING * (poses[:, None, RADIUS] + poses[None, :, RADIUS])
    return bool((gaps + np.eye(len(poses)) * 1e6 >= reach).all())
