"""What the spatial tasks share: patch embeddings on their grid, masks pooled to it, read-outs.

A mask is finer than the patch grid. A patch belongs to a thing if at least half as much of it is
covered as of the best covered patch of that frame: within a large thing every patch that it covers
by half, and a thing smaller than a patch still has one. Patches that a thing only touches count
neither for it nor against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone import FrameFeatures
from pretrain.alignment import similarity
from pretrain.datasets import Batch
from pretrain.datasets.masks import IGNORE

SpatialLoss = Literal["sigmoid", "softmax"]
OVERLAP = 0.5  # of what covers the best covered patch
SPECK = 1 / 16  # of a patch; less of a thing has no patch of its own
_LOGITS = 2**25  # similarities of pixels held at a time


def check_loss(loss: str) -> None:
    """Refuse an unknown spatial loss by name."""
    if loss not in get_args(SpatialLoss):
        raise ValueError(
            f"spatial_loss={loss!r} is unknown; use 'sigmoid', or 'softmax' as released"
        )


def dense_embeddings(features: FrameFeatures, batch: Batch) -> Tensor:
    """The patches in the space of texts, on their grid: (B, T, h, w, D)."""
    patches = features.patch_embeddings()  # (B, T, N, D)
    height, width = batch.frames.shape[-2:]
    rows = round((patches.shape[2] * height / width) ** 0.5)
    if rows == 0 or patches.shape[2] % rows or height % rows:
        raise ValueError(
            f"{patches.shape[2]} patches make no grid over frames of {height} x {width} pixels"
        )
    return patches.unflatten(2, (rows, -1))


def masks_of(batch: Batch) -> Tensor:
    """The batch's masks (B, T, H, W), IGNORE where frames are padding."""
    if batch.masks is None:
        if not batch.valid.any():  # not a single clip could be decoded
            size = (*batch.valid.shape, *batch.frames.shape[-2:])
            return torch.full(size, IGNORE, dtype=torch.int32, device=batch.valid.device)
        raise ValueError(
            "the batch has no masks; spatial tasks need a reader of masks, such as 'instances'"
        )
    return batch.masks.masked_fill(~batch.valid[..., None, None], IGNORE)


def columns_of(masks: Tensor, columns: Tensor, count: int) -> Tensor:
    """Label numbers to columns of the texts: (B, T, H, W) int64, -1 for those without a column.

    masks: (B, T, H, W) of label numbers. columns: (B, C), each column's label number, or -1 for a
    column that stands for none. count: label numbers are below it.
    """
    table = masks.new_full((len(columns), count + 1), -1, dtype=torch.int64)
    places = torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
    table.scatter_(1, torch.where(columns < 0, count, columns), places)
    table[:, count] = -1  # background, unknown, and columns that stand for none
    where = torch.where(masks < 0, count, masks).long().flatten(1)
    return table.gather(1, where).view(masks.shape)


def patch_targets(
    masks: Tensor, columns: Tensor, count: int, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Targets of patches and which pairs count, both (B, T, h, w, C).

    Targets are +1 where a column's thing is (see the file's head), else -1. A pair counts unless
    the thing only touches the patch, or most of the patch is unknown.

    masks: (B, T, H, W). columns, count: as for `columns_of`. grid: (h, w). Counting takes one
    pass over the pixels, whatever the number of columns.
    """
    rows, width = grid
    batch, steps, high, wide = masks.shape
    if high % rows or wide % width:
        raise ValueError(f"masks of {high} x {wide} pixels do not divide into {rows} x {width}")
    size = columns.shape[1]
    bins = columns_of(masks, columns, count)
    bins = torch.where(bins < 0, size, bins).masked_fill_(masks == IGNORE, size + 1)
    bins = bins.view(batch, steps, rows, high // rows, width, wide // width)
    bins = bins.transpose(3, 4).flatten(4)  # (B, T, h, w, pixels of a patch)
    counts = torch.zeros(*bins.shape[:4], size + 2, device=masks.device)
    counts.scatter_add_(4, bins, torch.ones((), device=masks.device).expand(bins.shape))
    known = bins.shape[4] - counts[..., -1:]  # (B, T, h, w, 1)
    shares = counts[..., :size] / known.clamp_min(1)  # (B, T, h, w, C)
    best = shares.amax((2, 3), keepdim=True)
    inside = shares >= (OVERLAP * best).clamp_min(SPECK)
    counted = (inside | (shares == 0)) & (2 * known >= bins.shape[4])
    return inside * 2.0 - 1.0, counted


def pixel_scores(patches: Tensor, text: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
    """Cosine of a clip's pixels with texts, a few frames at a time: (t, C, H, W), T in all.

    patches: (T, h, w, D). text: (C, D). Patches are resized to ``size`` bilinearly.
    """
    scores = similarity(patches, text).permute(0, 3, 1, 2)  # (T, C, h, w)
    step = max(_LOGITS // (scores.shape[1] * size[0] * size[1]), 1)
    for part in scores.split(step):
        yield F.interpolate(part, size, mode="bilinear", align_corners=False)
