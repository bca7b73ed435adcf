"""The alignment loss: features against texts, one formula for every granularity.

    logits = scale * <f / |f|, t / |t|> + bias
    loss   = -log sigmoid(target * logits)            target in {-1, +1}

summed over the texts and averaged over the positions. This is the pairwise sigmoid loss of SigLIP
(Zhai et al. 2023, section 3.1) with StreamFormer's three kinds of positions (section 3.2):

    global    features (B, D)           targets (B, C)           one position per clip
    temporal  features (B, T, D)        targets (B, T, C)        one per frame
    spatial   features (B, T, h, w, D)  targets (B, T, h, w, C)  one per patch

Legend: `B` clips, `T` frames, `h w` patch grid, `D` width, `C` texts, `R` ranks.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["mean", "sample_sum", "sum", "none"]


def similarity(features: Tensor, text: Tensor, *, normalize_text: bool = True) -> Tensor:
    """Cosine similarity of every position with every text.

    features: (B, …, D). text: (C, D), one set for all, or (B, C, D), one set per sample.
    ``normalize_text=False`` uses the texts' own lengths, as the released heads do with the mean
    of an ensemble of prompts. Returns (B, …, C), float32.

    Computed in float32 whatever the inputs or autocast say: a SigLIP scale is about 117, so the
    spacing of bfloat16 just below a cosine of 1 (2**-8) would move a logit by 0.46.
    """
    if features.shape[-1] != text.shape[-1]:
        raise ValueError(
            f"features have width {features.shape[-1]} and texts {text.shape[-1]}: backbone and "
            "text tower must come from the same SigLIP model"
        )
    if text.ndim not in (2, 3) or (text.ndim == 3 and len(text) != len(features)):
        raise ValueError(
            f"text must be (C, D) or (B, C, D), not {tuple(text.shape)} for features "
            f"{tuple(features.shape)}"
        )
    with torch.autocast(features.device.type, enabled=False):
        features = F.normalize(features.float(), dim=-1)
        text = text.float()
        if normalize_text:
            text = F.normalize(text, dim=-1)
        if text.ndim == 2:
            return features @ text.T  # (B, …, C)
        positions = features.flatten(1, -2) if features.ndim > 2 else features[:, None]  # (B, P, D)
        return (positions @ text.transpose(1, 2)).view(*features.shape[:-1], -1)  # (B, …, C)


def alignment_loss(
    features: Tensor,
    text: Tensor,
    targets: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    *,
    normalize_text: bool = True,
) -> Tensor:
    """Sigmoid loss of features (B, …, D) against text (C, D) or (B, C, D), see the file's head.

    targets: (B, …, C) of -1 and +1. mask: bool, broadcastable to the targets; where it is False
    the pair of position and text does not count, and a position without any pair is not averaged.
    scale: the factor itself (exp of the trained logarithm); bias is added to the scaled cosine.

    reduction, always after the sum over texts:
      "mean"        mean over the positions that count (recognition, retrieval, localization)
      "sample_sum"  sum over a sample's positions, mean over samples: the released grounding head,
                    which thereby weighs T times as much as localization
      "sum"         sum over everything
      "none"        one value per position, (B, …)

    Means are over what counts on all ranks, divided among them: the mean of the ranks' losses is
    the loss of one process that has all their clips. So all ranks have to call.

    Returns float32; exactly 0, still attached to the graph, if nothing counts.
    """
    cosine = similarity(features, text, normalize_text=normalize_text)  # (B, …, C)
    if targets.shape != cosine.shape:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}; features {tuple(features.shape)} against "
            f"text {tuple(text.shape)} need {tuple(cosine.shape)}"
        )
    with torch.autocast(features.device.type, enabled=False):
        loss = -F.logsigmoid(targets * (scale * cosine + bias))  # (B, …, C)
        if mask is not None:
            loss = torch.where(mask, loss, 0.0)
        loss = loss.sum(-1)  # (B, …)
        if reduction == "none":
            return loss
        if reduction == "sum":
            return loss.sum()
        counts = torch.ones_like(loss) if mask is None else mask.expand_as(targets).any(-1).float()
        if reduction == "mean":
            return loss.sum() / rank_share(counts.sum())
        if reduction == "sample_sum":
            samples = counts.flatten(1).amax(1) if counts.ndim > 1 else counts  # (B,)
            return loss.sum() / rank_share(samples.sum())
    raise ValueError(
        f"reduction={reduction!r} is unknown; use 'mean', 'sample_sum', 'sum' or 'none'"
    )


def softmax_loss(
    features: Tensor,
    text: Tensor,
    pixels: Tensor,
    scale: Tensor | float,
    mask: Tensor | None = None,
    *,
    normalize_text: bool = True,
) -> Tensor:
    """The released spatial loss: which of the texts names a pixel? One value per sample, (B,).

    Logits of the patches, ``scale * cosine``, are resized to the pixels (bilinear), and cross
    entropy is taken over the texts, a mean over the pixels that have an answer. A sample without
    any gives 0. Nothing tells a patch that no text fits: the default is `alignment_loss`.

    features: (B, T, h, w, D). text: (C, D) or (B, C, D). pixels: (B, T, H, W) int64, the row of
    the text that is right, -1 for no answer. mask: (B, C) bool, False for texts that take no part.
    Computed a sample at a time: T * C * H * W logits are what fills the memory.
    """
    cosine = similarity(features, text, normalize_text=normalize_text)  # (B, T, h, w, C)
    if pixels.shape[:2] != cosine.shape[:2] or pixels.ndim != 4:
        raise ValueError(
            f"pixels have shape {tuple(pixels.shape)}; features {tuple(features.shape)} need "
            f"({cosine.shape[0]}, {cosine.shape[1]}, H, W)"
        )
    losses = []
    with torch.autocast(features.device.type, enabled=False):
        for i, answers in enumerate(pixels):  # (T, H, W)
            logits = (scale * cosine[i]).permute(0, 3, 1, 2)  # (T, C, h, w)
            if mask is not None:
                logits = logits.masked_fill(~mask[i, :, None, None], -1e4)
            logits = F.interpolate(logits, answers.shape[1:], mode="bilinear", align_corners=False)
            loss = F.cross_entropy(logits, answers, ignore_index=-1, reduction="sum")
            losses.append(loss / (answers >= 0).sum().clamp_min(1))
    return torch.stack(losses)


def contrastive_pairs(captions: Tensor, videos: Tensor, batch: int, rank: int = 0) -> tuple:
    """Targets and mask of one rank's clips against the captions of all ranks.

    captions, videos: (R * B,) integers naming caption and video of every pair, rank-major, as
    `gather_ranks` returns them; the clips are rows ``rank * batch`` onwards. Returns targets
    (B, R * B), +1 for a clip's own caption and -1 for all others, and a bool mask of that shape,
    False where the "wrong" caption has the same words or describes the same video.

    Closed form of SigLIP's exchange between neighbours: its rounds only bring every remote text
    to every rank once, and the text tower is frozen, so no gradient travels. The mean over ranks
    is the loss of one process holding the whole batch.
    """
    total = captions.shape[0]
    if videos.shape != captions.shape or total % batch or not 0 <= rank < total // batch:
        raise ValueError(
            f"{total} captions and {videos.shape[0]} videos do not make whole ranks of {batch} "
            f"pairs holding rank {rank}; every rank must bring as many texts as clips"
        )
    rows = torch.arange(rank * batch, (rank + 1) * batch, device=captions.device)  # (B,)
    own = rows[:, None] == torch.arange(total, device=captions.device)  # (B, R*B)
    same = (captions[rows, None] == captions) | (videos[rows, None] == videos)
    return own * 2.0 - 1.0, own | ~same


def rank_share(count: Tensor) -> Tensor:
    """What to divide a rank's sum by, given its count (), so that the mean over ranks is right.

    The mean of all ranks' counts; 1 if nothing counts anywhere.
    """
    if _ranks() > 1:
        count = count.clone()
        dist.all_reduce(count)
        count /= _ranks()
    return torch.where(count > 0, count, 1.0)


def gather_ranks(tensor: Tensor) -> Tensor:
    """Concatenate (B, …) of every rank to (R * B, …), rank-major; without a process group, as is.

    Carries no gradient. All ranks must bring the same shape.
    """
    if _ranks() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(_ranks())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
