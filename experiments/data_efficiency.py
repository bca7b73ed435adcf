"""Do many tasks make better use of the same videos than captions alone? Over shares of the data.

Both pretrainings see the same videos, updates and clips in an update: one learns from captions
alone (contrastive: retrieval), the other from all tasks.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments import study
from experiments.config import UserError
from experiments.report import FAINT, INK, colours_of, picture
from experiments.study import Arm

logger = logging.getLogger(__name__)

ABOUT = """\
Pretrains on 10 %, 30 % and all of the videos, with captions alone and with all
tasks, and compares the frozen encoders downstream and zero-shot, next to SigLIP.
Every pretraining has as many updates. It goes on where it stopped."""
EXAMPLES = """\
  python experiments/run.py data-efficiency
  python experiments/run.py data-efficiency --shares 0.05 1 --set optim.updates=500
  python experiments/run.py data-efficiency --config multitask_1m --set data.root=/data \\
      --downstream oad=thumos14 --set oad.data.root=/data/thumos14 --device cuda"""

REGIMES = ("contrastive", "multitask")
COLOURS = dict(zip(REGIMES, ("#d55e00", "#0072b2"), strict=True))
BASE = "siglip"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    study.add_arguments(parser, work_dir="work_dirs/data-efficiency")
    parser.add_argument(
        "--shares",
        nargs="+",
        type=float,
        default=[0.1, 0.3, 1.0],
        metavar="SHARE",
        help="of the videos, default: 0.1 0.3 1",
    )


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Pretrain both ways on every share, compare, report; the main process returns the report."""
    shares = sorted(set(args.shares))
    if not all(0 < share <= 1 for share in shares):
        raise UserError(f"--shares {args.shares}: each must lie in 0 to 1, 0 excluded")
    return study.run(
        args,
        verb="data-efficiency",
        title="Data efficiency of the pretraining",
        base=BASE,
        arms_of=partial(arms, shares=shares),
        pairs_of=partial(pairs, shares=shares),
        notes=[
            "contrastive: captions alone; multitask: all tasks; the number is the share of the "
            "videos in per cent, the same videos for both",
        ],
        draw=plot,
    )


def label(regime: str, share: float) -> str:
    """``("multitask", 0.3)`` -> ``multitask-30``, a folder's name."""
    return f"{regime}-{100 * share:g}"


def arms(config: Mapping[str, Any], shares: Sequence[float]) -> list[Arm]:
    """Both regimes at every share.

    Raises:
        UserError: a config without captions, or with nothing else.
    """
    tasks = tuple(config["tasks"])
    captions = tuple(n for n, task in config["tasks"].items() if task["objective"] == "retrieval")
    if not captions or captions == tasks:
        raise UserError(
            f"the config has the tasks {', '.join(tasks)}; this comparison needs one of retrieval, "
            "and others beside it"
        )
    kept = dict(zip(REGIMES, (captions, tasks), strict=True))
    return [
        Arm(label(regime, share), kept[regime], share) for share in shares for regime in REGIMES
    ]


def pairs(labels: Sequence[str], shares: Sequence[float]) -> list[tuple[str, str]]:
    """Multitask with contrastive at every share, the largest first; then with SigLIP."""
    contrastive, multitask = (
        [label(regime, share) for share in reversed(shares)] for regime in REGIMES
    )
    return [*zip(multitask, contrastive, strict=True), (multitask[0], BASE)]


def plot(report: Mapping[str, Any], path: Path) -> None:
    """The main downstream metric over the share of the videos, a line per regime."""
    metrics = report["metrics"]
    metric = next(iter(metrics[BASE]))
    shares = sorted({arm["share"] for arm in report["arms"].values()})
    with picture(path, report["title"], (7.5, 5.2)) as (axes,):
        for regime in REGIMES:
            values = [metrics[label(regime, share)][metric] for share in shares]
            x = [100 * share for share in shares]
            means = [value["mean"] for value in values]
            axes.plot(x, means, "o-", color=COLOURS[regime], linewidth=2, label=regime, zorder=3)
            for place, value in zip(x, values, strict=True):
                axes.scatter(
                    [place] * len(value["seeds"]), value["seeds"], s=18, color="white",
                    edgecolors=COLOURS[regime], linewidths=0.9, zorder=4,
                )  # fmt: skip
            for place, mean in zip(x, means, strict=True):
                axes.annotate(
                    f"{mean:.1f}", (place, mean), xytext=(0, 10), textcoords="offset points",
                    ha="center", fontweight="bold", color=COLOURS[regime], zorder=5,
                )  # fmt: skip
        siglip = metrics[BASE][metric]["mean"]
        axes.axhline(siglip, color=colours_of([BASE])[BASE], linewidth=1.8, label=BASE)
        level = report.get("chance", {}).get(metric)
        if level is not None:
            axes.axhline(level, color=INK, linestyle=(0, (4, 3)), linewidth=1.2, label="chance")
        axes.set_xscale("log")
        axes.set_xticks([100 * share for share in shares], [f"{100 * s:g} %" for s in shares])
        axes.minorticks_off()
        axes.margins(x=0.08, y=0.15)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("share of the videos")
        axes.set_ylabel(f"{report['titles'].get(metric, metric)}, points")
        axes.grid(color=FAINT, linewidth=0.6, zorder=0)
        seeds = len(report["seeds"])
        axes.set_title(
            f"{report['config']['pretrain']['optim']['updates']} updates each, "
            f"{seeds} seed{'s' if seeds > 1 else ''} of the head",
            loc="left",
            fontsize=10.5,
        )
        axes.legend(frameon=False)
