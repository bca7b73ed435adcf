"""The released samplers, for who wants their very order: ``sampler="balanced"`` or ``"unique"``.

`RoundSampler` is the default: it needs no balancing, repeats nothing by accident, and resumes from
one number. The released order is what published weights were trained in:

    epoch     every task's clips are permuted by ``torch.randperm``, by one generator seeded with
              the number of the epoch; permutations pile up, so epoch 3 depends on epochs 0 to 2
    balanced  n_k whole batches of task k, n_k // min n in a row, then the next task
    unique    the task of each batch is drawn, by the number of clips that are left of it
    lengths   a task shorter than half of the longest (`LENGTH_SCALE`) is repeated beforehand

An update takes as many mini-batches as there are tasks, of whatever tasks come; what is left at the
end of an epoch is dropped. Two defects are kept where they give batches: unequal counts let a task
run on into the next one's batches, and a task may fill an update alone. Where the original code
fails, this one refuses: a task smaller than a batch, and running on past the last task.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, count
from typing import Literal, get_args

import numpy as np
import torch

from pretrain.datasets.base import Draw
from pretrain.sampling import check_rank, resume_state

Rule = Literal["balanced", "unique"]
LENGTH_SCALE = 2.0


class ReleasedSampler:
    """Batches of draws in the released order; takes the place of `RoundSampler`.

    lengths: clips of each task, in order. batch_size: clips per mini-batch and rank, of any task.
    length_scale: see `repeats`; None repeats nothing. The chances of a clip, such as its crop, come
    from ``seed``; the order does not depend on it.
    """

    def __init__(
        self,
        lengths: Mapping[str, int],
        batch_size: int,
        rule: Rule,
        *,
        num_frames: int = 16,
        length_scale: float | None = LENGTH_SCALE,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if rule not in get_args(Rule):
            raise ValueError(f"no released sampler {rule!r}; use 'balanced' or 'unique'")
        check_rank(rank, world_size)
        self.lengths, self.tasks = dict(lengths), tuple(lengths)
        self.batch_size = dict.fromkeys(self.tasks, batch_size)
        self.rule, self.num_frames, self.seed = rule, num_frames, seed
        self.rank, self.world_size = rank, world_size
        times = repeats(self.lengths, length_scale) if length_scale else dict.fromkeys(lengths, 1)
        self.repeated = {task: length * times[task] for task, length in self.lengths.items()}
        self.round = 0  # of the next update
        whole = batch_size * world_size
        for task, length in self.repeated.items():
            if length < whole:
                raise ValueError(
                    f"task {task!r} has {length} clips, less than a batch of {whole} over all "
                    f"processes: the released order mixes tasks then. Use sampler='rounds'"
                )
        # As many in every epoch, and at least one of every task.
        batches = sum(1 for _ in self._ordered(_unshuffled(self.repeated), 0))
        self._updates = batches // len(self.tasks)

    def __len__(self) -> int:
        """Updates in an epoch."""
        return self._updates

    def epochs(self, numbers: Iterable[int]) -> Iterator[list[tuple[str, list[int]]]]:
        """Batches of this rank in these epochs, as they are when run one after the other.

        Each batch is a task and the numbers of its clips within the task.
        """
        orders = _unshuffled(self.repeated)
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            for task, clips in orders.items():
                order = torch.randperm(len(clips), generator=generator).tolist()
                orders[task] = [clips[i] for i in order]
            yield [
                (task, [clip % self.lengths[task] for clip in batch[self.rank :: self.world_size]])
                for task, batch in self._ordered(orders, number)
            ]

    def _ordered(self, orders: Mapping[str, list[int]], number: int) -> Iterator[tuple[str, list]]:
        """Global batches of an epoch: the clips of each task, cut and put in order."""
        size = self.batch_size[self.tasks[0]] * self.world_size
        cut = {
            task: [(task, clips[i : i + size]) for i in range(0, len(clips) - size + 1, size)]
            for task, clips in orders.items()
        }
        if self.rule == "balanced":
            return balanced(cut)
        return unique(cut, {task: len(clips) for task, clips in orders.items()}, size, number)

    def batches(self) -> Iterator[list[tuple[str, Draw]]]:
        """Mini-batches from the current update on, without end: what a data loader samples."""
        begun, update = divmod(self.round, len(self))
        for number, whole in enumerate(self.epochs(count())):
            if number < begun:
                continue
            for place in range(update * len(self.tasks), len(self) * len(self.tasks)):
                task, clips = whole[place]
                chance = np.random.default_rng([self.seed, number, place])
                seeds = chance.integers(2**63, size=(len(clips), self.world_size))
                yield [
                    (task, Draw(clip, self.num_frames, int(seed)))
                    for clip, seed in zip(clips, seeds[:, self.rank], strict=True)
                ]
            update = 0

    def state_dict(self) -> dict:
        """The position, and what it is a position in."""
        return {
            "round": self.round,
            "seed": self.seed,
            "rule": self.rule,
            "lengths": self.lengths,
            "whole_batch": {task: n * self.world_size for task, n in self.batch_size.items()},
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Go on at a saved position; refuses one of other data, seed, rule or global batch."""
        self.round = resume_state(self.state_dict(), state)


def repeats(lengths: Mapping[str, int], scale: float = LENGTH_SCALE) -> dict[str, int]:
    """How often each task's clips are repeated: to at least 1 / ``scale`` of the longest."""
    longest = max(lengths.values())
    return {
        task: longest // length if length < longest / scale else 1
        for task, length in lengths.items()
    }


def balanced(batches: Mapping[str, list]) -> Iterator:
    """In turns, of each task as many in a row as it has times the batches of the smallest one."""
    number = {task: len(own) for task, own in batches.items()}
    flat = [batch for own in batches.values() for batch in own]
    begins = dict(zip(number, accumulate(number.values(), initial=0), strict=False))
    least, used = min(number.values()), dict.fromkeys(number, 0)
    while any(used[task] < number[task] for task in number):
        for task in number:
            if used[task] >= number[task]:
                continue
            for _ in range(number[task] // least):
                place = begins[task] + used[task]  # may lie beyond the task: the next one's
                if place == len(flat):
                    raise ValueError(
                        f"task {task!r} has {number[task]} batches, no multiple of {least}, and "
                        "is the last: the released order runs past its end. Name it before "
                        "others, or use sampler='rounds'"
                    )
                yield flat[place]
                used[task] += 1


def unique(batches: Mapping[str, list], clips: Mapping[str, int], size: int, seed: int) -> Iterator:
    """A task at random for each batch, by its ``clips`` left, until fewer than ``size`` are."""
    left, chance = dict(clips), random.Random(seed)
    waiting = {task: iter(own) for task, own in batches.items()}
    while left:
        (task,) = chance.choices(list(left), weights=list(left.values()))
        yield next(waiting[task])
        left[task] -= size
        if left[task] < size:
            del left[task]


def _unshuffled(lengths: Mapping[str, int]) -> dict[str, list[int]]:
    return {task: list(range(length)) for task, length in lengths.items()}
