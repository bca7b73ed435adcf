"""What one frame more costs: time and memory of ways to encode a stream, on this machine.

Time. A way and the floor, SigLIP on one frame of each stream, take turns, so that a busy machine
slows both: the milliseconds are of the way, the ratio is that of neighbours. A GPU is waited for
before the clock is read.

Memory has three parts. ``weights`` is what the parameters take. ``kept`` is what lies there from
frame to frame: keys and values, or, where everything is encoded anew, the frames so far.
``working`` is the most that a step takes beside them: on a GPU by the peak of PyTorch's CUDA
allocator, on a CPU by the peak of the bytes that its allocator hands out for tensors, as its
profiler records them; not the resident memory of the process, where tens of megabytes get lost.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import SiglipVisionConfig, SiglipVisionModel

from backbone import (
    SiglipEncoder,
    StaticStreams,
    StreamformerConfig,
    StreamformerEncoder,
    StreamformerModel,
)
from backbone.encoders import VideoEncoder
from experiments import preflight

FEWEST, MOST = 3, 30  # turns
REWOUND = 64  # frames up to which a stream is set back for every turn; a longer one moves on
CHUNK = 16  # frames pushed at once to bring a stream to its length
MATRIX = {"cuda": 8192, "cpu": 1024}  # side of the matrices whose product is the matrix rate

Row = dict[str, Any]


# -- what is measured -----------------------------------------------------------------------------


def streaming_encoder(
    model: Mapping[str, Any], device: str, dtype: torch.dtype, **fields: Any
) -> StreamformerEncoder:
    """A StreamFormer of random weights, gates open, folded; ``fields`` are of its config."""
    torch.manual_seed(0)
    # "cycle": the memory stays full, where the default would empty it every num_frames frames.
    built = StreamformerModel(StreamformerConfig(**model, temporal_positions="cycle", **fields))
    for layer in built.layers:
        torch.nn.init.ones_(layer.temporal_gate)
    return StreamformerEncoder(built).to(device, dtype)


def image_encoder(model: Mapping[str, Any], device: str, dtype: torch.dtype) -> SiglipEncoder:
    """A SigLIP image tower of the same size and random weights."""
    torch.manual_seed(0)
    return SiglipEncoder(SiglipVisionModel(SiglipVisionConfig(**model))).to(device, dtype)


class Recompute:
    """A clip of all frames so far, encoded anew for its newest frame."""

    grows = True

    def __init__(self, encoder: VideoEncoder, frames: Tensor) -> None:
        self._encoder, self._frames = encoder, frames  # (B, CHUNK, 3, H, W), shown again and again
        self._clip = frames[:, :0]

    def work(self, length: int) -> int:
        """Frames that must be encoded for the answer at frame ``length``."""
        return length

    def encoded(self, length: int) -> int:
        """Frames that a step at frame ``length`` encodes."""
        return length

    def reach(self, length: int) -> None:
        """Let ``length`` frames have come, the newest one not yet encoded."""
        repeats = -(-length // self._frames.shape[1])
        self._clip = self._frames.repeat(1, repeats, 1, 1, 1)[:, :length]

    def rewind(self) -> None:
        """Nothing has moved."""

    def step(self) -> Tensor:
        """Encode the newest frame: its embedding, ``(B, 1, D)``."""
        return self._encoder.encode(self._clip).frame_embeddings[:, -1:]

    @property
    def kept_bytes(self) -> int:
        """Bytes that lie there until the next frame."""
        return self._clip.numel() * self._clip.element_size()


class Streamed:
    """Streams with their memory, side by side; each step is a frame more of every one.

    Args:
        encoder: causal.
        frames: ``(B, CHUNK, 3, H, W)``, shown again and again.
        state: of one stream, from :attr:`state`: all ``B`` go on where it stood.
    """

    def __init__(
        self, encoder: StreamformerEncoder, frames: Tensor, state: dict[str, Tensor] | None = None
    ) -> None:
        self.grows = encoder.config.window is None
        self._frames, self._rows = frames, range(frames.shape[0])
        self._stream = encoder.stream(frames.shape[0])
        self._stream.push(frames[:, 0])  # its memory is there then,
        self._stream.reset(self._rows)  # and stays
        self._rewound: dict[str, Tensor] | None = None
        if state is not None:
            for row in self._rows:
                self._stream.load_state_dict(state, rows=[row])

    def work(self, length: int) -> int:
        """Frames that must be encoded for the answer at frame ``length``."""
        return max(1, length - self._stream.positions[0])

    def encoded(self, length: int) -> int:
        """Frames that a step at frame ``length`` encodes."""
        return 1

    def reach(self, length: int) -> None:
        """Let ``length`` frames have come, the newest one not yet encoded."""
        while (missing := length - 1 - self._stream.positions[0]) > 0:
            self._stream.push(self._coming()[:, :missing])
        self._rewound = self.state if length <= REWOUND else None

    def rewind(self) -> None:
        """Take the last step back, where the stream is short enough for that to matter."""
        if self._rewound is not None:
            self._stream.load_state_dict(self._rewound, rows=self._rows)

    def step(self) -> Tensor:
        """Encode the newest frame: its embedding, ``(B, 1, D)``."""
        return self._stream.push(self._coming()[:, 0]).frame_embeddings

    def _coming(self) -> Tensor:
        """The frames that come next, up to the last one of those that are shown again."""
        return self._frames[:, self._stream.positions[0] % self._frames.shape[1] :]

    @property
    def state(self) -> dict[str, Tensor]:
        """All that the streams need to go on."""
        return self._stream.state_dict()

    @property
    def kept_bytes(self) -> int:
        """Bytes that lie there until the next frame."""
        return self._stream.memory_bytes


class Compiled:
    """Streams side by side whose step is one compiled program; on a GPU one CUDA graph.

    Args:
        encoder: causal, with a window.
        frames: ``(B, t, 3, H, W)``; the first of them is shown again and again.
        state: of one stream with a full window: all ``B`` go on where it stood.
        backend: of ``torch.compile``.
    """

    def __init__(
        self,
        encoder: StreamformerEncoder,
        frames: Tensor,
        state: Mapping[str, Tensor],
        backend: str = "inductor",
    ) -> None:
        self._streams = StaticStreams(encoder.model, frames.shape[0])
        self._streams.positions.copy_(state["memory.positions"])
        self._streams.keys_values.copy_(state["memory.keys_values"])
        compiled = torch.compile(self._streams, backend=backend, fullgraph=True, dynamic=False)
        advance = partial(compiled, frames[:, 0].contiguous())
        self.step = _captured(advance) if frames.is_cuda else advance

    def rewind(self) -> None:
        """A full window costs the same at every frame: nothing need be taken back."""

    @property
    def kept_bytes(self) -> int:
        """Bytes that lie there until the next frame."""
        return self._streams.keys_values.nbytes


def _captured(function: Callable[[], object]) -> Callable[[], None]:
    """The GPU's work of a call, recorded once; what it reads and writes stays where it is."""
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(FEWEST):
            function()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


Way = Recompute | Streamed | Compiled


# -- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """How long to measure, and what not to begin.

    Attributes:
        device: where everything runs.
        seconds: to spend on the turns of one number.
        longest: seconds that one answer may take.
    """

    device: torch.device
    seconds: float
    longest: float

    def refuse(self, seconds: float, needed: float) -> str | None:
        """Why an answer of so many seconds and bytes is left out; None to go ahead."""
        if seconds > self.longest:
            return f"longer than {self.longest:g} s"
        # A GPU says itself when it is full; a system may rather end the process.
        available = preflight.available_memory() if self.device.type == "cpu" else None
        if available is not None and needed > available:
            return f"more than the {preflight.size(available)} of memory that are left"
        return None


def along(
    way: Recompute | Streamed,
    floor: Callable[[], object],
    lengths: Sequence[int],
    limits: Limits,
    title: str = "lengths",
) -> list[Row]:
    """Measure a way where its stream has reached each of ``lengths``.

    Args:
        way: of one stream that has not begun.
        floor: SigLIP on one frame.
        lengths: in frames, the newest one included, rising.
        limits: of each length; the frames before the newest one count as well.
        title: of the progress bar.

    Returns:
        A row per length: ``frames``, and what :func:`at` says or the reason why it was
        ``left_out``.
    """

    def forecast(length: int, last: Row) -> tuple[float, float]:
        a_frame = last["milliseconds"]["median"] / 1e3 / way.encoded(last["frames"])
        seconds = a_frame * way.work(length)
        return seconds, _bytes(last) * length / last["frames"] if way.grows else 0.0

    def measure(length: int) -> Row:
        way.reach(length)
        return at(way, floor, limits)

    return _rising("frames", tqdm(lengths, title, unit="length"), measure, forecast, limits)


def side_by_side(
    encoder: StreamformerEncoder,
    image: VideoEncoder,
    counts: Sequence[int],
    frames: Tensor,
    limits: Limits,
    compiled: bool = False,
) -> list[Row]:
    """Measure a step of many streams in one batch, the window of each full.

    Args:
        encoder: causal, with a window.
        image: SigLIP; the floor is one batch of the newest frames of all streams.
        counts: streams, rising.
        frames: ``(1, CHUNK, 3, H, W)``.
        limits: of each count.
        compiled: measure :class:`Compiled`, not the stream as it is.

    Returns:
        A row per count: ``streams``, and what :func:`at` says or the reason why it was
        ``left_out``.
    """
    first = Streamed(encoder, frames)
    first.reach(encoder.config.window + 2)  # one frame more than fills it

    def forecast(count: int, last: Row) -> tuple[float, float]:
        more = count / last["streams"]
        return last["milliseconds"]["median"] / 1e3 * more, _bytes(last) * more

    def measure(count: int) -> Row:
        newest = frames[:, :1].repeat(count, 1, 1, 1, 1)  # (B, 1, 3, H, W)
        way = (Compiled if compiled else Streamed)(encoder, newest, first.state)
        return at(way, partial(image.encode, newest), limits)

    bar = tqdm(counts, "streams side by side", unit="batch")
    return _rising("streams", bar, measure, forecast, limits)


def _rising(
    name: str,
    values: Iterable[int],
    measure: Callable[[int], Row],
    forecast: Callable[[int, Row], tuple[float, float]],
    limits: Limits,
) -> list[Row]:
    """A row per value, until ``forecast`` (seconds, bytes) or the GPU says that it is too much."""
    rows: list[Row] = []
    reason = None
    for value in values:
        if reason is None and rows:
            reason = limits.refuse(*forecast(value, rows[-1]))
        if reason is None:
            try:
                rows.append({name: value, **measure(value)})
                continue
            except torch.OutOfMemoryError:
                reason = "out of memory"
        rows.append({name: value, "left_out": reason})
    return rows


def at(way: Way, floor: Callable[[], object], limits: Limits) -> Row:
    """Measure a way where it stands.

    Returns:
        ``milliseconds`` of a step and its ``ratio`` to the floor, each median and quartiles, and
        ``kept_bytes`` and ``working_bytes``.
    """
    kept_before = way.kept_bytes
    peak = peak_bytes(way.step, limits.device)  # the first step, so it warms up, too
    kept = way.kept_bytes
    floor()
    turns = in_turns(way.step, floor, limits, way.rewind)
    return {
        "milliseconds": spread([1e3 * own for own, _ in turns]),
        "ratio": spread([own / least for own, least in turns]),
        "kept_bytes": kept,
        "working_bytes": peak - (kept - kept_before),
    }


def in_turns(
    step: Callable[[], object],
    floor: Callable[[], object],
    limits: Limits,
    before: Callable[[], None] = lambda: None,
) -> list[tuple[float, float]]:
    """Seconds of both, turn by turn, until the time is up (at least 3, at most 30).

    ``before`` each turn something may be made ready, outside of the time.
    """
    turns: list[tuple[float, float]] = []
    while len(turns) < FEWEST or (sum(map(sum, turns)) < limits.seconds and len(turns) < MOST):
        before()
        turns.append((timed(step, limits.device), timed(floor, limits.device)))
    return turns


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds from the call until its result is there."""
    _wait(device)
    start = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most memory that a call takes beyond what is taken already."""
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    with tempfile.TemporaryDirectory() as folder:
        recorded.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads((Path(folder) / "trace.json").read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"]
    taken = most = 0
    for _, change in sorted(changes, key=lambda event: event[0]):
        taken += change
        most = max(most, taken)
    return most


def weight_bytes(encoder: VideoEncoder) -> int:
    """Bytes of all parameters."""
    return sum(weight.numel() * weight.element_size() for weight in encoder.parameters())


def matrix_rate(dtype: torch.dtype, limits: Limits) -> float:
    """Floating-point operations per second of a large square matrix product, the best of many."""
    side = MATRIX[limits.device.type]
    one, other = (torch.randn(side, side, device=limits.device, dtype=dtype) for _ in range(2))
    turns = in_turns(lambda: one @ other, lambda: None, limits)
    return 2 * side**3 / min(own for own, _ in turns)


def operations(encoder: VideoEncoder, frames: Tensor, before: int = 0) -> int:
    """Floating-point operations of the matrix products and attention of a frame.

    Counted without computing anything, on PyTorch's device for that.

    Args:
        encoder: left as it is.
        frames: ``(1, t, 3, H, W)``; the first is the one that counts.
        before: frames that the stream has seen.
    """
    frame = frames[:, :1].to("meta")
    stream = deepcopy(encoder).to("meta").stream()
    if before:
        stream.push(frame.repeat(1, before, 1, 1, 1))
    with FlopCounterMode(display=False) as counter:
        stream.push(frame).frame_embeddings.sum()
    return counter.get_total_flops()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bytes(row: Row) -> int:
    return row["kept_bytes"] + row["working_bytes"]
