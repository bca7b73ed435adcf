"""What mmengine's own hooks leave open: an exact average, seeds, a quiet bar.

Also the learning-rate curve of the release, as an mmengine parameter scheduler.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from mmaction.registry import HOOKS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIMIZERS, PARAM_SCHEDULERS
from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapper, _ParamScheduler
from mmengine.runner import Runner
from torch import nn

from integrations.runs import Bar, seed_all


@HOOKS.register_module()
class AverageWeights(EMAHook):
    """Exponential moving average that starts from the initial weights, as in MAT.

    ``average += momentum * (weights - average)`` after every optimiser step. mmengine's own hook
    copies the weights at the first step instead; this one also updates all parameters by one call.
    Validation and test run on the average; a checkpoint holds it as ``state_dict`` and the raw
    weights in ``ema_state_dict``.
    """

    def __init__(self, momentum: float = 0.001) -> None:
        super().__init__(momentum=momentum)
        self.momentum = momentum
        self.ema_model = None

    def before_run(self, runner: Runner) -> None:
        """Make the average once: training and test of one runner share it."""
        if self.ema_model is None:
            super().before_run(runner)

    def before_train(self, runner: Runner) -> None:
        """Start from the weights that training starts from, unless it is resumed."""
        super().before_train(runner)
        if runner.iter == 0:
            self.ema_model.module.load_state_dict(self.src_model.state_dict())
        self.weights = list(self.src_model.parameters())
        self.averages = list(self.ema_model.module.parameters())

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: object = None,
        outputs: Mapping | None = None,
    ) -> None:
        """Update the average."""
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.weights, self.momentum)
        self.ema_model.steps += 1


@HOOKS.register_module()
class EpochSeed(Hook):
    """Start every epoch from a random state of its own, drawn from (seed, epoch).

    So a resumed run draws the same dropout as one that was never interrupted.
    """

    priority = "VERY_HIGH"

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed Python, NumPy and torch."""
        seed_all(runner.seed, runner.epoch)


@HOOKS.register_module()
class ProgressBar(Bar):
    """A bar on stderr: epochs with loss and last validation, then the videos of each test set.

    Args:
        metric: of the validation, shown in percent.
    """

    def __init__(self, metric: str = "online/mAP") -> None:
        super().__init__()
        self.metric = metric
        self.shown: dict[str, str] = {}

    def before_train(self, runner: Runner) -> None:
        """Open the bar where training starts or goes on."""
        self.open("training", runner.max_epochs, "epoch", runner.epoch)

    def after_train_epoch(self, runner: Runner) -> None:
        """Advance."""
        loss = runner.message_hub.get_scalar("train/loss").mean(len(runner.train_dataloader))
        self.shown["loss"] = f"{loss:.3f}"
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update()

    def after_val_epoch(self, runner: Runner, metrics: Mapping | None = None) -> None:
        """Show the validated metric."""
        if self.bar is not None and metrics and self.metric in metrics:
            self.shown[self.metric] = f"{100 * metrics[self.metric]:.1f}"
            self.bar.set_postfix(self.shown)


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(_ParamScheduler):
    """Cosine over all iterations times a linear warm-up over the first ones.

    ``lr(i) = base * warm(i + ahead) * (1 + cos(pi (i + ahead) / end)) / 2`` at optimiser step
    i = 0, 1, ..., with ``warm(s) = factor + (1 - factor) s / warmup`` for s < warmup, else 1.

    Args:
        optimizer: whose learning rate is set.
        end: iterations of the whole training.
        warmup: iterations of the warm-up.
        factor: share of the rate at which the warm-up starts.
        ahead: 1 is the released rule, whose curve is one step early (so that its last step has
            rate 0); 0 starts at the curve's beginning.
        last_step: mmengine's.
        epoch_length: given by mmengine's runner, not used.
    """

    def __init__(
        self,
        optimizer: object,
        end: int,
        warmup: float = 0,
        factor: float = 0.3,
        ahead: int = 1,
        last_step: int = -1,
        epoch_length: int | None = None,
    ) -> None:
        self.warmup, self.factor, self.ahead = warmup, factor, ahead
        super().__init__(optimizer, param_name="lr", end=end, by_epoch=False, last_step=last_step)

    def _get_value(self) -> list[float]:
        step = self.last_step + self.ahead
        warm = 1.0
        if step < self.warmup:
            warm = self.factor + (1 - self.factor) * step / self.warmup
        scale = warm * (1 + math.cos(math.pi * min(1.0, step / self.end))) / 2
        return [base * scale for base in self.base_values]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DecayMatrices:
    """Weight decay on matrices alone; norms, biases and learned queries are spared.

    The release decays everything, which mmengine's own constructor does.

    Args:
        optim_wrapper_cfg: holds ``optimizer``; the rest goes to mmengine's ``OptimWrapper``.
        paramwise_cfg: not used.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        self.options = {k: v for k, v in optim_wrapper_cfg.items() if k != "optimizer"}
        self.optimizer = optim_wrapper_cfg["optimizer"]

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Wrap an optimiser of the model's parameters in two groups."""
        decayed, spared = [], []
        for name, parameter in model.named_parameters():
            spare = parameter.ndim < 2 or "quer" in name  # enc_queries, gen_query, final_query
            (spared if spare else decayed).append(parameter)
        groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
        optimizer = OPTIMIZERS.build({**self.optimizer, "params": groups})
        return OptimWrapper(optimizer, **self.options)
