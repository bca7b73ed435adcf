"""Several pretrainings of one recipe against each other: downstream, and zero-shot.

An arm is a recipe with fewer tasks or a share of the videos, and all else the same: the image
encoder that is lifted, the number of updates, the clips in an update, the seed. Every arm is
frozen then and goes through the same downstream comparisons (``oad``, ``ovis``), next to the image
encoder itself. All lies under one folder:

    DIR/miniworld/, DIR/encoders/       the rendered world, the mini SigLIP, and every arm's model
    DIR/<task>/<arm>/seed<k>/           the downstream runs
    DIR/zero_shot/                      zero-shot numbers
    DIR/report.{json,md,png}            the outcome
"""

from __future__ import annotations

import argparse
import importlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from experiments import pretrain, recipe, zero_shot
from experiments.config import UserError, digest
from experiments.environment import environment
from experiments.report import build_report, publish

logger = logging.getLogger(__name__)

DOWNSTREAM = {  # task -> module with resolve, preflight and compare
    "oad": "experiments.oad",
    "ovis": "experiments.ovis",
}
USUAL = ("oad",)  # those of a study that names none
REAL = {"oad": "thumos14", "ovis": "ytvis2019"}  # config where the pretraining is not on miniworld
IN_WORLD = {"oad": "streams"}  # folder of the pretraining's world; other tasks render their own
SHARED = ("world",)  # sections that both configs have, and that must be the same
NOTES = [
    "every pretraining has the same image encoder to start from, the same number of updates, the "
    "same number of clips in each update, and the same seed",
    "the spread is over seeds of the head; another seed of the pretraining can move an encoder by "
    "more than that",
]


@dataclass(frozen=True)
class Arm:
    """One pretraining: the tasks that it keeps, and the share of the videos."""

    label: str
    tasks: tuple[str, ...]
    share: float = 1.0


def add_arguments(parser: argparse.ArgumentParser, work_dir: str) -> None:
    """Options of every study."""
    recipe.add_arguments(parser, work_dir)
    add = parser.add_argument
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="K", help="of the heads: 0 1 2")
    add(
        "--downstream",
        nargs="+",
        default=list(USUAL),
        metavar="TASK[=CONFIG]",
        help=f"what the frozen encoders are compared on, {', '.join(DOWNSTREAM)}; default: "
        f"{', '.join(USUAL)}; --set oad.train.epochs=3 changes its config",
    )


def run(
    args: argparse.Namespace,
    *,
    verb: str,
    title: str,
    base: str,
    arms_of: Callable[[Mapping[str, Any]], Sequence[Arm]],
    pairs_of: Callable[[Sequence[str]], list[tuple[str, str]]] | None = None,
    notes: Sequence[str] = (),
    draw: Callable[[Mapping[str, Any], Path], None] | None = None,
) -> dict[str, Any] | None:
    """Resolve, preflight, pretrain every arm, compare downstream, measure, report.

    Under ``torchrun`` all processes train, and the main one does the rest.

    Args:
        args: of ``add_arguments``.
        verb: for the report.
        title: for people; the data are added.
        base: label of the image encoder itself.
        arms_of: the arms of a resolved config.
        pairs_of: which labels are compared, given all labels; None as ``build_report`` does.
        notes: that stand before the usual ones.
        draw: the picture; None for the usual one.
    """
    start = time.perf_counter()
    folder = args.work_dir.resolve()

    own, downstream = resolve(args.config, args.downstream, args.set)
    arms = arms_of(own)
    device = pretrain.training_device(args.device, own)
    pretrain.preflight_run(own, folder)
    for name, config in downstream.items():
        module = importlib.import_module(DOWNSTREAM[name])
        module.preflight(config, {base: "siglip"}, args.seeds, folder)

    source = recipe.in_one_process_first(partial(recipe.prepare, own, folder), device)
    specs = {base: f"siglip:{source.siglip}"}
    for number, arm in enumerate(arms, start=1):
        logger.info("pretraining %d of %d: %s", number, len(arms), arm.label)
        specs[arm.label] = train_arm(arm, own, source, folder, device)
    if recipe.rank():
        return None
    found = {
        name: _compare(name, config, specs, source, args, folder)
        for name, config in downstream.items()
    }
    measured = {
        label: zero_shot.measure(spec, own, source, args.device, folder / "zero_shot")
        for label, spec in specs.items()
    }
    report = build_report(
        task=verb,
        title=f"{title} on {source.title}",
        data=source.title,
        outcomes=merge({name: compared.outcomes for name, compared in found.items()}),
        config={"pretrain": own, **downstream},
        config_difference=sorted({key for one in found.values() for key in one.difference}),
        environment=environment(),
        wall_seconds=time.perf_counter() - start,
        details={
            **_common_details(found),
            "command": args.command,
            "notes": [*notes, *NOTES, *_notes_of(found)],
            "equal": "with the same head and the same downstream training",
            "arms": {arm.label: _arm_facts(arm, own) for arm in arms},
            "encoders": {
                label: {**_encoder_facts(label, arms, own), **result["settings"]}
                for label, result in measured.items()
            },
            "tables": {
                "Zero-shot": {label: result["metrics"] for label, result in measured.items()}
            },
        },
        pairs=pairs_of(list(specs)) if pairs_of else None,
    )
    publish(report, folder, draw)
    return report


def resolve(
    config: str, downstream: Sequence[str], overrides: Sequence[str]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The pretraining's config and those of the downstream tasks, by name.

    An override goes to the task that its key begins with, else to the pretraining; one of the
    world goes to all.
    """
    wanted = dict(text.partition("=")[::2] for text in downstream)
    unknown = [name for name in wanted if name not in DOWNSTREAM]
    if unknown:
        raise UserError(f"--downstream: no task {unknown[0]!r}; there is {', '.join(DOWNSTREAM)}")
    of_task = {
        name: [text.removeprefix(f"{name}.") for text in overrides if text.startswith(f"{name}.")]
        for name in DOWNSTREAM
    }
    own = recipe.resolve(
        config, [text for text in overrides if text.partition(".")[0] not in DOWNSTREAM]
    )
    shared = [text for text in overrides if text.partition(".")[0] in SHARED]
    resolved = {}
    for name, chosen in wanted.items():
        chosen = chosen or ("miniworld" if "world" in own else REAL[name])
        module = importlib.import_module(DOWNSTREAM[name])
        known = module.resolve(chosen, of_task[name])
        if "world" in known and shared:
            known = module.resolve(chosen, [*shared, *of_task[name]])
        _refuse_other_world(own, known, name)
        resolved[name] = known
    return own, resolved


def _refuse_other_world(own: Mapping[str, Any], other: Mapping[str, Any], name: str) -> None:
    if "world" in own and "world" in other and own["world"] != other["world"]:
        differing = [key for key in own["world"] if own["world"][key] != other["world"].get(key)]
        raise UserError(
            f"the world of {name} differs from that of the pretraining in {', '.join(differing)}; "
            "state what differs from the defaults in both configs, or by --set world.…"
        )


def train_arm(
    arm: Arm, config: Mapping[str, Any], source: recipe.Source, folder: Path, device: str
) -> str:
    """Spec of an arm's model, trained unless it is there; an unfinished run goes on."""
    tasks = equal_clips(config, arm.tasks)
    made_of = {key: value for key, value in config.items() if key not in ("tasks", "run")}
    run_fields = {k: v for k, v in config["run"].items() if k not in ("name", "trackers")}
    name = digest({**made_of, "run": run_fields, "tasks": tasks, "share": arm.share})
    output = folder / "encoders" / f"{arm.label}-{name}"
    settings = recipe.training(
        {**config, "tasks": tasks},
        source,
        output,
        device=device,
        data_share=arm.share,
        name=f"{config['run']['name']}, {arm.label}",
    )
    recipe.train(settings, config["launch"]["processes"])
    return f"streamformer:{output}"


def equal_clips(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The tasks of these names, their batches grown to the clips that all tasks have in an update.

    So an arm of one task sees as many clips as one of six. Sizes keep their proportions as well as
    whole numbers allow; none gets smaller.
    """
    sizes = {
        name: task.get("batch_size") or config["run"]["batch_size"]
        for name, task in config["tasks"].items()
    }
    whole, kept = sum(sizes.values()), sum(sizes[name] for name in names)
    exact = {name: whole * sizes[name] / kept for name in names}
    grown = {name: math.floor(size) for name, size in exact.items()}
    most = sorted(names, key=lambda name: grown[name] - exact[name])
    for name in most[: whole - sum(grown.values())]:
        grown[name] += 1
    return {name: {**config["tasks"][name], "batch_size": grown[name]} for name in names}


def merge(
    outcomes: Mapping[str, Mapping[str, Mapping[int, Mapping[str, Any]]]],
) -> dict[str, dict[int, dict[str, Any]]]:
    """Outcomes of several tasks (task -> label -> seed -> outcome) as those of one.

    With more than one task its name stands before each metric; classes are those of the first.
    """
    first, *others = outcomes
    merged = {
        label: {seed: dict(outcome) for seed, outcome in by_seed.items()}
        for label, by_seed in outcomes[first].items()
    }
    if not others:
        return merged
    for label, by_seed in merged.items():
        for seed, outcome in by_seed.items():
            outcome["metrics"] = {
                f"{task} {metric}": value
                for task in outcomes
                for metric, value in outcomes[task][label][seed]["metrics"].items()
            }
    return merged


def _compare(
    name: str,
    config: Mapping[str, Any],
    specs: Mapping[str, str],
    source: recipe.Source,
    args: argparse.Namespace,
    folder: Path,
) -> Any:
    """One downstream comparison; the world of the pretraining may serve it, too."""
    if config["data"]["root"] is None and source.world is not None and name in IN_WORLD:
        root = str(source.world / IN_WORLD[name])
        config = {**config, "data": {**config["data"], "root": root}}
    module = importlib.import_module(DOWNSTREAM[name])
    return module.compare(config, specs, args.seeds, folder / name, args.device)


def _common_details(found: Mapping[str, Any]) -> dict[str, Any]:
    """Chance levels and titles of metrics, where one task alone was asked for."""
    if len(found) > 1:
        return {}
    details = next(iter(found.values())).details
    return {key: details[key] for key in ("chance", "titles") if key in details}


def _notes_of(found: Mapping[str, Any]) -> list[str]:
    return [note for compared in found.values() for note in compared.details.get("notes", [])]


def _arm_facts(arm: Arm, config: Mapping[str, Any]) -> dict[str, Any]:
    tasks = equal_clips(config, arm.tasks)
    return {
        "tasks": ", ".join(f"{name} x {task['batch_size']}" for name, task in tasks.items()),
        "share": arm.share,
        "updates": config["optim"]["updates"],
    }


def _encoder_facts(label: str, arms: Sequence[Arm], config: Mapping[str, Any]) -> dict[str, Any]:
    return next((_arm_facts(arm, config) for arm in arms if arm.label == label), {})
