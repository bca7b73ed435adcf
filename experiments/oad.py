"""Online action detection: the MAT head on frozen features, encoder against encoder.

The data are miniworld's streams, rendered on first use, or videos and per-step targets at the paths
of the config. Each encoder reads every video once; then a head is trained per encoder and seed, by
the same config. Everything lies under one folder:

    DIR/miniworld/, DIR/encoders/          the rendered world and the mini encoders (miniworld only)
    DIR/features/<encoder>-<digest>/       features of every video
    DIR/<encoder>/seed<k>/                 one run: config.json, result.json, the head
    DIR/report.{json,md,png}               the comparison
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from experiments import comparison, recipe
from experiments import preflight as checks
from experiments.comparison import (
    ENCODER,
    STREAM,
    Comparison,
    carry_out,
    common_details,
)
from experiments.config import UserError, digest, field_defaults, load_config, sections
from experiments.environment import bound_threads, choose_device, jobs

logger = logging.getLogger(__name__)

ABOUT = """\
Trains the same head on the features of each encoder, once per seed, and reports
how far they lie apart. Without --config it runs on miniworld, small rendered
videos whose actions are motion and change, with mini encoders that it trains on
first use. It goes on where it stopped, and answers from caches what is done."""
EXAMPLES = """\
  python experiments/run.py oad
  python experiments/run.py oad --third-arm --seeds 0 1 2 3 4
  python experiments/run.py oad --set train.epochs=3 --work-dir /tmp/try
  python experiments/run.py oad --config thumos14 --set data.root=/data/thumos14 --device cuda
  python experiments/run.py oad --config my_config.py \\
      --encoders siglip:google/siglip-base-patch16-224 streamformer:/weights/mine
  python experiments/run.py oad --config thumos14 --set data.root=/data/thumos14 \\
      --set data.foreign=True --encoders features:/data/siglip features:/data/streamformer"""

SECTIONS = ("data", "head", "train", "eval")  # what integrations.oad reads of a config
READY = "features:"  # instead of an encoder: a folder of features that exist
FRAME_RULE = ("protocol", "video_fps", "chunk_frames", "chunk_starts", "resize")  # of data
FRAMES_AT_ONCE = 48  # through an encoder in feature extraction: speed and memory only
NOTES = [
    "online: every step scored once, from its past alone; the main number",
    "window: windows side by side, all their tokens scored, though some have seen later steps; it "
    "stands beside the numbers that StreamFormer's authors report, and beside nothing else",
    "chance: what a score that says nothing gets, the mean share of positive steps",
]


@dataclass(frozen=True)
class Source:
    """Where the data of a comparison lie, and what each encoder label means there."""

    title: str
    root: Path  # holds target_perframe/ and data_info.json
    videos: dict[str, Path]  # name -> file, of all sets that the config uses
    encoders: dict[str, str]  # label -> spec
    details: dict[str, Any]  # for the report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb: those of every comparison."""
    comparison.add_arguments(parser, work_dir="work_dirs/oad")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Resolve, preflight, run or resume, evaluate, report; returns the report."""
    return comparison.answer(
        args,
        task="oad",
        title="Online action detection",
        resolve=resolve,
        preflight=preflight,
        compare=compare,
    )


def compare(
    config: Mapping[str, Any],
    labels: Mapping[str, str],
    seeds: Sequence[int],
    folder: Path,
    device: str,
) -> Comparison:
    """Extract, train and evaluate for every encoder and seed; see ``comparison.answer``."""
    bound_threads(config["train"]["threads"])
    source = prepare(config, labels, folder)
    encoders = {
        label: extract(label, spec, source, config, folder, device)
        for label, spec in source.encoders.items()
    }
    train = partial(run_one, data_root=source.root, folder=folder, device=device)
    _, outcomes, difference = carry_out(config, encoders, seeds, folder, train, device)
    details = _details(config, source, encoders, outcomes)
    return Comparison(source.title, outcomes, difference, details)


def resolve(config: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The config with all defaults, checked by those who will read it."""
    from experiments.miniworld import WorldParams
    from integrations.oad.config import FROM_DATA, DataConfig, EvalConfig, OadConfig, TrainConfig
    from integrations.oad.mat_config import MatConfig

    defaults = {
        "data": field_defaults(DataConfig),
        "head": field_defaults(MatConfig, leave_out=FROM_DATA),
        "train": field_defaults(TrainConfig),
        "eval": field_defaults(EvalConfig),
        "stream": STREAM,
        "world": field_defaults(WorldParams),
    }
    resolved = load_config("oad", config, overrides, defaults, free=("mini",))
    try:
        settings = OadConfig.from_dict(sections(resolved, SECTIONS))
        settings.mat(visual_size=1, motion_size=0, num_classes=2)
    except ValueError as error:
        raise UserError(f"config {config}: {error}") from error
    if "mini" in resolved:
        resolved["mini"] = recipe.mini(resolved["mini"], resolved["world"])
    return resolved


def preflight(
    config: Mapping[str, Any], labels: Mapping[str, str], seeds: Sequence[int], folder: Path
) -> None:
    """Refuse at once, with all that is missing, what would fail later.

    Raises:
        UserError: files, weights, disk or memory that are not there, each named.
    """
    data = config["data"]
    problems = checks.repeated_seeds(seeds)
    problems += checks.encoders(labels, mini=data["root"] is None)
    unfit, steps = checks.data_root(data["root"], rendered="world" in config), 0
    if data["root"] is not None and not unfit:
        with_videos = not all(spec.startswith(READY) for spec in labels.values())
        unfit, steps = _check_data(data, with_videos)
    problems += unfit
    feature_bytes = steps * checks.WIDEST_FEATURE * 4
    parameters = _head_parameters(config)
    problems += checks.disk(
        folder,
        feature_bytes * len(labels)
        + parameters * 4 * checks.COPIES_ON_DISK * len(labels) * len(seeds)
        + (checks.MINIWORLD_BYTES if "world" in config else 0),
    )
    problems += checks.memory(
        parameters * 4 * checks.COPIES_IN_MEMORY + (feature_bytes if data["preload"] else 0),
        mend="set data.preload=False to read windows from disk" if data["preload"] else None,
    )
    checks.refuse(problems)


def prepare(config: Mapping[str, Any], labels: Mapping[str, str], folder: Path) -> Source:
    """Render the world and train the mini encoders, or find the files that the config names."""
    data = config["data"]
    if data["root"] is not None:
        root = Path(data["root"])
        return Source(
            title=data["dataset"],
            root=root,
            videos=find_videos(data, root),
            encoders=checks.released(labels),
            details={},
        )
    from experiments.miniworld import WorldParams, render_world, world_key
    from experiments.miniworld.encoders import specs_of

    params = WorldParams(**config["world"])
    world = render_world(folder / "miniworld", params)
    encoders = specs_of(labels, folder, config)
    root = world / "streams"
    return Source(
        title="miniworld",
        root=root,
        videos=find_videos(data, root),
        encoders=encoders,
        details={"world": world_key(params), "probe": _probe(labels, encoders, world, folder)},
    )


def _probe(
    labels: Mapping[str, str], encoders: Mapping[str, str], world: Path, folder: Path
) -> dict[str, dict[str, float]]:
    """What a linear probe says of the mini encoders, in points.

    It shows whether SigLIP, which cannot see motion, at least knows shape and colour.
    """
    from experiments.miniworld.encoders import probe_looks

    mini = {label: encoders[label] for label, spec in labels.items() if ":" not in spec}
    known = probe_looks(world, mini, folder / "encoders")
    return {label: {k: 100 * v for k, v in found.items()} for label, found in known.items()}


def extract(
    label: str,
    spec: str,
    source: Source,
    config: Mapping[str, Any],
    folder: Path,
    device: str,
) -> dict[str, Any]:
    """Write one encoder's features of all videos, unless ready ones are given.

    Returns:
        What decides this encoder's part of a run: ``spec``, ``settings``, and ``features``, their
        folder, relative to ``DIR/features``.
    """
    if spec.startswith(READY):
        where = Path(spec.removeprefix(READY)).resolve()
        return {"spec": spec, "settings": {"kind": "features"}, "features": str(where)}
    from backbone import build_encoder
    from integrations.oad.features import FrameRule, lacking_features
    from pretrain.launch import run_processes

    data = config["data"]
    build = partial(build_encoder, spec, **config["stream"], device=choose_device(device))
    encoder = build()
    rule = {key: data[key] for key in FRAME_RULE}
    entry = {"spec": spec, "settings": encoder.settings()}
    entry["features"] = f"{label}-{digest({**rule, **entry['settings'], 'root': str(source.root)})}"
    out = folder / "features" / entry["features"]
    logger.info("features of %s: %s", label, out)
    todo = lacking_features(list(source.videos.values()), encoder, out, FrameRule(**rule))
    if todo:
        write = partial(_extract_share, build, todo, out, rule)
        run_processes(write, processes=min(len(todo), jobs(config["train"]["threads"], device)))
    return entry


def _extract_share(
    build: Callable[[], Any], videos: Sequence[Path], out: Path, rule: Mapping[str, Any]
) -> None:
    """One process's part of a feature extraction."""
    from integrations.oad.features import extract_folder

    at_once = max(1, FRAMES_AT_ONCE // rule["chunk_frames"])
    extract_folder(videos, build(), out, **rule, batch_chunks=at_once)


def run_one(
    config: Mapping[str, Any], where: Path, data_root: Path, folder: Path, device: str
) -> dict[str, Any]:
    """Train and evaluate one head; all metrics in points, by name."""
    from integrations.oad.train import run_oad

    result = run_oad(
        sections(config, SECTIONS),
        features_root=folder / "features" / config[ENCODER]["features"],
        data_root=data_root,
        work_dir=where,
        seed=config["seed"],
        device=device,
    )
    return outcome_of(result, config["data"])


def outcome_of(result: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of a finished run as ``report`` reads them, in points.

    The first test set gives the main numbers; those of another set carry its name after ``@``.
    """
    metrics, chance = _points(result["test"], data["test_sets"])
    validation, _ = _points(result["val"], data["val_sets"])
    first = result["test"][data["test_sets"][0]]
    classes = next(value for name, value in first.items() if name.endswith("/classes"))
    return {
        "metrics": metrics,
        "chance": chance,
        "per_class": {name: 100 * value for name, value in classes.items()},
        "validation": validation,
        "head_parameters": result["parameters"],
        "iterations": result["iterations"],
    }


def _points(
    results: Mapping[str, Mapping[str, Any]], sets: Sequence[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Means and chance levels of some sets, by metric."""
    metrics, chance = {}, {}
    for place, name in enumerate(sets):
        suffix = f"@{name.removesuffix('_session_set')}" if place else ""
        for metric, value in results[name].items():
            protocol, _, kind = metric.partition("/")
            if kind in ("mAP", "mcAP"):
                metrics[metric + suffix] = 100 * value
                chance[metric + suffix] = 100 * results[name][f"{protocol}/prior"]
    return metrics, chance


def _details(
    config: Mapping[str, Any],
    source: Source,
    encoders: Mapping[str, Mapping[str, Any]],
    outcomes: Mapping[str, Mapping[int, Mapping[str, Any]]],
) -> dict[str, Any]:
    one = next(iter(next(iter(outcomes.values())).values()))
    sets = read_sets(config["data"], source.root)
    return {
        **common_details(encoders, outcomes),
        "chance": one["chance"],
        "titles": {
            metric: metric.replace("/", " ").replace("@", "\n") for metric in one["metrics"]
        },
        "notes": NOTES,
        "head_parameters": one["head_parameters"],
        "iterations": one["iterations"],
        "videos": {name: len(videos) for name, videos in sets.items()},
        "steps": {name: _count_steps(source.root, videos) for name, videos in sets.items()},
        **source.details,
    }


def _sets(data: Mapping[str, Any]) -> list[str]:
    return [data["train_set"], *data["val_sets"], *data["test_sets"]]


def read_sets(data: Mapping[str, Any], root: Path) -> dict[str, list[str]]:
    """Names of the videos of every set that the config uses; sets without name are refused."""
    from integrations.oad.data import DataError, read_data_info

    try:
        info = read_data_info(root, data["dataset"])
    except DataError as error:
        raise UserError(f"data.dataset: {error}") from error
    unknown = [key for key in _sets(data) if key not in info]
    if unknown:
        known = ", ".join(key for key in info if key.endswith("session_set"))
        raise UserError(
            f"{data['dataset']} has no set {', '.join(unknown)}; it has {known}: change "
            "data.train_set, data.val_sets or data.test_sets"
        )
    return {key: info[key] for key in _sets(data)}


def class_count(data: Mapping[str, Any], root: Path) -> int:
    """Columns of the targets: the classes with the background."""
    from integrations.oad.data import read_data_info

    return len(read_data_info(root, data["dataset"])["class_names"])


def _names(sets: Mapping[str, Sequence[str]]) -> list[str]:
    return sorted({name for names in sets.values() for name in names})


def find_videos(data: Mapping[str, Any], root: Path) -> dict[str, Path]:
    """Files of the videos that the config uses, by name, as far as they are there."""
    from integrations.oad.features import VIDEO_SUFFIXES

    wanted = set(_names(read_sets(data, root)))
    files = (root / (data["videos"] or "videos")).rglob("*")
    found = {path.stem: path for path in files if path.suffix.lower() in VIDEO_SUFFIXES}
    return {name: found[name] for name in sorted(wanted & found.keys())}


def _count_steps(root: Path, names: Sequence[str]) -> int:
    import numpy as np

    targets = (root / "target_perframe" / f"{name}.npy" for name in names)
    return sum(len(np.load(target, mmap_mode="r")) for target in targets)


def _check_data(data: Mapping[str, Any], with_videos: bool) -> tuple[list[str], int]:
    """What is missing of a real data set, and the number of its steps."""
    root = Path(data["root"])
    try:
        names = _names(read_sets(data, root))
    except UserError as error:
        return [str(error)], 0
    problems = []
    found = find_videos(data, root)
    lacking = [name for name in names if name not in found]
    if lacking and with_videos:
        folder = root / (data["videos"] or "videos")
        problems.append(
            f"data.videos: {folder} lacks {checks.some(lacking)} of {len(names)} videos"
        )
    arrays = {"data.root": root / "target_perframe"}
    if data["motion"]:
        arrays["data.motion"] = root / data["motion"]
    for key, folder in arrays.items():
        lacking = [name for name in names if not (folder / f"{name}.npy").is_file()]
        if lacking:
            problems.append(
                f"{key}: {folder} lacks {checks.some(lacking)} of {len(names)} files .npy"
            )
    return problems, 0 if problems else _count_steps(root, names)


def _head_parameters(config: Mapping[str, Any]) -> int:
    """Parameters of the head at the widest usual features, counted without allocating them."""
    import torch

    from integrations.oad.config import OadConfig
    from integrations.oad.mat import MatHead

    sizes = {"visual_size": checks.WIDEST_FEATURE, "motion_size": 0, "num_classes": 100}
    with torch.device("meta"):
        head = MatHead(OadConfig.from_dict(sections(config, SECTIONS)).mat(**sizes))
    return sum(parameter.numel() for parameter in head.parameters())
