"""Parity with the original code's numbers, whole tensors, element by element.

2e-5 absolute, as the goldens suggest: values are of order 1, and two correct implementations in
float32 differ by about 3e-6.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from backbone import (
    StreamformerForVideoClassification,
    StreamformerModel,
    fuse,
    lift_siglip,
)

pytestmark = pytest.mark.golden
TOLERANCE = 2e-5
WHOLE_CLIPS = [
    "causal_full", "causal_short", "causal_long_7", "causal_long_9", "causal_res_48x48",
    "causal_res_48x32", "causal_res_32x56", "lora_full", "bidirectional_full",
    "bidirectional_short",
]  # fmt: skip


@pytest.fixture
def case(golden: Path):
    """Index entry and tensors of a case."""
    index = json.loads((golden / "backbone" / "index.json").read_text())

    def read(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
        entry = index["cases"][name]
        return entry, load_file(golden / "backbone" / entry["file"])

    read.names = set(index["cases"])
    return read


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_every_case_is_tested(case):
    assert case.names == {*WHOLE_CLIPS, "streaming", "siglip_mapping", "action_recognition"}


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", WHOLE_CLIPS)
def test_whole_clip(case, released, name, implementation, fused):
    entry, tensors = case(name)
    folder = released(entry["weights"], **entry.get("config_override", {}))
    # The longer cases hold the released stretch of the time table, which is not the default.
    model = StreamformerModel.from_pretrained(
        folder, temporal_positions="nearest", attn_implementation=implementation
    )
    assert model.config._attn_implementation == implementation
    assert model.config.lora_rank == (32 if entry["weights"] == "lora" else 0)
    model = fuse(model) if fused else model
    with torch.no_grad():
        out = model(tensors["pixel_values"], output_hidden_states=True)

    def expected(key: str) -> torch.Tensor | None:
        # Non-square frames: the numbers with the order of the position grid repaired.
        return tensors.get(f"{key}.corrected", tensors.get(key))

    close(out.last_hidden_state, expected("last_hidden_state"))
    close(out.pooler_output, expected("pooler_output"))
    compared = 0
    for number, state in enumerate(out.hidden_states):
        if expected(f"hidden_states.{number}") is not None:  # theirs is patch-major, (B, N*T, D)
            close(state.transpose(1, 2).flatten(1, 2), expected(f"hidden_states.{number}"))
            compared += 1
    assert compared == sum(key.startswith("hidden_states") for key in tensors)


@pytest.mark.parametrize("name", ["causal_long_7", "causal_long_9"])
def test_rows_of_the_released_stretch(case, name):
    from backbone import StreamformerConfig
    from backbone.modeling import time_rows

    entry, _ = case(name)
    rows = entry["time_embedding_index_per_frame"]
    config = StreamformerConfig(num_frames=6, temporal_positions="nearest")
    assert time_rows(config, torch.arange(len(rows)), clip_length=len(rows)).tolist() == rows


@pytest.mark.parametrize("name", ["causal_res_48x48", "causal_res_48x32", "causal_res_32x56"])
def test_position_table_at_other_resolutions(case, released, name):
    entry, tensors = case(name)
    model = StreamformerModel.from_pretrained(released(entry["weights"]))
    key = "interpolated_position_embeddings"
    expected = tensors.get(f"{key}.corrected", tensors[key])
    height, width = tensors["pixel_values"].shape[-2:]
    close(model.embeddings.positions(height // 8, width // 8), expected)


def test_lora_without_effect_is_the_base_model(case, released):
    entry, tensors = case("lora_full")

    def without_effect(state: dict) -> dict:
        return {k: v.zero_() if k.endswith("_lora_b.weight") else v for k, v in state.items()}

    model = StreamformerModel.from_pretrained(released("lora", without_effect))
    with torch.no_grad():
        close(model(tensors["pixel_values"]).last_hidden_state,
              tensors["last_hidden_state.lora_b_zero"])  # fmt: skip


def test_streaming_chunks(case, released):
    entry, tensors = case("streaming")
    model = StreamformerModel.from_pretrained(released("lora"))
    frames = tensors["pixel_values"]
    for plan in entry["chunk_plans"]:
        name = "chunks_" + "_".join(map(str, plan))
        memory, outputs = None, []
        for step, chunk in enumerate(frames.split(plan, dim=1)):
            out = model(chunk, past_key_values=memory, use_cache=True)
            memory = out.past_key_values
            outputs.append(out)
            if (key := f"{name}.step{step}.last_hidden_state") in tensors:
                close(out.last_hidden_state, tensors[key])
        for field in ("last_hidden_state", "pooler_output"):
            whole = torch.cat([out[field] for out in outputs], dim=1)
            close(whole, tensors[f"full_clip.{field}"])
        state = memory.state_dict()["keys_values"]  # (L, 2, 1, N, A, T, d)
        for layer in range(model.config.num_hidden_layers):
            if f"{name}.final_keys.{layer}" in tensors:
                close(state[layer, 0, 0], tensors[f"{name}.final_keys.{layer}"])
                close(state[layer, 1, 0], tensors[f"{name}.final_values.{layer}"])


def test_streaming_tower(case, released):
    """Their tower returns the last ``context_length`` outputs; its memory is never trimmed."""
    entry, tensors = case("streaming")
    model = StreamformerModel.from_pretrained(released("lora"))
    frames, context = tensors["pixel_values"], entry["context_length"]
    memory, kept = None, []
    for step in range(frames.shape[1]):
        out = model(frames[:, step : step + 1], past_key_values=memory, use_cache=True)
        memory = out.past_key_values
        kept = [*kept, out.last_hidden_state][-context:]
        found = torch.cat(kept, dim=1)
        assert list(found.shape) == entry["tower_feature_shapes"][step]
        close(found, tensors[f"tower.step{step}.features"])
    memory.reset()
    out = model(frames[:, 2:4], past_key_values=memory)
    close(out.last_hidden_state, tensors["tower.after_clear.features"])


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "gelu"])
def test_siglip_mapping(case, golden, tmp_path, activation):
    entry, tensors = case("siglip_mapping")
    index = json.loads((golden / "backbone" / "index.json").read_text())
    weights = index["weights"][entry["weights"]]
    save_file(load_file(golden / "backbone" / weights["file"]), tmp_path / "model.safetensors")
    config = {**weights["config"], "model_type": "siglip_vision_model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = lift_siglip(tmp_path, num_frames=6, hidden_act=activation)
    with torch.no_grad():
        out = model(tensors["pixel_values"])
    kind = "tanh" if activation == "gelu_pytorch_tanh" else "exact"
    close(out.last_hidden_state, tensors[f"mapped_{kind}_gelu.last_hidden_state"])
    close(out.pooler_output, tensors[f"mapped_{kind}_gelu.pooler_output"])
    if kind == "tanh":  # SigLIP's own activation: the lifted encoder is SigLIP
        close(out.last_hidden_state[0], tensors["siglip.last_hidden_state"])
        close(out.pooler_output[0], tensors["siglip.pooler_output"])


@pytest.mark.parametrize("released_pooling", [True, False], ids=["released", "corrected"])
@pytest.mark.parametrize("prefix", ["", "timesformer."])
def test_action_recognition(case, released, released_pooling, prefix):
    entry, tensors = case("action_recognition")
    head = {key: tensors[key] for key in tensors if key.startswith(("fc_norm", "classifier"))}

    def with_head(state: dict) -> dict:
        return {prefix + key: value for key, value in state.items()} | head

    model = StreamformerForVideoClassification.from_pretrained(
        released(entry["weights"], with_head), released_pooling=released_pooling
    )
    assert model.config.num_labels == entry["num_classes"]
    with torch.no_grad():
        logits = model(tensors["pixel_values"]).logits
    close(logits, tensors["logits" if released_pooling else "logits.corrected"])
