"""The tower: which layer, which norm, the same for every encoder."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from backbone import FrameFeatures, VideoEncoder, build_encoder
from integrations.videoqa.configuration import tower_preset
from integrations.videoqa.tower import VisionTower, describe, load_tower_model


def tower(spec, preset, **fields):
    chosen = tower_preset(preset, spec.partition(":")[0])
    layer, norm = chosen["tower_layer"], chosen["tower_post_norm"]
    return VisionTower(load_tower_model(spec), spec, layer, norm, **fields)


@pytest.mark.golden
def test_siglip_at_both_layers(golden_file, tmp_path):
    description, tensors = golden_file("siglip_tower")
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if "weights." in k}
    save_file(weights, tmp_path / "model.safetensors")
    config = {"model_type": "siglip_vision_model", **description["config"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec, clips = f"siglip:{tmp_path}", tensors["pixel_values"][None]
    wanted = {
        "released": "tower_features",
        "penultimate": "tower_features",
        "last": "last_hidden_state_with_post_layernorm",
    }
    for preset, name in wanted.items():
        assert_close(tower(spec, preset)(clips)[0], tensors[name], atol=1e-5, rtol=1e-4)


@pytest.fixture(params=["streamformer", "siglip"])
def spec(request):
    return f"{request.param}:{request.getfixturevalue(request.param + '_folder')}"


@pytest.mark.parametrize(("layer", "norm"), [(-1, True), (2, True), (-1, False), (1, False)])
def test_layers_count_alike_for_all(spec, layer, norm):
    clips = torch.randn(2, 3, 3, 32, 32)
    tokens = VisionTower(load_tower_model(spec), spec, layer, norm)(clips)
    features = build_encoder(spec).encode(clips, layers=(layer,))
    wanted = features.patch_tokens if norm else features.layers[layer]
    assert_close(tokens, wanted, atol=1e-5, rtol=1e-4)


def test_the_norm_may_follow_any_layer(spec):
    clips = torch.randn(1, 2, 3, 32, 32)
    bare = VisionTower(load_tower_model(spec), spec, -1, False)(clips)
    last = VisionTower(load_tower_model(spec), spec, -1, True)
    assert_close(last.encoder.model.post_layernorm(bare), last(clips))
    inner = VisionTower(load_tower_model(spec), spec, 1, True)(clips)
    assert_close(inner.mean(-1), torch.zeros(1, 2, 16), atol=1e-5, rtol=0)  # normed


def test_frame_tokens_stand_in_front(spec):
    clips = torch.randn(1, 2, 3, 32, 32)
    tokens = tower(spec, "last", frame_token=True)(clips)
    features = build_encoder(spec).encode(clips)
    assert_close(tokens[:, :, 0], features.frame_embeddings, atol=1e-5, rtol=1e-4)
    assert_close(tokens[:, :, 1:], features.patch_tokens, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("preset", ["last", "penultimate"])
def test_a_stream_is_its_clip(spec, preset):
    clips, eyes = torch.randn(1, 7, 3, 32, 32), tower(spec, preset, frame_token=True)
    stream = eyes.stream()
    pushed = [stream.push(clips[:, 0]), stream.push(clips[:, 1:4]), stream.push(clips[:, 4:])]
    assert_close(torch.cat(pushed, dim=1), eyes(clips), atol=1e-5, rtol=1e-4)


def test_a_tower_stays_frozen(spec):
    eyes = tower(spec, "last").train()
    assert not any(module.training for module in eyes.modules())
    assert not eyes(torch.randn(1, 1, 3, 32, 32, requires_grad=True)).requires_grad


class Grey(VideoEncoder):
    """An encoder of another kind, without a final norm."""

    kind, name, embed_dim, patch_size, image_size, num_layers = "grey", "grey:8", 16, 8, 32, 1

    def __init__(self):
        super().__init__()
        self.lift = torch.nn.Linear(3, 16)

    def settings(self):
        return {"kind": self.kind}

    def _features(self, clips, memory, layers):
        batch, count = clips.shape[:2]
        patches = torch.nn.functional.avg_pool2d(clips.flatten(0, 1), 8).flatten(2).mT
        tokens = self.lift(patches).unflatten(0, (batch, count))
        return FrameFeatures(tokens, tokens.mean(2), dict.fromkeys(layers, tokens))


def test_other_kinds_of_encoders():
    encoder = Grey()
    assert VisionTower(encoder, "grey:8")(torch.zeros(1, 2, 3, 32, 32)).shape == (1, 2, 16, 16)
    with pytest.raises(ValueError, match="grey:8.*no final norm.*tower_post_norm=False"):
        _ = VisionTower(encoder, "grey:8", 0, True).encoder
    VisionTower(encoder, "grey:8", 0, False)(torch.zeros(1, 1, 3, 32, 32))


def test_refusals_name_the_value(spec):
    with pytest.raises(ValueError, match="layer 7"):
        _ = VisionTower(load_tower_model(spec), spec, 7, False).encoder
    with pytest.raises(ValueError, match="no tower preset 'lst'"):
        tower_preset("lst", "siglip")
    with pytest.raises(ValueError, match="'released' knows streamformer, siglip, not 'clip'"):
        tower_preset("released", "clip")
    with pytest.raises(ValueError, match="no tower yet"):
        _ = VisionTower(None).encoder


def test_kinds_are_read_from_configs(spec, tmp_path):
    assert describe(spec.partition(":")[2]) == spec
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="'clip'"):
        describe(tmp_path)
