"""Learning rate by update, which parameters decay, and which learn at a rate of their own."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

from pretrain.config import Decay, OptimConfig
from pretrain.model import is_temporal

_TABLES = ("position_embedding", "time_embedding", "probe")


def learning_rate(optim: OptimConfig, update: int, clips_per_update: int) -> float:
    """Rate of update 0, 1, …: linear warm-up to the peak, then a cosine over all that remain.

    Both ends of the warm-up are used: its first update has ``warmup_lr``, its last the peak.
    """
    factor = clips_per_update / 256 if optim.scale_lr else 1.0
    peak, low, start = optim.lr * factor, optim.min_lr * factor, optim.warmup_lr * factor
    if update < optim.warmup_updates:
        return start + (peak - start) * update / max(optim.warmup_updates - 1, 1)
    done = (update - optim.warmup_updates) / max(optim.updates - optim.warmup_updates, 1)
    return low + (peak - low) / 2 * (1 + math.cos(math.pi * done))


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    decay: Decay,
    temporal_lr_scale: float = 1.0,
) -> list[dict]:
    """The trainable parameters in groups: with weight decay and without.

    "matrices" decays weights of linear maps alone. "released" decays everything but biases and
    vectors, so also tables of positions and times, the probe, the gates, log scale and bias.
    Each group's ``lr_scale`` is what the rate is multiplied by; with a ``temporal_lr_scale`` that
    is not 1, what the lift adds makes groups of its own.
    """
    scales = dict.fromkeys((1.0, temporal_lr_scale))
    groups = {(decays, scale): [] for decays in (True, False) for scale in scales}
    for name, weight in parameters:
        if weight.requires_grad:
            scale = temporal_lr_scale if is_temporal(name) else 1.0
            groups[_decays(name, weight, decay), scale].append(weight)
    return [
        {"params": weights, "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale}
        for (decays, scale), weights in groups.items()
        if weights
    ]


def _decays(name: str, weight: nn.Parameter, decay: Decay) -> bool:
    if decay == "released":
        scalar = name in ("log_scale", "bias")  # zero-dimensional there
        return scalar or (weight.ndim != 1 and not name.endswith("bias"))
    return weight.ndim >= 2 and not name.endswith(_TABLES)
