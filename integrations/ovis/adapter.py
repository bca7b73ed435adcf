"""ViT-Adapter: a pyramid of feature maps beside a frozen encoder of one resolution.

"Vision Transformer Adapter for Dense Predictions" (ICLR 2023) in the variant of StreamFormer, which
leaves out the injector: nothing flows back into the encoder. So the encoder runs as ever, whole
clips or frame by frame, without gradients, and the adapter reads the tokens of four of its layers:

    frames --> encoder:  layers .. tap 0 .. tap 1 .. tap 2 .. tap 3
       |                             |        |        |        |
       '--> spatial prior: tokens -> extr --> extr --> extr --> extr, extr, extr --> maps
            of strides 8, 16, 32

An extractor lets the pyramid's tokens look at the encoder's grid by deformable attention. At the
end each level gets the encoder's own grid, resized, on top. Every frame is an image of its own
here: time is the encoder's business, and the maps of a frame never depend on later frames.

Letters: B clips, T frames, F = B*T images, N patches, D width, S tokens of the pyramid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone import VideoEncoder
from integrations.ovis.deformable import DeformableAttention, Shape, cell_centres
from integrations.ovis.head import LEVELS

BLOCKS = 4  # places where the encoder is tapped, one for each level's final addition
NORM_EPS = 1e-6
STRIDE = 32  # of the coarsest level: sides of frames are multiples of it


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Sizes of the adapter; defaults are those of StreamFormer over a ViT-B.

    Attributes:
        embed_dim: ``D``, the encoder's width and that of all maps.
        patch_size: side of the encoder's patches, in pixels.
        taps: numbers of the four encoder layers whose tokens are read, ascending.
        stem_width: channels at stride 4 in the spatial prior.
        num_heads: of the deformable attention; divides ``embed_dim``.
        num_points: places that a head looks at.
        ffn_ratio: inner width of an extractor's feed-forward part, as a share of ``embed_dim``.
        extra_extractors: further ones after the last tap.
    """

    embed_dim: int
    patch_size: int
    taps: tuple[int, int, int, int]
    stem_width: int = 64
    num_heads: int = 12
    num_points: int = 4
    ffn_ratio: float = 0.25
    extra_extractors: int = 2

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"adapter num_heads={self.num_heads} does not divide the encoder's width "
                f"{self.embed_dim}"
            )
        if int(self.embed_dim * self.ffn_ratio) < 1:
            raise ValueError(f"adapter ffn_ratio={self.ffn_ratio} of {self.embed_dim} is no width")
        if len(self.taps) != BLOCKS or list(self.taps) != sorted(self.taps):
            raise ValueError(f"adapter taps={self.taps}: needs {BLOCKS} layers in ascending order")

    @classmethod
    def for_encoder(cls, encoder: VideoEncoder, **options: Any) -> AdapterConfig:
        """The config for an encoder, tapped at a quarter, half, three quarters and its end."""
        layers = encoder.num_layers
        taps = tuple(math.ceil(layers * (block + 1) / BLOCKS) for block in range(BLOCKS))
        sizes = {"embed_dim": encoder.embed_dim, "patch_size": encoder.patch_size, "taps": taps}
        return cls(**{**sizes, **options})

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


# -- parts ----------------------------------------------------------------------------------------


def _conv_norm(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    """3x3 convolution, batch norm, ReLU. Several processes: see nn.SyncBatchNorm's conversion."""
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def to_tokens(maps: Tensor) -> Tensor:
    """``(F, D, h, w)`` to ``(F, h*w, D)``, row by row."""
    return maps.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, shape: Shape) -> Tensor:
    """``(F, h*w, D)`` to ``(F, D, h, w)``."""
    return tokens.transpose(1, 2).unflatten(2, shape)


class SpatialPrior(nn.Module):
    """A small convolutional network: frames to maps of strides 4, 8, 16 and 32."""

    def __init__(self, stem_width: int, embed_dim: int) -> None:
        super().__init__()
        width = stem_width
        self.stem = nn.Sequential(
            *_conv_norm(3, width, 2),
            *_conv_norm(width, width, 1),
            *_conv_norm(width, width, 1),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        widths = (width, 2 * width, 4 * width, 4 * width)
        self.stages = nn.ModuleList(
            nn.Sequential(*_conv_norm(inputs, outputs, 2))
            for inputs, outputs in zip(widths[:-1], widths[1:], strict=True)
        )
        self.projections = nn.ModuleList(nn.Conv2d(inner, embed_dim, 1) for inner in widths)

    def forward(self, frames: Tensor) -> list[Tensor]:
        """Maps ``(F, D, H/s, W/s)`` of ``(F, 3, H, W)``, s = 4, 8, 16, 32."""
        maps = [self.stem(frames)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return [project(level) for project, level in zip(self.projections, maps, strict=True)]


class ConvFFN(nn.Module):
    """Feed-forward part with a depth-wise 3x3 convolution on each level's map."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, tokens: Tensor, shapes: Sequence[Shape]) -> Tensor:
        """Transform ``(F, S, D)`` tokens of levels of these shapes."""
        inner = self.fc1(tokens)
        levels = inner.split([height * width for height, width in shapes], dim=1)
        mixed = [
            to_tokens(self.depthwise(to_map(level, shape)))
            for level, shape in zip(levels, shapes, strict=True)
        ]
        return self.fc2(F.gelu(torch.cat(mixed, 1)))


class Extractor(nn.Module):
    """The pyramid's tokens look at the encoder's grid."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.query_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.feature_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.attention = DeformableAttention(width, config.num_heads, 1, config.num_points)
        self.ffn_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.ffn = ConvFFN(width, int(width * config.ffn_ratio))

    def forward(
        self, query: Tensor, shapes: Sequence[Shape], tokens: Tensor, grid: Shape
    ) -> Tensor:
        """Update the pyramid's tokens.

        Args:
            query: ``(F, S, D)``, the pyramid.
            shapes: of its levels.
            tokens: ``(F, N, D)``, the encoder's.
            grid: rows and columns of its patches.
        """
        centres = cell_centres(shapes, query)[None, :, None]  # (1, S, 1, 2)
        normed = self.query_norm(query)
        query = query + self.attention(normed, centres, self.feature_norm(tokens), [grid])
        return query + self.ffn(self.ffn_norm(query), shapes)


# -- the adapter ----------------------------------------------------------------------------------


class ViTAdapter(nn.Module):
    """Frames and the encoder's tokens in, maps of strides 4, 8, 16, 32 out.

    Example:
        >>> adapter = ViTAdapter(AdapterConfig.for_encoder(encoder))
        >>> features = encoder.encode(clip, adapter.taps)        # clip (B, T, 3, H, W)
        >>> maps = adapter(clip, features.layers)                # "res2": (B*T, D, H/4, W/4), …
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embed_dim
        self.prior = SpatialPrior(config.stem_width, width)
        self.level_embedding = nn.Parameter(torch.empty(3, width))
        last = BLOCKS - 1
        self.extractors = nn.ModuleList(
            nn.ModuleList(
                Extractor(config) for _ in range(1 + config.extra_extractors * (block == last))
            )
            for block in range(BLOCKS)
        )
        self.up = nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in LEVELS)
        self._start_fresh()

    @property
    def taps(self) -> tuple[int, ...]:
        """Encoder layers to ask for, in ``encode(clip, taps)`` or ``stream(layers=taps)``."""
        return self.config.taps

    def forward(self, frames: Tensor, layers: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Build the pyramid.

        Args:
            frames: ``(B, T, 3, H, W)``, normalised as for the encoder; H and W are multiples of 32.
            layers: the encoder's tokens ``(B, T, N, D)`` of all ``taps``, as in ``FrameFeatures``.

        Returns:
            "res2", "res3", "res4", "res5": ``(B*T, D, H/s, W/s)`` with s = 4, 8, 16, 32, clip by
            clip, frame by frame.

        Raises:
            ValueError: sides that do not divide, tokens that are missing or of another shape.
        """
        grid = self._check(frames, layers)
        dtype = self.level_embedding.dtype
        taps = [layers[tap].flatten(0, 1).to(dtype) for tap in self.taps]  # (F, N, D)
        finest, *coarse = self.prior(frames.flatten(0, 1).to(dtype))  # (F, D, h, w)
        shapes = [tuple(level.shape[-2:]) for level in coarse]
        pyramid = torch.cat(
            [to_tokens(m) + e for m, e in zip(coarse, self.level_embedding, strict=True)], 1
        )  # (F, S, D)
        for extractors, tokens in zip(self.extractors, taps, strict=True):
            for extractor in extractors:
                pyramid = extractor(pyramid, shapes, tokens, grid)
        parts = pyramid.split([height * width for height, width in shapes], dim=1)
        maps = [to_map(part, shape) for part, shape in zip(parts, shapes, strict=True)]
        maps = [finest + self.up(maps[0]), *maps]
        return {
            name: norm(level + _resized(to_map(tokens, grid), level.shape[-2:]))
            for name, norm, level, tokens in zip(LEVELS, self.norms, maps, taps, strict=True)
        }

    def _check(self, frames: Tensor, layers: Mapping[int, Tensor]) -> Shape:
        if frames.ndim != 5 or frames.shape[2] != 3:
            raise ValueError(f"frames of shape {tuple(frames.shape)}; expected (B, T, 3, H, W)")
        batch, count, _, height, width = frames.shape
        patch = self.config.patch_size
        side = math.lcm(STRIDE, patch)
        if height % side or width % side:
            raise ValueError(
                f"frames of {height} x {width} pixels: the adapter needs multiples of {side}; pad "
                "them right and below with zeros, after normalising"
            )
        grid = (height // patch, width // patch)
        expected = (batch, count, grid[0] * grid[1], self.config.embed_dim)
        for tap in self.taps:
            if tap not in layers:
                raise ValueError(
                    f"the encoder's layer {tap} is missing among {sorted(layers)}; ask for the "
                    f"adapter's taps {self.taps}"
                )
            if layers[tap].shape != expected:
                raise ValueError(
                    f"tokens of layer {tap} have shape {tuple(layers[tap].shape)}, expected "
                    f"{expected} for these frames"
                )
        return grid

    @torch.no_grad()
    def _start_fresh(self) -> None:
        """Initialise as the published adapter does, but leave deformable attention its own start.

        The original loses the directions of its heads to an initialisation that runs later.
        """
        nn.init.normal_(self.level_embedding)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, ConvFFN):
                for linear in (module.fc1, module.fc2):
                    nn.init.trunc_normal_(linear.weight, std=0.02)
                    nn.init.zeros_(linear.bias)


def _resized(maps: Tensor, shape: Sequence[int]) -> Tensor:
    if maps.shape[-2:] == tuple(shape):
        return maps
    return F.interpolate(maps, size=tuple(shape), mode="bilinear", align_corners=False)


def adapt_clip(
    encoder: VideoEncoder, adapter: ViTAdapter, clip: Tensor, gradients: bool = False
) -> dict[str, Tensor]:
    """Encode whole clips and build their pyramids.

    Args:
        encoder: any; frozen unless its owner says otherwise.
        adapter: made for it.
        clip: ``(B, T, 3, H, W)``, normalised.
        gradients: let them flow through the encoder, for parts of it that train (LoRA, say). By
            default it runs without: no memory for its activations, no time for its backward pass.

    Returns:
        As :meth:`ViTAdapter.forward`.
    """
    return adapter(clip, encode_taps(encoder, clip, adapter.taps, gradients))


def encode_taps(
    encoder: VideoEncoder, clip: Tensor, taps: Sequence[int], gradients: bool = False
) -> dict[int, Tensor]:
    """Tokens ``(B, T, N, D)`` of some layers for clips ``(B, T, 3, H, W)``, see `adapt_clip`."""
    if not gradients:
        return encoder.encode(clip, taps).layers
    # `encode` is a frozen encoder's; what its subclasses implement computes the same with gradients
    return encoder._features(encoder._prepare(clip), None, encoder._layer_numbers(taps)).layers
