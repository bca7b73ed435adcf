"""Our encoders as vision towers of an installed ``llava`` package (LLaVA-NeXT and its forks).

That package builds its tower in one function, which picks a class by substrings of the tower's
name. `register` wraps it, where it is defined and where it was imported: names that begin with
``streamformer:`` or ``siglip:`` get our tower, all others go the old way.

    >>> from integrations.videoqa import llava_tower
    >>> llava_tower.register(clip_frames=16)     # then mm_vision_tower="streamformer:<folder>"

Importable only where ``llava`` is.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PretrainedConfig

from integrations.videoqa.configuration import TOWER_PRESETS, tower_preset
from integrations.videoqa.frames import preprocess
from integrations.videoqa.tower import SAVED_KINDS, VisionTower, load_tower_model

if find_spec("llava") is None:
    raise ImportError(
        "llava_tower needs the llava package, which is not on PyPI; install LLaVA-NeXT, or use "
        "integrations.videoqa.checkpoints.load_model, which does without"
    )

BUILDER = "llava.model.multimodal_encoder.builder"
USERS = ("llava.model.llava_arch",)  # modules that imported the builder's function by name
FUNCTION = "build_vision_tower"


class TowerConfig(PretrainedConfig):
    """What ``llava`` reads of a tower's config; the model type chooses its path for clips."""

    model_type = "timesformer"


class SquareProcessor:
    """Images squashed to squares and normalised, with the attributes that ``llava`` reads."""

    def __init__(self, side: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.size = (side, side)
        self.crop_size = {"height": side, "width": side}
        self.image_mean, self.image_std = tuple(mean), tuple(std)

    def preprocess(
        self,
        images: Image.Image | np.ndarray | Sequence[Image.Image | np.ndarray],
        return_tensors: str = "pt",
    ) -> dict[str, Tensor]:
        """``{"pixel_values": (T, 3, side, side)}`` of one image or several, uint8 RGB.

        Raises:
            ValueError: tensors of another framework are asked for.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r}: only 'pt' is made here")
        alone = isinstance(images, Image.Image) or getattr(images, "ndim", 0) == 3
        listed = [
            image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
            for image in ([images] if alone else images)
        ]
        pixels = preprocess(listed, self.size[0], self.image_mean, self.image_std)
        return {"pixel_values": pixels}

    __call__ = preprocess


class LlavaTower(nn.Module):
    """A tower as ``llava`` wants one.

    Upstream joins the frames of all clips to one batch ``(frames, 3, H, W)`` before it calls the
    tower; a video encoder must know where a clip ends. It is told by ``clip_frames``, or for one
    call by `clips`. Clips may also come as ``(B, T, 3, H, W)``.

    Args:
        spec: ``streamformer:<folder or hub id>`` or ``siglip:<folder or hub id>``.
        clip_frames: frames of every clip in a joined batch; 1 for images; None to be told.
        features: preset of ``configuration.TOWER_PRESETS``.
        delay_load: load at `load_model` only.
    """

    def __init__(
        self,
        spec: str,
        clip_frames: int | None = None,
        features: str = "released",
        delay_load: bool = False,
    ) -> None:
        super().__init__()
        self.spec, self.clip_frames, self.features = spec, clip_frames, features
        self.is_loaded = False
        self._clips: tuple[int, ...] | None = None
        if not delay_load:
            self.load_model()

    def load_model(self, device_map: Any = None) -> None:
        """Load the encoder; a second call does nothing.

        Raises:
            ValueError: a map over several devices.
        """
        if self.is_loaded:
            return
        if isinstance(device_map, dict) or device_map in ("balanced", "sequential"):
            raise ValueError(f"device_map={device_map!r}: a tower lies on one device, such as cuda")
        preset = tower_preset(self.features, self.spec.partition(":")[0])
        self.vision_tower = VisionTower(
            load_tower_model(self.spec),
            self.spec,
            layer=preset["tower_layer"],
            post_norm=preset["tower_post_norm"],
        )
        self.vision_tower.requires_grad_(False)
        encoder = self.vision_tower.encoder
        self.image_processor = SquareProcessor(
            encoder.image_size, encoder.image_mean, encoder.image_std
        )
        self.config = TowerConfig(
            hidden_size=encoder.embed_dim,
            image_size=encoder.image_size,
            patch_size=encoder.patch_size,
        )
        if device_map not in (None, "auto"):
            self.vision_tower.to(device_map)
        self.is_loaded = True

    @contextmanager
    def clips(self, lengths: Sequence[int]) -> Iterator[None]:
        """Within the block, joined batches consist of clips of these lengths."""
        before, self._clips = self._clips, tuple(lengths)
        try:
            yield
        finally:
            self._clips = before

    def forward(self, images: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Encode clips.

        Args:
            images: clips ``(B, T, 3, H, W)``; a joined batch ``(frames, 3, H, W)``; or a list of
                clips ``(T, 3, H, W)``.

        Returns:
            ``(B, T, N, D)``, ``(frames, N, D)``, or a list of ``(T, N, D)``, in the input's type.

        Raises:
            ValueError: a joined batch of which nobody told where its clips end.
        """
        if not isinstance(images, Tensor):
            return [self.forward(clip[None])[0] for clip in images]
        if images.ndim == 5:
            return self.vision_tower(images).to(images.dtype)
        parts = [self.forward(clip[None])[0] for clip in images.split(self._lengths(len(images)))]
        return torch.cat(parts)

    def _lengths(self, count: int) -> list[int]:
        if self._clips is not None:
            lengths = list(self._clips)
        elif self.clip_frames is not None:
            lengths = [self.clip_frames] * (count // self.clip_frames)
        else:
            raise ValueError(
                f"a batch of {count} frames, and no word on its clips: register(clip_frames=…), 1 "
                "for images, or call within tower.clips([…])"
            )
        if sum(lengths) != count:
            raise ValueError(
                f"a batch of {count} frames is no row of clips of {lengths or self.clip_frames}; "
                "use tower.clips([…]) where lengths differ"
            )
        return lengths

    @property
    def hidden_size(self) -> int:
        """Width of the tokens."""
        return self.config.hidden_size

    @property
    def image_size(self) -> int:
        """Side of the frames, in pixels."""
        return self.config.image_size

    @property
    def num_patches_per_side(self) -> int:
        """Patches along each side."""
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        """Tokens of a frame."""
        return self.num_patches_per_side**2

    @property
    def dtype(self) -> torch.dtype:
        """Type that the encoder computes in."""
        return self.vision_tower.encoder.dtype

    @property
    def device(self) -> torch.device:
        """Where the encoder is."""
        return self.vision_tower.encoder.device

    @property
    def dummy_feature(self) -> Tensor:
        """Features of no image, ``(1, D)`` zeros."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)


def register(clip_frames: int | None = None, features: str = "released") -> None:
    """Let ``llava`` build our towers; calling it again only changes the settings.

    Args:
        clip_frames: frames of every clip, see `LlavaTower`.
        features: preset of ``configuration.TOWER_PRESETS``, for both kinds of encoder.

    Raises:
        ValueError: no such preset, or no frames in a clip.
        ImportError: a ``llava`` that builds its towers elsewhere.
    """
    if features not in TOWER_PRESETS:
        raise ValueError(f"no preset {features!r}; known are {', '.join(TOWER_PRESETS)}")
    if clip_frames is not None and clip_frames < 1:
        raise ValueError(f"clip_frames={clip_frames}: a clip has at least one frame")
    builder = importlib.import_module(BUILDER)
    if not hasattr(builder, FUNCTION):
        raise ImportError(f"{BUILDER} has no {FUNCTION}; this llava is laid out otherwise")
    original = getattr(builder, FUNCTION)
    original = getattr(original, "wrapped", original)
    wrapper = _wrap(original, clip_frames, features)
    for name in (BUILDER, *USERS):
        setattr(importlib.import_module(name), FUNCTION, wrapper)


def _wrap(original: Callable, clip_frames: int | None, features: str) -> Callable:
    """``build_vision_tower`` that knows our names, too."""

    def build_vision_tower(vision_tower_cfg: Any, **kwargs: Any) -> nn.Module:
        """Build the tower that a config names."""
        name = getattr(vision_tower_cfg, "mm_vision_tower", None)
        name = name or getattr(vision_tower_cfg, "vision_tower", None)
        if str(name).partition(":")[0] not in SAVED_KINDS:
            return original(vision_tower_cfg, **kwargs)
        return LlavaTower(name, clip_frames, features, kwargs.get("delay_load", False))

    build_vision_tower.wrapped = original
    return build_vision_tower
