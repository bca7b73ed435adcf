"""Segmentation through the whole of training and zero-shot evaluation, on tiny clips."""

import json
from pathlib import Path

import pytest
import torch

from backbone import build_encoder
from pretrain import train
from pretrain.build import build_dataset, build_objective
from pretrain.config import TaskConfig
from pretrain.evaluation import evaluate
from pretrain.model import normalize
from pretrain.text import load_siglip_text

SPATIAL = ("instance_segmentation", "referring_segmentation")
NAMES = {"instance_segmentation": {"mIoU"}, "referring_segmentation": {"J", "F", "J&F"}}


@pytest.fixture
def spatial(six_tasks, tmp_path):
    """The two segmentation tasks, measured on what they train on, with fields changed."""
    task = six_tasks["referring_segmentation"]
    rows = Path(task["train"]["annotations"]).read_text()
    words = ["first", "next", "middle", "other", "late", "very late", "last but one", "last"]
    for number, word in enumerate(words):  # the tiny tokenizer knows no digits
        rows = rows.replace(f"square {number}", f"the {word} square")
    (tmp_path / "expressions.csv").write_text(rows)

    def make(**changes):
        tasks = {name: six_tasks[name] for name in SPATIAL}
        arguments = task["train"] | {"annotations": str(tmp_path / "expressions.csv")}
        tasks["referring_segmentation"] = task | {"train": arguments}
        return {name: t | {"val": t["train"]} | changes for name, t in tasks.items()}

    return make


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_round_of_six_tasks_trains_and_is_measured(config, six_tasks, spatial, workers):
    tasks = six_tasks | spatial(augmentation="things")
    output = train(config(updates=2, tasks=tasks, num_workers=workers), progress=False)
    losses = [line["loss"] for line in log_of(output)]
    assert all(set(loss) == set(six_tasks) for loss in losses)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["failures"]["failed"] == {}
    for name, expected in NAMES.items():
        assert set(metrics["zero_shot"][name]) == expected
        assert all(0 <= value <= 100 for value in metrics["zero_shot"][name].values())


def test_patches_learn_what_is_where(config, spatial):
    """The square is the only bright thing: forty updates tell it from the noise around it."""
    tasks = {"referring_segmentation": spatial()["referring_segmentation"]}
    measured = []
    for updates in (1, 40):
        run = config(updates=updates, tasks=tasks, optim__lr=2e-3, eval_every=0,
                     output=f"{config().output}{updates}")  # fmt: skip
        output = train(run, progress=False)
        measured.append(json.loads((output / "metrics.json").read_text()))
    loss, zero_shot = ([m[key]["referring_segmentation"] for m in measured]
                       for key in ("loss", "zero_shot"))  # fmt: skip
    assert loss[1] < 0.85 * loss[0]
    assert zero_shot[1]["J"] > zero_shot[0]["J"] + 15


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_either_spatial_loss_goes_down(config, spatial, loss):
    tasks = spatial(spatial_loss=loss, val=None)
    released = {"model__shared_scale": False, "model__mask_duplicates": False}
    changes = released if loss == "softmax" else {}
    output = train(config(updates=12, tasks=tasks, optim__lr=2e-3, **changes), progress=False)
    losses = [line["loss"] for line in log_of(output)]
    for name in SPATIAL:
        assert sum(line[name] for line in losses[-3:]) < sum(line[name] for line in losses[:3])


@pytest.mark.parametrize("kind", ["siglip", "streamformer"])
def test_both_encoders_are_measured_alike(config, spatial, siglip, kind):
    source = siglip
    if kind == "streamformer":
        source = train(config(updates=1, tasks=spatial(val=None)), progress=False)
    encoder = build_encoder(f"{kind}:{source}")
    tower, *_ = load_siglip_text(siglip)
    for name, fields in spatial().items():
        task = TaskConfig(**fields)
        data = build_dataset(task, task.val, name=name, image_size=32)
        result = evaluate(
            lambda frames: encoder.encode(normalize(frames)), data,
            build_objective(task, data), tower, num_frames=8, batch_size=3,
        )  # fmt: skip
        assert set(result) == NAMES[name]
        assert torch.isfinite(torch.tensor(list(result.values()))).all()
