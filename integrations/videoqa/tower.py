"""The vision tower: any frozen encoder of frames, seen at one layer.

Which tokens the LLM gets is the same question for every encoder: of which layer, and whether the
encoder's final norm follows. Both are stated, and equal for two towers that are compared
(``configuration.TOWER_PRESETS`` names the pairing of the published comparison).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, SiglipVisionConfig, SiglipVisionModel

from backbone import (
    FrameFeatures,
    SiglipEncoder,
    StreamformerConfig,
    StreamformerEncoder,
    StreamformerModel,
    VideoEncoder,
    build_encoder,
)
from backbone.checkpoints import load_siglip

SAVED_KINDS = ("streamformer", "siglip")  # whose weights are saved with the model


def build_tower_model(config: PretrainedConfig) -> nn.Module:
    """The module that a ``tower_config`` describes, with weights yet to be loaded.

    Raises:
        ValueError: a config of neither kind.
    """
    if isinstance(config, StreamformerConfig):
        return StreamformerModel(config)
    if isinstance(config, SiglipVisionConfig):
        return SiglipVisionModel(config)
    raise ValueError(
        f"tower_config of model_type {config.model_type!r}; needed is 'streamformer' or "
        "'siglip_vision_model'. Other encoders are named by tower=, and not saved with the model"
    )


def load_tower_model(
    spec: str | VideoEncoder, window: int | None = None, temporal_positions: str | None = None
) -> nn.Module:
    """Load what a tower is made of.

    Args:
        spec: as for ``backbone.build_encoder``, or an encoder that is built already.
        window: frames that a frame may see; None keeps the checkpoint's.
        temporal_positions: policy past the time table; None keeps the checkpoint's.

    Returns:
        A model of its own kind, unfused, so that it can be saved again; or, for encoders of other
        kinds, the ``VideoEncoder`` itself.

    Raises:
        ValueError: as ``backbone.build_encoder``.
    """
    if isinstance(spec, VideoEncoder):
        return spec
    kind, _, source = spec.partition(":")
    asked = {"window": window, "temporal_positions": temporal_positions}
    if kind == "streamformer" and source:
        given = {name: value for name, value in asked.items() if value is not None}
        return StreamformerModel.from_pretrained(source, **given)
    if kind == "siglip" and source:
        return load_siglip(source)
    return build_encoder(spec, **asked)


class VisionTower(nn.Module):
    """A frozen encoder and the layer of it that is used; always in eval mode, never with gradients.

    Attributes:
        model: what is saved: a ``StreamformerModel``, a ``SiglipVisionModel``, or an encoder; None
            until one is attached.
        layer, post_norm, frame_token: see ``configuration.StreamformerLlavaConfig``.
    """

    def __init__(
        self,
        model: nn.Module | None,
        name: str | None = None,
        layer: int = -1,
        post_norm: bool = True,
        frame_token: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.name = model, name
        self.layer, self.post_norm, self.frame_token = layer, post_norm, frame_token
        self._view: list[VideoEncoder] = []  # a list: its module must not be saved twice

    @property
    def encoder(self) -> VideoEncoder:
        """The encoder, made on first use: its weights may be loaded after the tower is built.

        Raises:
            ValueError: the layer does not exist, or its norm does not.
        """
        if not self._view:
            if self.model is None:
                raise ValueError(
                    "this model has no tower yet; load it by from_pretrained, or attach_tower"
                )
            if isinstance(self.model, StreamformerModel):
                encoder = StreamformerEncoder(
                    self.model, name=self.name or "streamformer", fused=False
                )
            elif isinstance(self.model, SiglipVisionModel):
                encoder = SiglipEncoder(self.model, name=self.name or "siglip")
            else:
                encoder = self.model
            encoder._layer_numbers((self.layer,))
            if self.post_norm and not self._is_last(encoder):
                _final_norm(encoder)
            self._view.append(encoder)
        return self._view[0]

    def forward(self, clips: Tensor) -> Tensor:
        """Encode normalised clips ``(B, T, 3, H, W)`` to tokens ``(B, T, N, D)``.

        With ``frame_token`` there is one more, the frame's pooled embedding, in front.
        """
        return self._select(self.encoder.encode(clips, layers=self._inner))

    def stream(self, batch_size: int = 1) -> TowerStream:
        """Begin ``batch_size`` streams."""
        return TowerStream(self, batch_size)

    def train(self, mode: bool = True) -> VisionTower:
        """Stay in eval mode."""
        return super().train(False)

    @property
    def _inner(self) -> tuple[int, ...]:
        """Layers to ask the encoder for; the normed last one always comes."""
        return () if self.post_norm and self._is_last(self.encoder) else (self.layer,)

    def _is_last(self, encoder: VideoEncoder) -> bool:
        return self.layer in (-1, encoder.num_layers)

    @torch.no_grad()
    def _select(self, features: FrameFeatures) -> Tensor:
        tokens = features.layers[self.layer] if self._inner else features.patch_tokens
        if self._inner and self.post_norm:
            tokens = _final_norm(self.encoder)(tokens)
        if self.frame_token:
            tokens = torch.cat([features.frame_embeddings.unsqueeze(2), tokens], dim=2)
        return tokens


class TowerStream:
    """Frames one after the other through a tower; ``VisionTower.stream`` makes it."""

    def __init__(self, tower: VisionTower, batch_size: int) -> None:
        self.tower = tower
        self.stream = tower.encoder.stream(batch_size, layers=tower._inner)

    def push(self, frames: Tensor) -> Tensor:
        """Tokens ``(B, t, N, D)`` of the next frames ``(B, 3, H, W)`` or ``(B, t, 3, H, W)``."""
        return self.tower._select(self.stream.push(frames))

    @property
    def memory_bytes(self) -> int:
        """Bytes kept between frames."""
        return self.stream.memory_bytes


def _final_norm(encoder: VideoEncoder) -> nn.Module:
    """The encoder's norm after its last layer."""
    model = getattr(encoder, "model", None)
    model = getattr(model, "vision_model", model)  # older transformers nest SigLIP's tower
    norm = getattr(model, "post_layernorm", None)
    if norm is None:
        raise ValueError(
            f"{encoder.name} ({encoder.kind}) shows no final norm to apply to an inner layer; use "
            "tower_post_norm=False, or the last layer"
        )
    return norm


def describe(source: str | Path) -> str:
    """``kind:source`` of a folder or hub id, by the model type in its config."""
    from transformers import PretrainedConfig

    config, _ = PretrainedConfig.get_config_dict(source)
    kind = config.get("model_type")
    kinds = {
        "timesformer": "streamformer",
        "streamformer": "streamformer",
        "siglip": "siglip",
        "siglip_vision_model": "siglip",
    }
    if kind not in kinds:
        raise ValueError(
            f"{source} is no encoder that is known here: its model_type is {kind!r}; name one "
            "with tower=kind:<folder or hub id>"
        )
    return f"{kinds[kind]}:{source}"
