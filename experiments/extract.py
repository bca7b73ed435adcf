"""Features for a folder of videos: the verb in front of ``integrations.oad.features``."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from experiments import preflight
from experiments.config import UserError
from experiments.report import say

logger = logging.getLogger(__name__)

ABOUT = """\
One .npy per video, float32, one row per step (a chunk of frames), with a .json
beside it that says how it was made. "stream" reads a video in one pass with the
encoder's memory; "clip" encodes each chunk alone, as the released features were.
Goes on where it stopped; under torchrun the videos are shared among processes."""
EXAMPLES = """\
  python experiments/run.py extract videos/ features/ --encoder streamformer:/weights/mine
  python experiments/run.py extract videos/ features/ --protocol clip --device cuda \\
      --encoder streamformer:StreamFormer/streamformer-timesformer
  torchrun --nproc-per-node 4 experiments/run.py extract videos/ features/ --device cuda \\
      --encoder siglip:google/siglip-base-patch16-224"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add = parser.add_argument
    add("videos", type=Path, help="folder of videos")
    add("out", type=Path, help="folder of features, made if need be")
    add("--encoder", required=True, metavar="KIND:SOURCE", help="source: a folder or a hub id")
    add("--protocol", choices=("stream", "clip"), default="stream", help="default: stream")
    add("--window", type=int, metavar="FRAMES", help="frames a frame may see; default: its own")
    add("--video-fps", type=float, default=24, help="rate at which videos are read, default 24")
    add("--chunk-frames", type=int, default=6, help="frames per step, default 6: 4 steps a second")
    add("--overwrite", action="store_true", help="make features anew that are there")
    add(
        "--max-failed-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of videos that may fail, default 0; all failures are listed",
    )
    add(
        "--device", default="auto", help="auto (the default), cpu, cuda; under torchrun its own GPU"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Extract, and say on stdout how many videos were done, reused and failed."""
    problems = preflight.encoder(args.encoder)
    if problems:
        raise UserError(problems[0])
    from backbone import build_encoder
    from experiments.environment import choose_device
    from integrations.oad.features import FeatureError, extract_folder

    try:
        encoder = build_encoder(args.encoder, window=args.window, device=choose_device(args.device))
        report = extract_folder(
            args.videos,
            encoder,
            args.out,
            args.protocol,
            video_fps=args.video_fps,
            chunk_frames=args.chunk_frames,
            overwrite=args.overwrite,
            max_failed_share=args.max_failed_share,
        )
    except (FeatureError, ValueError) as error:
        raise UserError(str(error)) from error
    result = {"done": report.done, "reused": report.reused, "failed": report.failed}
    counts = ", ".join(f"{len(names)} {what}" for what, names in result.items())
    say(f"{args.out}: {counts}")
    return result
