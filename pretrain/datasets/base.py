"""What every data set speaks: annotated videos in, samples and batches out.

A reader (`kinetics`, `localization`, `captions`) turns annotation files into `Annotations`: a list
of `Entry`, and the label sets they refer to. `VideoDataset` decodes an entry's clip and hands out a
`Sample`; `collate` makes a `Batch`. What the targets are is the objectives' business.

All randomness of a sample comes from the seed in its `Draw`, so the same draw gives the same clip
in any worker, on any rank, before and after a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pretrain.datasets.decode import ClipError, ClipReader
from pretrain.datasets.frames import View
from pretrain.datasets.masks import IGNORE, MaskSource


class Segment(NamedTuple):
    """A label that holds from ``start`` to ``end`` seconds, both included."""

    label: int
    start: float
    end: float


@dataclass(frozen=True)
class Entry:
    """One annotated video; which fields are filled depends on the annotation's family.

    ``video`` is a file, a folder of images, or one image, which is a video of one frame.
    """

    video: Path
    label_set: str = ""  # the set that labels and segments number into
    labels: tuple[int, ...] = ()  # true of the whole video
    segments: tuple[Segment, ...] = ()  # true of a stretch of it
    captions: tuple[str, ...] = ()
    start: float = 0.0  # seconds; what is before does not belong to the entry
    end: float | None = None  # seconds; None for the whole video
    focus: tuple[float, float] | None = None  # seconds that the rule "fixfps" centres on
    masks: MaskSource | None = None  # where the masks of its frames are
    files: tuple[str, ...] = ()  # the images that are its frames, in order, if not all of a folder


@dataclass(frozen=True)
class Annotations:
    """What a reader found: entries, label sets in id order, and the rows it had to leave out."""

    entries: Sequence[Entry]
    label_sets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


class Draw(NamedTuple):
    """One draw of the sampler: which entry, how many frames, and the seed of all its chances.

    ``seed`` None asks for the fixed choices of validation, or for one ``view`` of a test.
    """

    index: int
    num_frames: int
    seed: int | None = None
    view: View | None = None


@dataclass
class Sample:
    """A decoded entry, or the reason why there is none."""

    entry: Entry
    frames: Tensor | None  # (T, 3, H, W) uint8; None if decoding failed
    times: np.ndarray | None  # (T,) seconds
    caption: str = ""
    error: str = ""
    masks: Tensor | None = None  # (T, H, W) int32, see `MaskSource`; None without masks
    seed: int | None = None  # of its draw


@dataclass
class Batch:
    """Clips of one task. Padding and clips that failed to decode are marked, and count nowhere."""

    frames: Tensor  # (B, T, 3, H, W) uint8
    valid: Tensor  # (B, T) bool: a real frame
    times: np.ndarray  # (B, T) seconds
    entries: list[Entry]
    captions: list[str]
    errors: list[str]
    masks: Tensor | None = None  # (B, T, H, W) int32, IGNORE in padding; None if no clip has any
    seeds: list[int | None] = field(default_factory=list)  # of the draws, None in validation

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on ``device``."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Called by the data loader where batches go to a GPU."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            frames=change(self.frames),
            valid=change(self.valid),
            masks=None if self.masks is None else change(self.masks),
        )


class VideoDataset(Dataset):
    """Samples of one family of annotations, read through one `ClipReader`.

    ``views``: how many clips over time, and squares along the long side, a test averages over.
    """

    def __init__(
        self, annotations: Annotations, reader: ClipReader, views: tuple[int, int] = (1, 1)
    ) -> None:
        if not annotations.entries:
            raise ValueError("the data set has no entries; check the annotation file and the split")
        masked = any(entry.masks is not None for entry in annotations.entries)
        if masked and reader.augment.kind == "strong":
            raise ValueError(
                "augmentation='strong' would leave the masks of these annotations behind; use "
                "'things' or 'crop'"
            )
        self.entries = annotations.entries
        self.label_sets = annotations.label_sets
        self.reader = reader
        self.views = views

    def __len__(self) -> int:
        return len(self.entries)

    def lasting(self, num_frames: int) -> list[int]:
        """Entries whose videos give clips of ``num_frames`` without padding."""
        reader = self.reader
        return [i for i, entry in enumerate(self.entries) if reader.lasts(entry, num_frames)]

    def __getitem__(self, draw: Draw) -> Sample:
        """Decode the drawn clip; a video that cannot be read gives a sample with its error."""
        entry = self.entries[draw.index]
        rng = None if draw.seed is None else np.random.default_rng(draw.seed)
        caption = ""
        if entry.captions:
            choice = 0 if rng is None else int(rng.integers(len(entry.captions)))
            caption = entry.captions[choice]
        try:
            clip = self.reader.read(entry, draw.num_frames, rng, draw.view)
        except ClipError as error:
            return Sample(entry, None, None, caption, str(error), seed=draw.seed)
        return Sample(entry, clip.frames, clip.times, caption, masks=clip.masks, seed=draw.seed)


def collate(samples: Sequence[Sample], size: int) -> Batch:
    """Stack clips of ``size`` pixels to the longest; failed ones keep their row, black, not valid.

    Rows are kept so that every rank brings the same number of clips to each update.
    """
    good = [sample for sample in samples if sample.frames is not None]
    steps = max((len(sample.frames) for sample in good), default=1)
    valid = torch.zeros(len(samples), steps, dtype=torch.bool)
    times = np.zeros((len(samples), steps))
    rows = []
    for i, sample in enumerate(samples):
        count = 0 if sample.frames is None else len(sample.frames)
        valid[i, :count] = True
        if count == steps:
            rows.append(sample.frames)
            times[i] = sample.times
            continue
        padded = torch.zeros(steps, 3, size, size, dtype=torch.uint8)
        if count:
            padded[:count], padded[count:] = sample.frames, sample.frames[-1]
            times[i, :count], times[i, count:] = sample.times, sample.times[-1]
        rows.append(padded)
    masks = None
    if any(sample.masks is not None for sample in good):
        masks = torch.full((len(samples), steps, size, size), IGNORE, dtype=torch.int32)
        for i, sample in enumerate(samples):
            if sample.masks is not None:
                masks[i, : len(sample.masks)] = sample.masks
    return Batch(
        frames=torch.stack(rows),  # (B, T, 3, H, W)
        valid=valid,
        times=times,
        entries=[sample.entry for sample in samples],
        captions=[sample.caption for sample in samples],
        errors=[sample.error for sample in samples if sample.error],
        masks=masks,
        seeds=[sample.seed for sample in samples],
    )
