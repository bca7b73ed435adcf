"""Retrieval: which caption belongs to the clip? (global; MSR-VTT, MSVD, DiDeMo, LSMDC, VATEX, …)"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from backbone import FrameFeatures
from pretrain.alignment import contrastive_pairs, gather_ranks, similarity
from pretrain.datasets import Batch
from pretrain.objectives.base import Aligned, last_valid_frame, text_numbers
from pretrain.text import TextTower


class Retrieval:
    """Clip embedding against the captions of the batch, and of the batches of all other ranks.

    A caption that occurs twice, and a second caption of the same video, are no negatives;
    ``mask_duplicates=False`` treats them as such, as the released head does.
    """

    def __init__(self, *, mask_duplicates: bool = True) -> None:
        self.mask_duplicates = mask_duplicates

    def features(self, features: FrameFeatures, batch: Batch) -> Tensor:
        """The last frame's embedding, (B, D)."""
        return last_valid_frame(features, batch)

    def texts(self, batch: Batch, tower: TextTower) -> Tensor:
        """The captions of all ranks, (R * B, D), rank-major."""
        return gather_ranks(tower.embed(batch.captions))

    def targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, R * B), +1 for the clip's own caption, -1 for all others; and which pairs count."""
        device, size = batch.valid.device, len(batch.captions)
        captions = gather_ranks(text_numbers(batch.captions).to(device))  # (R*B,)
        videos = gather_ranks(text_numbers(str(entry.video) for entry in batch.entries).to(device))
        decoded = batch.valid.any(1)  # (B,)
        rank = dist.get_rank() if len(captions) > size else 0
        targets, mask = contrastive_pairs(captions, videos, size, rank)
        if not self.mask_duplicates:
            mask = torch.ones_like(mask)
        return targets, mask & decoded[:, None]

    def __call__(self, features: FrameFeatures, batch: Batch, tower: TextTower) -> Aligned:
        """Arguments of the loss."""
        targets, mask = self.targets(batch)
        return Aligned(self.features(features, batch), self.texts(batch, tower), targets, mask)

    def metric(self) -> RetrievalRecall:
        """Recall at 1, 5 and 10 in both directions."""
        return RetrievalRecall(self)


class RetrievalRecall:
    """Share of captions whose video is among the k nearest, and the other way round, in percent.

    Over the whole data set; a video counts as right for a caption if it has the same words.
    """

    def __init__(self, objective: Retrieval) -> None:
        self.objective = objective
        self.features: list[Tensor] = []
        self.texts: list[Tensor] = []
        self.captions: list[str] = []

    def update(self, features: FrameFeatures, batch: Batch, tower: TextTower) -> None:
        """Take in a batch."""
        keep = batch.valid.any(1)
        self.features.append(self.objective.features(features, batch)[keep].float().cpu())
        self.texts.append(tower.embed(batch.captions)[keep.to(tower.device)].cpu())
        self.captions += [batch.captions[i] for i in keep.nonzero().flatten().tolist()]

    def compute(self) -> dict[str, float]:
        """``text_to_video_R@k`` and ``video_to_text_R@k``."""
        scores = similarity(torch.cat(self.features), torch.cat(self.texts))  # (videos, captions)
        words = text_numbers(self.captions)
        right = words[:, None] == words
        first = [self.captions.index(text) for text in dict.fromkeys(self.captions)]
        results = {}
        for name, table, answers in (
            ("text_to_video", scores.T[first], right[first]),
            ("video_to_text", scores[:, first], right[:, first]),
        ):
            ranked = answers.gather(1, table.argsort(dim=1, descending=True, stable=True))
            for k in (1, 5, 10):
                results[f"{name}_R@{k}"] = 100 * ranked[:, :k].any(1).float().mean().item()
        return results
