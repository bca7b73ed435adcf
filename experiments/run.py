"""What can be asked of the suite: one verb per line of ``VERBS``; nothing else is imported here.

A verb's module offers ``ABOUT``, ``EXAMPLES``, ``add_arguments(parser)`` and ``run(args)``. Every
comparison goes through the same five steps: resolve (config and encoders), preflight (data,
weights, memory, disk), run or resume, evaluate, report. Answers lie in ``work_dirs/<verb>`` unless
``--work-dir`` says otherwise. Progress goes to stderr, results to stdout.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script, installed or not: the clone's packages come first
    sys.path[0] = str(Path(__file__).resolve().parents[1])

VERBS = {  # verb -> (module, what it does)
    "oad": ("experiments.oad", "compare frozen encoders on online action detection"),
    "ovis": ("experiments.ovis", "compare frozen encoders on video instance segmentation"),
    "videoqa": ("experiments.videoqa", "compare frozen encoders on video question answering"),
    "pretrain": ("experiments.pretrain", "align an encoder with text over all tasks of a config"),
    "zero-shot": ("experiments.zero_shot", "measure any encoder against texts, without training"),
    "ablation": ("experiments.ablation", "pretrain on parts of the tasks and compare downstream"),
    "data-efficiency": (
        "experiments.data_efficiency",
        "compare contrastive with multitask pretraining over shares of the data",
    ),
    "check-data": ("experiments.check_data", "find missing and broken data before a run does"),
    "align": ("experiments.align", "say which text fits a video, each frame and each patch"),
    "detect": ("experiments.detect", "watch a video file or a camera and say what happens, live"),
    "track": ("experiments.track", "segment and track what a video file or a camera shows, live"),
    "chat": ("experiments.chat", "ask about a video file or a camera while it runs"),
    "extract": ("experiments.extract", "write an encoder's features for every video of a folder"),
    "export": ("experiments.export", "write a streaming encoder as a file for another runtime"),
    "efficiency": ("experiments.efficiency", "measure what a frame costs when a stream grows"),
    "env": ("experiments.environment", "print versions and machine, for an issue report"),
}

HELP = """usage: python experiments/run.py VERB [options]

verbs:
{verbs}

start here:
  python experiments/run.py oad                      the whole comparison on rendered videos
  python experiments/run.py oad --config thumos14    the same on THUMOS'14, paths in the config
  python experiments/run.py pretrain                 a mini StreamFormer from rendered clips
  python experiments/run.py detect video.mp4         what the last comparison's best head sees
  python experiments/run.py VERB --help              options and more examples
"""


def main(argv: Sequence[str] | None = None) -> Any:
    """Run one verb and return its result; ``argv`` is what stands after the script's name."""
    verb, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("-h", "--help"):
        width = max(map(len, VERBS))
        lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in VERBS.items()]
        print(HELP.format(verbs="\n".join(lines)))  # noqa: T201 (asked for)
        return None
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        sys.exit(f"error: no verb {verb!r}{hint}; the verbs are {', '.join(VERBS)}")
    module_name, summary = VERBS[verb]
    module = importlib.import_module(module_name)
    parser = argparse.ArgumentParser(
        prog=f"python experiments/run.py {verb}",
        description=f"{summary[0].upper()}{summary[1:]}.\n\n{module.ABOUT}",
        epilog=f"examples:\n{module.EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    args = parser.parse_args(rest)
    args.command = shlex.join(["python", "experiments/run.py", verb, *rest])  # for reports
    return module.run(args)


def command() -> None:
    """The command line: what a user can mend is one line on stderr and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    from experiments.config import UserError

    try:
        main()
    except UserError as error:
        logging.getLogger(__name__).error("error: %s", error)
        sys.exit(2)


if __name__ == "__main__":
    command()
