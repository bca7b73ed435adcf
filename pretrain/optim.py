"""Learning rate by update, and which parameters decay."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

from pretrain.config import Decay, OptimConfig

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
    parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float, decay: Decay
) -> list[dict]:
    """Two groups of the trainable parameters: with weight decay and without.

    "matrices" decays weights of linear maps alone. "released" decays everything but biases and
    vectors, so also tables of positions and times, the probe, the gates, log scale and bias.
    """
    groups = {True: [], False: []}
    for name, weight in parameters:
        if not weight.requires_grad:
            continue
        if decay == "released":
            scalar = name in ("log_scale", "bias")  # zero-dimensional there
            decays = scalar or (weight.ndim != 1 and not name.endswith("bias"))
        else:
            decays = weight.ndim >= 2 and not name.endswith(_TABLES)
        groups[decays].append(weight)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]
