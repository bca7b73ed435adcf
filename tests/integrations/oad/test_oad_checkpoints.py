"""Released and own files of MAT weights: same outputs, and every misfit named."""

import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from backbone.checkpoints import CheckpointError
from integrations.oad.checkpoints import (
    infer_fields,
    load_head,
    load_released,
    read_notes,
    save_head,
)
from integrations.oad.mat import MatHead
from integrations.oad.mat_config import MatConfig
from integrations.oad.mat_layers import sinusoid_table

MODELS = ("visual_gelu", "twostream_relu", "nogroup_cls31", "ek100_heads")


@pytest.fixture
def released(tmp_path, golden_model):
    """``released("visual_gelu", edit)``: a file in the released layout, after ``edit(content)``."""

    def write(name, edit=lambda content: content):
        model = golden_model(name)
        state = dict(model.parameters)
        state["pos_encoding.pe"] = sinusoid_table(5000, model.config().dim)[:, None]
        optimiser = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 7e-5}]}
        content = {"epoch": 25, "model_state_dict": state, "optimizer_state_dict": optimiser}
        path = tmp_path / "epoch-25.pt"
        torch.save(edit(content), path)
        return path, model

    return write


def with_state(change):
    """An edit of the file that replaces its state dict by ``change(state)``."""

    def edit(content):
        return content | {"model_state_dict": change(content["model_state_dict"])}

    return edit


def without(key):
    return with_state(lambda state: {k: v for k, v in state.items() if k != key})


def holding(key, value):
    return with_state(lambda state: state | {key: value})


@pytest.mark.golden
@pytest.mark.parametrize("name", MODELS)
def test_a_released_checkpoint_gives_the_original_logits(released, name):
    path, model = released(name)
    head = load_released(path, model.config())
    t = model.tensors
    samples = model.info["cases"]["full"]["samples"]
    motion = t.get("in/motion")
    with torch.no_grad():
        output = head(t["in/visual"][samples], motion, t["in/memory_key_padding_mask"][samples])
    last = len(output.work) - 1
    stored = t[f"full/work_scores.{last}"]
    torch.testing.assert_close(output.work[-1], stored, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_read_off_the_shapes(golden_model, name):
    model = golden_model(name)
    config = model.config()
    found = infer_fields(model.parameters, name)
    assert {field: getattr(config, field) for field in found} == found
    assert {"memory_stages", "generator", "refinements", "motion_size", "num_verbs"} <= set(found)


def test_heads_without_a_part_are_recognised(make_head, small_config):
    for changes in ({"long_steps": 0}, {"future_tokens": 0, "anticipation_steps": 0}):
        config = replace(small_config, **changes)
        found = infer_fields(make_head(config).state_dict(), "here")
        assert {field: getattr(config, field) for field in found} == found
        assert set(changes) <= set(found)


def test_lengths_default_to_those_of_thumos(tmp_path):
    sizes = {"visual_size": 6, "num_classes": 22, "dim": 8, "feedforward": 8}
    head = MatHead(MatConfig(**sizes))
    path = tmp_path / "released.pt"
    torch.save({"epoch": 1, "model_state_dict": head.state_dict()}, path)
    assert load_released(path).config == MatConfig(**sizes)


def test_data_parallel_prefixes_and_bare_state_dicts_are_read(released):
    prefixed = with_state(lambda state: {f"module.{k}": v for k, v in state.items()})
    path, model = released("visual_gelu", prefixed)
    wanted = model.parameters["classifier.weight"]
    assert torch.equal(load_released(path, model.config()).classifier.weight, wanted)
    path, model = released("visual_gelu", lambda content: content["model_state_dict"])
    assert torch.equal(load_released(path, model.config()).classifier.weight, wanted)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("gen_layer.norm.bias"), "missing: gen_layer.norm.bias"),
        (holding("extra", torch.zeros(1)), "unexpected: extra"),
        (
            holding("classifier.bias", torch.zeros(7)),
            r"classifier.bias \(7,\) instead of \(22,\)",
        ),
        (
            holding("classifier.bias", torch.full((22,), torch.nan)),
            "not finite, in classifier.bias",
        ),
        (without("classifier.weight"), r"no MAT checkpoint: no \['classifier.weight'\]"),
        (holding("classifier.weight", torch.zeros(16)), r"weight is \(16,\), not a matrix"),
        (
            holding("pos_encoding.pe", torch.zeros(5000, 1, 16)),
            "pos_encoding.pe is not the sinusoid table of MAT, it differs by 1",
        ),
        (
            holding("pos_encoding.pe", torch.zeros(9, 1, 16)),
            r"pos_encoding.pe is \(9, 1, 16\), not \(at least 12, 1, 16\)",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_key(released, edit, message):
    path, model = released("visual_gelu", edit)
    with pytest.raises(CheckpointError, match=message) as refusal:
        load_released(path, model.config())
    assert str(path) in str(refusal.value)


def test_a_config_that_contradicts_the_file_is_refused_by_field(released):
    path, model = released("visual_gelu")
    config = replace(model.config(), feedforward=48, refinements=3)
    with pytest.raises(CheckpointError) as refusal:
        load_released(path, config)
    assert "feedforward is 48 in the config, 32 in the file" in str(refusal.value)
    assert "refinements is 3 in the config, 2 in the file" in str(refusal.value)


def test_a_checkpoint_that_cannot_have_default_lengths_asks_for_its_config(tmp_path, small_config):
    path = tmp_path / "released.pt"
    torch.save({"model_state_dict": MatHead(small_config).state_dict()}, path)
    with pytest.raises(CheckpointError, match="pass its config.*anticipation_steps=8 exceeds"):
        load_released(path)
    assert load_released(path, small_config).config == small_config


def test_damaged_and_foreign_files_are_refused(released, tmp_path):
    path, _ = released("visual_gelu")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=rf"{len(whole) // 2} bytes\) is damaged"):
        load_released(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="is damaged or holds more"):
        load_released(path)
    torch.save({"epoch": 1, "weights": {"a": 2}}, path)
    with pytest.raises(CheckpointError, match="'model_state_dict'; it holds epoch, weights"):
        load_released(path)
    torch.save({"model_state_dict": {"a": torch.zeros(2)}}, path)
    with pytest.raises(CheckpointError, match="no MAT checkpoint.*it holds a"):
        load_released(path)
    with pytest.raises(FileNotFoundError):
        load_released(tmp_path / "absent.pt")


class Payload:
    def __reduce__(self):
        return os.getpid, ()


def test_a_file_with_code_in_it_is_refused(tmp_path):
    path = tmp_path / "evil.pt"
    torch.save({"model_state_dict": {}, "extra": Payload()}, path)
    with pytest.raises(CheckpointError, match="more than plain tensors"):
        load_released(path)


# ----- own files


def test_an_own_file_gives_the_same_head_again(make_head, small_config, tmp_path):
    config = replace(small_config, motion_size=3, long_grouping="batch")
    head = make_head(config)
    path = tmp_path / "head.safetensors"
    save_head(head, path, notes={"ignore_index": 4, "classes": ["none", "jump"]})
    again = load_head(path)
    assert again.config == config
    assert not again.training
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in head.state_dict().items())
    assert read_notes(path) == {"ignore_index": 4, "classes": ["none", "jump"]}
    assert [p.name for p in tmp_path.iterdir()] == ["head.safetensors"]  # nothing left beside it


def test_own_files_that_do_not_fit_are_refused(make_head, small_config, tmp_path):
    path = tmp_path / "head.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="metadata says None; .* use load_released"):
        load_head(path)
    head = make_head(small_config)
    save_head(head, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_head(path)
    with pytest.raises(FileNotFoundError):
        read_notes(tmp_path / "absent.safetensors")
    head.config = replace(small_config, feedforward=20)
    save_head(head, path)
    with pytest.raises(CheckpointError, match=r"linear1.weight \(12, 8\) instead of \(20, 8\)"):
        load_head(path)
    path.write_bytes(path.read_bytes().replace(b"num_heads", b"num_headz"))
    with pytest.raises(CheckpointError, match="no key 'num_headz'.*did you mean 'num_heads'"):
        load_head(path)
