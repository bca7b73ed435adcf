"""From a task's config to its data set and its objective; training and evaluation build alike."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from pretrain.config import TaskConfig
from pretrain.datasets import READERS, VideoDataset
from pretrain.datasets.augment import Augmentation
from pretrain.datasets.decode import ClipReader, FrameStore
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
) -> VideoDataset:
    """The videos of a task; ``arguments`` go to its annotation reader and bear its names."""
    reader = READERS[task.reader]
    try:
        inspect.signature(reader).bind(**arguments)
    except TypeError as error:
        raise ValueError(
            f"task {name!r}: reader {task.reader!r} takes "
            f"{', '.join(inspect.signature(reader).parameters)} ({error})"
        ) from error
    clips = ClipReader(
        size=image_size,
        sampling=task.sampling,
        stride=task.stride,
        augment=Augmentation(task.augmentation, task.flip),
        store=store,
    )
    return VideoDataset(reader(**arguments), clips)


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
