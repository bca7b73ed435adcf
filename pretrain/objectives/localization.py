"""Localization: what happens in each frame? (temporal; ActivityNet-1.3, FineAction, HACS)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from backbone import FrameFeatures
from pretrain.alignment import similarity
from pretrain.datasets import Batch
from pretrain.datasets.localization import frame_labels
from pretrain.objectives.base import Aligned, LabelSpace
from pretrain.text import TextTower


class Localization:
    """Frame embeddings against the names of all actions; every frame is one position.

    A frame may carry several labels; a background frame carries none and is far from all.
    """

    def __init__(
        self,
        label_sets: Mapping[str, Sequence[str]],
        templates: str | Sequence[str] = "video",
        *,
        renormalize: bool = True,
    ) -> None:
        self.space = LabelSpace(label_sets, templates, renormalize=renormalize)

    def features(self, features: FrameFeatures, batch: Batch) -> Tensor:
        """The frame embeddings, (B, T, D)."""
        return features.frame_embeddings

    def texts(self, tower: TextTower) -> Tensor:
        """The label embeddings, (C, D)."""
        return self.space.bank(tower)

    def targets(self, batch: Batch) -> Tensor:
        """(B, T, C), +1 where an action's stretch covers the frame's time, -1 elsewhere."""
        targets = torch.full((*batch.valid.shape, len(self.space)), -1.0)
        for i, entry in enumerate(batch.entries):
            columns = self.space.columns[entry.label_set]
            holds = frame_labels(entry.segments, batch.times[i], columns.stop - columns.start)
            targets[i, :, columns][torch.from_numpy(holds)] = 1.0
        return targets

    def __call__(self, features: FrameFeatures, batch: Batch, tower: TextTower) -> Aligned:
        """Arguments of the loss."""
        device = batch.valid.device
        return Aligned(
            features=self.features(features, batch),
            text=self.texts(tower),
            targets=self.targets(batch).to(device),
            mask=self.space.mask(batch).to(device)[:, None] & batch.valid[..., None],  # (B, T, C)
            normalize_text=self.space.renormalize,
        )

    def metric(self) -> FrameMAP:
        """Per-frame mean average precision."""
        return FrameMAP(self)


class FrameMAP:
    """Per-frame mAP in percent: frames ranked by similarity to an action, averaged over actions.

    Actions without a frame in the data have no average precision and are left out. ``prior`` is
    what chance would reach: the mean share of positive frames.
    """

    def __init__(self, objective: Localization) -> None:
        self.objective = objective
        self.scores: dict[str, list[np.ndarray]] = {}  # label set: parts (frames, C of the set)
        self.labels: dict[str, list[np.ndarray]] = {}

    def update(self, features: FrameFeatures, batch: Batch, tower: TextTower) -> None:
        """Take in a batch."""
        frames = self.objective.features(features, batch)
        scores = similarity(frames, self.objective.texts(tower)).cpu().numpy()  # (B, T, C)
        right = (self.objective.targets(batch) > 0).numpy()
        for i, entry in enumerate(batch.entries):
            keep, columns = batch.valid[i].cpu().numpy(), self.objective.space.columns
            part = columns[entry.label_set]
            self.scores.setdefault(entry.label_set, []).append(scores[i, keep, part])
            self.labels.setdefault(entry.label_set, []).append(right[i, keep, part])

    def compute(self) -> dict[str, float]:
        """``mAP`` and ``prior``."""
        precisions, priors = [], []
        for name in self.scores:
            scores, right = np.concatenate(self.scores[name]), np.concatenate(self.labels[name])
            for column in np.flatnonzero(right.any(0)):
                precisions.append(average_precision(scores[:, column], right[:, column]))
                priors.append(right[:, column].mean())
        if not precisions:
            raise ValueError("no frame of the validation data carries a label; mAP is undefined")
        return {"mAP": 100 * float(np.mean(precisions)), "prior": 100 * float(np.mean(priors))}


def average_precision(scores: np.ndarray, right: np.ndarray) -> float:
    """Area under the precision-recall steps of scores (n,) against right (n,) bool.

    Equal scores are one step, so their order does not matter. Needs at least one right frame.
    """
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], right[order]
    ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # last of equal scores
    hits = np.cumsum(right)[ends]
    return float(np.sum(np.diff(hits, prepend=0) * hits / (ends + 1)) / hits[-1])
