"""Multitask pretraining: lift an image encoder, align it with text, and say what it has learned.

The data are miniworld's clips, rendered on first use, or those at the paths of the config. All lies
under one folder:

    DIR/miniworld/, DIR/encoders/    the rendered world and the mini SigLIP (miniworld only)
    DIR/model/                       the run and its model, which ``from_pretrained`` and
                                     ``build_encoder`` load; an interrupted run goes on there
    DIR/zero_shot/                   zero-shot numbers of SigLIP and of the model
    DIR/report.{json,md,png}         losses, and both encoders' zero-shot metrics side by side
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments import preflight, recipe, zero_shot
from experiments.config import UserError
from experiments.report import FAINT, INK, colours_of, picture, publish, say

logger = logging.getLogger(__name__)

ABOUT = """\
Lifts the SigLIP model of the config into time and trains it on one batch of every
task per update. Without --config it runs on miniworld. It goes on where it stopped
(also after SIGTERM), ends with a folder that build_encoder loads, and reports the
zero-shot metrics of SigLIP and of the outcome. Several GPUs: torchrun or accelerate
launch in front; batch sizes of the config are per process."""
EXAMPLES = """\
  python experiments/run.py pretrain
  python experiments/run.py pretrain --set optim.updates=300 --work-dir /tmp/try
  python experiments/run.py pretrain --set tasks.retrieval=None --work-dir /tmp/without
  torchrun --nproc-per-node 8 experiments/run.py pretrain --config multitask_1m \\
      --set data.root=/data
  accelerate launch --config_file fsdp.yaml experiments/run.py pretrain \\
      --config multitask_1m --set data.root=/data"""

WEIGHTS = 4 * 200_000_000  # bytes of a base model with its text tower, about
MAIN = {  # objective -> the metric that its curve shows
    "recognition": "top1",
    "retrieval": "text_to_video_R@1",
    "localization": "mAP",
    "grounding": "R1@0.5",
    "instance_segmentation": "mIoU",
    "referring_segmentation": "J&F",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    recipe.add_arguments(parser, work_dir="work_dirs/pretrain")


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Resolve, preflight, train or resume, measure, report; the main process returns the report."""
    start = time.perf_counter()
    folder = args.work_dir.resolve()

    config = recipe.resolve(args.config, args.set)
    preflight_run(config, folder)
    device = training_device(args.device, config)
    source = recipe.in_one_process_first(partial(recipe.prepare, config, folder), device)
    settings = recipe.training(config, source, folder / zero_shot.MODEL, device=device)
    recipe.train(settings, config["launch"]["processes"])
    if recipe.rank():
        return None
    if not any(task.get("val") for task in config["tasks"].values()):
        say(str(settings.output))  # nothing can be measured
        return None

    report = report_on(config, source, args, folder, time.perf_counter() - start)
    publish(report, folder, draw=plot)
    return report


def training_device(name: str, config: Mapping[str, Any]) -> str:
    """``auto`` or ``cpu``, as ``pretrain`` knows them; processes of our own run on the CPU.

    Raises:
        UserError: a device that there is not, or one that several processes cannot share.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"--device {name}: training takes auto, cpu or cuda; choose one of several GPUs by "
            "CUDA_VISIBLE_DEVICES"
        )
    processes = config["launch"]["processes"]
    if name == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
        if processes > 1 and not recipe.launched():
            raise UserError(
                f"--device cuda: this config starts launch.processes={processes} on the CPU; set "
                "launch.processes=1 for one GPU, or put torchrun in front for several"
            )
    if name == "auto" and processes > 1 and not recipe.launched():
        return "cpu"
    return "auto" if name == "cuda" else name


def preflight_run(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse at once, with all that is missing, what would fail later.

    Raises:
        UserError: data, weights or disk space that are not there, each named.
    """
    found = recipe.problems(config)
    siglip = config["model"].get("siglip")
    if siglip:
        found += [
            text.replace("--encoders siglip:", "model.siglip ")
            for text in preflight.encoder(f"siglip:{siglip}")
        ]
    copies = 1 + 3 * (config["run"]["keep_checkpoints"] + 1)  # a checkpoint has two moments
    rendered = config["data"]["root"] is None
    found += preflight.disk(folder, preflight.MINIWORLD_BYTES if rendered else copies * WEIGHTS)
    preflight.refuse(found)


def report_on(
    config: Mapping[str, Any],
    source: recipe.Source,
    args: argparse.Namespace,
    folder: Path,
    seconds: float,
) -> dict[str, Any]:
    """The report of a finished run: how it went, and what SigLIP and the model know."""
    from backbone.files import read_json

    model = folder / zero_shot.MODEL
    encoders = zero_shot.specs(["siglip", "streamformer"], source, folder)
    measured = {
        label: zero_shot.measure(spec, config, source, args.device, folder / "zero_shot")
        for label, spec in encoders.items()
    }
    log = [json.loads(line) for line in (model / "log.jsonl").read_text().splitlines()]
    made = read_json(model / "metrics.json")
    return zero_shot.report_of(
        measured,
        config,
        title=f"Pretraining on {source.title}: {', '.join(config['tasks'])}",
        seconds=seconds,
        details={
            "task": "pretrain",
            "command": args.command,
            "model": str(model),
            "training": {key: value for key, value in made.items() if key != "zero_shot"},
            "losses": [{"update": x["update"], **x["loss"]} for x in log if "loss" in x],
            "curves": [{"update": x["update"], **x["zero_shot"]} for x in log if "zero_shot" in x],
        },
        notes=[_training_note(made)],
    )


def _training_note(made: Mapping[str, Any]) -> str:
    clips = ", ".join(f"{name} {count}" for name, count in made["clips"].items())
    lost = sum(made["failures"]["failed"].values())
    return (
        f"trained for {made['updates']} updates in {made['seconds'] / 60:.1f} minutes, "
        f"{made['data_share']:.0%} of them spent waiting for data; clips: {clips}"
        + (f"; {lost} clips could not be decoded" if lost else "")
    )


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Losses by update, and each task's main zero-shot metric beside SigLIP's."""
    tasks = [name for name in report["config"]["tasks"] if _main_metric(report, name)]
    panels = 1 + len(tasks)
    rows = 1 if panels <= 3 else 2
    columns = math.ceil(panels / rows)
    size = (4.4 * columns, 3.6 * rows + 0.6)
    with picture(path, report["title"], size, rows=rows, columns=columns) as axes:
        _plot_losses(axes[0], report["losses"])
        for place, name in zip(axes[1:], tasks, strict=False):
            _plot_curve(place, report, name, _main_metric(report, name))
        axes[1].legend(frameon=False, fontsize=8, loc="best")
        for place in axes[panels:]:
            place.set_visible(False)


def _main_metric(report: Mapping[str, Any], name: str) -> str | None:
    """The metric that a task's curve shows, None for a task that was not measured."""
    metric = f"{name}/{MAIN[report['config']['tasks'][name]['objective']]}"
    return metric if metric in report["metrics"].get("streamformer", {}) else None


def _plot_losses(axes: Any, losses: Sequence[Mapping[str, float]]) -> None:
    names = [key for key in losses[-1] if key != "update"] if losses else []
    colours = colours_of(names)
    updates = [line["update"] for line in losses]
    for name in names:
        values = [line[name] for line in losses]
        axes.plot(updates, values, color=colours[name], label=name, marker=_dot(updates))
    axes.set_yscale("log")
    axes.set_title("loss", loc="left", fontsize=10.5)
    axes.set_xlabel("updates")
    axes.grid(color=FAINT, linewidth=0.6)
    if names:
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom, top * (top / bottom) ** 0.35)  # room for the names
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")


def _plot_curve(axes: Any, report: Mapping[str, Any], name: str, metric: str) -> None:
    measured = {label: values[metric]["mean"] for label, values in report["metrics"].items()}
    updates = [line["update"] for line in report["curves"]] + [report["training"]["updates"]]
    key = metric.partition("/")[2]
    values = [line[name][key] for line in report["curves"]] + [measured["streamformer"]]
    colours = colours_of(measured)
    axes.plot(updates, values, color=colours["streamformer"], marker="o", label="streamformer")
    axes.axhline(measured["siglip"], color=colours["siglip"], linewidth=1.8, label="siglip")
    level = report["chance"].get(metric)
    if level is not None:
        axes.axhline(level, color=INK, linestyle=(0, (4, 3)), linewidth=1.2, label="chance")
    axes.annotate(
        f"{values[-1]:.1f}",
        (updates[-1], values[-1]),
        xytext=(-4, 6),
        textcoords="offset points",
        ha="right",
        fontweight="bold",
    )
    axes.set_title(f"{name}: {key}", loc="left", fontsize=10.5)
    axes.set_xlabel("updates")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.15 * max(*values, *measured.values(), level or 0, 1e-6))
    axes.grid(color=FAINT, linewidth=0.6)


def _dot(values: Sequence[float]) -> str | None:
    return "o" if len(values) < 12 else None
