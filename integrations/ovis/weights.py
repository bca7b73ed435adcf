"""Weights of the adapter and the head: foreign layouts both ways, and our own file.

Foreign layouts are tables, as in ``backbone.checkpoints``: the start of a key there -> the start of
the key here, "#" a number. All loading is strict; what a published head cannot bring (it was
trained on another backbone, for other classes, without tracking) starts fresh and is named.

    detectron2     Mask2Former's and CTVIS's checkpoints: sem_seg_head.{pixel_decoder, predictor}.*
    transformers   Mask2FormerForUniversalSegmentation: model.pixel_level_module.decoder.*, …
    released       StreamFormer's video instance segmentation: the adapter, beside the encoder

Own: one safetensors file whose metadata holds both configs and notes (JSON), so that adapter and
head can be built again from this file alone; the encoder, frozen, stays where it came from.
"""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backbone import StreamformerEncoder
from backbone.checkpoints import CheckpointError, load_strict, read_weights, rename
from backbone.modeling import PatchEmbeddings
from integrations.ovis.adapter import AdapterConfig, ViTAdapter
from integrations.ovis.head import HeadConfig, SegmentationHead
from integrations.weights_file import WeightsFile

logger = logging.getLogger(__name__)

OWN = WeightsFile("streamformer-ovis-1", "a segmenter", "for published heads use start_head")

# -- the tables -----------------------------------------------------------------------------------

_PIXEL_LAYER = "pixel_decoder.transformer.encoder.layers.#."
_SELF = "predictor.transformer_self_attention_layers.#."
_CROSS = "predictor.transformer_cross_attention_layers.#."
_FEED = "predictor.transformer_ffn_layers.#."
_LAYER = "transformer.decoder.layers.#."

# Keys below ``sem_seg_head.`` -> ours. The joint projection of self-attention is split afterwards.
DETECTRON2_RENAMES = {
    "pixel_decoder.input_proj.#.": "pixel_decoder.input_projections.#.",
    "pixel_decoder.transformer.level_embed": "pixel_decoder.level_embed",
    f"{_PIXEL_LAYER}self_attn.": "pixel_decoder.encoder.layers.#.self_attn.",
    f"{_PIXEL_LAYER}norm1.": "pixel_decoder.encoder.layers.#.self_attn_layer_norm.",
    f"{_PIXEL_LAYER}linear1.": "pixel_decoder.encoder.layers.#.fc1.",
    f"{_PIXEL_LAYER}linear2.": "pixel_decoder.encoder.layers.#.fc2.",
    f"{_PIXEL_LAYER}norm2.": "pixel_decoder.encoder.layers.#.final_layer_norm.",
    "pixel_decoder.mask_features.": "pixel_decoder.mask_projection.",
    "pixel_decoder.adapter_1.norm.": "pixel_decoder.adapter_1.1.",
    "pixel_decoder.adapter_1.": "pixel_decoder.adapter_1.0.",
    "pixel_decoder.layer_1.norm.": "pixel_decoder.layer_1.1.",
    "pixel_decoder.layer_1.": "pixel_decoder.layer_1.0.",
    f"{_SELF}self_attn.": f"{_LAYER}self_attn.",
    f"{_SELF}norm.": f"{_LAYER}self_attn_layer_norm.",
    f"{_CROSS}multihead_attn.": f"{_LAYER}cross_attn.",
    f"{_CROSS}norm.": f"{_LAYER}cross_attn_layer_norm.",
    f"{_FEED}linear1.": f"{_LAYER}fc1.",
    f"{_FEED}linear2.": f"{_LAYER}fc2.",
    f"{_FEED}norm.": f"{_LAYER}final_layer_norm.",
    "predictor.decoder_norm.": "transformer.decoder.layernorm.",
    "predictor.query_feat.": "transformer.queries_features.",
    "predictor.query_embed.": "transformer.queries_embedder.",
    "predictor.level_embed.": "transformer.level_embed.",
    "predictor.class_embed.": "class_predictor.",
    "predictor.mask_embed.layers.#.": "transformer.decoder.mask_predictor.mask_embedder.#.0.",
    "predictor.reid_embed.layers.0.": "embedder.0.",
    "predictor.reid_embed.layers.1.": "embedder.2.",
    "predictor.reid_embed.layers.2.": "embedder.4.",
}

# Names of Mask2Former's first checkpoints.
DETECTRON2_FORMER = {"predictor.static_query.": "transformer.queries_features."}

DETECTRON2_DROPS = {
    "backbone.": "another backbone",
    "criterion.": "a constant of the loss",
    "pixel_mean": "a constant of the preprocessing",
    "pixel_std": "a constant of the preprocessing",
}

TRANSFORMERS_RENAMES = {
    "model.pixel_level_module.decoder.": "pixel_decoder.",
    "model.transformer_module.": "transformer.",
    "class_predictor.": "class_predictor.",
}

TRANSFORMERS_DROPS = {
    "model.pixel_level_module.encoder.": "another backbone",
    "criterion.": "a constant of the loss",
}

_EXTRACTOR = {
    "query_norm.": "query_norm.",
    "feat_norm.": "feature_norm.",
    "attn.": "attention.",
    "ffn_norm.": "ffn_norm.",
    "ffn.fc1.": "ffn.fc1.",
    "ffn.dwconv.dwconv.": "ffn.depthwise.",
    "ffn.fc2.": "ffn.fc2.",
}

# Released StreamFormer adapter -> ours.
RELEASED_ADAPTER = {
    "spm.stem.": "prior.stem.",
    **{f"spm.conv{i + 2}.": f"prior.stages.{i}." for i in range(3)},
    **{f"spm.fc{i + 1}.": f"prior.projections.{i}." for i in range(4)},
    "level_embed": "level_embedding",
    **{
        f"interactions.#.{theirs}.{part}": f"extractors.#.{ours}.{name}"
        for ours, theirs in enumerate(("extractor", "extra_extractors.0", "extra_extractors.1"))
        for part, name in _EXTRACTOR.items()
    },
    "up.": "up.",
    **{f"norm{i + 1}.": f"norms.{i}." for i in range(4)},
}

RELEASED_ADAPTER_DROPS = {
    "embeddings.": "the frozen encoder",
    "encoder.": "the frozen encoder",
    "post_layernorm.": "the frozen encoder",
    "head.": "the frozen encoder",
}

COUNTERS = (
    r".*\.num_batches_tracked"  # of batch norms; released files lack them, nothing reads them
)

# What a published head may lack, or bring in another size: inputs of another backbone's width,
# other classes, and the tracking embedding.
MAY_START_FRESH = (
    r"pixel_decoder\.(input_projections\.\d|adapter_1)\.0\.(weight|bias)"
    r"|class_predictor\.(weight|bias)|embedder\..*"
)

_JOINT = re.compile(r"(transformer\.decoder\.layers\.\d+\.self_attn)\.in_proj_(weight|bias)")
_PARTS = ("q_proj", "k_proj", "v_proj")

# -- applying them --------------------------------------------------------------------------------


def head_from_detectron2(
    state: Mapping[str, Tensor], source: object = "state"
) -> dict[str, Tensor]:
    """A head's weights under our names; ``source`` is named in errors.

    Args:
        state: a whole checkpoint or its part below ``sem_seg_head.``.
        source: named in errors.
    """
    bare = {key.removeprefix("sem_seg_head."): value for key, value in state.items()}
    table = {**DETECTRON2_RENAMES, **DETECTRON2_FORMER}
    result = {}
    for key, value in rename(bare, table, DETECTRON2_DROPS, source).items():
        if match := _JOINT.fullmatch(key):
            for part, third in zip(_PARTS, value.chunk(3), strict=True):
                result[f"{match[1]}.{part}.{match[2]}"] = third.clone()
        else:
            result[key] = value
    return result


def head_to_detectron2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: a head's ``state_dict`` under the names below ``sem_seg_head.``."""
    joined = {}
    for key, value in state.items():
        match = re.fullmatch(r"(transformer\..*self_attn)\.(q|k|v)_proj\.(weight|bias)", key)
        if match is None:
            joined[key] = value
        elif match[2] == "q":
            parts = [state[f"{match[1]}.{part}.{match[3]}"] for part in _PARTS]
            joined[f"{match[1]}.in_proj_{match[3]}"] = torch.cat(parts)
    inverse = {ours: theirs for theirs, ours in DETECTRON2_RENAMES.items()}
    return rename(joined, inverse, {}, "the head")


def adapter_from_released(
    state: Mapping[str, Tensor], source: object = "state"
) -> dict[str, Tensor]:
    """An adapter's weights under our names; the encoder's, beside them, are left out."""
    bare = {key.removeprefix("backbone."): value for key, value in state.items()}
    return rename(bare, RELEASED_ADAPTER, RELEASED_ADAPTER_DROPS, source)


def adapter_to_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse, of an adapter's ``state_dict``."""
    inverse = {ours: theirs for theirs, ours in RELEASED_ADAPTER.items()}
    return rename(state, inverse, {}, "the adapter")


def load_head(head: SegmentationHead, source: str | Path) -> None:
    """Load all weights of a head, from any layout that ``start_head`` reads.

    Raises:
        CheckpointError: a file that cannot be read, or that does not cover the head exactly.
    """
    load_strict(head, _read_head(source), source, layout="a segmentation head")


def start_head(head: SegmentationHead, source: str | Path) -> list[str]:
    """Start a head from a published one, trained elsewhere.

    Args:
        head: takes the weights.
        source: a file (.pth, .pkl, .safetensors), folder or hub id, in detectron2's layout or in
            transformers'.

    Returns:
        Names of the weights that stay as they were: of ``MAY_START_FRESH``, those that the file
        lacks or has in another size.

    Raises:
        CheckpointError: a file that cannot be read, or anything else that is missing, unexpected
            or of another size; keys are named.
    """
    own = head.state_dict()
    state = {
        key: value
        for key, value in _read_head(source).items()
        if not (re.fullmatch(MAY_START_FRESH, key) and key in own and own[key].shape != value.shape)
    }
    load_strict(head, state, source, layout="a Mask2Former head", created=MAY_START_FRESH)
    fresh = [key for key in own if key not in state]
    logger.info("%s: %d weights start fresh: %s", source, len(fresh), ", ".join(fresh) or "none")
    return fresh


def load_released_adapter(adapter: ViTAdapter, source: str | Path) -> None:
    """Load an adapter from a checkpoint in StreamFormer's released layout.

    Raises:
        CheckpointError: a file that cannot be read, or that does not cover the adapter exactly.
    """
    weights = {
        key: value
        for key, value in _read(source).items()
        if not key.startswith(("sem_seg_head.", "criterion."))
    }
    state = adapter_from_released(weights, source)
    load_strict(adapter, state, source, layout="a released ViT-Adapter", created=COUNTERS)


def _read_head(source: str | Path) -> dict[str, Tensor]:
    state = _read(source)
    if any(key.startswith("model.pixel_level_module.") for key in state):
        return rename(state, TRANSFORMERS_RENAMES, TRANSFORMERS_DROPS, source)
    return head_from_detectron2(state, source)


def _read(source: str | Path) -> dict[str, Tensor]:
    if Path(source).suffix == ".pkl" and Path(source).is_file():
        return _read_pickle(Path(source))
    return read_weights(source)


class _ArraysOnly(pickle.Unpickler):
    """Reads pickled NumPy arrays and nothing else: a pickle may otherwise run any code."""

    ALLOWED = {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("collections", "OrderedDict"),
        ("_codecs", "encode"),
        *((f"numpy.{core}.multiarray", name) for core in ("core", "_core")
          for name in ("_reconstruct", "scalar")),
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, only arrays are read")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """Detectron2's model zoo: ``{"model": {name: array}}``."""
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="latin1").load()
    except Exception as error:  # damaged pickles raise a dozen kinds that share no other base
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as arrays: {error}"
        ) from error
    arrays = content.get("model", content) if isinstance(content, Mapping) else None
    if not arrays or not all(isinstance(value, np.ndarray) for value in arrays.values()):
        raise CheckpointError(f"{path} holds no state dict: found {type(content).__name__}")
    return {key: torch.from_numpy(np.array(value)) for key, value in arrays.items()}


# -- an encoder with the release's position grid --------------------------------------------------


class _TransposedPositions(PatchEmbeddings):
    def positions(self, height: int, width: int) -> Tensor:
        return super().positions(width, height)


class ReleasedGridEncoder(StreamformerEncoder):
    """A StreamFormer that resizes its position table as the released training code did.

    That code confuses height and width, so a patch of a non-square frame gets another patch's
    position. Adapters and heads trained so need it; everybody else a ``StreamformerEncoder``.
    """

    kind = "streamformer-released-grid"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        embeddings = _TransposedPositions(self.config)
        embeddings.load_state_dict(self.model.embeddings.state_dict())
        self.model.embeddings = embeddings.to(self.device, self.dtype).requires_grad_(False).eval()

    def settings(self) -> dict[str, Any]:
        """See :meth:`backbone.VideoEncoder.settings`."""
        return {**super().settings(), "position_grid": "transposed"}


# -- own ------------------------------------------------------------------------------------------


def save_segmenter(
    adapter: ViTAdapter,
    head: SegmentationHead,
    path: str | Path,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write both, their configs and ``notes`` (JSON-able: classes, the encoder, …) to one file."""
    parts = {"adapter": adapter, "head": head}
    state = {
        f"{name}.{key}": value
        for name, part in parts.items()
        for key, value in part.state_dict().items()
    }
    configs = {name: part.config.to_dict() for name, part in parts.items()}
    OWN.save(path, state, notes, **configs)


def load_segmenter(path: str | Path) -> tuple[ViTAdapter, SegmentationHead]:
    """Build adapter and head, in eval mode, from a file of ``save_segmenter``.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: a file that is damaged, is not one of ours, or whose weights and configs do
            not agree; keys are named.
    """
    records, state = OWN.read(path)
    kinds = {"adapter": (AdapterConfig, ViTAdapter), "head": (HeadConfig, SegmentationHead)}
    built = []
    for name, (config, module) in kinds.items():
        try:
            fields = records[name]
            if "taps" in fields:
                fields["taps"] = tuple(fields["taps"])
            part: nn.Module = module(config(**fields))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: its config of the {name} does not hold: {error}"
            ) from error
        own = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
        load_strict(part, own, path, layout=f"the {name} of a segmenter")
        built.append(part.eval())
    return built[0], built[1]


def read_notes(path: str | Path) -> dict[str, Any]:
    """Return what ``save_segmenter`` was told to note; errors as ``load_segmenter``."""
    return OWN.notes(path)
