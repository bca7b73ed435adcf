"""Grounding: when does the sentence hold? (temporal; Charades-STA, QVHighlights, TaCoS, …)"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from backbone import FrameFeatures
from pretrain.alignment import similarity
from pretrain.datasets import Batch
from pretrain.datasets.localization import frame_labels
from pretrain.objectives.base import Aligned
from pretrain.text import TextTower

THRESHOLDS = (0.3, 0.5, 0.7)  # of the overlap from which on a moment counts as found


class Grounding:
    """Frame embeddings against the one sentence of their clip; every frame is one position.

    ``reduction`` "mean" averages over frames; "sample_sum" adds up the frames of a clip, as the
    released head does: a task of 16 frames then weighs 16 times as much as localization.
    """

    def __init__(self, reduction: Literal["mean", "sample_sum"] = "mean") -> None:
        if reduction not in ("mean", "sample_sum"):
            raise ValueError(f"reduction={reduction!r} is unknown; use 'mean' or 'sample_sum'")
        self.reduction = reduction

    def features(self, features: FrameFeatures, batch: Batch) -> Tensor:
        """The frame embeddings, (B, T, D)."""
        return features.frame_embeddings

    def texts(self, batch: Batch, tower: TextTower) -> Tensor:
        """The sentence of each clip, (B, 1, D)."""
        return tower.embed(batch.captions)[:, None]

    def targets(self, batch: Batch) -> Tensor:
        """(B, T, 1), +1 where the sentence holds at the frame's time, -1 elsewhere."""
        holds = [
            frame_labels(entry.segments, times, 1)
            for entry, times in zip(batch.entries, batch.times, strict=True)
        ]
        return torch.from_numpy(np.stack(holds)) * 2.0 - 1.0

    def __call__(self, features: FrameFeatures, batch: Batch, tower: TextTower) -> Aligned:
        """Arguments of the loss."""
        return Aligned(
            features=self.features(features, batch),
            text=self.texts(batch, tower),
            targets=self.targets(batch).to(batch.valid.device),
            mask=batch.valid[..., None],
            reduction=self.reduction,
        )

    def metric(self) -> MomentRecall:
        """Recall of the first answer at three overlaps, and the mean overlap."""
        return MomentRecall(self)


class MomentRecall:
    """How well the run of frames nearest to a sentence covers the moment when it holds, in percent.

    ``R1@m``: share of sentences whose answer overlaps a true stretch by at least m, intersection
    over union in seconds; ``mIoU``: mean overlap; ``prior``: mean overlap of the answer "always".
    Of several true stretches the one that overlaps best counts, as for QVHighlights.
    """

    def __init__(self, objective: Grounding) -> None:
        self.objective = objective
        self.overlaps: list[float] = []
        self.priors: list[float] = []

    def update(self, features: FrameFeatures, batch: Batch, tower: TextTower) -> None:
        """Take in a batch."""
        frames, texts = self.objective.features(features, batch), self.objective.texts(batch, tower)
        scores = similarity(frames, texts.to(frames.device))[..., 0].cpu().numpy()  # (B, T)
        for i, entry in enumerate(batch.entries):
            keep = batch.valid[i].cpu().numpy()
            if keep.any():
                edges = frame_edges(batch.times[i, keep])
                first, last = best_run(scores[i, keep])
                truths = [(start, end) for _, start, end in entry.segments]
                self.overlaps.append(max(overlap(edges[first], edges[last], *t) for t in truths))
                self.priors.append(max(overlap(edges[0], edges[-1], *t) for t in truths))

    def compute(self) -> dict[str, float]:
        """``R1@0.3``, ``R1@0.5``, ``R1@0.7``, ``mIoU`` and ``prior``."""
        if not self.overlaps:
            raise ValueError("no sentence of the validation data has a clip to look for it in")
        overlaps = np.array(self.overlaps)
        return {f"R1@{m}": 100 * float(np.mean(overlaps >= m)) for m in THRESHOLDS} | {
            "mIoU": 100 * float(overlaps.mean()),
            "prior": 100 * float(np.mean(self.priors)),
        }


def best_run(scores: np.ndarray) -> tuple[int, int]:
    """The run of frames that stands out: first frame, and one past the last.

    scores: (T,). Of all runs the one with the largest sum of what its scores exceed the middle
    between the clip's lowest and highest by; the longest of several such.
    """
    excess = scores.astype(np.float64) - (scores.min() + scores.max()) / 2
    sums = np.concatenate([[0.0], np.cumsum(excess)])  # (T + 1,)
    gains = sums[None, :] - sums[:, None]  # (T + 1, T + 1), of the run from row to column
    lengths = np.arange(len(sums))[None, :] - np.arange(len(sums))[:, None]
    gains[lengths < 1] = -np.inf
    best = gains >= gains.max() - 1e-9
    first, last = np.unravel_index(np.argmax(np.where(best, lengths, 0)), gains.shape)
    return int(first), int(last)


def frame_edges(times: np.ndarray) -> np.ndarray:
    """When each frame's share of time begins and ends: (T + 1,) seconds for times (T,).

    A frame stands for the time from half way to the frame before to half way to the next.
    """
    if len(times) == 1:
        return np.repeat(times, 2)
    middles = (times[1:] + times[:-1]) / 2
    first, last = times[0] - (middles[0] - times[0]), times[-1] + (times[-1] - middles[-1])
    return np.concatenate([[max(first, 0.0)], middles, [last]])


def overlap(start: float, end: float, other_start: float, other_end: float) -> float:
    """Intersection over union of two stretches of time."""
    shared = max(min(end, other_end) - max(start, other_start), 0.0)
    whole = (end - start) + (other_end - other_start) - shared
    return shared / whole if whole > 0 else 0.0
