"""The whole comparison as a user runs it, at reduced size: once, again from caches, and on a video.

It shows that the parts fit and that a second call resumes, not how well anything is segmented:
videos and trainings are far too small for that.
"""

import json
import time

import pytest
import torch
from PIL import Image

from backbone import StreamformerConfig, StreamformerModel
from backbone.video import open_video
from experiments.config import UserError
from experiments.run import main

SMALL = {
    "instances.train": 6,
    "instances.val": 1,
    "instances.test": 2,
    "instances.frames": 3,
    "train.iterations": 2,
    "train.warmup": 1,
    "train.batch_size": 2,
    "train.checkpoint_every": 1,
    "train.threads": None,  # no processes: to start them would take longest
    "loss.num_points": 64,
    "head.decoder_layers": 1,
}


def save_encoder(folder, seed):
    """Weights as the mini encoders have them, but random."""
    torch.manual_seed(seed)
    config = StreamformerConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, num_frames=4, temporal_attention=seed > 0,
    )  # fmt: skip
    StreamformerModel(config).save_pretrained(folder)
    return f"streamformer:{folder}"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Arguments of the job and the report of its first run."""
    folder = tmp_path_factory.mktemp("job")
    specs = [save_encoder(folder / name, seed) for seed, name in enumerate(("still", "moving"))]
    arguments = ["ovis", "--work-dir", str(folder), "--encoders", *specs, "--seeds", "0"]
    for key, value in SMALL.items():
        arguments += ["--set", f"{key}={value}"]
    return folder, arguments, main(arguments)


@pytest.mark.job
def test_the_report_is_complete(job):
    folder, _, report = job
    assert json.loads((folder / "report.json").read_text()) == report
    assert list(report["metrics"]) == ["streamformer-still", "streamformer-moving"]
    for metrics in report["metrics"].values():
        assert list(metrics) == ["AP", "AP50", "AP75", "AR1", "AR10", "recall_camouflaged"]
    assert all(key.startswith("encoder.") for key in report["config_difference"])
    assert {"encoder.spec", "encoder.settings.weights"} <= set(report["config_difference"])
    assert report["config"]["train"]["iterations"] == 2 == report["iterations"]
    assert "![Test videos, frame by frame](strip.png)" in (folder / "report.md").read_text()
    for name in ("report.png", "strip.png"):
        with Image.open(folder / name) as image:
            assert image.width > 400


@pytest.mark.job
def test_again_it_answers_from_its_caches(job):
    folder, arguments, first = job
    kept = [*folder.glob("*/seed*/**/*"), *folder.glob("tokens/*/*")]
    kept = {path: path.stat().st_mtime_ns for path in kept if path.is_file()}
    start = time.perf_counter()
    second = main(arguments)
    assert time.perf_counter() - start < first["wall_seconds"]
    assert second["metrics"] == first["metrics"]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.job
def test_its_segmenter_tracks_a_video(job, tmp_path, capsys):
    folder, _, _ = job
    frames = next(folder.glob("miniworld/*/test/JPEGImages/*"))
    out = tmp_path / "tracked.mp4"
    words = ["track", str(frames), "--work-dir", str(folder), "--fps", "8", "--out", str(out)]
    result = main([*words, "--score", "0.0"])
    assert result["frames"] == 3 and set(result["milliseconds_per_frame"]) == {
        "decode", "encode", "head", "track",
    }  # fmt: skip
    assert result["segmenter"].endswith("seed0/segmenter.safetensors")
    assert result["identities"] and result["memory_bytes"] > 0
    with open_video(out) as reader:
        assert len(list(reader)) == 3
    assert "ms" in capsys.readouterr().out


def test_what_is_missing_is_said_at_once(tmp_path):
    with pytest.raises(UserError, match="data.root is None, and .* not rendered: say where"):
        main(["ovis", "--config", "ytvis2019", "--work-dir", str(tmp_path)])
    with pytest.raises(UserError, match="there is no folder /nowhere"):
        words = ["--config", "ovis", "--set", "data.root=/nowhere", "--work-dir", str(tmp_path)]
        main(["ovis", *words])
    with pytest.raises(UserError, match="(?s)no segmenter.safetensors of a run .*run.py ovis"):
        main(["track", "video.mp4", "--work-dir", str(tmp_path)])
    with pytest.raises(UserError, match="--set tracker.recent=0.*|recent=0 is below 1"):
        main(["ovis", "--set", "tracker.recent=0", "--work-dir", str(tmp_path)])
