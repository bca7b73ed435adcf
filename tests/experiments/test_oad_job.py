"""The whole comparison as a user runs it, at reduced size: once, again from caches, and watched.

It shows that the parts fit and that a second call resumes, not how well anything detects: worlds
and trainings are far too small for that.
"""

import json
import time

import pytest
from PIL import Image

from experiments.run import main

SMALL = {
    "world.stills_train": 64,
    "world.stills_val": 16,
    "world.clips_train": 48,
    "world.clips_train_long": 8,
    "world.clips_val": 16,
    "world.clips_val_long": 4,
    "world.streams_train": 10,
    "world.streams_val": 2,
    "world.streams_val_long": 1,
    "world.streams_test": 4,
    "world.streams_test_long": 1,
    "mini.mini_siglip.steps": 20,
    "mini.mini_siglip.warmup": 2,
    "mini.mini_siglip.batch_size": 16,
    "mini.mini_siglip.text_batch": 8,
    "mini.optim.updates": 6,
    "mini.optim.warmup_updates": 2,
    "mini.launch.processes": 1,
    "train.epochs": 2,
    "train.warmup_epochs": 1,
}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Arguments of the job and the report of its first run."""
    folder = tmp_path_factory.mktemp("job")
    arguments = ["oad", "--work-dir", str(folder), "--third-arm", "--seeds", "0", "1"]
    for key, value in SMALL.items():
        arguments += ["--set", f"{key}={value}"]
    return folder, arguments, main(arguments)


@pytest.mark.job
def test_the_report_is_complete(job):
    folder, _, report = job
    assert json.loads((folder / "report.json").read_text()) == report
    assert list(report["metrics"]) == ["siglip", "image", "streamformer"]
    for label, metrics in report["metrics"].items():
        assert {"online/mAP", "window/mAP", "online/mAP@test_768"} <= set(metrics)
        for metric, value in metrics.items():
            assert len(value["seeds"]) == 2 and 0 < value["mean"] < 100, (label, metric)
    assert set(report["difference"]) == set(report["metrics"]["siglip"])
    assert report["difference"]["online/mAP"]["low"] < report["difference"]["online/mAP"]["high"]
    assert report["difference_of"] == "streamformer - siglip"
    assert all(key.startswith("encoder.") for key in report["config_difference"])
    assert {"encoder.spec", "encoder.settings.weights"} <= set(report["config_difference"])
    assert report["config"]["train"]["epochs"] == 2
    assert report["environment"]["torch"] and report["wall_seconds"] > 0
    assert set(report["probe"]["siglip"]) == {"shape", "colour"}
    assert len(report["per_class"]["siglip"]) > 3
    assert 0 < report["chance"]["online/mAP"] < 50
    assert report["videos"]["test_session_set"] == 4
    with Image.open(folder / "report.png") as image:
        assert image.width > 1000


@pytest.mark.job
def test_again_it_answers_from_its_caches(job):
    folder, arguments, first = job
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*/seed*/**/*") if path.is_file()}
    kept |= {path: path.stat().st_mtime_ns for path in folder.glob("features/*/*.npy")}
    start = time.perf_counter()
    second = main(arguments)
    assert time.perf_counter() - start < first["wall_seconds"] / 2
    assert second["metrics"] == first["metrics"]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.job
def test_another_seed_is_added_without_a_new_world(job):
    folder, arguments, first = job
    seeds = arguments.index("--seeds")
    report = main([*arguments[: seeds + 1], "1", "2", *arguments[seeds + 3 :]])
    assert report["seeds"] == [1, 2]
    for label, metrics in report["metrics"].items():
        assert (
            metrics["online/mAP"]["seeds"][0] == first["metrics"][label]["online/mAP"]["seeds"][1]
        )
    assert report["world"] == first["world"]


@pytest.mark.job
def test_ready_features_give_the_same_numbers(job, tmp_path):
    folder, arguments, first = job
    ready = [
        f"features:{next(folder.glob(f'features/{label}-*'))}" for label in ("siglip", "image")
    ]
    where = arguments.index("--work-dir") + 1
    arguments = [*arguments[:where], str(tmp_path), *arguments[where + 1 :], "--encoders", *ready]
    arguments.remove("--third-arm")
    root = next(folder.glob("miniworld/*/streams"))
    report = main([*arguments, "--set", f"data.root={root}", "--seeds", "1"])
    for ours, theirs in zip(report["metrics"].values(), ("siglip", "image"), strict=True):
        expected = first["metrics"][theirs]["online/mAP"]["seeds"][1]
        assert ours["online/mAP"]["mean"] == expected


@pytest.mark.job
def test_its_head_watches_a_stream(job, tmp_path):
    folder, _, _ = job
    stream = next(folder.glob("miniworld/*/streams/videos/stream_test_160_0000.mp4"))
    arguments = ["detect", str(stream), "--work-dir", str(folder), "--out", str(tmp_path)]
    result = main([*arguments, "--threshold", "0.1", "--max-seconds", "5"])
    assert result["head"] == str(folder / "streamformer" / "seed0" / "head.safetensors")
    assert result["steps"] == result["frames"] == 40
    assert (tmp_path / "annotated.mp4").is_file() and (tmp_path / "timeline.png").is_file()
