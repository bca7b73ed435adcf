"""Losses of a MAT head (letters as in ``mat``), and its logits as probabilities.

One column of the targets may be ignored (frames that show an action, but not clearly): it is not
trained, and its rows do not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from integrations.oad.mat import MatOutput

FUTURE_LOSS_WEIGHT = 0.1
RARE_LOG_PENALTY = math.log(1e-8)  # what the equalised loss adds to a rare class's logit


def probabilities(
    logits: Tensor, ignore_index: int, softmax: Literal["trained", "released"] = "trained"
) -> Tensor:
    """Class probabilities (..., C) of logits (..., C).

    "trained": over the columns the loss has trained; the ignored column gets 0. "released": over
    all columns, as published numbers were scored, so that an untrained column takes a share. Half
    precision becomes float32.
    """
    if softmax not in ("trained", "released"):
        raise ValueError(f"softmax={softmax!r} is not one of ['released', 'trained']")
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if softmax == "trained" and ignore_index >= 0:
        hole = torch.zeros(logits.shape[-1], device=logits.device, dtype=logits.dtype)
        hole[ignore_index] = -math.inf
        logits = logits + hole
    return logits.softmax(-1)


def row_cross_entropy(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Multi-label cross entropy of each row.

    logits and target (..., C) -> losses (...) and kept (...) bool. The column ``ignore_index``
    takes no part, and rows that belong to it are not kept; a negative index keeps all. A row with
    two actions sums two terms.
    """
    kept = _kept_rows(target, ignore_index)
    log_p = _drop_column(logits, ignore_index).log_softmax(-1)
    return -(_drop_column(target, ignore_index).to(log_p.dtype) * log_p).sum(-1), kept


def cross_entropy(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Mean of ``row_cross_entropy`` over the kept rows; 0 with zero gradients if none is kept."""
    return _mean(*row_cross_entropy(logits, target, ignore_index))


@dataclass(frozen=True)
class EqualisedLoss:
    """Equalised cross entropy of EPIC-Kitchens: rare actions are not pushed down as negatives.

    ``rare`` (C,) bool marks the rare classes of the action target (training frequency below 1.76e-3
    in the release). With probability ``gamma``, drawn for each row and class, a rare class that is
    not the row's target leaves the softmax: log(1e-8) is added to its logit.
    """

    rare: Tensor
    gamma: float = 0.95

    def __post_init__(self):
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"EqualisedLoss: gamma={self.gamma} is not in [0, 1]")
        if self.rare.ndim != 1 or self.rare.dtype != torch.bool:
            found = f"{self.rare.dtype} {tuple(self.rare.shape)}"
            raise ValueError(f"EqualisedLoss: rare is {found}, expected torch.bool (C,)")

    def __call__(self, logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        """Mean over kept rows of logits and target (..., C), as ``cross_entropy``."""
        if logits.shape[-1] != len(self.rare):
            raise ValueError(f"{logits.shape[-1]} action columns, but rare has {len(self.rare)}")
        spared = (self.rare.to(logits.device) & (target == 0)).to(logits.dtype)
        if self.gamma < 1:
            spared = spared * (torch.rand_like(spared) < self.gamma)
        return cross_entropy(logits + RARE_LOG_PENALTY * spared, target, ignore_index)


def released_stage_weights(stages: int) -> tuple[float, ...]:
    """Weights of ``stages`` work stages in the released training: 0.2, then 0.8 i - 0.6.

    The last one grows with the number of refinements (1.0 at two, 1.8 at three).
    """
    return tuple(0.2 if i == 0 else 0.8 * i - 0.6 for i in range(stages))


def mat_loss(
    output: MatOutput,
    det_target: Tensor,
    fut_target: Tensor,
    ignore_index: int,
    *,
    stage_weights: Sequence[float] | None = None,
    future_weight: float = FUTURE_LOSS_WEIGHT,
    equalised: EqualisedLoss | None = None,
    verb_targets: tuple[Tensor, Tensor] | None = None,
    noun_targets: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the losses of all stages.

    det_target (B, W + A, C) and fut_target (B, F, C) are multi-hot. ``stage_weights`` has one
    weight per work stage, by default ``released_stage_weights``; ``future_weight`` counts for each
    future stage. ``equalised`` replaces the cross entropy of actions. ``verb_targets`` and
    ``noun_targets`` are pairs (B, W + A, V) and (B, F, V), weighted 1 and ``future_weight``.

    Returns the total and the unweighted, detached parts: work_0.., future_0.., verb, noun,
    future_verb, future_noun. A stage whose rows are all ignored has loss 0 and zero gradients.
    Raises ValueError where targets and output do not fit.
    """
    weights = released_stage_weights(len(output.work)) if stage_weights is None else stage_weights
    if len(weights) != len(output.work):
        raise ValueError(f"stage_weights={weights} for {len(output.work)} work stages")
    action = cross_entropy if equalised is None else equalised
    terms = [
        (f"work_{i}", weight, action, logits, det_target)
        for i, (weight, logits) in enumerate(zip(weights, output.work, strict=True))
    ]
    terms += [
        (f"future_{j}", future_weight, action, logits, fut_target)
        for j, logits in enumerate(output.future)
    ]
    if verb_targets is not None:
        now, ahead = verb_targets
        terms.append(("verb", 1.0, cross_entropy, output.verb, now))
        terms.append(("future_verb", future_weight, cross_entropy, output.future_verb, ahead))
    if noun_targets is not None:
        now, ahead = noun_targets
        terms.append(("noun", 1.0, cross_entropy, output.noun, now))
        terms.append(("future_noun", future_weight, cross_entropy, output.future_noun, ahead))
    total, parts = 0.0, {}
    for name, weight, loss, logits, target in terms:
        if logits is None or logits.shape != target.shape:
            found = None if logits is None else tuple(logits.shape)
            raise ValueError(f"{name}: logits are {found}, target is {tuple(target.shape)}")
        value = loss(logits, target, ignore_index)
        total = total + weight * value
        parts[name] = value.detach()
    return total, parts


def _kept_rows(target: Tensor, ignore_index: int) -> Tensor:
    if ignore_index < 0:
        return torch.ones(target.shape[:-1], dtype=torch.bool, device=target.device)
    return target[..., ignore_index] != 1


def _drop_column(x: Tensor, index: int) -> Tensor:
    if index < 0:
        return x
    if index in (0, x.shape[-1] - 1):  # the usual places: a view
        return x[..., 1:] if index == 0 else x[..., :-1]
    return torch.cat([x[..., :index], x[..., index + 1 :]], dim=-1)


def _mean(losses: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, losses, 0.0).sum() / kept.sum().clamp(min=1)
