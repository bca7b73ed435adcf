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

Everything follows from (seed, task, round) alone: nothing is drawn ahead, the position of a run is
one number, and a resumed run goes on exactly where the straight one would be.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping

import numpy as np

from pretrain.datasets.base import Draw

logger = logging.getLogger(__name__)

_SHUFFLE, _CLIP, _LENGTH = range(3)  # streams of chance that must not repeat one another


class RoundSampler:
    """Batches of draws, by task and round.

    lengths: clips of each task, in the order the tasks take turns. batch_size: clips per task,
    round and rank, one number or one per task. long_share: chance of a batch to have
    ``long_frames`` frames a clip instead of ``num_frames``, for a model that will stream beyond
    the clips it is trained on. An epoch is the number of rounds in which every task has been seen
    whole at least once.
    """

    def __init__(
        self,
        lengths: Mapping[str, int],
        batch_size: int | Mapping[str, int],
        *,
        num_frames: int = 16,
        long_frames: int = 0,
        long_share: float = 0.0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not lengths:
            raise ValueError("no tasks to sample from")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must lie in 0 to world_size - 1 = {world_size - 1}")
        if not 0.0 <= long_share <= 1.0:
            raise ValueError(f"long_share={long_share} must lie between 0 and 1")
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
        self.num_frames, self.long_frames, self.long_share = num_frames, long_frames, long_share
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.round = 0  # of the next update
        self._orders: dict[str, tuple[int, np.ndarray]] = {}  # task: (pass, permutation)
        for task, length in self.lengths.items():
            whole = self.batch_size[task] * world_size
            if length < 1:
                raise ValueError(f"task {task!r} has no clips")
            if self.batch_size[task] < 1:
                raise ValueError(f"task {task!r}: batch_size={batch_size[task]} must be at least 1")
            if length < whole:
                logger.warning(
                    "task %r has %d clips for batches of %d: clips repeat within a batch",
                    task,
                    length,
                    whole,
                )

    def __len__(self) -> int:
        """Rounds in an epoch."""
        return max(
            math.ceil(length / (self.batch_size[task] * self.world_size))
            for task, length in self.lengths.items()
        )

    def batch(self, task: str, round_: int) -> list[Draw]:
        """The draws of this rank for one task in one round."""
        number = self.tasks.index(task)
        whole = self.batch_size[task] * self.world_size
        places = range(round_ * whole, (round_ + 1) * whole)
        indices = [self._entry(task, number, place) for place in places]
        seeds = self._chance(_CLIP, number, round_).integers(2**63, size=whole)
        long = self._chance(_LENGTH, number, round_).random() < self.long_share
        frames = self.long_frames if long else self.num_frames
        return [
            Draw(indices[i], frames, int(seeds[i]))
            for i in range(self.rank, whole, self.world_size)
        ]

    def batches(self) -> Iterator[list[tuple[str, Draw]]]:
        """Batches of all tasks from the current round on, without end: what a data loader samples.

        A loader runs ahead of training; ``round`` is advanced by the trainer, not here.
        """
        round_ = self.round
        while True:
            for task in self.tasks:
                yield [(task, draw) for draw in self.batch(task, round_)]
            round_ += 1

    def _entry(self, task: str, number: int, place: int) -> int:
        """Entry at a place of the task's endless walk."""
        pass_, position = divmod(place, self.lengths[task])
        known = self._orders.get(task)
        if known is None or known[0] != pass_:
            order = self._chance(_SHUFFLE, number, pass_).permutation(self.lengths[task])
            known = self._orders[task] = (pass_, order)
        return int(known[1][position])

    def _chance(self, stream: int, task: int, time: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream, task, time])

    def state_dict(self) -> dict:
        """The position, and what it is a position in."""
        return {
            "round": self.round,
            "seed": self.seed,
            "lengths": self.lengths,
            "whole_batch": {task: self.batch_size[task] * self.world_size for task in self.tasks},
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Go on at a saved position; refuses one of other data, seed or global batch."""
        own = self.state_dict()
        for key in ("seed", "lengths", "whole_batch"):
            if state[key] != own[key]:
                raise ValueError(
                    f"the saved sampler has {key}={state[key]}, this run {own[key]}: a run resumes "
                    "only with the same data, seed and global batch. Start it in a new folder"
                )
        self.round = state["round"]
