"""Clips to train on and videos to evaluate, out of the videos of ``layout``.

A clip is a handful of frames around a moment of a video, with the masks of its objects; an object
that none of them shows is left out, so that a clip may have no object at all. Pictures are videos
of one frame, shown as often as the clip is long (``augment`` moves them).

Every clip is a function of (seed, its number in the run) alone: neither the number of workers nor
an interruption changes what is trained on. A batch mixes the sources by their weights, all of
landscape or all of portrait format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import Dataset, Sampler

from integrations.ovis.augment import ClipAugmentation, augment_clip, resize_clip
from integrations.ovis.criterion import ClipTargets
from integrations.ovis.layout import Video, VideoSet

SPACINGS = ("distinct", "even", "released")


class DataError(ValueError):
    """Frames that are missing or broken, or sources that do not belong together."""


@dataclass(frozen=True, kw_only=True)
class ClipSource:
    """Videos to take clips from, and how.

    Attributes:
        videos: annotated; crowds are not trained on.
        augmentation: what happens to a clip.
        num_frames: ``T``.
        reach: frames come from at most this far on either side of a random one.
        spacing: see :func:`choose_frames`.
        weight: share of clips among the sources, relative.
    """

    videos: VideoSet
    augmentation: ClipAugmentation = field(default_factory=ClipAugmentation)
    num_frames: int = 16
    reach: int = 20
    spacing: str = "distinct"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.spacing not in SPACINGS:
            raise ValueError(f"spacing={self.spacing!r} is not one of {', '.join(SPACINGS)}")
        if self.num_frames < 1 or self.reach < 0 or not self.weight > 0:
            raise ValueError(
                f"num_frames={self.num_frames}, reach={self.reach}, weight={self.weight}: clips "
                "need at least 1 frame, a reach of at least 0 and a weight above 0"
            )
        if not self.videos.annotated or not len(self.videos):
            raise DataError(f"{self.videos.name} has no annotated videos to train on")


class ClipKey(NamedTuple):
    """Which clip: number of the source, of the video in it, and of the clip in the run."""

    source: int
    video: int
    draw: int


def choose_frames(
    length: int,
    count: int,
    rng: np.random.Generator,
    reach: int = 20,
    spacing: str = "distinct",
) -> np.ndarray:
    """Frames of a clip: ``count`` of ``length``, ascending, around a random one.

    A shorter video is slowed down: all its frames, each about equally often.

    Args:
        length: frames of the video, at least 1.
        count: frames of the clip.
        rng: decides.
        reach: frames on either side of the random one that may be taken, or more where the clip
            would not fit.
        spacing: "distinct": no frame twice, gaps at random. "even": gaps all the same, as a video
            encoder expects of time. "released": as CTVIS draws them, a frame perhaps several times.
    """
    if length < count and spacing != "released":
        return np.arange(count) * length // count
    reference = int(rng.integers(length))
    if spacing == "released":
        window = np.arange(max(0, reference - reach), min(length, reference + reach + 1))
        return np.sort(np.append(rng.choice(window, count - 1), reference))
    span = min(length, max(2 * reach + 1, count))
    first = int(np.clip(reference - reach, 0, length - span))
    if spacing == "even":
        gap = int(rng.integers(1, max(1, (span - 1) // max(1, count - 1)) + 1))
        last = first + span - 1 - gap * (count - 1)
        return int(rng.integers(first, last + 1)) + gap * np.arange(count)
    others = np.setdiff1d(np.arange(first, first + span), [reference])
    return np.sort(np.append(rng.choice(others, count - 1, replace=False), reference))


class VideoClips(Dataset):
    """Augmented clips of one or more sources, by :class:`ClipKey`.

    An item is ``{"frames" (T, 3, h, w) uint8, "targets": ClipTargets, "video_id", "numbers": (T,)
    the frames' numbers in their video, "annotations": ids of the instances}``.

    Raises:
        DataError: sources of different categories or lengths of clips.
    """

    def __init__(self, sources: Sequence[ClipSource], seed: int = 0) -> None:
        if not sources:
            raise DataError("no source of clips; name at least one")
        self.sources, self.seed = list(sources), seed
        first = self.sources[0]
        for other in self.sources[1:]:
            if dict(other.videos.categories) != dict(first.videos.categories):
                raise DataError(
                    f"{other.videos.name} and {first.videos.name} have different categories; map "
                    "one to the other (layout.read_coco)"
                )
            if other.num_frames != first.num_frames:
                raise DataError(
                    f"clips of {other.num_frames} and {first.num_frames} frames cannot share a "
                    "batch; give all sources one num_frames"
                )

    @property
    def metainfo(self) -> dict[str, Any]:
        """Names of the labels, for mmengine's checkpoints."""
        return {"classes": list(self.sources[0].videos.class_names)}

    def __len__(self) -> int:
        return sum(len(source.videos) for source in self.sources)

    def __getitem__(self, key: ClipKey) -> dict[str, Any]:
        """Read, cut and augment one clip."""
        source = self.sources[key.source]
        video = source.videos.videos[key.video]
        rng = np.random.default_rng([self.seed, key.draw])
        numbers = choose_frames(
            len(video.files), source.num_frames, rng, source.reach, source.spacing
        )
        frames, masks, tracks = read_clip(video, source.videos.root, numbers)
        frames, masks = augment_clip(frames, masks, source.augmentation, rng)
        shown = masks.flatten(1).any(1)
        tracks = [track for track, here in zip(tracks, shown.tolist(), strict=True) if here]
        labels = torch.tensor([track.label for track in tracks], dtype=torch.int64)
        return {
            "frames": frames,
            "targets": ClipTargets(labels, masks[shown]),
            "video_id": video.id,
            "numbers": torch.from_numpy(numbers),
            "annotations": [track.id for track in tracks],
        }


class ClipBatches(Sampler[list[ClipKey]]):
    """Batches of keys for :class:`VideoClips`, as many as a run has iterations.

    Sources share a batch by their weights, and every video of a source is seen once before one is
    seen again. With several ranks each takes its part of every batch.

    Args:
        sources: those of the data set.
        batch_size: clips of a batch, over all ranks.
        batches: length of the run.
        seed: decides all of it.
        start: batches that an interrupted run has already seen.
    """

    def __init__(
        self,
        sources: Sequence[ClipSource],
        batch_size: int,
        batches: int,
        seed: int = 0,
        start: int = 0,
    ) -> None:
        ready = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if ready else 0
        self.world = dist.get_world_size() if ready else 1
        if batch_size < 1 or batch_size % self.world:
            raise ValueError(
                f"batch_size={batch_size} does not divide among {self.world} ranks; change either"
            )
        if not 0 <= start <= batches:
            raise ValueError(f"start={start} lies outside a run of {batches} batches")
        self.batch_size, self.batches = batch_size, batches
        self.seed, self.start = seed, start
        self.groups = [
            [
                [n for n, video in enumerate(source.videos.videos) if video.landscape == landscape]
                for landscape in (True, False)
            ]
            for source in sources
        ]
        counts = np.array([[len(group) for group in groups] for groups in self.groups], float)
        weights = np.array([[source.weight] for source in sources])
        shares = weights * counts / counts.sum(1, keepdims=True)
        self.shares = shares / shares.sum()  # (sources, 2)

    def __len__(self) -> int:
        return self.batches - self.start

    def __iter__(self) -> Iterator[list[ClipKey]]:
        rng = np.random.default_rng([self.seed])
        decks = {
            (source, group): self._deck(source, group)
            for source, group in np.argwhere(self.shares > 0).tolist()
        }
        formats = self.shares.sum(0)
        for batch in range(self.batches):
            group = int(rng.choice(2, p=formats))
            chances = self.shares[:, group] / formats[group]
            chosen = rng.choice(len(chances), self.batch_size, p=chances)
            keys = [
                ClipKey(int(source), next(decks[int(source), group]), batch * self.batch_size + n)
                for n, source in enumerate(chosen)
            ]
            if batch >= self.start:
                yield keys[self.rank :: self.world]

    def _deck(self, source: int, group: int) -> Iterator[int]:
        """The videos of a source and format, shuffled anew each time round."""
        rng = np.random.default_rng([self.seed, source, group])
        while True:
            yield from rng.permutation(self.groups[source][group]).tolist()


class WholeVideos(Dataset):
    """Videos to evaluate, all frames, resized; an item is one video.

    An item is ``{"frames" (T, 3, h, w) uint8, "video_id", "size": (H, W) of the document}``.

    Args:
        videos: with or without annotations.
        short: pixels that the short side is brought to.
        longest: the long side never gets longer.
    """

    def __init__(self, videos: VideoSet, short: int = 224, longest: int = 1333) -> None:
        self.videos, self.short, self.longest = videos, short, longest

    @property
    def title(self) -> str:
        """For progress bars."""
        return self.videos.name

    @property
    def metainfo(self) -> dict[str, Any]:
        """What ``metrics.TrackAP`` reads: categories, and the document to score against."""
        return {
            "category_ids": self.videos.category_ids,
            "classes": self.videos.class_names,
            "document": self.videos.document() if self.videos.annotated else None,
        }

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read one video."""
        video = self.videos.videos[index]
        frames = read_video(video, self.videos.root, self.short, self.longest)
        return {
            "frames": torch.stack(list(frames)),
            "video_id": video.id,
            "size": (video.height, video.width),
        }


def read_clip(video: Video, root: Path, numbers: Sequence[int]) -> tuple[Tensor, Tensor, list]:
    """Some frames of a video, ``(T, 3, H, W)`` uint8, and what they show.

    Returns:
        The frames, masks ``(n, T, H, W)`` bool and tracks of the ``n`` objects, crowds apart, that
        at least one of the frames shows.
    """
    read = {n: read_frame(video, root, n) for n in {int(number) for number in numbers}}
    frames = torch.stack([read[int(number)] for number in numbers])
    tracks = [track for track in video.tracks if not track.crowd and track.present()[numbers].any()]
    masks = np.zeros((len(tracks), len(numbers), video.height, video.width), bool)
    for row, track in zip(masks, tracks, strict=True):
        row[:] = track.masks(numbers)
    return frames, torch.from_numpy(masks), tracks


def read_frame(video: Video, root: Path, number: int) -> Tensor:
    """One frame, ``(3, H, W)`` uint8 RGB.

    Raises:
        DataError: the file is missing or no picture, or of another size than the document says.
    """
    path = Path(root) / video.files[number]
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except FileNotFoundError as error:
        raise DataError(
            f"video {video.id}, frame {number}: {path} is missing; the folder of frames must be "
            "that of the document's split"
        ) from error
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"video {video.id}, frame {number}: {path} is broken ({error})") from error
    if pixels.shape[:2] != (video.height, video.width):
        raise DataError(
            f"video {video.id}, frame {number}: {path} has {pixels.shape[0]} x {pixels.shape[1]} "
            f"pixels, the document says {video.height} x {video.width}"
        )
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_video(video: Video, root: Path, short: int, longest: int = 1333) -> Iterator[Tensor]:
    """All frames in order, ``(3, h, w)`` uint8, resized as for evaluation; one at a time."""
    nothing = torch.zeros(0, 1, video.height, video.width, dtype=torch.bool)
    for number in range(len(video.files)):
        yield resize_clip(read_frame(video, root, number)[None], nothing, short, longest)[0][0]


def collate_clips(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items of :class:`VideoClips` as ``model.ClipPreprocessor`` takes them, which pads them."""
    return {
        "inputs": {"frames": [item["frames"] for item in items]},
        "data_samples": [item["targets"] for item in items],
    }


def collate_videos(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items of :class:`WholeVideos` as ``model.ClipPreprocessor`` takes them."""
    from integrations.ovis.model import VideoSample  # mmengine, which reading does not need

    return {
        "inputs": {"frames": [item["frames"] for item in items]},
        "data_samples": [VideoSample(item["video_id"], item["size"]) for item in items],
    }
