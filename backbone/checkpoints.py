"""Weights from elsewhere: SigLIP image towers and released StreamFormer checkpoints.

Each foreign layout is data first: what is renamed, what is created here (with its starting value),
what is dropped (with the reason). One function applies a table, one loads the result strictly; a
file that does not fit is refused with the keys that tell why.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import cached_file

from .configuration import StreamformerConfig
from .lora import add_lora
from .modeling import StreamformerModel

logger = logging.getLogger(__name__)

# -- the tables -----------------------------------------------------------------------------------

# Released StreamFormer layout -> ours, as prefixes of keys; "#" stands for a layer number.
RELEASED_RENAMES = {
    "embeddings.patch_embeddings.projection.": "embeddings.patch_embedding.",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "embeddings.time_embeddings": "embeddings.time_embedding",
    "encoder.layer.#.temporal_layernorm.": "layers.#.temporal_norm.",
    "encoder.layer.#.temporal_attention.attention.qkv.": "layers.#.temporal_attention.qkv.",
    "encoder.layer.#.temporal_attention.output.dense.": "layers.#.temporal_attention.out.",
    "encoder.layer.#.temporal_dense.": "layers.#.temporal_dense.",
    "encoder.layer.#.temporal_attention_gating": "layers.#.temporal_gate",
    "encoder.layer.#.layernorm_before.": "layers.#.spatial_norm.",
    "encoder.layer.#.attention.attention.qkv.": "layers.#.spatial_attention.qkv.",
    "encoder.layer.#.attention.output.dense.": "layers.#.spatial_attention.out.",
    "encoder.layer.#.layernorm_after.": "layers.#.mlp_norm.",
    "encoder.layer.#.intermediate.dense.": "layers.#.mlp.fc1.",
    "encoder.layer.#.output.dense.": "layers.#.mlp.fc2.",
    "post_layernorm.": "post_layernorm.",
    "head.": "head.",
}

# LoRA of the released layout -> the names that PEFT gives to the same matrices.
RELEASED_LORA = {
    f"encoder.layer.#.attention.{theirs}_lora_{low}.": (
        f"layers.#.spatial_attention.{ours}.lora_{high}.default."
    )
    for theirs, ours in (("attention.qkv", "qkv"), ("output.dense", "out"))
    for low, high in (("a", "A"), ("b", "B"))
}

RELEASED_DROPS = {
    "encoder.layer.#.temporal_attention.attention.mask": "a buffer that no forward pass reads",
    "text_encoder.": "the frozen text tower of pretraining",
    "logit_scale": "a scalar of the pretraining loss",
    "logit_bias": "a scalar of the pretraining loss",
    "task_heads.": "heads of pretraining",
}

# SigLIP image tower -> ours; its separate q, k and v projections are joined in this order.
SIGLIP_RENAMES = {
    "embeddings.patch_embedding.": "embeddings.patch_embedding.",
    "embeddings.position_embedding.weight": "embeddings.position_embedding",
    "encoder.layers.#.layer_norm1.": "layers.#.spatial_norm.",
    "encoder.layers.#.self_attn.q_proj.": "layers.#.spatial_attention.qkv.0.",
    "encoder.layers.#.self_attn.k_proj.": "layers.#.spatial_attention.qkv.1.",
    "encoder.layers.#.self_attn.v_proj.": "layers.#.spatial_attention.qkv.2.",
    "encoder.layers.#.self_attn.out_proj.": "layers.#.spatial_attention.out.",
    "encoder.layers.#.layer_norm2.": "layers.#.mlp_norm.",
    "encoder.layers.#.mlp.fc1.": "layers.#.mlp.fc1.",
    "encoder.layers.#.mlp.fc2.": "layers.#.mlp.fc2.",
    "post_layernorm.": "post_layernorm.",
    "head.": "head.",
}

SIGLIP_DROPS = {
    "text_model.": "the text tower",
    "logit_scale": "a scalar of the image-text loss",
    "logit_bias": "a scalar of the image-text loss",
    "embeddings.position_ids": "a buffer of old files; positions follow from the grid",
}

# What an image tower lacks. Gates and time table start at zero, so that the lifted model is the
# image encoder; the rest of the temporal branch starts as a fresh model's.
LIFT_CREATES = (
    r"embeddings\.time_embedding|layers\.\d+\.temporal_gate"
    r"|layers\.\d+\.temporal_(norm|attention\.(qkv|out)|dense)\.(weight|bias)"
)

# Released config keys -> ours, where the name differs. Others of the same name are taken over.
RELEASED_CONFIG = {"enable_causal_temporal": "causal"}


class CheckpointError(ValueError):
    """A checkpoint that is damaged or is not what it was taken for."""


# -- the face -------------------------------------------------------------------------------------


def lift_siglip(
    source: str | Path,
    *,
    num_frames: int = 16,
    lora_rank: int = 0,
    hub: Mapping[str, Any] | None = None,
    **config_fields: Any,
) -> StreamformerModel:
    """Make a video encoder of a SigLIP image encoder (StreamFormer, section 3).

    With gates and time table at zero, the result equals the image encoder frame by frame.

    Args:
        source: folder or hub id of a ``SiglipModel`` or ``SiglipVisionModel``.
        num_frames: rows of the time table.
        lora_rank: rank of the adapters on spatial attention; 0 for none.
        hub: arguments for fetching from the hub (``revision``, ``token``, ``cache_dir``).
        config_fields: other fields of :class:`StreamformerConfig`, such as ``window``.

    Raises:
        CheckpointError: not a SigLIP image tower, or a damaged one; the message names the keys.
    """
    _known_fields(config_fields)
    hub = dict(hub or {})
    config = AutoConfig.from_pretrained(source, **hub)
    vision = getattr(config, "vision_config", config)
    if vision.model_type != "siglip_vision_model":
        raise CheckpointError(
            f"{source}: model_type is {config.model_type!r}; lifting needs a SigLIP image tower "
            "('siglip' or 'siglip_vision_model')"
        )
    shared = [
        "image_size",
        "patch_size",
        "num_channels",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "layer_norm_eps",
    ]
    fields = {name: getattr(vision, name) for name in shared}
    fields["attention_probs_dropout_prob"] = vision.attention_dropout
    model = StreamformerModel(
        StreamformerConfig(**{**fields, "num_frames": num_frames, **config_fields})
    )
    foreign = {
        key.removeprefix("vision_model."): value
        for key, value in read_weights(source, **hub).items()
    }
    state = rename(foreign, SIGLIP_RENAMES, SIGLIP_DROPS, source)
    state["embeddings.position_embedding"] = (
        state["embeddings.position_embedding"][None]
        if ("embeddings.position_embedding" in state)
        else torch.empty(0)
    )
    load_strict(
        model, _join_qkv(state), source, layout="a SigLIP image tower", created=LIFT_CREATES
    )
    if lora_rank:
        add_lora(model, lora_rank)
        model.config.lora_rank = lora_rank
    return model


def load_released(
    source: str | Path, *, hub: Mapping[str, Any] | None = None, **config_fields: Any
) -> StreamformerModel:
    """Load weights in the layout of the released StreamFormer checkpoints.

    Takes a folder or hub id with ``config.json``, or a bare training checkpoint (``.pth`` holding
    ``model``); with or without the ``timesformer.`` prefix and with or without LoRA keys. A
    ``num_frames`` other than the file's resizes the time table linearly.

    Args:
        source: folder, file, or hub id.
        hub: arguments for fetching from the hub (``revision``, ``token``, ``cache_dir``).
        config_fields: fields of :class:`StreamformerConfig` that replace the file's. A bare file
            states no ``num_attention_heads``: it is taken as ``hidden_size / 64`` unless given.

    Raises:
        CheckpointError: damaged, foreign or mismatched weights; the message names the keys.
    """
    _known_fields(config_fields)
    hub = dict(hub or {})
    weights = {
        key.removeprefix("timesformer."): value
        for key, value in read_weights(source, **hub).items()
    }
    state = rename(weights, {**RELEASED_RENAMES, **RELEASED_LORA}, RELEASED_DROPS, source)
    fields = _shapes_say(state, source)
    if Path(source).suffix not in (".pth", ".pt", ".bin", ".safetensors"):
        fields = {**_released_config(source, hub), **_only(fields, "num_frames", "lora_rank")}
    wanted = {**fields, **config_fields}
    state = _resize_time_table(state, wanted["num_frames"])
    rank = fields["lora_rank"]
    if rank:
        state = _name_lora_bases(state)
    model = StreamformerModel(StreamformerConfig(**{**wanted, "lora_rank": rank}))
    load_strict(model, state, source, layout="a released StreamFormer checkpoint")
    return model.eval()


def is_released(source: str | Path, hub: Mapping[str, Any] | None = None) -> bool:
    """Whether a folder, file or hub id is in the released layout, by its config's model type."""
    path = Path(source)
    if path.is_file():
        return path.suffix in (".pth", ".pt")
    names = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
    wanted = {name: hub[name] for name in names if name in hub} if hub else {}
    config, _ = PretrainedConfig.get_config_dict(source, **wanted)
    return config.get("model_type") == "timesformer"


# -- reading --------------------------------------------------------------------------------------


def read_weights(source: str | Path, **hub: Any) -> dict[str, Tensor]:
    """Read all tensors of a folder, file or hub id: safetensors, sharded or not, or a torch file.

    A training checkpoint gives what lies under its key ``model``.

    Raises:
        CheckpointError: no weights there, or a file that cannot be read (truncated, say).
    """
    path = Path(source)
    if path.is_file():
        return _read_file(path)
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)
        if found is None:
            continue
        if not name.endswith(".json"):
            return _read_file(Path(found))
        shards = sorted(set(json.loads(Path(found).read_text())["weight_map"].values()))
        state: dict[str, Tensor] = {}
        for shard in shards:
            state |= _read_file(Path(cached_file(source, shard, **hub)))
        return state
    raise CheckpointError(
        f"{source}: no weights; expected model.safetensors (or its shards) or pytorch_model.bin"
    )


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Training checkpoints carry their command line; a namespace of plain values is harmless.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) cannot be read: {error}. Is it truncated? "
            "Copy or download it again"
        ) from error
    except Exception as error:  # pickle's refusals share no base class
        raise CheckpointError(f"{path} is not a checkpoint of plain tensors: {error}") from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path} holds no state dict: found {type(content).__name__}")
    return dict(content)


# -- applying a table -----------------------------------------------------------------------------


def rename(
    state: Mapping[str, Tensor],
    renames: Mapping[str, str],
    drops: Mapping[str, str],
    source: object,
) -> dict[str, Tensor]:
    """Apply a layout's table: rename, drop; what no row knows keeps its name and fails to load.

    Raises:
        CheckpointError: when nothing in the file is known to the table.
    """
    patterns = [(_pattern(old), new) for old, new in renames.items()]
    dropped = [_pattern(old) for old in drops]
    result, known = {}, 0
    for key, value in state.items():
        if any(pattern.match(key) for pattern in dropped):
            continue
        for pattern, new in patterns:
            if match := pattern.match(key):
                key = new.replace("#", next(iter(match.groups()), "")) + key[match.end() :]
                known += 1
                break
        result[key] = value
    if not known:
        first = ", ".join(list(state)[:3]) or "nothing"
        raise CheckpointError(f"{source} is of a foreign layout: it holds {first}, …")
    return result


def _pattern(prefix: str) -> re.Pattern[str]:
    return re.compile(re.escape(prefix).replace(r"\#", r"(\d+)"))


def load_strict(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: object,
    *,
    layout: str,
    created: str | None = None,
) -> None:
    """Load ``state`` and prove that it covers the model exactly.

    Args:
        model: takes the weights.
        state: tensors under the model's own names.
        source: named in errors.
        layout: what the file was taken for, named in errors.
        created: regular expression of the names that keep the model's starting value.

    Raises:
        CheckpointError: missing, unexpected or misshapen keys, the first few of each by name.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in state and not (created and re.fullmatch(created, k))]
    unexpected = [key for key in state if key not in own]
    misshapen = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in state
        if key in own and state[key].shape != own[key].shape
    ]
    problems = [
        f"{len(keys)} {kind}: {', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}"
        for kind, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )  # fmt: skip
        if keys
    ]
    if problems:
        raise CheckpointError(
            f"{source} does not fit {layout} of this config (keys under our names): "
            + "; ".join(problems)
        )
    broken = [key for key, value in state.items() if not value.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{source} holds values that are not finite, in {', '.join(broken[:3])}"
        )
    model.load_state_dict(dict(state), strict=False)


def _join_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join ``…qkv.0.weight``, ``…qkv.1.weight``, ``…qkv.2.weight`` where all three are there."""
    joined = {key: value for key, value in state.items() if not re.search(r"\.qkv\.[012]\.", key)}
    for key in state:
        if ".qkv.0." in key:
            parts = [state.get(key.replace(".qkv.0.", f".qkv.{part}.")) for part in range(3)]
            if all(part is not None for part in parts):
                joined[key.replace(".qkv.0.", ".qkv.")] = torch.cat(parts)
    return joined


def _name_lora_bases(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """PEFT keeps what an adapter wraps under ``base_layer``."""
    wrapped = re.compile(r"(layers\.\d+\.spatial_attention\.(?:qkv|out))\.(weight|bias)")
    return {wrapped.sub(r"\1.base_layer.\2", key): value for key, value in state.items()}


def _resize_time_table(state: dict[str, Tensor], num_frames: int) -> dict[str, Tensor]:
    table = state["embeddings.time_embedding"]  # (1, F, D)
    if table.shape[1] == num_frames:
        return state
    logger.warning("time table resized from %d to %d frames", table.shape[1], num_frames)
    resized = nn.functional.interpolate(
        table.float().transpose(1, 2), size=num_frames, mode="linear", align_corners=True
    )
    return {**state, "embeddings.time_embedding": resized.transpose(1, 2).to(table.dtype)}


# -- configs --------------------------------------------------------------------------------------


def _released_config(source: str | Path, hub: Mapping[str, Any]) -> dict[str, Any]:
    raw, _ = PretrainedConfig.get_config_dict(source, **hub)
    kind = raw.get("attention_type", "divided_space_time")
    if kind != "divided_space_time":
        raise CheckpointError(
            f"{source}: attention_type={kind!r}; only 'divided_space_time' is supported "
            "(the released code's other modes do not run)"
        )
    own = StreamformerConfig().to_dict()
    renamed = {RELEASED_CONFIG.get(key, key): value for key, value in raw.items()}
    skipped = {"model_type", "architectures", "transformers_version", "dtype", "torch_dtype"}
    fields = {key: value for key, value in renamed.items() if key in own and key not in skipped}
    fields.setdefault("causal", False)  # what the released code assumes where its config is silent
    fields.setdefault("hidden_act", "gelu")
    return fields


def _shapes_say(state: Mapping[str, Tensor], source: object) -> dict[str, Any]:
    """Config fields that the shapes of a renamed released checkpoint give away."""
    needed = (
        "embeddings.patch_embedding.weight", "embeddings.position_embedding",
        "embeddings.time_embedding", "layers.0.mlp.fc1.weight",
    )  # fmt: skip
    lacking = [key for key in needed if key not in state]
    if lacking:
        raise CheckpointError(
            f"{source} is not a released StreamFormer checkpoint: missing {', '.join(lacking)} "
            "(keys under our names)"
        )
    width, channels, patch, _ = state["embeddings.patch_embedding.weight"].shape
    grid = round(state["embeddings.position_embedding"].shape[1] ** 0.5)
    numbers = [int(key.split(".")[1]) for key in state if key.startswith("layers.")]
    adapters = [value for key, value in state.items() if "qkv.lora_A" in key]
    return {
        "image_size": grid * patch,
        "patch_size": patch,
        "num_channels": channels,
        "hidden_size": width,
        "num_hidden_layers": max(numbers) + 1,
        "num_attention_heads": max(1, width // 64),
        "intermediate_size": state["layers.0.mlp.fc1.weight"].shape[0],
        "hidden_act": "gelu",
        "num_frames": state["embeddings.time_embedding"].shape[1],
        "lora_rank": adapters[0].shape[0] if adapters else 0,
    }


def _only(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: fields[name] for name in names}


def _known_fields(fields: Mapping[str, Any]) -> None:
    from difflib import get_close_matches

    known = set(StreamformerConfig().to_dict())
    for name in fields:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"StreamformerConfig has no field {name!r}{hint}")
