"""The plan of a world: one job per file, and the actions dealt to it, balanced per split."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from .actions import ACTIONS, PRETRAINING_ACTIONS
from .params import WorldParams, seed_of
from .script import actions_for, deal


@dataclass(frozen=True)
class Job:
    """One file to render. ``layout`` says how a script is written; ``actions`` were dealt."""

    kind: str  # still, clip, stream
    split: str
    index: int
    name: str
    frames: int
    layout: str  # still, ending, single, several
    actions: tuple[str, ...] = ()

    @property
    def video_id(self) -> int:
        """Number of the video within its instances file, from 1."""
        return self.index + 1


def plan(params: WorldParams) -> list[Job]:
    """Every job of a world, its actions dealt: balanced per split and per layout."""
    return [*_plan_streams(params), *_plan_clips(params), *_plan_stills(params)]


def _plan_streams(params: WorldParams) -> list[Job]:
    short, long = params.stream_frames, params.long_stream_frames
    jobs = []
    for split, count, frames in (
        ("train", params.streams_train, short),
        (f"val_{short}", params.streams_val, short),
        (f"val_{long}", params.streams_val_long, long),
        (f"test_{short}", params.streams_test, short),
        (f"test_{long}", params.streams_test_long, long),
    ):
        rng = Random(seed_of(params.seed, "deal", "stream", split))
        hands = deal(rng, tuple(ACTIONS), [actions_for(frames, params)] * count)
        jobs += [
            Job("stream", split, i, f"stream_{split}_{i:04d}", frames, "several", tuple(hand))
            for i, hand in enumerate(hands)
        ]
    return jobs


def _plan_clips(params: WorldParams) -> list[Job]:
    """Short clips: half end with their action (recognition), a quarter holds one action anywhere,
    a quarter two. Long clips hold several.
    """
    jobs = []
    many = actions_for(params.long_clip_frames, params)
    for split, short, long in (
        ("train", params.clips_train, params.clips_train_long),
        ("val", params.clips_val, params.clips_val_long),
    ):
        layouts = [("ending", "single", "ending", "several")[i % 4] for i in range(short)]
        layouts += ["long"] * long
        cards = {"several": 2, "long": many}
        dealt = {
            layout: iter(deal(Random(seed_of(params.seed, "deal", "clip", split, layout)),
                              PRETRAINING_ACTIONS, [cards.get(layout, 1)] * layouts.count(layout)))
            for layout in ("ending", "single", "several", "long")
        }
        for i, layout in enumerate(layouts):
            frames = params.long_clip_frames if layout == "long" else params.clip_frames
            written = "several" if layout == "long" else layout
            hand = tuple(next(dealt[layout]))
            jobs.append(Job("clip", split, i, f"clip_{split}_{i:05d}", frames, written, hand))
    return jobs


def _plan_stills(params: WorldParams) -> list[Job]:
    return [
        Job("still", split, i, f"{split}/{i:05d}.jpg", 1, "still")
        for split, count in (("train", params.stills_train), ("val", params.stills_val))
        for i in range(count)
    ]
