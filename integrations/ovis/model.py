"""The segmenter as an mmengine model: losses in training, whole videos tracked in evaluation.

The maths is in ``adapter``, ``head``, ``criterion``, ``contrastive`` and ``tracker``; here it meets
mmengine's three ways of calling a model, and frames in bytes become what an encoder reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import MODELS
from torch import Tensor

from backbone import VideoEncoder, build_encoder
from integrations.ovis.adapter import STRIDE, AdapterConfig, ViTAdapter, encode_taps
from integrations.ovis.contrastive import ContrastiveConfig, contrastive_losses, pad_instances
from integrations.ovis.criterion import ClipTargets, FrameTargets, LossConfig, supervise
from integrations.ovis.head import HeadConfig, HeadOutput, SegmentationHead
from integrations.ovis.online import MODES, track_frames
from integrations.ovis.postprocess import (
    FrameSizes,
    VideoConfig,
    VideoRecord,
    VideoResult,
    segment,
)
from integrations.ovis.tracker import OnlineTracker, TrackerConfig


@dataclass(frozen=True)
class VideoSample:
    """A video to predict.

    Attributes:
        video_id: of the data set's document.
        size: (height, width) that masks are wanted in, the document's.
    """

    video_id: int
    size: tuple[int, int]


@dataclass(frozen=True)
class VideoPrediction:
    """What is said about one video of an evaluation."""

    video_id: int
    result: VideoResult


def pad_to(tensor: Tensor, height: int, width: int) -> Tensor:
    """Pad the last two dimensions with zeros, right and below."""
    return F.pad(tensor, (0, width - tensor.shape[-1], 0, height - tensor.shape[-2]))


class ClipPreprocessor(BaseDataPreprocessor):
    """Bytes to normalised frames, padded right and below; masks are padded with them.

    Args:
        mean, std: of the encoder, for frames in [0, 1].
        multiple: what the padded sides are multiples of.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], multiple: int) -> None:
        super().__init__()
        self.multiple = multiple
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, data: Mapping[str, Any], training: bool = False) -> dict[str, Any]:
        """Prepare a batch.

        Args:
            data: "inputs", a mapping with "frames", a list of clips ``(T, 3, h, w)`` uint8, and
                perhaps "layers", the encoder's tokens ``{tap: list of (T, N, D)}`` of the padded
                frames, computed before; "data_samples", a list of ``ClipTargets`` in the clips'
                size, or of ``VideoSample``.
            training: clips of one length make one tensor; in evaluation each is a batch of its own.

        Returns:
            "inputs" with "frames" ``(B, T, 3, H, W)``, a list of them in evaluation, "layers"
            likewise and "sizes", (h, w) of each clip; "data_samples" with padded masks.

        Raises:
            ValueError: clips that are no bytes, or of different lengths.
        """
        inputs, samples = data["inputs"], data.get("data_samples")
        clips = [self.cast_data(clip) for clip in inputs["frames"]]
        for clip in clips:
            if clip.ndim != 4 or clip.shape[1] != 3 or clip.dtype != torch.uint8:
                raise ValueError(
                    f"a clip of shape {tuple(clip.shape)} and type {clip.dtype}; expected "
                    "(T, 3, H, W) uint8"
                )
        sizes = [(clip.shape[2], clip.shape[3]) for clip in clips]
        layers = {tap: self.cast_data(list(t)) for tap, t in inputs.get("layers", {}).items()}
        if not training:
            frames = [
                self._padded(clip, size)[None] for clip, size in zip(clips, sizes, strict=True)
            ]
            layers = {tap: [tokens[None] for tokens in t] for tap, t in layers.items()}
            return self._packed(frames, layers, sizes, samples)
        if len({len(clip) for clip in clips}) != 1:
            raise ValueError(f"clips of {[len(clip) for clip in clips]} frames; a batch needs one")
        largest = tuple(max(size[side] for size in sizes) for side in (0, 1))
        frames = torch.stack([self._padded(clip, largest) for clip in clips])
        height, width = frames.shape[-2:]
        if samples is not None:
            samples = [
                ClipTargets(
                    self.cast_data(sample.labels),
                    pad_to(self.cast_data(sample.masks), height, width),
                )
                for sample in samples
            ]
        layers = {tap: torch.stack(tokens) for tap, tokens in layers.items()}
        return self._packed(frames, layers, sizes, samples)

    @staticmethod
    def _packed(frames: Any, layers: Any, sizes: Any, samples: Any) -> dict[str, Any]:
        inputs = {"frames": frames, "sizes": sizes} | ({"layers": layers} if layers else {})
        return {"inputs": inputs, "data_samples": samples}

    def _padded(self, clip: Tensor, size: tuple[int, int]) -> Tensor:
        """Normalise a clip (T, 3, h, w) and pad it to the next multiples above ``size``."""
        sides = [math.ceil(side / self.multiple) * self.multiple for side in size]
        return pad_to((clip.float() / 255 - self.mean) / self.std, *sides)


@MODELS.register_module()
class OvisModel(BaseModel):
    """A frozen encoder, the adapter and the head, trained as CTVIS and evaluated online.

    Args:
        encoder: the encoder, or its spec for ``build_encoder``.
        adapter: fields of ``AdapterConfig`` but for those that the encoder decides.
        head: fields of ``HeadConfig`` but for ``in_channels``.
        loss: ``LossConfig`` or its fields.
        contrastive: ``ContrastiveConfig`` or its fields.
        tracker: ``TrackerConfig`` or its fields.
        video: ``VideoConfig`` or its fields.
        mode: of evaluation, as of ``OnlineSegmenter``: "stream" or "chunk".
        chunk_frames: frames that evaluation takes at once, and after which "chunk" restarts.
        encoder_gradients: let gradients flow into the encoder; its owner says what of it trains.
        data_preprocessor: mmengine's; None for the encoder's ``ClipPreprocessor``.
    """

    def __init__(
        self,
        encoder: VideoEncoder | str,
        adapter: Mapping[str, Any],
        head: Mapping[str, Any],
        loss: LossConfig | Mapping[str, Any] | None = None,
        contrastive: ContrastiveConfig | Mapping[str, Any] | None = None,
        tracker: TrackerConfig | Mapping[str, Any] | None = None,
        video: VideoConfig | Mapping[str, Any] | None = None,
        mode: Literal["stream", "chunk"] = "stream",
        chunk_frames: int = 16,
        encoder_gradients: bool = False,
        data_preprocessor: Any = None,
    ) -> None:
        if mode not in MODES or chunk_frames < 1:
            raise ValueError(
                f"mode={mode!r}, chunk_frames={chunk_frames}: needs one of {list(MODES)} and at "
                "least 1"
            )
        if isinstance(encoder, str):
            encoder = build_encoder(encoder)
        if data_preprocessor is None:
            multiple = math.lcm(STRIDE, encoder.patch_size)
            data_preprocessor = ClipPreprocessor(encoder.image_mean, encoder.image_std, multiple)
        super().__init__(data_preprocessor=data_preprocessor)
        self.encoder = encoder
        self.adapter = ViTAdapter(AdapterConfig.for_encoder(encoder, **adapter))
        self.head = SegmentationHead(HeadConfig(in_channels=encoder.embed_dim, **head))
        self.loss = _config(LossConfig, loss)
        self.contrastive = _config(ContrastiveConfig, contrastive)
        self.tracker = _config(TrackerConfig, tracker)
        self.video = _config(VideoConfig, video)
        self.mode, self.chunk_frames = mode, chunk_frames
        self.encoder_gradients = encoder_gradients
        self.register_state_dict_post_hook(_leave_out_frozen)
        self.register_load_state_dict_pre_hook(_fill_in_frozen)

    def forward(
        self,
        inputs: Mapping[str, Any],
        data_samples: Sequence[ClipTargets] | Sequence[VideoSample] | None = None,
        mode: str = "tensor",
    ) -> HeadOutput | dict[str, Tensor] | list[VideoPrediction]:
        """Call the model in one of mmengine's modes, on what ``ClipPreprocessor`` made.

        - "tensor": clips -> ``HeadOutput`` of their frames.
        - "loss": clips and their ``ClipTargets`` -> weighted losses; their sum is minimised.
        - "predict": videos and their ``VideoSample`` -> ``VideoPrediction`` of each.
        """
        if mode == "predict":
            return self._predict(inputs, data_samples)
        if mode not in ("tensor", "loss"):
            raise ValueError(f"mode={mode!r} is not one of tensor, loss, predict")
        output = self._segment(inputs["frames"], inputs.get("layers"))
        return output if mode == "tensor" else self._losses(output, data_samples)

    def _segment(self, frames: Tensor, layers: Mapping[int, Tensor] | None = None) -> HeadOutput:
        """Frames ``(B, T, 3, H, W)`` and their tokens, computed here unless given, to predictions.

        Adapter and encoder run as autocast says, the head in full precision: in fp16 its pixel
        decoder overflows.
        """
        if layers is None:
            layers = encode_taps(self.encoder, frames, self.adapter.taps, self.encoder_gradients)
        maps = self.adapter(frames, layers)
        with torch.autocast(frames.device.type, enabled=False):
            return self.head({name: level.float() for name, level in maps.items()})

    def _losses(self, output: HeadOutput, clips: Sequence[ClipTargets]) -> dict[str, Tensor]:
        targets = FrameTargets.of(clips)
        losses, queries = supervise(output, targets, self.loss)
        embeddings = output.query_embeddings.unflatten(0, (len(clips), -1))  # (B, T, Q, E)
        matches = pad_instances(targets.by_clip(queries))  # (B, T, N)
        tracking = contrastive_losses(embeddings, matches, self.contrastive)
        return losses | tracking.weighted(self.contrastive)

    @torch.no_grad()
    def _predict(
        self, inputs: Mapping[str, Any], samples: Sequence[VideoSample]
    ) -> list[VideoPrediction]:
        predictions = []
        for index, (frames, sample) in enumerate(zip(inputs["frames"], samples, strict=True)):
            layers = {tap: tokens[index] for tap, tokens in inputs.get("layers", {}).items()}
            sizes = FrameSizes(sample.size, inputs["sizes"][index], tuple(frames.shape[-2:]))
            tracker, record = OnlineTracker(self.tracker), VideoRecord(self.video)
            for output in self._outputs(frames, layers):
                track_frames(output, tracker, record)
            result = segment(record.finish(), sizes, self.video.top_pairs)
            predictions.append(VideoPrediction(sample.video_id, result))
        return predictions

    def _outputs(self, frames: Tensor, layers: Mapping[int, Tensor]) -> Iterator[HeadOutput]:
        """Predictions of one video ``(1, T, 3, H, W)``, chunk by chunk.

        A chunk of a stream gives what its frames would give one by one.
        """
        stream = None if layers else self.encoder.stream(layers=self.adapter.taps)
        for start in range(0, frames.shape[1], self.chunk_frames):
            here = slice(start, start + self.chunk_frames)
            if stream is None:
                tokens = {tap: all_[:, here] for tap, all_ in layers.items()}
            else:
                if self.mode == "chunk":
                    stream.reset()
                tokens = stream.push(frames[:, here]).layers
            yield self._segment(frames[:, here], tokens)


def _config(cls: type, given: Any) -> Any:
    """An instance of a config class, from itself, its fields, or None for its defaults."""
    return given if isinstance(given, cls) else cls(**(given or {}))


def _frozen(model: OvisModel) -> dict[str, Tensor]:
    """State of the encoder but for what trains, under its names in the encoder."""
    trained = {name for name, weight in model.encoder.named_parameters() if weight.requires_grad}
    state = model.encoder.state_dict()
    return {name: value for name, value in state.items() if name not in trained}


def _leave_out_frozen(model: OvisModel, state: dict, prefix: str, metadata: Any) -> None:
    """A checkpoint holds what trains: the frozen encoder stays where it came from."""
    for name in _frozen(model):
        state.pop(f"{prefix}encoder.{name}", None)


def _fill_in_frozen(model: OvisModel, state: dict, prefix: str, *_: Any) -> None:
    """And is taken from there when a checkpoint is loaded, however strictly."""
    for name, value in _frozen(model).items():
        state.setdefault(f"{prefix}encoder.{name}", value)
