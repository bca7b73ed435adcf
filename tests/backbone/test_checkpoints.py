"""Reading and writing checkpoints: own layout, released layout, SigLIP; and wrong files."""

import argparse
import json

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForVideoClassification, SiglipVisionModel

from backbone import (
    CheckpointError,
    StreamformerConfig,
    StreamformerForVideoClassification,
    StreamformerModel,
    lift_siglip,
    load_released,
)
from backbone.checkpoints import load_siglip

CLIP = (1, 9, 3, 16, 16)


def same(model, other, size=None):
    """Whether two models give the same numbers; where weights lie in memory may cost a bit."""
    clip = torch.randn(size or CLIP)
    with torch.no_grad():
        one, two = model(clip).pooler_output, other(clip).pooler_output
    return torch.allclose(one, two, rtol=0, atol=1e-6)


def edit_weights(folder, change):
    """Rewrite a folder's weights after ``change(state)``."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)
    return folder


def without(key):
    return lambda state: {k: v for k, v in state.items() if k != key}


def with_extra(key):
    return lambda state: state | {key: torch.zeros(2)}


def reshaped(key):
    return lambda state: state | {key: torch.zeros(3, 5)}


def not_finite(key):
    return lambda state: state | {key: torch.full_like(state[key], torch.nan)}


# -- own layout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [
    {}, {"lora_rank": 4}, {"temporal_attention": False}, {"window": 3, "causal": False},
])  # fmt: skip
def test_round_trip(make_model, tmp_path, fields):
    model = make_model(**fields, temporal_positions="cycle")
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    for loaded in (
        StreamformerModel.from_pretrained(tmp_path),
        StreamformerModel.from_pretrained(
            str(tmp_path), config=AutoConfig.from_pretrained(tmp_path)
        ),
        AutoModel.from_pretrained(tmp_path),
    ):
        assert type(loaded) is StreamformerModel
        assert not loaded.training
        assert same(loaded, model)
        frozen = {name for name, weight in loaded.named_parameters() if not weight.requires_grad}
        assert frozen == {name for name in loaded.state_dict() if ".base_layer." in name}
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is StreamformerConfig
    for name, value in {**fields, "temporal_positions": "cycle"}.items():
        assert getattr(config, name) == value


def test_fields_can_be_changed_while_loading(make_model, tmp_path):
    make_model(window=3).save_pretrained(tmp_path)
    for load in (StreamformerModel.from_pretrained, AutoModel.from_pretrained):
        model = load(tmp_path, window=7, temporal_positions="reset", attn_implementation="eager")
        assert (model.config.window, model.config.temporal_positions) == (7, "reset")
        assert model.config._attn_implementation == "eager"
    model, info = StreamformerModel.from_pretrained(tmp_path, output_loading_info=True)
    assert model.config.window == 3
    assert not info["missing_keys"]


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"dtype": "bfloat16"}])
def test_types(make_model, released, tmp_path, options):
    make_model().save_pretrained(tmp_path / "own")
    for folder in (tmp_path / "own", released()):
        model = StreamformerModel.from_pretrained(folder, **options, device_map="cpu")
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        plain = StreamformerModel.from_pretrained(folder)
        assert plain.dtype == torch.float32
    half = released("causal", lambda s: {k: v.half() for k, v in s.items()}, folder="half")
    assert StreamformerModel.from_pretrained(half).dtype == torch.float32
    assert StreamformerModel.from_pretrained(half, torch_dtype="auto").dtype == torch.float16


def test_adapters_can_be_added_while_loading(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    for load in (StreamformerModel.from_pretrained, AutoModel.from_pretrained):
        loaded = load(tmp_path, lora_rank=4)
        assert loaded.config.lora_rank == 4
        assert same(loaded, model)  # B is zero
        up = [w for name, w in loaded.named_parameters() if ".lora_B." in name]
        assert len(up) == 4
        assert not any(weight.any() for weight in up)
        frozen = [name for name, w in loaded.named_parameters() if not w.requires_grad]
        assert len(frozen) == 8
        assert all(".base_layer." in name for name in frozen)
    config = AutoConfig.from_pretrained(tmp_path, lora_rank=2)
    assert StreamformerModel.from_pretrained(tmp_path, config=config).config.lora_rank == 2
    assert config.lora_rank == 2  # the caller's own is left alone
    loaded.save_pretrained(tmp_path / "again")
    assert same(StreamformerModel.from_pretrained(tmp_path / "again"), model)


def test_adapters_can_be_merged_while_loading(make_model, tmp_path, difference):
    model = make_model(lora_rank=4)
    model.save_pretrained(tmp_path)
    merged = StreamformerModel.from_pretrained(tmp_path, lora_rank=0)
    assert merged.config.lora_rank == 0
    assert not any("lora" in name or "base_layer" in name for name in merged.state_dict())
    clip = torch.randn(CLIP)
    assert difference(merged(clip).pooler_output, model(clip).pooler_output) < 1e-5
    with pytest.raises(ValueError, match="lora_rank=8: the checkpoint's adapters have rank 4"):
        StreamformerModel.from_pretrained(tmp_path, lora_rank=8)


@pytest.mark.parametrize("layout", ["own", "released"])
def test_time_table_is_resized_while_loading(make_model, released, tmp_path, layout, caplog):
    make_model().save_pretrained(tmp_path / "own")
    folder = released() if layout == "released" else tmp_path / "own"
    before = StreamformerModel.from_pretrained(folder).embeddings.time_embedding
    model = StreamformerModel.from_pretrained(folder, num_frames=11)
    after = model.embeddings.time_embedding
    assert "time table resized from 6 to 11 frames" in caplog.text
    assert model.config.num_frames == after.shape[1] == 11
    torch.testing.assert_close(after[:, ::2], before)  # every second row is an old one
    torch.testing.assert_close(after[:, 1], (before[:, 0] + before[:, 1]) / 2)
    model.save_pretrained(tmp_path / "longer")
    assert StreamformerModel.from_pretrained(tmp_path / "longer").config.num_frames == 11


def test_a_hub_repository_in_pieces(make_model, tmp_path):
    model = make_model(lora_rank=4)
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert same(StreamformerModel.from_pretrained(tmp_path), model)


def test_can_be_pushed_to_the_hub(make_model):
    with pytest.raises(Exception, match=r"(?i)offline"):
        make_model().push_to_hub("somebody/streamformer")


def test_classifier_round_trip(make_model, tmp_path):
    config = make_model().config
    config.num_labels = 5
    model = StreamformerForVideoClassification(config).eval()
    model.save_pretrained(tmp_path)
    clip = torch.randn(CLIP)
    for kind in (StreamformerForVideoClassification, AutoModelForVideoClassification):
        loaded = kind.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(clip).logits, model(clip).logits)
    assert same(StreamformerModel.from_pretrained(tmp_path), model.streamformer)
    model.streamformer.save_pretrained(tmp_path / "encoder")
    fresh = StreamformerForVideoClassification.from_pretrained(tmp_path / "encoder", num_labels=3)
    assert fresh.classifier.weight.shape == (3, 16)
    assert fresh.classifier.weight.abs().sum() > 0
    assert same(fresh.streamformer, model.streamformer)
    adapted = StreamformerForVideoClassification.from_pretrained(tmp_path, lora_rank=4)
    torch.testing.assert_close(adapted(clip).logits, model(clip).logits)


KEY = "layers.1.mlp.fc1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(KEY), f"1 missing: {KEY}$"),
        (with_extra("layers.9.new"), "1 unexpected: layers.9.new$"),
        (reshaped(KEY), rf"1 misshapen: {KEY} \(3, 5\) instead of \(32, 16\)$"),
        (not_finite(KEY), f"values that are not finite, in {KEY}$"),
    ],
)
def test_own_layout_that_does_not_fit(make_model, tmp_path, change, message):
    make_model().save_pretrained(tmp_path)
    edit_weights(tmp_path, change)
    with pytest.raises(CheckpointError, match=message) as error:
        StreamformerModel.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_own_layout_truncated(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cannot be read.*truncated") as error:
        StreamformerModel.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


# -- released layout ------------------------------------------------------------------------------


def prefixed(state):
    return {f"timesformer.{key}": value for key, value in state.items()}


def with_strays(state):
    """A stray mask of another size, and what pretraining keeps beside the encoder."""
    strays = {
        "encoder.layer.0.temporal_attention.attention.mask": torch.ones(9, 9),
        "text_encoder.embedding.weight": torch.zeros(2, 2),
        "logit_scale": torch.zeros(()),
        "logit_bias": torch.zeros(()),
        "task_heads.head.weight": torch.zeros(2, 2),
        "classifier.weight": torch.zeros(2, 32),
        "fc_norm.bias": torch.zeros(32),
    }
    return prefixed(state) | strays


@pytest.mark.parametrize("weights", ["causal", "lora"])
@pytest.mark.parametrize("change", [dict, prefixed, with_strays])
def test_released_variants(released, weights, change):
    expected = StreamformerModel.from_pretrained(released(weights, folder="plain"))
    model = load_released(released(weights, change))
    assert model.config.lora_rank == (32 if weights == "lora" else 0)
    assert same(model, expected, (1, 7, 3, 32, 32))
    assert not model.training


def test_released_masks_are_not_needed(released):
    def without_masks(state):
        return {key: value for key, value in state.items() if not key.endswith(".mask")}

    expected = load_released(released(folder="plain"))
    assert same(load_released(released("causal", without_masks)), expected, (1, 7, 3, 32, 32))


def test_released_config(released):
    model = load_released(released(clip_config={"free": "form"}, image_size=[32, 32]))
    config = model.config
    assert (config.image_size, config.hidden_act, config.causal) == (32, "gelu", True)
    assert not load_released(released(enable_causal_temporal=False)).config.causal
    assert load_released(released(), window=5).config.window == 5
    folder = released()
    fields = json.loads((folder / "config.json").read_text())
    del fields["enable_causal_temporal"], fields["hidden_act"]
    (folder / "config.json").write_text(json.dumps(fields))
    silent = load_released(folder).config  # the defaults of the released code, not ours
    assert (silent.causal, silent.hidden_act) == (False, "gelu")
    with pytest.raises(CheckpointError, match="attention_type='space_only'; only 'divided"):
        load_released(released(attention_type="space_only"))


def test_released_adapters_added_and_merged(released, difference):
    plain, adapted = released("causal", folder="plain"), released("lora", folder="lora")
    added = StreamformerModel.from_pretrained(plain, lora_rank=8)
    assert added.config.lora_rank == 8
    assert same(added, load_released(plain), (1, 7, 3, 32, 32))
    merged, clip = load_released(adapted, lora_rank=0), torch.randn(1, 7, 3, 32, 32)
    assert not any("lora" in name for name in merged.state_dict())
    expected = load_released(adapted)(clip).pooler_output
    assert difference(merged(clip).pooler_output, expected) < 1e-5
    with pytest.raises(ValueError, match="lora_rank=4: the checkpoint's adapters have rank 32"):
        load_released(adapted, lora_rank=4)


def test_released_saved_in_our_layout(released, tmp_path):
    model = load_released(released("lora"))
    model.save_pretrained(tmp_path / "ours")
    assert same(AutoModel.from_pretrained(tmp_path / "ours"), model, (1, 7, 3, 32, 32))


@pytest.mark.parametrize("weights", ["causal", "lora"])
def test_training_checkpoint(released, tmp_path, weights):
    expected = load_released(released(weights))
    state = prefixed(load_file(released(weights) / "model.safetensors"))
    checkpoint = {
        "model": with_strays(load_file(released(weights) / "model.safetensors")) | state,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 3,
        "scaler": {"scale": 1024.0},
        "args": argparse.Namespace(lr=0.1, data="somewhere"),
    }
    path = tmp_path / "checkpoint.pth"
    torch.save(checkpoint, path)
    fields = {"num_attention_heads": 4}  # which no shape tells
    for load in (load_released, StreamformerModel.from_pretrained):
        model = load(path, **fields)
        assert model.config.num_hidden_layers == 3
        assert same(model, expected, (1, 7, 3, 32, 32))
    torch.save(state, tmp_path / "bare.bin")
    assert same(load_released(tmp_path / "bare.bin", **fields), expected, (1, 7, 3, 32, 32))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_released_in_pieces(released, kind):
    folder = released()
    expected = load_released(folder)
    state = load_file(folder / "model.safetensors")
    stem = "model" if kind == "safetensors" else "pytorch_model"
    pattern = f"{stem}{{suffix}}.{kind}"
    split = split_torch_state_dict_into_shards(
        state, filename_pattern=pattern, max_shard_size=20_000
    )
    (folder / "model.safetensors").unlink()
    for name, keys in split.filename_to_tensors.items():
        write = save_file if kind == "safetensors" else torch.save
        write({key: state[key] for key in keys}, folder / name)
    index = folder / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"weight_map": split.tensor_to_filename}))
    assert len(split.filename_to_tensors) > 2
    assert same(load_released(folder), expected, (1, 7, 3, 32, 32))
    lost = folder / sorted(split.filename_to_tensors)[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"{lost.name}, named by {index.name}, is not there"):
        load_released(folder)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="is no index of weights"):
        load_released(folder)


THEIRS = "encoder.layer.1.intermediate.dense.weight"
LORA = "encoder.layer.2.attention.attention.qkv_lora_b.weight"


@pytest.mark.parametrize(
    ("weights", "change", "message"),
    [
        ("causal", without(THEIRS), f"1 missing: {KEY}$"),
        ("causal", without("embeddings.time_embeddings"), "or misshapen embeddings.time_embedding"),
        ("causal", reshaped("embeddings.patch_embeddings.projection.weight"),
         "missing or misshapen embeddings.patch_embedding.weight"),
        ("causal", with_extra("encoder.layer.1.new.weight"), "1 unexpected: encoder.layer.1.new"),
        ("causal", reshaped(THEIRS), rf"1 misshapen: {KEY} \(3, 5\) instead of \(64, 32\)"),
        ("causal", not_finite(THEIRS), f"values that are not finite, in {KEY}"),
        ("lora", without(LORA), "1 missing: layers.2.spatial_attention.qkv.lora_B"),
        ("lora", reshaped(LORA), r"qkv.lora_B.default.weight \(3, 5\) instead of \(96, 32\)"),
        ("causal", lambda s: {"blocks.0.weight": s[THEIRS]}, "foreign layout: it holds blocks.0"),
        ("causal", lambda s: s | prefixed({"head.probe": s["head.probe"].clone()}),
         "holds head.probe twice"),
    ],
)  # fmt: skip
def test_released_layout_that_does_not_fit(released, weights, change, message):
    folder = released(weights, change)
    for load in (load_released, StreamformerModel.from_pretrained):
        with pytest.raises(CheckpointError, match=message) as error:
            load(folder)
        assert str(folder) in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"<html>"])
def test_damaged_files(released, name, damage):
    folder = released()
    if name.endswith(".bin"):
        torch.save(load_file(folder / "model.safetensors"), folder / name)
        (folder / "model.safetensors").unlink()
    path = folder / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"bytes\) cannot be read as plain tensors") as error:
        load_released(folder)
    assert str(path) in str(error.value)


class Harmful:
    """A pickle that would run code."""

    def __reduce__(self):
        return print, ("run",)


def test_pickles_are_not_run(tmp_path, capsys):
    torch.save({"model": Harmful()}, tmp_path / "checkpoint.pth")
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
        load_released(tmp_path / "checkpoint.pth")
    assert capsys.readouterr().out == ""
    torch.save([1, 2], tmp_path / "checkpoint.pth")
    with pytest.raises(CheckpointError, match="holds no state dict: found list"):
        load_released(tmp_path / "checkpoint.pth")


def test_places_where_nothing_is(released, tmp_path):
    for source in (tmp_path / "nowhere", f"{tmp_path}/nowhere", "./nowhere", "runs/nowhere.pth"):
        for load in (load_released, StreamformerModel.from_pretrained, lift_siglip):
            with pytest.raises(CheckpointError, match="nowhere.*: no such file or folder"):
                load(source)
    with pytest.raises(OSError, match="nobody/nothing|offline|internet"):
        StreamformerModel.from_pretrained("nobody/nothing")
    folder = released()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights; expected model.safetensors"):
        load_released(folder)


def test_options_that_the_released_layout_does_not_take(released):
    folder = released()
    with pytest.raises(ValueError, match="device_map='auto': released checkpoints load onto one"):
        StreamformerModel.from_pretrained(folder, device_map="auto")
    with pytest.raises(TypeError, match="'widow' is no field of .*did you mean 'window'"):
        StreamformerModel.from_pretrained(folder, widow=3)
    with pytest.raises(TypeError, match="'config' is no field"):
        StreamformerModel.from_pretrained(folder, config=StreamformerConfig())
    model, info = StreamformerModel.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, device_map=torch.device("cpu")
    )
    assert isinstance(model, StreamformerModel)
    assert not any(info.values())


# -- SigLIP ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False], ids=["image and text", "image tower"])
@pytest.mark.parametrize("prefix", ["as saved", "vision_model."])
def test_lift_is_the_image_encoder(make_siglip, difference, whole, prefix):
    folder = make_siglip(whole)
    tower = SiglipVisionModel.from_pretrained(folder).eval()
    if prefix == "vision_model." and not whole:  # files of transformers 4
        edit_weights(folder, lambda s: {prefix + k.removeprefix(prefix): v for k, v in s.items()})
    model = lift_siglip(folder, num_frames=5, lora_rank=4, window=3, temporal_positions="reset")
    config = model.config
    assert (config.num_frames, config.lora_rank, config.window) == (5, 4, 3)
    assert config.temporal_positions == "reset"
    assert config.hidden_act == "gelu_pytorch_tanh"
    assert not model.training
    frames = torch.randn(7, 3, 16, 16)
    found, expected = model(frames[None]), tower(frames)
    assert difference(found.pooler_output[0], expected.pooler_output) < 1e-5
    assert difference(found.last_hidden_state[0], expected.last_hidden_state) < 1e-5
    torch.testing.assert_close(load_siglip(folder)(frames), expected)


def test_lift_leaves_time_shut_but_ready_to_learn(make_siglip):
    model = lift_siglip(make_siglip(), lora_rank=4)
    for layer in model.layers:
        assert layer.temporal_gate == 0
        assert layer.temporal_dense.weight.std() > 0.01
        assert layer.temporal_gate.requires_grad
    assert not model.embeddings.time_embedding.any()
    model.train()(torch.randn(1, 3, 3, 16, 16)).pooler_output.sum().backward()
    assert all(layer.temporal_gate.grad.abs() > 0 for layer in model.layers)


@pytest.mark.parametrize("num_frames", [1, 2, 7, 16])
def test_lift_with_a_head_start(make_siglip, num_frames):
    """Gates ajar; a time table of whole waves, alike from row to row as a circle is."""
    model = lift_siglip(make_siglip(), num_frames=num_frames, gate=0.3, time_scale=0.5)
    assert all(layer.temporal_gate == 0.3 for layer in model.layers)
    table = model.embeddings.time_embedding[0]
    assert table.shape == (num_frames, 16)
    torch.testing.assert_close(table.square().mean(1), torch.full((num_frames,), 0.25))
    likeness = table @ table.T
    shifted = table.roll(1, 0) @ table.roll(1, 0).T
    torch.testing.assert_close(likeness, shifted, rtol=0, atol=1e-5)
    if num_frames > 2:
        assert (likeness - likeness.diag().diag()).max() < likeness.diag().min() - 0.1
    frames = lift_siglip(make_siglip(), temporal_attention=False, gate=0.3, time_scale=0.5)
    assert frames.embeddings.time_embedding is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("encoder.layers.1.mlp.fc1.weight"), f"1 missing: {KEY}$"),
        (without("embeddings.position_embedding.weight"), "missing: embeddings.position_embedding"),
        (without("encoder.layers.0.self_attn.k_proj.bias"), "layers.0.spatial_attention.qkv.bias"),
        (with_extra("encoder.layers.1.new"), "1 unexpected: encoder.layers.1.new$"),
        (reshaped("encoder.layers.1.mlp.fc1.weight"), rf"{KEY} \(3, 5\) instead of \(32, 16\)"),
        (not_finite("head.probe"), "values that are not finite, in head.probe"),
        (lambda s: {"blocks.0.weight": torch.zeros(1)}, "foreign layout: it holds blocks.0.weight"),
    ],
)
def test_siglip_that_does_not_fit(make_siglip, change, message):
    folder = edit_weights(make_siglip(), change)
    with pytest.raises(CheckpointError, match=message) as error:
        lift_siglip(folder)
    assert str(folder) in str(error.value)
    with pytest.raises(CheckpointError) as error:
        load_siglip(folder)
    assert str(folder) in str(error.value)


def test_models_taken_for_one_another(make_siglip, make_model, released, tmp_path):
    make_model().save_pretrained(tmp_path / "own")
    for folder in (tmp_path / "own", released()):
        with pytest.raises(CheckpointError, match="needed is a SigLIP image tower"):
            lift_siglip(folder)
    with pytest.raises(
        CheckpointError, match="model_type is 'siglip_vision_model'; backbone.lift_"
    ):
        StreamformerModel.from_pretrained(make_siglip())
    with pytest.raises(CheckpointError, match="no StreamFormer: its model_type is 'bert'$"):
        (tmp_path / "bert").mkdir()
        (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
        StreamformerModel.from_pretrained(tmp_path / "bert")
    with pytest.raises(TypeError, match="'nun_frames' is no field.*did you mean 'num_frames'"):
        lift_siglip(make_siglip(), nun_frames=3)
