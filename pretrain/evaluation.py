"""Zero-shot evaluation: any encoder, a task's validation clips, the task's own metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from backbone import FrameFeatures, VideoEncoder
from pretrain.datasets import Batch, Draw, VideoDataset, collate
from pretrain.datasets.frames import View
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
    and counted as ``skipped``, which is in the result only if there are any. Where the data set has
    several ``views`` of a video, its metric gets them in consecutive rows, always whole.
    """
    looks = math.prod(dataset.views)
    metric = objective.metric() if looks == 1 else objective.metric(views=looks)
    lost = 0
    for batch in _batches(dataset, num_frames, batch_size, num_workers):
        lost += len(batch.errors)
        batch = batch.to(torch.device(device))
        metric.update(encode(batch.frames), batch, tower)
    skipped = lost / looks
    if skipped == len(dataset):
        raise ValueError(f"none of the {len(dataset)} validation clips could be decoded")
    return metric.compute() | ({"skipped": skipped} if skipped else {})


def frozen(encoder: VideoEncoder) -> Callable[[Tensor], FrameFeatures]:
    """Any encoder as `evaluate` wants it: clips (B, T, 3, H, W) of bytes to its features."""
    mean = torch.tensor(encoder.image_mean).view(3, 1, 1)
    std = torch.tensor(encoder.image_std).view(3, 1, 1)

    def encode(frames: Tensor) -> FrameFeatures:
        here = frames.device
        return encoder.encode((frames.float() / 255 - mean.to(here)) / std.to(here))

    return encode


def _batches(
    dataset: VideoDataset, num_frames: int, batch_size: int, num_workers: int
) -> Iterator[Batch]:
    times, places = dataset.views
    looks: list[View | None] = [None]
    if times * places > 1:
        looks = [View(t, times, p, places) for t in range(times) for p in range(places)]
    draws = [Draw(index, num_frames, view=look) for index in range(len(dataset)) for look in looks]
    batch_size = max(batch_size // len(looks), 1) * len(looks)
    yield from DataLoader(
        dataset,
        batch_sampler=[draws[i : i + batch_size] for i in range(0, len(draws), batch_size)],
        num_workers=num_workers,
        collate_fn=partial(collate, size=dataset.reader.size),
    )
