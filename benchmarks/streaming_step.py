"""What a streaming step costs beyond its arithmetic, and what a batch of streams saves.

One step of the base model (ViT-B/16 at 224 pixels, fp32, folded for inference) with a full memory
takes turns with its floor (`floor.py`), in PyTorch's calls and in those that the model makes; the
result is the median of the ratios of neighbours.
Before any timing, folded and plain model must agree.

    python benchmarks/streaming_step.py --threads 2 --windows 16 --repeats 40
    python benchmarks/streaming_step.py --windows 16 64 256 1024 --repeats 8
    python benchmarks/streaming_step.py --streams 8 --repeats 10    # also against a single stream
    python benchmarks/streaming_step.py --windows 64 --memory int8  # keys and values in int8

A long window's keys and values may not fit the machine: at 1,024 frames those of one layer take
1.2 GB, three times over (the step's, each floor's). The model then has as many layers as fit, and
so have its floors.

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from typing import Any

import torch
from floor import base_model, compare, floor, spread, table, take_turns
from torch import Tensor

from backbone import StreamformerConfig, StreamformerModel, StreamingCache, fuse
from experiments.preflight import available_memory

LIMITS = {16: 1.08, 64: 1.10}  # of the floor, by window
SPARE = 0.8  # share of the available memory that keys and values may take


def step_after(model: StreamformerModel, frames: Tensor) -> tuple[Tensor, StreamingCache]:
    """Patch tokens of the last of ``frames`` ``(B, T, 3, H, W)``, and the memory after it."""
    cache = model.new_cache(frames.shape[0], (model.embeddings.grid,) * 2)
    for frame in frames.split(1, dim=1):
        out = model(frame, past_key_values=cache)
    return out.last_hidden_state, cache


def layers_that_fit(window: int, streams: int, available: int | None) -> int:
    """Layers of the base model whose keys and values fit, the step's and those of both floors.

    Raises:
        SystemExit: not even those of one layer do.
    """
    config = StreamformerConfig()
    patches = (config.image_size // config.patch_size) ** 2
    copies = 3 * streams + (streams > 1)  # and that of the stream that runs alone
    needed = copies * window * 2 * patches * config.hidden_size * 4  # bytes, in float32
    if available is None:
        return config.num_hidden_layers
    fitting = int(SPARE * available / needed)
    if fitting < 1:
        raise SystemExit(
            f"--windows {window}: keys and values of a single layer take {needed / 1e9:.1f} GB, "
            f"{available / 1e9:.1f} GB are available; ask for a shorter window or fewer --streams"
        )
    return min(fitting, config.num_hidden_layers)


@torch.inference_mode()
def measure(window: int, options: argparse.Namespace) -> dict[str, Any]:
    """Times of the step and its floors at one window, and their ratios; prints them as a table."""
    layers = layers_that_fit(window, options.streams, available_memory())
    layers = min(layers, options.layers or layers)
    model = base_model(window, num_hidden_layers=layers)
    fused = fuse(model)
    frames = torch.randn(1, 4, 3, 224, 224)
    expected, found = step_after(model, frames)[0], step_after(fused, frames)[0]
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if difference > 1e-5:
        raise SystemExit(f"folded and plain model differ by {difference:.1e} of the scale")
    del model

    def step(streams: int) -> Callable[[], object]:
        """A frame for each stream, on memory that is full."""
        kept_as = options.memory and getattr(torch, options.memory)
        cache = fused.new_cache(streams, (fused.embeddings.grid,) * 2, kept_as=kept_as)
        # Written in full: memory that was never touched would cost nothing to read.
        cache.keys_values.copy_(50 * torch.randn(cache.keys_values.shape[2:]))
        cache.advance(window)
        frames = torch.randn(streams, 1, 3, 224, 224)
        return lambda: fused(frames, past_key_values=cache)

    functions = {
        "step": step(options.streams),
        "floor": floor(fused, options.streams, keys=window),
        "floor, own calls": floor(fused, options.streams, keys=window, own=True),
    }
    if options.streams > 1:
        functions["one stream"] = step(1)
    times = take_turns(functions, options.repeats, options.warm_up)
    ratios = {f"step / {name}": compare(times, "step", name) for name in times if "floor" in name}
    if options.streams > 1:
        alone = compare(times, "step", "one stream")
        ratios["a frame / one alone"] = {k: v / options.streams for k, v in alone.items()}
    print(f"window {window}, {layers} layers")
    print(table(times, ratios))
    limit = LIMITS.get(window)
    return {
        "window": window,
        "layers": layers,
        "seconds": {name: spread(values) for name, values in times.items()},
        "ratios": ratios,
        "limit": limit,
        "within_limit": limit and ratios["step / floor"]["median"] <= limit,
        "difference_of_fused": difference,
    }


def main() -> None:
    """Measure, print tables and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--windows", type=int, nargs="+", default=[16], metavar="W", help="frames in memory (16)"
    )
    parser.add_argument("--layers", type=int, help="of the model (12, or as many as fit)")
    parser.add_argument("--streams", type=int, default=1, help="streams in one batch (1)")
    parser.add_argument("--memory", choices=("bfloat16", "int8"), help="default: as the model")
    parser.add_argument("--repeats", type=int, default=40, help="pairs that are timed (40)")
    parser.add_argument("--warm-up", type=int, default=3, help="pairs before these (3)")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        json.dumps(
            {
                "benchmark": "streaming_step",
                **vars(options),
                "rows": [measure(window, options) for window in options.windows],
                "torch": torch.__version__,
                "machine": platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
