"""Instance segmentation: what is in each patch? (spatial; YouTube-VIS, LV-VIS, COCO)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from backbone import FrameFeatures
from pretrain.datasets import Batch
from pretrain.objectives.base import Aligned, AlignedPixels, LabelSpace
from pretrain.objectives.dense import (
    SpatialLoss,
    check_loss,
    columns_of,
    dense_embeddings,
    masks_of,
    patch_targets,
    pixel_scores,
)
from pretrain.text import TextTower


class InstanceSegmentation:
    """Patch embeddings against the names of things; every patch of every frame is one position.

    A patch carries the labels of the things in it; a patch of background is far from all.
    ``loss="softmax"`` is the released head: cross entropy over the labels, resized to pixels, on
    things alone.

    A clip whose label set is larger than ``max_classes`` is scored against the labels that it
    shows and a sample of the others, drawn by a generator of its own from the seed of its draw.
    """

    def __init__(
        self,
        label_sets: Mapping[str, Sequence[str]],
        templates: str | Sequence[str] = "plain",
        *,
        renormalize: bool = True,
        loss: SpatialLoss = "sigmoid",
        max_classes: int = 100,
    ) -> None:
        check_loss(loss)
        if max_classes < 1:
            raise ValueError(f"max_classes={max_classes} must be at least 1")
        self.space = LabelSpace(label_sets, templates, renormalize=renormalize)
        self.loss, self.max_classes = loss, max_classes
        self.largest = max(map(len, label_sets.values()))

    def features(self, features: FrameFeatures, batch: Batch) -> Tensor:
        """The patch embeddings, (B, T, h, w, D)."""
        return dense_embeddings(features, batch)

    def labels(self, batch: Batch) -> Tensor:
        """Labels that each clip is scored against, (B, C) numbers within its set, -1 for padding.

        All of its set, or where these are too many: those it shows, ascending, then a sample.
        """
        masks, rows = masks_of(batch), []
        for i, entry in enumerate(batch.entries):
            part = self.space.columns[entry.label_set]
            size = part.stop - part.start
            if size <= self.max_classes:
                rows.append(torch.arange(size))
                continue
            shown = masks[i].unique().cpu().numpy()
            shown = shown[shown >= 0]
            others = np.setdiff1d(np.arange(size), shown)
            seed = batch.seeds[i] if batch.seeds and batch.seeds[i] is not None else 0
            count = max(self.max_classes - len(shown), 0)
            drawn = np.random.default_rng(seed).permutation(others)[:count]
            rows.append(torch.from_numpy(np.concatenate([shown, drawn]).astype(np.int64)))
        labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        return labels.to(batch.valid.device)

    def texts(self, batch: Batch, labels: Tensor, tower: TextTower) -> Tensor:
        """Embeddings of these labels, (B, C, D)."""
        starts = [self.space.columns[entry.label_set].start for entry in batch.entries]
        rows = labels.clamp_min(0) + torch.tensor(starts, device=labels.device)[:, None]
        return self.space.bank(tower)[rows]

    def __call__(
        self, features: FrameFeatures, batch: Batch, tower: TextTower
    ) -> Aligned | AlignedPixels:
        """Arguments of the loss."""
        patches, masks, labels = self.features(features, batch), masks_of(batch), self.labels(batch)
        text, used = self.texts(batch, labels, tower), labels >= 0  # (B, C, D), (B, C)
        normalize = self.space.renormalize
        if self.loss == "softmax":
            decoded, pixels = batch.valid.any(1), columns_of(masks, labels, self.largest)
            return AlignedPixels(patches, text, pixels, decoded, used, normalize)
        targets, counted = patch_targets(masks, labels, self.largest, patches.shape[2:4])
        mask = counted & used[:, None, None, None]
        return Aligned(patches, text, targets, mask, normalize_text=normalize)

    def metric(self) -> MeanIoU:
        """Mean intersection over union of the classes."""
        return MeanIoU(self)


class MeanIoU:
    """Intersection over union per class, over all pixels of things, averaged over classes.

    A pixel's class is the nearest label of its data set. Pixels of background have no right answer
    and are left out, so no threshold is needed and any encoder can be measured; classes that no
    pixel shows have no IoU and are left out too.
    """

    def __init__(self, objective: InstanceSegmentation) -> None:
        self.objective = objective
        self.confusion: dict[str, Tensor] = {}  # label set: (K, K) pixels, rows are right

    def update(self, features: FrameFeatures, batch: Batch, tower: TextTower) -> None:
        """Take in a batch."""
        space = self.objective.space
        patches, masks = self.objective.features(features, batch), masks_of(batch)
        bank = space.bank(tower)
        for i, entry in enumerate(batch.entries):
            if not batch.valid[i].any():
                continue
            text = bank[space.columns[entry.label_set]]  # (K, D)
            scores = pixel_scores(patches[i], text, masks.shape[2:])
            nearest = torch.cat([part.argmax(1) for part in scores])  # (T, H, W)
            right, size = masks[i], len(text)
            things = right >= 0
            pairs = right[things].long() * size + nearest[things]
            counts = torch.bincount(pairs, minlength=size * size).view(size, size).cpu()
            self.confusion[entry.label_set] = self.confusion.get(entry.label_set, 0) + counts

    def compute(self) -> dict[str, float]:
        """``mIoU``."""
        values = []
        for counts in self.confusion.values():
            both, right = counts.diagonal(), counts.sum(1)
            shares = both / (right + counts.sum(0) - both).clamp_min(1)
            values.append(shares[right > 0])
        if not sum(map(len, values)):
            raise ValueError("no pixel of the validation data carries a label; mIoU is undefined")
        return {"mIoU": 100 * torch.cat(values).double().mean().item()}
