"""The training job on a handful of tiny clips: it learns, resumes exactly, and fails by name."""

import json
import logging
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from backbone import StreamformerModel, build_encoder
from pretrain import train
from pretrain.datasets import VideoDataset
from pretrain.datasets.decode import ClipError
from pretrain.train import Interrupted


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(one, other):
    one, other = weights_of(one), weights_of(other)
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def stop_at(monkeypatch, update):
    """Deliver SIGTERM to this process once ``update`` updates are done."""
    from pretrain.released_sampling import ReleasedSampler
    from pretrain.sampling import RoundSampler

    def advance(self, value):
        self.__dict__["round"] = value
        if value == update:
            os.kill(os.getpid(), signal.SIGTERM)

    position = property(lambda self: self.__dict__["round"], advance)
    for sampler in (RoundSampler, ReleasedSampler):
        monkeypatch.setattr(sampler, "round", position, raising=False)


def test_a_run_learns_and_leaves_a_model_that_loads(config):
    output = train(config(updates=30, optim__lr=2e-3), progress=False)
    losses = [line["loss"] for line in log_of(output)]
    for task in ("actions", "moments", "captions"):
        first = sum(loss[task] for loss in losses[:5])
        assert sum(loss[task] for loss in losses[-5:]) < 0.8 * first, task
    model = StreamformerModel.from_pretrained(output)
    assert model.config.num_frames == 8
    clip = torch.zeros(1, 8, 3, 32, 32)
    assert build_encoder(f"streamformer:{output}").encode(clip).frame_embeddings.shape == (1, 8, 32)
    metrics = json.loads((output / "metrics.json").read_text())
    assert set(metrics["zero_shot"]) == {"actions", "moments", "captions"}
    assert metrics["zero_shot"]["moments"]["mAP"] > metrics["zero_shot"]["moments"]["prior"]
    assert "top1" in (output / "README.md").read_text()
    assert not [name for name in weights_of(output) if "text" in name]
    assert len(json.loads((output / "alignment.json").read_text())["log_scale"]) == 1


def test_a_finished_run_is_not_run_again_and_another_config_is_refused(config):
    output = train(config(updates=2), progress=False)
    before = (output / "metrics.json").stat().st_mtime_ns
    assert train(config(updates=2), progress=False) == output
    moved = output.rename(output.with_name("moved"))
    assert train(config(updates=2, output=str(moved), log_every=9), progress=False) == moved
    assert (moved / "metrics.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="another config: optim/lr was 0.001 and is now 0.1"):
        train(config(updates=2, output=str(moved), optim__lr=0.1), progress=False)


def test_what_the_lift_adds_can_learn_faster(config, tmp_path):
    """Adam's first step is as long as its rate, whatever the gradient."""
    runs = {
        scale: train(
            config(
                output=str(tmp_path / f"x{scale}"), optim__temporal_lr_scale=scale,
                updates=1, optim__weight_decay=0.0, model__gate=1.0,
            ),
            progress=False,
        )
        for scale in (1.0, 2.0, 4.0)
    }  # fmt: skip
    slow, middle, fast = (weights_of(folder) for folder in runs.values())
    for name, weight in slow.items():
        one, two = middle[name] - weight, fast[name] - weight  # steps of 1 and 3 rates beyond
        if "temporal" in name or "time_embedding" in name:
            assert one.abs().max() > 0 and torch.allclose(two, 3 * one, atol=1e-6), name
        else:
            assert torch.equal(one, two) and not one.any(), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__lora_rank": 2, "model__shared_scale": False, "optim__clip_norm": 1.0},
        {"long_share": 0.3, "long_frames": 12, "model__window": 4, "cache_in_memory": False},
        {"sampler": "balanced", "num_workers": 1},
        {
            "joint_rounds": True,
            "long_share": 0.3,
            "long_frames": 12,
            "optim__temporal_lr_scale": 3.0,
        },
    ],
    ids=["default", "lora", "long", "released", "joint"],
)
def test_an_interrupted_run_ends_in_the_very_same_weights(config, tmp_path, monkeypatch, changes):
    straight = train(config(output=str(tmp_path / "straight"), **changes), progress=False)
    parted = config(output=str(tmp_path / "parted"), **changes)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)  # between two checkpoints
        with pytest.raises(Interrupted) as stopped:
            train(parted, progress=False)
    assert stopped.value.code == 143
    assert not (tmp_path / "parted/metrics.json").exists()
    assert_same_weights(straight, train(parted, progress=False))
    steps = [(line["update"], line["loss"]) for line in log_of(straight)]
    assert [(line["update"], line["loss"]) for line in log_of(tmp_path / "parted")] == steps


def test_a_half_written_checkpoint_is_ignored_and_old_ones_go(config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(Interrupted):
            train(config(keep_checkpoints=2), progress=False)
    folder = tmp_path / "run/checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["00000004", "00000005"]
    (folder / "00000005/state.json").unlink()
    straight = train(config(output=str(tmp_path / "straight")), progress=False)
    assert_same_weights(straight, train(config(keep_checkpoints=2), progress=False))


def test_workers_read_the_same_clips(config, tmp_path):
    alone = train(config(updates=3, cache_in_memory=False), progress=False)
    helped = config(
        updates=3, output=str(tmp_path / "helped"), cache_in_memory=False, num_workers=2
    )
    assert_same_weights(alone, train(helped, progress=False))
    remembering = config(updates=3, output=str(tmp_path / "remembering"), num_workers=1)
    assert_same_weights(alone, train(remembering, progress=False))


def test_what_goes_wrong_in_a_worker_is_raised_and_the_run_can_go_on(config, monkeypatch):
    def fail(self, key):
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(VideoDataset, "__getitem__", fail)
        with pytest.raises(OSError, match="the disk is gone"):
            train(config(updates=2, num_workers=1), progress=False)
    assert not [t for t in threading.enumerate() if t.name == "receive batches"]
    assert (train(config(updates=2, num_workers=1), progress=False) / "metrics.json").is_file()


def test_a_key_that_is_new_since_a_run_had_its_default_then(config):
    output = train(config(updates=2), progress=False)
    saved = json.loads((output / "pretrain.json").read_text())
    assert saved.pop("sharded") is False
    (output / "pretrain.json").write_text(json.dumps(saved))
    assert train(config(updates=2), progress=False) == output
    with pytest.raises(ValueError, match="another config: sharded was False and is now True"):
        train(config(updates=2, sharded=True), progress=False)


def test_losses_and_metrics_reach_the_trackers(config):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = config(updates=4, eval_every=2, trackers=["tensorboard"])
    output = train(run, progress=False)
    events = accumulator.EventAccumulator(str(output / "pretrain"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss/actions")]
    assert [step for step, _ in losses] == [1, 2, 3, 4]
    logged = [line["loss"]["actions"] for line in log_of(output) if "loss" in line]
    assert [value for _, value in losses] == pytest.approx(logged)
    assert len(events.Scalars("zero_shot/moments/mAP")) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"model__gradient_checkpointing": True},
        {"model__temporal_attention": False},
        {"model__freeze": "image"},
        {"sampler": "unique"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_ways_to_train(config, siglip, changes):
    output = train(config(updates=2, **changes), progress=False)
    assert all(value.isfinite().all() for value in weights_of(output).values())
    names = list(weights_of(output))
    if "model__temporal_attention" in changes:
        assert not [name for name in names if "temporal" in name]


def test_recomputing_layers_changes_no_weight(config, tmp_path):
    plain = train(config(updates=2), progress=False)
    thrifty = config(
        updates=2, output=str(tmp_path / "thrifty"), model__gradient_checkpointing=True
    )
    assert_same_weights(plain, train(thrifty, progress=False))


def test_evaluating_on_the_way_changes_no_weight(config, tmp_path):
    plain = train(config(updates=4), progress=False)
    measured = train(
        config(updates=4, output=str(tmp_path / "measured"), eval_every=2), progress=False
    )
    assert_same_weights(plain, measured)
    assert [line["update"] for line in log_of(measured) if "zero_shot" in line] == [2]


def test_a_loss_that_is_not_finite_stops_the_run_by_name(config, siglip, tmp_path):
    broken = tmp_path / "siglip"
    broken.mkdir()
    for file in siglip.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = weights_of(broken)
    weights["logit_bias"] = torch.full_like(weights["logit_bias"], torch.nan)
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(FloatingPointError, match="loss of task 'actions' is nan at update 0"):
        train(config(model__siglip=str(broken)), progress=False)


def test_lost_videos_are_logged_and_too_many_stop_the_run(config, tasks, tmp_path, caplog):
    table = Path(tasks["actions"]["train"]["annotations"])
    (tmp_path / "with_hole.csv").write_text("gone.mp4,move up\n" + table.read_text())
    (tmp_path / "holes.csv").write_text("gone.mp4,move up\n" * 20)
    for name in ("with_hole", "holes"):
        task = dict(tasks["actions"])
        task["train"] = task["train"] | {"annotations": str(tmp_path / f"{name}.csv")}
        run = config(output=str(tmp_path / name), tasks={"actions": task}, updates=5)
        if name == "holes":
            with pytest.raises(ClipError, match="12 of 12 clips could not be read.*gone.mp4"):
                train(run, progress=False)
            continue
        with caplog.at_level(logging.WARNING):
            output = train(run, progress=False)
        metrics = json.loads((output / "metrics.json").read_text())
        assert list(metrics["failures"]["failed"].values()) == [1]
        assert caplog.text.count("skipped a clip that cannot be read") == 1


def test_wrong_reader_arguments_and_differing_labels_are_named(config, tasks, tmp_path):
    task = dict(tasks["actions"])
    task["train"] = {"annotations": "x.csv", "label": "y.json"}
    with pytest.raises(ValueError, match="task 'actions': reader 'kinetics' takes annotations, l"):
        train(config(tasks={"actions": task}), progress=False)
    (tmp_path / "label2id.json").write_text(
        json.dumps({"move up": 0, "move down": 1, "move left": 2, "move right": 3})
    )
    task = dict(tasks["actions"])
    task["val"] = task["val"] | {"labels": str(tmp_path / "label2id.json")}
    with pytest.raises(ValueError, match="label sets of train .* and val .* differ"):
        train(config(tasks={"actions": task}, output=str(tmp_path / "other")), progress=False)


def test_validation_may_lack_a_data_set_of_training(config, tasks):
    task = dict(tasks["actions"])
    parts = [
        {"reader": "kinetics", **task["train"]},
        {"reader": "kinetics", **task["train"], "name": "Other"},
    ]
    task |= {"reader": "union", "train": {"parts": parts}, "val": {"parts": parts[1:]}}
    output = train(config(updates=1, tasks={"actions": task}), progress=False)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["clips"]["actions"] == 32 and "top1" in metrics["zero_shot"]["actions"]
