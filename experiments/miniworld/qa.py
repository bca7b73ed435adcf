"""The data of video question answering: short videos, questions with balanced answers, captions.

    FOLDER/qa-<key>/world.json              parameters, counts, digest
    …/videos/<name>.mp4                     two actions each; in half, the second one still goes on
    …/{train,val,test}.json                 questions, see `qa_language.balance`
    …/questions_<form>_{train,val}.json     for training: LLaVA JSON, a conversation a video, in
                                            each form of `qa_language.prompt`
    …/captions_{train,val}.json             LLaVA JSON, several captions a video
    …/lmms/                                 tasks of lmms-eval that read test.json and val.json

Videos of each split come from seeds of their own and share nothing.
"""

from __future__ import annotations

import csv
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.config import digest

from .actions import PRETRAINING_ACTIONS
from .language import captions
from .params import WorldParams, seed_of
from .qa_language import FORMS, balance, prompt, right_answer, write_questions
from .render import mapper, rendered
from .scene import Camera, draw
from .script import Scene, Script, write_script
from .writers import write_json, write_video

logger = logging.getLogger(__name__)

QA_VERSION = 3  # raise it whenever videos or questions change in any way
SPLITS = ("train", "val", "test")
TASKS = Path(__file__).parent / "qa_task"
TASK_FILES = "*_qa*", "utils.py"
# Dealt to videos: some actions need two shapes, and four rarely find room.
SHAPES = (1,) * 5 + (2,) * 7 + (3,) * 5 + (4,) * 3
LEAST_SHOWN = 4  # frames that an action must have run to be asked for as going on
SCRIPTS = 200  # drawn until one ends as it should
IMAGE_TOKEN = "<image>"  # where LLaVA JSON puts the video


@dataclass(frozen=True)
class QaParams:
    """How many videos.

    Attributes:
        seed: of everything.
        train, val, test: videos of each split.
        frames: of each video; two actions must fit.

    Raises ValueError for an impossible value.
    """

    seed: int = 0
    train: int = 6000
    val: int = 200
    test: int = 300
    frames: int = 16

    def __post_init__(self) -> None:
        negative = [name for name in SPLITS if getattr(self, name) < 0]
        if negative:
            raise ValueError(
                f"QaParams.{negative[0]}={getattr(self, negative[0])} must not be negative"
            )


@dataclass(frozen=True)
class _Job:
    split: str
    index: int
    actions: tuple[str, ...]
    shapes: int
    running: bool  # the last action goes on when the video ends

    @property
    def name(self) -> str:
        return f"qa_{self.split}_{self.index:05d}"


def render_qa(
    root: Path | str,
    params: QaParams,
    world: WorldParams | None = None,
    workers: int | None = None,
) -> Path:
    """The folder of questions of these parameters, made below ``root`` unless it is there.

    ``world`` says how videos look (size, camera, length of actions); its counts do not matter.
    ``workers`` processes share the work, None: one per core.

    Raises:
        ValueError: two actions do not fit into so many frames.
    """
    world = replace(world or WorldParams(), camouflaged=0.0)
    if params.frames < 2 * world.action_frames[0] + 2:
        raise ValueError(
            f"QaParams.frames={params.frames} must hold two actions of at least "
            f"{world.action_frames[0]} frames and a rest"
        )
    render = partial(_render, params=params, world=world)
    return rendered(Path(root) / f"qa-{qa_key(params, world)}", render, workers)


def qa_key(params: QaParams, world: WorldParams) -> str:
    """Digest of all that decides a byte."""
    counts = ("stills_", "clips_", "streams_", "seed")
    looks = {key: value for key, value in asdict(world).items() if not key.startswith(counts)}
    return digest(json.loads(json.dumps({"version": QA_VERSION, **asdict(params), "world": looks})))


def _render(root: Path, params: QaParams, world: WorldParams, workers: int) -> None:
    (root / "videos").mkdir()
    jobs = plan_qa(params)
    work = partial(_perform, params=params, world=world, root=root)
    done = []
    with mapper(workers) as run, tqdm(
        total=len(jobs), desc="miniworld questions", unit="video", mininterval=1
    ) as bar:  # fmt: skip
        for record in run(work, jobs):
            done.append(record)
            bar.update()
    counts = {}
    for split in SPLITS:
        here = [record for job, record in zip(jobs, done, strict=True) if job.split == split]
        rng = Random(seed_of(params.seed, "qa", "balance", split))
        asked = [question for record in here for question in record["questions"]]
        questions = balance(rng, asked, world.fps, params.frames)
        write_json(root / f"{split}.json", questions, indent=1)
        counts[split] = {
            "videos": len(here),
            "questions": len(questions),
            **Counter(record["kind"] for record in questions),
        }
        if split == "test":
            continue
        for form in FORMS:
            rng = Random(seed_of(params.seed, "qa", "converse", split, form))
            write_json(root / f"questions_{form}_{split}.json", converse(rng, questions, form))
        told = [
            talk(f"{record['video']}/{number}", record["video"], [("", caption)])
            for record in here
            for number, caption in enumerate(record["captions"])
        ]
        write_json(root / f"captions_{split}.json", told)
    (root / "lmms").mkdir()
    for pattern in TASK_FILES:
        for file in sorted(TASKS.glob(pattern)):
            shutil.copy(file, root / "lmms" / file.name)
    write_json(
        root / "world.json",
        {
            "version": QA_VERSION,
            "digest": qa_key(params, world),
            "parameters": asdict(params),
            "world": asdict(world),
            "counts": counts,
        },
        indent=2,
    )


def plan_qa(params: QaParams) -> list[_Job]:
    """One job per video: two different actions each.

    In each split, of the videos that end in rest and of those that end in action, every action is
    as often the first as any other, give or take one, and as often the second.
    """
    jobs = []
    for split in SPLITS:
        rng = Random(seed_of(params.seed, "qa", "deal", split))
        pairs = {running: _pairs(rng) for running in (False, True)}
        for index in range(getattr(params, split)):
            running = bool(index % 2)
            shapes = rng.choice(SHAPES)
            jobs.append(_Job(split, index, next(pairs[running]), shapes, running))
    return jobs


def _pairs(rng: Random) -> Iterator[tuple[str, str]]:
    """Endless pairs of neighbours in shuffled rings of all actions."""
    while True:
        ring = rng.sample(PRETRAINING_ACTIONS, len(PRETRAINING_ACTIONS))
        yield from zip(ring, ring[1:] + ring[:1], strict=True)


def _perform(job: _Job, params: QaParams, world: WorldParams, root: Path) -> dict[str, Any]:
    """Write one video; what may be asked and told of it."""
    seed = seed_of(params.seed, "qa", job.split, job.index)
    rng, pixels = Random(seed), np.random.default_rng(seed)
    scene = _write(rng, job, params, world)
    camera = Camera(world.frame_size, world.jitter, world.flicker, world.noise)
    frames, masks = draw(scene.items, scene.tracks, scene.background, camera, pixels)
    write_video(root / "videos" / f"{job.name}.mp4", frames, world.fps, world.crf)
    seen = masks[:, -1].sum((1, 2)).tolist()  # visible pixels of each shape at the end
    video = f"videos/{job.name}.mp4"
    return {
        "video": video,
        "questions": write_questions(rng, video, scene, seen, world.frame_size),
        "captions": captions(Script((scene,)), world.frame_size),
    }


def _write(rng: Random, job: _Job, params: QaParams, world: WorldParams) -> Scene:
    """A scene of the actions and shapes that were dealt; of fewer shapes if so many have no room.

    The actions keep their order: a script would rather begin with one that finds room easily, and
    then the words alone would tell which came first.

    Raises:
        RuntimeError: not even with the fewest.
    """
    find = _running if job.running else _ended
    for shapes in range(job.shapes, 0, -1):
        for _ in range(SCRIPTS):
            try:
                scene = find(rng, job.actions, shapes, params.frames, world)
            except RuntimeError:  # no room for so many
                break
            if scene is not None and tuple(s.action for s in scene.segments) == job.actions:
                return scene
    raise RuntimeError(
        f"miniworld cannot write {job.name}: {job.actions} do not fit {params.frames} frames of "
        f"{world.frame_size} pixels; change QaParams.frames"
    )


def _ended(
    rng: Random, actions: Sequence[str], shapes: int, frames: int, world: WorldParams
) -> Scene | None:
    """Both actions are over when the video ends."""
    (scene,) = write_script(rng, frames, actions, world, shapes=(shapes,)).scenes
    return scene if max(segment.end for segment in scene.segments) < frames else None


def _running(
    rng: Random, actions: Sequence[str], shapes: int, frames: int, world: WorldParams
) -> Scene | None:
    """The second action goes on when the video ends: a longer script, broken off."""
    longer = frames + rng.randint(world.action_frames[0] // 2, world.action_frames[1] // 2)
    (scene,) = write_script(rng, longer, actions, world, shapes=(shapes,)).scenes
    first, last = sorted(scene.segments, key=lambda segment: segment.start)
    if first.end > last.start or not last.start + LEAST_SHOWN <= frames < last.end:
        return None
    tracks = scene.tracks[:, :frames]
    segments = first, replace(last, end=frames)
    return Scene(0, frames, scene.background, scene.items, tracks, segments)


# -- training data in LLaVA JSON -------------------------------------------------------------------


def talk(name: str, visual: str, turns: Iterable[tuple[str, str]], key: str = "video") -> dict:
    """A record of LLaVA JSON: questions and answers about one video (or ``key="image"``)."""
    said: list[dict[str, str]] = []
    for question, answer in turns:
        asked = question if said else f"{IMAGE_TOKEN}\n{question}".rstrip("\n")
        said += [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {"id": name, key: visual, "conversations": said}


def converse(rng: Random, questions: Sequence[dict], form: str) -> list[dict]:
    """One conversation a video, its questions in random order."""
    videos: dict[str, list[dict]] = {}
    for record in questions:
        videos.setdefault(record["video"], []).append(record)
    return [
        talk(
            video,
            video,
            [(prompt(r, form), right_answer(r, form)) for r in rng.sample(asked, len(asked))],
        )
        for video, asked in videos.items()
    ]


def caption_stills(world: Path, split: str) -> list[dict]:
    """LLaVA JSON of a rendered world's stills and captions; images relative to ``world/stills``."""
    with (world / "stills" / f"{split}.csv").open(newline="", encoding="utf-8") as file:
        return [
            talk(row["image"], row["image"], [("", row["caption"])], key="image")
            for row in csv.DictReader(file)
        ]


def all_texts(folder: Path) -> list[str]:
    """Every text of training in a folder of questions: what a tokenizer must know."""
    texts = []
    for name in ("captions_train", *(f"questions_{form}_train" for form in FORMS)):
        for record in json.loads((folder / f"{name}.json").read_text(encoding="utf-8")):
            texts += [turn["value"].removeprefix(IMAGE_TOKEN) for turn in record["conversations"]]
    return texts


__all__ = [
    "QaParams",
    "all_texts",
    "caption_stills",
    "converse",
    "plan_qa",
    "qa_key",
    "render_qa",
    "talk",
]
