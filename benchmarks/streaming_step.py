"""What a streaming step costs beyond its arithmetic.

One step of the base model (ViT-B/16 at 224 pixels, fp32, folded for inference) with a full memory
is timed against its floor: the same linears, with the same weights, and the same attention calls
alone, on contiguous tensors of the same shapes. What lies between the two is ours: norms,
activations, residuals, layout, memory. Step and floor take turns, so that a busy machine slows
both; the result is the median of the ratios of neighbours. Before any timing, folded and plain
model must agree.

    python benchmarks/streaming_step.py --threads 2 --window 16 --repeats 40

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone import StreamformerConfig, StreamformerModel, StreamingCache, fuse

LIMIT = 1.15  # of the floor


def build(window: int) -> StreamformerModel:
    """The base model with random weights; gates open, or half of it would be left unproven."""
    torch.manual_seed(0)
    # "cycle": the memory stays full, where the default policy would empty it every 16 frames.
    config = StreamformerConfig(window=window, temporal_positions="cycle", lora_rank=32)
    model = StreamformerModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "gate" in name or "lora_" in name or "time_embedding" in name:
                weight.normal_(std=0.1)
    return model


def step_after(model: StreamformerModel, frames: Tensor) -> tuple[Tensor, StreamingCache]:
    """Patch tokens of the last of ``frames`` ``(1, T, 3, H, W)``, and the memory after it."""
    cache = model(frames[:, :-1], use_cache=True).past_key_values
    return model(frames[:, -1:], past_key_values=cache).last_hidden_state, cache


def floor(model: StreamformerModel, window: int) -> Callable[[], None]:
    """The linears and attention calls of one step, nothing else."""
    config = model.config
    width, heads, depth = config.hidden_size, config.num_attention_heads, config.head_dim
    patches = model.embeddings.grid**2
    tokens, inner = torch.randn(patches, width), torch.randn(patches, config.intermediate_size)
    one, one_inner = torch.randn(1, width), torch.randn(1, config.intermediate_size)
    patch = model.embeddings.patch_embedding
    pool = model.head

    def qkv(rows: int, queries: int, keys: int) -> list[Tensor]:
        return [torch.randn(rows, heads, length, depth) for length in (queries, keys, keys)]

    temporal, spatial = qkv(patches, 1, window), qkv(1, patches, patches)
    pooling = qkv(1, 1, patches)
    pixels = torch.randn(patches, patch.weight[0].numel())
    pool_weights = pool.attention.in_proj_weight.split([width, 2 * width])
    pool_biases = pool.attention.in_proj_bias.split([width, 2 * width])
    patch_weight = patch.weight.flatten(1)

    def run() -> None:
        F.linear(pixels, patch_weight, patch.bias)
        for layer in model.layers:
            for attention, inputs in (
                (layer.temporal_attention, temporal),
                (layer.spatial_attention, spatial),
            ):
                F.linear(tokens, attention.qkv.weight, attention.qkv.bias)
                F.scaled_dot_product_attention(*inputs)
                F.linear(tokens, attention.out.weight, attention.out.bias)
            F.linear(tokens, layer.mlp.fc1.weight, layer.mlp.fc1.bias)
            F.linear(inner, layer.mlp.fc2.weight, layer.mlp.fc2.bias)
        F.linear(one, pool_weights[0], pool_biases[0])
        F.linear(tokens, pool_weights[1], pool_biases[1])
        F.scaled_dot_product_attention(*pooling)
        F.linear(one, pool.attention.out_proj.weight, pool.attention.out_proj.bias)
        F.linear(one, pool.mlp.fc1.weight, pool.mlp.fc1.bias)
        F.linear(one_inner, pool.mlp.fc2.weight, pool.mlp.fc2.bias)

    return run


def timed(function: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high}


@torch.inference_mode()
def main() -> None:
    """Measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--window", type=int, default=16, help="frames in memory (16)")
    parser.add_argument("--repeats", type=int, default=40, help="pairs that are timed (40)")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model = build(options.window)
    fused = fuse(model)
    frames = torch.randn(1, options.window + 1, 3, 224, 224)
    expected, _ = step_after(model, frames)
    found, cache = step_after(fused, frames)
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if difference > 1e-5:
        raise SystemExit(f"folded and plain model differ by {difference:.1e} of the scale")
    frame = frames[:, -1:]
    del model

    functions = {
        "step": lambda: fused(frame, past_key_values=cache),
        "floor": floor(fused, options.window),
    }
    for function in functions.values():  # warm up
        for _ in range(3):
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(options.repeats):
        for name, function in functions.items():
            times[name].append(timed(function))
    ratios = [step / least for step, least in zip(times["step"], times["floor"], strict=True)]

    results = {name: spread(values) for name, values in times.items()} | {"ratio": spread(ratios)}
    print(f"{'':8}{'median':>10}{'lower':>10}{'upper':>10}   (quartiles)")
    for name, row in results.items():
        scale, unit = (1, "x") if name == "ratio" else (1e3, "ms")
        print(
            f"{name:8}" + "".join(f"{scale * value:10.3f}" for value in row.values()) + f"   {unit}"
        )
    print(
        json.dumps(
            {
                "benchmark": "streaming_step",
                "seconds": {name: results[name] for name in functions},
                "ratio": results["ratio"],
                "limit": LIMIT,
                "within_limit": results["ratio"]["median"] <= LIMIT,
                "difference_of_fused": difference,
                **vars(options),
                "torch": torch.__version__,
                "machine": platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
