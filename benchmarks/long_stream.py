"""Whether a long stream stays as cheap as it began.

A tiny model with a window of 16 frames takes 100,000 frames one by one. Afterwards the resident
memory is compared with that after the warm-up of 100 steps, and the median time of the last 1,000
steps with that of the 1,000 after the warm-up. Steps of this size are all overhead, so whatever
grows with the stream shows here first.

    python benchmarks/long_stream.py --frames 100000

Timed is CPU time of the process, on one thread: a busy machine hardly blurs it. The last line of
stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from array import array

import psutil
import torch

from backbone import StreamformerConfig, StreamformerModel, fuse

WARM_UP, TIMED = 100, 1000
MEMORY_LIMIT, TIME_LIMIT = 1.01, 1.05


@torch.inference_mode()
def main() -> None:
    """Measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--frames", type=int, default=100_000, help="frames of the stream (100000)")
    parser.add_argument("--window", type=int, default=16, help="frames in memory (16)")
    options = parser.parse_args()
    if options.frames < WARM_UP + 2 * TIMED:
        parser.error(f"--frames {options.frames}: at least {WARM_UP + 2 * TIMED}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = StreamformerConfig(
        image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=128, window=options.window, temporal_positions="cycle",
    )  # fmt: skip
    model = fuse(StreamformerModel(config))
    frames = torch.randn(1, 64, 3, 32, 32)
    process, cache = psutil.Process(), model.new_cache(1, (4, 4))
    held, resident = cache.memory_bytes, []
    times = array("d", bytes(8 * options.frames))  # in full before the start: a list would grow
    for step in range(options.frames):
        if step in (WARM_UP, options.frames - 1):
            resident.append(process.memory_info().rss)
        begun = time.process_time()
        model(frames[:, step % 64, None], past_key_values=cache)
        times[step] = time.process_time() - begun
    memory_before, memory_after = resident
    first = statistics.median(times[WARM_UP : WARM_UP + TIMED])
    last = statistics.median(times[-TIMED:])
    if cache.memory_bytes != held:
        raise SystemExit(f"the memory of the stream grew from {held} to {cache.memory_bytes} bytes")

    print(f"{'':24}{'begin':>10}{'end':>10}{'ratio':>8}{'limit':>8}")
    for name, before, after, limit in (
        ("resident memory, MiB", memory_before / 2**20, memory_after / 2**20, MEMORY_LIMIT),
        ("median step, CPU ms", 1e3 * first, 1e3 * last, TIME_LIMIT),
    ):
        print(f"{name:24}{before:10.3f}{after:10.3f}{after / before:8.3f}{limit:8.2f}")
    print(
        json.dumps(
            {
                "benchmark": "long_stream",
                "memory_ratio": memory_after / memory_before,
                "time_ratio": last / first,
                "within_limits": memory_after <= MEMORY_LIMIT * memory_before
                and last <= TIME_LIMIT * first,
                "cache_bytes": held,
                **vars(options),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
