"""Drawing: shapes as signed distances, backgrounds as textures, all frames of a video at once.

A shape is a signed distance to its outline in units of its radius; coverage of a pixel is the
distance in pixels clipped to one pixel, which anti-aliases without supersampling. A camouflaged
shape is a patch cut out of the background's own texture elsewhere: still, it is hard to find;
moving, it is plain to see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .actions import ANGLE, RADIUS, SHOWN, X, Y


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(abs(x) - half_width, abs(y) - half_height)


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    slanted = np.float32(0.8660254) * abs(x) - np.float32(0.5) * y
    return np.maximum(slanted, y) - np.float32(0.56)


# Name -> signed distance (negative inside) at (x, y), the outline near radius 1.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: np.hypot(x, y) - np.float32(0.95),
    "square": lambda x, y: _box(x, y, 0.82, 0.82),
    "triangle": _triangle,
    "plus": lambda x, y: np.minimum(_box(x, y, 1.05, 0.34), _box(x, y, 0.34, 1.05)),
    "ring": lambda x, y: abs(np.hypot(x, y) - np.float32(0.74)) - np.float32(0.26),
    "bar": lambda x, y: _box(x, y, 1.1, 0.42),
}
ROUND_SHAPES = frozenset({"circle", "ring"})  # a turn of these cannot be seen

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "green": (35, 190, 60),
    "blue": (45, 75, 240),
    "yellow": (245, 225, 40),
    "purple": (200, 50, 225),
    "white": (250, 250, 250),
}

# Name -> the word a caption uses for the background.
TEXTURES = {
    "smooth": "cloudy",
    "stripes": "striped",
    "gradient": "shaded",
    "checks": "checked",
    "grain": "grainy",
}


@dataclass(frozen=True)
class Item:
    """How a shape looks; where it is comes from its track."""

    shape: str
    colour: str
    camouflaged: bool = False


@dataclass(frozen=True)
class Camera:
    """What happens between the world and the file: shake, flicker and noise (see WorldParams).

    ``scale`` is how many times larger than in frames of 32 pixels textures are drawn; None: as many
    times as the frame is.
    """

    size: int
    jitter: float = 0.0
    flicker: float = 0.0
    noise: float = 0.0
    scale: float | None = None


def texture(kind: str, side: int, scale: float, rng: np.random.Generator) -> np.ndarray:
    """A muted background, ``(side, side, 3)`` float32 in 0..1; ``scale`` is pixels per 1/32."""
    if kind not in TEXTURES:
        raise ValueError(f"texture {kind!r} is unknown; choose one of {', '.join(TEXTURES)}")
    blend = _pattern(kind, side, scale, rng)[..., None]  # (side, side, 1) in 0..1
    middle = rng.uniform(0.22, 0.48)
    contrast = rng.uniform(0.12, 0.2) if kind == "grain" else rng.uniform(0.06, 0.14)
    tints = rng.uniform(-0.05, 0.05, (2, 3)) + middle + np.array([[-contrast], [contrast]])
    return (tints[0] + blend * (tints[1] - tints[0])).astype(np.float32)


def _pattern(kind: str, side: int, scale: float, rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:side, :side].astype(np.float32)
    if kind == "grain":
        return _noise(side, 2.3 * scale, rng)
    if kind == "smooth":
        return _noise(side, rng.uniform(6, 10) * scale, rng)
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    if kind == "gradient":
        return 0.5 + along / (3 * side) + 0.15 * (_noise(side, 8 * scale, rng) - 0.5)
    pitch = 2 * np.pi / (rng.uniform(5, 11) * scale)
    if kind == "stripes":
        return _steep(np.sin(along * pitch))
    return _steep(2 * np.sin(along * pitch) * np.sin(across * pitch))


def _steep(wave: np.ndarray) -> np.ndarray:
    return np.clip(0.5 + 1.2 * wave, 0, 1)


def _noise(side: int, cell: float, rng: np.random.Generator) -> np.ndarray:
    """Value noise in 0..1: random numbers on a grid of ``cell`` pixels, smoothly joined."""
    position = np.arange(side) / cell
    low = position.astype(int)
    step = position - low
    step = (step * step * (3 - 2 * step))[:, None]
    grid = rng.random((low[-1] + 2, low[-1] + 2))
    rows = grid[low] * (1 - step) + grid[low + 1] * step  # (side, cells)
    return (rows[:, low] * (1 - step.T) + rows[:, low + 1] * step.T).astype(np.float32)


def draw(
    items: Sequence[Item],
    tracks: np.ndarray,
    background: str,
    camera: Camera,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Render one scene; later items lie on top.

    ``tracks`` is ``(K, T, 5)``. Returns frames ``(T, S, S, 3)`` uint8 RGB and the visible part
    of each item ``(K, T, S, S)`` bool, occlusion respected.
    """
    frames, size = tracks.shape[1], camera.size
    scale = camera.scale or size / 32
    margin = 2 + int(np.ceil(4 * camera.jitter))
    side = 2 * size + 2 * margin
    canvas = texture(background, side, scale, rng)
    shake = rng.normal(0, camera.jitter, (frames, 2)).clip(-3 * camera.jitter, 3 * camera.jitter)
    picture = _view(canvas, margin - shake, size)  # (T, S, S, 3)

    centres = np.arange(size, dtype=np.float32) + 0.5
    covered = np.zeros((len(items), frames, size, size), bool)
    for index, (item, track) in enumerate(zip(items, tracks, strict=True)):
        x, y = _local(track, shake, centres)  # (T, S, S) each, in radii
        radius = track[:, RADIUS, None, None].astype(np.float32)
        alpha = np.clip(0.5 - SHAPES[item.shape](x, y) * radius, 0, 1)
        alpha *= track[:, SHOWN, None, None].astype(np.float32)
        where = alpha.nonzero()  # n pixels of all frames
        if item.camouflaged:
            # The patch moves, turns and grows with its shape: look up its texture in its own
            # frame of reference, at the size it starts with.
            unit = np.float32(track[0, RADIUS])
            corner = rng.uniform(0.7 * size, side - 0.7 * size, 2)
            paint = _lookup(canvas, x[where] * unit + corner[0], y[where] * unit + corner[1])
        else:
            colour = np.array(COLOURS[item.colour]) / 255 + rng.uniform(-0.04, 0.04, 3)
            paint = colour.astype(np.float32)
        below = picture[where]  # (n, 3)
        picture[where] = below + alpha[where][:, None] * (paint - below)
        covered[index] = alpha > 0.5
    for index in range(len(items) - 1):
        covered[index] &= ~covered[index + 1 :].any(0)

    picture *= 1 + camera.flicker * rng.standard_normal((frames, 1, 1, 1), np.float32)
    picture += camera.noise * rng.standard_normal(picture.shape, np.float32)
    return (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8), covered


def _local(
    track: np.ndarray, shake: np.ndarray, centres: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres in the shape's own frame of reference, unit radius, ``(T, S, S)`` twice."""
    track = track.astype(np.float32)
    shake = shake.astype(np.float32)
    dx = (centres - (track[:, X] + shake[:, 0])[:, None])[:, None, :]  # (T, 1, S)
    dy = (centres - (track[:, Y] + shake[:, 1])[:, None])[:, :, None]  # (T, S, 1)
    cos = (np.cos(track[:, ANGLE]) / track[:, RADIUS])[:, None, None]
    sin = (np.sin(track[:, ANGLE]) / track[:, RADIUS])[:, None, None]
    return dx * cos + dy * sin, dy * cos - dx * sin


def _view(canvas: np.ndarray, corners: np.ndarray, size: int) -> np.ndarray:
    """Windows of the canvas at sub-pixel corners ``(T, 2)`` (x, y), bilinear."""
    whole = np.floor(corners).astype(int)
    part = (corners - whole).astype(np.float32)
    out = np.empty((len(corners), size, size, canvas.shape[-1]), np.float32)
    for frame, ((left, top), (fx, fy)) in enumerate(zip(whole, part, strict=True)):
        window = canvas[top : top + size + 1, left : left + size + 1]
        window = window[:-1] + fy * (window[1:] - window[:-1])
        out[frame] = window[:, :-1] + fx * (window[:, 1:] - window[:, :-1])
    return out


def _lookup(canvas: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear samples ``(n, 3)`` at positions ``(n,)``; outside the canvas, its nearest edge."""
    limit = canvas.shape[0] - 2
    x, y = x.clip(0, limit), y.clip(0, limit)
    left, top = x.astype(int), y.astype(int)
    fx, fy = (x - left)[..., None].astype(np.float32), (y - top)[..., None].astype(np.float32)
    upper = canvas[top, left] * (1 - fx) + canvas[top, left + 1] * fx
    lower = canvas[top + 1, left] * (1 - fx) + canvas[top + 1, left + 1] * fx
    return upper * (1 - fy) + lower * fy
