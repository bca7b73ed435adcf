"""Keys and values in fewer bits than the model computes in: smaller, near, saved as they lie."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from backbone import StreamingCache, build_encoder, cache

BFLOAT16, INT8 = torch.bfloat16, torch.int8
ERROR = {BFLOAT16: 0.02, INT8: 0.03}  # of the output's scale, through two layers with open gates


@pytest.fixture(autouse=True)
def _many_blocks(monkeypatch):
    """Models of this size would always be unfolded at once."""
    monkeypatch.setattr(cache, "_BLOCK_BYTES", 1)


def feed(model, clip, chunks, memory):
    parts = [
        model(chunk, past_key_values=memory).last_hidden_state
        for chunk in clip.split(chunks, dim=1)
    ]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("kept_as", [BFLOAT16, INT8])
@pytest.mark.parametrize("chunks", [1, 3, 25])
@pytest.mark.parametrize("fields", [{"window": 4}, {}, {"temporal_positions": "reset"}])
def test_near_to_the_exact_memory(make_model, difference, kept_as, chunks, fields):
    model, clip = make_model(**fields), torch.randn(2, 25, 3, 16, 16)
    with torch.no_grad():
        expected = model(clip).last_hidden_state
    memory = model.new_cache(2, (2, 2), kept_as=kept_as)
    found = feed(model, clip, chunks, memory)
    assert 1e-5 < difference(found, expected) < ERROR[kept_as]
    assert (memory.kept_as, memory.dtype) == (kept_as, torch.float32)


@pytest.mark.parametrize("kept_as", [BFLOAT16, INT8])
def test_rows_at_positions_of_their_own(make_model, difference, kept_as):
    model, clip = make_model(window=5), torch.randn(3, 12, 3, 16, 16)
    memory = model.new_cache(3, (2, 2), kept_as=kept_as)
    feed(model, clip[:, :2], 1, memory)
    feed(model, clip[[2, 0], 2:7], [1, 4], memory.rows([2, 0]))
    memory.reset([0])
    found = feed(model, torch.stack([clip[0, :3], clip[1, 2:5], clip[2, 7:10]]), 3, memory)
    with torch.no_grad():
        whole = model(clip).last_hidden_state
    expected = torch.stack([whole[0, :3], whole[1, 2:5], whole[2, 7:10]])
    assert difference(found, expected) < ERROR[kept_as]


def test_blocks_give_what_all_patches_give_at_once(make_model, monkeypatch):
    model, clip = make_model(window=4), torch.randn(2, 9, 3, 16, 24)
    blocks = feed(model, clip, 1, model.new_cache(2, (2, 3), kept_as=INT8))
    monkeypatch.setattr(cache, "_BLOCK_BYTES", 2**30)
    whole = feed(model, clip, 1, model.new_cache(2, (2, 3), kept_as=INT8))
    torch.testing.assert_close(blocks, whole)


def test_bytes():
    shape = {"num_layers": 2, "batch_size": 1, "num_patches": 4, "num_heads": 2, "head_dim": 64}
    sizes = [
        StreamingCache(**shape, window=8, kept_as=kept).memory_bytes for kept in (None, *ERROR)
    ]
    vectors = 2 * 2 * 4 * 2 * 8
    assert sizes == [vectors * 64 * 4, vectors * 64 * 2, vectors * (64 + 4)]


@pytest.mark.parametrize("kept_as", [BFLOAT16, INT8])
def test_saved_and_restored(make_model, tmp_path, kept_as):
    model, clip = make_model(window=4), torch.randn(2, 20, 3, 16, 16)
    memory = model.new_cache(2, (2, 2), kept_as=kept_as)
    feed(model, clip[:, :7], 2, memory)
    save_file(memory.state_dict(), tmp_path / "stream.safetensors")
    expected = feed(model, clip[:, 7:], 1, memory)
    state = load_file(tmp_path / "stream.safetensors")
    restored = StreamingCache.from_state_dict(state, dtype=torch.float32)
    assert torch.equal(feed(model, clip[:, 7:], 1, restored), expected)
    with pytest.raises(ValueError, match="belong to another model, frame size or number of"):
        model.new_cache(2, (2, 2)).load_state_dict(state)


def test_an_encoder_tells_and_streams(make_model, difference, tmp_path):
    make_model(window=5).save_pretrained(tmp_path / "encoder")
    spec, clip = f"streamformer:{tmp_path / 'encoder'}", torch.randn(1, 12, 3, 16, 16)
    exact, small = build_encoder(spec), build_encoder(spec, memory=INT8)
    assert small.settings() == exact.settings() | {"memory": "int8"}
    streams = exact.stream(), small.stream()
    pushed = [stream.push(clip).patch_tokens for stream in streams]
    assert difference(pushed[1], pushed[0]) < ERROR[INT8]
    assert streams[1].memory_bytes < 0.5 * streams[0].memory_bytes
    with pytest.raises(ValueError, match="kept_as=torch.int32: choose one of"):
        build_encoder(spec, memory=torch.int32).stream().push(clip)
