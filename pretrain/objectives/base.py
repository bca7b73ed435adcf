"""What all objectives share: the shape of their answer, label sets, read-outs of the features."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from backbone import FrameFeatures
from pretrain.alignment import Reduction, alignment_loss, rank_share, softmax_loss
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

    def loss(self, scale: Tensor | float, bias: Tensor | float) -> Tensor:
        """The sigmoid loss, a scalar."""
        return alignment_loss(
            self.features,
            self.text,
            self.targets,
            scale=scale,
            bias=bias,
            mask=self.mask,
            reduction=self.reduction,
            normalize_text=self.normalize_text,
        )


@dataclass
class AlignedPixels:
    """Arguments of `softmax_loss`, the released loss of the spatial tasks."""

    features: Tensor  # (B, T, h, w, D)
    text: Tensor  # (C, D) or (B, C, D)
    pixels: Tensor  # (B, T, H, W) int64, row of the right text, -1 for no answer
    decoded: Tensor  # (B,) bool, which samples the mean is over
    mask: Tensor | None = None  # (B, C) bool, False for texts that take no part
    normalize_text: bool = True

    def loss(self, scale: Tensor | float, bias: Tensor | float) -> Tensor:
        """The softmax loss, a scalar; the bias cancels, and takes part with a gradient of 0."""
        losses = softmax_loss(
            self.features,
            self.text,
            self.pixels,
            scale,
            self.mask,
            normalize_text=self.normalize_text,
        )
        decoded = rank_share(self.decoded.sum().float())
        return (losses * self.decoded).sum() / decoded + 0.0 * bias


class Metric(Protocol):
    """A zero-shot metric: fed with batches, read once."""

    def update(self, features: FrameFeatures, batch: Batch, tower: TextTower) -> None:
        """Take in a batch."""

    def compute(self) -> dict[str, float]:
        """The numbers by name, in percent."""


class Objective(Protocol):
    """One task: what the features are, what the texts are, what the targets are; its metric."""

    def __call__(
        self, features: FrameFeatures, batch: Batch, tower: TextTower
    ) -> Aligned | AlignedPixels:
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


def text_numbers(texts: Iterable[str]) -> Tensor:
    """The same integer for the same text on every rank, (n,) int64."""
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests])
