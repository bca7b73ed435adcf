"""What mmengine's ``Runner`` leaves open, for every task that is trained by it.

A device of one's own, whole checkpoints that ``torch.load`` reads safely, a quiet terminal, and no
traces in the process.
"""

from __future__ import annotations

import logging
import math
import os
import random
import re
import sys
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmengine.runner import Runner, TestLoop
from mmengine.visualization import Visualizer
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm


class QuietRunner(Runner):
    """mmengine's runner with a device of one's own, whole checkpoints and a quiet terminal."""

    def __init__(self, device: torch.device, **arguments: Any) -> None:
        self.device = device
        super().__init__(**arguments)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Move the model to the device; mmengine would take the first GPU it finds."""
        return model.to(self.device)

    def build_logger(
        self, log_level: int | str = "INFO", log_file: str | None = None, **options: Any
    ) -> MMLogger:
        """Log to a file in full; only warnings reach the terminal, and there stderr."""
        built = super().build_logger(log_level, log_file, **options)
        for handler in built.handlers:
            if getattr(handler, "stream", None) is sys.stdout:
                handler.setStream(sys.stderr)
                handler.setLevel(logging.WARNING)
        return built

    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **options: Any) -> None:
        """Write beside the final name, then rename."""
        partial = f".{filename}.part"
        super().save_checkpoint(out_dir, partial, *args, **options)
        os.replace(Path(out_dir) / partial, Path(out_dir) / filename)

    def dump_config(self) -> None:
        """Nothing to dump: the config of a run is written by whoever starts it."""

    def close(self) -> None:
        """Take progress bars off the terminal, also after an error."""
        for hook in self.hooks:
            bar = getattr(hook, "bar", None)
            if isinstance(bar, tqdm):
                bar.close()

    def test_on(self, loader: DataLoader, evaluator: list[dict]) -> dict[str, Any]:
        """Metrics of the present weights on one data set."""
        self._test_loop = TestLoop(self, loader, evaluator)
        return self._test_loop.run()


class PlainMessageHub(Hook):
    """Reduce mmengine's message hub in a checkpoint to plain Python values.

    Its history buffers and NumPy scalars are objects, which ``torch.load(weights_only=True)``, the
    default since torch 2.6, refuses; so mmengine could not resume from its own checkpoints.
    """

    priority = "VERY_LOW"

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Drop the histories, keep the rest as numbers, texts, lists and dicts."""
        hub = checkpoint["message_hub"]
        hub["log_scalars"] = OrderedDict()
        hub["runtime_info"] = plain(hub["runtime_info"])


class FiniteLoss(Hook):
    """Stop at the first loss that is not a number, before it reaches a checkpoint.

    Args:
        mend: what to do then, for the message.
    """

    def __init__(self, mend: str = "lower train.lr or lengthen the warm-up") -> None:
        self.mend = mend

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: object = None,
        outputs: Mapping | None = None,
    ) -> None:
        """Look at the loss of each step."""
        loss = outputs["loss"].item()
        if not math.isfinite(loss):
            rate = runner.optim_wrapper.get_lr()["lr"][0]
            raise FloatingPointError(
                f"the loss is {loss} in epoch {runner.epoch + 1}, iteration {runner.iter + 1}, at "
                f"learning rate {rate:.2e}; {self.mend}"
            )


class Bar(Hook):
    """A bar on stderr, closed after a training, and open over each set that is evaluated.

    Its heirs open it for a training. Data sets have a ``title``.
    """

    priority = "LOWEST"
    batch = "batch"  # what one batch of a set is called

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def open(self, title: str, total: int, unit: str, initial: int = 0) -> None:
        """Show a bar."""
        self.bar = tqdm(
            total=total, initial=initial, desc=title, unit=unit, file=sys.stderr, leave=False
        )

    def after_train(self, runner: Runner) -> None:
        """Close the bar."""
        self.bar.close()

    def before_test(self, runner: Runner) -> None:
        """Open a bar for one set."""
        batches = runner.test_dataloader
        self.open(f"evaluating {batches.dataset.title}", len(batches), self.batch)

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: object = None
    ) -> None:
        """Advance."""
        self.bar.update()

    def after_test(self, runner: Runner) -> None:
        """Close the bar."""
        self.bar.close()


def seed_all(seed: int, place: int) -> None:
    """Give Python, NumPy and torch a random state of its own, drawn from (seed, place).

    So a resumed run draws from some place on what one draws that was never interrupted.
    """
    state = np.random.SeedSequence([seed, place]).generate_state(1)
    random.seed(int(state[0]))
    np.random.seed(int(state[0]))
    torch.manual_seed(int(state[0]))


def plain(value: object) -> object:
    """The same value in Python's own types; what has no counterpart becomes text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return value.tolist()
    return value if value is None or isinstance(value, (str, bool, Number)) else str(value)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Limit torch to ``count`` CPU threads for a while; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def instances(task: str) -> Iterator[str]:
    """A name for one run's global instances in mmengine; at the end they are closed and dropped.

    mmengine would keep them, log files and all, for the life of the process, and the last run's
    scope would stay the default for whatever is built next.
    """
    name = f"{task}-{uuid.uuid4().hex[:12]}"
    try:
        yield name
    finally:
        for table in (MMLogger, MessageHub, Visualizer, DefaultScope):
            for key in [key for key in table._instance_dict if key.startswith(name)]:
                instance = table._instance_dict.pop(key)
                for handler in getattr(instance, "handlers", ()):
                    handler.close()


def last_checkpoint(folder: Path) -> tuple[Path | None, int]:
    """The newest checkpoint and its number, by name, so that a run may be moved; or None, 0."""
    numbered = {
        int(match[1]): path
        for path in folder.glob("*.pth")
        if (match := re.fullmatch(r"(?:epoch|iter)_(\d+)", path.stem))
    }
    newest = max(numbered, default=0)
    return numbered.get(newest), newest


def device_of(name: str) -> torch.device:
    """A device by name; "auto" is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
