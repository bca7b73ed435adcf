"""Online video instance segmentation: adapter and head on frozen features, encoder against encoder.

The data are miniworld's instances, rendered on first use, or YouTube-VIS documents at the paths of
the config. A ViT-Adapter, a Mask2Former head and a tracking embedding are trained per encoder and
seed, by the same config, and videos are evaluated online. Everything lies under one folder:

    DIR/miniworld/, DIR/encoders/     rendered videos and the mini encoders (miniworld only)
    DIR/tokens/<encoder>-<digest>/    what the frozen encoder says of the training videos
    DIR/<encoder>/seed<k>/            one run: config.json, result.json, the segmenter, predictions
    DIR/report.{json,md,png}          the comparison
    DIR/strip.png                     test videos with masks and identities, encoder by encoder
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
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
    Run,
    carry_out,
    common_details,
)
from experiments.config import UserError, digest, field_defaults, load_config, sections
from experiments.environment import bound_threads, choose_device
from experiments.report import summarise

logger = logging.getLogger(__name__)

ABOUT = """\
Trains the same adapter, head and tracking embedding on each encoder, once per
seed, and reports how far they lie apart. Without --config it runs on miniworld:
small rendered videos of shapes that move, cross and hide, with mini encoders that
it trains on first use. It goes on where it stopped, and answers from caches what
is done."""
EXAMPLES = """\
  python experiments/run.py ovis
  python experiments/run.py ovis --third-arm --seeds 0 1 2
  python experiments/run.py ovis --set train.iterations=100 --work-dir /tmp/try
  python experiments/run.py ovis --config ytvis2019 --set data.root=/data/ytvis2019 --device cuda
  python experiments/run.py ovis --config ytvis2019_480 --set data.root=/data/ytvis2019 \\
      --set train.precision=bfloat16 --device cuda
  python experiments/run.py ovis --config my_config.py \\
      --encoders siglip:google/siglip-base-patch16-224 streamformer:/weights/mine"""

SECTIONS = (  # what integrations.ovis reads of a config
    "data", "adapter", "head", "loss", "contrastive", "tracker", "video", "train", "eval",
)  # fmt: skip
HIDDEN = "recall_camouflaged"
EXAMPLES_DRAWN = 3  # videos in the strip
NOTES = [
    "masks and identities are said frame by frame and never taken back; a track's score "
    "is averaged over its frames when the video ends",
    "AP is that of YouTube-VIS: the mean over categories and over the IoU thresholds 0.50 to 0.95 "
    "of whole tracks",
]
NOTE_HIDDEN = (
    "recall camouflaged: share of the camouflaged objects found as whole tracks at IoU 0.5. They "
    "are cut from the background's own texture, so that one frame does not show them"
)
NOTE_HOLD_OUT = (
    "evaluated on a fixed hold-out of the training videos, because the server keeps the other "
    "annotations: these numbers are comparable with each other and with no published one"
)
NOTE_TOKENS = (
    "the encoder is frozen, so its tokens of each training video were computed once, as a stream "
    "gives them"
)


@dataclass(frozen=True)
class Source:
    """Where the data of a comparison lie, and what each encoder label means there."""

    title: str
    root: Path
    encoders: dict[str, str]  # label -> spec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb: those of every comparison."""
    comparison.add_arguments(parser, work_dir="work_dirs/ovis")
    parser.set_defaults(seeds=[0, 1])


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Resolve, preflight, run or resume, evaluate, report; returns the report."""
    return comparison.answer(
        args,
        task="ovis",
        title="Online video instance segmentation",
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
    """Encode, train and evaluate for every encoder and seed; see ``comparison.answer``."""
    bound_threads(config["train"]["threads"])
    source = prepare(config, labels, folder)
    encoders = {
        label: describe(label, spec, source, config, folder, device)
        for label, spec in source.encoders.items()
    }
    train = partial(run_one, data_root=source.root, folder=folder, device=device)
    runs, outcomes, difference = carry_out(config, encoders, seeds, folder, train, device)
    draw_examples(runs, source, config, folder / "strip.png")
    return Comparison(source.title, outcomes, difference, _details(config, encoders, outcomes))


def resolve(config: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The config with all defaults, checked by those who will read it."""
    from experiments.miniworld import WorldParams
    from experiments.miniworld.instances import InstanceParams
    from integrations.ovis.adapter import AdapterConfig
    from integrations.ovis.config import FROM_DATA, FROM_ENCODER, RECORDS, OvisConfig
    from integrations.ovis.head import HeadConfig

    records = {**RECORDS, "instances": InstanceParams, "world": WorldParams}
    defaults = {
        **{name: field_defaults(record) for name, record in records.items()},
        "adapter": field_defaults(AdapterConfig, leave_out=FROM_ENCODER),
        "head": field_defaults(HeadConfig, leave_out=FROM_DATA),
        "stream": STREAM,
    }
    resolved = load_config("ovis", config, overrides, defaults, free=("mini",))
    try:
        OvisConfig.from_dict(sections(resolved, SECTIONS))
        HeadConfig(in_channels=1, num_classes=1, **resolved["head"])
        InstanceParams(**resolved.get("instances", {}))
    except (TypeError, ValueError) as error:
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
    problems += checks.encoders(labels, mini="mini" in config)
    unfit = checks.data_root(data["root"], rendered="instances" in config)
    if data["root"] is not None and not unfit:
        unfit = _check_data(data)
    problems += unfit
    parameters = _parameters(config, checks.WIDEST_FEATURE)
    problems += checks.disk(
        folder,
        parameters * 4 * checks.COPIES_ON_DISK * len(labels) * len(seeds)
        # tokens of patches of 4 pixels take more than all the rest
        + (checks.MINIWORLD_BYTES * (1 + 2 * len(labels)) if "mini" in config else 0),
    )
    problems += checks.memory(parameters * 4 * checks.COPIES_IN_MEMORY)
    checks.refuse(problems)


def prepare(config: Mapping[str, Any], labels: Mapping[str, str], folder: Path) -> Source:
    """Render videos and train the mini encoders, or find the files that the config names."""
    data = config["data"]
    if data["root"] is not None:
        root, title = Path(data["root"]), data["dataset"]
    else:
        from experiments.miniworld.instances import InstanceParams, render_instances

        root = render_instances(folder / "miniworld", InstanceParams(**config["instances"]))
        title = "miniworld"
    if "mini" not in config:
        return Source(title, root, checks.released(labels))
    from experiments.miniworld.encoders import specs_of

    return Source(title, root, specs_of(labels, folder, config))


def describe(
    label: str,
    spec: str,
    source: Source,
    config: Mapping[str, Any],
    folder: Path,
    device: str,
) -> dict[str, Any]:
    """What decides one encoder's part of a run; its tokens are written where they are kept.

    Returns:
        ``spec``, ``settings``, and ``tokens``, their folder relative to ``DIR/tokens``, or None.
    """
    encoder = _build(spec, config, device)
    entry = {"spec": spec, "settings": encoder.settings(), "tokens": None}
    if not config["data"]["stored"]:
        return entry
    from integrations.ovis.adapter import AdapterConfig
    from integrations.ovis.config import OvisConfig
    from integrations.ovis.tokens import describe as facts_of
    from integrations.ovis.tokens import write_tokens
    from integrations.ovis.train import read_splits

    settings = OvisConfig.from_dict(sections(config, SECTIONS))
    taps = AdapterConfig.for_encoder(encoder, **settings.adapter).taps
    videos = read_splits(settings.data, source.root).train
    size = (settings.data.short, settings.data.longest)
    facts = {**facts_of(encoder, taps, *size), "root": str(source.root), "videos": videos.name}
    entry["tokens"] = f"{label}-{digest(facts)}"
    logger.info("tokens of %s: %s", label, folder / "tokens" / entry["tokens"])
    write_tokens(encoder, taps, videos, folder / "tokens" / entry["tokens"], *size)
    return entry


def run_one(
    config: Mapping[str, Any], where: Path, data_root: Path, folder: Path, device: str
) -> dict[str, Any]:
    """Train and evaluate one segmenter; all metrics in points, by name."""
    from integrations.ovis.train import run_ovis

    encoder = config[ENCODER]
    result = run_ovis(
        sections(config, SECTIONS),
        _build(encoder["spec"], config, device),
        data_root=data_root,
        work_dir=where,
        seed=config["seed"],
        device=choose_device(device),
        tokens_root=encoder["tokens"] and folder / "tokens" / encoder["tokens"],
    )
    return outcome_of(result)


def outcome_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of a finished run as ``report`` reads them, in points."""
    return {
        "metrics": _main(result["test"]),
        "per_class": dict(result["test"]["classes"]),
        "agnostic": {"AP": result["test"]["agnostic_AP"]},
        "validation": _main(result["val"]) if "val" in result else {},
        "trained_parameters": result["parameters"],
        "iterations": result["iterations"],
    }


def draw_examples(
    runs: Sequence[Run], source: Source, config: Mapping[str, Any], path: Path
) -> None:
    """Draw some test videos as every encoder's first run sees them, frame by frame.

    The videos are chosen by their annotations alone: two objects or more, hidden ones first.
    """
    from backbone.files import replacing
    from experiments.masks import plot_strip
    from experiments.track import segmenter_of
    from integrations.ovis.config import OvisConfig
    from integrations.ovis.data import read_frame
    from integrations.ovis.train import SEGMENTER, read_splits

    test = read_splits(OvisConfig.from_dict(sections(config, SECTIONS)).data, source.root).test
    first = min(run.seed for run in runs)
    segmenters = {
        run.label: segmenter_of(
            run.folder / SEGMENTER, _build(run.config[ENCODER]["spec"], config, "cpu")
        )
        for run in runs
        if run.seed == first
    }
    rows = []
    for video in choose_examples(test.videos):
        frames = [
            read_frame(video, test.root, number).permute(1, 2, 0).numpy()
            for number in range(len(video.files))
        ]
        truth = [track.masks() for track in video.tracks]
        names = [test.class_names[track.label] for track in video.tracks]
        said = {}
        for label, segmenter in segmenters.items():
            segmenter.reset()
            said[label] = [segmenter.push(frame).above(0.5) for frame in frames]
        rows.append((frames, truth, names, said))
    with replacing(path) as temporary:
        plot_strip(temporary, rows, test.class_names)


def choose_examples(videos: Sequence[Any], count: int = EXAMPLES_DRAWN) -> list[Any]:
    """Videos for the strip, by their annotations: those with several kinds of objects first."""

    def kinds(video: Any) -> int:
        found = {bool(track.annotation.get("camouflaged")) for track in video.tracks}
        return -(2 * len(found) + (len(video.tracks) > 1))

    return sorted(videos, key=kinds)[:count]  # stable: else as in the document


def _main(found: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that papers print, and the recall of groups."""
    from integrations.ovis.evaluation import REPORTED

    groups = [name for name in found if name.startswith("recall_")]
    return {name: found[name] for name in (*REPORTED, *groups)}


def _details(
    config: Mapping[str, Any],
    encoders: Mapping[str, Mapping[str, Any]],
    outcomes: Mapping[str, Mapping[int, Mapping[str, Any]]],
) -> dict[str, Any]:
    one = next(iter(next(iter(outcomes.values())).values()))
    data = config["data"]
    notes = [
        *NOTES,
        *([NOTE_HIDDEN] if HIDDEN in one["metrics"] else []),
        *([NOTE_HOLD_OUT] if data["test_split"] is None else []),
        *([NOTE_TOKENS] if data["stored"] else []),
    ]
    agnostic = summarise(outcomes, "agnostic")
    return {
        **common_details(encoders, outcomes),
        "titles": {name: name.replace("_", "\n") for name in one["metrics"]},
        "notes": notes,
        "pictures": {"strip.png": "Test videos, frame by frame"},
        "trained_parameters": one["trained_parameters"],
        "iterations": one["iterations"],
        "agnostic": agnostic,
        "tables": {
            "Found, whatever it is called": {
                label: {"AP of all categories as one": values["AP"]["mean"]}
                for label, values in agnostic.items()
            }
        },
    }


def _build(spec: str, config: Mapping[str, Any], device: str) -> Any:
    from backbone import build_encoder

    return build_encoder(spec, **config["stream"], device=choose_device(device))


def _check_data(data: Mapping[str, Any]) -> list[str]:
    """What is missing of a real data set."""
    from integrations.ovis.config import DataConfig
    from integrations.ovis.layout import LayoutError
    from integrations.ovis.rle import MaskError
    from integrations.ovis.train import read_splits

    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    try:
        splits = read_splits(DataConfig(**values), data["root"])
    except (LayoutError, MaskError, OSError) as error:
        return [f"data: {error}"]
    known = [videos for videos in (splits.train, splits.val, splits.test) if videos is not None]
    return [
        f"data: {videos.name}: there is no {videos.root / videos.videos[0].files[0]}"
        for videos in known
        if not (videos.root / videos.videos[0].files[0]).is_file()
    ]


def _parameters(config: Mapping[str, Any], width: int) -> int:
    """Parameters of adapter and head at the widest usual encoder, counted without allocating."""
    import torch

    from integrations.ovis.adapter import AdapterConfig, ViTAdapter
    from integrations.ovis.head import HeadConfig, SegmentationHead

    width -= width % config["adapter"]["num_heads"]
    with torch.device("meta"):
        adapter = ViTAdapter(
            AdapterConfig(embed_dim=width, patch_size=16, taps=(1, 1, 1, 1), **config["adapter"])
        )
        head = SegmentationHead(HeadConfig(in_channels=width, num_classes=100, **config["head"]))
    return sum(w.numel() for part in (adapter, head) for w in part.parameters())
