"""Stages on transformers' Trainer: what trains, goes on, is counted, and is refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from backbone.video import VideoWriter
from integrations.videoqa.checkpoints import load_model, save_model
from integrations.videoqa.data import DataError, Source
from integrations.videoqa.train import (
    CHECKPOINTS,
    LOST,
    REPORT,
    STAGES,
    StageConfig,
    main,
    run_stage,
)

ROOT = Path(__file__).resolve().parents[3]
TINY = StageConfig(template="qwen_1_5", lr=1e-3, batch_size=4, per_device=2, updates=6,
                   image_layout="square", num_frames=2, gradient_checkpointing=False)  # fmt: skip
CPU = {"use_cpu": True, "disable_tqdm": True, "save_steps": 2}
BROKEN = "broken.mp4"


def talk(name: str, question: str, answer: str, **media) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns, **media}


@pytest.fixture
def data(tmp_path) -> Source:
    """Videos, images and text together: twelve records."""
    rng = np.random.default_rng(0)
    rows = []
    for n in range(4):
        with VideoWriter(tmp_path / f"{n}.mp4", fps=4) as writer:
            for image in rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8):
                writer.write(image)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
            tmp_path / f"{n}.png"
        )
        rows += [talk(f"v{n}", "<image>\nWhat?", "noise", video=f"{n}.mp4"),
                 talk(f"i{n}", "<image>\nWhat?", "noise", image=f"{n}.png"),
                 talk(f"t{n}", "Why?", "because")]  # fmt: skip
    return Source(write(tmp_path / "data.json", rows))


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model, before) -> set[str]:
    """Parts of which a weight is another one now."""
    after = model.state_dict()
    return {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}


# -- training --------------------------------------------------------------------------------------


def test_a_stage_learns_and_leaves_a_model(fresh, data, tmp_path):
    model = fresh(template="vicuna_v1")
    before = weights(model)
    out = tmp_path / "stage"
    report = run_stage(model, replace(TINY, updates=30), [data], out, trainer=CPU)
    assert report["updates"] == 30
    assert report["records"] == 12
    assert report["unreadable"] == {}
    assert changed(model, before) == {"projector", "language_model", "image_newline"}
    assert model.config.template == "qwen_1_5"
    assert model.config.num_frames == 2
    assert not model.training
    loaded, _ = load_model(out)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    asked = (["What?", "Why?"], [str(tmp_path / "0.mp4"), None])
    assert loaded.answer(*asked, max_new_tokens=8) == model.answer(*asked, max_new_tokens=8)
    assert json.loads((out / REPORT).read_text()) == report
    assert not (out / CHECKPOINTS).exists()
    assert not list(out.rglob("*.bin"))  # no pickles


def test_loss_falls(fresh, data, tmp_path):
    model = fresh()
    losses = [
        run_stage(model, replace(TINY, updates=15), [data], tmp_path / f"{n}", trainer=CPU)["loss"]
        for n in range(2)
    ]
    assert losses[1] < 0.7 * losses[0]


@pytest.mark.parametrize("quiet", [True, False])
def test_progress_and_losses_stay_off_stdout(fresh, data, tmp_path, capsys, quiet):
    trainer = {**CPU, "disable_tqdm": quiet, "logging_steps": 1}
    run_stage(fresh(), replace(TINY, updates=2), [data], tmp_path / "stage", trainer=trainer)
    assert capsys.readouterr().out == ""


def test_the_first_stage_trains_the_projector_alone(fresh, data, tmp_path):
    model = fresh()
    before = weights(model)
    stage = replace(STAGES["align"], batch_size=4, per_device=2, updates=2, num_frames=2)
    report = run_stage(model, stage, [data], tmp_path / "out", trainer=CPU)
    assert changed(model, before) == {"projector"}
    assert model.config.template == "plain"
    assert report["trained_parameters"] == sum(p.numel() for p in model.projector.parameters())


def test_lora_trains_beside_the_llm(fresh, data, tmp_path):
    model = fresh()
    before = weights(model.language_model)
    run_stage(model, replace(TINY, lora_rank=2, updates=2), [data], tmp_path / "out", trainer=CPU)
    after = model.language_model.state_dict()
    for name, value in before.items():
        now = next(after[k] for k in (name, name.replace(".weight", ".base_layer.weight"),
                                      name.replace(".bias", ".base_layer.bias")) if k in after)
        assert torch.equal(value, now), name  # fmt: skip
    assert any(key.endswith("lora_B.default.weight") and after[key].any() for key in after)
    loaded, _ = load_model(tmp_path / "out")
    assert loaded.config.lora_rank == 2


def test_stored_features_train_alike(fresh, data, tmp_path):
    results = []
    for stored in (False, True):
        model = fresh()
        stage = replace(TINY, store_features=stored)
        run_stage(model, stage, [data], tmp_path / str(stored), trainer=CPU)
        results.append(weights(model))
        encoded = model.encoded_frames
    assert encoded == 4 * 2 + 4  # each once, whatever the epochs
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-5)


def test_questions_on_one_video_share_its_tokens(fresh, tmp_path, data):
    rows = [talk(f"{n}", "<image>\nWhat?", f"{n}", video=f"{n % 2}.mp4") for n in range(8)]
    source = Source(write(tmp_path / "many.json", rows))
    stage = replace(TINY, questions=4, updates=1, batch_size=2)
    assert run_stage(fresh(), stage, [source], tmp_path / "o", trainer=CPU)["records"] == 2


# -- again -----------------------------------------------------------------------------------------


class Killed(RuntimeError):
    pass


def test_an_interrupted_stage_goes_on_to_the_same_bits(fresh, data, tmp_path, monkeypatch):
    from integrations.videoqa.train import StageTrainer

    whole = fresh()
    expected = run_stage(whole, TINY, [data], tmp_path / "whole", trainer=CPU)

    step = StageTrainer.training_step
    count = iter(range(100))

    def dies(self, *arguments):
        if next(count) == 2 * 4 + 1:  # in the fifth update
            raise Killed
        return step(self, *arguments)

    monkeypatch.setattr(StageTrainer, "training_step", dies)
    with pytest.raises(Killed):
        run_stage(fresh(), TINY, [data], tmp_path / "parts", trainer=CPU)
    assert not (tmp_path / "parts" / REPORT).exists()
    monkeypatch.setattr(StageTrainer, "training_step", step)
    model = fresh()
    report = run_stage(model, TINY, [data], tmp_path / "parts", trainer=CPU)
    assert report["updates"] == expected["updates"]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_finished_stage_is_loaded(fresh, data, tmp_path, monkeypatch):
    model = fresh()
    report = run_stage(model, TINY, [data], tmp_path / "out", trainer=CPU)
    other = fresh()
    assert changed(other, weights(model))
    monkeypatch.setattr("integrations.videoqa.train.StageTrainer.train", None)
    assert run_stage(other, TINY, [data], tmp_path / "out", trainer=CPU) == report
    assert not changed(other, weights(model))


def test_a_folder_of_another_stage_is_refused(fresh, data, tmp_path):
    model = fresh()
    run_stage(model, TINY, [data], tmp_path / "out", trainer=CPU)
    with pytest.raises(ValueError, match="out holds another run: stage.lr is"):
        run_stage(model, replace(TINY, lr=1.0), [data], tmp_path / "out", trainer=CPU)
    with pytest.raises(ValueError, match="seed is 0 there and 1 now"):
        run_stage(model, TINY, [data], tmp_path / "out", seed=1, trainer=CPU)


# -- what cannot be read ---------------------------------------------------------------------------


@pytest.fixture
def damaged(data, tmp_path) -> Source:
    rows = json.loads(Path(data.json).read_text())
    (tmp_path / BROKEN).write_bytes(b"not a video")
    rows += [talk("b", "<image>\nWhat?", "noise", video=BROKEN)]
    return Source(write(tmp_path / "damaged.json", rows))


def test_unreadable_videos_are_counted_and_reported(fresh, damaged, tmp_path, caplog):
    report = run_stage(fresh(), TINY, [damaged], tmp_path / "out", trainer=CPU)
    (path,) = report["unreadable"]
    assert path.endswith(BROKEN)
    assert BROKEN in report["unreadable"][path]
    assert "1 files could not be read and were left out" in caplog.text


def test_what_was_lost_is_remembered_over_an_interruption(fresh, damaged, tmp_path, monkeypatch):
    from integrations.videoqa.train import StageTrainer

    step = StageTrainer.training_step
    stage = replace(TINY, updates=8)  # two epochs and a bit

    def dies(self, *arguments):
        if self.state.global_step == 7:
            raise Killed
        return step(self, *arguments)

    monkeypatch.setattr(StageTrainer, "training_step", dies)
    with pytest.raises(Killed):
        run_stage(fresh(), stage, [damaged], tmp_path / "out", trainer=CPU)
    (kept,) = (tmp_path / "out" / CHECKPOINTS).glob("checkpoint-*")
    assert list(json.loads((kept / LOST).read_text())) == [str(tmp_path / BROKEN)]
    monkeypatch.setattr(StageTrainer, "training_step", step)
    (tmp_path / BROKEN).unlink()
    report = run_stage(fresh(), stage, [damaged], tmp_path / "out", trainer=CPU)
    assert list(report["unreadable"]) == [str(tmp_path / BROKEN)]


def test_too_many_unreadable_files_end_the_training(fresh, tmp_path):
    rows = [talk(f"{n}", "<image>\nWhat?", "A", video=f"gone{n}.mp4") for n in range(8)]
    source = Source(write(tmp_path / "gone.json", rows))
    with pytest.raises(DataError, match=r"cannot be read, 2 may be \(max_unreadable\): .*gone"):
        run_stage(fresh(), TINY, [source], tmp_path / "out", trainer=CPU)
    stage = replace(TINY, max_unreadable=1.0, updates=4)
    model = fresh()
    before = weights(model)
    report = run_stage(model, stage, [source], tmp_path / "all", trainer=CPU)
    assert len(report["unreadable"]) == 8
    assert report["loss"] == 0
    assert not changed(model, before)  # nothing was learnt, and nothing broke


# -- configs ---------------------------------------------------------------------------------------


def test_stages_have_the_published_numbers():
    align, image, video = STAGES["align"], STAGES["image"], STAGES["video"]
    assert (align.lr, align.batch_size, align.template) == (1e-3, 256, "plain")
    assert (image.lr, image.batch_size, image.template) == (2e-5, 128, "vicuna_v1")
    assert (video.lr, video.batch_size, video.num_frames, video.force_sample) == (2e-5, 128, 16, 1)
    assert (align.trains, video.trains) == (("projector",), ("projector", "language_model"))
    assert (align.image_layout, image.image_layout) == ("square", "anyres")
    assert {s.max_length for s in STAGES.values()} == {4096}
    assert {(s.epochs, s.schedule, s.warmup, s.weight_decay) for s in STAGES.values()} == {
        (1.0, "cosine", 0.03, 0.0)
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batchsize": 3}, "no field 'batchsize'; did you mean 'batch_size'"),
        ({"batch_size": 6, "per_device": 4}, "batch_size=6 does not divide by per_device=4"),
        ({"epochs": 0}, "epochs=0, updates=0: give one"),
        ({"max_unreadable": 2}, "max_unreadable=2 is a share"),
        ({"questions": 0}, "questions=0 must be at least 1"),
        ({"template": "vicuna"}, "no prompt template 'vicuna'"),
    ],
)
def test_impossible_stages_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        StageConfig.from_dict(fields)


def test_impossible_calls_are_refused(fresh, data, tmp_path):
    model = fresh()
    with pytest.raises(ValueError, match="trainer arguments learning_rate: the stage decides"):
        run_stage(model, TINY, [data], tmp_path, trainer={"learning_rate": 1})
    with pytest.raises(ValueError, match="no 'save_step'; did you mean 'save_steps'"):
        run_stage(model, TINY, [data], tmp_path, trainer={"save_step": 1})
    with pytest.raises(ValueError, match="parts to train"):
        run_stage(model, replace(TINY, trains=("tower",)), [data], tmp_path, trainer=CPU)
    model.tokenizer = None
    with pytest.raises(ValueError, match="model.tokenizer is not set"):
        run_stage(model, TINY, [data], tmp_path)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def llm_folder(fresh, tmp_path) -> str:
    model = fresh()
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(model.config.text_config).save_pretrained(tmp_path / "llm")
    model.tokenizer.save_pretrained(tmp_path / "llm")
    return str(tmp_path / "llm")


def options(data, output, *more: str) -> list[str]:
    fields = ["template=qwen_1_5", "batch_size=4", "per_device=2", "updates=2", "num_frames=2",
              'image_layout="square"']  # fmt: skip
    sets = [part for field in fields for part in ("--set", field)]
    return ["--data", str(data.json), "--output", str(output), *sets,
            "--trainer", "use_cpu=true", *more]  # fmt: skip


def test_the_command_runs_stage_after_stage(data, llm_folder, siglip_folder, tmp_path):
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    tower = ["--model", llm_folder, "--tower", f"siglip:{siglip_folder}"]
    report = main(["--stage", "align", *options(data, one), *tower, "--share", "first:50%"])
    assert report["records"] == 6
    main(["--stage", "image", *options(data, two), *tower, "--projector", str(one)])
    main(["--stage", "video", *options(data, three), "--model", str(two), "--dtype", "float32"])
    model, _ = load_model(three)
    assert model.tower.encoder.kind == "siglip"
    assert not torch.equal(model.projector[0].weight, load_file(one / "model.safetensors")[
        "projector.0.weight"])  # fmt: skip


def test_a_wrong_command_is_refused(data, tmp_path, capsys):
    start = ["--stage", "video", *options(data, tmp_path), "--model", "x"]
    for more, message in (
        (["--projector", "y"], "--projector goes into a new model"),
        (["--set", "lr"], "'lr' is no NAME=VALUE"),
        (["--root", "a", "--root", "b"], "1 --data with 2 --root"),
    ):
        with pytest.raises(SystemExit):
            main([*start, *more])
        assert message in capsys.readouterr().err


def test_two_processes_train_as_one(fresh, data, tmp_path):
    """The same samples in each update: gradients are averaged over tokens, not over processes."""
    save_model(fresh(), tmp_path / "model")
    start = ["--stage", "video", "--model", str(tmp_path / "model")]
    one = main([*start, *options(data, tmp_path / "one")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
         "-m", "integrations.videoqa.train", *start, *options(data, tmp_path / "two")],
        env=environment, check=True, timeout=600, capture_output=True,
    )  # fmt: skip
    two = json.loads((tmp_path / "two" / REPORT).read_text())
    assert {**two, "loss": None} == {**one, "loss": None}
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-3, atol=2e-5)
