"""What a forward pass cannot do without: its linears and its attention calls, and nothing else.

The floor of a pass is the time of these alone, with the model's own weights, on contiguous tensors
of the same shapes; every layer reads keys and values of its own, as it does weights. What lies
between a pass and its floor is ours to answer for: norms, activations, residuals, layout, memory.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone import StreamformerConfig, StreamformerModel, VideoEncoder
from backbone.fusion import FoldedLinear
from backbone.modeling import Attention
from backbone.video import open_video, preprocess


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


def read_clip(video: Path | None, count: int, encoder: VideoEncoder, fps: float = 8) -> Tensor:
    """``count`` frames of a video, or fewer, as the encoder takes them, or noise.

    Returns:
        ``(1, T, 3, H, W)``.
    """
    if video is None:
        return torch.randn(1, count, 3, encoder.image_size, encoder.image_size)
    with open_video(video, fps=fps) as reader:
        images = np.stack([frame.image for frame in itertools.islice(reader, count)])
    return preprocess(images, encoder.image_size, encoder.image_mean, encoder.image_std)[None]


def floor(
    model: StreamformerModel,
    batch: int = 1,
    frames: int = 1,
    keys: int | None = None,
    own: bool = False,
) -> Callable[[], None]:
    """The linears and attention calls of a folded model, for ``frames`` new frames of each clip.

    Args:
        model: folded by ``fuse``.
        batch: clips or streams ``B``.
        frames: new frames ``T``.
        keys: frames ``S`` that the newest one sees; None for a whole clip, causal over ``T``.
        own: call what the folded model calls, instead of ``F.linear`` and
            ``F.scaled_dot_product_attention``: a lower floor where it knows faster ones.
    """
    config, head = model.config, model.head
    width, inner_width = config.hidden_size, config.intermediate_size
    patches, pictures = model.embeddings.grid**2, batch * frames
    rows = pictures * patches
    calls: list[Callable[[], object]] = []

    def linear(module: nn.Linear, tokens: Tensor) -> None:
        folded = FoldedLinear(module)
        weights = module.weight, module.bias
        calls.append((lambda: folded(tokens)) if own else (lambda: F.linear(tokens, *weights)))

    def attention(module: Attention, inputs: list[Tensor], causal: bool = False) -> None:
        calls.append(
            (lambda: module.attend(*inputs, None, causal))
            if own
            else (lambda: F.scaled_dot_product_attention(*inputs, is_causal=causal))
        )

    def heads(count: int, *lengths: int) -> list[Tensor]:
        shape = config.num_attention_heads, config.head_dim
        return [torch.randn(count, shape[0], length, shape[1]) for length in lengths]

    tokens, inner = torch.randn(rows, width), torch.randn(rows, inner_width)
    patch = model.embeddings.patch_embedding
    pixels = torch.randn(rows, patch.weight[0].numel())
    calls.append(lambda: F.linear(pixels, patch.weight.flatten(1), patch.bias))
    spatial = heads(pictures, patches, patches, patches)
    seen = keys or frames
    for layer in model.layers:
        for module, inputs in (
            (layer.temporal_attention, heads(batch * patches, frames, seen, seen)),
            (layer.spatial_attention, spatial),
        ):
            linear(module.qkv, tokens)
            attention(module, inputs, causal=keys is None and module is layer.temporal_attention)
            linear(module.out, tokens)
        linear(layer.mlp.fc1, tokens)
        linear(layer.mlp.fc2, inner)

    by_picture = tokens.view(pictures, patches, width)
    pooled, pooled_inner = tokens[:pictures], inner[:pictures]
    calls.append(lambda: F.linear(by_picture, head.query).mT @ by_picture)
    calls.append(lambda: F.linear(pooled, *head.projections()[2]))
    linear(head.attention.out_proj, pooled)
    linear(head.mlp.fc1, pooled)
    linear(head.mlp.fc2, pooled_inner)

    def run() -> None:
        for call in calls:
            call()

    return run


def take_turns(
    functions: dict[str, Callable[[], object]], repeats: int, warm_up: int = 3
) -> dict[str, list[float]]:
    """Seconds of ``repeats`` calls of each; they take turns, so that a busy machine slows all.

    With one thread it is CPU time, which a busy machine hardly blurs.

    Raises:
        SystemExit: too few repeats to tell quartiles of; before anything is called.
    """
    if repeats < 2:
        raise SystemExit(f"--repeats {repeats}: quartiles want 2 or more")
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warm_up + repeats):
        for name, function in functions.items():
            start = clock()
            function()
            if turn >= warm_up:
                times[name].append(clock() - start)
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
