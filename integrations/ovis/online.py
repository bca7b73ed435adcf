"""Segment and track a running video: a frame in, its objects out, before the next frame is there.

    frame --> encoder's stream --> adapter --> head --> tracker --> FrameResult
                                                           '--> record --> finish() --> VideoResult

The original cuts a video into chunks of 16 frames and restarts the encoder at each. Here the
encoder's memory runs on (``mode="stream"``), so a frame may use all of the past that the encoder's
window holds; ``mode="chunk"`` restarts as published. Either way a frame is answered at once, for
the encoder is causal, and its answer is final. Only ``finish`` looks back (see ``postprocess``).

Letters as in ``tracker.py`` and ``postprocess.py``; n objects of a frame, D width of the maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone import VideoEncoder
from integrations.ovis.adapter import STRIDE, ViTAdapter
from integrations.ovis.postprocess import (
    FrameSizes,
    VideoConfig,
    VideoRecord,
    VideoResult,
    enlarge_masks,
    segment,
)
from integrations.ovis.tracker import OnlineTracker, TrackerConfig

MODES = ("stream", "chunk")


class Segmentation(Protocol):
    """What a segmentation head says about F frames; ``head.HeadOutput`` is one."""

    class_logits: Tensor  # (F, Q, C + 1), the last column "no object"
    mask_logits: Tensor  # (F, Q, h, w)
    query_embeddings: Tensor  # (F, Q, E)


@dataclass(frozen=True)
class FrameResult:
    """Objects of one frame, best score first, on the CPU.

    Attributes:
        frame: its number in the video, from 0.
        ids: (n,) int64, the same for an object in all frames.
        labels: (n,) int64, the likeliest class in this frame, from 0.
        scores: (n,) its probability.
        mask_logits: (n, h, w) at stride 4 of the padded frame, above 0 inside.
        sizes: of the frame.
    """

    frame: int
    ids: Tensor
    labels: Tensor
    scores: Tensor
    mask_logits: Tensor
    sizes: FrameSizes

    @cached_property
    def masks(self) -> np.ndarray:
        """Masks (n, H, W) bool in the frame's own size; computed when first asked for."""
        if not len(self.ids):
            return np.zeros((0, *self.sizes.original), dtype=bool)
        return (enlarge_masks(self.mask_logits, self.sizes) > 0).numpy()

    def above(self, score: float) -> FrameResult:
        """Only objects of a score above this one."""
        good = self.scores > score
        names = ("ids", "labels", "scores", "mask_logits")
        return replace(self, **{name: getattr(self, name)[good] for name in names})


class OnlineSegmenter:
    """Segments and tracks one video, frame by frame; ``finish`` ends it and begins the next.

    Example:
        >>> segmenter = OnlineSegmenter(encoder, adapter, head)
        >>> for frame in open_video("street.mp4"):
        ...     result = segmenter.push(frame.image).above(0.3)
        ...     draw(frame.image, result.masks, result.ids)
        >>> video = segmenter.finish()

    Args:
        encoder: frozen; its window bounds its memory.
        adapter: in eval mode, made for this encoder; on the encoder's device.
        head: in eval mode; maps of the adapter to a `Segmentation`.
        short_side: pixels that frames' short side is resized to; 224 in published numbers.
        long_side: the most that the long side may then have.
        mode: "stream" lets the encoder remember across the whole video, as far as its window and
            its policy for time positions go; "chunk" restarts it every ``chunk_frames`` frames.
        chunk_frames: 16 in published numbers.
        tracker: rules of identities.
        video: rules of ``finish``.
        keep_video: collect what ``finish`` needs, which grows with the video. False for streams
            without end: memory then stays bounded, and ``finish`` is refused.
        timed: gives a context for each part of a frame, by its name, "encode", "head", "track":
            for whoever measures what they cost.

    Raises:
        ValueError: an unknown mode, sizes below 1, or a part in training mode.
    """

    def __init__(
        self,
        encoder: VideoEncoder,
        adapter: ViTAdapter,
        head: nn.Module,
        *,
        short_side: int = 224,
        long_side: int = 1333,
        mode: Literal["stream", "chunk"] = "stream",
        chunk_frames: int = 16,
        tracker: TrackerConfig | None = None,
        video: VideoConfig | None = None,
        keep_video: bool = True,
        timed: Callable[[str], AbstractContextManager] = nullcontext,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is not one of {list(MODES)}")
        if min(short_side, long_side, chunk_frames) < 1:
            raise ValueError(
                f"short_side={short_side}, long_side={long_side} and chunk_frames={chunk_frames} "
                "must be at least 1"
            )
        for name, part in (("adapter", adapter), ("head", head)):
            if part.training:
                raise ValueError(f"the {name} is in training mode; call {name}.eval() first")
        self.encoder, self.adapter, self.head = encoder, adapter, head
        self.short_side, self.long_side = short_side, long_side
        self.mode, self.chunk_frames = mode, chunk_frames
        self.tracker = OnlineTracker(tracker)
        self._video, self._keep_video, self._timed = video, keep_video, timed
        self._stream = encoder.stream(layers=adapter.taps)
        self.reset()

    def reset(self) -> None:
        """Forget the video so far and begin another, of any size."""
        self._stream.reset()
        self.tracker.reset()
        self._record = VideoRecord(self._video) if self._keep_video else None
        self._sizes: FrameSizes | None = None

    @property
    def frame(self) -> int:
        """Number of the next frame."""
        return self.tracker.frame

    @property
    def memory_bytes(self) -> int:
        """Bytes of encoder and tracker between frames; the record of the video not counted."""
        return self._stream.memory_bytes + self.tracker.memory_bytes

    @torch.no_grad()
    def push(self, image: np.ndarray) -> FrameResult:
        """Take the next frame, (H, W, 3) uint8 RGB, and say what is in it.

        Raises:
            ValueError: another shape or type, or another size than the video's first frame. The
                video goes on unharmed.
        """
        sizes = self._fit(image)
        with self._timed("encode"):
            pixels = prepare_frame(image, sizes, self.encoder.image_mean, self.encoder.image_std)
            pixels = pixels.to(self.encoder.device)
            if self.mode == "chunk" and self.frame % self.chunk_frames == 0:
                self._stream.reset()
            features = self._stream.push(pixels[None])
        with self._timed("head"):
            said = self.head(self.adapter(pixels[None, None], features.layers))
        self._sizes = sizes
        frame = self.frame
        with self._timed("track"):
            ids = track_frames(said, self.tracker, self._record)[0]
        return frame_result(frame, ids, said.class_logits[0], said.mask_logits[0], sizes)

    def finish(self) -> VideoResult:
        """End the video: average class logits, score the tracks; the next frame begins another.

        Raises:
            ValueError: no frame yet, or a segmenter that keeps no record.
        """
        if self._record is None:
            raise ValueError(
                "keep_video=False keeps no record of the video; whole videos need keep_video=True"
            )
        if self._sizes is None:
            raise ValueError("no frame since the video began; push() its frames first")
        result = segment(self._record.finish(), self._sizes, self._record.config.top_pairs)
        self.reset()
        return result

    def _fit(self, image: np.ndarray) -> FrameSizes:
        where = f"frame {self.frame}"
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(
                f"{where}: shape {image.shape}, type {image.dtype}; expected (H, W, 3) uint8 RGB"
            )
        original = image.shape[:2]
        if self._sizes is not None:
            if original != self._sizes.original:
                raise ValueError(
                    f"{where} is {original[0]} x {original[1]} pixels (height x width), the video "
                    f"{self._sizes.original[0]} x {self._sizes.original[1]}; resize it, or reset() "
                    "for another video"
                )
            return self._sizes
        multiple = math.lcm(STRIDE, self.encoder.patch_size)
        return FrameSizes.fit(original, self.short_side, self.long_side, multiple)


def prepare_frame(
    image: np.ndarray,
    sizes: FrameSizes,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Tensor:
    """Resize, normalise and pad (with zeros, right and below) a frame (H, W, 3) uint8: (3, H, W).

    Resizing is bilinear with antialiasing, rounded to whole grey levels as in an image file.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    if sizes.resized != sizes.original:
        pixels = F.interpolate(pixels, sizes.resized, mode="bilinear", antialias=True)
    centre, spread = (torch.tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (mean, std))
    normalised = (pixels[0].float() / 255 - centre) / spread
    bottom, right = (p - r for p, r in zip(sizes.padded, sizes.resized, strict=True))
    return F.pad(normalised, (0, right, 0, bottom))


def track_frames(
    said: Segmentation, tracker: OnlineTracker, record: VideoRecord | None = None
) -> Tensor:
    """Track the next F frames of a video, given what the head says: identities (F, Q).

    Queries that are dropped get -1; with a ``record``, the frames are added to it.
    """
    given = []
    for logits, masks, embeddings in zip(
        said.class_logits, said.mask_logits, said.query_embeddings, strict=True
    ):
        given.append(tracker.push(logits, masks, embeddings))
        if record is not None:
            record.add(given[-1], logits, masks)
    return torch.stack(given)


def segment_video(
    said: Segmentation,
    sizes: FrameSizes,
    tracker: TrackerConfig | None = None,
    video: VideoConfig | None = None,
) -> VideoResult:
    """Track a whole video, of which all frames have been through the head, and score it."""
    record = VideoRecord(video)
    track_frames(said, OnlineTracker(tracker), record)
    return segment(record.finish(), sizes, record.config.top_pairs)


def frame_result(
    frame: int, ids: Tensor, class_logits: Tensor, mask_logits: Tensor, sizes: FrameSizes
) -> FrameResult:
    """What is shown of a frame: ids (Q,), logits (Q, C + 1) and (Q, h, w), without dropped ones."""
    scores, labels = class_logits.float().softmax(-1)[:, :-1].max(-1)  # (Q,)
    order = scores.cpu().argsort(descending=True, stable=True)
    chosen = order[ids[order] >= 0]
    there = chosen.to(mask_logits.device)
    return FrameResult(
        frame=frame,
        ids=ids[chosen],
        labels=labels[there].cpu(),
        scores=scores[there].cpu(),
        mask_logits=mask_logits[there].float().cpu(),
        sizes=sizes,
    )
