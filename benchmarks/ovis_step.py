"""What a step of video instance segmentation costs at full size: time and peak memory.

ViT-B/16 at 224 pixels with LoRA of rank 32, ViT-Adapter, Mask2Former head of 100 queries and 9
layers, 12544 points, all with random weights. Three steps are measured, each in a process of its
own, so that each has its own peak:

    train frozen      a training step; the encoder, folded, runs without gradients
    train through     a training step with gradients through the encoder to its LoRA, as released
    infer             one frame: stream, adapter, head, tracker

Before any timing, both encoders must give the same maps, and the stream those of the clip.

    python benchmarks/ovis_step.py --threads 2 --frames 2 --repeats 3

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backbone import StreamformerConfig, StreamformerEncoder, StreamformerModel
from integrations.ovis.adapter import AdapterConfig, ViTAdapter, adapt_clip
from integrations.ovis.contrastive import ContrastiveConfig, contrastive_losses, pad_instances
from integrations.ovis.criterion import ClipTargets, FrameTargets, LossConfig, supervise
from integrations.ovis.head import HeadConfig, SegmentationHead
from integrations.ovis.tracker import OnlineTracker

STEPS = ("train frozen", "train through", "infer")
CLASSES, SIDE, RANK = 40, 224, 32
TO_MIB = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, else in KiB


def build(fused: bool) -> tuple[StreamformerEncoder, ViTAdapter, SegmentationHead]:
    """Encoder, adapter and head; gates open and adapters at work, or they would prove nothing."""
    torch.manual_seed(0)
    model = StreamformerModel(StreamformerConfig(lora_rank=RANK))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "gate" in name or "lora_" in name or "time_embedding" in name:
                weight.normal_(std=0.02)
    encoder = StreamformerEncoder(model, fused=fused)
    if not fused:
        for name, weight in encoder.named_parameters():
            weight.requires_grad_("lora_" in name)
    adapter = ViTAdapter(AdapterConfig.for_encoder(encoder))
    head = SegmentationHead(HeadConfig(in_channels=encoder.embed_dim, num_classes=CLASSES))
    return encoder, adapter, head


def targets(frames: int) -> FrameTargets:
    """Three squares that drift, in one clip."""
    masks = torch.zeros(3, frames, SIDE, SIDE, dtype=torch.bool)
    for instance in range(3):
        for frame in range(frames):
            start = 10 + 60 * instance + 2 * frame
            masks[instance, frame, start : start + 40, start : start + 40] = True
    return FrameTargets.of([ClipTargets(torch.arange(3), masks)])


def training_step(frames: int, through: bool) -> Callable[[], None]:
    """One update on a clip."""
    encoder, adapter, head = build(fused=not through)
    adapter.train()
    head.train()
    modules = (encoder, adapter, head)
    weights = [w for module in modules for w in module.parameters() if w.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.05, fused=True)
    clip, wanted = torch.randn(1, frames, 3, SIDE, SIDE), targets(frames)

    def step() -> None:
        optimiser.zero_grad()
        output = head(adapt_clip(encoder, adapter, clip, gradients=through))
        losses, queries = supervise(output, wanted, LossConfig())
        matches = pad_instances(wanted.by_clip(queries))
        embeddings = output.query_embeddings.unflatten(0, (1, frames))
        rules = ContrastiveConfig()
        losses |= contrastive_losses(embeddings, matches, rules).weighted(rules)
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(weights, 0.01)
        optimiser.step()

    return step


def inference_step() -> Callable[[], None]:
    """The next frame of a stream."""
    encoder, adapter, head = build(fused=True)
    adapter.eval()
    head.eval()
    stream, tracker = encoder.stream(layers=adapter.taps), OnlineTracker()
    frame = torch.randn(1, 1, 3, SIDE, SIDE)

    @torch.inference_mode()
    def step() -> None:
        output = head(adapter(frame, stream.push(frame).layers))
        tracker.push(output.class_logits[0], output.mask_logits[0], output.query_embeddings[0])

    return step


def measure(step: str, frames: int, repeats: int, threads: int) -> dict[str, Any]:
    """Seconds of each repeat and the peak memory of this process, in MiB."""
    torch.set_num_threads(threads)
    run = inference_step() if step == "infer" else training_step(frames, step == "train through")
    run()  # warm up
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / TO_MIB
    return {
        "median_seconds": statistics.median(seconds),
        "seconds": seconds,
        "frames": 1 if step == "infer" else frames,
        "peak_mib": round(peak),
    }


@torch.no_grad()
def check(threads: int) -> float:
    """Largest difference, as a share of the scale, between the ways to the same maps."""
    torch.set_num_threads(threads)
    clip = torch.randn(1, 2, 3, SIDE, SIDE)
    encoder, adapter, _ = build(fused=False)
    adapter.eval()
    through = adapt_clip(encoder, adapter, clip, gradients=True)
    encoder, *_ = build(fused=True)
    frozen = adapt_clip(encoder, adapter, clip)
    stream = encoder.stream(layers=adapter.taps)
    streamed = [adapter(frame, stream.push(frame).layers) for frame in clip.split(1, dim=1)]

    def distance(one: Tensor, other: Tensor) -> float:
        return ((one - other).abs().max() / one.abs().max()).item()

    return max(
        max(
            distance(level, frozen[name]),
            distance(level, torch.cat([maps[name] for maps in streamed])),
        )
        for name, level in through.items()
    )


def main() -> None:
    """Measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--frames", type=int, default=2, help="frames of the training clip (2)")
    parser.add_argument("--repeats", type=int, default=3, help="steps that are timed (3)")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (2)")
    options = parser.parse_args()

    context = multiprocessing.get_context("spawn")

    def apart(function: Callable[..., Any], *arguments: Any) -> Any:
        with context.Pool(1) as pool:
            return pool.apply(function, arguments)

    difference = apart(check, options.threads)
    if difference > 1e-4:
        raise SystemExit(f"clip, folded clip and stream differ by {difference:.1e} of the scale")
    results = {
        step: apart(measure, step, options.frames, options.repeats, options.threads)
        for step in STEPS
    }
    print(f"{'':16}{'frames':>8}{'seconds':>10}{'peak MiB':>10}")
    for step, row in results.items():
        print(f"{step:16}{row['frames']:8}{row['median_seconds']:10.2f}{row['peak_mib']:10}")
    print(
        json.dumps(
            {
                "benchmark": "ovis_step",
                "steps": results,
                "difference": difference,
                **vars(options),
                "torch": torch.__version__,
                "machine": platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
