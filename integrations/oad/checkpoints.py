"""MAT weights on disk: the released checkpoints, and our own files.

Released (MAT, and StreamFormer's ``online_action_detection/*.pt``): a torch file with ``epoch``,
``model_state_dict`` and ``optimizer_state_dict``. ``MatHead`` keeps the names of its weights, so
the table from their layout to ours is short:

    module.*             data-parallel prefix, removed if every key has it
    pos_encoding.pe      buffer (5000, 1, D), compared with the head's own positions, then dropped

Own: one safetensors file whose metadata holds the config and notes (JSON), so that a head can be
built again from this file alone.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbone.checkpoints import CheckpointError, load_strict
from integrations.oad.mat import MatHead
from integrations.oad.mat_config import MatConfig, Stack
from integrations.weights_file import WeightsFile

OWN = WeightsFile("streamformer-mat-1", "a MAT head", "for a released checkpoint use load_released")
POSITION_TABLE = "pos_encoding.pe"

# ----- released


def load_released(path: str | Path, config: MatConfig | None = None) -> MatHead:
    """Build a head in eval mode from a released checkpoint.

    Sizes are read off the shapes. Lengths, rates, groups, number of heads and activation leave no
    trace in them: they come from ``config``, by default those of THUMOS'14.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: a file that is damaged or is no MAT checkpoint, or that differs from
            ``config`` or from the model; fields and keys are named.
    """
    path = Path(path)
    state = _read_released(path)
    shapes_say = infer_fields(state, path)
    if config is None:
        try:
            config = MatConfig(**shapes_say)
        except ValueError as error:
            raise CheckpointError(
                f"{path} does not fit the lengths of THUMOS'14; pass its config. {error}"
            ) from error
    differing = [
        f"{name} is {getattr(config, name)} in the config, {value} in the file"
        for name, value in shapes_say.items()
        if getattr(config, name) != value
    ]
    if differing:
        raise CheckpointError(f"{path} was made with another config: " + "; ".join(differing))
    head = MatHead(config)
    table = state.pop(POSITION_TABLE, None)
    if table is not None:
        _check_positions(table, head, path)
    load_strict(head, state, path, layout="a released MAT checkpoint")
    return head.eval()


def infer_fields(state: Mapping[str, Tensor], source: object) -> dict[str, Any]:
    """Read the fields of ``MatConfig`` that leave a trace in a state dict's names and shapes.

    Raises CheckpointError, naming ``source`` and the keys, if it is not a MAT state dict.
    """
    visual, decoder = "feature_head_work.visual_linear.0.weight", "dec_modules.layers.0.linear1"
    missing = [k for k in (visual, f"{decoder}.weight", "classifier.weight") if k not in state]
    if missing:
        held = ", ".join(list(state)[:3]) or "nothing"
        raise CheckpointError(f"{source} is no MAT checkpoint: no {missing}; it holds {held}, …")

    def size(key: str, axis: int) -> int:
        """Rows (0) or columns (1) of a weight, 0 where there is none."""
        if key not in state:
            return 0
        if state[key].ndim != 2:
            raise CheckpointError(f"{source}: {key} is {tuple(state[key].shape)}, not a matrix")
        return state[key].shape[axis]

    def count(prefix: str) -> int:
        """Number of modules in a list."""
        numbers = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", key) for key in state)
        return len({number[1] for number in numbers if number})

    def stack(prefix: str, query: str | None = None) -> Stack:
        queries = size(f"{query}.weight", 0) if query else 0
        return Stack(queries or -1, count(f"{prefix}.layers"), f"{prefix}.norm.weight" in state)

    fields = {
        "visual_size": size(visual, 1),
        "motion_size": size("feature_head_work.motion_linear.0.weight", 1),
        "num_classes": size("classifier.weight", 0),
        "num_verbs": size("classifier_verb.weight", 0),
        "num_nouns": size("classifier_noun.weight", 0),
        "dim": size(visual, 0),
        "feedforward": size(f"{decoder}.weight", 0),
        "work_stack": stack("dec_modules"),
        "future_tokens": size("final_query.weight", 0),
    }
    if stages := count("enc_modules"):
        fields["memory_stages"] = tuple(
            stack(f"enc_modules.{i}", f"enc_queries.{i}") for i in range(stages)
        )
    else:
        fields["long_steps"] = 0
    if fields["future_tokens"]:
        fields["refinements"] = count("work_fusions")
        fields["generator"] = stack("gen_layer", "gen_query")
        fields["future_stack"] = stack("work_fusions.0", "final_query")
    else:
        fields["anticipation_steps"] = 0
    return fields


def _read_released(path: Path) -> dict[str, Tensor]:
    # Mapped where the format allows, so the optimiser's state, twice the weights, is not read.
    mapped = zipfile.is_zipfile(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is damaged or holds more than plain tensors:"
            f" {error}"
        ) from error
    state = content
    if isinstance(content, Mapping) and "model_state_dict" in content:
        state = content["model_state_dict"]
    tensors = isinstance(state, Mapping) and all(isinstance(v, Tensor) for v in state.values())
    if not tensors:
        held = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content)
        raise CheckpointError(f"{path} has no state dict under 'model_state_dict'; it holds {held}")
    if state and all(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): value for key, value in state.items()}
    return dict(state)


def _check_positions(table: Tensor, head: MatHead, path: Path) -> None:
    tokens, dim = head.positions.shape
    if table.ndim != 3 or table.shape[0] < tokens or table.shape[1:] != (1, dim):
        expected = f"(at least {tokens}, 1, {dim})"
        raise CheckpointError(f"{path}: {POSITION_TABLE} is {tuple(table.shape)}, not {expected}")
    distance = (table[:tokens, 0] - head.positions).abs().max().item()
    if not distance < 1e-4:
        raise CheckpointError(
            f"{path}: {POSITION_TABLE} is not the sinusoid table of MAT, it differs by {distance:g}"
        )


# ----- own


def save_head(head: MatHead, path: str | Path, notes: Mapping[str, Any] | None = None) -> None:
    """Write weights, config and ``notes`` (JSON-able: classes, ignored column, …) to one file."""
    OWN.save(path, head.state_dict(), notes, config=head.config.to_dict())


def load_head(path: str | Path) -> MatHead:
    """Build a head in eval mode from a file of ``save_head``.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: a file that is damaged, is not one of ours, or whose weights and config
            do not agree; keys are named.
    """
    records, state = OWN.read(path)
    try:
        config = MatConfig.from_dict(records["config"])
    except ValueError as error:
        raise CheckpointError(f"{path}: its config does not hold: {error}") from error
    head = MatHead(config)
    load_strict(head, state, path, layout="a MAT head")
    return head.eval()


def read_notes(path: str | Path) -> dict[str, Any]:
    """Return what ``save_head`` was told to note; errors as ``load_head``."""
    return OWN.notes(path)
