"""What a forward pass cannot do without: its linears and its attention calls, and nothing else.

The floor of a pass is the time of these alone, with the model's own weights, on contiguous tensors
of the same shapes; every layer reads keys and values of its own, as it does weights. What lies
between a pass and its floor is ours to answer for: norms, activations, residuals, layout, memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone import StreamformerConfig, StreamformerModel


def base_model(window: int | None = None, **fields: object) -> StreamformerModel:
    """ViT-B/16 with random weights; gates open, or half of it would be left unproven."""
    torch.manual_seed(0)
    # "cycle": the memory stays full, where the default policy would empty it every 16 frames.
    settings = {"window": window, "temporal_positions": "cycle", "lora_rank": 32} | fields
    model = StreamformerModel(StreamformerConfig(**settings)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "gate" in name or "lora_" in name or "time_embedding" in name:
                weight.normal_(std=0.1)
    return model


def floor(
    model: StreamformerModel, batch: int = 1, frames: int = 1, keys: int | None = None
) -> Callable[[], None]:
    """The linears and attention calls of a folded model, for ``frames`` new frames of each clip.

    Args:
        model: folded by ``fuse``.
        batch: clips or streams ``B``.
        frames: new frames ``T``.
        keys: frames ``S`` that the newest one sees; None for a whole clip, causal over ``T``.
    """
    config = model.config
    width, heads, depth = config.hidden_size, config.num_attention_heads, config.head_dim
    patches, pictures = model.embeddings.grid**2, batch * frames
    tokens = torch.randn(pictures * patches, width)
    inner = torch.randn(pictures * patches, config.intermediate_size)
    pixels = torch.randn(pictures * patches, model.embeddings.patch_embedding.weight[0].numel())

    def heads_of(rows: int, length: int) -> Tensor:
        return torch.randn(rows, heads, length, depth)

    query = heads_of(batch * patches, frames)
    memory = [[heads_of(batch * patches, keys or frames) for _ in range(2)] for _ in model.layers]
    spatial = [heads_of(pictures, patches) for _ in range(3)]
    patch = (
        model.embeddings.patch_embedding.weight.flatten(1),
        model.embeddings.patch_embedding.bias,
    )

    def run() -> None:
        F.linear(pixels, *patch)
        for layer, keys_values in zip(model.layers, memory, strict=True):
            for attention, inputs in (
                (layer.temporal_attention, (query, *keys_values)),
                (layer.spatial_attention, spatial),
            ):
                causal = attention is layer.temporal_attention and keys is None
                F.linear(tokens, attention.qkv.weight, attention.qkv.bias)
                F.scaled_dot_product_attention(*inputs, is_causal=causal)
                F.linear(tokens, attention.out.weight, attention.out.bias)
            F.linear(tokens, layer.mlp.fc1.weight, layer.mlp.fc1.bias)
            F.linear(inner, layer.mlp.fc2.weight, layer.mlp.fc2.bias)
        pool(model.head)

    seen = tokens.view(pictures, patches, width)
    one, one_inner = tokens[:pictures], inner[:pictures]

    def pool(head: torch.nn.Module) -> None:
        scores = F.linear(seen, head.query)  # (B*T, N, A)
        torch.bmm(scores.transpose(1, 2), seen)
        F.linear(one, *head.projections()[2])
        F.linear(one, head.attention.out_proj.weight, head.attention.out_proj.bias)
        F.linear(one, head.mlp.fc1.weight, head.mlp.fc1.bias)
        F.linear(one_inner, head.mlp.fc2.weight, head.mlp.fc2.bias)

    return run


def take_turns(
    functions: dict[str, Callable[[], object]], repeats: int, warm_up: int = 3
) -> dict[str, list[float]]:
    """Seconds of ``repeats`` calls of each; they take turns, so that a busy machine slows all."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warm_up + repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - start)
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high}


def compare(times: dict[str, list[float]], name: str, base: str) -> dict[str, float]:
    """Median and quartiles of the ratios of neighbours, ``name`` to ``base``."""
    return spread([one / two for one, two in zip(times[name], times[base], strict=True)])


def table(times: dict[str, list[float]], ratios: dict[str, dict[str, float]]) -> str:
    """Milliseconds and ratios as a table for the terminal."""
    lines = [f"{'':24}{'median':>10}{'lower':>10}{'upper':>10}   (quartiles)"]
    rows = [(name, spread(values), 1e3, "ms") for name, values in times.items()]
    rows += [(name, ratio, 1, "x") for name, ratio in ratios.items()]
    for name, row, scale, unit in rows:
        numbers = "".join(f"{scale * value:10.3f}" for value in row.values())
        lines.append(f"{name:24}{numbers}   {unit}")
    return "\n".join(lines)
