"""What skipping still patches saves on a video, and what it costs in accuracy.

An encoder streams the same frames exactly and with each threshold (`backbone/still.py`), frame by
frame and in turns; a speed is the median of the ratios of neighbours. Without ``--encoder`` it is
the base model (ViT-B/16 at 224 pixels) with random weights. The frames are those of a video, or
what miniworld's camera sees where it stands still and its shapes rest most of the time, or the same
noise over and over.

    python benchmarks/still_scene.py --frames 48
    python benchmarks/still_scene.py --video clip.mp4 --thresholds 0 0.1 0.2
    python benchmarks/still_scene.py --surveillance --frames 128 --thresholds 0 0.1 0.2

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch
from floor import base_model, compare, read_clip, spread, take_turns
from torch import Tensor
from torch.nn.functional import cosine_similarity

from backbone import StreamformerEncoder, StreamformerModel
from experiments.miniworld.actions import ACTIONS
from experiments.miniworld.params import WorldParams
from experiments.miniworld.scene import Camera, draw
from experiments.miniworld.script import actions_for, deal, write_script
from experiments.miniworld.writers import write_video


def write_surveillance(path: Path, frames: int, size: int, seed: int = 0) -> None:
    """A video of miniworld by a camera that stands still, before shapes that mostly rest.

    Texture, sensor noise, frame rate and compression are those of any of its videos; the camera
    neither shakes nor flickers nor cuts, and at four fifths of the time nothing moves.
    """
    params = WorldParams(frame_size=size, background=(0.8, 0.8), scene_frames=(10**6, 10**6))
    rng = Random(seed)
    (actions,) = deal(rng, list(ACTIONS), [actions_for(frames, params)])
    (scene,) = write_script(rng, frames, actions, params, shapes=(3,)).scenes
    camera = Camera(size, noise=params.noise)
    pixels = np.random.default_rng(seed)
    pictures, _ = draw(scene.items, scene.tracks, scene.background, camera, pixels)
    write_video(path, pictures, params.fps, params.crf)


def stream(encoder: StreamformerEncoder, clip: Tensor) -> tuple[Tensor, float]:
    """Frame embeddings ``(T, D)`` and the share of patches that ran, of a stream from its start."""
    ran: list[int] = []
    watch = encoder.model.layers[0].register_forward_hook(
        lambda layer, inputs, output: ran.append(inputs[0].shape[2])
    )
    running = encoder.stream()
    made = [running.push(frame).frame_embeddings[0] for frame in clip.unbind(1)]
    watch.remove()
    patches = clip.shape[-1] * clip.shape[-2] // encoder.patch_size**2
    return torch.cat(made), sum(ran) / (patches * clip.shape[1])


@torch.inference_mode()
def main() -> None:
    """Measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--encoder", metavar="FOLDER", help="a StreamFormer; default: random")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--video", type=Path, help="default: the same noise over and over")
    source.add_argument("--surveillance", action="store_true", help="a clip of miniworld")
    parser.add_argument("--fps", type=float, default=8, help="frames per second read (8)")
    parser.add_argument("--frames", type=int, default=48, help="frames (48)")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.0])
    parser.add_argument("--repeats", type=int, default=3, help="turns that are timed (3)")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.encoder:
        model = StreamformerModel.from_pretrained(
            options.encoder, temporal_positions="reset", window=None
        )
    else:
        model = base_model(temporal_positions="reset")
    exact = StreamformerEncoder(model)
    with tempfile.TemporaryDirectory() as folder:
        video = options.video
        if options.surveillance:
            video = Path(folder) / "surveillance.mp4"
            write_surveillance(video, options.frames, exact.image_size)
        clip = read_clip(video, options.frames, exact, options.fps)
    if video is None:
        clip = clip[:, :1].expand_as(clip)
    encoders = {"exact": exact}
    encoders |= {str(t): StreamformerEncoder(model, still=t) for t in options.thresholds}
    made: dict[str, tuple[Tensor, float]] = {}

    def turn(name: str) -> None:
        made[name] = stream(encoders[name], clip)

    for encoder in encoders.values():
        stream(encoder, clip[:, : model.config.num_frames + 1])  # warm up
    times = take_turns({name: partial(turn, name) for name in encoders}, options.repeats, warm_up=0)
    expected, _ = made["exact"]
    rows = []
    for threshold in options.thresholds:
        found, share = made[str(threshold)]
        cosine = cosine_similarity(found, expected, dim=-1)
        rows.append(
            {
                "threshold": threshold,
                "speedup": compare(times, "exact", str(threshold)),
                "patches_run": share,
                "difference": ((found - expected).abs().max() / expected.abs().max()).item(),
                "cosine": {"mean": cosine.mean().item(), "least": cosine.min().item()},
            }
        )
    seconds = spread(times["exact"])
    print(f"exact: {1e3 * seconds['median'] / clip.shape[1]:.1f} ms a frame")
    print(
        f"{'threshold':>10}{'faster':>9}{'(quartiles)':>15}{'patches':>9}"
        f"{'difference':>12}{'cosine':>10}{'least':>10}"
    )
    for row in rows:
        speedup = row["speedup"]
        quartiles = f"{speedup['low']:.2f} to {speedup['high']:.2f}"
        print(
            f"{row['threshold']:10.3f}{speedup['median']:8.2f}x{quartiles:>15}"
            f"{row['patches_run']:9.1%}"
            f"{row['difference']:12.1e}{row['cosine']['mean']:10.5f}{row['cosine']['least']:10.5f}"
        )
    print(
        json.dumps(
            {
                "benchmark": "still_scene",
                "exact_seconds": seconds,
                "rows": rows,
                **{name: str(value) for name, value in vars(options).items()},
                "torch": torch.__version__,
                "machine": platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
