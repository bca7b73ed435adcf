"""The promises at the head of ``cache.py``, and what breaks them is refused."""

import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from backbone import StreamingCache
from backbone.cache import attendable
from backbone.modeling import time_rows

TOLERANCE = 1e-5  # of the output's scale: float32, sums in another order
POLICIES = ["hold", "cycle", "reset"]


def feed(model, clip, chunks, memory=None):
    """Stream a clip in chunks: patch tokens, embeddings and layers of its frames; memory."""
    outputs = []
    for chunk in clip.split(chunks, dim=1):
        out = model(chunk, past_key_values=memory, use_cache=True, output_hidden_states=True)
        memory = out.past_key_values
        outputs.append((out.last_hidden_state, out.pooler_output, *out.hidden_states))
    return [torch.cat(parts, dim=1) for parts in zip(*outputs, strict=True)], memory


def whole(model, clip):
    """The same of one pass without memory."""
    with torch.no_grad():
        out = model(clip, output_hidden_states=True)
    return [out.last_hidden_state, out.pooler_output, *out.hidden_states]


def random_chunks(length, seed):
    rng, chunks = random.Random(seed), []
    while sum(chunks) < length:
        size = rng.choice([1, 1, 1, 2, 3, 5, 7, 20, 70])
        chunks.append(min(size, length - sum(chunks)))
    return chunks


@pytest.fixture
def assert_same(difference):
    def check(found, expected):
        assert max(map(difference, found, expected)) < TOLERANCE

    return check


# -- 1. any chunking equals one pass --------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("window", [4, 16, 64, None])
def test_any_chunking_equals_one_pass(make_model, assert_same, window, policy, seed):
    rng = random.Random(f"{window} {policy} {seed}")
    length = rng.randint(20, 200)
    model = make_model(
        window=window,
        temporal_positions=policy,
        lora_rank=4 * (seed % 2),
        num_frames=[6, 16, 30][seed],
    )
    clip = torch.randn(2, length, 3, 16, 16)
    found, memory = feed(model, clip, random_chunks(length, seed))
    assert_same(found, whole(model, clip))
    assert memory.positions == [length, length]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 8, 9, 25])
@pytest.mark.parametrize("window", [1, 3, 8, None])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_equal_chunks_around_the_size_of_the_ring(
    make_model, assert_same, chunk, window, implementation
):
    model = make_model(window=window, attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    clip = torch.randn(1, 25, 3, 16, 16)
    found, _ = feed(model, clip, chunk)
    assert_same(found, whole(model, clip))


@pytest.mark.parametrize("chunk", [1, 2, 5, 11])
@pytest.mark.parametrize("window", [1, 4, 5, 6, 7])
def test_segments_that_begin_anywhere_in_the_ring(make_model, assert_same, window, chunk):
    model = make_model(window=window, temporal_positions="reset", num_frames=6)
    clip = torch.randn(2, 32, 3, 16, 16)
    found, _ = feed(model, clip, chunk)
    assert_same(found, whole(model, clip))


def test_a_chunk_longer_than_the_ring_stores_its_end():
    cache = StreamingCache(1, 1, 1, 1, 1, window=3)
    for count in (2, 7, 1, 4):
        plan = cache.plan(count)
        assert plan.kept == min(count, 3)  # no slot is written twice in one step
        start = cache.positions[0]
        new = torch.arange(start, start + count).float().expand(2, 1, 1, 1, 1, count).mT
        cache.extend(0, plan, new)
        cache.advance(count)
        last = range(max(0, start + count - 3), start + count)
        held = cache._memory.store[0, 0, 0, 0, 0, :, 0].tolist()
        assert all(held[frame % 3] == frame for frame in last)


def test_reset_policy_is_a_row_of_separate_clips(make_model, assert_same):
    model = make_model(temporal_positions="reset", num_frames=6)
    clip = torch.randn(1, 20, 3, 16, 16)
    pieces = [whole(model, piece) for piece in clip.split(6, dim=1)]
    expected = [torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True)]
    assert_same(whole(model, clip), expected)
    assert_same(feed(model, clip, [1, 2, 9, 8])[0], expected)


@pytest.mark.parametrize("window", [1, 3])
def test_window_is_what_one_layer_sees(make_model, assert_same, window):
    """With one layer and one row in the time table, a frame is the last one of its own window."""
    model = make_model(window=window, num_hidden_layers=1, num_frames=1)
    clip = torch.randn(1, 9, 3, 16, 16)
    found, _ = feed(model, clip, 1)
    model.config.window = None
    for frame in range(9):
        alone = whole(model, clip[:, max(0, frame - window + 1) : frame + 1])
        assert_same([x[:, frame] for x in found], [x[:, -1] for x in alone])


def test_window_counts(make_model):
    """Windows and gates of these tests matter: another window gives other numbers."""
    model = make_model(window=3)
    clip = torch.randn(1, 12, 3, 16, 16)
    narrow = whole(model, clip)[1]
    model.config.window = 4
    wide = whole(model, clip)[1]
    assert torch.equal(narrow[:, 0], wide[:, 0])
    assert (narrow[:, 3:] - wide[:, 3:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize(("window", "segment"), [(None, None), (3, None), (None, 4), (3, 4)])
def test_rule_of_causality_by_enumeration(window, segment):
    frames = torch.arange(10)
    allowed = attendable(frames, torch.tensor([-2, -1, *range(10)]), window, segment)
    for query in range(10):
        seen = {
            key
            for key in range(query + 1)
            if (window is None or query - key < window)
            and (segment is None or query // segment == key // segment)
        }
        assert {int(k) - 2 for k in allowed[query].nonzero()} == seen


@pytest.mark.parametrize(
    ("policy", "rows"),
    [("hold", [0, 1, 2, 2, 2, 2, 2]), ("cycle", [0, 1, 2, 0, 1, 2, 0]),
     ("reset", [0, 1, 2, 0, 1, 2, 0])],
)  # fmt: skip
def test_rows_of_the_time_table(make_model, policy, rows):
    config = make_model(num_frames=3, temporal_positions=policy).config
    for clip_length in (7, None):
        assert time_rows(config, torch.arange(7), clip_length).tolist() == rows


# -- 2. the past never changes --------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("window", [4, None])
def test_the_past_never_changes(make_model, window, policy):
    model = make_model(window=window, temporal_positions=policy)
    clip = torch.randn(2, 30, 3, 16, 16)
    for changed in (1, 17, 29):
        other = clip.clone()
        other[:, changed:] = 100 * torch.randn_like(other[:, changed:])
        for run in (whole, lambda m, c: feed(m, c, [9, 1, 12, 8])[0]):
            before, after = run(model, clip), run(model, other)
            for one, two in zip(before, after, strict=True):
                assert torch.equal(one[:, :changed], two[:, :changed])
                assert not torch.equal(one[:, changed:], two[:, changed:])


@pytest.mark.parametrize("policy", POLICIES)
def test_the_past_does_not_depend_on_how_much_follows(make_model, assert_same, policy):
    model = make_model(temporal_positions=policy)
    clip = torch.randn(1, 40, 3, 16, 16)
    for length in (5, 6, 7, 23):
        assert_same(whole(model, clip[:, :length]), [x[:, :length] for x in whole(model, clip)])


def test_the_past_matters(make_model):
    model = make_model()
    clip = torch.randn(1, 8, 3, 16, 16)
    other = clip.clone()
    other[:, 0] = torch.randn_like(other[:, 0])
    change = (whole(model, clip)[1] - whole(model, other)[1]).abs().amax(-1)
    assert change.min() > 1e-4  # frame 0 reaches every later frame


# -- 3. memory is bounded -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "slots"),
    [
        ({"window": 5}, 5),
        ({"temporal_positions": "reset"}, 6),
        ({"window": 5, "temporal_positions": "reset"}, 5),
        ({"window": 9, "temporal_positions": "reset"}, 6),
    ],
)
def test_memory_is_bounded(make_model, fields, slots):
    model = make_model(**fields)
    memory, sizes = None, set()
    for chunk in torch.randn(2, 40, 3, 16, 16).split([1, 1, 9, 1, 20, 8], dim=1):
        memory = model(chunk, past_key_values=memory, use_cache=True).past_key_values
        sizes.add((memory.memory_bytes, memory._memory.store.data_ptr()))
    # layers, keys and values, rows, patches, slots, width, bytes: allocated once
    assert {size for size, _ in sizes} == {2 * 2 * 2 * 4 * slots * 16 * 4}
    assert len(sizes) == 1


def test_without_a_window_memory_doubles(make_model, assert_same):
    model = make_model()
    clip = torch.randn(1, 70, 3, 16, 16)
    memory, slots = None, []
    outputs = []
    for frame in clip.split(1, dim=1):
        out = model(frame, past_key_values=memory, use_cache=True)
        memory = out.past_key_values
        outputs.append(out.last_hidden_state)
        slots.append(memory.memory_bytes // (2 * 2 * 4 * 16 * 4))
    assert slots == [16] * 16 + [32] * 16 + [64] * 32 + [128] * 6
    assert_same([torch.cat(outputs, dim=1)], whole(model, clip)[:1])


def test_resident_memory_of_a_long_stream(make_model):
    psutil = pytest.importorskip("psutil")
    model = make_model(window=4, num_hidden_layers=1)
    frames = torch.randn(1, 64, 3, 16, 16)
    memory, process = None, psutil.Process()

    def run(steps):
        nonlocal memory
        for step in range(steps):
            frame = frames[:, step % 64 : step % 64 + 1]
            memory = model(frame, past_key_values=memory, use_cache=True).past_key_values
        return process.memory_info().rss

    start = run(500)
    assert run(1500) < 1.01 * start
    assert memory.positions == [2000]


# -- 4. rows are independent ----------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("window", [3, 16, None])
def test_rows_are_independent(make_model, assert_same, window, policy):
    """Streams of one batch stand at positions of their own, skip ticks, end and are replaced."""
    model = make_model(window=window, temporal_positions=policy)
    rng = random.Random(f"{window} {policy}")
    memory = model.new_cache(4, (2, 2))
    clips = {row: torch.randn(1, 60, 3, 16, 16) for row in range(4)}
    found = {row: [] for row in range(4)}

    def finish(row):
        length = sum(part.shape[1] for part in found[row])
        if length:
            expected = whole(model, clips[row][:, :length])[:1]
            assert_same([torch.cat(found[row], dim=1)], expected)

    for _ in range(60):
        rows = rng.sample(range(4), rng.randint(1, 4))
        count = rng.choice([1, 1, 1, 2, 5])
        starts = [sum(part.shape[1] for part in found[row]) for row in rows]
        rows = [row for row, start in zip(rows, starts, strict=True) if start + count <= 60]
        for row in set(range(4)) - set(rows):
            if rng.random() < 0.1:
                finish(row)
                memory.reset([row])
                clips[row], found[row] = torch.randn(1, 60, 3, 16, 16), []
        if not rows:
            continue
        fed = [memory.positions[row] for row in rows]
        frames = [clips[r][:, at : at + count] for r, at in zip(rows, fed, strict=True)]
        view = memory.rows(rows) if len(rows) < 4 or rng.random() < 0.5 else memory
        if view is memory:  # frames of the whole batch come in its own order
            frames = [frames[rows.index(row)] for row in range(4)]
            rows = [0, 1, 2, 3]
        out = model(torch.cat(frames), past_key_values=view)
        for place, row in enumerate(rows):
            found[row].append(out.last_hidden_state[place : place + 1])
    for row in range(4):
        assert memory.positions[row] == sum(part.shape[1] for part in found[row])
        finish(row)


def test_other_rows_do_not_change_a_bit(make_model):
    model = make_model(window=4)
    clip = torch.randn(2, 12, 3, 16, 16)
    other = clip.clone()
    other[1] = torch.randn_like(other[1])
    one, two = feed(model, clip, 3)[0], feed(model, other, 3)[0]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("window", [4, None])
def test_a_stream_saved_and_restored_goes_on(make_model, tmp_path, window):
    model = make_model(window=window)
    clip = torch.randn(2, 50, 3, 16, 16)
    _, memory = feed(model, clip[:, :23], [1, 20, 2])
    save_file(memory.state_dict(), tmp_path / "stream.safetensors")
    expected, _ = feed(model, clip[:, 23:], 9, memory)
    restored = StreamingCache.from_state_dict(
        load_file(tmp_path / "stream.safetensors"), device="cpu"
    )
    found, restored = feed(model, clip[:, 23:], 9, restored)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert restored.positions == memory.positions == [50, 50]


def test_a_saved_state_is_a_copy(make_model):
    model = make_model(window=4)
    _, memory = feed(model, torch.randn(2, 9, 3, 16, 16), 3)
    state = memory.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    feed(model, torch.randn(2, 9, 3, 16, 16), 3, memory)
    assert all(torch.equal(state[key], before[key]) for key in before)
    memory.load_state_dict(state)
    feed(model, torch.randn(2, 9, 3, 16, 16), 3, memory)
    assert all(torch.equal(state[key], before[key]) for key in before)


def test_a_reset_stream_forgets_even_what_was_broken(make_model):
    """Empty slots are masked where a neighbour's are read, but a masked NaN is still a NaN."""
    model, clip = make_model(window=8), torch.randn(2, 9, 3, 16, 16)
    clip[1] = torch.nan
    _, memory = feed(model, clip, 3)
    memory.reset([1])
    found, _ = feed(model, torch.randn(2, 5, 3, 16, 16), [1, 3, 1], memory)
    assert all(part.isfinite().all() for part in found)


def test_a_state_can_be_put_on_another_device(make_model):
    model = make_model(window=4)
    _, memory = feed(model, torch.randn(1, 6, 3, 16, 16), 3)
    moved = StreamingCache.from_state_dict(memory.state_dict(), device="meta")
    assert moved.device.type == "meta"
    assert moved.positions == [6]


@pytest.mark.parametrize("window", [4, None])
def test_a_stream_moves_into_another_batch(make_model, assert_same, window):
    model = make_model(window=window)
    leaving, staying = torch.randn(1, 40, 3, 16, 16), torch.randn(1, 40, 3, 16, 16)
    _, first = feed(model, leaving[:, :30], 7)
    _, batch = feed(model, torch.cat([staying, staying])[:, :9], 2)
    batch.rows([1]).load_state_dict(first.state_dict())
    assert batch.positions == [9, 30]
    out = model(torch.cat([staying[:, 9:13], leaving[:, 30:34]]), past_key_values=batch)
    expected = whole(model, staying)[0][:, 9:13], whole(model, leaving)[0][:, 30:34]
    assert_same([out.last_hidden_state], [torch.cat(expected)])
    alone = StreamingCache.from_state_dict(batch.rows([1]).state_dict())
    assert alone.positions == [34]
    out = model(leaving[:, 34:], past_key_values=alone)
    assert_same([out.last_hidden_state], [whole(model, leaving)[0][:, 34:]])


def test_a_stream_begun_in_inference_mode_goes_on_outside(make_model):
    model = make_model()
    with torch.inference_mode():
        _, memory = feed(model, torch.randn(2, 20, 3, 16, 16), 5)
        state = memory.state_dict()
    memory.reset([1])
    feed(model, torch.randn(2, 20, 3, 16, 16), 5, memory)
    memory.load_state_dict(state)
    assert memory.positions == [20, 20]
    with torch.inference_mode():
        feed(model, torch.randn(2, 20, 3, 16, 16), 5, StreamingCache.from_state_dict(state))


def test_streaming_carries_no_gradient(make_model):
    model = make_model()
    assert all(weight.requires_grad for weight in model.parameters())
    out = model(torch.randn(1, 3, 3, 16, 16, requires_grad=True), use_cache=True)
    assert not out.last_hidden_state.requires_grad
    assert not out.past_key_values._memory.store.requires_grad
    assert torch.is_grad_enabled()
    assert model(torch.randn(1, 3, 3, 16, 16)).last_hidden_state.requires_grad


def test_streaming_without_temporal_attention(make_model, assert_same, tmp_path):
    """The control of an experiment about time streams too, and remembers nothing."""
    model = make_model(temporal_attention=False, causal=False, temporal_positions="nearest")
    clip = torch.randn(2, 30, 3, 16, 16)
    found, memory = feed(model, clip, [1, 20, 9])
    assert_same(found, whole(model, clip))
    frames = [whole(model, frame) for frame in clip.split(1, dim=1)]
    assert_same(found, [torch.cat(parts, dim=1) for parts in zip(*frames, strict=True)])
    assert (memory.memory_bytes, memory.positions) == (0, [30, 30])
    save_file(memory.state_dict(), tmp_path / "empty.safetensors")
    restored = StreamingCache.from_state_dict(load_file(tmp_path / "empty.safetensors"))
    restored.reset([0])
    assert feed(model, clip[:, :1], 1, restored)[1].positions == [1, 31]


def test_half_precision_streams(make_model, difference):
    model = make_model(window=4)
    clip = torch.randn(1, 12, 3, 16, 16)
    expected = whole(model, clip)[1]
    with torch.autocast("cpu", torch.bfloat16):
        found, memory = feed(model, clip, [1, 3, 7, 1])
    assert memory.dtype == torch.float32
    assert difference(found[1].float(), expected) < 0.1
    found, memory = feed(model.bfloat16(), clip, [1, 3, 7, 1])
    assert memory.dtype == found[1].dtype == torch.bfloat16
    assert difference(found[1].float(), expected) < 0.1


# -- what cannot be kept exact is refused by name -------------------------------------------------


def test_refuses_another_batch_or_resolution(make_model):
    model = make_model()
    _, memory = feed(model, torch.randn(2, 3, 3, 16, 16), 3)
    with pytest.raises(ValueError, match=r"3 frames for a memory of 2 streams.*rows\(\[...\]\)"):
        model(torch.randn(3, 1, 3, 16, 16), past_key_values=memory)
    with pytest.raises(ValueError, match="2 x 3 patches in a stream that began with 4"):
        model(torch.randn(2, 1, 3, 16, 24), past_key_values=memory)
    assert memory.positions == [3, 3]
    model(torch.randn(1, 1, 3, 16, 16), past_key_values=memory.rows([1]))  # the advice works
    assert memory.positions == [3, 4]


def test_refuses_what_cannot_stream(make_model):
    frame = torch.randn(1, 1, 3, 16, 16)
    with pytest.raises(ValueError, match="causal=False.*cannot stream"):
        make_model(causal=False)(frame, use_cache=True)
    with pytest.raises(ValueError, match=r"needs model.eval\(\)"):
        make_model().train()(frame, use_cache=True)
    with pytest.raises(ValueError, match='"nearest".*cannot stream; load the model with'):
        make_model(temporal_positions="nearest")(frame, use_cache=True)


def test_refuses_the_memory_of_another_model(make_model):
    clip = torch.randn(1, 3, 3, 16, 16)
    _, memory = feed(make_model(window=4), clip, 3)
    with pytest.raises(
        ValueError, match="made for window=4, segment=None but the model has win.*8"
    ):
        make_model(window=8)(clip, past_key_values=memory)
    with pytest.raises(ValueError, match="segment=None but the model has window=4, segment=6"):
        make_model(window=4, temporal_positions="reset")(clip, past_key_values=memory)
    with pytest.raises(ValueError, match=r"head width\) \(2, 2, 8\).* the model has \(3, 2, 8\)"):
        make_model(window=4, num_hidden_layers=3)(clip, past_key_values=memory)
    with pytest.raises(ValueError, match="float32, the model has .* in torch.bfloat16"):
        make_model(window=4).bfloat16()(clip, past_key_values=memory)


@pytest.mark.parametrize("rows", [[], [2], [-1], [0, 0]])
def test_refuses_rows_that_are_not_there(rows):
    memory = StreamingCache(1, 2, 4, 2, 8, window=3)
    with pytest.raises(ValueError, match="name some of the streams 0 to 1, each once"):
        memory.rows(rows)
    with pytest.raises(ValueError, match="name some of the streams 0 to 1, each once"):
        memory.reset(rows)


def test_refuses_a_state_that_does_not_fit(make_model):
    model = make_model(window=4)
    _, memory = feed(model, torch.randn(2, 6, 3, 16, 16), 3)
    state = memory.state_dict()
    with pytest.raises(ValueError, match=r"holds \['positions'\], expected"):
        StreamingCache.from_state_dict({"positions": torch.zeros(1)})
    with pytest.raises(ValueError, match="saved streams have window=4, these have window=5"):
        make_model(window=5).new_cache(2, (2, 2)).load_state_dict(state)
    with pytest.raises(ValueError, match="belong to another model, frame size or number of"):
        model.new_cache(2, (2, 3)).load_state_dict(state)
    with pytest.raises(ValueError, match="belong to another model, frame size or number of"):
        model.new_cache(3, (2, 2)).load_state_dict(state)
    with pytest.raises(ValueError, match="belong to another model"):  # a slot too few
        cut = state | {"keys_values": state["keys_values"][..., :3, :]}
        StreamingCache.from_state_dict(cut)
    with pytest.raises(ValueError, match=r"damaged: keys and values .* streams at \[6\]"):
        StreamingCache.from_state_dict(state | {"positions": torch.tensor([6])})
    assert memory.positions == [6, 6]


def test_refuses_a_window_without_frames():
    with pytest.raises(ValueError, match="window=0.*a frame always sees itself"):
        StreamingCache(1, 1, 4, 2, 8, window=0)
