"""Tiny random models and checkpoints for the tests of the backbone.

Everything that starts at zero (gates, time table, LoRA, biases) is random here: a test of a model
whose temporal branch is shut proves nothing.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from backbone import StreamformerConfig, StreamformerModel

TINY = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_frames": 6,
    "temporal_positions": "hold",  # the default, reset, would end every window at six frames
}
VIDEO_ONLY = ("num_frames", "temporal_positions")


def _randomise(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            loud = "gate" in name or "embedding" in name
            scale = 0.5 if loud else weight.shape[-1:].numel() ** -0.5
            weight.normal_(std=1.0 if name.endswith("norm.weight") else scale)
            if name.endswith("gate"):
                weight.copy_(weight.sign() * (0.5 + weight.abs()))  # never shut


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads only wait for each other in models of this size, most of all on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_model() -> Callable[..., StreamformerModel]:
    """A tiny model in eval mode; keyword arguments are config fields."""

    def make(**fields: object) -> StreamformerModel:
        model = StreamformerModel(StreamformerConfig(**{**TINY, **fields})).eval()
        _randomise(model)
        return model

    return make


@pytest.fixture
def make_siglip(tmp_path: Path) -> Callable[..., Path]:
    """A folder with a tiny random SigLIP; ``whole`` for image and text, else the image tower."""

    def make(whole: bool = False, **fields: object) -> Path:
        vision = {key: value for key, value in TINY.items() if key not in VIDEO_ONLY} | fields
        if whole:
            text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                    "intermediate_size": 32, "vocab_size": 32, "projection_size": 16}  # fmt: skip
            model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        else:
            model = SiglipVisionModel(SiglipVisionConfig(**vision))
        _randomise(model)
        folder = tmp_path / ("siglip" if whole else "siglip-vision")
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def released(golden: Path, tmp_path: Path) -> Callable[..., Path]:
    """A folder in the released layout, made of golden weights; ``edit`` changes them first."""
    index = json.loads((golden / "backbone" / "index.json").read_text())

    def make(
        weights: str = "causal",
        edit: Callable[[dict], dict] = lambda state: state,
        folder: str = "released",
        **config: object,
    ) -> Path:
        entry = index["weights"][weights]
        target = tmp_path / folder
        target.mkdir(exist_ok=True)
        state = edit(load_file(golden / "backbone" / entry["file"]))
        save_file(state, target / "model.safetensors")
        fields = {**entry["config"], "model_type": "timesformer", **config}
        (target / "config.json").write_text(json.dumps(fields))
        return target

    return make


@pytest.fixture
def difference() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Largest absolute difference, in units of the reference's largest value."""

    def measure(found: torch.Tensor, expected: torch.Tensor) -> float:
        assert found.shape == expected.shape, (found.shape, expected.shape)
        assert expected.isfinite().all()
        return ((found - expected).abs().max() / expected.abs().max()).item()

    return measure
