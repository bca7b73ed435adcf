"""Checkpoints of a run: written whole or not at all, the last few kept, resumed exactly.

    <output>/checkpoints/00000500/   model.safetensors   weights of the whole model in training
                                     optimizer.pt        moments by weight, read with weights_only
                                     state.json          update, sampler, counted failures

There is no random state in them, by design: the sampler derives every draw from (seed, task,
round), and each update seeds torch from (seed, update, rank).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def save_checkpoint(
    folder: Path, weights: dict[str, Tensor], moments: dict, state: dict, keep: int
) -> Path:
    """Write the checkpoint of ``state["update"]`` into ``folder``; older ones but ``keep`` go."""
    final = folder / f"{state['update']:08d}"
    part = folder / f".{final.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    weights = {name: value.contiguous() for name, value in weights.items()}
    save_file(weights, part / "model.safetensors")
    torch.save(moments, part / "optimizer.pt")
    (part / "state.json").write_text(json.dumps(state, indent=2))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("[0-9]*") if (path / "state.json").is_file())


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict, dict]:
    """Weights, moments and the rest of the state, on the CPU."""
    weights = load_file(path / "model.safetensors")
    moments = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    return weights, moments, json.loads((path / "state.json").read_text())
