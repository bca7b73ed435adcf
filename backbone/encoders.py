"""The one interface that every downstream task sees: a frozen encoder of frames.

The contract of :class:`VideoEncoder`, for third parties too: normalised frames in, and for every
frame patch tokens after the encoder's final norm, one pooled embedding, and on request the tokens
of inner layers, counted in the same way by all encoders (0 the embeddings, ``i`` the output of
layer ``i``, ``num_layers`` or -1 the last one before the final norm). ``encode`` takes whole clips,
``stream`` the frames as they come, and both give the same features. An image encoder sees each
frame alone; a video encoder sees earlier frames too, never later ones.

Another encoder joins by :func:`register_encoder`, or by an entry point of the group
``streamformer.encoders`` in its own package; then ``build_encoder("its-kind:…")`` finds it, and
every task of the suite runs with it.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SiglipVisionModel

from .cache import StreamingCache
from .checkpoints import load_siglip
from .fusion import fuse
from .modeling import StreamformerModel, project_patches
from .quantization import quantize
from .still import StillMemory, check_still

logger = logging.getLogger(__name__)

ENTRY_POINTS = "streamformer.encoders"


@dataclass
class FrameFeatures:
    """Features of ``t`` frames of ``B`` clips or streams.

    Attributes:
        patch_tokens: ``(B, t, N, D)``, after the encoder's final norm.
        frame_embeddings: ``(B, t, D)``, pooled, not normalised.
        layers: tokens ``(B, t, N, D)`` of the layers asked for, by their number.
        head: the pooling head that made the frame embeddings, if the encoder has SigLIP's.
    """

    patch_tokens: Tensor
    frame_embeddings: Tensor
    layers: dict[int, Tensor] = field(default_factory=dict)
    head: nn.Module | None = field(default=None, repr=False, compare=False)

    def patch_embeddings(self) -> Tensor:
        """The patches in the space of frame embeddings, ``(B, t, N, D)``: see `project_patches`.

        Raises:
            ValueError: the encoder brought no pooling head.
        """
        if self.head is None:
            raise ValueError(
                "these features come without a pooling head, which brings patches into the space "
                "of texts; an encoder of one's own gives it as FrameFeatures(…, head=…)"
            )
        return project_patches(self.head, self.patch_tokens)


class _DeferredFeatures(FrameFeatures):
    """Features whose final norm and pooling run when they are first asked for, or never.

    Args:
        tokens: ``(B, t, N, D)``, before the final norm.
        norm: the final norm.
        head: the pooling head.
        layers: tokens of the layers asked for.
    """

    def __init__(
        self, tokens: Tensor, norm: nn.Module, head: nn.Module, layers: dict[int, Tensor]
    ) -> None:
        self._tokens, self._norm = tokens, norm
        self.head, self.layers = head, layers

    @cached_property
    def patch_tokens(self) -> Tensor:
        """See :class:`FrameFeatures`."""
        tokens, self._tokens = self._tokens, None
        return self._norm(tokens)

    @cached_property
    def frame_embeddings(self) -> Tensor:
        """See :class:`FrameFeatures`."""
        return self.head(self.patch_tokens)


def weights_digest(model: nn.Module) -> str:
    """Digest of all weights: models of one kind that share it give the same numbers."""
    digest = hashlib.blake2b(digest_size=16)
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class VideoEncoder(nn.Module, ABC):
    """A frozen encoder of frames; subclasses implement :meth:`_features` and :meth:`settings`.

    Attributes:
        kind: what it is, the part of its spec before the colon.
        name: the spec that it was built from.
        embed_dim: width ``D`` of tokens and embeddings.
        patch_size: side of a patch, in pixels.
        image_size: side of the frames that it was trained on, in pixels.
        num_layers: layers ``L``.
        image_mean: mean to subtract from frames in [0, 1], per channel.
        image_std: deviation to divide them by.
    """

    kind: str
    name: str
    embed_dim: int
    patch_size: int
    image_size: int
    num_layers: int
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @torch.no_grad()
    def encode(self, clip: Tensor, layers: Sequence[int] = ()) -> FrameFeatures:
        """Encode whole clips.

        Args:
            clip: normalised frames ``(B, T, 3, H, W)``, float.
            layers: numbers of the layers whose tokens are wanted.

        Raises:
            ValueError: wrong shape or type, values that are not finite, no such layer.
        """
        return self._features(self._prepare(clip), None, self._layer_numbers(layers))

    def stream(self, batch_size: int = 1, layers: Sequence[int] = ()) -> EncoderStream:
        """Begin ``batch_size`` streams, whose features include the tokens of ``layers``."""
        return EncoderStream(self, batch_size, self._layer_numbers(layers))

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that decides the encoder's numbers, as JSON: kept beside every result.

        Weights by their digest, not by the folder that they happen to lie in.
        """

    @abstractmethod
    def _features(
        self, frames: Tensor, memory: StreamingCache | None, layers: dict[int, int]
    ) -> FrameFeatures:
        """Encode ``(B, t, 3, H, W)``: whole clips, or the next frames of ``memory``'s streams.

        ``layers`` maps each number as asked for to its place among ``L + 1`` hidden states.
        """

    def _new_memory(self, batch_size: int, height: int, width: int) -> StreamingCache | None:
        """Memory for streams of frames of this size; None for an encoder that needs none.

        An encoder may bring its own kind, with the methods ``rows``, ``reset``, ``state_dict`` and
        ``load_state_dict`` and the property ``memory_bytes`` of :class:`StreamingCache`.
        """
        return None

    def _fingerprint(self) -> Tensor:
        """Digest of the settings, ``(16,)`` uint8: a saved stream goes on with the same only."""
        settings = json.dumps(self.settings(), sort_keys=True).encode()
        return torch.tensor(list(hashlib.blake2b(settings, digest_size=16).digest())).byte()

    @property
    def device(self) -> torch.device:
        """Where the encoder runs; frames are moved there."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type the encoder computes in; frames are cast to it."""
        return next(self.parameters()).dtype

    def train(self, mode: bool = True) -> VideoEncoder:
        """Stay in eval mode: an encoder is frozen, also inside a model that trains."""
        return super().train(False)

    def _layer_numbers(self, layers: Sequence[int]) -> dict[int, int]:
        count = self.num_layers + 1
        for number in layers:
            if not -count <= number < count:
                raise ValueError(
                    f"layer {number} of {self.name}: it has layers 0 (embeddings) to "
                    f"{self.num_layers}, or -{count} to -1"
                )
        return {number: number % count for number in layers}

    def _prepare(self, frames: Tensor) -> Tensor:
        if frames.ndim != 5 or frames.shape[2] != 3 or 0 in frames.shape:
            raise ValueError(
                f"frames of shape {tuple(frames.shape)}; expected (B, T, 3, H, W), not empty"
            )
        if not frames.is_floating_point():
            raise ValueError(
                f"frames of type {frames.dtype}; expected normalised floats "
                "(backbone.video.preprocess makes them of uint8 images)"
            )
        height, width = frames.shape[3:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"frames of {height} x {width} pixels do not divide into patches of "
                f"{self.patch_size}; resize or crop them first (backbone.video.preprocess)"
            )
        # On a GPU this test would wait for the device in every step.
        if frames.device.type == "cpu" and not frames.isfinite().all():
            broken = (~frames.isfinite()).flatten(2).any(2).nonzero()[0].tolist()
            raise ValueError(
                f"frame {broken[1]} of clip {broken[0]} holds NaN or infinity; mend or drop it "
                "before the encoder"
            )
        return frames.to(self.device, self.dtype)


class EncoderStream:
    """Frames of one or more streams, one after the other; ``VideoEncoder.stream`` makes it.

    Example:
        >>> stream = build_encoder("streamformer:…", window=64).stream(batch_size=2)
        >>> stream.push(frames)            # a frame for each stream, (2, 3, H, W)
        >>> stream.push(chunk)             # several, (2, t, 3, H, W)
        >>> stream.push(frame, rows=[1])   # only the second stream has a new frame, (1, 3, H, W)
        >>> stream.reset(rows=[0])         # the first stream ends, another one takes its place
    """

    def __init__(self, encoder: VideoEncoder, batch_size: int, layers: dict[int, int]) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: a stream needs at least one row")
        self.encoder, self.batch_size = encoder, batch_size
        self._layers = layers
        self._memory: StreamingCache | None = None
        self._size: tuple[int, int] | None = None
        self._seen = [0] * batch_size

    @torch.no_grad()
    def push(self, frames: Tensor, rows: Sequence[int] | None = None) -> FrameFeatures:
        """Encode the next frame or frames of all streams, or of the ``rows`` named.

        Args:
            frames: normalised, ``(B, 3, H, W)`` or ``(B, t, 3, H, W)``.
            rows: the streams that these frames belong to, in this order; None for all.

        Raises:
            ValueError: another number of streams or another size of frames than the stream began
                with, a wrong shape, or values that are not finite. The stream goes on unharmed.
        """
        chosen = self._chosen(rows)
        frames = self.encoder._prepare(frames.unsqueeze(1) if frames.ndim == 4 else frames)
        if frames.shape[0] != len(chosen):
            raise ValueError(
                f"frames for {frames.shape[0]} streams, expected {len(chosen)}; name the streams "
                "that have new frames with rows=[...]"
            )
        size = (frames.shape[3], frames.shape[4])
        memory = self._memory_for(size)
        fed = memory if memory is None or rows is None else memory.rows(chosen)
        features = self.encoder._features(frames, fed, self._layers)
        self._memory, self._size = memory, size
        for row in chosen:
            self._seen[row] += frames.shape[1]
        return features

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Begin anew, all streams or the ``rows`` named; others go on undisturbed.

        When all begin anew, the next frames may be of another size.
        """
        chosen = self._chosen(rows)
        if rows is None:
            self._size = self._memory = None
        elif self._memory is not None:
            self._memory.reset(chosen)
        for row in chosen:
            self._seen[row] = 0

    @property
    def positions(self) -> list[int]:
        """Frames that each stream has seen."""
        return list(self._seen)

    @property
    def memory_bytes(self) -> int:
        """Bytes kept between frames; 0 before the first one."""
        return 0 if self._memory is None else self._memory.memory_bytes

    def state_dict(self, rows: Sequence[int] | None = None) -> dict[str, Tensor]:
        """All that the streams need to go on elsewhere, as tensors that safetensors can write.

        With ``rows``, these streams alone: a stream can leave one batch and join another.
        """
        chosen = self._chosen(rows)
        state = {
            "encoder": self.encoder._fingerprint(),
            "positions": torch.tensor([self._seen[row] for row in chosen]),
            "size": torch.tensor(self._size or (0, 0)),
        }
        if self._memory is not None:
            memory = self._memory.rows(chosen).state_dict()
            state |= {f"memory.{key}": value for key, value in memory.items()}
        return state

    def load_state_dict(
        self, state: Mapping[str, Tensor], rows: Sequence[int] | None = None
    ) -> None:
        """Go on where the streams of ``state`` stood, all here or in the ``rows`` named.

        Raises:
            ValueError: a state of another encoder, number of streams or size of frames.
        """
        chosen = self._chosen(rows)
        if not {"encoder", "positions", "size"} <= set(state):
            raise ValueError(f"not the state of a stream: it holds {sorted(state)}")
        positions, size = state["positions"].tolist(), tuple(state["size"].tolist())
        if len(positions) != len(chosen):
            raise ValueError(
                f"the state holds {len(positions)} streams, asked for {len(chosen)}; begin with "
                f"stream(batch_size={len(positions)}), or name as many with rows=[...]"
            )
        if not torch.equal(state["encoder"].cpu(), self.encoder._fingerprint()):
            raise ValueError(
                f"the state was saved by another encoder than {self.encoder.name} with "
                f"{self.encoder.settings()}; build the same one, with the same settings"
            )
        if not all(size):  # saved before the first frame
            self.reset(rows)
            return
        if rows is None:
            memory = self.encoder._new_memory(self.batch_size, *size)
        else:
            memory = self._memory_for(size)
        if memory is not None:
            start = len("memory.")
            saved = {key[start:]: value for key, value in state.items() if key[:start] == "memory."}
            memory.rows(chosen).load_state_dict(saved)
        self._memory, self._size = memory, size
        for row, position in zip(chosen, positions, strict=True):
            self._seen[row] = position

    def _chosen(self, rows: Sequence[int] | None) -> list[int]:
        every = range(self.batch_size)
        chosen = list(every) if rows is None else [int(row) for row in rows]
        if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(every):
            raise ValueError(
                f"rows={chosen}: name some of the streams 0 to {self.batch_size - 1}, each once"
            )
        return chosen

    def _memory_for(self, size: tuple[int, int]) -> StreamingCache | None:
        if self._size is None:
            return self.encoder._new_memory(self.batch_size, *size)
        if size != self._size:
            raise ValueError(
                f"frames of {size[0]} x {size[1]} pixels in a stream of {self._size[0]} x "
                f"{self._size[1]}; resize them, or begin a new stream"
            )
        return self._memory


class StreamformerEncoder(VideoEncoder):
    """A StreamFormer, frozen; a copy folded for inference, or ``fused=False`` the model itself.

    Args:
        model: the encoder's model.
        name: what messages call it.
        fused: fold a copy (:func:`fuse`).
        still: see :func:`build_encoder`, as for ``int8``, which folds a copy too, and ``memory``.
    """

    kind = "streamformer"

    def __init__(
        self,
        model: StreamformerModel,
        name: str = "streamformer",
        fused: bool = True,
        *,
        still: float | None = None,
        int8: bool = False,
        memory: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if still is not None:
            check_still(model.config, still, memory)
        self.memory = memory
        self.name, self.fused, self.still, self.int8 = name, fused or int8, still, int8
        self.weights_digest = weights_digest(model)  # before folding, whose rounding may differ
        if int8:
            self.model = quantize(model)
        else:
            self.model = fuse(model) if fused else model.eval().requires_grad_(False)
        self.config = config = model.config
        self.embed_dim, self.num_layers = config.hidden_size, config.num_hidden_layers
        self.patch_size, self.image_size = config.patch_size, config.image_size

    def settings(self) -> dict[str, Any]:
        """See :meth:`VideoEncoder.settings`."""
        config = self.config
        memory = None if self.memory is None else str(self.memory).removeprefix("torch.")
        options = {"still": self.still, "int8": self.int8 or None, "memory": memory}
        return {
            "kind": self.kind,
            "weights": self.weights_digest,
            "fused": self.fused,
            "causal": config.causal,
            "window": config.window,
            "temporal_attention": config.temporal_attention,
            "temporal_positions": config.temporal_positions,
            "num_frames": config.num_frames,
            "dtype": str(self.dtype).removeprefix("torch."),
            **{name: value for name, value in options.items() if value is not None},
        }

    def _new_memory(self, batch_size: int, height: int, width: int) -> StreamingCache | StillMemory:
        grid = (height // self.patch_size, width // self.patch_size)
        cache = self.model.new_cache(batch_size, grid, kept_as=self.memory)
        return cache if self.still is None else StillMemory(self.model, cache, self.still)

    def _features(
        self, frames: Tensor, memory: StreamingCache | StillMemory | None, layers: dict[int, int]
    ) -> FrameFeatures:
        if isinstance(memory, StillMemory):
            tokens, kept = memory.trunk(frames, keep=layers.values())
        else:
            tokens, kept = self.model.trunk(frames, memory, keep=layers.values())
        inner = {number: kept[place] for number, place in layers.items()}
        return _DeferredFeatures(tokens, self.model.post_layernorm, self.model.head, inner)


class SiglipEncoder(VideoEncoder):
    """A SigLIP image tower, frozen, that sees each frame alone."""

    kind = "siglip"

    def __init__(self, model: SiglipVisionModel, name: str = "siglip") -> None:
        super().__init__()
        config = model.config
        if not getattr(config, "vision_use_head", True):
            raise ValueError(f"{name} has no pooling head: it gives no frame embeddings")
        self.name, self.weights_digest = name, weights_digest(model)
        self.model = model.eval().requires_grad_(False)
        self.embed_dim, self.num_layers = config.hidden_size, config.num_hidden_layers
        self.patch_size, self.image_size = config.patch_size, config.image_size

    def settings(self) -> dict[str, Any]:
        """See :meth:`VideoEncoder.settings`."""
        return {
            "kind": self.kind,
            "weights": self.weights_digest,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def _features(
        self, frames: Tensor, memory: StreamingCache | None, layers: dict[int, int]
    ) -> FrameFeatures:
        batch, count, _, height, width = frames.shape
        out = self.model(
            frames.flatten(0, 1),  # (B*t, 3, H, W)
            interpolate_pos_encoding=(height, width) != (self.image_size, self.image_size),
            output_hidden_states=bool(layers),
        )

        def per_clip(x: Tensor) -> Tensor:
            return x.unflatten(0, (batch, count))

        inner = {number: per_clip(out.hidden_states[place]) for number, place in layers.items()}
        return FrameFeatures(
            per_clip(out.last_hidden_state), per_clip(out.pooler_output), inner, self.model.head
        )


# -- building by name -----------------------------------------------------------------------------

Builder = Callable[..., VideoEncoder]
_BUILDERS: dict[str, Builder] = {}


def register_encoder(kind: str, builder: Builder) -> None:
    """Let ``build_encoder("kind:source")`` find ``builder``.

    It is called as ``builder(source, window=…, temporal_positions=…)``; both are None unless asked
    for, and an encoder without memory may ignore them. Other options of ``build_encoder`` reach
    only a builder that has a parameter of that name.

    Raises:
        ValueError: when the kind is taken.
    """
    if kind in _BUILDERS:
        raise ValueError(f"encoder kind {kind!r} is registered already; choose another name")
    _BUILDERS[kind] = builder


def build_encoder(
    spec: str,
    *,
    window: int | None = None,
    temporal_positions: str | None = None,
    still: float | None = None,
    int8: bool = False,
    memory: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VideoEncoder:
    """Build a frozen encoder from ``"kind:source"``.

    Args:
        spec: ``siglip:<folder or hub id>``, ``streamformer:<folder or hub id>``, or another
            registered kind.
        window: frames a frame may see; None keeps the checkpoint's. Image encoders see one frame
            whatever the window.
        temporal_positions: policy past the time table; None keeps the checkpoint's.
        still: skip patches that have not moved: largest change of a normalised pixel value that
            counts as none, 0 for the exact path's numbers; None computes everything. See
            `backbone/still.py`.
        int8: linears in int8, faster on CPUs and not exact; see `backbone/quantization.py`.
        memory: type in which a stream keeps keys and values, ``torch.bfloat16`` or ``torch.int8``,
            for a half or a quarter of the bytes; not exact. None for ``dtype``.
        device: where it runs.
        dtype: type it computes in.

    Raises:
        ValueError: no kind in the spec, or one that nobody registered.
        TypeError: a builder that makes something else than a :class:`VideoEncoder`.
    """
    kind, colon, source = spec.partition(":")
    if not colon or not source:
        raise ValueError(
            f"encoder {spec!r} names no kind; write siglip:<folder or hub id> or "
            "streamformer:<folder or hub id>"
        )
    builder = _BUILDERS.get(kind) or _third_party(kind)
    options = {"still": still, "int8": int8 or None, "memory": memory}
    options = {name: value for name, value in options.items() if value is not None}
    unknown = options.keys() - inspect.signature(builder).parameters
    if unknown:
        raise ValueError(f"an encoder of kind {kind!r} has no {min(unknown)}=; leave it out")
    encoder = builder(source, window=window, temporal_positions=temporal_positions, **options)
    if not isinstance(encoder, VideoEncoder):
        raise TypeError(
            f"the builder of {kind!r} made a {type(encoder).__name__}, not a backbone.VideoEncoder"
        )
    encoder.name = spec
    return encoder.requires_grad_(False).to(device, dtype).eval()


def _third_party(kind: str) -> Builder:
    found = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if kind not in found:
        known = sorted(_BUILDERS.keys() | found.keys())
        raise ValueError(
            f"no encoder of kind {kind!r}; known are {', '.join(known)}. Add one with "
            f"backbone.register_encoder, or by an entry point of the group {ENTRY_POINTS!r}"
        )
    return found[kind].load()


def _build_siglip(source: str, window: int | None, temporal_positions: str | None) -> SiglipEncoder:
    return SiglipEncoder(load_siglip(source), name=source)


def _build_streamformer(
    source: str,
    window: int | None,
    temporal_positions: str | None,
    still: float | None = None,
    int8: bool = False,
    memory: torch.dtype | None = None,
) -> StreamformerEncoder:
    fields = {"window": window, "temporal_positions": temporal_positions}
    asked = {name: value for name, value in fields.items() if value is not None}
    model = StreamformerModel.from_pretrained(source, **asked)
    config = model.config
    if window is not None and config.span is not None and config.span < window:
        logger.warning(
            'window=%d changes nothing: temporal_positions="reset" starts anew every %d frames. '
            'For a longer memory train with temporal_positions="cycle", and ask for it',
            window, config.num_frames,
        )  # fmt: skip
    return StreamformerEncoder(model, still=still, int8=int8, memory=memory)


register_encoder("siglip", _build_siglip)
register_encoder("streamformer", _build_streamformer)
