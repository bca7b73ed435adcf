"""Words about a script: captions for training and questions with four answers to choose from."""

from __future__ import annotations

from random import Random

import numpy as np

from .actions import ACTIONS, RADIUS, X, Y
from .scene import COLOURS, TEXTURES, Item
from .script import Scene, Script, Segment

# Radii (pixels of 32) below and above which a shape is called small or large.
SMALL, LARGE = 5.2, 6.6
WAYS = ("left", "right", "up", "down")
PLACES = tuple(f"{row} {column}" for row in ("top", "bottom") for column in ("left", "right"))


def describe(item: Item, radius: float | None = None, size: int = 32) -> str:
    """A noun phrase without article, "large red circle"; size only where it is clear."""
    if item.camouflaged:
        return f"hidden {item.shape}"
    pixels = None if radius is None else radius * 32 / size
    word = ""
    if pixels is not None and not SMALL <= pixels <= LARGE:
        word = "small " if pixels < SMALL else "large "
    return f"{word}{item.colour} {item.shape}"


def listing(names: list[str]) -> str:
    """"a red circle, a blue bar and a white ring"."""
    names = [f"a {name}" for name in names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def sentence(scene: Scene, segment: Segment, size: int | None = None, article: str = "a") -> str:
    """"a large red circle moves left"; with ``size`` (of the frame) shapes are called by size."""
    action = ACTIONS[segment.action]
    sized = size is not None and segment.action not in ("grow", "shrink", "pulse")
    names = []
    for actor in segment.actors:
        radius = scene.tracks[actor, segment.start - scene.start - 1, RADIUS] if sized else None
        names.append(f"{article} {describe(scene.items[actor], radius, size or 32)}")
    return f"{' and '.join(names)} {action.phrase}"


def captions(script: Script, size: int) -> list[str]:
    """What a viewer may say of a clip (its first scene), from the plainest to the fullest."""
    scene = script.scenes[0]
    segments = scene.segments
    radii = scene.tracks[:, 0, RADIUS]
    seen = listing([describe(i, r, size) for i, r in zip(scene.items, radii, strict=True)])
    told = [sentence(scene, segment) for segment in segments]
    sized = [sentence(scene, segment, size) for segment in segments]
    definite = [sentence(scene, segment, article="the") for segment in segments]
    out = [
        ", then ".join(told),
        ", then ".join(sized),
        f"{seen}; {', then '.join(definite)}",
        f"{', then '.join(sized)} on a {TEXTURES[scene.background]} background",
    ]
    return list(dict.fromkeys(out))


def whereabouts(pose: np.ndarray, size: int) -> str:
    """Where a shape is, "at the top left", as far as it is clear."""
    right, down = (pose[[X, Y]] - size / 2) / size
    row = "" if abs(down) < 0.1 else "top" if down < 0 else "bottom"
    column = "" if abs(right) < 0.1 else "left" if right < 0 else "right"
    words = f"{row} {column}".strip()
    return f"at the {words}" if words else "in the middle"


def still_caption(rng: Random, scene: Scene, size: int) -> str:
    """A caption of a still: what is there and, half of the time, where; nothing about time."""
    radii = scene.tracks[:, 0, RADIUS]
    names = [describe(i, r, size) for i, r in zip(scene.items, radii, strict=True)]
    if rng.random() < 0.5:
        names = [
            f"{name} {whereabouts(pose, size)}"
            for name, pose in zip(names, scene.tracks[:, 0], strict=True)
        ]
    seen = listing(names)
    opening = rng.choice(("", "", "", "a photo of ", "a picture of ", "an image of "))
    ground = f" on a {TEXTURES[scene.background]} background" if rng.random() < 0.2 else ""
    return f"{opening}{seen}{ground}"


def questions(rng: Random, script: Script, fps: int, size: int) -> list[dict]:
    """Questions of each kind that the script answers, four options each.

    ``time`` (seconds) is when the question is asked: nothing after it is needed to answer.
    """
    scene = script.scenes[0]
    ask = _Asker(rng, fps)
    for segment in scene.segments[:2]:
        _about(ask, scene, segment)
    end = scene.end - 1
    segments = sorted(scene.segments, key=lambda segment: segment.end)
    ask.add("first", "What happens first?", scene.segments[0].action, tuple(ACTIONS), end)
    if len(segments) > 1:
        last, earlier = segments[-1], segments[-2]
        middle = (last.start + last.end) // 2
        ask.add("last", "What happens last?", last.action, tuple(ACTIONS), end)
        if earlier.end <= last.start:
            ask.add("now", "What is happening right now?", last.action, tuple(ACTIONS), middle)
            ask.add("before", "What happened just before?", earlier.action, tuple(ACTIONS), middle)
            if earlier.action != last.action:
                _order(ask, earlier.action, last.action, end)
    ask.add("count", "How many actions are there?", *_number(len(segments)), end)
    visible = [item for item in scene.items if not item.camouflaged]
    ask.add("count", "How many shapes are easy to see?", *_number(len(visible)), 0)
    for index, item in enumerate(scene.items):
        x, y = scene.tracks[index, -1, [X, Y]]
        clear = min(abs(x - size / 2), abs(y - size / 2)) > size / 10
        if clear and not item.camouflaged:
            place = f"{'top' if y < size / 2 else 'bottom'} {'left' if x < size / 2 else 'right'}"
            ask.add("place", f"Where is the {describe(item)} at the end?", place, PLACES, end)
            break
    return ask.asked


class _Asker:
    """Collects questions; draws the wrong options and shuffles all four."""

    def __init__(self, rng: Random, fps: int):
        self.rng, self.fps, self.asked = rng, fps, []

    def add(self, kind: str, text: str, answer: str, choices: tuple[str, ...], frame: int) -> None:
        wrong = self.rng.sample([choice for choice in choices if choice != answer], 3)
        options = self.rng.sample([answer, *wrong], 4)
        self.asked.append(
            {"kind": kind, "question": text, "options": options, "answer": answer,
             "time": frame / self.fps}
        )


def _about(ask: _Asker, scene: Scene, segment: Segment) -> None:
    """Direction and colour of one action."""
    item, last = scene.items[segment.actors[0]], segment.end - 1
    name = describe(item)
    if segment.action.startswith("move "):
        way = segment.action.removeprefix("move ")
        ask.add("direction", f"Which way does the {name} move?", way, WAYS, last)
    if segment.action.startswith("turn "):
        way = segment.action.removeprefix("turn ")
        choices = ("clockwise", "counterclockwise", "first one way, then the other",
                   "it does not turn")
        ask.add("direction", f"Which way does the {name} turn?", way, choices, last)
    repeated = [other.action for other in scene.segments].count(segment.action) > 1
    if len(segment.actors) == 1 and not item.camouflaged and not repeated:
        phrase = ACTIONS[segment.action].phrase
        text = f"Which colour has the shape that {phrase}?"
        ask.add("colour", text, item.colour, tuple(COLOURS), last)


def _order(ask: _Asker, first: str, second: str, frame: int) -> None:
    answer = f"{first}, then {second}"
    others = [name for name in ACTIONS if name not in (first, second)]
    extra = ask.rng.sample(others, 2)
    choices = (answer, f"{second}, then {first}", f"{first}, then {extra[0]}",
               f"{extra[1]}, then {second}")
    ask.add("order", "In which order do the last two actions happen?", answer, choices, frame)


def _number(count: int) -> tuple[str, tuple[str, ...]]:
    """A count and three near it."""
    low = max(0, count - 2)
    return str(count), tuple(str(n) for n in range(low, low + 4))

