"""The exported step: the numbers of a stream, from a graph whose memory is plain tensors."""

import json

import pytest
import torch

from backbone import StreamformerEncoder, export

STEPS = 50  # past the window of 4 many times, and past the 6 rows of the time table
WINDOW = 4


def streamed(model, frames):
    """Patch tokens and embeddings of ``frames`` ``(B, T, 3, H, W)`` by PyTorch's own stream."""
    stream = StreamformerEncoder(model).stream(frames.shape[0])
    features = [stream.push(frame) for frame in frames.unbind(1)]
    return (
        torch.cat([found.patch_tokens for found in features], 1),
        torch.cat([found.frame_embeddings for found in features], 1),
    )


@torch.no_grad()
def run(step, frames, positions, memory):
    """The same by a step that is given its memory; also the memory at the end."""
    tokens, embeddings = [], []
    for frame in frames.unbind(1):
        patches, embedding, positions, memory = step(frame, positions, memory)
        tokens.append(patches)
        embeddings.append(embedding)
    return torch.stack(tokens, 1), torch.stack(embeddings, 1), positions, memory


@pytest.mark.parametrize("policy", ["hold", "cycle", "reset"])
def test_an_exported_step_streams_as_the_model(make_model, difference, policy):
    model = make_model(temporal_positions=policy, window=WINDOW, lora_rank=2)
    frames = torch.randn(2, STEPS, 3, 16, 16)
    program = export.export_step(model, batch_size=2)
    _, *state = program.example_inputs[0]
    tokens, embeddings, positions, _ = run(program.module(), frames, *state)
    for found, expected in zip((tokens, embeddings), streamed(model, frames), strict=True):
        assert difference(found, expected) < 1e-5
    assert positions.tolist() == [STEPS, STEPS]


def test_a_saved_program_streams_as_before(make_model, tmp_path):
    model, frames = make_model(window=WINDOW), torch.randn(1, 6, 3, 16, 16)
    program = export.export_step(model)
    torch.export.save(program, tmp_path / "step.pt2")
    loaded = torch.export.load(tmp_path / "step.pt2")
    _, *state = program.example_inputs[0]
    expected = run(program.module(), frames, *state)
    assert torch.equal(run(loaded.module(), frames, *state)[0], expected[0])


def test_window_is_the_models_or_the_one_asked_for(make_model, difference):
    model = make_model(window=None)
    frames = torch.randn(1, 12, 3, 16, 16)
    step = export.StreamingStep(model, window=3)
    assert step.span == 3 and model.config.window is None
    _, *state = step.example()
    model.config.window = 3
    assert difference(run(step, frames, *state)[0], streamed(model, frames)[0]) < 1e-5
    reset = make_model(window=99, temporal_positions="reset")
    assert export.StreamingStep(reset).span == reset.config.num_frames


def test_streams_start_anew_and_stand_still_by_their_position(make_model, difference):
    model = make_model(window=WINDOW)
    frames = torch.randn(3, 12, 3, 16, 16)
    step = export.StreamingStep(model, batch_size=3)
    _, positions, memory = step.example()
    _, _, positions, memory = run(step, frames[:, :7], positions, memory)
    positions[0] = 0  # another stream takes this row
    before = positions.clone()
    _, _, positions, memory = run(step, torch.randn(3, 1, 3, 16, 16), positions, memory)
    positions = torch.where(torch.tensor([False, True, False]), before, positions)
    positions[[0, 2]] = torch.tensor([0, 0])
    tokens, *_ = run(step, frames[:, 7:], positions, memory)
    expected = streamed(model, frames)[0][1, 7:], streamed(model, frames[:, 7:])[0]
    assert difference(tokens[1], expected[0]) < 1e-5
    assert difference(tokens[[0, 2]], expected[1][[0, 2]]) < 1e-5


@pytest.mark.parametrize("policy", ["cycle", "reset"])
def test_onnx_runtime_streams_as_the_model(make_model, difference, tmp_path, policy):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed (extra: export)")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra: export)")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra: export)")
    model = make_model(temporal_positions=policy, window=WINDOW, lora_rank=2)
    path = tmp_path / "step.onnx"
    export.export_onnx(model, path, batch_size=2)
    assert [file.name for file in tmp_path.iterdir()] == ["step.onnx"]

    frames = torch.randn(2, STEPS, 3, 16, 16)
    stream = export.OnnxStream(path, threads=1)
    found = [torch.stack(kind, 1) for kind in zip(*map(stream.push, frames.unbind(1)), strict=True)]
    for one, expected in zip(found, streamed(model, frames), strict=True):
        assert difference(one, expected) < 1e-4
    stream.reset(1)
    tokens, _ = stream.push(frames[:, 0])
    assert difference(tokens[1], streamed(model, frames[1:, :1])[0][0, 0]) < 1e-4

    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    assert [entry.name for entry in file.graph.input] == [
        "frames", "positions", "memory.0", "memory.1",
    ]  # fmt: skip
    assert [entry.name for entry in file.graph.output] == [
        "patch_tokens", "frame_embeddings", "next_positions", "next_memory.0", "next_memory.1",
    ]  # fmt: skip
    about = json.loads({entry.key: entry.value for entry in file.metadata_props}["streamformer"])
    assert (about["window"], about["temporal_positions"]) == (WINDOW, policy)


@pytest.mark.parametrize(
    ("fields", "asked", "message"),
    [
        ({"causal": False}, {}, "causal=False: a streaming step needs attention to earlier"),
        ({"temporal_attention": False}, {}, "temporal_attention=False, causal=True"),
        ({}, {}, "window=None: a graph has a memory of fixed size; .* such as window=16"),
        ({}, {"batch_size": 0, "window": 2}, "batch_size=0: a step needs at least one"),
        ({"temporal_positions": "nearest"}, {"window": 2}, '"nearest" .* cannot stream'),
    ],
)
def test_what_cannot_stream_is_refused(make_model, fields, asked, message):
    with pytest.raises(ValueError, match=message):
        export.export_step(make_model(**fields), **asked)


def test_weights_beyond_one_onnx_file_are_refused_and_the_way_out_leads_out(
    make_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(export, "LARGEST_ONNX", 1000)
    model, path = make_model(window=WINDOW), tmp_path / "large.onnx"
    with pytest.raises(ValueError, match=r"GiB of weights do not fit .* write torch.export.save"):
        export.export_onnx(model, path)
    assert not path.exists()
    torch.export.save(export.export_step(model), tmp_path / "large.pt2")
