"""Recognition: what happens in the clip? (global; Kinetics-400, Something-Something v2)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from backbone import FrameFeatures
from pretrain.alignment import similarity
from pretrain.datasets import Batch
from pretrain.objectives.base import Aligned, LabelSpace, last_valid_frame
from pretrain.text import TextTower

SHARPNESS = 100.0  # from cosine to logit where views are averaged; SigLIP's own is about 117


class Recognition:
    """Clip embedding against the names of all classes; every clip is one position."""

    def __init__(
        self,
        label_sets: Mapping[str, Sequence[str]],
        templates: str | Sequence[str] = "video",
        *,
        renormalize: bool = True,
    ) -> None:
        self.space = LabelSpace(label_sets, templates, renormalize=renormalize)

    def features(self, features: FrameFeatures, batch: Batch) -> Tensor:
        """The last frame's embedding, (B, D)."""
        return last_valid_frame(features, batch)

    def texts(self, tower: TextTower) -> Tensor:
        """The label embeddings, (C, D)."""
        return self.space.bank(tower)

    def targets(self, batch: Batch) -> Tensor:
        """(B, C), +1 for the classes of the clip, -1 for all others."""
        targets = torch.full((len(batch.entries), len(self.space)), -1.0)
        for i, entry in enumerate(batch.entries):
            start = self.space.columns[entry.label_set].start
            targets[i, [start + label for label in entry.labels]] = 1.0
        return targets

    def __call__(self, features: FrameFeatures, batch: Batch, tower: TextTower) -> Aligned:
        """Arguments of the loss."""
        device = batch.valid.device
        counts = batch.valid.any(1, keepdim=True)  # (B, 1)
        return Aligned(
            features=self.features(features, batch),
            text=self.texts(tower),
            targets=self.targets(batch).to(device),
            mask=self.space.mask(batch).to(device) & counts,
            normalize_text=self.space.renormalize,
        )

    def metric(self, views: int = 1) -> RecognitionAccuracy:
        """Top-1 and top-5 accuracy; of ``views`` consecutive rows each, if there are several."""
        return RecognitionAccuracy(self, views)


class RecognitionAccuracy:
    """Share of videos whose class is the nearest text, or among the five nearest, in percent.

    Every ``views`` consecutive rows are looks at one video; the probabilities of its classes are
    their mean over the looks that could be decoded.
    """

    def __init__(self, objective: Recognition, views: int = 1) -> None:
        self.objective, self.views = objective, views
        self.hits: list[Tensor] = []  # each (B, 2)

    def update(self, features: FrameFeatures, batch: Batch, tower: TextTower) -> None:
        """Take in a batch."""
        space = self.objective.space
        scores = similarity(self.objective.features(features, batch), self.objective.texts(tower))
        scores = scores.cpu().masked_fill(~space.mask(batch), -torch.inf)  # (B, C)
        right, seen = self.objective.targets(batch) > 0, batch.valid.any(1).cpu()  # (B, C), (B,)
        if self.views > 1:
            looks = (SHARPNESS * scores).softmax(1) * seen[:, None]
            scores = looks.unflatten(0, (-1, self.views)).sum(1)  # (videos, C)
            right = right[:: self.views]
            seen = seen.unflatten(0, (-1, self.views)).any(1)
        ranked = right.gather(1, scores.argsort(1, descending=True)[:, :5])  # (B, up to 5)
        hits = torch.stack([ranked[:, 0], ranked.any(1)], 1)
        self.hits.append(hits[seen])

    def compute(self) -> dict[str, float]:
        """``top1`` and ``top5``."""
        top1, top5 = 100 * torch.cat(self.hits).float().mean(0)
        return {"top1": top1.item(), "top5": top5.item()}
