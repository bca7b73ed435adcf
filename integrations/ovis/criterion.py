"""Which query stands for which object, and what it costs: matching and losses of Mask2Former.

Mask2Former (CVPR 2022, section 3 and its supplement): each frame's objects are assigned to queries
one to one, at the least cost of class, mask cross-entropy and dice, the latter two on sampled
points; the losses are the same three, on points drawn where a mask is uncertain. Every layer's
prediction is matched and supervised. The match of the last layer is handed on: tracking learns on
the very queries that detection was taught with, where the original matches a second time, on other
points and on masks without the padding that predictions have.

Everything is flat: a row for each object that a frame shows, over all frames of all clips, so that
a whole batch costs one pass per layer and not one per frame.

Letters: B clips, T frames, F = B*T, Q queries, C classes, n instances of a clip, M rows (objects
shown), N most objects of a frame, P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers.models.mask2former.modeling_mask2former import (
    dice_loss,
    sample_point,
    sigmoid_cross_entropy_loss,
)

from integrations.ovis.head import HeadOutput, Prediction

STRIDE = 4  # pixels of the frame per cell of a predicted mask
UNMATCHED = -1
AT_ONCE = 2**25  # values that matching samples at once: bounds memory, changes no result


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the losses, which are those of the matching costs too, and point sampling.

    Attributes:
        class_weight, mask_weight, dice_weight: of the three costs and losses.
        no_object_weight: of the class "no object" in the class loss.
        num_points: ``P``.
        oversampling: as many times more points are drawn, to choose the uncertain ones among.
        importance: share of the points chosen for their uncertainty; the others are uniform.
    """

    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object_weight: float = 0.1
    num_points: int = 12544
    oversampling: float = 3.0
    importance: float = 0.75

    def __post_init__(self) -> None:
        for name in ("class_weight", "mask_weight", "dice_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"loss {name}={getattr(self, name)} is negative")
        if not self.no_object_weight > 0:
            raise ValueError(
                f"loss no_object_weight={self.no_object_weight}: a batch without objects needs a "
                "weight above 0"
            )
        if self.num_points < 1 or self.oversampling < 1 or not 0 <= self.importance <= 1:
            raise ValueError(
                f"loss num_points={self.num_points}, oversampling={self.oversampling}, "
                f"importance={self.importance}: needs at least 1, at least 1, and a share"
            )

    def to_dict(self) -> dict[str, float]:
        """Plain values."""
        return asdict(self)


# -- targets --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipTargets:
    """Instances of one clip; an instance keeps its index in all frames, shown or not.

    Attributes:
        labels: ``(n,)`` int64, class of each instance, from 0.
        masks: ``(n, T, H, W)`` bool, in the size of the padded frames; all False where absent.
    """

    labels: Tensor
    masks: Tensor

    def __post_init__(self) -> None:
        if self.masks.ndim != 4 or self.labels.shape != self.masks.shape[:1]:
            raise ValueError(
                f"labels of shape {tuple(self.labels.shape)} and masks of shape "
                f"{tuple(self.masks.shape)}; expected (n,) and (n, T, H, W)"
            )
        if self.masks.dtype != torch.bool:
            raise ValueError(f"masks of type {self.masks.dtype}; expected bool")

    @property
    def present(self) -> Tensor:
        """Where each instance is shown, ``(T, n)`` bool."""
        return self.masks.flatten(2).any(-1).T


@dataclass(frozen=True)
class FrameTargets:
    """All objects that a batch of clips shows, frame by frame.

    Attributes:
        frames: ``(M,)`` int64, the frame that shows the object, ascending.
        labels: ``(M,)`` int64.
        masks: ``(M, H, W)`` float, 0 or 1.
        num_frames: ``F``.
        present: ``(T, n)`` bool of each clip; its True entries, clip by clip, are the rows.
    """

    frames: Tensor
    labels: Tensor
    masks: Tensor
    num_frames: int
    present: tuple[Tensor, ...]

    @classmethod
    def of(cls, clips: Sequence[ClipTargets]) -> FrameTargets:
        """Flatten clips of equal length and size.

        Raises:
            ValueError: no clips, or of different lengths or sizes.
        """
        if len({clip.masks.shape[1:] for clip in clips}) != 1:
            sizes = [tuple(clip.masks.shape[1:]) for clip in clips]
            raise ValueError(f"clips of (frames, height, width) {sizes}; needs one for all")
        present = tuple(clip.present for clip in clips)
        length = clips[0].masks.shape[1]
        frames, labels, masks = [], [], []
        for number, (clip, shown) in enumerate(zip(clips, present, strict=True)):
            at, instance = shown.nonzero(as_tuple=True)
            frames.append(number * length + at)
            labels.append(clip.labels[instance])
            masks.append(clip.masks[instance, at].float())
        count = len(clips) * length
        return cls(torch.cat(frames), torch.cat(labels), torch.cat(masks), count, present)

    def by_clip(self, queries: Tensor) -> list[Tensor]:
        """From a query per row, ``(M,)``, to one per frame and instance of each clip.

        Returns:
            ``(T, n)`` int64 for each clip; -1 where the instance is absent or has no query.
        """
        rows = queries.split([int(shown.sum()) for shown in self.present])
        result = []
        for shown, found in zip(self.present, rows, strict=True):
            full = torch.full_like(shown, UNMATCHED, dtype=torch.int64)
            full[shown] = found
            result.append(full)
        return result


# -- matching -------------------------------------------------------------------------------------


@torch.no_grad()
def match(prediction: Prediction, targets: FrameTargets, config: LossConfig) -> Tensor:
    """Assign the objects of each frame to its queries, one to one, at the least cost.

    Args:
        prediction: of ``F`` frames.
        targets: of the same frames.
        config: weights and number of points.

    Returns:
        ``(M,)`` int64: the query of each object; -1 where a frame shows more objects than queries.
    """
    device = prediction.mask_logits.device
    points = torch.rand(targets.num_frames, config.num_points, 2, device=device)
    queries = torch.full_like(targets.frames, UNMATCHED)
    if not len(queries):
        return queries
    counts = torch.bincount(targets.frames, minlength=targets.num_frames)
    slots = torch.arange(len(queries), device=device)
    slots = slots - (counts.cumsum(0) - counts)[targets.frames]  # (M,) number within the frame
    most, counts = int(counts.max()), counts.tolist()
    step = max(1, AT_ONCE // (prediction.mask_logits.shape[1] * config.num_points))
    for start in range(0, targets.num_frames, step):
        part = slice(start, start + step)
        rows = (targets.frames >= start) & (targets.frames < start + step)
        places = (targets.frames[rows] - start, slots[rows])
        costs = _costs(prediction, targets, config, part, rows, places, most, points)
        assigned = [_assign(c[:, :n]) for c, n in zip(costs.cpu(), counts[part], strict=True)]
        queries[rows] = torch.cat(assigned).to(device)
    return queries


def _costs(
    prediction: Prediction,
    targets: FrameTargets,
    config: LossConfig,
    part: slice,
    rows: Tensor,
    places: tuple[Tensor, Tensor],
    most: int,
    points: Tensor,
) -> Tensor:
    """Cost of each query for each object of the frames in ``part``, ``(f, Q, N)``.

    Cross-entropy of logits x with a 0-1 mask t is softplus(x) - t x, so one product gives all.
    """
    with torch.autocast(points.device.type, enabled=False):
        logits = prediction.mask_logits[part].float()
        logits = sample_point(logits, points[part], align_corners=False)  # (f, Q, P)
        masks = targets.masks[rows][:, None]
        own = sample_point(masks, points[targets.frames[rows]], align_corners=False)  # (m, 1, P)
        shown = logits.new_zeros(len(logits), most, points.shape[1])  # (f, N, P)
        shown[places] = own[:, 0]
        labels = targets.labels.new_zeros(len(logits), most)  # (f, N)
        labels[places] = targets.labels[rows]

        shown = shown.transpose(1, 2)  # (f, P, N)
        entropy = F.softplus(logits).sum(-1, keepdim=True) - logits @ shown
        share = logits.sigmoid()
        overlap, area = share @ shown, share.sum(-1, keepdim=True) + shown.sum(1, keepdim=True)
        classes = prediction.class_logits[part].float().softmax(-1)  # (f, Q, C + 1)
        chance = classes.gather(2, labels[:, None].expand(-1, classes.shape[1], -1))
        return (
            config.mask_weight * entropy / points.shape[1]
            + config.dice_weight * (1 - (2 * overlap + 1) / (area + 1))
            - config.class_weight * chance
        )


def _assign(costs: Tensor) -> Tensor:
    """Query of each object for costs ``(Q, n)``; what is not finite comes last, not to a crash."""
    worst = torch.finfo(costs.dtype).max
    found, objects = linear_sum_assignment(torch.nan_to_num(costs, worst, worst, worst).numpy())
    queries = torch.full((costs.shape[1],), UNMATCHED)
    queries[torch.from_numpy(objects)] = torch.from_numpy(found)
    return queries


# -- losses ---------------------------------------------------------------------------------------


class Supervision(NamedTuple):
    """What a batch costs.

    Attributes:
        losses: weighted; "loss_class", "loss_mask", "loss_dice" of the last layer, and
            "loss_aux_class", … summed over all layers before it.
        queries: the last layer's match, as of ``match``.
    """

    losses: dict[str, Tensor]
    queries: Tensor


def supervise(output: HeadOutput, targets: FrameTargets, config: LossConfig) -> Supervision:
    """Match and supervise the predictions of all layers.

    Args:
        output: the head's, of ``F`` frames.
        targets: of the same frames; a batch without objects is fine.
        config: weights and point sampling.

    Raises:
        ValueError: targets of other frames or sizes than the predictions, or of classes that
            these do not have.
    """
    _check(output, targets)
    count = _mean_over_ranks(len(targets.frames), output.mask_logits.device)
    losses: dict[str, Tensor] = {}
    for layer in output.auxiliary:
        parts, _ = _layer_losses(layer, targets, config, count)
        for name, value in parts.items():
            name = f"loss_aux_{name}"
            losses[name] = losses[name] + value if name in losses else value
    parts, queries = _layer_losses(output, targets, config, count)
    losses |= {f"loss_{name}": value for name, value in parts.items()}
    return Supervision(losses, queries)


def _layer_losses(
    prediction: Prediction, targets: FrameTargets, config: LossConfig, count: float
) -> tuple[dict[str, Tensor], Tensor]:
    queries = match(prediction, targets, config)
    with torch.autocast(prediction.mask_logits.device.type, enabled=False):
        mask, dice = mask_losses(prediction.mask_logits, targets, queries, config, count)
        classes = class_loss(prediction.class_logits, targets, queries, config)
    return {
        "class": config.class_weight * classes,
        "mask": config.mask_weight * mask,
        "dice": config.dice_weight * dice,
    }, queries


def class_loss(
    class_logits: Tensor, targets: FrameTargets, queries: Tensor, config: LossConfig
) -> Tensor:
    """Cross-entropy of all queries ``(F, Q, C + 1)``; those without an object show none."""
    nothing = class_logits.shape[-1] - 1
    wanted = targets.labels.new_full(class_logits.shape[:2], nothing)  # (F, Q)
    matched = queries != UNMATCHED
    wanted[targets.frames[matched], queries[matched]] = targets.labels[matched]
    weights = class_logits.new_ones(nothing + 1, dtype=torch.float32)
    weights[nothing] = config.no_object_weight
    return F.cross_entropy(class_logits.float().flatten(0, 1), wanted.flatten(), weights)


def mask_losses(
    mask_logits: Tensor, targets: FrameTargets, queries: Tensor, config: LossConfig, count: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and dice of the matched queries' masks, on points.

    Args:
        mask_logits: ``(F, Q, h, w)``.
        targets: of the same frames.
        queries: ``(M,)``, from ``match``.
        config: point sampling.
        count: what the sums are divided by: objects per rank, at least 1.
    """
    matched = queries != UNMATCHED
    logits = mask_logits[targets.frames[matched], queries[matched]].float()[:, None]
    masks = targets.masks[matched][:, None]  # (M, 1, H, W)
    with torch.no_grad():
        points = uncertain_points(logits, config)
        wanted = sample_point(masks, points, align_corners=False).squeeze(1)  # (M, P)
    found = sample_point(logits, points, align_corners=False).squeeze(1)
    return sigmoid_cross_entropy_loss(found, wanted, count), dice_loss(found, wanted, count)


def uncertain_points(logits: Tensor, config: LossConfig) -> Tensor:
    """Points ``(M, P, 2)`` in [0, 1], (x, y), mostly where masks ``(M, 1, h, w)`` are undecided."""
    rows, device = len(logits), logits.device
    drawn = torch.rand(rows, int(config.num_points * config.oversampling), 2, device=device)
    undecided = -sample_point(logits, drawn, align_corners=False).squeeze(1).abs()
    chosen = undecided.topk(int(config.importance * config.num_points), dim=1).indices
    points = drawn.gather(1, chosen[..., None].expand(-1, -1, 2))
    others = torch.rand(rows, config.num_points - points.shape[1], 2, device=device)
    return torch.cat((points, others), 1)


def _mean_over_ranks(rows: int, device: torch.device) -> float:
    """Objects per process, at least 1: all ranks divide by the same number."""
    if not (dist.is_available() and dist.is_initialized()):
        return float(max(rows, 1))
    total = torch.tensor(float(rows), device=device)
    dist.all_reduce(total)
    return max(total.item() / dist.get_world_size(), 1.0)


def _check(output: HeadOutput, targets: FrameTargets) -> None:
    frames, _, height, width = output.mask_logits.shape
    size = (STRIDE * height, STRIDE * width)
    if frames != targets.num_frames or tuple(targets.masks.shape[1:]) != size:
        raise ValueError(
            f"targets of {targets.num_frames} frames of {tuple(targets.masks.shape[1:])} pixels "
            f"for predictions of {frames} frames of {size}; pad masks as the frames were padded"
        )
    classes = output.class_logits.shape[-1] - 1
    if (
        len(targets.labels)
        and not 0 <= int(targets.labels.min()) <= int(targets.labels.max()) < classes
    ):
        raise ValueError(
            f"labels {int(targets.labels.min())} to {int(targets.labels.max())}; the head knows "
            f"classes 0 to {classes - 1}"
        )
