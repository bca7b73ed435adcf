"""The golden miniature models, and a fresh one small enough to train."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from backbone import StreamformerConfig, StreamformerModel
from integrations.videoqa.checkpoints import build_model, load_model


@pytest.fixture(scope="session")
def qa_golden(golden) -> Path:
    return golden / "videoqa"


@pytest.fixture(scope="session")
def golden_file(qa_golden):
    """Description and tensors of one golden, by its stem."""

    def read(stem: str):
        description = json.loads((qa_golden / f"{stem}.json").read_text())
        tensors = qa_golden / f"{stem}.safetensors"
        return description, load_file(tensors) if tensors.is_file() else {}

    return read


@pytest.fixture(scope="session")
def golden_tokenizer(qa_golden):
    def read(name: str) -> PreTrainedTokenizerFast:
        special = {"char": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}}
        file = qa_golden / f"tokenizer_{name}" / "tokenizer.json"
        return PreTrainedTokenizerFast(tokenizer_file=str(file), **special.get(name, {}))

    return read


@pytest.fixture(params=["tiny_qwen", "tiny_vicuna"])
def tiny(request, qa_golden):
    """A golden checkpoint, loaded: its folder, model, description and tensors."""
    folder = qa_golden / request.param
    model, _ = load_model(folder)
    return (
        folder,
        model,
        json.loads((folder / "e2e.json").read_text()),
        load_file(folder / "e2e.safetensors"),
    )


@pytest.fixture(scope="session")
def streamformer_folder(tmp_path_factory) -> Path:
    """A StreamFormer of 32 px whose time is wide awake."""
    torch.manual_seed(0)
    model = StreamformerModel(
        StreamformerConfig(
            image_size=32,
            patch_size=8,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            num_frames=8,
            temporal_positions="cycle",
            window=4,
        )
    )
    with torch.no_grad():
        model.embeddings.time_embedding.normal_(std=0.5)
        for layer in model.layers:
            layer.temporal_gate.fill_(1.0)
    folder = tmp_path_factory.mktemp("streamformer")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    model = SiglipVisionModel(
        SiglipVisionConfig(
            image_size=32,
            patch_size=8,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
        )
    )
    folder = tmp_path_factory.mktemp("siglip")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def llm_config(request):
    """Config of a fresh LLM over the golden byte tokenizer."""
    fields = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eos_token_id": 258,
        "pad_token_id": 256,
        "max_position_embeddings": 2048,
    }
    return {"qwen2": Qwen2Config, "llama": LlamaConfig}[getattr(request, "param", "qwen2")](
        **fields
    )


@pytest.fixture
def fresh(streamformer_folder, qa_golden, llm_config):
    """Build a fresh model; keyword arguments are those of `build_model`."""
    tokenizer = AutoTokenizer.from_pretrained(qa_golden / "tiny_qwen", config=llm_config)

    def build(tower: str = f"streamformer:{streamformer_folder}", **fields):
        torch.manual_seed(3)
        fields = {"grid_pinpoints": [[32, 64], [64, 32], [64, 64]], "num_frames": 4, **fields}
        model, _ = build_model(llm_config, tower, tokenizer, **fields)
        with torch.no_grad():  # 0.02 would leave every answer to a coin
            for weight in model.language_model.parameters():
                weight.mul_(10) if weight.ndim == 2 else None
        return model.eval()

    return build


@pytest.fixture
def video() -> torch.Tensor:
    """Frames (16, 40, 48, 3) uint8, none like another."""
    return torch.randint(0, 256, (16, 40, 48, 3), dtype=torch.uint8)
