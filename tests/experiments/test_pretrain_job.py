"""The verbs around pretraining as a user runs them, on a world of a few clips.

They show that the parts fit, that a second call answers from what is there, and that processes of
torchrun work together; not how well anything learns.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from backbone import build_encoder
from experiments.config import UserError
from experiments.run import main

ROOT = Path(__file__).parents[2]
WORLD = {
    "world.stills_train": 64,
    "world.stills_val": 16,
    "world.clips_train": 48,
    "world.clips_train_long": 8,
    "world.clips_val": 16,
    "world.clips_val_long": 4,
    "world.streams_train": 6,
    "world.streams_val": 1,
    "world.streams_val_long": 1,
    "world.streams_test": 3,
    "world.streams_test_long": 1,
}
SMALL = {
    **WORLD,
    "mini_siglip.steps": 12,
    "mini_siglip.warmup": 2,
    "mini_siglip.batch_size": 16,
    "mini_siglip.text_batch": 8,
    "mini_siglip.processes": 1,
    "launch.processes": 1,
    "optim.updates": 4,
    "optim.warmup_updates": 1,
    "run.log_every": 2,
    "run.eval_every": 2,
}
METRICS = {
    "localization": ["mAP"],
    "recognition": ["top1", "top5"],
    "retrieval": [
        f"{way}_R@{k}" for way in ("text_to_video", "video_to_text") for k in (1, 5, 10)
    ],
    "grounding": ["R1@0.3", "R1@0.5", "R1@0.7", "mIoU"],
    "instances": ["mIoU"],
    "referring": ["J", "F", "J&F"],
}


def given(values):
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes that these tests start: sums over several threads round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Work folder, and the report of a first small pretraining in it."""
    folder = tmp_path_factory.mktemp("pretrain")
    return folder, main(["pretrain", "--work-dir", str(folder), *given(SMALL)])


def modified(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.job
def test_pretraining_ends_with_a_model_and_a_report(work):
    folder, report = work
    assert json.loads((folder / "report.json").read_text()) == report
    names = [f"{task}/{metric}" for task, found in METRICS.items() for metric in found]
    for label in ("siglip", "streamformer"):
        assert set(report["metrics"][label]) == set(names)
        assert all(0 <= value["mean"] <= 100 for value in report["metrics"][label].values())
    assert report["difference_of"] == "streamformer - siglip"
    assert [line["update"] for line in report["losses"]] == [2, 4]
    assert set(report["losses"][0]) == {"update", *METRICS}
    assert [line["update"] for line in report["curves"]] == [2]
    assert 0 < report["chance"]["localization/mAP"] < 50
    assert report["chance"]["recognition/top1"] == pytest.approx(100 / 11)
    assert "trained for 4 updates" in (folder / "report.md").read_text()
    with Image.open(folder / "report.png") as image:
        assert image.width > 1500
    encoder = build_encoder(f"streamformer:{folder / 'model'}")
    assert encoder.encode(torch.zeros(1, 2, 3, 32, 32)).frame_embeddings.shape == (1, 2, 64)
    card = (folder / "model" / "README.md").read_text()
    assert "mini StreamFormer" in card and "J&F" in card


@pytest.mark.job
def test_again_it_trains_nothing_and_another_recipe_is_refused(work):
    folder, first = work
    before = modified(folder / "model") | modified(folder / "zero_shot")
    again = main(["pretrain", "--work-dir", str(folder), *given(SMALL)])
    assert again["metrics"] == first["metrics"]
    assert modified(folder / "model") | modified(folder / "zero_shot") == before
    with pytest.raises(UserError, match="holds a run of another config: optim/lr was 0.0012 and"):
        main(["pretrain", "--work-dir", str(folder), *given({**SMALL, "optim.lr": 0.5})])


@pytest.mark.job
def test_zero_shot_measures_any_encoder_alike(work):
    folder, first = work
    options = ["--work-dir", str(folder), *given(SMALL)]
    both = main(["zero-shot", *options])
    assert both["metrics"] == first["metrics"]
    assert (folder / "zero_shot" / "report.png").is_file()
    one = main(["zero-shot", *options, "--encoder", f"streamformer:{folder / 'model'}",
                "--tasks", "grounding", "recognition"])  # fmt: skip
    expected = {
        name: value["mean"]
        for name, value in first["metrics"]["streamformer"].items()
        if name.startswith(("grounding/", "recognition/"))
    }
    assert {n: v["mean"] for n, v in one["metrics"]["streamformer"].items()} == expected
    assert one["difference"] == {}


@pytest.mark.job
def test_zero_shot_refuses_what_is_not_there(work, tmp_path):
    folder, _ = work
    options = ["--work-dir", str(folder), *given(SMALL)]
    with pytest.raises(UserError, match="--tasks: tracking is not in the config; choose from loc"):
        main(["zero-shot", *options, "--tasks", "tracking"])
    with pytest.raises(UserError, match="--encoder /weights: names no kind; write siglip, streamf"):
        main(["zero-shot", *options, "--encoder", "/weights"])
    with pytest.raises(UserError, match="model holds no model yet; train one .python experiments"):
        main(["zero-shot", "--work-dir", str(tmp_path), *given(SMALL)])
    with pytest.raises(UserError, match="--tasks: recognition has no val; choose from"):
        main(["zero-shot", *options, "--set", "tasks.recognition.val=None",
              "--tasks", "recognition"])  # fmt: skip


@pytest.mark.job
def test_a_video_of_ones_own_is_aligned_with_texts(work, tmp_path, capsys):
    folder, _ = work
    clip = next(folder.glob("miniworld/*/clips/videos/clip_val_00000.mp4"))
    texts = ["a red circle moves left", "a blue square grows", "nothing"]
    result = main(
        ["align", str(clip), "--encoder", f"streamformer:{folder / 'model'}", "--frames", "8",
         "--out", str(tmp_path), "--texts", *texts]
    )  # fmt: skip
    assert result == json.loads((tmp_path / "alignment.json").read_text())
    cosine, probability = result["cosine"], result["probability"]
    assert len(cosine["clip"]) == 3 and len(cosine["frames"]) == len(result["times"]) == 8
    assert torch.tensor(cosine["patches"]).shape == (8, 4, 4, 3)
    scale, bias = result["scale"], result["bias"]
    expected = torch.sigmoid(scale * torch.tensor(cosine["frames"]) + bias)
    torch.testing.assert_close(torch.tensor(probability["frames"]), expected)
    saved = json.loads((folder / "model" / "alignment.json").read_text())
    assert bias == saved["bias"][0], "the scalars are those that were trained"
    out = capsys.readouterr().out
    best = texts[torch.tensor(cosine["clip"]).argmax()]
    line = next(line for line in out.splitlines() if line.startswith(best))
    assert f"{max(cosine['clip']):+.3f}*" in line
    with Image.open(tmp_path / "alignment.png") as image:
        assert image.width > 1200


@pytest.mark.job
def test_aligning_refuses_what_cannot_be_read(work, tmp_path):
    folder, _ = work
    model = f"streamformer:{folder / 'model'}"
    with pytest.raises(UserError, match="no such file"):
        main(["align", str(tmp_path / "no.mp4"), "--encoder", model, "--texts", "a"])
    with pytest.raises(UserError, match="there is no folder /no/such"):
        main(["align", "x.mp4", "--encoder", "siglip:/no/such/model", "--texts", "a"])
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="nothing tells with which SigLIP model it was trained"):
        main(["align", "x.mp4", "--encoder", f"streamformer:{tmp_path / 'bare'}", "--texts", "a"])
    clip = next(folder.glob("miniworld/*/clips/videos/clip_val_00000.mp4"))
    with pytest.raises(UserError, match="text 0 of 1 is empty"):
        main(["align", str(clip), "--encoder", model, "--texts", " ", "--out", str(tmp_path)])


@pytest.mark.job
def test_the_rendered_world_is_whole(work):
    folder, _ = work
    result = main(["check-data", "--work-dir", str(folder), *given(WORLD)])
    assert result["findings"] == [] and result["videos"] == 76
    assert len(result["parts"]) == 12


def call(folder, *launcher, **values):
    """The verb in processes of its own, as a user starts it."""
    command = [*launcher, str(ROOT / "experiments" / "run.py"), "pretrain", "--device", "cpu"]
    command += ["--work-dir", str(folder), *given({**SMALL, **values})]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.job
def test_two_processes_of_torchrun_make_one_report(work, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    process = call(tmp_path, *torchrun, "--standalone", **{"run.eval_every": 0})
    try:
        out, errors = process.communicate(timeout=300)
    finally:
        process.terminate()
    assert process.returncode == 0, errors[-3000:]
    assert out.count("Pretraining on miniworld") == 1
    metrics = json.loads((tmp_path / "model" / "metrics.json").read_text())
    assert metrics["updates"] == 4 and set(metrics["zero_shot"]) == set(METRICS)


@pytest.mark.job
def test_a_killed_run_goes_on_to_the_same_weights(work, tmp_path):
    from safetensors.torch import load_file

    folder, _ = work
    values = {
        **SMALL,
        "run.checkpoint_every": 1,
        "run.keep_checkpoints": 100,
        "run.eval_every": 0,
        "optim.updates": 48,  # enough that none has ended when it is killed
    }
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    for place in (killed, straight):
        place.mkdir()
        for part in ("miniworld", "encoders"):
            (place / part).symlink_to(folder / part)
    process = call(killed, sys.executable, **values)
    deadline = time.monotonic() + 300
    while not list(killed.glob("model/checkpoints/0*3")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "model" / "metrics.json").exists()
    for place in (killed, straight):
        main(["pretrain", "--device", "cpu", "--work-dir", str(place), *given(values)])
    one, other = (load_file(p / "model" / "model.safetensors") for p in (killed, straight))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.job
def test_a_refusal_of_two_processes_is_one_line(work, tmp_path):
    folder, _ = work
    values = {**SMALL, "launch.processes": 2, "optim.lr": 0.5}
    with pytest.raises(UserError, match="^.*model holds a run of another config: .* or delete it$"):
        main(["pretrain", "--work-dir", str(folder), *given(values)])


@pytest.mark.job
def test_sigterm_reaches_both_processes_which_save_and_go_on_later(work, tmp_path):
    folder, _ = work
    for part in ("miniworld", "encoders"):
        (tmp_path / part).symlink_to(folder / part)
    values = {"launch.processes": 2, "run.eval_every": 0, "optim.updates": 400}
    process = call(tmp_path, sys.executable, **values)
    log, deadline = tmp_path / "model" / "log.jsonl", time.monotonic() + 300
    while not log.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors[-3000:]
    (state,) = (tmp_path / "model" / "checkpoints").glob("*/state.json")
    assert 2 <= json.loads(state.read_text())["update"] < 400


STUDY = {
    **SMALL,
    "run.eval_every": 0,
    "oad.train.epochs": 1,
    "oad.train.warmup_epochs": 0,
    "oad.train.threads": None,  # one process, which starts faster than several
}


@pytest.fixture
def study_folder(work, tmp_path):
    for part in ("miniworld", "encoders"):
        (tmp_path / part).symlink_to(work[0] / part)
    return tmp_path


@pytest.mark.job
def test_an_ablation_compares_its_rows_downstream_and_zero_shot(study_folder):
    options = ["--work-dir", str(study_folder), "--seeds", "0", "1", *given(STUDY)]
    report = main(["ablation", "--rows", "G", "S", *options])
    assert list(report["metrics"]) == ["none", "G", "S"]
    assert report["difference_of"] == "S - none" and set(report["other_differences"]) == {"S - G"}
    assert len(report["metrics"]["G"]["online/mAP"]["seeds"]) == 2
    zero_shot = report["tables"]["Zero-shot"]
    assert {name.partition("/")[0] for name in zero_shot["S"]} == set(METRICS)
    assert zero_shot["none"] != zero_shot["G"] != zero_shot["S"]
    assert report["arms"]["G"]["tasks"] == "recognition x 5, retrieval x 5"
    assert all(key.startswith("encoder.") for key in report["config_difference"])
    assert "## Zero-shot" in (study_folder / "report.md").read_text()
    before = modified(study_folder / "oad")
    again = main(["ablation", "--rows", "G", "S", *options])
    assert again["metrics"] == report["metrics"] and modified(study_folder / "oad") == before


@pytest.mark.job
def test_data_efficiency_compares_at_equal_data(study_folder):
    options = ["--work-dir", str(study_folder), "--seeds", "0", *given(STUDY)]
    report = main(["data-efficiency", "--shares", "1", "0.5", *options])
    labels = [f"{way}-{share}" for share in (50, 100) for way in ("contrastive", "multitask")]
    assert list(report["metrics"]) == ["siglip", *labels]
    assert report["difference_of"] == "multitask-100 - contrastive-100"
    assert set(report["other_differences"]) == {
        "multitask-50 - contrastive-50", "multitask-100 - siglip",
    }  # fmt: skip
    assert report["arms"]["contrastive-50"] == {
        "tasks": "retrieval x 10", "share": 0.5, "updates": 4,
    }  # fmt: skip
    clips = [
        json.loads(file.read_text())["clips"]["retrieval"]
        for name in ("contrastive-50", "multitask-50", "multitask-100")
        for file in study_folder.glob(f"encoders/{name}-*/metrics.json")
    ]
    assert clips[0] == clips[1] < clips[2] == 56
    with Image.open(study_folder / "report.png") as image:
        assert image.width > 1000
