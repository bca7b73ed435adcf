"""One config, several encoders, several seeds: the controlled comparison behind every task.

A task says how one run is resolved and carried out; this file runs every encoder and seed in a
folder of its own, ``DIR/<encoder>/seed<k>/``, and proves first that the resolved runs differ in the
encoder alone. A finished run holds ``result.json`` beside the ``config.json`` that it belongs to;
the next call takes it from there. A run of another config is set aside, never mixed in or lost.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments import config as configs
from experiments.config import UserError, digest, flatten
from experiments.environment import environment, jobs
from experiments.report import build_report, publish, summarise

logger = logging.getLogger(__name__)

ENCODER = "encoder"  # the one key under which resolved runs may differ
CONTROL = "image"  # label of the third arm
ABSENT = "(absent)"
RESULT = "result.json"  # of a finished run
RESOLVED = "resolved.json"  # what a training wrote down of itself
STREAM = {"window": None, "temporal_positions": None}  # None: as the encoder's checkpoint says


class ComparisonError(RuntimeError):
    """Runs that must be equal but for the encoder are not."""


@dataclass(frozen=True)
class Run:
    """One encoder with one seed, resolved: ``config["encoder"]`` is all that names the encoder."""

    label: str
    seed: int
    config: dict[str, Any]
    folder: Path


@dataclass(frozen=True)
class Comparison:
    """What a task found out about some encoders, ready for ``report.build_report``."""

    title: str  # of the data
    outcomes: dict[str, dict[int, dict[str, Any]]]  # label -> seed -> outcome of one run
    difference: list[str]  # keys in which the encoders' configs differ
    details: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser, work_dir: str) -> None:
    """Options of every comparison."""
    configs.add_arguments(parser, work_dir, example="train.epochs=3")
    add = parser.add_argument
    add(
        "--encoders",
        nargs="+",
        default=["siglip", "streamformer"],
        metavar="ENCODER",
        help="labels (siglip, streamformer), or kind:folder, or kind:hub-id; the last one is "
        "compared with the others",
    )
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="K", help="default: %(default)s")
    add(
        "--third-arm",
        action="store_true",
        help=f"add the control encoder {CONTROL!r}: lifted and trained like streamformer, but "
        "without attention over time",
    )


def answer(
    args: argparse.Namespace,
    *,
    task: str,
    title: str,
    resolve: Callable[[str, Sequence[str]], dict[str, Any]],
    preflight: Callable[[Mapping[str, Any], Mapping[str, str], Sequence[int], Path], None],
    compare: Callable[..., Comparison],
) -> dict[str, Any]:
    """The five steps of a verb: resolve, preflight, run or resume, evaluate, report.

    Args:
        args: of ``add_arguments``.
        task: the verb.
        title: of the task, for people.
        resolve: ``(config, overrides) -> resolved config``.
        preflight: ``(config, labels, seeds, folder)``, raises what would make the run fail later;
            ``labels`` are those of ``encoder_labels``.
        compare: ``(config, labels, seeds, folder, device) -> Comparison``; what it keeps in
            ``folder``, where everything lies, serves the next call. A label stands for a spec, or
            for the name of a mini or released encoder.

    Returns:
        The report, which lies in ``--work-dir``, too.
    """
    start = time.perf_counter()
    folder = args.work_dir.resolve()

    config = resolve(args.config, args.set)
    labels = encoder_labels(args.encoders, args.third_arm)

    preflight(config, labels, args.seeds, folder)

    found = compare(config, labels, args.seeds, folder, args.device)

    report = build_report(
        task=task,
        title=f"{title} on {found.title}",
        data=config["data"]["dataset"],
        outcomes=found.outcomes,
        config=config,
        config_difference=found.difference,
        environment=environment(),
        wall_seconds=time.perf_counter() - start,
        details={"command": args.command, **found.details},
    )
    publish(report, folder)
    return report


def encoder_labels(specs: Sequence[str], third_arm: bool = False) -> dict[str, str]:
    """Give each encoder spec a label that is a folder name and tells it from the others.

    ``["siglip", "streamformer:/a/mine"]`` -> ``{"siglip": "siglip", "streamformer": …}``; where two
    specs share a kind, the last part of each one's name is added: ``streamformer-mine``. The third
    arm stands before the last encoder.

    Raises:
        UserError: the same spec twice, or two that cannot be told apart by name.
    """
    specs = [*specs[:-1], *([CONTROL] if third_arm else []), *specs[-1:]]
    kinds = [spec.partition(":")[0] for spec in specs]
    labels: dict[str, str] = {}
    for spec, kind in zip(specs, kinds, strict=True):
        name = spec.partition(":")[2].rstrip("/").rpartition("/")[2]
        label = f"{kind}-{name}" if kinds.count(kind) > 1 and name else kind
        if label in labels:
            raise UserError(
                f"--encoders: {labels[label]!r} and {spec!r} would both be called {label!r}; "
                "name each encoder once, in folders of different names"
            )
        labels[label] = spec
    return labels


def plan(
    config: Mapping[str, Any],
    encoders: Mapping[str, Mapping[str, Any]],
    seeds: Iterable[int],
    folder: Path,
) -> list[Run]:
    """Resolve every run: the config, the seed, and what describes the encoder, as JSON values.

    Args:
        config: the task's resolved config; it names no encoder.
        encoders: label -> whatever decides this encoder's part of a run.
        seeds: one run of each encoder per seed.
        folder: runs lie in ``folder/<label>/seed<k>``.
    """
    if ENCODER in config:
        raise UserError(
            f"the config names an encoder ({config[ENCODER]!r}); a comparison runs one config with "
            "several encoders: delete the key and use --encoders"
        )
    return [
        Run(
            label=label,
            seed=seed,
            config=json.loads(json.dumps({**config, "seed": seed, ENCODER: encoder})),
            folder=folder / label / f"seed{seed}",
        )
        for seed in seeds
        for label, encoder in encoders.items()
    ]


def carry_out(
    config: Mapping[str, Any],
    encoders: Mapping[str, Mapping[str, Any]],
    seeds: Iterable[int],
    folder: Path,
    run_one: Callable[[dict[str, Any], Path], dict[str, Any]],
    device: str,
) -> tuple[list[Run], dict[str, dict[int, dict[str, Any]]], list[str]]:
    """Plan all runs, do what is not done, as many at a time as there is room for, and compare them.

    Args:
        config: as for ``plan``; ``train.threads`` are those of one run.
        encoders: as for ``plan``.
        seeds: as for ``plan``.
        folder: as for ``plan``.
        run_one: as for ``run_all``; picklable.
        device: where they run.

    Returns:
        The runs, and what ``run_all`` returns.

    Raises:
        ComparisonError: they differ in more than the encoder, as asked for or as they ran.
    """
    runs = plan(config, encoders, seeds, folder)
    at_once = jobs(config["train"]["threads"], device)
    outcomes, difference = run_all(runs, run_one, at_once)
    compare_as_run(runs)
    return runs, outcomes, difference


def compare_as_run(runs: Iterable[Run]) -> None:
    """Compare what the runs wrote down about themselves: equal but for the encoder.

    ``run_all`` compares what was asked for; ``resolved.json`` is what a training really read.
    """
    from backbone.files import read_json

    by_seed: dict[int, dict[str, Any]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, {})[run.label] = read_json(run.folder / RESOLVED)
    for written in by_seed.values():
        config_difference(written)


def common_details(
    encoders: Mapping[str, Mapping[str, Any]],
    outcomes: Mapping[str, Mapping[int, Mapping[str, Any]]],
) -> dict[str, Any]:
    """What the report of every task says of encoders and runs.

    Args:
        encoders: as of ``plan``, each with ``spec`` and ``settings``.
        outcomes: of ``run_all``, each with ``validation``.
    """
    return {
        "encoders": {
            label: {"spec": entry["spec"], **entry["settings"]} for label, entry in encoders.items()
        },
        "validation": summarise(outcomes, "validation"),
    }


def config_difference(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Dotted keys, sorted, whose values are not the same in all of ``configs`` (label -> config).

    Raises:
        ComparisonError: a differing key does not belong to the encoder; the text has every label's
            value.
    """
    differing = _differing(configs)
    foreign = {key: values for key, values in differing.items() if not _is_encoder(key)}
    if foreign:
        raise ComparisonError(
            "the runs differ in more than the encoder, so they cannot be compared: "
            + _describe(foreign)
        )
    return sorted(differing)


def _is_encoder(key: str) -> bool:
    return key == ENCODER or key.startswith(f"{ENCODER}.")


def _differing(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Dotted key -> name -> value, for the keys that are not equal under all names."""
    flat = {name: flatten(config) for name, config in configs.items()}
    values = {
        key: {name: flat[name].get(key, ABSENT) for name in flat}
        for key in sorted(set().union(*flat.values()))
    }
    return {
        key: found
        for key, found in values.items()
        if any(value != next(iter(found.values())) for value in found.values())
    }


def _describe(differing: Mapping[str, Mapping[str, Any]]) -> str:
    return "; ".join(
        f"{key} is " + ", ".join(f"{value!r} ({name})" for name, value in values.items())
        for key, values in differing.items()
    )


def run_all(
    runs: Sequence[Run],
    run_one: Callable[[dict[str, Any], Path], dict[str, Any]],
    jobs: int = 1,
) -> tuple[dict[str, dict[int, dict[str, Any]]], list[str]]:
    """Run, or take from an earlier call, every planned run.

    Args:
        runs: from ``plan``.
        run_one: ``(resolved config, folder) -> outcome`` as JSON values. It is called again in the
            same folder after an interruption and goes on from what it finds there.
        jobs: processes that share the runs; with more than one, ``run_one`` must be picklable.

    Returns:
        label -> seed -> outcome, and the keys in which the encoders' configs differ.

    Raises:
        ComparisonError: before anything runs, if the configs differ in more than the encoder.
    """
    from backbone.files import read_json

    difference = sorted(
        {
            key
            for seed in {run.seed for run in runs}
            for key in config_difference({r.label: r.config for r in runs if r.seed == seed})
        }
    )
    pending = [run for run in runs if not _is_finished(run)]
    for run in runs:
        if run not in pending:
            logger.info("%s, seed %d: finished earlier, in %s", run.label, run.seed, run.folder)
    for number, run in enumerate(_finishing(pending, run_one, min(jobs, len(pending))), start=1):
        done = f"{number} of {len(pending)}"
        logger.info("run %s done: %s, seed %d", done, run.label, run.seed)
    outcomes: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        result = read_json(run.folder / RESULT)
        outcomes.setdefault(run.label, {})[run.seed] = result["outcome"]
    return outcomes, difference


def _finishing(
    runs: Sequence[Run], run_one: Callable[[dict[str, Any], Path], dict[str, Any]], jobs: int
) -> Iterator[Run]:
    """Do all runs, in this process or in several; yields each when it is done."""
    if jobs <= 1:
        for run in runs:
            _do(run, run_one)
            yield run
        return
    with _quiet_bars():  # bars of several processes would write over each other
        pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
        bar = tqdm(total=len(runs), desc=f"runs, {jobs} at a time", unit="run")
        try:
            waiting = {pool.submit(_do, run, run_one): run for run in runs}
            for future in as_completed(waiting):
                future.result()
                bar.update()
                yield waiting[future]
        finally:
            bar.close()
            pool.shutdown(cancel_futures=True)


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """Let processes that start meanwhile show no progress bars."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"  # read by tqdm when it is imported
    try:
        yield
    finally:
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before


def _is_finished(run: Run) -> bool:
    """Whether the result is there; a folder of another config is set aside first."""
    from backbone.files import read_json

    _set_aside_if_stale(run)
    if not (run.folder / RESULT).is_file():
        return False
    result = read_json(run.folder / RESULT)
    if result["digest"] != digest(run.config):
        raise ComparisonError(
            f"{run.folder / RESULT} does not belong to the config.json beside it "
            f"(digest {result['digest']}, not {digest(run.config)}); delete the folder"
        )
    return True


def _do(run: Run, run_one: Callable[[dict[str, Any], Path], dict[str, Any]]) -> None:
    """One run, from its config to its result file."""
    from backbone.files import write_json

    write_json(run.folder / "config.json", run.config)
    start = time.perf_counter()
    outcome = run_one(run.config, run.folder)
    seconds = round(time.perf_counter() - start, 3)
    write_json(
        run.folder / RESULT,
        {"digest": digest(run.config), "wall_seconds": seconds, "outcome": outcome},
    )


def _set_aside_if_stale(run: Run) -> None:
    """Rename the folder of a run of another config, and say in what it differs."""
    from backbone.files import read_json

    config_file = run.folder / "config.json"
    if not config_file.is_file():
        return
    found = read_json(config_file)
    differing = _differing({"there": found, "now": run.config})
    if not differing:
        return
    name = f"{run.folder.name}.{digest(found)}"
    taken = len(list(run.folder.parent.glob(f"{name}*")))
    aside = run.folder.with_name(f"{name}.{taken}" if taken else name)
    run.folder.rename(aside)
    logger.warning(
        "%s held a run of another config, now set aside as %s: %s",
        run.folder,
        aside.name,
        _describe(differing),
    )
