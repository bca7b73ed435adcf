"""Which tasks of the pretraining make the difference? StreamFormer's ablation, row by row.

Tasks are grouped by the granularity at which they align: global (recognition, retrieval), temporal
(localization, grounding), spatial (instance and referring segmentation).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from experiments import study
from experiments.config import UserError
from experiments.study import Arm

logger = logging.getLogger(__name__)

ABOUT = """\
Pretrains once per group of tasks (G global, T temporal, S spatial, and together),
with equal numbers of updates and clips, and compares the frozen encoders downstream
and zero-shot; the row "none" is SigLIP itself. It goes on where it stopped."""
EXAMPLES = """\
  python experiments/run.py ablation
  python experiments/run.py ablation --rows G T --set optim.updates=500
  python experiments/run.py ablation --set oad.train.epochs=10 --seeds 0 1 2 3 4
  python experiments/run.py ablation --config multitask_1m --set data.root=/data \\
      --downstream oad=thumos14 --set oad.data.root=/data/thumos14 --device cuda"""

GROUPS = {
    "recognition": "G",
    "retrieval": "G",
    "localization": "T",
    "grounding": "T",
    "instance_segmentation": "S",
    "referring_segmentation": "S",
}
ROWS = ("G", "T", "S", "G+T", "G+T+S")
NONE = "none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    study.add_arguments(parser, work_dir="work_dirs/ablation")
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=list(ROWS), help="default: all, next to none"
    )


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Pretrain every row, compare, report; the main process returns the report."""
    return study.run(
        args,
        verb="ablation",
        title="Ablation of the pretraining tasks",
        base=NONE,
        arms_of=partial(rows, wanted=args.rows),
        notes=["G: global tasks; T: temporal tasks; S: spatial tasks; none: the image encoder"],
    )


def rows(config: Mapping[str, Any], wanted: Sequence[str] = ROWS) -> list[Arm]:
    """The rows of a config's tasks, in the order of the paper.

    Raises:
        UserError: a row of which the config has no tasks.
    """
    by_group: dict[str, list[str]] = {}
    for name, task in config["tasks"].items():
        by_group.setdefault(GROUPS[task["objective"]], []).append(name)
    arms = []
    for row in (row for row in ROWS if row in wanted):
        lacking = [group for group in row.split("+") if group not in by_group]
        if lacking:
            of_group = [objective for objective, group in GROUPS.items() if group == lacking[0]]
            raise UserError(
                f"--rows {row}: the config has no task of {' or '.join(of_group)}; choose other "
                "rows, or add one"
            )
        kept = {name for group in row.split("+") for name in by_group[group]}
        arms.append(Arm(row, tuple(name for name in config["tasks"] if name in kept)))
    return arms
