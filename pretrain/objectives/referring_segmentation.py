"""Referring segmentation: where is what the words mean? (spatial; MeViS, Refer-YouTube-VOS)

The measures are those of DAVIS (Perazzi et al. 2016; Pont-Tuset et al. 2017): region similarity J,
the intersection over union of a frame's mask, and contour accuracy F, the harmonic mean of the
precision and the recall of its border pixels.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from backbone import FrameFeatures
from pretrain.alignment import contrastive_pairs, gather_ranks
from pretrain.datasets import Batch
from pretrain.datasets.masks import BACKGROUND, IGNORE
from pretrain.objectives.base import Aligned, AlignedPixels, text_numbers
from pretrain.objectives.dense import (
    SpatialLoss,
    check_loss,
    dense_embeddings,
    masks_of,
    patch_targets,
    pixel_scores,
)
from pretrain.text import TextTower

TOLERANCE = 0.008  # of a frame's diagonal, by which borders may differ (DAVIS)
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # between a clip's lowest and highest similarity


class ReferringSegmentation:
    """Patch embeddings against the expressions of the batch, and of the batches of all ranks.

    Every patch is scored against its clip's own expression, so what fires beside the thing costs.
    The thing's patches are also far from all other expressions, but for those of the same words or
    video (``mask_duplicates=False`` counts these too, as released). ``loss="softmax"`` is the
    released head: cross entropy over the expressions of all ranks, on the thing's pixels alone.
    """

    def __init__(self, *, mask_duplicates: bool = True, loss: SpatialLoss = "sigmoid") -> None:
        check_loss(loss)
        self.mask_duplicates, self.loss = mask_duplicates, loss

    def features(self, features: FrameFeatures, batch: Batch) -> Tensor:
        """The patch embeddings, (B, T, h, w, D)."""
        return dense_embeddings(features, batch)

    def texts(self, batch: Batch, tower: TextTower) -> Tensor:
        """The expressions of all ranks, (R * B, D), rank-major."""
        return gather_ranks(tower.embed(batch.captions))

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Which expression is whose, and which are comparable: (B, R * B) bool each."""
        device, size = batch.valid.device, len(batch.captions)
        captions = gather_ranks(text_numbers(batch.captions).to(device))  # (R*B,)
        videos = gather_ranks(text_numbers(str(entry.video) for entry in batch.entries).to(device))
        rank = dist.get_rank() if len(captions) > size else 0
        targets, comparable = contrastive_pairs(captions, videos, size, rank)
        return targets > 0, comparable if self.mask_duplicates else torch.ones_like(comparable)

    def __call__(
        self, features: FrameFeatures, batch: Batch, tower: TextTower
    ) -> Aligned | AlignedPixels:
        """Arguments of the loss."""
        patches, masks = self.features(features, batch), masks_of(batch)
        text = self.texts(batch, tower)
        own, comparable = self.pairs(batch)
        if self.loss == "softmax":
            columns = own.int().argmax(1)[:, None, None, None]  # (B, 1, 1, 1)
            pixels = torch.where(masks >= 0, columns, -1)  # (B, T, H, W)
            return AlignedPixels(patches, text, pixels, batch.valid.any(1), comparable)
        label = torch.zeros(len(own), 1, dtype=torch.int64, device=own.device)
        inside, counted = patch_targets(masks, label, 1, patches.shape[2:4])  # (B, T, h, w, 1)
        own, comparable = own[:, None, None, None], comparable[:, None, None, None]
        targets = torch.where(own, inside, -1.0)  # (B, T, h, w, R*B)
        mask = counted & torch.where(own, True, comparable & (inside > 0))
        return Aligned(patches, text, targets, mask)

    def metric(self) -> RegionAndContour:
        """DAVIS's J, F and their mean."""
        return RegionAndContour(self)


class RegionAndContour:
    """J and F in percent: averaged over a clip's frames, then over clips; J&F is their mean.

    A pixel belongs to the thing if its similarity to the expression exceeds a threshold that lies
    between the lowest and the highest of the clip: any encoder can be measured, whatever its scale
    and bias. Of `THRESHOLDS` the one that suits the encoder best is taken, one for all clips.
    Pixels of which nothing is known are left out.
    """

    def __init__(self, objective: ReferringSegmentation) -> None:
        self.objective = objective
        self.values: list[Tensor] = []  # (thresholds, 2) per clip: J and F

    def update(self, features: FrameFeatures, batch: Batch, tower: TextTower) -> None:
        """Take in a batch."""
        patches, masks = self.objective.features(features, batch), masks_of(batch)
        text = tower.embed(batch.captions).to(patches.device)
        for i, valid in enumerate(batch.valid):
            frames = valid.nonzero().flatten()
            if not len(frames):
                continue
            scores = pixel_scores(patches[i, frames], text[i : i + 1], masks.shape[2:])
            scores, right = torch.cat(list(scores)).squeeze(1), masks[i, frames]  # (t, H, W)
            known = right != IGNORE
            if not known.any():
                continue
            low, high = scores[known].aminmax()
            right = (right > BACKGROUND) & known
            values = []
            for threshold in THRESHOLDS:
                found = (scores > low + threshold * (high - low)) & known
                region, contour = region_similarity(found, right), contour_accuracy(found, right)
                values.append(torch.stack([region.mean(), contour.mean()]))
            self.values.append(torch.stack(values).cpu())

    def compute(self) -> dict[str, float]:
        """``J``, ``F`` and ``J&F``, at the threshold with the highest J&F."""
        if not self.values:
            raise ValueError("no clip of the validation data has masks; J&F is undefined")
        means = 100 * torch.stack(self.values).double().mean(0)  # (thresholds, 2)
        region, contour = means[means.mean(1).argmax()].tolist()
        return {"J": region, "F": contour, "J&F": (region + contour) / 2}


def region_similarity(found: Tensor, right: Tensor) -> Tensor:
    """DAVIS's J of masks (T, H, W) bool: intersection over union, 1 where both are empty. (T,)."""
    both = (found & right).sum((1, 2))
    either = (found | right).sum((1, 2))
    return torch.where(either > 0, both / either.clamp_min(1), 1.0)


def contour_accuracy(found: Tensor, right: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """DAVIS's F of masks (T, H, W) bool. (T,).

    A border pixel is right if the other border has one within ``tolerance`` of the diagonal,
    rounded up to pixels. Without any border in one of the two its share counts as 1.
    """
    height, width = found.shape[1:]
    reach = math.ceil(tolerance * math.hypot(height, width))
    ours, theirs = borders(found), borders(right)
    precision = _share(ours & _widened(theirs, reach), ours)
    recall = _share(theirs & _widened(ours, reach), theirs)
    return 2 * precision * recall / (precision + recall).clamp_min(1e-12)


def borders(masks: Tensor) -> Tensor:
    """Pixels that differ from their neighbour to the right, below or diagonally below. (T, H, W).

    Past the last row and column the mask goes on as it ends.
    """
    padded = F.pad(masks[:, None].float(), (0, 1, 0, 1), mode="replicate")[:, 0] > 0
    right, below, diagonal = padded[:, :-1, 1:], padded[:, 1:, :-1], padded[:, 1:, 1:]
    return (masks ^ right) | (masks ^ below) | (masks ^ diagonal)


def _widened(borders: Tensor, reach: int) -> Tensor:
    """Every pixel within ``reach`` pixels of a border, (T, H, W) bool."""
    steps = torch.arange(-reach, reach + 1, device=borders.device)
    disc = (steps[:, None] ** 2 + steps**2 <= reach**2).float()
    return F.conv2d(borders[:, None].float(), disc[None, None], padding=reach)[:, 0] > 0


def _share(part: Tensor, whole: Tensor) -> Tensor:
    count = whole.sum((1, 2))
    return torch.where(count > 0, part.sum((1, 2)) / count.clamp_min(1), 1.0)
