"""Run lmms-eval so that its failure is ours: the supported way to evaluate from code or a shell.

lmms-eval ends with exit code 0 when the evaluation failed, and leaves a traceback. Here it runs as
a process of its own, this package's tasks included; afterwards its results file is there, or an
:class:`EvaluationError` says what happened. From a shell, with all options of lmms-eval:

    python -m integrations.videoqa.evaluate --tasks videomme,mlvu --output_path OUT
        --model_args pretrained=FOLDER,max_frames_num=16

That ends with exit code 1 if there are no results.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from integrations.videoqa.lmms_plugin import MODEL

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]  # where the packages lie
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
TAIL = 25  # lines of output that an error shows


class EvaluationError(RuntimeError):
    """lmms-eval gave no results; the text holds the end of what it said."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation left.

    Attributes:
        results: of lmms-eval's results file: ``results``, ``groups``, ``configs``, ….
        path: of that file.
        samples: of each task, the file with a line for each question, if they were asked for.
    """

    results: dict[str, Any]
    path: Path
    samples: dict[str, Path]

    def metrics(self, task: str) -> dict[str, float]:
        """Numbers of a task by metric, without their errors.

        Raises:
            EvaluationError: it was not evaluated.
        """
        if task not in self.results["results"]:
            known = ", ".join(self.results["results"])
            raise EvaluationError(f"{self.path} has no results of {task!r}; it has {known}")
        found = {}
        for name, value in self.results["results"][task].items():
            metric, _, filtered = name.partition(",")
            if isinstance(value, int | float) and filtered and "_stderr" not in metric:
                found[metric] = float(value)
        return found


def evaluate(
    tasks: Sequence[str],
    model_args: Mapping[str, Any],
    output: Path | str,
    *,
    include_path: Path | str | None = None,
    batch_size: int = 1,
    device: str = "cpu",
    processes: int = 1,
    limit: int | None = None,
    offline: bool = False,
    environment: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
) -> Evaluation:
    """Evaluate a model on tasks of lmms-eval, in one process or several.

    Args:
        tasks: names; also groups.
        model_args: of the model, see ``lmms.StreamformerLlava``. Texts must not hold commas.
        output: folder; lmms-eval writes below it.
        include_path: another folder of tasks, searched first.
        batch_size: questions answered together.
        device: ``cpu``, ``cuda``, ….
        processes: that share the questions, by accelerate.
        limit: questions of each task; None for all.
        offline: forbid look-ups of models and data on the hub.
        environment: variables on top of this process's own, such as ``HF_HOME``.
        options: further options of lmms-eval, as on its command line.

    Raises:
        EvaluationError: it failed; with the end of its output.
        ValueError: a model argument that its command line cannot carry.
    """
    for name, value in model_args.items():
        if isinstance(value, str) and "," in value:
            raise ValueError(
                f"{name}={value!r} holds a comma, at which lmms-eval parts arguments; rename it"
            )
    given = ",".join(f"{name}={value}" for name, value in model_args.items() if value is not None)
    arguments = [
        *("--tasks", ",".join(tasks)),
        *(("--model_args", given) if given else ()),
        *("--batch_size", str(batch_size)),
        *("--device", device),
        *("--output_path", str(output)),
        "--log_samples",
        *(("--limit", str(limit)) if limit is not None else ()),
        *(("--include_path", str(include_path)) if include_path is not None else ()),
        *options,
    ]
    return run_lmms_eval(arguments, processes, offline, environment)


def run_lmms_eval(
    arguments: Sequence[str],
    processes: int = 1,
    offline: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Evaluation:
    """Run lmms-eval with options as on its command line; ``--output_path`` must be one.

    The tasks that this package and others offer are found in any case. For the other arguments
    see :func:`evaluate`.

    Raises:
        EvaluationError: it failed, or evaluated nothing.
    """
    if "--output_path" not in arguments:
        raise EvaluationError("no --output_path: without a results file nothing tells success")
    output = Path(arguments[list(arguments).index("--output_path") + 1])
    before = set(output.rglob("*_results.json"))
    command = _command(arguments, processes)
    logger.info("%s", " ".join(command))
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        code = subprocess.run(
            command, env=_environment(offline, environment), stdout=said, stderr=said, check=False
        ).returncode
        said.seek(0)
        lines = said.read().splitlines()
    new = sorted(set(output.rglob("*_results.json")) - before, key=lambda p: p.stat().st_mtime_ns)
    if code or not new:
        end = "\n".join(lines[-TAIL:])
        raise EvaluationError(
            f"lmms-eval ended with exit code {code} and {len(new)} new results files below "
            f"{output}; it said last:\n{end}"
        )
    return read_results(new[-1])


def read_results(path: Path) -> Evaluation:
    """A results file of lmms-eval, and the samples beside it.

    Raises:
        EvaluationError: it holds no task.
    """
    results = json.loads(path.read_text(encoding="utf-8"))
    if not results.get("results"):
        raise EvaluationError(f"{path} holds no task; see the log of lmms-eval")
    start = path.name.removesuffix("results.json") + "samples_"
    samples = {
        file.stem.removeprefix(start): file for file in path.parent.glob(f"{start}*.jsonl")
    }
    return Evaluation(results, path, samples)


def _command(arguments: Sequence[str], processes: int) -> list[str]:
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "accelerate.commands.launch", "--num_processes", str(processes),
                   "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
                   "--main_process_port", "0"]  # fmt: skip
        if "cpu" in arguments:
            launch.append("--cpu")
    chosen = () if "--model" in arguments else ("--model", MODEL)
    return [*launch, "-m", "integrations.videoqa.lmms_run", *chosen, *arguments]


def _environment(offline: bool, changes: Mapping[str, str] | None) -> dict[str, str]:
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    values = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}
    if offline:
        values |= dict.fromkeys(OFFLINE, "1")
    return {**values, **(changes or {})}


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate with lmms-eval's own options; print where the results lie."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        found = run_lmms_eval(arguments)
    except EvaluationError as error:
        logger.error("%s", error)
        sys.exit(1)
    for task in found.results["results"]:
        logger.info("%s: %s", task, found.metrics(task))
    sys.stdout.write(f"{found.path}\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    main()
