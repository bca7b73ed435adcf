"""Video question answering: a LLaVA-style model on a frozen tower, encoder against encoder.

The data are miniworld's captions and questions, rendered on first use, or LLaVA JSON at the paths
of the config. Per encoder and seed one model is trained in stages, by the same config, and asked by
lmms-eval itself. Everything lies under one folder:

    DIR/miniworld/, DIR/encoders/     rendered videos and the mini encoders (miniworld only)
    DIR/tokens/<encoder>-<digest>/    what the frozen tower says of the training videos
    DIR/<encoder>/seed<k>/            one run: config.json, result.json, a folder for each stage
    DIR/<encoder>/seed<k>/lmms/       what lmms-eval wrote: the numbers of the report
    DIR/report.{json,md,png}          the comparison
    DIR/lmms.json                     what `lmms-eval --tasks miniworld_qa` looks for
"""

from __future__ import annotations

import argparse
import glob
import importlib.util
import logging
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from experiments import comparison, recipe
from experiments import preflight as checks
from experiments.comparison import (
    ENCODER,
    RESOLVED,
    STREAM,
    Comparison,
    Run,
    carry_out,
    common_details,
)
from experiments.config import UserError, digest, field_defaults, load_config
from experiments.environment import bound_threads, choose_device, jobs
from experiments.report import summarise

logger = logging.getLogger(__name__)

ABOUT = """\
Trains the same small LLaVA on each encoder, once per seed, in three stages, asks
it through lmms-eval, and reports how far the encoders lie apart. Without --config
it runs on miniworld: captions of and questions on small rendered videos, with mini
encoders that it trains on first use. It goes on where it stopped, and answers from
caches what is done. Afterwards lmms-eval finds the task miniworld_qa and the model."""
EXAMPLES = """\
  python experiments/run.py videoqa
  python experiments/run.py videoqa --third-arm --seeds 0 1 2 3 4
  python experiments/run.py videoqa --set stages.questions.updates=100 --work-dir /tmp/try
  python experiments/run.py videoqa --config llava_video --set data.root=/data/llava --device cuda
  python experiments/run.py videoqa --config released --set data.root=/data/llava --seeds 0 \\
      --encoders siglip streamformer --device cuda"""

EVAL = {
    "tasks": [],  # of lmms-eval
    "validate": [],  # tasks on validation data: reported apart, for choosing recipes
    "main": [],  # metrics of the main table; [] for all
    "classes": [],  # metrics that are listed as classes
    "chance": None,  # points that a guess gets
    "batch_size": 1,
    "processes": 1,
    "limit": None,  # questions of each task
    "model_args": {},  # of ``integrations.videoqa.lmms.StreamformerLlava``
    "baselines": {"last frame": {"last_frames": 1}, "blind": {"blind": True}},  # others instead
    "live_frames": 128,  # watched frame by frame, for the speed
    "live_window": None,  # of the tower meanwhile; None: as it was trained with
}
TRAIN = {"threads": None, "trainer": {}}  # torch threads of a run; transformers.TrainingArguments
LMMS = "lmms"  # folder of a run
TASKS = "lmms"  # folder of rendered questions
LIVE = "live.json"
LIVE_ASKED = 8  # questions on the watched frames
MINI_ROOM = 2**30  # bytes of rendered videos, mini encoders and tokens
NOTES = [
    "numbers are those of lmms-eval's results files, which report.json names for every run",
    "seeing less: the same model shown nothing but the last frame, or its visual tokens zeroed "
    "(blind)",
    "as a stream: frames pushed one by one (preprocessing, tower, projector), and the time from a "
    "question to the first token of its answer, on the machine below",
]
NOTE_KINDS = (
    "motion asks what several frames tell: direction, order, first and last, now and before; "
    "appearance what one frame tells: colour, count, place. The last frames hold the answer of a "
    "question about the present"
)


@dataclass(frozen=True)
class Source:
    """Where the data of a comparison lie, and what each encoder label means there."""

    title: str
    root: Path
    encoders: dict[str, str]  # label -> spec
    tasks: Path | None = None  # folder of tasks that lmms-eval does not know by itself


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb: those of every comparison."""
    comparison.add_arguments(parser, work_dir="work_dirs/videoqa")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Resolve, preflight, run or resume, evaluate, report; returns the report."""
    return comparison.answer(
        args,
        task="videoqa",
        title="Video question answering",
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
    """Encode, train and evaluate for every encoder and seed; see ``comparison.answer``.

    Raises:
        UserError: lmms-eval failed; with the end of what it said.
    """
    from integrations.videoqa.evaluate import EvaluationError

    bound_threads(config["train"]["threads"])
    source = prepare(config, labels, folder)
    encoders = {
        label: describe(label, spec, source, config, seeds, folder, device)
        for label, spec in source.encoders.items()
    }
    train = partial(run_one, source=source, folder=folder, device=device)
    try:
        runs, outcomes, difference = carry_out(config, encoders, seeds, folder, train, device)
    except EvaluationError as error:
        raise UserError(str(error)) from error
    live = {run.label: watch(run, device) for run in runs if run.seed == seeds[0]}
    if source.tasks is not None:
        _offer(folder, source, runs)
    details = _details(config, encoders, outcomes, live)
    return Comparison(source.title, outcomes, difference, details)


def resolve(config: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The config with all defaults, checked by those who will read it."""
    from experiments.miniworld import WorldParams
    from experiments.miniworld.qa import QaParams
    from experiments.miniworld.qa_model import MiniLlm

    records = {"world": WorldParams, "qa": QaParams, "mini_llm": MiniLlm}
    defaults = {
        **{name: field_defaults(record) for name, record in records.items()},
        "stream": STREAM,
        "train": TRAIN,
        "eval": EVAL,
    }
    resolved = load_config("videoqa", config, overrides, defaults, free=("mini", "stages"))
    try:
        resolved["stages"] = {
            name: _whole_stage(name, stage) for name, stage in resolved["stages"].items()
        }
        for name, record in records.items():
            record(**resolved.get(name, {}))
    except (TypeError, ValueError) as error:
        raise UserError(f"config {config}: {error}") from error
    if not resolved["stages"]:
        raise UserError(f"config {config}: no stages, so nothing is trained; name at least one")
    if "mini" in resolved:
        resolved["mini"] = recipe.mini(resolved["mini"], resolved["world"])
    return resolved


def _whole_stage(name: str, stage: Mapping[str, Any]) -> dict[str, Any]:
    """A stage with all its values, on top of the published one that it may name."""
    from integrations.videoqa.train import STAGES, StageConfig

    given = dict(stage)
    data, base = given.pop("data", None), given.pop("recipe", None)
    if not data or any(not isinstance(item, dict) or "json" not in item for item in data):
        raise ValueError(f"stages.{name}.data: a list of {{'json': …}} is needed")
    if base is not None and base not in STAGES:
        raise ValueError(f"stages.{name}.recipe={base!r}: choose one of {', '.join(STAGES)}")
    whole = asdict(StageConfig.from_dict(given, STAGES.get(base)))
    return {"data": data, **whole, "trains": list(whole["trains"])}


def preflight(
    config: Mapping[str, Any], labels: Mapping[str, str], seeds: Sequence[int], folder: Path
) -> None:
    """Refuse at once, with all that is missing, what would fail later.

    Raises:
        UserError: packages, files, weights, tasks, disk or memory that are not there, each named.
    """
    root, llm = config["data"]["root"], config["model"]["llm"]
    problems = checks.repeated_seeds(seeds)
    problems += checks.encoders(labels, mini="mini" in config)
    unfit = checks.data_root(root, rendered="qa" in config)
    problems += unfit or ([] if root is None else _absent(config, Path(root)))
    if "," in str(folder):
        problems.append(f"--work-dir {folder}: lmms-eval parts arguments at commas; rename it")
    if llm is None and "mini_llm" not in config:
        problems.append(
            "model.llm is None: name a language model, such as --set model.llm=lmsys/vicuna-7b-v1.5"
        )
    elif llm is not None:
        problems += checks.weights(llm, f"model.llm={llm}")
    problems += unknown_tasks([*config["eval"]["tasks"], *config["eval"]["validate"]])
    problems += checks.disk(folder, MINI_ROOM if "mini" in config else 0)
    checks.refuse(problems)


def unknown_tasks(names: Sequence[str]) -> list[str]:
    """Tasks that neither this suite nor lmms-eval has; that it is installed at all."""
    from experiments.miniworld.qa import TASKS as MINIWORLD
    from integrations.videoqa.lmms_plugin import TASKS as PUBLIC

    if importlib.util.find_spec("lmms_eval") is None:
        return ['lmms-eval is not installed: pip install -c constraints.txt -e ".[videoqa]"']
    if not names:
        return ["eval.tasks is empty, so nothing is asked; name a task of lmms-eval"]
    ours = {path.stem for folder in (MINIWORLD, PUBLIC) for path in folder.glob("*.yaml")}
    foreign = [name for name in names if name not in ours]
    if not foreign:
        return []
    from lmms_eval.tasks import TaskManager
    from loguru import logger as lmms_eval_logger

    lmms_eval_logger.disable("lmms_eval")  # it tells of every file that is no task
    known = set(TaskManager().all_tasks)
    return [
        f"eval.tasks: lmms-eval has no task {name!r}; `lmms-eval tasks` lists what it has"
        for name in foreign
        if name not in known
    ]


def _absent(config: Mapping[str, Any], root: Path) -> list[str]:
    """Files and folders that stages read and that are not there."""
    problems = []
    for name, stage in config["stages"].items():
        for item in stage["data"]:
            pattern = _placed(item["json"], root)
            media = _placed(item["root"], root) if item.get("root") else None
            if not glob.glob(pattern):
                problems.append(f"stages.{name}.data: there is no {pattern}")
            if media is not None and not Path(media).is_dir():
                problems.append(f"stages.{name}.data: there is no folder {media}")
    return problems


def _placed(path: str, root: Path) -> str:
    return path.replace(recipe.ROOT, str(root))


def prepare(config: Mapping[str, Any], labels: Mapping[str, str], folder: Path) -> Source:
    """Render videos and train the mini encoders, or find what the config names."""
    encoders = checks.released(labels)
    if "mini" in config:
        from experiments.miniworld.encoders import specs_of

        encoders = specs_of(labels, folder, config)
    if config["data"]["root"] is not None:
        root = Path(config["data"]["root"])
        tasks = root / TASKS if (root / TASKS).is_dir() else None
        return Source(config["data"]["dataset"], root, encoders, tasks)
    from experiments.miniworld import WorldParams
    from experiments.miniworld.qa import QaParams, render_qa

    params, world = QaParams(**config["qa"]), WorldParams(**config["world"])
    root = render_qa(folder / "miniworld", params, world)
    return Source("miniworld", root, encoders, root / TASKS)


# -- models ----------------------------------------------------------------------------------------


def build(config: Mapping[str, Any], spec: str, source: Source, device: str) -> Any:
    """A model before its first stage: a fresh projector between the encoder and the LLM."""
    from integrations.videoqa.checkpoints import build_model

    fields = dict(config["model"])
    llm, tokenizer = fields.pop("llm"), None
    fresh = llm is None
    if fresh:
        from experiments.miniworld.qa import all_texts
        from experiments.miniworld.qa_model import MiniLlm, build_tokenizer, calm, llm_config

        size = MiniLlm(**config["mini_llm"])
        tokenizer = build_tokenizer(all_texts(source.root), size.template)
        llm = llm_config(tokenizer, size)
    device = choose_device(device)
    model, _ = build_model(llm, spec, tokenizer, None, device, **config["stream"], **fields)
    if fresh:
        calm(model.language_model)
    return model


def stages_of(config: Mapping[str, Any], source: Source) -> Iterator[tuple[str, Any, list[Any]]]:
    """Name, ``StageConfig`` and files of each stage, in order."""
    from integrations.videoqa.data import Source as Records
    from integrations.videoqa.train import StageConfig

    for name, stage in config["stages"].items():
        files = []
        for item in stage["data"]:
            media = _placed(item["root"], source.root) if item.get("root") else None
            files += [
                Records(path, media, item.get("share", "all"))
                for path in sorted(glob.glob(_placed(item["json"], source.root)))
            ]
        fields = {key: value for key, value in stage.items() if key != "data"}
        yield name, StageConfig.from_dict(fields), files


def describe(
    label: str,
    spec: str,
    source: Source,
    config: Mapping[str, Any],
    seeds: Sequence[int],
    folder: Path,
    device: str,
) -> dict[str, Any]:
    """What decides one encoder's part of a run; its tokens are written where they are kept.

    Returns:
        ``spec``, ``settings``, and ``tokens``: of each stage that stores them, their folder
        relative to ``DIR/tokens``.
    """
    from integrations.videoqa.data import read_records
    from integrations.videoqa.tokens import PART, lacking
    from integrations.videoqa.tokens import describe as facts_of
    from integrations.videoqa.train import prepare as prepare_stage
    from pretrain.launch import run_processes

    model = build(config, spec, source, device)
    settings = model.tower.encoder.settings()
    kept: dict[str, str] = {}
    for name, stage, files in stages_of(config, source):
        if not stage.store_features:
            continue
        prepare_stage(model, stage)
        kept[name] = f"{label}-{digest({**facts_of(model), 'root': str(source.root)})}"
        out = folder / "tokens" / kept[name]
        records = [record for seed in seeds for record in read_records(files, seed)]
        if todo := lacking(records, out):
            logger.info("tokens of %s for the stage %s: %s", label, name, out)
            work = partial(_write_share, config, spec, source, device, name, seeds, out)
            most = jobs(config["train"]["threads"], device)
            run_processes(work, processes=min(most, 1 + len(todo) // PART))
    return {"spec": spec, "settings": settings, "tokens": kept}


def _write_share(
    config: Mapping[str, Any],
    spec: str,
    source: Source,
    device: str,
    name: str,
    seeds: Sequence[int],
    out: Path,
) -> None:
    """One process's part of a stage's tokens."""
    from integrations.videoqa.data import read_records
    from integrations.videoqa.tokens import write_tokens
    from integrations.videoqa.train import prepare as prepare_stage

    model = build(config, spec, source, device)
    stage, files = next((s, files) for key, s, files in stages_of(config, source) if key == name)
    prepare_stage(model, stage)
    records = [record for seed in seeds for record in read_records(files, seed)]
    share = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    write_tokens(model, records, out, share)


def run_one(
    config: Mapping[str, Any], where: Path, source: Source, folder: Path, device: str
) -> dict[str, Any]:
    """Train one model through all stages and let lmms-eval ask it."""
    from transformers import set_seed

    from backbone.files import write_json
    from integrations.videoqa.train import run_stage

    bound_threads(config["train"]["threads"])
    encoder = config[ENCODER]
    set_seed(config["seed"])
    model = build(config, encoder["spec"], source, device)
    on_cpu = choose_device(device) == "cpu"
    reports = {}
    for name, stage, files in stages_of(config, source):
        tokens = encoder["tokens"].get(name)
        reports[name] = run_stage(
            model,
            stage,
            files,
            where / name,
            seed=config["seed"],
            trainer={"use_cpu": on_cpu, **config["train"]["trainer"]},
            tokens=tokens and folder / "tokens" / tokens,
        )
        last = where / name
    write_json(where / RESOLVED, _as_run(where, reports))
    asked = ask(config, where, last, source, device)
    return outcome_of(config, where, asked, reports)


def _as_run(where: Path, stages: Iterable[str]) -> dict[str, Any]:
    """What the stages wrote down about themselves, with the tower in one place."""
    from backbone.files import read_json

    written: dict[str, Any] = {}
    for name in stages:
        written[name] = read_json(where / name / RESOLVED)
        written[ENCODER] = written[name].pop("tower")
    return written


# -- evaluation ------------------------------------------------------------------------------------


def ask(
    config: Mapping[str, Any], where: Path, pretrained: Path, source: Source, device: str
) -> dict[str, Any]:
    """Let lmms-eval ask a trained model, once as it is and once for each baseline.

    Returns:
        Name -> ``integrations.videoqa.evaluate.Evaluation``; ``all`` also has the validation
        tasks. What an earlier call evaluated is read again.
    """
    from integrations.videoqa.evaluate import evaluate, read_results

    wishes, found = config["eval"], {}
    for name, changes in {"all": {}, **wishes["baselines"]}.items():
        output = where / LMMS / name.replace(" ", "_")
        if earlier := sorted(output.rglob("*_results.json")):
            found[name] = read_results(earlier[-1])
            continue
        found[name] = evaluate(
            [*wishes["tasks"], *(wishes["validate"] if name == "all" else ())],
            {"pretrained": pretrained, **wishes["model_args"], **changes},
            output,
            include_path=source.tasks,
            batch_size=wishes["batch_size"],
            device=choose_device(device),
            processes=wishes["processes"],
            limit=wishes["limit"],
            offline=source.tasks is not None,
            environment=_limits(config),
        )
    return found


def _limits(config: Mapping[str, Any]) -> dict[str, str]:
    threads = config["train"]["threads"]
    return {} if threads is None else {"OMP_NUM_THREADS": str(threads)}


def outcome_of(
    config: Mapping[str, Any],
    where: Path,
    asked: Mapping[str, Any],
    reports: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """What is known of a finished run: metrics as lmms-eval's results files have them."""
    wishes = config["eval"]
    metrics = {name: _metrics(found, wishes["validate"]) for name, found in asked.items()}
    main = wishes["main"] or list(metrics["all"])
    chosen = {name: {key: found[key] for key in main} for name, found in metrics.items()}
    validation = _metrics(asked["all"], wishes["tasks"])
    apart = {*main, *wishes["classes"]}
    return {
        "metrics": chosen["all"],
        "per_class": {key: metrics["all"][key] for key in wishes["classes"]},
        "parts": {key: value for key, value in metrics["all"].items() if key not in apart},
        "baselines": {
            f"{key}, {name}": chosen[name][key] for name in wishes["baselines"] for key in main
        },
        "validation": {key: validation[key] for key in main if key in validation},
        "results": {name: str(found.path.relative_to(where)) for name, found in asked.items()},
        "stages": dict(reports),
    }


def _metrics(found: Any, leave_out: Sequence[str]) -> dict[str, float]:
    """Numbers of all tasks but some; with several tasks their names stand in front."""
    tasks = {task: found.metrics(task) for task in found.results["results"]}
    tasks = {task: values for task, values in tasks.items() if values and task not in leave_out}
    if len(tasks) == 1:
        return next(iter(tasks.values()))
    return {f"{task} {key}": value for task, own in tasks.items() for key, value in own.items()}


def watch(run: Run, device: str) -> dict[str, float]:
    """How fast a run's model takes a stream and answers, measured once and kept in its folder."""
    from backbone.files import read_json, write_json
    from integrations.videoqa.checkpoints import load_model

    kept = run.folder / LIVE
    if not kept.is_file():
        wishes = run.config["eval"]
        model, _ = load_model(
            _last_stage(run), device=choose_device(device), window=wishes["live_window"]
        )
        write_json(kept, measure_live(model, wishes["live_frames"]))
    return read_json(kept)


def measure_live(model: Any, frames: int) -> dict[str, float]:
    """Push noise frame by frame through a session, ask now and then; medians of what it takes."""
    import numpy as np

    from integrations.videoqa.session import StreamingSession

    side = model.tower.encoder.image_size
    rng = np.random.default_rng(0)
    session = StreamingSession(model, history="none")
    seconds, waits = [], []
    for number in range(frames):
        frame = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        start = time.perf_counter()
        session.push(frame)
        seconds.append(time.perf_counter() - start)
        if (number + 1) % max(1, frames // LIVE_ASKED) == 0:
            session.ask("What is happening now?", keep=False, max_new_tokens=4)
            waits.append(session.cost.first_token_seconds)
    return {
        "frames per second": 1 / statistics.median(seconds),
        "ms to the first token": 1000 * statistics.median(waits),
        "memory of the session, kB": session.memory_bytes / 1e3,
    }


def _last_stage(run: Run) -> Path:
    return run.folder / list(run.config["stages"])[-1]


def _offer(folder: Path, source: Source, runs: Sequence[Run]) -> None:
    """Let lmms-eval find the questions, and the model of the last encoder's first run."""
    from experiments.miniworld.qa_offer import write_offer

    first = next(run for run in runs if run.label == runs[-1].label)
    write_offer(folder, source.root, _last_stage(first))


def _details(
    config: Mapping[str, Any],
    encoders: Mapping[str, Mapping[str, Any]],
    outcomes: Mapping[str, Mapping[int, Mapping[str, Any]]],
    live: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    one = next(iter(next(iter(outcomes.values())).values()))
    baselines, parts = summarise(outcomes, "baselines"), summarise(outcomes, "parts")
    chance, many = config["eval"]["chance"], len(next(iter(outcomes.values()))) > 1
    return {
        **common_details(encoders, outcomes),
        "chance": {} if chance is None else dict.fromkeys(one["metrics"], chance),
        "notes": [*NOTES, *([NOTE_KINDS] if config["eval"]["classes"] else [])],
        "equal": "with the same language model, the same data and the same training",
        "spread": SPREAD if many else None,
        "classes": "question",
        "class_metric": "percent correct",
        "results": {
            label: {f"seed{seed}": run["results"] for seed, run in by_seed.items()}
            for label, by_seed in outcomes.items()
        },
        "trained_parameters": list(one["stages"].values())[-1]["trained_parameters"],
        "updates": {name: report["updates"] for name, report in one["stages"].items()},
        "unreadable": {name: report["unreadable"] for name, report in one["stages"].items()},
        "baselines": baselines,
        "parts": parts,
        "live": live,
        "tables": {
            "Seeing less": _means(baselines),
            "Present against past": _means(parts),
            "As a stream": live,
        },
    }


SPREAD = (
    "Mean ± standard deviation over seeds, in percent correct. Differences are of runs with equal "
    "seed, with the 95 % interval of Student's t; it covers what the seed of model and training "
    "changes, as encoders and data are the same in all runs."
)


def _means(values: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    return {
        label: {name: value["mean"] for name, value in row.items()} for label, row in values.items()
    }
