"""A pretraining config: from the file to the run that it describes.

Every verb that trains, measures or checks an aligned encoder reads its config here. A config has
the sections of ``pretrain.PretrainConfig`` (``model``, ``optim``, ``tasks``, and ``run`` for all
that stands beside them), says where the data lie (``data.root``) and how many processes the verb
starts by itself (``launch``). ``{root}`` in the arguments of a task's reader is that folder; where
it is None, the data are miniworld's clips and the image encoder is the mini SigLIP, both made on
first use from the sections ``world`` and ``mini_siglip``. A section ``instances`` asks for videos
of moving instances in the place of the clips.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from experiments import config as configs
from experiments import preflight
from experiments.config import UserError, field_defaults, flatten, load_config

logger = logging.getLogger(__name__)

ROOT = "{root}"  # in the arguments of readers
NOT_RUN = ("output", "tasks", "model", "optim", "device")  # of PretrainConfig, set elsewhere
UNKNOWN_SIGLIP = "siglip"  # stands for a model that is made later
PATIENCE = timedelta(hours=2)  # of processes that wait while one prepares or measures


@dataclass(frozen=True)
class Source:
    """Where the data of a config lie, and the SigLIP model that is lifted.

    ``world`` is the rendered world, None on real data.
    """

    title: str
    root: Path
    siglip: str
    world: Path | None = None


def add_arguments(parser: argparse.ArgumentParser, work_dir: str) -> None:
    """Options of every verb that runs by a pretraining config."""
    configs.add_arguments(parser, work_dir, example="optim.updates=300")


def resolve(config: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The config with all defaults, checked by those who will read it.

    Raises:
        UserError: a key or value that pretraining or the renderer refuses.
    """
    from experiments.miniworld import WorldParams
    from experiments.miniworld.instances import InstanceParams
    from experiments.miniworld.siglip import SiglipRecipe
    from pretrain import ModelConfig, OptimConfig, PretrainConfig

    defaults = {
        "data": {"root": None},
        "launch": {"processes": 1},
        "model": field_defaults(ModelConfig),
        "optim": field_defaults(OptimConfig),
        "run": field_defaults(PretrainConfig, leave_out=NOT_RUN),
        "world": field_defaults(WorldParams),
        "mini_siglip": field_defaults(SiglipRecipe),
        "instances": field_defaults(InstanceParams),
    }
    resolved = load_config("pretrain", config, overrides, defaults, free=("tasks",))
    for section in ("data", "launch", "run"):
        resolved[section] = {**defaults[section], **resolved.get(section, {})}
    resolved["tasks"] = {name: task for name, task in resolved["tasks"].items() if task is not None}
    try:
        training(resolved, Source("", Path(ROOT), UNKNOWN_SIGLIP), Path("output"))
        WorldParams(**resolved.get("world", {}))
        InstanceParams(**resolved.get("instances", {}))
    except (TypeError, ValueError) as error:
        raise UserError(f"config {config}: {error}") from error
    return resolved


def mini(changes: Mapping[str, Any], world: Mapping[str, Any]) -> dict[str, Any]:
    """How mini encoders are made: a packaged recipe, with the changes of a downstream config.

    Args:
        changes: section ``mini`` of that config. Its key ``config`` names the recipe, else it is
            miniworld's.
        world: its section ``world``, on which they are trained.
    """
    wanted = flatten({"world": world, **changes})
    name = wanted.pop("config", "miniworld")
    made_by = resolve(name, [f"{key}={value!r}" for key, value in wanted.items()])
    return {key: value for key, value in made_by.items() if key != "world"}


def training(
    config: Mapping[str, Any],
    source: Source,
    output: Path,
    *,
    device: str = "auto",
    **changes: Any,
) -> Any:
    """The ``pretrain.PretrainConfig`` of a resolved config.

    Args:
        config: from ``resolve``.
        source: from ``prepare``.
        output: folder of the run.
        device: ``auto`` or ``cpu``.
        changes: fields of the run that this experiment sets otherwise, such as ``data_share``.
    """
    from pretrain import PretrainConfig

    values = {
        **config["run"],
        "output": str(output),
        "model": {**config["model"], "siglip": config["model"].get("siglip") or source.siglip},
        "optim": config["optim"],
        "tasks": {name: _placed(task, source.root) for name, task in config["tasks"].items()},
        "device": device,
    }
    return PretrainConfig.from_dict({**values, **changes})


def find_data(config: Mapping[str, Any], folder: Path) -> Source:
    """The data that the config names, or the world rendered for it; its SigLIP as far as named."""
    root, siglip = config["data"]["root"], config["model"].get("siglip")
    if root is not None:
        return Source(Path(root).name, Path(root), siglip or UNKNOWN_SIGLIP)
    from experiments.miniworld import WorldParams, render_world

    world = render_world(folder / "miniworld", WorldParams(**config["world"]))
    return Source("miniworld", videos(config, folder, world), siglip or UNKNOWN_SIGLIP, world)


def videos(config: Mapping[str, Any], folder: Path, world: Path) -> Path:
    """Folder of what is trained on: the clips of a rendered world, or videos of instances."""
    if "instances" not in config:
        return world / "clips"
    from experiments.miniworld.instances import InstanceParams, render_instances

    return render_instances(folder / "miniworld", InstanceParams(**config["instances"]))


def prepare(config: Mapping[str, Any], folder: Path) -> Source:
    """Find or render the data, and train the mini SigLIP where the config names none."""
    source = find_data(config, folder)
    if source.siglip != UNKNOWN_SIGLIP:
        return source
    from experiments.miniworld.encoders import mini_siglip
    from experiments.miniworld.siglip import SiglipRecipe

    made = mini_siglip(folder, source.world, SiglipRecipe(**config["mini_siglip"]))
    return replace(source, siglip=str(made))


def problems(config: Mapping[str, Any]) -> list[str]:
    """What a config lacks before anything can be trained or measured, as sentences."""
    root = config["data"]["root"]
    found = preflight.data_root(root, rendered="world" in config)
    if root is not None and not found:
        found += _absent(config["tasks"], Path(root))
    if root is not None and not config["model"].get("siglip"):
        found.append(
            "model.siglip is None: name the SigLIP model that is lifted, such as "
            "--set model.siglip=google/siglip-base-patch16-224"
        )
    return found


def _absent(value: Any, root: Path, where: str = "tasks") -> list[str]:
    """Files and folders below the root that readers are to be given and that are not there."""
    if isinstance(value, Mapping):
        inside = [_absent(item, root, f"{where}.{key}") for key, item in value.items()]
        return [text for texts in inside for text in texts]
    if isinstance(value, list):
        return [text for item in value for text in _absent(item, root, where)]
    if isinstance(value, str) and ROOT in value and not Path(_placed(value, root)).exists():
        return [f"{where}: there is no {_placed(value, root)}"]
    return []


def _placed(value: Any, root: Path) -> Any:
    """``value`` with ``{root}`` replaced in every text, however deep."""
    if isinstance(value, str):
        return value.replace(ROOT, str(root))
    if isinstance(value, Mapping):
        return {key: _placed(item, root) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_placed(item, root) for item in value]
    return value


def launched() -> bool:
    """Whether ``torchrun`` or ``accelerate launch`` started this process."""
    return "RANK" in os.environ


def rank() -> int:
    """Number of this process; 0 is the main one, which reports."""
    return int(os.environ.get("RANK", 0))


def in_one_process_first(work: Callable[[], Any], device: str) -> Any:
    """Let one process of each machine do ``work`` before the others of ``torchrun`` do.

    What it makes lies on disk then, and the others find it. It works before the processes have met:
    what it calls may start processes of its own, and must not take the others for these. Started
    alone, it is just done.
    """
    if not launched():
        return work()
    from accelerate import PartialState

    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    made = work() if first else None
    PartialState(cpu=device == "cpu", timeout=PATIENCE).wait_for_everyone()
    return made if first else work()


def train(settings: Any, processes: int = 1) -> Path:
    """Train, in ``processes`` of our own unless several were launched already.

    SIGTERM reaches all of them: they save where they are, and this process ends with 143.

    Raises:
        UserError: what ``pretrain.train`` refuses, from whichever process.
    """
    from torch.multiprocessing import ProcessExitedException

    from pretrain import train as fit
    from pretrain.datasets.decode import ClipError
    from pretrain.launch import run_processes

    refusals = (ValueError, ClipError, FloatingPointError)
    alone = processes == 1 or launched()
    try:
        if alone:
            fit(settings)
        else:
            with _passing_on_sigterm():
                run_processes(fit, settings, processes=processes)
    except refusals as error:
        raise UserError(str(error)) from error
    except ProcessExitedException as error:
        if error.exit_code in (128 + signal.SIGTERM, -signal.SIGTERM):
            raise SystemExit(128 + signal.SIGTERM) from error
        raise
    except RuntimeError as error:  # of another process: its traceback ends with what it refused
        kind, _, text = str(error).strip().rpartition("\n")[2].partition(": ")
        if alone or kind.rpartition(".")[2] not in {refusal.__name__ for refusal in refusals}:
            raise
        raise UserError(text) from error
    return Path(settings.output)


@contextmanager
def _passing_on_sigterm() -> Iterator[None]:
    """Hand SIGTERM on to the processes that this one has started."""

    def pass_on(number: int, frame: Any) -> None:
        for child in multiprocessing.active_children():
            child.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
