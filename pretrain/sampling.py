"""Which clips meet in an update: one task per mini-batch, one round over all tasks per update.

Every task walks through its own list, shuffled anew for each pass, without end; an update (a
"round") takes the next global batch of each. So sizes need no balancing: a task of 100 clips is
seen ten times while one of 1000 is seen once, each clip exactly once per pass, and no batch is
dropped, mixed or short. With R ranks, rank r takes entries r, r + R, … of each global batch: all
ranks are in the same task at the same time and together see what one rank with an R-fold batch
would see.

    pass 0 of a task        pass 1
    [3 0 4 | 1 5 2]         [5 1 0 | 2 4 3]      6 clips, global batch 4
     round 0   round 1 ........   round 2

A share of each task's batches may be long: more frames than the time table has rows, drawn from a
walk of their own over the clips that last long enough. Long rounds are spread evenly and fall on
other rounds for other tasks, so that updates take alike.

Everything follows from (seed, task, round) alone: nothing is drawn ahead, the position of a run is
one number, and a resumed run goes on exactly where the straight one would be.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import numpy as np

from pretrain.datasets.base import Draw

logger = logging.getLogger(__name__)

_NORMAL, _LONG, _CLIPS = range(3)  # streams of chance that must not repeat one another


class RoundSampler:
    """Batches of draws, by task and round.

    lengths: clips of each task, in the order the tasks take turns. batch_size: clips per task,
    round and rank, one number or one per task. long_share: share of batches with ``long_frames``
    frames a clip instead of ``num_frames``, for a model that will stream beyond the clips it is
    trained on; ``long_entries`` are the clips of each task that last so long (a task without any
    has no long batches). An epoch is the number of rounds in which every clip has been seen.
    """

    def __init__(
        self,
        lengths: Mapping[str, int],
        batch_size: int | Mapping[str, int],
        *,
        num_frames: int = 16,
        long_frames: int = 0,
        long_share: float = 0.0,
        long_entries: Mapping[str, Sequence[int]] | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not lengths:
            raise ValueError("no tasks to sample from")
        check_rank(rank, world_size)
        if not 0.0 <= long_share < 1.0:
            raise ValueError(f"long_share={long_share} must lie in 0 to 1, 1 excluded")
        if long_share and long_frames <= num_frames:
            raise ValueError(
                f"long_frames={long_frames} must exceed num_frames={num_frames} when long_share="
                f"{long_share:g}"
            )
        self.lengths = dict(lengths)
        self.tasks = tuple(lengths)
        if isinstance(batch_size, int):
            batch_size = dict.fromkeys(self.tasks, batch_size)
        self.batch_size = {task: batch_size[task] for task in self.tasks}
        self.num_frames, self.long_frames = num_frames, long_frames
        self.long_entries = {
            task: list((long_entries or {}).get(task, ())) if long_share else []
            for task in self.tasks
        }
        self._share = Fraction(long_share).limit_denominator(1000)
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.round = 0  # of the next update
        self._orders: dict[tuple[str, int], tuple[int, np.ndarray]] = {}
        for task, length in self.lengths.items():
            if length < 1:
                raise ValueError(f"task {task!r} has no clips")
            if self.batch_size[task] < 1:
                raise ValueError(f"task {task!r}: batch_size={batch_size[task]} must be at least 1")
            if length < self.whole_batch(task):
                logger.warning(
                    "task %r has %d clips for batches of %d: clips repeat within a batch",
                    task,
                    length,
                    self.whole_batch(task),
                )

    def whole_batch(self, task: str) -> int:
        """Clips of a task in one round, all ranks together."""
        return self.batch_size[task] * self.world_size

    def __len__(self) -> int:
        """Rounds in an epoch."""
        return max(self._rounds(task) for task in self.tasks)

    def _rounds(self, task: str) -> int:
        """Rounds until a task has been seen whole in its normal batches."""
        rounds = needed = math.ceil(self.lengths[task] / self.whole_batch(task))
        while rounds - self._long_before(task, rounds) < needed:
            rounds += 1
        return rounds

    def _long_before(self, task: str, round_: int) -> int:
        """Long batches of a task before a round: the share of the rounds, out of phase by task."""
        if not self.long_entries[task]:
            return 0
        phase = Fraction(self.tasks.index(task), len(self.tasks))
        return math.floor(round_ * self._share + phase) - math.floor(phase)

    def batch(self, task: str, round_: int) -> list[Draw]:
        """The draws of this rank for one task in one round."""
        whole, number = self.whole_batch(task), self.tasks.index(task)
        before = self._long_before(task, round_)
        if self._long_before(task, round_ + 1) > before:
            own, frames = self.long_entries[task], self.long_frames
            chosen = [own[i] for i in self._walk(task, _LONG, len(own), before * whole, whole)]
        else:
            start, frames = (round_ - before) * whole, self.num_frames
            chosen = self._walk(task, _NORMAL, self.lengths[task], start, whole)
        seeds = self._chance(_CLIPS, number, round_).integers(2**63, size=whole)
        mine = range(self.rank, whole, self.world_size)
        return [Draw(chosen[i], frames, int(seeds[i])) for i in mine]

    def batches(self) -> Iterator[list[tuple[str, Draw]]]:
        """Batches of all tasks from the current round on, without end: what a data loader samples.

        A loader runs ahead of training; ``round`` is advanced by the trainer, not here.
        """
        round_ = self.round
        while True:
            for task in self.tasks:
                yield [(task, draw) for draw in self.batch(task, round_)]
            round_ += 1

    def _walk(self, task: str, stream: int, length: int, start: int, count: int) -> list[int]:
        """``count`` places of an endless walk over ``length`` clips, shuffled anew each pass."""
        entries = []
        for place in range(start, start + count):
            pass_, position = divmod(place, length)
            known = self._orders.get((task, stream))
            if known is None or known[0] != pass_:
                rng = self._chance(stream, self.tasks.index(task), pass_)
                known = self._orders[task, stream] = (pass_, rng.permutation(length))
            entries.append(int(known[1][position]))
        return entries

    def _chance(self, stream: int, task: int, time: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream, task, time])

    def state_dict(self) -> dict:
        """The position, and what it is a position in."""
        return {
            "round": self.round,
            "seed": self.seed,
            "lengths": self.lengths,
            "long": {task: len(self.long_entries[task]) for task in self.tasks},
            "whole_batch": {task: self.whole_batch(task) for task in self.tasks},
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Go on at a saved position; refuses one of other data, seed or global batch."""
        self.round = resume_state(self.state_dict(), state)


def check_rank(rank: int, world_size: int) -> None:
    """Refuse a rank that does not exist."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} must lie in 0 to world_size - 1 = {world_size - 1}")


def resume_state(own: Mapping, saved: Mapping) -> int:
    """The round of a sampler's saved state; refuses one that differs in anything else."""
    for key in own.keys() - {"round"}:
        if saved.get(key) != own[key]:
            raise ValueError(
                f"the saved sampler has {key}={saved.get(key)}, this run {own[key]}: a run resumes "
                "only with the same data, seed and global batch. Start it in a new folder"
            )
    return saved["round"]
