"""The videos of online instance segmentation: a YouTube-VIS tree of moving, meeting, hidden shapes.

    FOLDER/instances-<key>/world.json             parameters, counts, digest
    …/{train,val,test}.json                       videos, categories, annotations (RLE, null where
                                                  an object is not seen)
    …/{train,val,test}/JPEGImages/<video>/*.jpg   frames

Categories are colours, and "hidden": objects made of the background's own texture, which one frame
does not show and their motion does, so that nothing of them is annotated in the first frame. An
annotation also says the ``shape``, whether the object is ``camouflaged``, and its ``way``: it
stays, comes in or goes out through the border, or crosses another one, the later drawn on top.
Splits come from seeds of their own and share nothing.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from tqdm import tqdm

from experiments.config import digest

from .params import seed_of
from .render import mapper, rendered
from .scene import COLOURS, SHAPES, TEXTURES, Camera, Item, draw
from .writers import instance, write_json, write_still

logger = logging.getLogger(__name__)

INSTANCES_VERSION = 2  # raise it whenever rendering changes in any way
SPLITS = ("train", "val", "test")
CATEGORIES = {name: number for number, name in enumerate((*COLOURS, "hidden"), start=1)}
VISIBLE = 12  # pixels: an object that never shows as many is not annotated


@dataclass(frozen=True)
class InstanceParams:
    """Everything that decides the videos: same parameters, same bytes.

    Lengths in pixels and pixels per frame. Textures are as fine as those of 32-pixel worlds, on
    which the mini encoders are trained. Raises ValueError for an impossible value.

    Attributes:
        seed: of everything.
        frame_size: height and width.
        frames: of each video.
        train, val, test: videos of each split.
        objects: fewest and most of a video.
        radius: least and greatest.
        speed: slowest and fastest; nothing rests, since what rests hidden cannot be found.
        spin: greatest turn, degrees per frame.
        camouflaged: share of objects.
        borders: share of objects that enter or leave.
        crossings: share of videos of several objects in which two cross.
        jitter, flicker, noise, jpeg_quality: as in ``WorldParams``.
    """

    seed: int = 0
    frame_size: int = 64
    frames: int = 8
    train: int = 512
    val: int = 64
    test: int = 128
    objects: tuple[int, int] = (1, 3)
    radius: tuple[float, float] = (9.0, 14.0)
    speed: tuple[float, float] = (2.0, 3.5)
    spin: float = 8.0
    camouflaged: float = 0.36
    borders: float = 0.25
    crossings: float = 0.4
    jitter: float = 0.35
    flicker: float = 0.03
    noise: float = 0.012
    jpeg_quality: int = 95

    def __post_init__(self) -> None:
        for name in ("objects", "radius", "speed"):  # JSON brings lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        problems = [text for wrong, text in self._checks() if wrong]
        if problems:
            raise ValueError("InstanceParams cannot be rendered: " + "; ".join(problems))

    def _checks(self) -> list[tuple[bool, str]]:
        counts, shares = (*SPLITS,), ("camouflaged", "borders", "crossings")
        ranges = {"objects": 1, "radius": 2.0, "speed": 0.0}
        size = self.frame_size
        return [
            *((getattr(self, n) < 0, f"{n}={getattr(self, n)} must not be negative")
              for n in (*counts, "jitter", "flicker", "noise", "spin")),
            *((not 0 <= getattr(self, n) <= 1, f"{n}={getattr(self, n)} must lie in 0..1")
              for n in shares),
            *((len(getattr(self, n)) != 2 or not low <= getattr(self, n)[0] <= getattr(self, n)[-1],
               f"{n}={getattr(self, n)} must rise from {low} or more")
              for n, low in ranges.items()),
            (self.frames < 2, f"frames={self.frames} must be at least 2: motion needs two"),
            (self.radius[-1] * 4 > size,
             f"radius={self.radius} is too much for frame_size={size}; at most a quarter"),
            (self.objects[-1] > len(SHAPES) * len(COLOURS),
             f"objects={self.objects} are more than there are looks"),
            (not 1 <= self.jpeg_quality <= 100,
             f"jpeg_quality={self.jpeg_quality} must lie in 1..100"),
        ]  # fmt: skip


@dataclass(frozen=True)
class _Plan:
    """One video: its number within the split, from 0, and what is in it, dealt beforehand."""

    split: str
    index: int
    items: tuple[Item, ...]

    @property
    def name(self) -> str:
        return f"{self.split}_{self.index:04d}"


def instances_key(params: InstanceParams) -> str:
    """Digest (16 hex digits) of the parameters and of the version of the renderer."""
    return digest({"version": INSTANCES_VERSION, **asdict(params)})


def render_instances(
    folder: Path | str, params: InstanceParams, workers: int | None = None
) -> Path:
    """The folder of these videos, rendered below ``folder`` unless it is there.

    ``workers`` as for ``render_world``. An interrupted render leaves nothing behind. Raises
    ValueError for ``workers`` below 1.
    """
    render = partial(_render, params=params)
    return rendered(Path(folder) / f"instances-{instances_key(params)}", render, workers)


def _render(root: Path, params: InstanceParams, workers: int) -> None:
    plans = [plan for split in SPLITS for plan in _deal(split, params)]
    for split in SPLITS:
        (root / split / "JPEGImages").mkdir(parents=True)
    work = partial(_perform, params=params, root=root)
    with mapper(workers) as run:
        bar = tqdm(run(work, plans), total=len(plans), desc="instances", unit="video")
        records = list(bar)
    categories = [
        {"id": number, "name": name, "supercategory": "object"}
        for name, number in CATEGORIES.items()
    ]
    for split in SPLITS:
        done = [r for plan, r in zip(plans, records, strict=True) if plan.split == split]
        annotations = [annotation for _, found in done for annotation in found]
        write_json(
            root / f"{split}.json",
            {
                "videos": [video for video, _ in done],
                "categories": categories,
                "annotations": [{"id": n, **a} for n, a in enumerate(annotations, start=1)],
            },
        )
    write_json(
        root / "world.json",
        {
            "version": INSTANCES_VERSION,
            "digest": instances_key(params),
            "parameters": asdict(params),
            "counts": {split: getattr(params, split) for split in SPLITS},
        },
        indent=2,
    )


def _deal(split: str, params: InstanceParams) -> list[_Plan]:
    """What is in every video of a split: colours as frequent as each other, hidden ones exact."""
    rng = Random(seed_of(params.seed, "instances", split))
    counts = [rng.randint(*params.objects) for _ in range(getattr(params, split))]
    total = sum(counts)
    hidden = round(params.camouflaged * total)
    flags = rng.sample([True] * hidden + [False] * (total - hidden), total)
    names = list(COLOURS)
    colours = rng.sample(names * math.ceil(total / len(names)), total)
    dealt = iter(
        [Item(rng.choice(list(SHAPES)), *look) for look in zip(colours, flags, strict=True)]
    )
    return [
        _Plan(split, index, tuple(next(dealt) for _ in range(count)))
        for index, count in enumerate(counts)
    ]


def _perform(plan: _Plan, params: InstanceParams, root: Path) -> tuple[dict, list[dict]]:
    """Write the frames of one video; returns its entry and its annotations, ids of these apart."""
    seed = seed_of(params.seed, "instances", plan.split, plan.index)
    rng, pixels = Random(seed), np.random.default_rng(seed)
    ways, tracks = _move(rng, len(plan.items), params)
    hidden = any(item.camouflaged for item in plan.items)
    background = "grain" if hidden else rng.choice(list(TEXTURES))
    camera = Camera(params.frame_size, params.jitter, params.flicker, params.noise, scale=1.0)
    frames, masks = draw(plan.items, tracks, background, camera, pixels)
    masks[[item.camouflaged for item in plan.items], 0] = False  # nothing shows them yet
    folder = root / plan.split / "JPEGImages" / plan.name
    folder.mkdir()
    files = [f"{plan.name}/{number:05d}.jpg" for number in range(params.frames)]
    for file, frame in zip(files, frames, strict=True):
        write_still(folder.parent / file, frame, params.jpeg_quality)
    video = {
        "id": plan.index + 1, "width": params.frame_size, "height": params.frame_size,
        "length": params.frames, "file_names": files,
    }  # fmt: skip
    annotations = [
        instance(
            mask,
            video_id=video["id"],
            category_id=CATEGORIES["hidden" if item.camouflaged else item.colour],
            shape=item.shape,
            camouflaged=item.camouflaged,
            way=way,
        )
        for item, way, mask in zip(plan.items, ways, masks, strict=True)
        if mask.sum((1, 2)).max() >= VISIBLE
    ]
    return video, annotations


def _move(rng: Random, count: int, params: InstanceParams) -> tuple[list[str], np.ndarray]:
    """Ways of the objects and their tracks ``(count, T, 5)``, see ``actions``."""
    ways = []
    for _ in range(count):
        border = rng.random() < params.borders
        ways.append(rng.choice(("enters", "leaves")) if border else "stays")
    if count > 1 and rng.random() < params.crossings:
        for index in rng.sample(range(count), 2):
            ways[index] = "crosses"
    size, last = params.frame_size, params.frames - 1
    meeting = [rng.uniform(0.3 * size, 0.7 * size) for _ in range(2)]
    heading = rng.uniform(-math.pi, math.pi)  # of whoever crosses first
    tracks = np.empty((count, params.frames, 5))
    for track, way in zip(tracks, ways, strict=True):
        radius = rng.uniform(*params.radius)
        speed = rng.uniform(*params.speed)
        if way == "stays":
            start, velocity = _inside(rng, radius, speed, params)
        elif way == "crosses":
            velocity = np.array([math.cos(heading), math.sin(heading)]) * speed
            near = np.array(meeting) + [rng.uniform(-0.3, 0.3) * radius for _ in range(2)]
            start = near - velocity * rng.uniform(0.4, 0.6) * last
            heading += rng.choice((-1, 1)) * rng.uniform(math.pi / 2, math.pi)
        else:
            start, velocity = _outside(rng, radius, max(speed, 2 * radius / last), params)
            if way == "enters":  # the same way backwards
                start, velocity = start + velocity * last, -velocity
        times = np.arange(params.frames)
        track[:, :2] = start + velocity * times[:, None]
        track[:, 2] = radius
        spin = math.radians(rng.uniform(-params.spin, params.spin))
        track[:, 3] = rng.uniform(-math.pi, math.pi) + spin * times
        track[:, 4] = 1
    return ways, tracks


def _inside(
    rng: Random, radius: float, speed: float, params: InstanceParams
) -> tuple[np.ndarray, np.ndarray]:
    """Start and velocity of a centre that keeps most of its object within the frame."""
    low, high = 0.6 * radius, params.frame_size - 0.6 * radius
    speed = min(speed, 0.9 * (high - low) / max(1, params.frames - 1))  # long videos, small frames
    while True:
        start = np.array([rng.uniform(low, high) for _ in range(2)])
        angle = rng.uniform(-math.pi, math.pi)
        velocity = np.array([math.cos(angle), math.sin(angle)]) * speed
        end = start + velocity * (params.frames - 1)
        if (low <= end).all() and (end <= high).all():
            return start, velocity


def _outside(
    rng: Random, radius: float, speed: float, params: InstanceParams
) -> tuple[np.ndarray, np.ndarray]:
    """Start and velocity of a centre that is gone, with all of its object, some frames on."""
    size, last = params.frame_size, params.frames - 1
    gone = rng.randint((last + 1) // 2, last)  # the first frame without it
    depth = speed * gone - 1.25 * radius  # how far inside it starts
    along, drift = rng.uniform(0.2 * size, 0.8 * size), rng.uniform(-0.3, 0.3) * speed
    start, velocity = np.array([depth, along]), np.array([-speed, drift])
    if rng.random() < 0.5:  # through the other side
        start[0], velocity[0] = size - start[0], -velocity[0]
    if rng.random() < 0.5:  # above or below
        start, velocity = start[::-1].copy(), velocity[::-1].copy()
    return start, velocity
