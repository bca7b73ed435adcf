"""What all objectives share: the shape of their answer, label sets, read-outs of the features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from backbone import FrameFeatures
from pretrain.alignment import Reduction
from pretrain.datasets import Batch
from pretrain.text import TextTower, resolve_templates


@dataclass
class Aligned:
    """Arguments of `alignment_loss`: an objective's features, texts, targets, and what counts."""

    features: Tensor  # (B, …, D)
    text: Tensor  # (C, D) or (B, C, D)
    targets: Tensor  # (B, …, C) of -1 and +1
    mask: Tensor | None = None  # broadcastable to the targets, False where a pair does not count
    reduction: Reduction = "mean"
    normalize_text: bool = True


class Metric(Protocol):
    """A zero-shot metric: fed with batches, read once."""

    def update(self, features: FrameFeatures, batch: Batch, tower: TextTower) -> None:
        """Take in a batch."""

    def compute(self) -> dict[str, float]:
        """The numbers by name, in percent."""


class Objective(Protocol):
    """One task: what the features are, what the texts are, what the targets are; its metric."""

    def __call__(self, features: FrameFeatures, batch: Batch, tower: TextTower) -> Aligned:
        """Build the arguments of the loss for a batch."""

    def metric(self) -> Metric:
        """A fresh zero-shot metric of this task."""


class LabelSpace:
    """The labels of all label sets of a task in one row, and the columns that belong to each set.

    Clips of data sets with different labels meet in a batch; each is scored against the labels of
    its own data set, the columns of the others are masked. ``renormalize=False`` keeps the length
    of ensembled label embeddings, as the released heads do.
    """

    def __init__(
        self,
        sets: Mapping[str, Sequence[str]],
        templates: str | Sequence[str] = "video",
        *,
        renormalize: bool = True,
    ) -> None:
        if not sets:
            raise ValueError("the task needs label sets; its annotations hold none")
        self.labels = tuple(label for labels in sets.values() for label in labels)
        self.templates, self.renormalize = resolve_templates(templates), renormalize
        self.columns: dict[str, slice] = {}
        start = 0
        for name, labels in sets.items():
            self.columns[name] = slice(start, start + len(labels))
            start += len(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def bank(self, tower: TextTower) -> Tensor:
        """Label embeddings (C, D), computed once per tower."""
        return tower.embed_labels(self.labels, self.templates, renormalize=self.renormalize)

    def mask(self, batch: Batch) -> Tensor:
        """Which labels each clip is scored against, (B, C) bool."""
        mask = torch.zeros(len(batch.entries), len(self), dtype=torch.bool)
        for i, entry in enumerate(batch.entries):
            mask[i, self.columns[entry.label_set]] = True
        return mask


def last_valid_frame(features: FrameFeatures, batch: Batch) -> Tensor:
    """Embedding of each clip's last real frame, (B, D): what a causal model knows of the clip."""
    last = batch.valid.sum(1).clamp_min(1) - 1  # (B,)
    return features.frame_embeddings[torch.arange(len(last), device=last.device), last]
