"""A streaming encoder as one file for another runtime: the verb in front of ``backbone.export``."""

from __future__ import annotations

import argparse
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import preflight
from experiments.config import UserError
from experiments.report import say

if TYPE_CHECKING:
    from torch import Tensor

    from backbone import VideoEncoder

ABOUT = """\
The file holds one step: a frame of each stream, the positions of the streams and
their memory go in; patch tokens, frame embeddings, positions and memory come out.
A stream begins with zeros. Before it ends, the verb feeds the file as many frames
as turn its memory twice and compares every output with PyTorch's."""
EXAMPLES = """\
  python experiments/run.py export --encoder streamformer:FOLDER --to encoder.onnx
  python experiments/run.py export --encoder streamformer:FOLDER --to encoder.pt2 --window 16
  python experiments/run.py export --to cameras.onnx --streams 8 \\
      --encoder streamformer:StreamFormer/streamformer-timesformer"""

NEEDED = {".onnx": ("onnx", "onnxscript", "onnxruntime"), ".pt2": ()}  # suffix -> packages
LARGEST_DIFFERENCE = 1e-4  # of the output's scale


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add = parser.add_argument
    add("--encoder", required=True, metavar="streamformer:SOURCE", help="a folder or a hub id")
    add("--to", required=True, type=Path, metavar="FILE", help=".onnx, or .pt2 of torch.export")
    add("--streams", type=int, default=1, metavar="B", help="streams side by side, default 1")
    add("--window", type=int, metavar="FRAMES", help="frames a frame may see; default: its own")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Export, compare with PyTorch, and say on stdout what the file takes and gives."""
    preflight.refuse(_problems(args))
    from backbone import build_encoder

    logging.getLogger("onnx_ir").setLevel(logging.WARNING)  # it tells of every tensor it merges
    try:
        encoder = build_encoder(args.encoder, window=args.window)
        push = _write(encoder, args.to, args.streams)
    except ValueError as error:
        raise UserError(str(error)) from error
    steps = 2 * encoder.config.span + 1
    found = difference(encoder, push, args.streams, steps)
    if found > LARGEST_DIFFERENCE:
        raise UserError(
            f"{args.to} differs from PyTorch by {found:.1e} of the scale within {steps} frames, "
            f"more than {LARGEST_DIFFERENCE:g}; do not use it, and report the versions that "
            "python experiments/run.py env prints"
        )
    size = args.to.stat().st_size
    say(
        f"{args.to}: {preflight.size(size)}, {args.streams} x 3 x {encoder.image_size} x "
        f"{encoder.image_size} pixels a step, {encoder.config.span} frames of memory; "
        f"{steps} steps differ from PyTorch by {found:.1e} of the scale"
    )
    return {"bytes": size, "steps": steps, "difference": found}


def _problems(args: argparse.Namespace) -> list[str]:
    """What keeps the verb from starting."""
    found = preflight.encoder(args.encoder)
    if not args.encoder.startswith("streamformer:"):
        found.append(f"--encoder {args.encoder}: only a streamformer:… has a step to export")
    if args.to.suffix not in NEEDED:
        found.append(f"--to {args.to}: the name must end in {' or '.join(NEEDED)}")
    packages = NEEDED.get(args.to.suffix, ())
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        found.append(f'{args.to.suffix} needs {", ".join(missing)}: pip install -e ".[export]"')
    return found


def _write(
    encoder: VideoEncoder, path: Path, streams: int
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Write the file; returns what feeds it frames ``(B, 3, H, W)`` and keeps its memory."""
    import torch

    from backbone.export import OnnxStream, export_onnx, export_step
    from backbone.files import replacing

    if path.suffix == ".onnx":
        export_onnx(encoder.model, path, streams)
        return OnnxStream(path, torch.get_num_threads()).push
    with replacing(path) as temporary:
        torch.export.save(export_step(encoder.model, streams), temporary)
    program = torch.export.load(path)
    _, *state = program.example_inputs[0]
    step = program.module()

    def push(frames: Tensor) -> tuple[Tensor, Tensor]:
        tokens, embeddings, *state[:] = step(frames, *state)
        return tokens, embeddings

    return push


def difference(
    encoder: VideoEncoder,
    push: Callable[[Tensor], tuple[Tensor, Tensor]],
    streams: int,
    steps: int,
) -> float:
    """Largest difference between a file and the encoder over a stream of noise, of the scale.

    Args:
        encoder: in PyTorch.
        push: takes frames ``(B, 3, H, W)`` and gives patch tokens and embeddings.
        streams: ``B``.
        steps: frames of each stream.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    stream, largest = encoder.stream(streams), 0.0
    shape = (streams, 3, encoder.image_size, encoder.image_size)
    for _ in range(steps):
        frames = torch.randn(shape, generator=generator)
        features = stream.push(frames)
        expected = features.patch_tokens[:, 0], features.frame_embeddings[:, 0]
        for found, wanted in zip(push(frames), expected, strict=True):
            largest = max(largest, ((found - wanted).abs().max() / wanted.abs().max()).item())
    return largest
