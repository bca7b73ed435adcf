"""Tokens of frozen towers on disk: as computed anew, once each, refused where they do not fit."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from backbone.video import VideoWriter
from integrations.videoqa import tokens as kept
from integrations.videoqa.data import DataError, Encoded, Source, Unreadable, read_records
from integrations.videoqa.tokens import encode_visuals, lacking, read_tokens, write_tokens
from integrations.videoqa.train import StageConfig, run_stage


@pytest.fixture
def model(fresh):
    return fresh(num_frames=3, image_layout="square")


@pytest.fixture
def data(tmp_path):
    """Two videos, an image and a broken file, each with a question."""
    rng = np.random.default_rng(0)
    for name in ("a.mp4", "b.mp4"):
        with VideoWriter(tmp_path / name, fps=4) as writer:
            for image in rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8):
                writer.write(image)
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "c.png")
    (tmp_path / "d.mp4").write_bytes(b"no video")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]
    rows = [
        {"id": name, "image" if name == "c.png" else "video": name, "conversations": turns}
        for name in ("a.mp4", "b.mp4", "c.png", "d.mp4", "a.mp4")
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return Source(tmp_path / "data.json")


@pytest.fixture
def records(data):
    return read_records([data])


def same(found, expected):
    assert found.keys() == expected.keys()
    for path, item in expected.items():
        if isinstance(item, Unreadable):
            assert found[path] == item
        else:
            assert torch.equal(found[path].tokens, item.tokens) and found[path].size == item.size


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_read_is_what_was_encoded(model, records, tmp_path, processes, monkeypatch):
    monkeypatch.setattr(kept, "PART", 2)
    for rank in range(processes):
        write_tokens(model, records, tmp_path / "kept", (rank, processes))
    expected = encode_visuals(model, records)
    assert sum(isinstance(item, Encoded) for item in expected.values()) == 3
    same(read_tokens(model, records, tmp_path / "kept"), expected)
    assert not lacking(records, tmp_path / "kept")


def test_only_what_is_missing_is_encoded(model, records, tmp_path):
    write_tokens(model, records[:1], tmp_path / "kept")
    assert [path.name for _, path in lacking(records, tmp_path / "kept")] == [
        "b.mp4", "c.png", "d.mp4",
    ]  # fmt: skip
    with pytest.raises(DataError, match="no tokens of 3 visuals, such as .*b.mp4"):
        read_tokens(model, records, tmp_path / "kept")
    before = model.encoded_frames
    write_tokens(model, records, tmp_path / "kept")
    assert model.encoded_frames == before + 3 + 1
    write_tokens(model, records, tmp_path / "kept")
    assert model.encoded_frames == before + 3 + 1


def test_tokens_made_otherwise_are_refused(model, records, tmp_path):
    with pytest.raises(DataError, match="holds no tokens"):
        read_tokens(model, records, tmp_path / "kept")
    write_tokens(model, records, tmp_path / "kept")
    model.config.num_frames = 4
    with pytest.raises(DataError, match="vision is .*'num_frames': 3.* there and .*: 4"):
        read_tokens(model, records, tmp_path / "kept")


def test_a_stage_trains_on_them_alike(fresh, data, tmp_path):
    stage = StageConfig(
        batch_size=2, per_device=2, updates=2, image_layout="square", num_frames=3,
        store_features=True, gradient_checkpointing=False, bf16=False, template="qwen_1_5",
    )  # fmt: skip
    states = []
    for folder in (None, tmp_path / "kept"):
        model = fresh(num_frames=3, image_layout="square")
        if folder is not None:
            write_tokens(model, read_records([data]), folder)
        report = run_stage(model, stage, [data], tmp_path / f"out{folder is None}",
                           trainer={"use_cpu": True}, tokens=folder)  # fmt: skip
        assert list(report["unreadable"]) == [str(tmp_path / "d.mp4")]
        states.append(model.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
