"""What int8 linears save in a streaming step, and what they cost in accuracy.

Both encoders stream the same frames; printed are the cosine similarities of what they give, and the
times of steps that take turns, with full memories. Without ``--encoder`` it is the base model
(ViT-B/16 at 224 pixels) with random weights, without ``--video`` noise.

    python benchmarks/int8_step.py --video clip.mp4 --frames 32
    python benchmarks/int8_step.py --encoder streamformer:<folder> --video clip.mp4

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
from floor import base_model, compare, read_clip, spread, table, take_turns
from torch.nn.functional import cosine_similarity

from backbone import StreamformerEncoder, VideoEncoder, build_encoder

LEAST_SPEEDUP, LEAST_COSINE = 1.5, 0.99


def build(spec: str | None, window: int, int8: bool) -> VideoEncoder:
    """The encoder asked for, or the base model with random weights."""
    if spec is None:
        return StreamformerEncoder(base_model(window), int8=int8)
    return build_encoder(spec, window=window, temporal_positions="cycle", int8=int8)


@torch.inference_mode()
def main() -> None:
    """Measure, print two tables and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--encoder", metavar="streamformer:SOURCE", help="default: random weights")
    parser.add_argument("--video", type=Path, help="default: noise")
    parser.add_argument("--frames", type=int, default=32, help="frames to compare (32)")
    parser.add_argument("--window", type=int, default=16, help="frames in memory (16)")
    parser.add_argument("--repeats", type=int, default=20, help="pairs that are timed (20)")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encoders = {
        name: build(options.encoder, options.window, name == "int8") for name in ("fp32", "int8")
    }
    clip = read_clip(options.video, options.frames, encoders["fp32"])
    streams = {name: encoder.stream() for name, encoder in encoders.items()}
    made = {
        name: [stream.push(frame) for frame in clip.unbind(1)] for name, stream in streams.items()
    }
    cosines = {}
    for part in ("frame_embeddings", "patch_tokens"):
        exact, found = (torch.cat([getattr(f, part) for f in made[n]], dim=1) for n in encoders)
        near = cosine_similarity(exact, found, dim=-1)
        cosines[part] = {"mean": near.mean().item(), "least": near.min().item()}
    del made
    frame = clip[:, -1]
    steps = {n: lambda s=s: s.push(frame).frame_embeddings for n, s in streams.items()}
    times = take_turns(steps, options.repeats)
    speedup = compare(times, "fp32", "int8")

    print(f"{'cosine to fp32':24}{'mean':>10}{'least':>10}")
    for part, near in cosines.items():
        print(f"{part:24}{near['mean']:10.5f}{near['least']:10.5f}")
    print(table(times, {"fp32 / int8": speedup}))
    print(
        json.dumps(
            {
                "benchmark": "int8_step",
                "cosine": cosines,
                "seconds": {name: spread(values) for name, values in times.items()},
                "speedup": speedup,
                "within_limits": speedup["median"] >= LEAST_SPEEDUP
                and cosines["frame_embeddings"]["least"] > LEAST_COSINE,
                **{name: str(value) for name, value in vars(options).items()},
                "torch": torch.__version__,
                "machine": platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
