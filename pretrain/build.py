"""From a task's config to its data set and its objective; training and evaluation build alike."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

from pretrain.config import TaskConfig
from pretrain.datasets import READERS, Annotations, VideoDataset
from pretrain.datasets.augment import Augmentation
from pretrain.datasets.decode import ClipReader, FrameStore
from pretrain.datasets.union import check_arguments
from pretrain.objectives import (
    Grounding,
    InstanceSegmentation,
    Localization,
    Objective,
    Recognition,
    ReferringSegmentation,
    Retrieval,
)


def build_dataset(
    task: TaskConfig,
    arguments: Mapping,
    *,
    name: str,
    image_size: int,
    store: FrameStore | None = None,
    share: float = 1.0,
) -> VideoDataset:
    """The videos of a task, or a share of them.

    ``arguments`` go to the task's annotation reader and bear its names.
    """
    return VideoDataset(
        share_of(read_annotations(task, arguments, name), share),
        ClipReader(
            size=image_size,
            sampling=task.sampling,
            stride=task.stride,
            augment=Augmentation(task.augmentation, task.flip),
            store=store,
        ),
        task.views,
    )


def read_annotations(task: TaskConfig, arguments: Mapping, name: str) -> Annotations:
    """What a task's reader makes of these arguments; other arguments than it takes are refused."""
    reader = READERS[task.reader]
    check_arguments(reader, arguments, f"task {name!r}: reader {task.reader!r}")
    return reader(**arguments)


def share_of(annotations: Annotations, share: float) -> Annotations:
    """The entries of a share of the videos, chosen by a digest of the file's name.

    So every task keeps the same videos, a smaller share is part of a larger one, and the number
    kept is near the share, not exactly it.
    """
    if share >= 1:
        return annotations

    def place(name: str) -> float:
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64

    kept = [entry for entry in annotations.entries if place(entry.video.stem) < share]
    return replace(annotations, entries=kept)


def build_objective(
    task: TaskConfig,
    dataset: VideoDataset,
    *,
    renormalize_labels: bool = True,
    mask_duplicates: bool = True,
) -> Objective:
    """The objective of a task, over the label sets of its data."""
    if task.objective == "retrieval":
        return Retrieval(mask_duplicates=mask_duplicates)
    if task.objective == "grounding":
        return Grounding(task.reduction)
    if task.objective == "referring_segmentation":
        return ReferringSegmentation(mask_duplicates=mask_duplicates, loss=task.spatial_loss)
    if task.objective == "instance_segmentation":
        return InstanceSegmentation(
            dataset.label_sets,
            task.templates,
            renormalize=renormalize_labels,
            loss=task.spatial_loss,
            max_classes=task.max_classes,
        )
    kind = {"recognition": Recognition, "localization": Localization}[task.objective]
    return kind(dataset.label_sets, task.templates, renormalize=renormalize_labels)
