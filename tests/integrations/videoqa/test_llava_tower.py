"""Our towers in a package laid out as ``llava`` is, as far as towers are concerned."""

import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from integrations.videoqa.tower import VisionTower, load_tower_model

BUILDER = """
def build_vision_tower(vision_tower_cfg, **kwargs):
    return ("theirs", vision_tower_cfg.mm_vision_tower)
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The tower's module in a world where a package called ``llava`` is installed."""
    encoder = tmp_path / "llava" / "model" / "multimodal_encoder"
    encoder.mkdir(parents=True)
    for folder in (encoder, encoder.parent, encoder.parent.parent):
        (folder / "__init__.py").touch()
    (encoder / "builder.py").write_text(BUILDER)
    (encoder.parent / "llava_arch.py").write_text(
        "from .multimodal_encoder.builder import build_vision_tower\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("integrations.videoqa.llava_tower")
    for name in [name for name in sys.modules if name.partition(".")[0] == "llava"]:
        del sys.modules[name]
    del sys.modules["integrations.videoqa.llava_tower"]


def build(name, **kwargs):
    arch = importlib.import_module("llava.model.llava_arch")
    return arch.build_vision_tower(SimpleNamespace(mm_vision_tower=name), **kwargs)


def test_only_where_llava_is():
    with pytest.raises(ImportError, match="needs the llava package"):
        importlib.import_module("integrations.videoqa.llava_tower")


def test_ours_by_name_and_others_as_before(package, streamformer_folder):
    package.register(clip_frames=4)
    package.register(clip_frames=2)
    assert build("/models/siglip-so400m") == ("theirs", "/models/siglip-so400m")
    tower = build(f"streamformer:{streamformer_folder}")
    assert isinstance(tower, package.LlavaTower) and tower.clip_frames == 2
    assert "timesformer" in tower.config.model_type
    assert (tower.hidden_size, tower.num_patches, tower.num_patches_per_side) == (16, 16, 4)
    assert (tower.image_size, tower.dtype, tower.device.type) == (32, torch.float32, "cpu")
    assert tower.dummy_feature.shape == (1, 16)
    pixels = tower.image_processor.preprocess(np.zeros((9, 7, 3), np.uint8))["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)


def test_clips_are_recovered_from_a_joined_batch(package, streamformer_folder):
    package.register(clip_frames=3)
    spec = f"streamformer:{streamformer_folder}"
    tower, frames = build(spec), torch.randn(6, 3, 32, 32)
    eyes = VisionTower(load_tower_model(spec), spec)
    assert_close(tower(frames), eyes(frames.unflatten(0, (2, 3))).flatten(0, 1))
    assert_close(tower(frames.unflatten(0, (2, 3))), eyes(frames.unflatten(0, (2, 3))))
    with tower.clips([4, 1, 1]):
        joined = tower(frames)
    assert_close(joined[:4], eyes(frames[None, :4])[0])
    assert_close(joined[4:], eyes(frames[4:, None]).flatten(0, 1))
    assert_close(torch.cat(tower([frames[:4], frames[4:5], frames[5:]])), joined)
    with pytest.raises(ValueError, match="batch of 5 frames"):
        tower(frames[:5])


def test_clips_must_be_told(package, siglip_folder):
    package.register()
    with pytest.raises(ValueError, match="no word on its clips"):
        build(f"siglip:{siglip_folder}")(torch.zeros(4, 3, 32, 32))


def test_loading_may_wait(package, siglip_folder):
    package.register(clip_frames=1, features="last")
    tower = build(f"siglip:{siglip_folder}", delay_load=True)
    assert not tower.is_loaded
    tower.load_model(device_map="cpu")
    assert tower.is_loaded and tower(torch.zeros(2, 3, 32, 32)).shape == (2, 16, 16)


@pytest.mark.parametrize(
    ("settings", "value"), [({"features": "lst"}, "'lst'"), ({"clip_frames": 0}, "clip_frames=0")]
)
def test_refusals_name_the_value(package, settings, value):
    with pytest.raises(ValueError, match=value):
        package.register(**settings)
