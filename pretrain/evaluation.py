"""Zero-shot evaluation: any encoder, a task's validation clips, the task's own metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from backbone import FrameFeatures
from pretrain.datasets import Batch, Draw, VideoDataset, collate
from pretrain.objectives import Objective
from pretrain.text import TextTower


@torch.no_grad()
def evaluate(
    encode: Callable[[Tensor], FrameFeatures],
    dataset: VideoDataset,
    objective: Objective,
    tower: TextTower,
    *,
    num_frames: int,
    batch_size: int = 32,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Metrics of one task, in percent, over all clips of ``dataset``.

    encode: clips (B, T, 3, H, W) of bytes to features. Clips that cannot be decoded are left out
    and counted as ``skipped``, which is in the result only if there are any.
    """
    metric, skipped = objective.metric(), 0
    for batch in _batches(dataset, num_frames, batch_size, num_workers):
        skipped += len(batch.errors)
        batch = batch.to(torch.device(device))
        metric.update(encode(batch.frames), batch, tower)
    if skipped == len(dataset):
        raise ValueError(f"none of the {skipped} validation clips could be decoded")
    return metric.compute() | ({"skipped": float(skipped)} if skipped else {})


def _batches(
    dataset: VideoDataset, num_frames: int, batch_size: int, num_workers: int
) -> Iterator[Batch]:
    draws = [Draw(index, num_frames) for index in range(len(dataset))]
    yield from DataLoader(
        dataset,
        batch_sampler=[draws[i : i + batch_size] for i in range(0, len(draws), batch_size)],
        num_workers=num_workers,
        collate_fn=partial(collate, size=dataset.reader.size),
    )
