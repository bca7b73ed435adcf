"""LoRA: what it wraps and freezes, merging; and the folded model for inference."""

import copy
import pickle
import re

import peft
import pytest
import torch

from backbone import fuse, fusion
from backbone.lora import RANK, add_lora, lora_config, merge_lora

CLIP = (2, 9, 3, 16, 16)


def outputs(model, clip):
    with torch.no_grad():
        out = model(clip, output_hidden_states=True)
    return [out.last_hidden_state, out.pooler_output, *out.hidden_states]


def trainable(model):
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


# -- LoRA -----------------------------------------------------------------------------------------


def test_recipe(make_model):
    assert RANK == 32
    config = lora_config()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (32, 32, 0.0, "none")
    model = make_model(lora_rank=3)
    adapted = [n for n, m in model.named_modules() if hasattr(m, "lora_A")]
    assert adapted == [
        f"layers.{i}.spatial_attention.{part}" for i in (0, 1) for part in ("qkv", "out")
    ]
    for name in adapted:  # one pair for the joint projection; scale 1
        module = model.get_submodule(name)
        width = 48 if name.endswith("qkv") else 16
        assert module.lora_A["default"].weight.shape == (3, 16)
        assert module.lora_B["default"].weight.shape == (width, 3)
        assert module.scaling["default"] == 1.0


def test_adapters_start_without_effect_and_freeze_what_they_wrap(make_model):
    model = make_model()
    model.post_layernorm.requires_grad_(False)  # frozen before, frozen after
    before, expected = trainable(model), outputs(model, clip := torch.randn(CLIP))
    assert add_lora(model, 4) is model
    assert model.config.lora_rank == 4
    for found, wanted in zip(outputs(model, clip), expected, strict=True):
        assert torch.equal(found, wanted)
    wrapped = {n for n in before if re.search(r"spatial_attention\.(qkv|out)\.", n)}
    adapters = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(wrapped) == len(adapters) == 8
    assert trainable(model) == before - wrapped | adapters
    assert 0.015 < model.layers[0].spatial_attention.qkv.lora_A["default"].weight.std() < 0.025
    with pytest.raises(ValueError, match=r"has LoRA adapters already.*merge_lora"):
        add_lora(model, 4)
    merge_lora(model)
    assert trainable(model) == before  # a merged model trains as one without adapters
    add_lora(model, 2)


def test_adapters_learn_and_nothing_else_in_spatial_attention(make_model):
    model = add_lora(make_model(), 4).train()
    model(torch.randn(CLIP)).pooler_output.square().mean().backward()
    for name, weight in model.named_parameters():
        wrapped = ".base_layer." in name
        silent = "lora_A" in name  # as long as B is zero
        assert (weight.grad is None) == wrapped, name
        assert wrapped or silent or weight.grad.abs().sum() > 0, name


def test_merge(make_model, difference):
    model = make_model(lora_rank=4)
    merged = merge_lora(copy.deepcopy(model))
    assert merged.config.lora_rank == 0
    assert not hasattr(merged, "peft_config")
    plain = make_model()
    assert list(merged.state_dict()) == list(plain.state_dict())
    clip = torch.randn(CLIP)
    assert max(map(difference, outputs(merged, clip), outputs(model, clip))) < 1e-5
    assert model.config.lora_rank == 4  # the original is untouched
    assert any("lora_" in name for name in model.state_dict())


def test_merge_agrees_with_peft(make_model):
    model = make_model(lora_rank=4)
    module = model.layers[0].spatial_attention.qkv
    assert isinstance(module, peft.tuners.lora.Linear)
    theirs = copy.deepcopy(module)
    theirs.merge(safe_merge=True)
    ours = merge_lora(copy.deepcopy(model)).layers[0].spatial_attention.qkv
    torch.testing.assert_close(ours.weight, theirs.get_base_layer().weight)


def test_merge_in_half_precision_rounds_once(make_model):
    model = make_model(lora_rank=4)
    single = merge_lora(copy.deepcopy(model.bfloat16()).float())
    half = merge_lora(model)
    for name, weight in half.state_dict().items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, single.state_dict()[name].bfloat16()), name


def test_merge_refuses_what_is_not_finite(make_model):
    model = make_model(lora_rank=4)
    with torch.no_grad():
        model.layers[1].spatial_attention.out.lora_B["default"].weight[0, 0] = torch.inf
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"layers.1.spatial_attention.out merges.*not merged"):
        merge_lora(model)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


# -- fusion ---------------------------------------------------------------------------------------


@pytest.fixture(params=["plain", "onednn"])
def _kernels(request, monkeypatch):
    """Models of this size would never meet oneDNN."""
    if request.param == "onednn":
        if not torch.backends.mkldnn.is_available():
            pytest.skip("this PyTorch has no oneDNN")
        monkeypatch.setattr(fusion, "_LEAST_WORK", 0)


@pytest.mark.parametrize("fields", [
    {"lora_rank": 4}, {"window": 3}, {"temporal_attention": False, "lora_rank": 4},
    {"causal": False}, {"qkv_bias": False, "lora_rank": 4}, {"hidden_act": "gelu"},
    {"hidden_act": "relu"},
])  # fmt: skip
@pytest.mark.usefixtures("_kernels")
def test_fused_gives_the_same_numbers(make_model, difference, fields):
    model = make_model(**fields)
    fused, clip = fuse(model.train()), torch.randn(CLIP)
    model.eval()
    assert max(map(difference, outputs(fused, clip), outputs(model, clip))) < 1e-5
    again = fuse(fused)
    assert all(map(torch.equal, outputs(again, clip), outputs(fused, clip)))


@pytest.mark.usefixtures("_kernels")
def test_fused_lets_gradients_and_autocast_through(make_model, difference):
    model, clip = make_model(), torch.randn(CLIP, requires_grad=True)
    fused = fuse(model)
    wanted, found = (torch.autograd.grad(m(clip).pooler_output.sum(), clip)[0]
                     for m in (model, fused))  # fmt: skip
    assert difference(found, wanted) < 1e-5
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert difference(fused(clip).pooler_output.float(), outputs(model, clip)[1]) < 0.1


def test_large_products_go_to_onednn(difference):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    linear, tokens = torch.nn.Linear(256, 1024).requires_grad_(False), torch.randn(1, 130, 256)
    folded = fusion.FoldedLinear(linear, torch.nn.GELU("tanh"), "gelu_pytorch_tanh")
    with torch.profiler.profile() as profile:
        found = folded(tokens)
    assert "mkldnn::_linear_pointwise" in {event.key for event in profile.key_averages()}
    expected = torch.nn.functional.gelu(linear(tokens), approximate="tanh")
    assert difference(found, expected) < 1e-5


@pytest.mark.usefixtures("_kernels")
def test_fused_streams(make_model, difference):
    model = make_model(window=3, lora_rank=4)
    fused, clip, memory, found = fuse(model), torch.randn(CLIP), None, []
    for chunk in clip.split([1, 5, 1, 2], dim=1):
        out = fused(chunk, past_key_values=memory, use_cache=True)
        memory = out.past_key_values
        found.append(out.pooler_output)
    assert difference(torch.cat(found, dim=1), outputs(model, clip)[1]) < 1e-5


def test_fused_is_for_inference(make_model):
    model = make_model(lora_rank=4)
    fused = fuse(model)
    assert not fused.training
    assert trainable(fused) == set()
    names = list(fused.state_dict())
    assert not any("lora" in name or "temporal_dense" in name or "gate" in name for name in names)
    assert sum(w.numel() for w in fused.parameters()) < sum(w.numel() for w in model.parameters())
    assert model.layers[0].temporal_gate.requires_grad  # the original is untouched
    assert model.config.lora_rank == 4


def test_fused_refuses_to_be_saved(make_model, tmp_path):
    fused = fuse(make_model())
    copies = fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), fuse(fused)
    for model in copies:
        for save in (model.save_pretrained, model.push_to_hub):
            with pytest.raises(ValueError, match="for inference only; save the model that it was"):
                save(tmp_path / "fused")
    assert not (tmp_path / "fused").exists()
