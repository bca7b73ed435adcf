"""Weights from elsewhere: SigLIP image towers and released StreamFormer checkpoints.

Each foreign layout is data first: what is renamed, what is created here (with its starting value),
what is dropped (with the reason). One function applies a table, one loads the result strictly; a
file that does not fit is refused with the keys that tell why.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig, SiglipVisionConfig, SiglipVisionModel
from transformers.utils import cached_file

from .configuration import StreamformerConfig
from .lora import add_lora, freeze_wrapped, merge_lora
from .modeling import StreamformerModel, StreamformerPreTrainedModel
from .names import hint

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

# Fields of a SigLIP vision config that ours has under the same name.
SIGLIP_CONFIG = (
    "image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers",
    "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps",
)  # fmt: skip

# The head of a classification model: the one part that a file may lack or have too much.
HEAD = r"(fc_norm|classifier)\.(weight|bias)"

# In front of the keys of a whole model, absent from those of its image or video tower alone.
PREFIX = r"^(vision_model|timesformer)\."

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth")
OWN_FIELDS = tuple(StreamformerConfig.__annotations__)
HUB_OPTIONS = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that is damaged or is not what it was taken for."""


# -- the face -------------------------------------------------------------------------------------


def lift_siglip(
    source: str | Path,
    *,
    num_frames: int = 16,
    lora_rank: int = 0,
    gate: float = 0.0,
    time_scale: float = 0.0,
    hub: Mapping[str, Any] | None = None,
    **config_fields: Any,
) -> StreamformerModel:
    """Make a video encoder of a SigLIP image encoder (StreamFormer, section 3).

    With gates and time table at zero, the result equals the image encoder frame by frame. A small
    model learns time several times faster from a head start: gates ajar, and a time table of
    Fourier features, which let attention find "so many frames ago" from the first update on.

    Args:
        source: folder or hub id of a ``SiglipModel`` or ``SiglipVisionModel``.
        num_frames: rows of the time table.
        lora_rank: rank of the adapters on spatial attention; 0 for none.
        gate: starting value of all temporal gates, before their tanh.
        time_scale: standard deviation of the time table to start from.
        hub: arguments for fetching from the hub (``revision``, ``token``, ``cache_dir``).
        config_fields: other fields of :class:`StreamformerConfig`, such as ``window``.

    Raises:
        CheckpointError: not a SigLIP image tower, or a damaged one; the message names the keys.
    """
    _known_fields(config_fields)
    hub = dict(hub or {})
    vision = _siglip_config(source, hub)
    fields = {name: getattr(vision, name) for name in SIGLIP_CONFIG}
    fields["attention_probs_dropout_prob"] = vision.attention_dropout
    model = StreamformerModel(
        StreamformerConfig(**{**fields, "num_frames": num_frames, **config_fields})
    )
    weights = read_weights(source, **hub)
    state = _join_qkv(rename(weights, SIGLIP_RENAMES, SIGLIP_DROPS, source))
    if "embeddings.position_embedding" in state:
        state["embeddings.position_embedding"] = state["embeddings.position_embedding"][None]
    load_strict(model, state, source, layout="a SigLIP image tower", created=LIFT_CREATES)
    if model.config.temporal_attention:
        _give_head_start(model, gate, time_scale)
    if lora_rank:
        add_lora(model, lora_rank)
    return model.eval()


@torch.no_grad()
def _give_head_start(model: StreamformerModel, gate: float, time_scale: float) -> None:
    """Open the gates and fill the time table with waves whose period divides its length.

    So the table closes on itself, and a cyclic stream sees the same distances anywhere.
    """
    for layer in model.layers:
        layer.temporal_gate.fill_(gate)
    table = model.embeddings.time_embedding  # (1, F, D)
    _, rows, width = table.shape
    column = torch.arange(width)
    waves = column // 2 % max(rows // 2, 1) + 1  # whole turns over the table
    angle = 2 * math.pi * torch.arange(rows)[:, None] * waves / rows  # (F, D)
    table[0] = time_scale * 2**0.5 * torch.where(column % 2 == 0, angle.sin(), angle.cos())


def load_siglip(source: str | Path, *, hub: Mapping[str, Any] | None = None) -> SiglipVisionModel:
    """Load the image tower of a ``SiglipModel`` or ``SiglipVisionModel``, strictly.

    Raises:
        CheckpointError: as :func:`lift_siglip`.
    """
    hub = dict(hub or {})
    model = SiglipVisionModel(_siglip_config(source, hub))
    prefix = "vision_model." if hasattr(model, "vision_model") else ""  # older transformers
    tower = {key: key for key in ("embeddings.", "encoder.", "post_layernorm.", "head.")}
    state = rename(read_weights(source, **hub), tower, SIGLIP_DROPS, source)
    state = {prefix + key: value for key, value in state.items()}
    load_strict(model, state, source, layout="a SigLIP image tower")
    return model.eval()


def load_released(
    source: str | Path,
    *,
    model_class: type[StreamformerPreTrainedModel] = StreamformerModel,
    dtype: torch.dtype | None = torch.float32,
    hub: Mapping[str, Any] | None = None,
    **config_fields: Any,
) -> StreamformerPreTrainedModel:
    """Load weights in the layout of the released StreamFormer checkpoints.

    Takes a folder or hub id with ``config.json``, or a bare training checkpoint (``.pth`` holding
    ``model``); with or without the ``timesformer.`` prefix and with or without LoRA keys. Asking
    for another ``num_frames`` or ``lora_rank`` than the file's changes the loaded model, see
    :func:`adapt`.

    Args:
        source: folder, file, or hub id.
        model_class: the encoder alone, or with its classification head, which starts fresh when
            the file has none.
        dtype: type of the model's weights; None for the file's.
        hub: arguments for fetching from the hub (``revision``, ``token``, ``cache_dir``).
        config_fields: fields of :class:`StreamformerConfig` that replace the file's. A bare file
            states no ``num_attention_heads``: it is taken as ``hidden_size / 64`` unless given.

    Raises:
        CheckpointError: damaged, foreign or mismatched weights; the message names the keys.
    """
    _known_fields(config_fields)
    hub = dict(hub or {})
    weights = read_weights(source, **hub)
    renames = {**RELEASED_RENAMES, **RELEASED_LORA}
    state = rename(weights, renames, RELEASED_DROPS, source)
    fields = _shapes_say(state, source)
    if not Path(source).is_file():
        told = _only(fields, "num_frames", "lora_rank", "num_labels")
        fields = {**_released_config(source, hub), **told}
    asked = {name: config_fields.pop(name, fields[name]) for name in ("num_frames", "lora_rank")}
    if fields["lora_rank"]:
        state = _name_lora_bases(state)
    model = model_class(StreamformerConfig(**{**fields, **config_fields}))
    state = _place_head(state, model)
    load_strict(model, state, source, layout="a released StreamFormer checkpoint", created=HEAD)
    adapt(model, **asked)
    return model.eval().to(dtype or next(iter(state.values())).dtype)


def adapt(model: StreamformerPreTrainedModel, num_frames: int, lora_rank: int) -> None:
    """Change, in place, what needs no other weights.

    Args:
        model: any model with this encoder.
        num_frames: the time table is resized linearly to as many rows.
        lora_rank: adapters without effect are added where there were none; 0 merges them.

    Raises:
        ValueError: another rank than that of the adapters there are.
    """
    config, embeddings = model.config, model.base_model.embeddings
    if num_frames != config.num_frames and embeddings.time_embedding is not None:
        logger.warning("time table resized from %d to %d frames", config.num_frames, num_frames)
        table = embeddings.time_embedding.detach()  # (1, F, D)
        resized = nn.functional.interpolate(
            table.float().transpose(1, 2), size=num_frames, mode="linear", align_corners=True
        )
        embeddings.time_embedding = nn.Parameter(resized.transpose(1, 2).to(table.dtype))
    config.num_frames = num_frames
    if config.lora_rank and lora_rank == 0:
        merge_lora(model)
    elif lora_rank != config.lora_rank:
        if config.lora_rank:
            raise ValueError(
                f"lora_rank={lora_rank}: the checkpoint's adapters have rank {config.lora_rank}; "
                "leave it out to keep them, or pass lora_rank=0 to merge them"
            )
        add_lora(model, lora_rank)
    freeze_wrapped(model)


# -- behind from_pretrained -----------------------------------------------------------------------


def is_released(source: str | Path, options: Mapping[str, Any] | None = None) -> bool:
    """Whether a folder, file or hub id is in the released layout, by its config's model type.

    Args:
        source: what to look at; a bare file of weights can be of no other layout.
        options: of ``from_pretrained``; those for fetching from the hub are used.

    Raises:
        CheckpointError: a path where nothing is, or a checkpoint of another model.
    """
    _must_exist(source)
    if Path(source).is_file():
        return True
    config, _ = PretrainedConfig.get_config_dict(source, **_only(options or {}, *HUB_OPTIONS))
    kind = config.get("model_type", StreamformerConfig.model_type)
    if kind not in ("timesformer", StreamformerConfig.model_type):
        hint = "; backbone.lift_siglip makes a video encoder of it" if "siglip" in kind else ""
        raise CheckpointError(f"{source} is no StreamFormer: its model_type is {kind!r}{hint}")
    return kind == "timesformer"


def from_released(
    model_class: type[StreamformerPreTrainedModel], source: str | Path, **options: Any
) -> Any:
    """``from_pretrained`` for the released layout: its usual options, or a refusal by name.

    Raises:
        TypeError: an option that has no meaning here.
        ValueError: a ``device_map`` that is not one device.
    """
    wants_info = options.pop("output_loading_info", False)
    hub = _only(options, *HUB_OPTIONS)
    dtype = options.pop("dtype", None) or options.pop("torch_dtype", None) or torch.float32
    if isinstance(dtype, str):
        dtype = None if dtype == "auto" else getattr(torch, dtype)
    device = options.pop("device_map", None) or "cpu"
    if not isinstance(device, (str, torch.device)) or device in ("auto", "balanced"):
        raise ValueError(
            f"device_map={device!r}: released checkpoints load onto one device, such as 'cuda:0'; "
            "to spread one, save_pretrained it and load that"
        )
    fields = {name: value for name, value in options.items() if name not in HUB_OPTIONS}
    model = load_released(source, model_class=model_class, dtype=dtype, hub=hub, **fields)
    model.to(device)
    info = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
    return (model, info) if wants_info else model


def from_own(load: Callable[..., tuple], source: str | Path, *args: Any, **options: Any) -> Any:
    """``from_pretrained`` for this layout: transformers' ``load``, made strict.

    Transformers fills what a file lacks with random numbers and a warning; an encoder that is to
    be frozen must not be filled up so.

    Raises:
        CheckpointError: missing, unexpected or misshapen keys, or a file that cannot be read.
    """
    wants_info = options.pop("output_loading_info", False)
    hub, config = _only(options, *HUB_OPTIONS), options.pop("config", None)
    stored = StreamformerConfig.from_pretrained(source, **hub)
    if not isinstance(config, PretrainedConfig):
        config, options = StreamformerConfig.from_pretrained(
            config or source, return_unused_kwargs=True, **options
        )
        options |= hub
    asked = {"num_frames": config.num_frames, "lora_rank": config.lora_rank}
    config = deepcopy(config)
    config.num_frames, config.lora_rank = stored.num_frames, stored.lora_rank
    options["ignore_mismatched_sizes"] = True  # they are reported below, by name
    try:
        model, info = load(source, *args, config=config, output_loading_info=True, **options)
    except SafetensorError as error:
        raise CheckpointError(
            f"{source}: the weights cannot be read: {error}. Are they truncated? Copy or download "
            "them again"
        ) from error
    _refuse(
        source,
        "StreamFormer's own layout",
        missing=[key for key in sorted(info["missing_keys"]) if not re.fullmatch(HEAD, key)],
        unexpected=[key for key in sorted(info["unexpected_keys"]) if not re.fullmatch(HEAD, key)],
        misshapen=[
            f"{key} {tuple(found)} instead of {tuple(expected)}"
            for key, found, expected in sorted(info["mismatched_keys"])
        ],
    )
    _refuse_broken(source, model.state_dict())
    adapt(model, **asked)
    return (model, info) if wants_info else model


def _place_head(state: dict[str, Tensor], model: StreamformerPreTrainedModel) -> dict[str, Tensor]:
    """The classification head stays where it is, the rest goes where the model keeps its encoder.

    A model without a head does without it.
    """
    if model.base_model is model:
        return {key: value for key, value in state.items() if not re.fullmatch(HEAD, key)}
    if not any(re.fullmatch(HEAD, key) for key in state):
        logger.warning("the checkpoint has no classification head: it starts fresh")
    prefix = f"{model.base_model_prefix}."
    return {key if re.fullmatch(HEAD, key) else prefix + key: value for key, value in state.items()}


# -- reading --------------------------------------------------------------------------------------


def read_weights(source: str | Path, **hub: Any) -> dict[str, Tensor]:
    """Read all tensors of a folder, file or hub id: safetensors, sharded or not, or a torch file.

    A training checkpoint gives what lies under its key ``model``.

    Raises:
        CheckpointError: no weights there, or a file that cannot be read (truncated, say).
    """
    _must_exist(source)
    if Path(source).is_file():
        return _read_file(Path(source))
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (found := _find(source, name, hub)) is not None:
            return _read_file(found)
        if (found := _find(source, f"{name}.index.json", hub)) is not None:
            return _read_shards(source, found, hub)
    raise CheckpointError(
        f"{source}: no weights; expected model.safetensors or pytorch_model.bin, or their shards"
    )


def _find(source: str | Path, name: str, hub: Mapping[str, Any]) -> Path | None:
    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)
    return None if found is None else Path(found)


def _read_shards(source: str | Path, index: Path, hub: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{index} is no index of weights: {error}") from error
    state: dict[str, Tensor] = {}
    for shard in shards:
        if (found := _find(source, shard, hub)) is None:
            raise CheckpointError(f"{source}: {shard}, named by {index.name}, is not there")
        state |= _read_file(found)
    return state


def _must_exist(source: str | Path) -> None:
    """Refuse a path where nothing is, before it is taken for a hub id (``owner/name``)."""
    text = str(source)
    is_path = isinstance(source, Path) or text.startswith(("/", ".", "~")) or text.count("/") > 1
    if (is_path or Path(text).suffix in WEIGHT_FILES) and not Path(text).exists():
        raise CheckpointError(f"{source}: no such file or folder (seen from {Path.cwd()})")


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Training checkpoints carry their command line; a namespace of plain values is harmless.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise a dozen kinds that share no other base
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as plain tensors: "
            f"{str(error).partition(chr(10))[0]}; if it is truncated, copy or download it again"
        ) from error
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

    Args:
        state: tensors under their foreign names.
        renames: start of a foreign key -> what stands there in ours; "#" is a layer number.
        drops: start of a foreign key -> why it is not needed.
        source: named in errors.

    Raises:
        CheckpointError: when nothing in the file is known to the table, or a key comes twice.
    """
    patterns = [(_pattern(old), new) for old, new in renames.items()]
    dropped = [_pattern(old) for old in drops]
    result, known = {}, 0
    for foreign, value in state.items():
        key = re.sub(PREFIX, "", foreign)
        if any(pattern.match(key) for pattern in dropped):
            continue
        for pattern, new in patterns:
            if match := pattern.match(key):
                key = new.replace("#", next(iter(match.groups()), "")) + key[match.end() :]
                known += 1
                break
        if key in result:
            raise CheckpointError(f"{source} holds {key} twice, once as {foreign}")
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
    _refuse(
        source,
        layout,
        missing=[k for k in own if k not in state and not (created and re.fullmatch(created, k))],
        unexpected=[key for key in state if key not in own],
        misshapen=[
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in state
            if key in own and state[key].shape != own[key].shape
        ],
    )
    _refuse_broken(source, state)
    model.load_state_dict(dict(state), strict=False)


def _refuse_broken(source: object, state: Mapping[str, Tensor]) -> None:
    """Raise a CheckpointError that names the first few tensors with NaN or infinity."""
    broken = [key for key, value in state.items() if not (value.is_meta or value.isfinite().all())]
    if broken:
        raise CheckpointError(
            f"{source} holds values that are not finite, in {', '.join(broken[:3])}"
        )


def _refuse(source: object, layout: str, **problems: list[str]) -> None:
    """Raise a CheckpointError that names the first few keys of each problem, if there is one."""
    found = [
        f"{len(keys)} {kind}: {', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}"
        for kind, keys in problems.items()
        if keys
    ]
    if found:
        raise CheckpointError(
            f"{source} does not fit {layout} with this config (keys under our names): "
            + "; ".join(found)
        )


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


# -- configs --------------------------------------------------------------------------------------


def _siglip_config(source: str | Path, hub: Mapping[str, Any]) -> SiglipVisionConfig:
    _must_exist(source)
    config, _ = PretrainedConfig.get_config_dict(source, **hub)
    if (kind := config.get("model_type")) not in ("siglip", "siglip_vision_model"):
        raise CheckpointError(
            f"{source}: model_type is {kind!r}; needed is a SigLIP image tower ('siglip' or "
            "'siglip_vision_model')"
        )
    return SiglipVisionConfig.from_pretrained(source, **hub)


def _released_config(source: str | Path, hub: Mapping[str, Any]) -> dict[str, Any]:
    raw, _ = PretrainedConfig.get_config_dict(source, **hub)
    kind = raw.get("attention_type", "divided_space_time")
    if kind != "divided_space_time":
        raise CheckpointError(
            f"{source}: attention_type={kind!r}; only 'divided_space_time' is supported "
            "(the released code's other modes do not run)"
        )
    renamed = {RELEASED_CONFIG.get(key, key): value for key, value in raw.items()}
    fields = _only(renamed, *OWN_FIELDS)
    fields.setdefault("causal", False)  # what the released code assumes where its config is silent
    fields.setdefault("hidden_act", "gelu")
    size = fields.get("image_size")
    if isinstance(size, (list, tuple)) and len(set(size)) == 1:
        fields["image_size"] = size[0]
    return fields


def _shapes_say(state: Mapping[str, Tensor], source: object) -> dict[str, Any]:
    """Config fields that the shapes of a renamed released checkpoint give away."""
    dimensions = {
        "embeddings.patch_embedding.weight": 4,
        "embeddings.position_embedding": 3,
        "embeddings.time_embedding": 3,
        "layers.0.mlp.fc1.weight": 2,
    }
    lacking = [k for k, count in dimensions.items() if k not in state or state[k].ndim != count]
    if lacking:
        raise CheckpointError(
            f"{source} is not a released StreamFormer checkpoint: missing or misshapen "
            f"{', '.join(lacking)} (keys under our names)"
        )
    width, channels, patch, _ = state["embeddings.patch_embedding.weight"].shape
    grid = round(state["embeddings.position_embedding"].shape[1] ** 0.5)
    numbers = [int(match[1]) for key in state if (match := re.match(r"layers\.(\d+)\.", key))]
    adapters = [value for key, value in state.items() if "qkv.lora_A" in key]
    classes = "classifier.weight"
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
        **({"num_labels": state[classes].shape[0]} if classes in state else {}),
    }


def _only(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: fields[name] for name in names if name in fields}


def _known_fields(fields: Mapping[str, Any]) -> None:
    known = {*OWN_FIELDS, "num_labels", "attn_implementation"}
    for name in fields:
        if name not in known:
            raise TypeError(f"{name!r} is no field of StreamformerConfig; {hint(name, known)}")
