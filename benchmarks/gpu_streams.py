"""What a streaming step costs where kernels are launched: bf16, compiled, captured as a CUDA graph.

`StaticStreams` runs one frame of each stream. Three ways are timed with the device drained after
every step: as it is, compiled, and compiled and captured, which leaves one launch a step. Beside
the time stands the share of the device's matrix rate, measured in the same run.

    python benchmarks/gpu_streams.py         # the base model, 1 and 64 streams
    python benchmarks/gpu_streams.py --size tiny --device cpu --streams 1 2 --ways plain

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from floor import base_model
from torch import Tensor, nn

from backbone import StaticStreams, StreamformerModel, fuse

SIZES = {
    "base": {},
    "tiny": {
        "image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "intermediate_size": 128,
    },
}  # fmt: skip
WAYS = ("plain", "compiled", "captured")
MOST_MILLISECONDS, LEAST_SHARE = 2.5, 0.5  # one stream; 64 streams, of the matrix rate


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table and one line of JSON; return what that line holds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--window", type=int, default=64, help="frames in memory (64)")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64], help="batches (1 64)")
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=WAYS)
    parser.add_argument("--backend", default="inductor", help="of torch.compile (inductor)")
    parser.add_argument("--repeats", type=int, default=50, help="steps that are timed (50)")
    options = parser.parse_args(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if device.type != "cuda" and "captured" in options.ways:
        parser.error(f"--device {device} captures no graphs; leave 'captured' out of --ways")

    model = fuse(base_model(options.window, **SIZES[options.size])).to(device, dtype)
    rate = matrix_rate(device, dtype, size=8192 if device.type == "cuda" else 512)
    rows = []
    for count in options.streams:
        for way in options.ways:
            step = prepared(model, count, way, options.backend)
            seconds = [timed(step, device) for _ in range(options.repeats)]
            median = statistics.median(seconds)
            share = count * operations(model, options.window) / median / rate
            rows.append({"streams": count, "way": way, "seconds": median, "share_of_rate": share})
    print(f"{'streams':>8}{'way':>12}{'ms a step':>12}{'ms a frame':>12}{'of rate':>10}")
    for row in rows:
        step, frame = 1e3 * row["seconds"], 1e3 * row["seconds"] / row["streams"]
        print(
            f"{row['streams']:8}{row['way']:>12}{step:12.3f}{frame:12.3f}{row['share_of_rate']:10.1%}"
        )
    results = {
        "benchmark": "gpu_streams",
        "matrix_rate": rate,
        "rows": rows,
        "limits": {"milliseconds": MOST_MILLISECONDS, "share_of_rate": LEAST_SHARE},
        **vars(options),
        "torch": torch.__version__,
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }
    print(json.dumps(results))
    return results


@torch.inference_mode()
def prepared(model: StreamformerModel, count: int, way: str, backend: str) -> Callable[[], object]:
    """A step of ``count`` streams with full memories, warmed up."""
    streams = StaticStreams(model, count)
    streams.positions += streams.keys_values.shape[5]
    config = model.config
    frames = torch.randn(
        count, config.num_channels, config.image_size, config.image_size,
        device=model.device, dtype=model.dtype,
    )  # fmt: skip
    step: nn.Module = streams
    if way != "plain":
        step = torch.compile(streams, dynamic=False, fullgraph=True, backend=backend)
    if way == "captured":
        return captured(step, frames)

    def run() -> None:
        with torch.inference_mode():
            step(frames)

    for _ in range(3):
        run()
    return run


def captured(step: nn.Module, frames: Tensor) -> Callable[[], None]:
    """The step as a CUDA graph; new frames are copied into ``frames``."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step(frames)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(frames)
    return graph.replay


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of one step, until the device has nothing left to do."""
    drain = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    drain()
    begun = time.perf_counter()
    step()
    drain()
    return time.perf_counter() - begun


@torch.inference_mode()
def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations per second of square matrix products, the fastest of twenty."""
    one, two = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = min(timed(lambda: one @ two, device) for _ in range(20))
    return 2 * size**3 / seconds


def operations(model: StreamformerModel, window: int) -> int:
    """Multiplications and additions of one frame: the linears and attention of the layers."""
    config, patches = model.config, model.embeddings.grid**2
    weights = sum(weight.numel() for weight in model.layers.parameters() if weight.ndim == 2)
    weights += model.embeddings.patch_embedding.weight.numel()
    attended = config.num_hidden_layers * config.hidden_size * (window + patches)
    return 2 * patches * (weights + 2 * attended)


if __name__ == "__main__":
    main()
