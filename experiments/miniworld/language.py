"""Words about a script: captions, queries and expressions for training, and questions.

A caption tells a clip, a query asks when something happens, a referring expression says which shape
is meant; a question has four answers to choose from.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    who = [f"{mover(s.action, len(s.actors))} {_is(scene, s)}" for s in segments]
    sized = [sentence(scene, segment, size) for segment in segments]
    definite = [sentence(scene, segment, article="the") for segment in segments]
    out = [
        ", then ".join(told),
        ", then ".join(sized),
        f"{seen}; {', then '.join(definite)}",
        f"{', then '.join(sized)} on a {TEXTURES[scene.background]} background",
        ", then ".join(who),
    ]
    return list(dict.fromkeys(out))


def mover(action: str, count: int) -> str:
    """Who does something, by that alone: "the shape that grows", "the shapes that grow"."""
    phrase = ACTIONS[action].phrase
    if count == 1:
        return f"the shape that {phrase}"
    if ACTIONS[action].actors == 1:  # a phrase of one: its verb ends in s
        verb, *rest = phrase.split(" ")
        phrase = " ".join([verb.removesuffix("s"), *rest])
    return f"the shapes that {phrase}"


def _is(scene: Scene, segment: Segment) -> str:
    names = listing([describe(scene.items[actor]) for actor in segment.actors])
    return f"{'is' if len(segment.actors) == 1 else 'are'} {names}"


def queries(script: Script) -> dict[str, list[Segment]]:
    """What one may ask to find in a video, each with all segments that answer it.

    "a red circle moves left" for every action; where an action happens several times,
    "a shape moves left" asks for all of them.
    """
    found: dict[str, list[Segment]] = {}
    for scene in script.scenes:
        for segment in scene.segments:
            found.setdefault(sentence(scene, segment), []).append(segment)
    for segments in _by_action(script.segments).values():
        if len(segments) > 1:
            action = ACTIONS[segments[0].action]
            some = "a shape" if action.actors == 1 else "two shapes"
            found[f"{some} {action.phrase}"] = segments
    return found


def expressions(rng: Random, script: Script, size: int) -> dict[str, tuple[int, ...]]:
    """Phrases that single out shapes of a video without cuts, and the shapes (numbers) they mean.

    One for every shape by how it looks or where it stays, one for every action by who does it.
    Nothing for a video of several scenes, where a phrase would mean several shapes.
    """
    if len(script.scenes) > 1:
        return {}
    (scene,) = script.scenes
    meant = {rng.choice(_looks(scene, k, size)): (k,) for k in range(len(scene.items))}
    for action, segments in _by_action(scene.segments).items():
        actors = sorted({actor for segment in segments for actor in segment.actors})
        meant[mover(action, len(actors))] = tuple(actors)
    return meant


def _by_action(segments: Sequence[Segment]) -> dict[str, list[Segment]]:
    groups: dict[str, list[Segment]] = {}
    for segment in segments:
        groups.setdefault(segment.action, []).append(segment)
    return groups


def _looks(scene: Scene, index: int, size: int) -> list[str]:
    """What tells a shape from all others of its scene, at every moment."""
    item, track = scene.items[index], scene.tracks[index]
    others = [other for k, other in enumerate(scene.items) if k != index]
    tracks = [other for k, other in enumerate(scene.tracks) if k != index]
    phrases = [f"the {describe(item)}"]
    if all(other.shape != item.shape for other in others):
        phrases.append(f"the {item.shape}")
    if item.camouflaged:  # at most one is
        phrases.append("the hidden shape")
    elif all(other.camouflaged or other.colour != item.colour for other in others):
        phrases.append(f"the {item.colour} shape")
    for word, sign, bound in (("large", 1, LARGE), ("small", -1, SMALL)):
        beyond = [(sign * (t[:, RADIUS] * 32 / size - bound) > 0) for t in (track, *tracks)]
        if beyond[0].all() and not any(other.any() for other in beyond[1:]):
            phrases.append(f"the {word} shape")
    places = [{whereabouts(pose, size) for pose in t} for t in (track, *tracks)]
    if len(places[0]) == 1 and not any(places[0] & other for other in places[1:]):
        phrases.append(f"the shape {next(iter(places[0]))}")
    return phrases


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

