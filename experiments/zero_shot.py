"""Zero-shot metrics of any encoder: its features against texts it was aligned with, untrained.

Each task of a pretraining config that has validation data is measured by its own objective
(``pretrain/objectives``), in the same way for every encoder: the same clips, frames and texts. The
texts come from the SigLIP model of the config; an encoder that was never aligned with them gets
what chance gives.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments import preflight, recipe
from experiments.config import UserError, digest
from experiments.environment import choose_device, environment
from experiments.report import build_report, publish

logger = logging.getLogger(__name__)

ABOUT = """\
Measures every task of a pretraining config that has validation data: recognition
top-1 and top-5, retrieval R@1/5/10, localization mAP per frame, grounding R@1 at IoU
0.3/0.5/0.7, segmentation mIoU and J&F. "siglip" is the model that the config lifts,
"streamformer" the one that the verb pretrain made in --work-dir."""
EXAMPLES = """\
  python experiments/run.py zero-shot
  python experiments/run.py zero-shot --encoder siglip streamformer:/weights/mine
  python experiments/run.py zero-shot --tasks recognition retrieval
  python experiments/run.py zero-shot --config multitask_1m --set data.root=/data --device cuda \\
      --encoder siglip streamformer:StreamFormer/streamformer-timesformer"""

MODEL = "model"  # folder of the verb pretrain's model in its work folder
VERSION = 1  # raise it when measuring changes in any way that no setting tells
NO_METRIC = ("prior", "skipped")  # of an objective's numbers: a chance level and a count
EQUAL = "on the same clips, the same frames and the same texts"
NOTES = [
    "clips and captions are matched by the clip's last frame, which has seen all others if the "
    "encoder has a memory; for SigLIP it is one image",
    "retrieval is over all validation clips; its levels depend on their number",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add = parser.add_argument
    add(
        "--encoder",
        nargs="+",
        default=["siglip", "streamformer"],
        metavar="ENCODER",
        help="labels (siglip, streamformer), or kind:folder, or kind:hub-id; one or several",
    )
    add("--tasks", nargs="+", metavar="TASK", help="of the config; default: all with validation")
    recipe.add_arguments(parser, work_dir="work_dirs/pretrain")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Resolve, preflight, measure, report; returns the report."""
    start = time.perf_counter()
    folder = args.work_dir.resolve()

    config = recipe.resolve(args.config, args.set)
    config["tasks"] = chosen_tasks(config["tasks"], args.tasks)
    preflight.refuse(recipe.problems(config) or find_problems(args.encoder, folder))

    source = recipe.prepare(config, folder)
    encoders = specs(args.encoder, source, folder)
    measured = {
        label: measure(spec, config, source, args.device, kept=folder / "zero_shot")
        for label, spec in encoders.items()
    }
    report = report_of(
        measured,
        config,
        title=f"Zero-shot on {source.title}",
        seconds=time.perf_counter() - start,
        details={"command": args.command},
    )
    publish(report, folder / "zero_shot")
    return report


def chosen_tasks(tasks: Mapping[str, Any], names: Sequence[str] | None) -> dict[str, Any]:
    """The tasks that were asked for and can be measured.

    Raises:
        UserError: a task that the config lacks, or that has no validation data.
    """
    measurable = {name: task for name, task in tasks.items() if task.get("val")}
    for name in names or ():
        if name not in measurable:
            why = "has no val" if name in tasks else "is not in the config"
            raise UserError(f"--tasks: {name} {why}; choose from {', '.join(measurable)}")
    if not measurable:
        raise UserError("no task of the config has validation data: give one a section val")
    return {name: task for name, task in measurable.items() if not names or name in names}


def find_problems(encoders: Sequence[str], folder: Path) -> list[str]:
    """Encoders that are not there."""
    found = []
    for spec in encoders:
        if ":" in spec:
            found += preflight.encoder(spec)
        elif spec == "streamformer" and not (folder / MODEL / "config.json").is_file():
            found.append(
                f"--encoder streamformer: {folder / MODEL} holds no model yet; train one "
                "(python experiments/run.py pretrain), or give streamformer:FOLDER"
            )
        elif spec not in ("siglip", "streamformer"):
            found.append(
                f"--encoder {spec}: names no kind; write siglip, streamformer, or kind:folder, "
                f"such as streamformer:{spec}"
            )
    return found


def specs(encoders: Sequence[str], source: recipe.Source, folder: Path) -> dict[str, str]:
    """Label -> spec; bare labels become the config's SigLIP and the model of ``folder``."""
    from experiments.comparison import encoder_labels

    meant = {"siglip": f"siglip:{source.siglip}", "streamformer": f"streamformer:{folder / MODEL}"}
    return {label: meant.get(spec, spec) for label, spec in encoder_labels(encoders).items()}


def measure(
    spec: str,
    config: Mapping[str, Any],
    source: recipe.Source,
    device: str,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Zero-shot numbers of one encoder.

    Args:
        spec: ``kind:source``.
        config: a resolved pretraining config; its tasks with validation data are measured.
        source: where its data lie.
        device: where the encoder runs.
        kept: folder in which results are kept, and found again by what they were measured with.

    Returns:
        ``{"metrics": {"<task>/<metric>": points}, "chance": …, "skipped": {task: clips},
        "settings": …}``.
    """
    from backbone import build_encoder
    from backbone.files import read_json, write_json

    encoder = build_encoder(spec, device=choose_device(device))
    asked = {
        "version": VERSION,
        "settings": encoder.settings(),
        "siglip": source.siglip,
        "root": str(source.root),
        "model": config["model"],
        "tasks": {name: {**task, "train": None} for name, task in config["tasks"].items()},
    }
    file = kept / f"{encoder.kind}-{digest(asked)}.json" if kept is not None else None
    if file is not None and file.is_file():
        return read_json(file)
    result = {**_measure(encoder, config, source, device), "settings": encoder.settings()}
    if file is not None:
        write_json(file, result)
    return result


def _measure(
    encoder: Any, config: Mapping[str, Any], source: recipe.Source, device: str
) -> dict[str, Any]:
    from pretrain.build import build_dataset, build_objective
    from pretrain.datasets.decode import FrameStore
    from pretrain.evaluation import evaluate, frozen
    from pretrain.text import load_siglip_text

    settings = recipe.training(config, source, source.root)
    tower, _, _ = load_siglip_text(settings.model.siglip, device=encoder.device)
    store = FrameStore(encoder.image_size) if settings.cache_in_memory else None
    build = partial(build_dataset, image_size=encoder.image_size, store=store)
    metrics, chance, skipped = {}, {}, {}
    for name, task in settings.tasks.items():
        if task.val is None:
            continue
        dataset = build(task, task.val, name=name)
        logger.info("%s: %s on %d clips", encoder.name, name, len(dataset))
        found = evaluate(
            frozen(encoder),
            dataset,
            build_objective(
                task,
                dataset,
                renormalize_labels=settings.model.renormalize_labels,
                mask_duplicates=settings.model.mask_duplicates,
            ),
            tower,
            num_frames=settings.model.num_frames,
            batch_size=task.batch_size or settings.batch_size,
            num_workers=settings.num_workers,
            device=encoder.device,
        )
        metrics |= {f"{name}/{key}": v for key, v in found.items() if key not in NO_METRIC}
        chance |= {f"{name}/{key}": v for key, v in _chance(task, dataset, found).items()}
        if "skipped" in found:
            skipped[name] = found["skipped"]
    return {"metrics": metrics, "chance": chance, "skipped": skipped}


def _chance(task: Any, dataset: Any, found: Mapping[str, float]) -> dict[str, float]:
    """Levels of a score that says nothing, where they are known."""
    named = "mIoU" if task.objective == "grounding" else "mAP"  # a guess of the whole clip, or none
    levels = {named: found["prior"]} if "prior" in found else {}
    if task.objective == "recognition":
        sizes = [len(dataset.label_sets[entry.label_set]) for entry in dataset.entries]
        for k in (1, 5):
            levels[f"top{k}"] = 100 * sum(min(k, size) / size for size in sizes) / len(sizes)
    return levels


def report_of(
    measured: Mapping[str, Mapping[str, Any]],
    config: Mapping[str, Any],
    *,
    title: str,
    seconds: float,
    details: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The report of some encoders' numbers (label -> result of ``measure``)."""
    seed = config["run"]["seed"]
    notes = [*notes, *NOTES]
    for label, result in measured.items():
        if result["skipped"]:
            lost = ", ".join(f"{count:g} of {task}" for task, count in result["skipped"].items())
            notes.append(f"{label}: clips that could not be decoded were left out ({lost})")
    return build_report(
        task="zero-shot",
        title=title,
        data=", ".join(config["tasks"]),
        outcomes={label: {seed: result} for label, result in measured.items()},
        config=config,
        config_difference=[],
        environment=environment(),
        wall_seconds=seconds,
        details={
            "chance": next(iter(measured.values()))["chance"],
            "equal": EQUAL,
            "spread": "In points. Nothing was drawn by chance, so there is no spread.",
            "notes": notes,
            "encoders": {label: result["settings"] for label, result in measured.items()},
            **details,
        },
    )
