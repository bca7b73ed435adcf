"""Checkpoints of a run: written whole or not at all, the last few kept, resumed exactly.

    <output>/checkpoints/00000500/   model.safetensors   weights of the whole model in training
                                     optimizer.pt        moments, read with weights_only
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
from torch import nn


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict, keep: int
) -> Path:
    """Write the checkpoint of ``state["update"]`` into ``folder``; older ones but ``keep`` go."""
    final = folder / f"{state['update']:08d}"
    part = folder / f".{final.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, part / "model.safetensors")
    torch.save(optimizer.state_dict(), part / "optimizer.pt")
    (part / "state.json").write_text(json.dumps(state, indent=2))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("[0-9]*") if (path / "state.json").is_file())


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Load weights and moments in place; returns the rest of the state."""
    model.load_state_dict(load_file(path / "model.safetensors"))
    moments = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(moments)
    return json.loads((path / "state.json").read_text())
