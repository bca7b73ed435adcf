"""Clips with captions: MSR-VTT, MSVD, ActivityNet, DiDeMo, LSMDC, VATEX tables, and index files.

Tables are CSV files with the columns video_id, text and dataset; text is a list of captions written
as a Python literal, or one plain caption (WebVid). An index has one JSON object per line with id,
split and captions. One caption is drawn per access.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pretrain.datasets.base import Annotations, Entry
from pretrain.datasets.tables import (
    AnnotationError,
    parse_list,
    read_rows,
    report_left_out,
    root_of,
    with_suffix,
)

SUFFIXES = {"LSMDC": ".avi", "MSVD": ".avi"}  # all others .mp4
TRIMMED = {"DiDeMo": 30.0}  # seconds that its captions speak of


def read_captions(
    annotations: str | Path, root: str | Path | Mapping[str, str | Path]
) -> Annotations:
    """Read a table of captioned videos; rows without any words are left out and reported.

    annotations: the CSV file. root: folder of the videos, or one per data set.
    """
    entries, left_out = [], []
    for line, row in read_rows(annotations, ("video_id", "text", "dataset")):
        dataset, text = row["dataset"], row["text"].strip()
        listed = text.startswith("[") and text.endswith("]")
        captions = _words(parse_list(text, annotations, line, "text") if listed else [text])
        if not captions:
            left_out.append(f"line {line}: {row['video_id']} has no caption")
            continue
        file = with_suffix(row["video_id"], SUFFIXES.get(dataset, ".mp4"))
        path = root_of(root, dataset, annotations) / file
        entries.append(Entry(path, captions=captions, end=TRIMMED.get(dataset)))
    report_left_out(annotations, left_out)
    return Annotations(entries, {}, tuple(left_out))


def read_index(index: str | Path, root: str | Path, split: str) -> Annotations:
    """Read the captioned videos of one split of an index file.

    index: JSON lines with id, split and captions. root: folder of ``<id>.mp4``.
    """
    entries, left_out, splits = [], [], set()
    for line, text in enumerate(Path(index).read_text(encoding="utf-8").splitlines(), 1):
        try:
            item = json.loads(text)
            name, where, captions = item["id"], item["split"], _words(item["captions"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise AnnotationError(
                f"{index}, line {line}: expected an object with id, split and captions"
            ) from error
        splits.add(where)
        if where != split:
            continue
        if captions:
            entries.append(Entry(Path(root) / with_suffix(name, ".mp4"), captions=captions))
        else:
            left_out.append(f"line {line}: {name} has no caption")
    if not entries:
        raise AnnotationError(
            f"{index}: no captioned video in split {split!r}; splits are "
            f"{', '.join(map(repr, sorted(splits))) or 'none'}"
        )
    report_left_out(index, left_out)
    return Annotations(entries, {}, tuple(left_out))


def _words(captions: list) -> tuple[str, ...]:
    return tuple(str(caption).strip() for caption in captions if str(caption).strip())
