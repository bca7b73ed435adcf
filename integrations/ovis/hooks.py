"""What training by iterations needs beside ``integrations.runs``: a loop, seeds, a bar.

Also the optimiser's groups and the learning-rate curve, from plain values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn

from integrations.runs import Bar, seed_all


class ClipLoop(IterBasedTrainLoop):
    """mmengine's loop over iterations, for batches that begin where a resumed run stands.

    mmengine would read all batches that were trained on before, only to drop them.
    """

    def run(self) -> nn.Module:
        """Train from the present iteration to the last."""
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        validates = self.runner.val_loop is not None
        while self._iter < self._max_iters:
            self.runner.model.train()
            self.run_iter(next(self.dataloader_iterator))
            if validates and self._iter % self.val_interval == 0:
                self.runner.val_loop.run()
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model


class IterationSeed(Hook):
    """Start every iteration from a random state of its own, drawn from (seed, iteration).

    So a resumed run draws the same points as one that was never interrupted.
    """

    priority = "VERY_HIGH"

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """Seed Python, NumPy and torch."""
        seed_all(runner.seed, runner.iter)


class IterationBar(Bar):
    """A bar on stderr: iterations with the loss, then the videos of each evaluated set."""

    batch = "video"

    def before_train(self, runner: Runner) -> None:
        """Open the bar where training starts or goes on."""
        self.open("training", runner.max_iters, "step", runner.iter)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: object = None,
        outputs: Mapping | None = None,
    ) -> None:
        """Advance."""
        self.bar.set_postfix({"loss": f"{outputs['loss'].item():.2f}"}, refresh=False)
        self.bar.update()


class SegmenterOptimizer:
    """AdamW over what trains, in few groups; norms and embeddings do not decay.

    Args:
        optim_wrapper_cfg: holds ``lr``, ``weight_decay``, ``rates`` (start of a weight's name ->
            factor of its learning rate), ``clip_norm`` and ``precision``.
        paramwise_cfg: mmengine's; not used.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        self.options = {k: v for k, v in optim_wrapper_cfg.items() if k != "type"}

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Wrap an optimiser of the model's parameters."""
        options = self.options
        groups = parameter_groups(model, options["lr"], options["weight_decay"], options["rates"])
        optimizer = torch.optim.AdamW(groups, lr=options["lr"], fused=True)
        clip = {"max_norm": options["clip_norm"]}
        if options["precision"] == "float32":
            return OptimWrapper(optimizer, clip_grad=clip)
        return AmpOptimWrapper(dtype=options["precision"], optimizer=optimizer, clip_grad=clip)


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Groups for an optimiser: a learning rate by name, decay by kind.

    Args:
        model: its parameters that require gradients are taken.
        lr: of all that ``rates`` does not name.
        weight_decay: of all but norms and embeddings.
        rates: start of a parameter's name -> factor of ``lr``; the longest start counts.

    Raises:
        ValueError: a start that no trained parameter has.
    """
    spared = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.Embedding)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    used = set()
    for owner, module in model.named_modules():
        for name, parameter in module.named_parameters(owner, recurse=False):
            if not parameter.requires_grad:
                continue
            starts = [start for start in rates if name.startswith(start)]
            used.update(starts)
            rate = lr * rates[max(starts, key=len)] if starts else lr
            decay = 0.0 if isinstance(module, spared) else weight_decay
            groups.setdefault((rate, decay), []).append(parameter)
    unused = [start for start in rates if start not in used]
    if unused:
        raise ValueError(
            f"train.rates: no trained weight's name starts with {unused[0]!r}; they start with "
            "adapter., head.pixel_decoder., head.transformer., head.class_predictor., "
            "head.embedder."
        )
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def learning_rate_curve(
    schedule: str, iterations: int, milestones: tuple[int, ...], warmup: int
) -> list[dict[str, Any]]:
    """Parameter schedulers of mmengine for a curve: "step" by tenths, or "cosine" to zero."""
    if schedule == "cosine":
        curve = {"type": "CosineAnnealingLR", "T_max": iterations, "by_epoch": False}
    else:
        curve = {"type": "MultiStepLR", "milestones": list(milestones), "by_epoch": False}
    if not warmup:
        return [curve]
    start = {"type": "LinearLR", "start_factor": 1 / warmup, "by_epoch": False, "end": warmup}
    return [start, curve]
