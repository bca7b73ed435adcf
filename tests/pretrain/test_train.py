"""The training job on a handful of tiny clips."""

import json

import pytest
import torch
from safetensors.torch import load_file

from backbone import StreamformerModel, build_encoder
from pretrain import PretrainConfig, train


@pytest.fixture
def config(siglip, tasks, tmp_path):
    """Config of a small run, changed by keyword."""

    def make(updates=6, **changes):
        values = {
            "output": str(tmp_path / "run"),
            "tasks": tasks,
            "model": {"siglip": str(siglip), "num_frames": 8},
            "optim": {"updates": updates, "lr": 1e-3},
            "batch_size": 4,
            "cache_in_memory": True,
            "checkpoint_every": 2,
            "log_every": 1,
            "device": "cpu",
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                values[section] = values[section] | {name: value}
            else:
                values[section] = value
        return PretrainConfig.from_dict(values)

    return make


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_learns_and_leaves_a_model_that_loads(config):
    output = train(config(updates=30, optim__lr=2e-3), progress=False)
    losses = [line["loss"] for line in log_of(output) if "loss" in line]
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
    assert "move left" not in (output / "README.md").read_text()
    assert "text" not in " ".join(load_file(output / "model.safetensors"))
