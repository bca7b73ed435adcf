"""The segmentation head: Mask2Former's two decoders and CTVIS's tracking embedding.

Mask2Former ("Masked-attention Mask Transformer for Universal Image Segmentation", CVPR 2022) in
transformers' own modules, composed over feature maps that somebody else computed; the embedding of
CTVIS (ICCV 2023, section 3.1) is an MLP on the decoder's final queries, layer-normed: the very
input of the class predictor.

    res3, res4, res5 --> pixel decoder --> three levels --> decoder <-- Q learned queries
    res2 ------------------^  '--> per-pixel embeddings      |
                                          |                  v
                              masks  <----'------------ queries --> classes, tracking embedding

Each frame is an image of its own here. Letters: F frames, Q queries, C classes, E width of the
tracking embedding, D width of the decoders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoder,
    Mask2FormerPreTrainedModel,
    Mask2FormerTransformerModule,
)

LEVELS = ("res2", "res3", "res4", "res5")  # strides 4, 8, 16, 32
GROUPS = 32  # of the pixel decoder's group norms, fixed in transformers


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Sizes of the head; defaults are those of Mask2Former and CTVIS with a ResNet-50.

    Attributes:
        in_channels: width of the four feature maps.
        num_classes: ``C``, without "no object".
        num_queries: ``Q``, the most objects that a frame can show.
        width: ``D``, of both decoders; a multiple of 32 and of ``num_heads``.
        mask_size: width of the per-pixel embeddings.
        num_heads: of all attentions.
        pixel_layers: deformable layers of the pixel decoder.
        pixel_feedforward: their inner width.
        decoder_layers: layers of the decoder; one more prediction than these is supervised.
        decoder_feedforward: their inner width.
        embedding_size: ``E``.
    """

    in_channels: int
    num_classes: int
    num_queries: int = 100
    width: int = 256
    mask_size: int = 256
    num_heads: int = 8
    pixel_layers: int = 6
    pixel_feedforward: int = 1024
    decoder_layers: int = 9
    decoder_feedforward: int = 2048
    embedding_size: int = 256

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"head {name}={value!r}: needs a whole number of at least 1")
        if self.width % GROUPS or self.width % self.num_heads:
            raise ValueError(
                f"head width={self.width} must be a multiple of {GROUPS} (groups of its norms) and "
                f"of num_heads={self.num_heads}"
            )

    def to_dict(self) -> dict[str, int]:
        """Plain values."""
        return asdict(self)

    def mask2former(self) -> Mask2FormerConfig:
        """The same sizes in transformers' words."""
        return Mask2FormerConfig(
            num_labels=self.num_classes,
            num_queries=self.num_queries,
            feature_size=self.width,
            hidden_dim=self.width,
            mask_feature_size=self.mask_size,
            num_attention_heads=self.num_heads,
            encoder_layers=self.pixel_layers,
            encoder_feedforward_dim=self.pixel_feedforward,
            decoder_layers=self.decoder_layers + 1,  # transformers counts the learned queries
            dim_feedforward=self.decoder_feedforward,
        )


@dataclass
class Prediction:
    """Classes and masks that ``F`` frames' queries show.

    Attributes:
        class_logits: ``(F, Q, C + 1)``; the last column is "no object".
        mask_logits: ``(F, Q, H/4, W/4)``.
    """

    class_logits: Tensor
    mask_logits: Tensor


@dataclass
class HeadOutput(Prediction):
    """What the head says about ``F`` frames.

    Attributes:
        query_embeddings: tracking embeddings, ``(F, Q, E)``, not normalised.
        queries: final queries, layer-normed, ``(F, Q, D)``.
        auxiliary: predictions of the learned queries and of each layer but the last, in order.
    """

    query_embeddings: Tensor
    queries: Tensor
    auxiliary: list[Prediction]


class SegmentationHead(nn.Module):
    """Feature maps in; classes, masks and tracking embeddings of ``Q`` queries per frame out."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        stock = config.mask2former()
        self.pixel_decoder = Mask2FormerPixelDecoder(stock, [config.in_channels] * len(LEVELS))
        self.transformer = Mask2FormerTransformerModule(config.width, stock)
        self.class_predictor = nn.Linear(config.width, config.num_classes + 1)
        self.embedder = nn.Sequential(
            nn.Linear(config.width, config.width),
            nn.ReLU(),
            nn.Linear(config.width, config.width),
            nn.ReLU(),
            nn.Linear(config.width, config.embedding_size),
        )
        self._start_fresh(stock)

    def forward(self, features: Mapping[str, Tensor]) -> HeadOutput:
        """Segment ``F`` frames.

        Args:
            features: "res2" to "res5", each ``(F, in_channels, H/s, W/s)`` with s = 4, 8, 16, 32.

        Raises:
            ValueError: a map that is missing or of another shape than these.
        """
        pixels = self.pixel_decoder(self._check(features))
        decoded = self.transformer(pixels.multi_scale_features, pixels.mask_features)
        states = [state.transpose(0, 1) for state in decoded.intermediate_hidden_states]
        predictions = [
            Prediction(self.class_predictor(state), masks)
            for state, masks in zip(states, decoded.masks_queries_logits, strict=True)
        ]
        *auxiliary, last = predictions
        return HeadOutput(
            last.class_logits,
            last.mask_logits,
            query_embeddings=self.embedder(states[-1]),
            queries=states[-1],
            auxiliary=auxiliary,
        )

    def _check(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        missing = [name for name in LEVELS if name not in features]
        if missing:
            raise ValueError(f"features lack {missing[0]!r}; they hold {', '.join(features)}")
        maps = [features[name] for name in LEVELS]
        frames, channels = len(maps[0]), self.config.in_channels
        height, width = maps[-1].shape[-2:]
        if frames * height * width == 1 and self.config.width == GROUPS:
            raise ValueError(
                f"one frame with one cell in res5, and a head of width {GROUPS}: its group norms "
                "would see a single value each; take larger frames or a wider head"
            )
        for name, level, scale in zip(LEVELS, maps, (8, 4, 2, 1), strict=True):
            expected = (frames, channels, scale * height, scale * width)
            if level.shape != expected:
                raise ValueError(
                    f"{name} has shape {tuple(level.shape)}, expected {expected}: every map twice "
                    f"as fine as the next, of {channels} channels"
                )
        return maps

    @torch.no_grad()
    def _start_fresh(self, stock: Mask2FormerConfig) -> None:
        """Initialise as the published model does.

        Transformers initialises only modules inside its own models, hence by hand here; what it
        leaves at N(0, 0.02), Mask2Former's authors start by Xavier.
        """
        owner = Mask2FormerPreTrainedModel(stock)
        self.pixel_decoder.apply(owner._init_weights)
        self.transformer.apply(owner._init_weights)
        plain = [m for m in self.pixel_decoder.modules() if isinstance(m, nn.Conv2d)]
        for layer in self.pixel_decoder.encoder.layers:
            plain += [layer.fc1, layer.fc2]
        plain += [m for m in self.embedder if isinstance(m, nn.Linear)]
        for module in plain:
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
