"""The step of tensors alone: equal to a stream, one program for all steps, seats for streams."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from backbone import StaticStreams, fuse

TOLERANCE = 1e-5


@pytest.mark.parametrize("policy", ["hold", "cycle", "reset"])
@pytest.mark.parametrize("window", [1, 4, 9])
def test_a_step_gives_what_a_stream_gives(make_model, difference, window, policy):
    model = fuse(make_model(window=window, temporal_positions=policy))
    step, memory = StaticStreams(model, batch_size=2), None
    for frames in torch.randn(25, 2, 3, 16, 16):
        expected = model(frames[:, None], past_key_values=memory, use_cache=True)
        memory = expected.past_key_values
        patch_tokens, frame_embeddings = step(frames)
        assert difference(patch_tokens, expected.last_hidden_state[:, 0]) < TOLERANCE
        assert difference(frame_embeddings, expected.pooler_output[:, 0]) < TOLERANCE
    assert step.positions.tolist() == memory.positions == [25, 25]


def test_streams_join_leave_and_skip_a_tick(make_model, difference):
    model = fuse(make_model(window=4))
    step, memory = StaticStreams(model, batch_size=3), model.new_cache(3, (2, 2))
    for tick, frames in enumerate(torch.randn(20, 3, 3, 16, 16)):
        active = torch.tensor([True, tick % 3 != 1, tick % 2 == 0])
        if tick == 11:
            step.reset([1])
            memory.reset([1])
        rows = active.nonzero()[:, 0].tolist()
        expected = model(frames[rows][:, None], past_key_values=memory.rows(rows))
        patch_tokens, frame_embeddings = step(frames, active)
        assert difference(patch_tokens[rows], expected.last_hidden_state[:, 0]) < TOLERANCE
        assert difference(frame_embeddings[rows], expected.pooler_output[:, 0]) < TOLERANCE
    assert step.positions.tolist() == memory.positions == [20, 6, 10]


def test_one_program_for_all_steps(make_model, difference):
    """Compiled once: not again when the ring turns, a segment ends or a stream is replaced."""
    model = fuse(make_model(window=4, temporal_positions="cycle"))
    step, eager = StaticStreams(model, batch_size=2), StaticStreams(model, batch_size=2)
    torch._dynamo.reset()
    counter = CompileCounter()
    run = torch.compile(step, backend=counter, dynamic=False, fullgraph=True)
    for tick, frames in enumerate(torch.randn(20, 2, 3, 16, 16)):
        if tick == 13:
            step.reset([1])
            eager.reset([1])
        active = torch.tensor([True, tick % 5 != 2])
        found, expected = run(frames, active), eager(frames, active)
        assert all(map(lambda f, e: difference(f, e) < TOLERANCE, found, expected))
    assert counter.frame_count == 1
    assert torch.equal(step.positions, eager.positions)


def test_a_new_stream_sees_nothing_of_the_last(make_model):
    step = StaticStreams(fuse(make_model(window=3)), batch_size=1)
    frames = torch.randn(5, 1, 3, 16, 16)
    first = [step(frame)[1] for frame in frames]
    step(torch.full((1, 3, 16, 16), torch.nan))
    step.reset()
    again = [step(frame)[1] for frame in frames]
    assert all(map(torch.equal, first, again))


def test_refuses_what_cannot_stream_in_bounded_memory(make_model):
    with pytest.raises(ValueError, match='window=None and temporal_positions="hold".*a window'):
        StaticStreams(make_model(), batch_size=1)
    with pytest.raises(ValueError, match="causal=False.*cannot stream"):
        StaticStreams(make_model(window=3, causal=False), batch_size=1)
    StaticStreams(make_model(window=3), batch_size=1)  # the advice works
