"""Models out of files: the released layout, our own, fresh ones; and files that do not fit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    Qwen2ForCausalLM,
)

from backbone import CheckpointError, VideoEncoder, build_encoder
from integrations.videoqa.checkpoints import (
    build_model,
    llava_config,
    load_model,
    load_projector,
    save_model,
)
from integrations.videoqa.configuration import StreamformerLlavaConfig


@pytest.fixture
def folder(qa_golden, tmp_path):
    """A golden checkpoint to be spoilt."""
    copied = tmp_path / "checkpoint"
    copied.mkdir()
    for file in (qa_golden / "tiny_qwen").iterdir():  # goldens may be write-protected
        shutil.copyfile(file, copied / file.name)
    return copied


def change(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in values.items():
        config.pop(name, None) if value is None else config.update({name: value})
    path.write_text(json.dumps(config))


def spoil(folder, edit):
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(
        {key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors"
    )


def logits(model, frames=None):
    frames = torch.arange(4 * 32 * 32 * 3).reshape(4, 32, 32, 3).remainder(251).byte()
    ids = torch.tensor([[257, 84, 198, -200, 198, 54, 258, 198, 257]]).clamp(max=98)
    with torch.no_grad():
        return model(ids, pixel_values=[model.preprocess(frames)]).logits


# -- LLaVA-NeXT's layout --------------------------------------------------------------------------


@pytest.mark.golden
def test_config_is_read_as_data(tiny):
    folder, model, description, _ = tiny
    raw = json.loads((folder / "config.json").read_text())
    config, text = model.config, model.config.text_config
    assert text.model_type == description["llm"]
    assert config.template == description["template"]
    assert (config.tower_layer, config.tower_post_norm) == (-1, True)
    assert config.grid_pinpoints == raw["image_grid_pinpoints"]
    assert text.rope_parameters["rope_theta"] == raw["rope_theta"]
    assert not [name for name in text.to_dict() if name.startswith(("mm_", "image_", "context_"))]
    assert model.tower.encoder.settings()["causal"] is True


@pytest.mark.golden
@pytest.mark.parametrize("saved_again", [False, True])
def test_round_trip_through_our_own_layout(tiny, tmp_path, saved_again):
    _, model, _, _ = tiny
    wanted = logits(model)
    save_model(model, tmp_path / "one")
    loaded, tokenizer = load_model(tmp_path / "one")
    if saved_again:
        save_model(loaded, tmp_path / "two")
        loaded, tokenizer = load_model(tmp_path / "two")
    assert torch.equal(logits(loaded), wanted)
    assert tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert loaded.stop_ids == model.stop_ids
    own = set(StreamformerLlavaConfig.__annotations__) - {"text_config", "tower_config"}
    assert {name: getattr(loaded.config, name) for name in own} == {
        name: getattr(model.config, name) for name in own
    }


def test_auto_classes_load_it(fresh, tmp_path):
    model = fresh()
    save_model(model, tmp_path)
    for auto in (AutoModel, AutoModelForImageTextToText):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is type(model)
        assert torch.equal(logits(loaded.eval()), logits(model))
    _, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("llm_config", ["qwen2", "llama"], indirect=True)
@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_survive(llm_config, fresh, tmp_path, tied):
    llm_config.tie_word_embeddings = tied
    model = fresh()
    llm = model.language_model
    assert (llm.lm_head.weight is llm.model.embed_tokens.weight) == tied
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)[0]
    llm = loaded.language_model
    assert (llm.lm_head.weight is llm.model.embed_tokens.weight) == tied
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.golden
def test_types_and_devices(qa_golden):
    model, _ = load_model(qa_golden / "tiny_qwen", dtype="bfloat16", tower_dtype=torch.float16)
    assert {weight.dtype for weight in model.language_model.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in model.tower.parameters()} == {torch.float16}
    assert load_model(qa_golden / "tiny_qwen")[0].language_model.dtype == torch.float32


@pytest.mark.golden
def test_lora_on_a_released_checkpoint(qa_golden, tmp_path):
    model, _ = load_model(qa_golden / "tiny_qwen", lora_rank=4)
    plain, _ = load_model(qa_golden / "tiny_qwen")
    assert_close(logits(model), logits(plain))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.normal_()
    save_model(model, tmp_path)
    loaded, _ = load_model(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.allclose(logits(loaded), logits(plain), atol=1e-3)


def test_adapters_are_added_and_merged_on_loading(fresh, tmp_path):
    plain = fresh()
    save_model(plain, tmp_path / "plain")
    model, _ = load_model(tmp_path / "plain", lora_rank=2, lora_alpha=6)
    assert torch.equal(logits(model), logits(plain))
    assert (model.config.lora_rank, model.config.lora_alpha) == (2, 6)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.normal_()
    save_model(model, tmp_path / "adapted")
    merged, _ = load_model(tmp_path / "adapted", lora_rank=0)
    assert_close(logits(merged), logits(model), atol=1e-4, rtol=1e-4)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    with pytest.raises(ValueError, match="rank 2 already"):
        load_model(tmp_path / "adapted", lora_rank=3)
    with pytest.raises(ValueError, match="nothing"):
        plain.add_lora(2, targets="nothing")
    assert plain.config.lora_rank == 0


# -- towers ---------------------------------------------------------------------------------------


@pytest.mark.golden
def test_the_tower_inside_wins_over_the_one_that_is_named(folder):
    change(folder, mm_vision_tower="/on/the/machine/that/trained/it")
    assert load_model(folder)[0].config.tower == f"streamformer:{folder}"


@pytest.mark.golden
def test_another_tower(folder, streamformer_folder, siglip_folder, tmp_path):
    inside = logits(load_model(folder)[0])
    other, _ = load_model(folder, tower=f"streamformer:{streamformer_folder}")
    assert not torch.allclose(logits(other), inside, atol=1e-3)
    image, _ = load_model(folder, tower=f"siglip:{siglip_folder}")
    assert (image.config.tower_layer, image.config.tower_post_norm) == (-2, False)
    equal, _ = load_model(
        folder, tower=f"siglip:{siglip_folder}", tower_layer=-1, tower_post_norm=True
    )
    assert not torch.allclose(logits(equal), logits(image), atol=1e-3)
    save_model(equal, tmp_path / "own")
    assert torch.equal(logits(load_model(tmp_path / "own")[0]), logits(equal))
    back, _ = load_model(tmp_path / "own", tower=f"streamformer:{streamformer_folder}")
    assert_close(logits(back), logits(other))


def without_tower(state):
    for key in [key for key in state if "vision_tower" in key]:
        del state[key]


@pytest.mark.golden
def test_a_checkpoint_without_a_tower(folder, streamformer_folder):
    spoil(folder, without_tower)
    with pytest.raises(CheckpointError, match="holds no tower.*'streamformer-tiny'.*tower="):
        load_model(folder)
    change(folder, mm_vision_tower=str(streamformer_folder))
    named, _ = load_model(folder)
    assert named.config.tower == f"streamformer:{streamformer_folder}"
    given, _ = load_model(folder, tower=f"streamformer:{streamformer_folder}")
    assert torch.equal(logits(named), logits(given))


@pytest.mark.golden
def test_a_tower_inside_that_does_not_say_how_it_is_built(folder, caplog):
    (folder / "vision_tower_config.json").unlink()
    with caplog.at_level("WARNING"):
        load_model(folder)
    assert "does not say how its tower is built" in caplog.text


@pytest.mark.golden
def test_a_tower_inside_of_another_kind(folder, siglip_folder):
    def swap(state):
        without_tower(state)
        for key, value in load_file(siglip_folder / "model.safetensors").items():
            state[f"model.vision_tower.vision_tower.vision_model.{key}"] = value

    spoil(folder, swap)
    with pytest.raises(CheckpointError, match="no StreamFormer.*tower=siglip:"):
        load_model(folder)
    load_model(folder, tower=f"siglip:{siglip_folder}")


@pytest.mark.golden
def test_window_and_positions_of_the_tower(qa_golden, fresh, tmp_path):
    asked = {"window": 3, "temporal_positions": "cycle"}
    model, _ = load_model(qa_golden / "tiny_qwen", **asked)
    assert model.tower.encoder.settings().items() >= asked.items()
    save_model(fresh(), tmp_path)
    assert load_model(tmp_path, **asked)[0].tower.encoder.settings().items() >= asked.items()


def test_an_encoder_that_is_kept_elsewhere(fresh, streamformer_folder, tmp_path):
    """An encoder given as such is not saved with the model, but found again by its name."""
    spec = f"streamformer:{streamformer_folder}"
    encoder = build_encoder(spec)
    model = fresh(tower=encoder)
    assert isinstance(model.tower.model, VideoEncoder) and model.config.tower == spec
    save_model(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert not [key for key in state if key.startswith("tower.")]
    assert_close(logits(load_model(tmp_path)[0]), logits(model))


def test_a_tower_of_another_width(fresh, tmp_path, streamformer_folder):
    model = fresh()
    encoder = build_encoder(f"streamformer:{streamformer_folder}")
    encoder.embed_dim = 24
    with pytest.raises(ValueError, match="width 24, the projector was made for 16"):
        model.attach_tower(encoder)


# -- files that do not fit ------------------------------------------------------------------------


def drop(key):
    return lambda state: state.pop(key)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (drop("model.layers.1.mlp.up_proj.weight"), "1 missing: model.layers.1.mlp.up_proj"),
        (drop("model.mm_projector.2.bias"), "1 missing: 2.bias"),
        (drop("model.image_newline"), r"image_newline has shape \(0,\)"),
        (lambda s: s.update({"model.extra": torch.zeros(1)}), "1 unexpected: model.extra"),
        (
            lambda s: s.update({"lm_head.weight": torch.zeros(9, 32)}),
            r"lm_head.weight \(9, 32\) instead of \(259, 32\)",
        ),
        (lambda s: s["model.norm.weight"].fill_(float("nan")), "not finite, in model.norm"),
        (
            drop("model.vision_tower.vision_tower.post_layernorm.bias"),
            "the tower inside: .*post_layernorm.bias",
        ),
    ],
)
def test_weights_that_do_not_cover_the_model(folder, edit, named):
    spoil(folder, edit)
    with pytest.raises(CheckpointError, match=named) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (drop("projector.0.weight"), "1 missing: projector.0.weight"),
        (drop("tower.model.post_layernorm.bias"), "1 missing: tower.model.post_layernorm.bias"),
        (lambda s: s.update({"extra": torch.zeros(1)}), "1 unexpected: extra"),
        (
            lambda s: s.update({"image_newline": torch.zeros(9)}),
            r"image_newline \(9,\) instead of \(32,\)",
        ),
    ],
)
def test_our_own_weights_that_do_not_cover_the_model(fresh, tmp_path, edit, named):
    save_model(fresh(), tmp_path)
    spoil(tmp_path, edit)
    with pytest.raises(CheckpointError, match=named):
        load_model(tmp_path)


@pytest.mark.golden
def test_foreign_folders(folder, tmp_path):
    change(folder, model_type="bert", architectures=["BertModel"])
    with pytest.raises(CheckpointError, match="'bert'.*BertModel"):
        load_model(folder)
    with pytest.raises(CheckpointError, match="'perceiver'"):
        llava_config({"model_type": "llava_qwen", "mm_resampler_type": "perceiver"}, "x")
    with pytest.raises(CheckpointError, match="config.json"):
        load_model(tmp_path)
    with pytest.raises(TypeError, match="'num_frame'.*did you mean 'num_frames'"):
        load_model(folder, num_frame=8)


@pytest.mark.golden
def test_the_class_is_chosen_by_config_not_by_folder(folder):
    renamed = folder.rename(folder.parent / "siglip-vicuna-clip-llava")
    model, _ = load_model(renamed)
    assert type(model.language_model) is Qwen2ForCausalLM
    assert model.tower.encoder.kind == "streamformer"


# -- fresh models ---------------------------------------------------------------------------------


def test_of_an_llm_on_disk(fresh, llm_config, streamformer_folder, qa_golden, tmp_path):
    """Its weights are taken, its sampling habits are not."""
    llm = Qwen2ForCausalLM(llm_config)
    llm.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=5.0, eos_token_id=[258, 256]
    )
    llm.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(qa_golden / "tiny_qwen", config=llm_config)
    tokenizer.save_pretrained(tmp_path)
    model, found = build_model(tmp_path, f"streamformer:{streamformer_folder}", lora_rank=2)
    assert found.get_vocab() == tokenizer.get_vocab()
    assert model.language_model.generation_config.do_sample in (None, False)
    assert model.stop_ids == [256, 258]
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert_close(model.eval()(ids).logits, llm.eval()(ids).logits)
    with pytest.raises(ValueError, match="no tokenizer; give tokenizer="):
        build_model(llm_config, f"streamformer:{streamformer_folder}")


@pytest.mark.parametrize("preset", ["last", "penultimate"])
def test_both_towers_at_the_same_layer(fresh, streamformer_folder, siglip_folder, preset):
    specs = [f"streamformer:{streamformer_folder}", f"siglip:{siglip_folder}"]
    models = [fresh(spec, tower_features=preset) for spec in specs]
    fields = [(m.config.tower_layer, m.config.tower_post_norm) for m in models]
    assert fields[0] == fields[1]
    differing = {
        name
        for name in models[0].config.to_dict()
        if models[0].config.to_dict()[name] != models[1].config.to_dict()[name]
    }
    assert differing == {"tower", "tower_config"}


@pytest.mark.parametrize("layout", ["theirs", "ours"])
def test_a_first_stages_projector(fresh, tmp_path, layout):
    trained, model = fresh(), fresh()
    with torch.no_grad():
        trained.projector[0].weight.normal_()
    if layout == "ours":
        save_model(trained, tmp_path)
        source = tmp_path
    else:
        source = tmp_path / "mm_projector.bin"
        state = trained.projector.state_dict()
        torch.save({f"model.mm_projector.{key}": value for key, value in state.items()}, source)
    load_projector(model, source)
    assert_close(model.projector.state_dict(), trained.projector.state_dict())
    with pytest.raises(CheckpointError, match="2 unexpected: 2.bias, 2.weight"):
        load_projector(fresh(projector_type="mlp1x_gelu", frame_token=True), source)
