"""What a whole clip costs beyond its arithmetic.

A clip of 16 frames through the base model (ViT-B/16 at 224 pixels, fp32, folded for inference)
takes turns with its floor (`floor.py`), in PyTorch's calls and in those that the model makes; the
result is the median of the ratios of neighbours.

    python benchmarks/clip_forward.py --threads 2 --repeats 8

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform

import torch
from floor import base_model, compare, floor, spread, table, take_turns

from backbone import fuse

LIMIT = 1.10  # of the floor, for one clip of 16 frames


@torch.inference_mode()
def main() -> None:
    """Measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--frames", type=int, default=16, help="frames of the clip (16)")
    parser.add_argument("--clips", type=int, default=1, help="clips in one batch (1)")
    parser.add_argument("--repeats", type=int, default=8, help="pairs that are timed (8)")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = fuse(base_model())
    clip = torch.randn(options.clips, options.frames, 3, 224, 224)
    functions = {
        "clip": lambda: model(clip),
        "floor": floor(model, options.clips, options.frames),
        "floor, own calls": floor(model, options.clips, options.frames, own=True),
    }
    times = take_turns(functions, options.repeats, warm_up=1)
    ratios = {f"clip / {name}": compare(times, "clip", name) for name in times if "floor" in name}
    print(table(times, ratios))
    print(
        json.dumps(
            {
                "benchmark": "clip_forward",
                "seconds": {name: spread(values) for name, values in times.items()},
                "ratios": ratios,
                "limit": LIMIT,
                "within_limit": ratios["clip / floor"]["median"] <= LIMIT,
                **vars(options),
                "torch": torch.__version__,
                "machine": platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
