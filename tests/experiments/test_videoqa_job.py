"""The whole comparison as a user runs it, at reduced size: once, again from caches, and talked to.

It shows that the parts fit, that lmms-eval's numbers are the report's and that a second call
resumes, not how well anything answers: videos and trainings are far too few for that.
"""

import json
import time

import pytest
import torch
from PIL import Image

from backbone import StreamformerConfig, StreamformerModel
from experiments.config import UserError
from experiments.miniworld.qa_offer import VARIABLE, offer
from experiments.run import main

SMALL = {
    "qa.train": 24,
    "qa.val": 4,
    "qa.test": 12,
    "mini_llm.width": 32,
    "mini_llm.layers": 1,
    "mini_llm.mlp": 32,
    "stages.align.updates": 2,
    "stages.questions.updates": 2,
    "stages.refine.updates": 2,
    "eval.live_frames": 16,
    "eval.baselines": {"blind": {"blind": True}},
}


def save_encoder(folder, seed):
    """Weights as the mini encoders have them, but random."""
    torch.manual_seed(seed)
    config = StreamformerConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, num_frames=4, temporal_attention=seed > 0, window=4,
        temporal_positions="reset",
    )  # fmt: skip
    StreamformerModel(config).save_pretrained(folder)
    return f"streamformer:{folder}"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Arguments of the job and the report of its first run."""
    folder = tmp_path_factory.mktemp("job")
    specs = [save_encoder(folder / name, seed) for seed, name in enumerate(("still", "moving"))]
    arguments = ["videoqa", "--work-dir", str(folder), "--encoders", *specs, "--seeds", "0"]
    for key, value in SMALL.items():
        arguments += ["--set", f"{key}={value}"]
    return folder, arguments, main(arguments)


@pytest.mark.job
def test_the_report_is_complete(job):
    folder, _, report = job
    assert json.loads((folder / "report.json").read_text()) == report
    assert list(report["metrics"]) == ["streamformer-still", "streamformer-moving"]
    for label, metrics in report["metrics"].items():
        assert list(metrics) == ["motion", "appearance", "present", "past"]
        assert set(report["validation"][label]) == set(metrics)
        assert "motion, blind" in report["baselines"][label]
        assert {"motion_present", "appearance_past"} <= set(report["parts"][label])
        assert all(value > 0 for value in report["live"][label].values())
    assert len(report["per_class"]["streamformer-still"]) == 9
    assert all(key.startswith("encoder.") for key in report["config_difference"])
    assert {"encoder.spec", "encoder.settings.weights"} <= set(report["config_difference"])
    assert report["updates"] == {"align": 2, "questions": 2, "refine": 2}
    text = (folder / "report.md").read_text()
    for heading in ("By question", "Seeing less", "Present against past", "As a stream"):
        assert f"## {heading}" in text
    with Image.open(folder / "report.png") as image:
        assert image.width > 400


@pytest.mark.job
def test_the_report_quotes_what_lmms_eval_wrote(job):
    folder, _, report = job
    for label, by_seed in report["results"].items():
        files = {
            name: json.loads((folder / label / "seed0" / path).read_text())
            for name, path in by_seed["seed0"].items()
        }
        said = {name: file["results"]["miniworld_qa"] for name, file in files.items()}
        for metric, value in report["metrics"][label].items():
            assert value["seeds"] == [said["all"][f"{metric},none"]]
        for metric, value in report["per_class"][label].items():
            assert value["seeds"] == [said["all"][f"{metric},none"]]
        blind = report["baselines"][label]["appearance, blind"]["seeds"]
        assert blind == [said["blind"]["appearance,none"]]
        validation = files["all"]["results"]["miniworld_qa_val"]
        assert report["validation"][label]["motion"]["seeds"] == [validation["motion,none"]]
        assert "miniworld_qa_val" not in files["blind"]["results"]


@pytest.mark.job
def test_again_it_answers_from_its_caches(job):
    folder, arguments, first = job
    kept = [*folder.glob("*/seed*/**/*"), *folder.glob("tokens/*/*")]
    kept = {path: path.stat().st_mtime_ns for path in kept if path.is_file()}
    assert any(path.name == "tokens.json" for path in kept)
    start = time.perf_counter()
    second = main(arguments)
    assert time.perf_counter() - start < first["wall_seconds"] / 2
    assert second["metrics"] == first["metrics"] and second["live"] == first["live"]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.job
def test_afterwards_lmms_eval_finds_questions_and_model(job, monkeypatch):
    folder, _, _ = job
    monkeypatch.setenv(VARIABLE, str(folder))
    made = offer()
    assert made["pretrained"] == str(folder / "streamformer-moving" / "seed0" / "refine")
    assert (folder / "lmms.json").is_file()


@pytest.mark.job
def test_the_trained_model_talks_about_a_video(job, capsys):
    folder, _, _ = job
    video = next(folder.glob("miniworld/qa-*/videos/qa_test_*.mp4"))
    asked = ["--ask", "1.0: What is happening now?", "--ask", "9: What happened before?"]
    result = main(["chat", str(video), "--work-dir", str(folder), *asked])
    assert result["model"].endswith("refine") and result["frames"] == 16
    assert [row["time"] for row in result["answers"]] == [1.0, 1.875]
    assert [row["encoded_frames"] for row in result["answers"]] == [0, 0]
    assert "What happened before?" in capsys.readouterr().out


@pytest.mark.job
def test_a_failed_evaluation_fails_the_job(job):
    folder, arguments, _ = job
    video = next(folder.glob("miniworld/qa-*/videos/qa_test_*.mp4"))
    hidden = video.rename(folder / video.name)
    seeds = arguments.index("--seeds")
    try:
        with pytest.raises(UserError, match=f"(?s)0 new results files.*{video.name}"):
            main([*arguments[: seeds + 1], "1", *arguments[seeds + 2 :]])
    finally:
        hidden.rename(video)
