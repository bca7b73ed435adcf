"""Annotated videos: one reader per family of annotation files, decoding and augmentation shared."""

from pretrain.datasets.base import (
    Annotations,
    Batch,
    Draw,
    Entry,
    Sample,
    Segment,
    VideoDataset,
    collate,
)
from pretrain.datasets.captions import read_captions, read_index
from pretrain.datasets.kinetics import read_kinetics
from pretrain.datasets.localization import read_localization

READERS = {
    "kinetics": read_kinetics,
    "localization": read_localization,
    "captions": read_captions,
    "index": read_index,
}

__all__ = [
    "READERS",
    "Annotations",
    "Batch",
    "Draw",
    "Entry",
    "Sample",
    "Segment",
    "VideoDataset",
    "collate",
    "read_captions",
    "read_index",
    "read_kinetics",
    "read_localization",
]
