"""Models out of files: our own layout, LLaVA-NeXT's, and fresh ones of an LLM and an encoder.

LLaVA-NeXT's layout is data first: where each part of its state dict goes, and which fields of its
``config.json`` mean what here. That file is read as data, since transformers knows its model types
not at all or as something else.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

from backbone import CheckpointError, StreamformerModel, VideoEncoder
from backbone.checkpoints import read_weights
from backbone.files import read_json, write_json
from backbone.names import hint
from integrations.videoqa.configuration import StreamformerLlavaConfig, tower_preset
from integrations.videoqa.modeling import StreamformerLlavaForConditionalGeneration as Model
from integrations.videoqa.modeling import refuse_gaps
from integrations.videoqa.tower import VisionTower, describe, load_tower_model

logger = logging.getLogger(__name__)

# -- LLaVA-NeXT's layout --------------------------------------------------------------------------

# Start of a key there -> what stands there in ours. The first one that fits counts; the LLM's own
# keys are the rest.
LLAVA_KEYS = {
    "model.vision_tower.vision_tower.": "tower.",
    "model.mm_projector.": "projector.",
    "model.image_newline": "image_newline",
    "": "language_model.",
}

# Model type or architecture there -> model type of the LLM inside.
LLAVA_LLMS = {
    "llava_llama": "llama",
    "llava_qwen": "qwen2",
    "LlavaLlamaForCausalLM": "llama",
    "LlavaQwenForCausalLM": "qwen2",
}

# Fields of config.json there -> ours.
LLAVA_FIELDS = {
    "mm_hidden_size": "tower_size",
    "mm_projector_type": "projector_type",
    "mm_spatial_pool_mode": "pool_mode",
    "mm_patch_merge_type": "merge_type",
    "mm_newline_position": "newline_position",
    "image_grid_pinpoints": "grid_pinpoints",
    "force_sample": "force_sample",
    "add_time_instruction": "time_instruction",
    "tokenizer_model_max_length": "max_length",
    "tokenizer_padding_side": "padding_side",
}

# What the released code does where its config is silent or says what the code does not read.
LLAVA_DEFAULTS = {
    "merge_type": "flat",
    "newline_position": "one_token",
    "pool_mode": "bilinear",
    "pool_stride": 2,  # mm_spatial_pool_stride is never read there
}

LLAVA_TEMPLATES = {"llama": "vicuna_v1", "qwen2": "qwen_1_5"}

# Fields with these starts are LLaVA's own; the LLM's config does not get them.
LLAVA_OWN = (
    "mm_", "image_", "tokenizer_", "use_mm_", "add_faster", "faster_", "add_time", "force_sample",
    "streaming_mode", "context_length", "model_type", "architectures", "unfreeze_mm", "tune_mm",
)  # fmt: skip

PLAIN_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")  # of no family

TOWER_CONFIG = "vision_tower_config.json"  # architecture of the tower inside, where a file says it


# -- the face -------------------------------------------------------------------------------------


def load_model(
    path: str | Path,
    tower: str | VideoEncoder | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    *,
    window: int | None = None,
    temporal_positions: str | None = None,
    tower_dtype: torch.dtype | None = None,
    hub: Mapping[str, Any] | None = None,
    **config_fields: Any,
) -> tuple[Model, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, ready to answer.

    Args:
        path: folder or hub id, in our own layout or in LLaVA-NeXT's.
        tower: another encoder than the checkpoint's: a spec such as ``siglip:<folder or hub id>``,
            or an encoder. A LLaVA checkpoint that holds no tower takes the one that it names.
        dtype: type of all weights; None or "auto" for the file's.
        device: where the model goes; None for the CPU.
        window: frames that the tower may see; None keeps the checkpoint's.
        temporal_positions: the tower's policy past its time table; None keeps the checkpoint's.
        tower_dtype: another type for the tower: the released code has it in fp16 always.
        hub: arguments for fetching from the hub (``revision``, ``token``, ``cache_dir``).
        config_fields: fields of ``StreamformerLlavaConfig`` that replace the file's, such as
            ``num_frames`` or ``template``.

    Raises:
        CheckpointError: weights that are missing, left over or damaged, or a tower that cannot be
            had; nothing is ever filled up with random numbers.
        TypeError: a field that the config does not have.
    """
    _known_fields(config_fields)
    hub = dict(hub or {})
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    raw = _read_config(path, hub)
    asked = {"tower": tower, "window": window, "temporal_positions": temporal_positions}
    if raw.get("model_type") == StreamformerLlavaConfig.model_type:
        model = Model.from_pretrained(path, dtype=dtype or "auto", **asked, **hub, **config_fields)
    else:
        model = _load_llava(path, raw, dtype, hub, config_fields, **asked)
    model.tokenizer = _load_tokenizer(path, model.config.text_config, hub)
    model.to(device or "cpu")
    if tower_dtype is not None:
        model.tower.to(tower_dtype)
    return model.eval(), model.tokenizer


def build_model(
    llm: str | Path | PretrainedConfig,
    tower: str | VideoEncoder,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    *,
    tower_features: str | None = "last",
    window: int | None = None,
    temporal_positions: str | None = None,
    **config_fields: Any,
) -> tuple[Model, PreTrainedTokenizerBase]:
    """Make a model of an LLM and an encoder, with a projector that is yet to be trained.

    Args:
        llm: folder or hub id of a causal LLM; or a config, for one with fresh weights.
        tower: spec such as ``streamformer:<folder or hub id>``, or an encoder.
        tokenizer: itself, its folder or hub id; None for the LLM's.
        dtype: type of all weights; None for fp32, "auto" for the LLM's.
        device: where the model goes; None for the CPU.
        tower_features: preset of ``configuration.TOWER_PRESETS``; None if ``config_fields`` state
            layer and norm.
        window: frames that the tower may see; None keeps the checkpoint's.
        temporal_positions: the tower's policy past its time table; None keeps the checkpoint's.
        config_fields: other fields of ``StreamformerLlavaConfig``.

    Raises:
        TypeError: a field that the config does not have.
        ValueError: a config for an LLM, but no tokenizer.
    """
    _known_fields(config_fields)
    if tokenizer is None and isinstance(llm, PretrainedConfig):
        raise ValueError("an LLM made of a config brings no tokenizer; give tokenizer=")
    part = load_tower_model(tower, window, temporal_positions)
    name = tower if isinstance(tower, str) else tower.name
    view = VisionTower(part, name).encoder
    if tower_features is not None:
        config_fields = {**tower_preset(tower_features, view.kind), **config_fields}
    if isinstance(llm, PretrainedConfig):
        text_config, weights = llm, None
    else:
        weights = AutoModelForCausalLM.from_pretrained(llm, dtype=dtype or torch.float32)
        text_config, dtype = weights.config, weights.dtype
    config = StreamformerLlavaConfig(
        text_config=text_config, tower_size=view.embed_dim, **config_fields
    )
    rank, config.lora_rank = config.lora_rank, 0
    model = Model(config).to(dtype or torch.float32)
    if weights is not None:
        model.language_model.load_state_dict(weights.state_dict())
        model.language_model.generation_config = GenerationConfig(
            eos_token_id=weights.generation_config.eos_token_id
        )
    model.attach_tower(part, name)
    if rank:
        model.add_lora(rank, config.lora_alpha, config.lora_dropout)
    model.tokenizer = (
        tokenizer
        if isinstance(tokenizer, PreTrainedTokenizerBase)
        else AutoTokenizer.from_pretrained(tokenizer or llm)
    )
    return model.to(device or "cpu"), model.tokenizer


def load_projector(model: Model, path: str | Path) -> None:
    """Load a first stage's result into ``model``, in place.

    Args:
        model: takes the projector.
        path: LLaVA's ``mm_projector.bin``, or the folder of a model in our layout.

    Raises:
        CheckpointError: the file holds another projector, or none.
    """
    state = {}
    for key, value in read_weights(path).items():
        for start in ("model.mm_projector.", "mm_projector.", "projector."):
            if key.startswith(start):
                state[key.removeprefix(start)] = value
    _fill(model.projector, state, path)


def save_model(model: Model, folder: str | Path) -> None:
    """Write model and tokenizer to a folder that `load_model` and ``AutoModel`` load."""
    model.save_pretrained(folder)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


# -- LLaVA-NeXT -----------------------------------------------------------------------------------


def _load_llava(
    path: str | Path,
    raw: Mapping[str, Any],
    dtype: torch.dtype | str | None,
    hub: Mapping[str, Any],
    config_fields: Mapping[str, Any],
    *,
    tower: str | VideoEncoder | None,
    window: int | None,
    temporal_positions: str | None,
) -> Model:
    config = llava_config(raw, path)
    for name, value in config_fields.items():
        setattr(config, name, value)
    config.validate_architecture()
    parts = split_llava(read_weights(path, **hub))
    inside, time = parts.pop("tower."), {"window": window, "temporal_positions": temporal_positions}
    if tower is not None:
        part = load_tower_model(tower, **time)
        name = tower if isinstance(tower, str) else tower.name
    elif inside:
        name = f"streamformer:{path}"
        part = _embedded_tower(inside, path, raw.get("mm_vision_tower"), hub, time)
    else:
        part, name = _named_tower(raw.get("mm_vision_tower"), path, time)
    if "tower_layer" not in config_fields and "tower_post_norm" not in config_fields:
        preset = tower_preset("released", VisionTower(part, name).encoder.kind)
        config.tower_layer, config.tower_post_norm = preset.values()
    if dtype in (None, "auto"):
        dtype = next(iter(parts["language_model."].values())).dtype
    rank, config.lora_rank = config.lora_rank, 0
    with no_init_weights():  # all of them come from the file, proven below
        model = Model(config)
    model.tie_weights()
    _fill(model.projector, parts["projector."], path)
    if model.image_newline is not None:
        model.image_newline = nn.Parameter(parts["image_newline"].get("", torch.empty(0)))
        width = config.text_config.hidden_size
        if model.image_newline.shape != (width,):
            raise CheckpointError(
                f"{path}: model.image_newline has shape {tuple(model.image_newline.shape)}, "
                f"expected ({width},), as mm_patch_merge_type={config.merge_type!r} needs it"
            )
    _fill(model.language_model, parts["language_model."], path)
    model.to(dtype)
    model.attach_tower(part, name)
    if rank:
        model.add_lora(rank, config.lora_alpha, config.lora_dropout)
    return model


def llava_config(raw: Mapping[str, Any], path: str | Path) -> StreamformerLlavaConfig:
    """Our config for LLaVA-NeXT's ``config.json``, without its tower.

    Args:
        raw: the file's content.
        path: named in errors.

    Raises:
        CheckpointError: no LLaVA of a family that is known here.
    """
    kinds = [raw.get("model_type"), *(raw.get("architectures") or [])]
    llm = next((LLAVA_LLMS[kind] for kind in kinds if kind in LLAVA_LLMS), None)
    if llm is None:
        raise CheckpointError(
            f"{path} is no LLaVA-NeXT checkpoint on Llama or Qwen2, and none of ours: its "
            f"model_type is {raw.get('model_type')!r}, its architectures are "
            f"{raw.get('architectures')}"
        )
    if (resampler := raw.get("mm_resampler_type")) not in (None, "identity"):
        raise CheckpointError(f"{path}: mm_resampler_type={resampler!r} is not supported")
    fields = {ours: raw[theirs] for theirs, ours in LLAVA_FIELDS.items() if theirs in raw}
    aspect = raw.get("image_aspect_ratio") or "square"
    text = {key: value for key, value in raw.items() if not key.startswith(LLAVA_OWN)}
    return StreamformerLlavaConfig(
        **{
            **LLAVA_DEFAULTS,
            **fields,
            "text_config": AutoConfig.for_model(llm, **text),
            "image_layout": "anyres" if aspect.startswith("anyres") else "square",
            "template": LLAVA_TEMPLATES[llm],
        }
    )


def split_llava(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Parts of a LLaVA state dict, by our names of the parts, with the keys that remain."""
    parts: dict[str, dict[str, Tensor]] = {ours: {} for ours in LLAVA_KEYS.values()}
    for key, value in state.items():
        theirs, ours = next(pair for pair in LLAVA_KEYS.items() if key.startswith(pair[0]))
        parts[ours][key.removeprefix(theirs)] = value
    return parts


def _embedded_tower(
    state: Mapping[str, Tensor],
    path: str | Path,
    named: str | None,
    hub: Mapping[str, Any],
    time: Mapping[str, Any],
) -> StreamformerModel:
    """The encoder whose weights lie in a LLaVA checkpoint, in StreamFormer's released layout."""
    if not any(key.startswith("embeddings.time_embeddings") for key in state):
        raise CheckpointError(
            f"{path} holds a tower that is no StreamFormer ({', '.join(list(state)[:3])}, …); name "
            "the encoder with tower=siglip:<folder or hub id>, or another kind"
        )
    fields = {name: value for name, value in time.items() if value is not None}
    if (architecture := _tower_architecture(path, named, hub)) is None:
        logger.warning(
            "%s does not say how its tower is built, and %r is not here: taken as the released "
            "encoder, with heads of 64 and exact GELU",
            path, named,
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:  # as a released encoder, by the same reader
        file = Path(folder) / "model.safetensors"
        save_file({key: value.contiguous() for key, value in state.items()}, file)
        source = file
        if architecture is not None:
            write_json(Path(folder) / "config.json", architecture)
            source = Path(folder)
        try:
            return StreamformerModel.from_pretrained(source, **fields)
        except CheckpointError as error:
            raise CheckpointError(
                f"{path}, the tower inside: {str(error).replace(str(source), 'it')}"
            ) from error


def _tower_architecture(
    path: str | Path, named: str | None, hub: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Config of the tower inside a checkpoint, from the checkpoint or from the one it names."""
    beside = cached_file(path, TOWER_CONFIG, _raise_exceptions_for_missing_entries=False, **hub)
    if beside is not None:
        return read_json(beside)
    if not named:
        return None
    try:
        found, _ = PretrainedConfig.get_config_dict(named)
    except (OSError, ValueError):  # a path of the machine that trained it, most often
        return None
    return found if found.get("model_type") == "timesformer" else None


def _named_tower(
    named: str | None, path: str | Path, time: Mapping[str, Any]
) -> tuple[nn.Module, str]:
    """The encoder that a LLaVA checkpoint names instead of holding it."""
    try:
        spec = describe(named or "")
        return load_tower_model(spec, **time), spec
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} holds no tower, and the one that it names, mm_vision_tower={named!r}, cannot "
            f"be loaded ({reason}); name one with tower=streamformer:<folder or hub id>"
        ) from error


# -- helpers --------------------------------------------------------------------------------------


def _read_config(path: str | Path, hub: Mapping[str, Any]) -> dict[str, Any]:
    if Path(path).exists() and not Path(path).is_dir():
        raise CheckpointError(f"{path} is a file; give the folder that holds its config.json")
    try:
        raw, _ = PretrainedConfig.get_config_dict(path, **hub)
    except OSError as error:
        raise CheckpointError(f"{path} has no config.json: {error}") from error
    if not raw:
        raise CheckpointError(f"{path} has no config.json; give the folder of a model")
    return raw


def _load_tokenizer(
    path: str | Path, text_config: PretrainedConfig, hub: Mapping[str, Any]
) -> PreTrainedTokenizerBase:
    """The tokenizer, told which LLM it is for: the file's own model type may say nothing.

    One that was saved as no family's own stays what its file says: transformers would cut words as
    the LLM's family does.
    """
    if get_tokenizer_config(path, **hub).get("tokenizer_class") in PLAIN_TOKENIZERS:
        return PreTrainedTokenizerFast.from_pretrained(path, **hub)
    return AutoTokenizer.from_pretrained(path, config=text_config, **hub)


def _fill(module: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Give a module all its weights, in place and without copying them."""
    own = module.state_dict()
    tied = set(getattr(module, "all_tied_weights_keys", ()))
    state = {k: v for k, v in state.items() if not k.endswith("rotary_emb.inv_freq")}  # old files
    refuse_gaps(
        source,
        missing=[key for key in own if key not in state and key not in tied],
        unexpected=[key for key in state if key not in own],
        misshapen=[
            f"{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}"
            for key, value in state.items()
            if key in own and value.shape != own[key].shape
        ],
    )
    broken = [key for key, value in state.items() if not value.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{source} holds values that are not finite, in {', '.join(broken[:3])}"
        )
    module.load_state_dict(dict(state), strict=False, assign=True)
    if tied:
        module.tie_weights()


def _known_fields(fields: Mapping[str, Any]) -> None:
    known = StreamformerLlavaConfig.__annotations__
    for name in fields:
        if name not in known or name in ("sub_configs", "text_config", "tower_config", "tower"):
            raise TypeError(
                f"{name!r} is no field of StreamformerLlavaConfig to be set; {hint(name, known)}"
            )
