"""lmms-eval itself, as a process: public tasks on local data, several processes, failures.

The data lie as their authors publish them: questions as parquet in a folder of the data set's name
below the working directory, where ``datasets`` looks before it asks the hub; videos below HF_HOME.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from backbone.video import VideoWriter
from integrations.videoqa.checkpoints import save_model
from integrations.videoqa.evaluate import EvaluationError, evaluate, main, run_lmms_eval
from integrations.videoqa.lmms_plugin import MARK, offer_tasks, task_folders

ROOT = Path(__file__).resolve().parents[3]
LIMITS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
          "TRANSFORMERS_OFFLINE": "1"}  # fmt: skip
LETTERS = "ABCD"


def write(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 4, 4, 3), dtype=np.uint8)
    with VideoWriter(path, fps=4) as writer:
        for image in coarse.repeat(12, axis=1).repeat(12, axis=2):
            writer.write(image)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A working directory with Video-MME and MLVU in it, four videos each."""
    home = tmp_path_factory.mktemp("home")
    rows = {"videomme": [], "mlvu": []}
    kinds = ["Action Recognition", "OCR Problems"]
    for n in range(4):
        write(home / f"hf/videomme/data/v{n}.mp4", n)
        write(home / f"hf/mlvu/m{n}.mp4", 10 + n)
        for k in range(2):
            rows["videomme"].append({
                "video_id": f"{n:03d}", "duration": ["short", "medium", "long", "short"][n],
                "domain": "Knowledge", "sub_category": "Geography", "url": "", "videoID": f"v{n}",
                "question_id": f"{n:03d}-{k}", "task_type": kinds[k], "question": f"Which {k}?",
                "options": [f"{letter}. option {letter}." for letter in LETTERS],
                "answer": LETTERS[(n + k) % 4],
            })  # fmt: skip
        rows["mlvu"].append({
            "video_name": f"m{n}.mp4", "duration": 2.0, "answer": LETTERS[n],
            "question": "Which?\n(A) a\n(B) b\n(C) c\n(D) d",
            "task_type": ["count", "ego", "order", "needle"][n],
        })  # fmt: skip
    for name, folder in (("videomme", "lmms-eval/Video-MME"), ("mlvu", "sy1998/MLVU_dev")):
        (home / folder).mkdir(parents=True)
        Dataset.from_list(rows[name]).to_parquet(home / folder / "test-00000-of-00001.parquet")
    return home


@pytest.fixture
def checkpoint(fresh, tmp_path) -> Path:
    save_model(fresh(num_frames=2), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def environment(home, tmp_path) -> dict[str, str]:
    """Variables for a process; entry points are there even where nothing is installed."""
    paths = [str(ROOT)]
    if not any(p.name == "streamformer_llava" for p in entry_points(group="lmms_eval.models")):
        facts = tmp_path / "site" / "streamformer-0.dist-info"
        facts.mkdir(parents=True)
        (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: streamformer\nVersion: 0\n")
        (facts / "entry_points.txt").write_text(_declared())
        paths.append(str(facts.parent))
    return {**LIMITS, "HF_HOME": str(home / "hf"), "PYTHONPATH": os.pathsep.join(paths),
            "STREAMFORMER_VIDEOQA": str(tmp_path / "nothing")}  # fmt: skip


def _declared() -> str:
    """The entry points of pyproject.toml, as an installed package lists them."""
    text = (ROOT / "pyproject.toml").read_text().splitlines()
    lines, inside = [], False
    for line in text:
        if line.startswith("["):
            inside = line.startswith("[project.entry-points.")
            if inside:
                lines.append("[" + line.split('"')[1] + "]")
        elif inside and "=" in line and not line.startswith("#"):
            lines.append(line.replace('"', ""))
    return "\n".join(lines) + "\n"


def command(home, environment, *arguments) -> subprocess.CompletedProcess:
    """The bare command, as a user types it."""
    start = "from lmms_eval.cli.dispatch import main; main()"
    return subprocess.run(
        [sys.executable, "-c", start, *arguments],
        cwd=home, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def test_the_bare_command_runs_video_mme_and_mlvu(home, checkpoint, environment, tmp_path):
    out = tmp_path / "out"
    done = command(
        home, environment, "--model", "streamformer_llava",
        "--model_args", f"pretrained={checkpoint},max_frames_num=2",
        "--tasks", "videomme,mlvu", "--device", "cpu", "--batch_size", "2",
        "--output_path", str(out), "--log_samples",
    )  # fmt: skip
    (file,) = out.rglob("*_results.json")
    results = json.loads(file.read_text())
    assert {"videomme", "mlvu_dev"} <= set(results["results"]), done.stdout[-3000:]
    samples = {
        task: [json.loads(line) for line in next(out.rglob(f"*_samples_{task}.jsonl")).open()]
        for task in ("videomme", "mlvu_dev")
    }
    rows = [row["videomme_perception_score"] for row in samples["videomme"]]
    assert len(rows) == 8
    right = sum(row["pred_answer"] == row["answer"] for row in rows)
    score = results["results"]["videomme"]["videomme_perception_score,none"]
    assert score == pytest.approx(100 * right / 8)
    rows = [row["mlvu_percetion_score"] for row in samples["mlvu_dev"]]
    right = sum(row["pred_answer"] == row["answer"] for row in rows)
    assert results["results"]["mlvu_dev"]["mlvu_percetion_score,none"] == pytest.approx(
        100 * right / 7
    )
    assert all("Best option: (" in row["input"] for row in samples["mlvu_dev"])


def test_two_processes_give_the_results_of_one(
    home, checkpoint, environment, tmp_path, monkeypatch
):
    monkeypatch.chdir(home)
    found = [
        evaluate(
            ["videomme_best_answer", "mlvu_dev_plain_tail"],
            {"pretrained": checkpoint, "max_frames_num": 2},
            tmp_path / f"out{n}",
            processes=n,
            environment=environment,
        )
        for n in (1, 2)
    ]
    assert found[0].results["results"] == found[1].results["results"]
    said = [
        [(row["doc_id"], row["filtered_resps"]) for row in map(json.loads, file.open())]
        for file in (evaluation.samples["videomme_best_answer"] for evaluation in found)
    ]
    assert said[0] == said[1]
    assert [doc for doc, _ in said[0]] == list(range(8))
    assert set(found[0].metrics("videomme_best_answer")) == {"videomme_perception_score"}
    with pytest.raises(EvaluationError, match="no results of 'mlvu'; it has"):
        found[0].metrics("mlvu")


def test_a_missing_video_fails_with_its_name(home, checkpoint, environment, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    hidden = home / "hf/mlvu/m2.mp4"
    hidden.rename(home / "m2.mp4")
    try:
        with pytest.raises(EvaluationError, match=r"0 new results files(.|\n)*m2\.mp4"):
            evaluate(["mlvu"], {"pretrained": checkpoint}, tmp_path, environment=environment)
    finally:
        (home / "m2.mp4").rename(hidden)


def test_failure_is_an_exit_code(home, environment, tmp_path, monkeypatch, caplog):
    """An unknown model argument: lmms-eval prints a traceback and ends with 0, we with 1."""
    monkeypatch.chdir(home)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    arguments = ["--tasks", "mlvu", "--device", "cpu", "--output_path", str(tmp_path / "out"),
                 "--model_args", "pretrained=x,frames=3"]  # fmt: skip
    with pytest.raises(SystemExit, match="1"):
        main(arguments)
    assert "no model argument 'frames'" in caplog.text


def test_before_the_job_miniworld_says_what_to_run(home, environment, monkeypatch):
    asked = ["--model", "streamformer_llava", "--tasks", "miniworld_qa", "--device", "cpu"]
    bare = command(home, environment, *asked)
    said = bare.stdout + bare.stderr
    assert "needs a checkpoint" in said
    assert "python experiments/run.py videoqa" in said


def test_without_questions_the_task_says_what_to_run(environment, monkeypatch):
    """Loading it, as lmms-eval does after the model."""
    from lmms_eval import utils

    monkeypatch.setenv("STREAMFORMER_VIDEOQA", environment["STREAMFORMER_VIDEOQA"])
    absent = ROOT / "experiments/miniworld/qa_absent/miniworld_qa.yaml"
    config = utils.load_yaml_config(str(absent))
    assert config["task"] == "miniworld_qa"
    with pytest.raises(RuntimeError, match="miniworld_qa has no questions yet: .*run.py videoqa"):
        config["class"](config=config)


def test_what_cannot_be_told_from_success_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match="no --output_path"):
        run_lmms_eval(["--tasks", "mlvu"])
    with pytest.raises(ValueError, match="pretrained='a,b' holds a comma"):
        evaluate(["mlvu"], {"pretrained": "a,b"}, tmp_path)


# -- the plug-in -----------------------------------------------------------------------------------


@pytest.fixture
def manager(monkeypatch):
    """lmms-eval's task manager with an index that tells what it was asked to search."""
    from lmms_eval.tasks import TaskManager

    def index(self, include_path=None, include_defaults=True):
        return include_path, include_defaults

    monkeypatch.setattr(TaskManager, "initialize_tasks", index)
    return TaskManager


def test_tasks_are_offered_once_and_last(manager):
    assert offer_tasks()
    once = manager.initialize_tasks
    assert offer_tasks()
    assert manager.initialize_tasks is once
    assert getattr(once, MARK)
    ours = task_folders()
    assert once(None) == (ours, True)
    assert once(None, include_path="mine") == (["mine", *ours], True)
    assert once(None, ["mine", ours[0]]) == (["mine", *ours], True)
    assert once(None, "mine", include_defaults=False) == (["mine"], False)
    assert once(None, None, False) == (None, False)


def test_another_version_is_left_alone(manager, monkeypatch, caplog):
    untouched = manager.initialize_tasks
    monkeypatch.setattr("integrations.videoqa.lmms_plugin.version", lambda name: "0.8.0")
    assert not offer_tasks()
    assert manager.initialize_tasks is untouched
    assert "add --include_path" in caplog.text


def test_another_signature_is_left_alone(manager, monkeypatch):
    monkeypatch.setattr(manager, "initialize_tasks", lambda self, folders: {})
    assert not offer_tasks()
    assert manager.initialize_tasks(None, ()) == {}


def test_a_failing_offer_is_left_out(monkeypatch, caplog):
    class Broken:
        value = "somebody:offer"

        def load(self):
            raise RuntimeError("not today")

    monkeypatch.setattr("integrations.videoqa.lmms_plugin.entry_points", lambda group: [Broken()])
    assert len(task_folders()) == 1
    assert "nothing is offered by somebody:offer: not today" in caplog.text
