"""From frames to a video: collect what the tracker said, score the tracks, enlarge their masks.

The last part of CTVIS (Ying et al., ICCV 2023) at inference, in three named steps:

    VideoRecord.add          per frame: masks and class logits of each track; drops flickers
    VideoRecord.finish       end of the video: a track's class logits averaged over its frames
    score_tracks, segment    the likeliest (track, class) pairs; masks in the video's own size

The tracker's identities are final when they are said. Only this file looks back: the average over
frames, and the choice of tracks worth keeping.

Letters: Q queries, N tracks, T frames, C classes, h w size of predicted masks (stride 4), H W
pixels of the video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from integrations.ovis import rle
from integrations.ovis.augment import resized

AVERAGES = ("mean", "max")
CHUNK_PIXELS = 2**24  # of masks that are enlarged together: speed and room only


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """Rules of a video's output; numbers are those of the published results.

    Raises:
        ValueError: an unknown average, or a count below its least value.
    """

    average: Literal["mean", "max"] = "mean"  # of class logits over a track's frames
    top_pairs: int = 40  # (track, class) pairs that a video reports; released: number of classes
    # Flickers: from frame ``flicker_from`` on, a track seen in fewer than ``flicker_frames`` frames
    # whose last ``flicker_gap`` or more frames are empty is dropped from the output. Memory keeps
    # it; should it come back, it starts again with empty frames before. 0 frames: drop nothing.
    flicker_from: int = 9
    flicker_frames: int = 3
    flicker_gap: int = 2

    def __post_init__(self) -> None:
        if self.average not in AVERAGES:
            raise ValueError(f"average={self.average!r} is not one of {list(AVERAGES)}")
        least = {"top_pairs": 1, "flicker_from": 0, "flicker_frames": 0, "flicker_gap": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name}={getattr(self, name)} is below {value}")


@dataclass(frozen=True)
class FrameSizes:
    """Sizes (height, width) in pixels that a frame goes through, and its masks back again."""

    original: tuple[int, int]  # as in the file
    resized: tuple[int, int]  # what the model sees of it
    padded: tuple[int, int]  # with zeros at the right and at the bottom

    def __post_init__(self) -> None:
        if any(inner > outer for inner, outer in zip(self.resized, self.padded, strict=True)):
            raise ValueError(f"frames resized to {self.resized} exceed the padded {self.padded}")

    @classmethod
    def fit(
        cls, original: tuple[int, int], short_side: int, long_side: int, multiple: int
    ) -> FrameSizes:
        """Bring the short side to ``short_side``, the long one to no more than ``long_side``.

        The aspect is kept, up to rounding; the padded sides are multiples of ``multiple``.
        """
        size = resized(*original, short_side, long_side)
        padded = tuple(-(-side // multiple) * multiple for side in size)
        return cls(original, size, padded)


@dataclass
class Track:
    """What was seen of one track, oldest first."""

    frames: list[int] = field(default_factory=list)
    class_logits: list[Tensor] = field(default_factory=list)  # (C + 1,) each
    mask_logits: list[Tensor] = field(default_factory=list)  # (h, w) each


@dataclass(frozen=True)
class VideoTracks:
    """Tracks of a whole video, in order of their start.

    Attributes:
        ids: identities that the tracker gave, N of them.
        class_logits: (N, C + 1), averaged over each track's frames.
        frames: numbers of the frames in which each track was seen.
        mask_logits: (n, h, w) for each track, one for each of these frames.
        num_frames: T.
    """

    ids: list[int]
    class_logits: Tensor
    frames: list[list[int]]
    mask_logits: list[Tensor]
    num_frames: int

    @property
    def present(self) -> Tensor:
        """Where each track was seen, (N, T) bool."""
        present = torch.zeros(len(self.ids), self.num_frames, dtype=torch.bool)
        for row, frames in zip(present, self.frames, strict=True):
            row[frames] = True
        return present


@dataclass(frozen=True)
class Instance:
    """One track with one class, as data sets evaluate it.

    Attributes:
        track: identity that the tracker gave.
        label: class, from 0.
        score: probability of the class times mean probability of the masks' pixels.
        segmentations: for each frame a compressed RLE of the video's size, or None where absent.
    """

    track: int
    label: int
    score: float
    segmentations: list[dict[str, Any] | None]

    def masks(self, size: tuple[int, int]) -> np.ndarray:
        """Masks (T, H, W) bool of a video of this ``size`` (height, width)."""
        return rle.decode(self.segmentations, size, f"track {self.track}")


@dataclass(frozen=True)
class VideoResult:
    """What is said about a whole video: instances, likeliest class first.

    Attributes:
        instances: (track, class) pairs; a track may appear with several classes.
        num_frames: T.
        size: (H, W).
    """

    instances: list[Instance]
    num_frames: int
    size: tuple[int, int]

    def predictions(self, video_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
        """Entries of a YouTube-VIS results file; ``category_ids`` holds each label's own id."""
        return [
            {
                "video_id": video_id,
                "score": instance.score,
                "category_id": category_ids[instance.label],
                "segmentations": instance.segmentations,
            }
            for instance in self.instances
        ]


class VideoRecord:
    """Collects the tracks of one video, frame by frame; it grows with the video."""

    def __init__(self, config: VideoConfig | None = None) -> None:
        self.config = config or VideoConfig()
        self.tracks: dict[int, Track] = {}
        self.num_frames = 0

    def add(self, ids: Tensor, class_logits: Tensor, mask_logits: Tensor) -> None:
        """Take the next frame: ids (Q,), -1 for none; logits (Q, C + 1) and (Q, h, w)."""
        order = ids.argsort()  # new tracks in order of their identities
        shown = order[ids[order] >= 0]
        there = shown.to(mask_logits.device)
        logits, masks = class_logits[there].float().cpu(), mask_logits[there].float().cpu()
        for row, name in enumerate(ids[shown].tolist()):
            track = self.tracks.setdefault(name, Track())
            track.frames.append(self.num_frames)
            track.class_logits.append(logits[row])
            track.mask_logits.append(masks[row])
        if self.num_frames >= self.config.flicker_from:
            self._drop_flickers()
        self.num_frames += 1

    def finish(self) -> VideoTracks:
        """Average each track's class logits over its frames; masks stay as they were said."""
        tracks = list(self.tracks.values())
        averaged = [
            average_logits(torch.stack(t.class_logits), self.config.average) for t in tracks
        ]
        return VideoTracks(
            ids=list(self.tracks),
            class_logits=torch.stack(averaged) if averaged else torch.empty(0, 0),
            frames=[list(track.frames) for track in tracks],
            mask_logits=[torch.stack(track.mask_logits) for track in tracks],
            num_frames=self.num_frames,
        )

    def _drop_flickers(self) -> None:
        config, now = self.config, self.num_frames
        for name, track in list(self.tracks.items()):
            empty = now - track.frames[-1]
            if len(track.frames) < config.flicker_frames and empty >= config.flicker_gap:
                del self.tracks[name]


def average_logits(class_logits: Tensor, average: str) -> Tensor:
    """One track's class logits (n, C + 1) over its frames: (C + 1,), "mean" or "max" of each."""
    return class_logits.mean(0) if average == "mean" else class_logits.amax(0)


def score_tracks(class_logits: Tensor, top_pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest pairs of track and class.

    Args:
        class_logits: (N, C + 1), the last column "no object".
        top_pairs: how many, if there are as many.

    Returns:
        rows of ``class_logits``, classes and probabilities, likeliest first.
    """
    probabilities = class_logits.softmax(-1)[:, :-1]  # (N, C)
    if not probabilities.numel():
        nothing = torch.empty(0, dtype=torch.long)
        return nothing, nothing, torch.empty(0)
    scores, places = probabilities.flatten().topk(min(top_pairs, probabilities.numel()))
    classes = probabilities.shape[1]
    return places // classes, places % classes, scores


def enlarge_masks(mask_logits: Tensor, sizes: FrameSizes) -> Tensor:
    """Bring mask logits (n, h, w) to the original size: (n, H, W) logits, above 0 inside.

    Bilinear to the padded size, cut to the resized one, bilinear to the original one.
    """
    masks = _bilinear(mask_logits[:, None].float(), sizes.padded)
    height, width = sizes.resized
    return _bilinear(masks[..., :height, :width], sizes.original)[:, 0]


def segment(tracks: VideoTracks, sizes: FrameSizes, top_pairs: int = 40) -> VideoResult:
    """Score tracks and encode their masks in the size of the video.

    A pair's score is its class probability times the mean mask probability of the track's inside
    pixels over the whole video; a track without any has score 0.
    """
    rows, labels, scores = score_tracks(tracks.class_logits, top_pairs)
    encoded = {row: _encode_track(tracks, row, sizes) for row in dict.fromkeys(rows.tolist())}
    instances = [
        Instance(tracks.ids[row], label, score * encoded[row][1], encoded[row][0])
        for row, label, score in zip(rows.tolist(), labels.tolist(), scores.tolist(), strict=True)
    ]
    return VideoResult(instances, tracks.num_frames, sizes.original)


def _encode_track(
    tracks: VideoTracks, row: int, sizes: FrameSizes
) -> tuple[list[dict[str, Any] | None], float]:
    """RLEs of all frames of a track, and the mean probability of its inside pixels."""
    segmentations: list[dict[str, Any] | None] = [None] * tracks.num_frames
    total, count = 0.0, 0
    together = max(1, CHUNK_PIXELS // (sizes.original[0] * sizes.original[1]))
    frames = tracks.frames[row]
    for start in range(0, len(frames), together):
        logits = enlarge_masks(tracks.mask_logits[row][start : start + together], sizes)
        inside = logits > 0  # (n, H, W)
        total += logits[inside].sigmoid().sum(dtype=torch.float64).item()
        count += int(inside.sum())
        for frame, encoded in zip(frames[start:], rle.encode(inside.numpy()), strict=False):
            segmentations[frame] = encoded
    return segmentations, total / max(count, 1)


def _bilinear(masks: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(masks, size, mode="bilinear", align_corners=False)
