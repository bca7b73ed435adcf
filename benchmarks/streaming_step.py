"""What a streaming step costs beyond its arithmetic, and what a batch of streams saves.

One step of the base model (ViT-B/16 at 224 pixels, fp32, folded for inference) with a full memory
takes turns with its floor (`floor.py`), in PyTorch's calls and in those that the model makes; the
result is the median of the ratios of neighbours.
Before any timing, folded and plain model must agree.

    python benchmarks/streaming_step.py --threads 2 --window 16 --repeats 40
    python benchmarks/streaming_step.py --streams 8 --repeats 10    # also against a single stream
    python benchmarks/streaming_step.py --window 64 --memory int8   # keys and values in int8

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform

import torch
from floor import base_model, compare, floor, spread, table, take_turns
from torch import Tensor

from backbone import StreamformerModel, StreamingCache, fuse

LIMITS = {16: 1.08, 64: 1.10}  # of the floor, by window


def step_after(model: StreamformerModel, frames: Tensor) -> tuple[Tensor, StreamingCache]:
    """Patch tokens of the last of ``frames`` ``(B, T, 3, H, W)``, and the memory after it."""
    cache = model.new_cache(frames.shape[0], (model.embeddings.grid,) * 2)
    for frame in frames.split(1, dim=1):
        out = model(frame, past_key_values=cache)
    return out.last_hidden_state, cache


@torch.inference_mode()
def main() -> None:
    """Measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--window", type=int, default=16, help="frames in memory (16)")
    parser.add_argument("--streams", type=int, default=1, help="streams in one batch (1)")
    parser.add_argument("--memory", choices=("bfloat16", "int8"), help="default: as the model")
    parser.add_argument("--repeats", type=int, default=40, help="pairs that are timed (40)")
    parser.add_argument("--warm-up", type=int, default=3, help="pairs before these (3)")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model = base_model(options.window)
    fused = fuse(model)
    frames = torch.randn(1, 4, 3, 224, 224)
    expected, found = step_after(model, frames)[0], step_after(fused, frames)[0]
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if difference > 1e-5:
        raise SystemExit(f"folded and plain model differ by {difference:.1e} of the scale")
    del model

    def step(streams: int) -> tuple[Tensor, StreamingCache]:
        """A frame for each stream, and memory that is full."""
        kept_as = options.memory and getattr(torch, options.memory)
        cache = fused.new_cache(streams, (fused.embeddings.grid,) * 2, kept_as=kept_as)
        # Written in full: memory that was never touched would cost nothing to read.
        cache.keys_values.copy_(50 * torch.randn(cache.keys_values.shape[2:]))
        cache.advance(options.window)
        return torch.randn(streams, 1, 3, 224, 224), cache

    many, one = step(options.streams), step(1)
    functions = {
        "step": lambda: fused(many[0], past_key_values=many[1]),
        "floor": floor(fused, options.streams, keys=options.window),
        "floor, own calls": floor(fused, options.streams, keys=options.window, own=True),
    }
    if options.streams > 1:
        functions["one stream"] = lambda: fused(one[0], past_key_values=one[1])
    times = take_turns(functions, options.repeats, options.warm_up)
    ratios = {f"step / {name}": compare(times, "step", name) for name in times if "floor" in name}
    if options.streams > 1:
        alone = compare(times, "step", "one stream")
        ratios["a frame / one alone"] = {k: v / options.streams for k, v in alone.items()}
    print(table(times, ratios))
    limit = LIMITS.get(options.window)
    print(
        json.dumps(
            {
                "benchmark": "streaming_step",
                "seconds": {name: spread(values) for name, values in times.items()},
                "ratios": ratios,
                "limit": limit,
                "within_limit": limit and ratios["step / floor"]["median"] <= limit,
                "difference_of_fused": difference,
                **vars(options),
                "torch": torch.__version__,
                "machine": platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
