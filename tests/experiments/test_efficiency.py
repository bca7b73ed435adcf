"""The verb efficiency and its instruments: what they count is what was there to count."""

import argparse
import json
import math

import pytest
import torch

from backbone import StreamformerEncoder
from experiments import efficiency, measuring
from experiments.config import UserError, load_config

MODEL = {
    "image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
CPU = torch.device("cpu")
LIMITS = measuring.Limits(CPU, seconds=0.0, longest=1e9)
KEPT = 2 * 2 * 4 * 16 * 4  # bytes of a frame's keys and values: layers, K and V, patches, width


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def frames():
    return torch.randn(1, measuring.CHUNK, 3, 16, 16)


def encoder(**fields):
    return measuring.streaming_encoder(MODEL, "cpu", torch.float32, **fields)


# -- instruments ----------------------------------------------------------------------------------


def test_peak_is_of_what_lives_at_once_and_leaves_out_what_was_there():
    held = torch.zeros(1 << 20)

    def function():
        first = held + 1  # 4 MiB
        second = torch.cat([first, first])  # 8 MiB beside it
        del first
        return second[:1000] + 1  # 4 kB beside the 8 MiB

    assert 12 << 20 <= measuring.peak_bytes(function, CPU) < (12 << 20) + 4096


def test_operations_are_those_of_linears_and_attention(frames):
    patches, width, inner, heads = 4, 16, 32, 2
    layer = 2 * patches * width * (2 * 4 * width + 2 * inner)  # two attentions (folded), an MLP
    layer += 4 * patches * width * (3 + patches)  # scores and mix through time, and in space
    pooling = 4 * heads * patches * width + 2 * width * (2 * width + 2 * inner)  # query folded
    embedding = 2 * patches * 3 * 64 * width
    assert (
        measuring.operations(encoder(window=3), frames, before=7) == 2 * layer + pooling + embedding
    )


def test_turns_alternate_and_are_made_ready_outside_of_the_time():
    calls = []
    turns = measuring.in_turns(
        lambda: calls.append("step"), lambda: calls.append("floor"), LIMITS,
        before=lambda: calls.append("before"),
    )  # fmt: skip
    assert calls == ["before", "step", "floor"] * measuring.FEWEST
    assert len(turns) == measuring.FEWEST
    patient = measuring.Limits(CPU, seconds=1e9, longest=1.0)
    assert len(measuring.in_turns(int, int, patient)) == measuring.MOST


def test_spread_is_median_and_quartiles():
    assert measuring.spread([5, 1, 3, 2, 4]) == {"median": 3, "low": 2, "high": 4}


def test_matrix_rate_is_of_this_planet():
    assert 1e8 < measuring.matrix_rate(torch.float32, LIMITS) < 1e15


# -- ways -----------------------------------------------------------------------------------------


def test_a_stream_reaches_its_length_and_is_set_back_while_it_is_short(frames):
    stream = measuring.Streamed(encoder(window=4), frames)
    for length in (1, 20, measuring.REWOUND, measuring.REWOUND + 5):
        stream.reach(length)
        assert stream.state["positions"].tolist() == [length - 1]
        stream.step()
        stream.rewind()
        moved = length > measuring.REWOUND
        assert stream.state["positions"].tolist() == [length if moved else length - 1]


def test_what_is_kept_grows_with_all_frames_and_not_with_a_window(frames):
    kept = {}
    for window in (None, 4):
        rows = measuring.along(
            measuring.Streamed(encoder(window=window), frames), int, [1, 16, 32], LIMITS
        )
        kept[window] = [row["kept_bytes"] for row in rows]
    assert kept[4] == [4 * KEPT] * 3
    assert kept[None] == [16 * KEPT, 16 * KEPT, 32 * KEPT]
    recomputed = measuring.along(measuring.Recompute(encoder(), frames), int, [1, 16], LIMITS)
    assert [row["kept_bytes"] for row in recomputed] == [3 * 16 * 16 * 4, 16 * 3 * 16 * 16 * 4]
    assert recomputed[1]["working_bytes"] > 6 * recomputed[0]["working_bytes"]


def test_all_ways_answer_the_same_at_the_newest_frame(frames):
    """A recomputed clip and streams of any memory agree, as far as the window sees all."""
    ways = [
        measuring.Recompute(encoder(), frames),
        measuring.Streamed(encoder(window=None), frames),
        measuring.Streamed(encoder(window=21), frames),
    ]
    for way in ways:
        way.reach(21)
    found = [way.step() for way in ways]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-5)
    both = encoder(causal=False).encode(frames[:, :8]).frame_embeddings
    assert (both[:, 0] - encoder().encode(frames[:, :8]).frame_embeddings[:, 0]).abs().max() > 1e-4


def test_streams_side_by_side_have_full_windows(frames):
    one = encoder(window=3)
    first = measuring.Streamed(one, frames)
    first.reach(5)
    many = measuring.Streamed(one, frames.repeat(3, 1, 1, 1, 1), first.state)
    assert many.state["positions"].tolist() == [4, 4, 4]
    image = measuring.image_encoder(MODEL, "cpu", torch.float32)
    rows = measuring.side_by_side(one, image, [1, 3], frames, LIMITS)
    assert [row["streams"] for row in rows] == [1, 3]
    assert rows[1]["kept_bytes"] == 3 * rows[0]["kept_bytes"] == 3 * 3 * KEPT


def test_the_compiled_step_goes_on_as_the_stream(frames):
    one = encoder(window=3)
    first = measuring.Streamed(one, frames)
    first.reach(8)
    many = frames[:, :1].repeat(2, 1, 1, 1, 1)
    stream = one.stream(2)
    for row in range(2):
        stream.load_state_dict(first.state, rows=[row])
    compiled = measuring.Compiled(one, many, first.state, backend="eager")
    assert compiled.kept_bytes == 2 * 3 * KEPT
    for _ in range(5):
        tokens, embeddings = compiled.step()
        features = stream.push(many[:, 0])
        torch.testing.assert_close(tokens, features.patch_tokens[:, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(embeddings, features.frame_embeddings[:, 0], rtol=0, atol=1e-5)


def test_what_would_take_too_long_is_left_out_with_all_beyond_it(frames):
    way = measuring.Recompute(encoder(), frames)
    hasty = measuring.Limits(CPU, seconds=0.0, longest=0.0)
    rows = measuring.along(way, int, [1, 4, 16], hasty)
    assert "milliseconds" in rows[0]
    assert rows[1:] == [{"frames": frames, "left_out": "longer than 0 s"} for frames in (4, 16)]


def test_what_would_not_fit_is_left_out(frames, monkeypatch):
    monkeypatch.setattr(measuring.preflight, "available_memory", lambda: 100_000)
    kept_all = measuring.Streamed(encoder(window=None), frames)
    rows = measuring.along(kept_all, int, [1, 1000], LIMITS)
    assert rows[1]["left_out"] == "more than the 0 MB of memory that are left"
    windowed = measuring.Streamed(encoder(window=2), frames)
    assert "milliseconds" in measuring.along(windowed, int, [1, 1000], LIMITS)[1]


def test_a_full_gpu_ends_a_row_and_not_the_run(frames):
    class Full(measuring.Recompute):
        def step(self):
            if self.kept_bytes > 20_000:
                raise torch.OutOfMemoryError("full")

    rows = measuring.along(Full(encoder(), frames), int, [1, 4, 16], LIMITS)
    assert [row.get("left_out") for row in rows] == [None, None, "out of memory"]


# -- the verb -------------------------------------------------------------------------------------


def ask(*words):
    parser = argparse.ArgumentParser()
    efficiency.add_arguments(parser)
    args = parser.parse_args(list(map(str, words)))
    args.command = "python experiments/run.py efficiency"
    return efficiency.run(args)


def small(**measure):
    options = {"lengths": [1, 8, 20], "window": 4, "streams": [1, 2], "seconds": 0.0, **measure}
    sets = [f"model.{key}={value}" for key, value in MODEL.items()]
    sets += [f"measure.{key}={value}" for key, value in options.items()]
    return [word for text in sets for word in ("--set", text)]


@pytest.mark.job
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_report_and_its_files(tmp_path, capsys, dtype):
    report = ask("--work-dir", tmp_path, *small(), "--set", f"run.dtype={dtype}")
    text = capsys.readouterr().out
    assert report["dtype"] == dtype
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "report.json", "report.md", "report.png",
    ]  # fmt: skip
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))
    assert (tmp_path / "report.png").stat().st_size > 20_000
    names = list(report["along"])
    assert names == [
        "bidirectional, recomputed", "causal, recomputed", "causal, all frames kept",
        "causal, window of 4",
    ]  # fmt: skip
    page = (tmp_path / "report.md").read_text()
    for name in names:
        assert text.count(f"\n{name}") == page.count(f"\n| {name}") == 3
    assert "SigLIP, one frame" in text and "not measured here; 2.5 is asked of ViT-B/16" in page
    for rows in report["along"].values():
        assert [row["frames"] for row in rows] == [1, 8, 20]
        for row in rows:
            assert row["milliseconds"]["low"] <= row["milliseconds"]["median"]
            assert math.isfinite(row["ratio"]["median"]) and row["working_bytes"] > 0
    assert [row["streams"] for row in report["streams"]] == [1, 2]
    assert torch.__version__.startswith(report["environment"]["torch"])
    assert report["floor"]["milliseconds"]["median"] > 0


def test_left_out_numbers_are_dashes_and_are_explained(tmp_path, capsys):
    report = ask("--work-dir", tmp_path, *small(longest=0.0))
    assert [len(rows) for rows in report["along"].values()] == [3] * 4
    text = capsys.readouterr().out
    assert "causal, recomputed, 8 frames and more: left out, longer than 0 s" in text
    assert "side by side, 2 streams and more: left out, longer than 0 s" in text
    assert text.count("left out") == 5
    assert "nan" not in text


def on_gpu(milliseconds, per_second, **changes):
    report = {
        "device": "cuda:0",
        "dtype": "bfloat16",
        "config": load_config("efficiency", "base"),
        "operations": 40e9,
        "matrix_rate": 400e12,
        "streams": [
            {"streams": 1, "milliseconds": {"median": milliseconds}, "frames_per_second": 1.0},
            {"streams": 64, "milliseconds": {"median": 9.0}, "frames_per_second": per_second},
        ],
    }
    return {**report, **changes}


def test_a_gpu_is_asked_for_two_figures_of_the_base_model():
    found = [one["found"] for one in efficiency.asked(on_gpu(2.25, 6000))]
    assert found == [2.25, pytest.approx(0.6)]
    assert [one["limit"] for one in efficiency.asked(on_gpu(2.25, 6000))] == [2.5, 0.5]
    for changes in (
        {"device": "cpu"}, {"dtype": "float32"}, {"config": load_config("efficiency", "tiny")},
    ):  # fmt: skip
        assert [one["found"] for one in efficiency.asked(on_gpu(2.25, 6000, **changes))] == [
            None, None,
        ]  # fmt: skip
    full = on_gpu(2.25, 6000)
    full["streams"][1] = {"streams": 64, "left_out": "out of memory"}
    assert [one["found"] for one in efficiency.asked(full)] == [2.25, None]


def test_a_cpu_gets_neither_bfloat16_nor_a_compiler_unasked():
    assert not efficiency.compiles("auto", "cpu") and efficiency.compiles("auto", "cuda:1")
    assert efficiency.compiles("always", "cpu") and not efficiency.compiles("never", "cuda")
    assert efficiency.choose_dtype("auto", "cpu") is torch.float32
    assert efficiency.choose_dtype("bfloat16", "cpu") is torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("measure.lengths=[4,2]", r"measure.lengths=\[4, 2\]: expected rising numbers from 1 on"),
        ("measure.streams=[0,2]", r"measure.streams=\[0, 2\]: expected rising"),
        ("measure.window=0", "measure.window=0: a frame sees at least itself"),
        ("run.dtype=int8", "run.dtype='int8': choose one of auto, float32, bfloat16"),
        ("measure.widow=3", "did you mean 'measure.window'"),
    ],
)
def test_values_that_cannot_be_measured_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        ask("--work-dir", tmp_path, "--set", change)


def test_both_sizes_have_encoders_of_the_size_that_they_name():
    assert efficiency.ASKED and load_config("efficiency", "base")["model"]["hidden_size"] == 768
    tiny = load_config("efficiency", "tiny")["model"]
    built = measuring.streaming_encoder(tiny, "cpu", torch.float32, window=2)
    assert isinstance(built, StreamformerEncoder) and built.embed_dim == tiny["hidden_size"]
    gates = [layer.temporal_dense for layer in built.model.layers]
    assert gates == [None] * tiny["num_hidden_layers"]  # folded


def test_a_device_whose_memory_cannot_be_told_is_refused(tmp_path):
    with pytest.raises(UserError, match="--device mps: this is measured on cuda or cpu"):
        ask("--work-dir", tmp_path, "--device", "mps")
