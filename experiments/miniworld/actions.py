"""The motion vocabulary: each action turns poses and progress into a track of poses.

An action is made so that one frame cannot tell it. Moves and changes of size draw their goal
from everywhere a shape may be and are refused when the goal does not lie their way; so `move
left` and `move right` (or `grow` and `shrink`) pass through the same places (sizes), with the
same probability, in opposite order.

A pose is a row ``(x, y, radius, angle, shown)``: pixels, y downwards, radians clockwise on the
screen, 1 or 0. A track is ``(n, 5)``, one pose per frame; its last row is where the shape rests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

X, Y, RADIUS, ANGLE, SHOWN = range(5)

# Radii of shapes, as shares of the frame's side: 4.2 to 8.2 pixels of 32.
SMALLEST, LARGEST = 4.2 / 32, 8.2 / 32

Plan = Callable[[Random, Sequence[np.ndarray], int, int], "list[np.ndarray] | None"]


@dataclass(frozen=True)
class Action:
    """One word of the vocabulary.

    ``plan(rng, poses, frames, size)`` takes the actors' poses ``(5,)`` and returns a track
    ``(frames, 5)`` for each, or None if this draw does not fit. ``phrase`` is what a caption
    says; ``company`` asks for a scene of at least so many shapes.
    """

    name: str
    phrase: str
    plan: Plan
    actors: int = 1
    company: int = 1
    turning: bool = False  # needs a shape whose rotation shows
    downstream_only: bool = False


def progress(frames: int) -> np.ndarray:
    """1/n, 2/n, ..., 1: the first labelled frame has already moved, the last has arrived."""
    return np.arange(1, frames + 1) / frames


def hold(pose: np.ndarray, frames: int) -> np.ndarray:
    """The track of a shape at rest, ``(frames, 5)``."""
    return np.repeat(pose[None], frames, axis=0)


def inside(track: np.ndarray, size: int) -> bool:
    """Whether a shape stays within the frame all the way."""
    centre, radius = track[:, :2], track[:, RADIUS : RADIUS + 1]
    return bool((centre >= radius).all() and (centre <= size - radius).all())


def _move(axis: int, sign: int) -> Plan:
    def plan(rng: Random, poses, frames: int, size: int):
        radius = poses[0][RADIUS]
        goal = rng.uniform(radius, size - radius)
        distance = sign * (goal - poses[0][axis])
        if not 0.6 <= distance / frames * 32 / size <= 1.8 or distance < size * 5 / 32:
            return None
        track = hold(poses[0], frames)
        track[:, axis] += sign * distance * progress(frames)
        return [track]

    return plan


def _turn(sign: int) -> Plan:
    def plan(rng: Random, poses, frames: int, size: int):
        track = hold(poses[0], frames)
        track[:, ANGLE] += sign * math.radians(rng.uniform(11, 17)) * frames * progress(frames)
        return [track]

    return plan


def _goal_ratio(rng: Random, radius: float, size: int) -> float:
    """Logarithm of the ratio of a radius drawn from all to the present one."""
    goal = math.exp(rng.uniform(math.log(SMALLEST * size), math.log(LARGEST * size)))
    return math.log(goal / radius)


def _resize(sign: int) -> Plan:
    def plan(rng: Random, poses, frames: int, size: int):
        ratio = _goal_ratio(rng, poses[0][RADIUS], size)
        if sign * ratio < math.log(1.35):
            return None
        track = hold(poses[0], frames)
        track[:, RADIUS] *= np.exp(ratio * progress(frames))
        return [track]

    return plan


def _blink(rng: Random, poses, frames: int, size: int):
    half = rng.choice((1, 2))
    track = hold(poses[0], frames)
    track[:-1, SHOWN] = (np.arange(frames - 1) // half) % 2
    return [track]


def _swap(rng: Random, poses, frames: int, size: int):
    """Half a turn of two shapes around the point between them."""
    first, second = poses
    arm = (first[:2] - second[:2]) / 2
    if 2 * np.hypot(*arm) < 0.85 * (first[RADIUS] + second[RADIUS]):
        return None
    turn = rng.choice((-1, 1)) * math.pi * progress(frames)
    circle = np.stack(
        [arm[0] * np.cos(turn) - arm[1] * np.sin(turn),
         arm[0] * np.sin(turn) + arm[1] * np.cos(turn)], axis=1
    )  # (n, 2)
    middle = (first[:2] + second[:2]) / 2
    tracks = [hold(first, frames), hold(second, frames)]
    tracks[0][:, :2], tracks[1][:, :2] = middle + circle, middle - circle
    return tracks


def _cross(rng: Random, poses, frames: int, size: int):
    """Two shapes exchange places straight through each other, one behind."""
    first, second = poses
    gap = second[:2] - first[:2]
    if np.hypot(*gap) < max(0.85 * (first[RADIUS] + second[RADIUS]), 0.6 * frames * size / 32):
        return None
    way = progress(frames)[:, None] * gap
    tracks = [hold(first, frames), hold(second, frames)]
    tracks[0][:, :2] += way
    tracks[1][:, :2] -= way
    return tracks


def _bounce(rng: Random, poses, frames: int, size: int):
    hops = max(1, round(frames / 4.5))
    track = hold(poses[0], frames)
    track[:, Y] -= rng.uniform(4, 6.5) * size / 32 * abs(np.sin(math.pi * hops * progress(frames)))
    return [track]


def _pulse(rng: Random, poses, frames: int, size: int):
    """To another size and back, several times."""
    ratio = _goal_ratio(rng, poses[0][RADIUS], size)
    if not math.log(1.35) <= abs(ratio) <= math.log(1.7):
        return None
    beats = max(2, round(frames / 5))
    track = hold(poses[0], frames)
    track[:, RADIUS] *= np.exp(ratio * np.sin(math.pi * beats * progress(frames)) ** 2)
    return [track]


def _swing(rng: Random, poses, frames: int, size: int):
    """A pendulum that hangs from a point above the shape."""
    swings = max(1, round(frames / 6))
    angle = math.radians(rng.uniform(38, 55)) * rng.choice((-1, 1))
    angle = angle * np.sin(2 * math.pi * swings * progress(frames))
    rope = rng.uniform(5, 7) * size / 32
    track = hold(poses[0], frames)
    track[:, X] += rope * np.sin(angle)
    track[:, Y] -= rope * (1 - np.cos(angle))
    track[:, ANGLE] -= angle
    return [track]


def _shake(rng: Random, poses, frames: int, size: int):
    track = hold(poses[0], frames)
    side = np.where(np.arange(frames - 1) % 2, -1.0, 1.0) * rng.choice((-1, 1))
    track[:-1, X] += rng.uniform(1.6, 2.4) * size / 32 * side
    return [track]


ACTIONS: dict[str, Action] = {
    action.name: action
    for action in (
        Action("move left", "moves left", _move(X, -1)),
        Action("move right", "moves right", _move(X, 1)),
        Action("move up", "moves up", _move(Y, -1)),
        Action("move down", "moves down", _move(Y, 1)),
        Action("turn clockwise", "turns clockwise", _turn(1), turning=True),
        Action("turn counterclockwise", "turns counterclockwise", _turn(-1), turning=True),
        Action("grow", "grows", _resize(1)),
        Action("shrink", "shrinks", _resize(-1)),
        Action("blink", "blinks", _blink, company=2),
        Action("swap", "swap places", _swap, actors=2, company=2),
        Action("cross", "pass each other", _cross, actors=2, company=2),
        Action("bounce", "bounces", _bounce, downstream_only=True),
        Action("pulse", "pulses", _pulse, downstream_only=True),
        Action("swing", "swings", _swing, downstream_only=True),
        Action("shake", "shakes", _shake, downstream_only=True),
    )
}
PRETRAINING_ACTIONS: tuple[str, ...] = tuple(
    name for name, action in ACTIONS.items() if not action.downstream_only
)
CLASS_NAMES: tuple[str, ...] = ("Background", *ACTIONS)
