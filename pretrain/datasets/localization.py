"""Action localization tables: ActivityNet-1.3, FineAction, HACS and whatever is written like them.

A CSV file with the columns video_id, start_second, end_second, text (the label), relevant_windows
(a list of [start, end]) and dataset; one row per label and video or per label and occurrence. Rows
of one video are gathered into one entry, so that a frame may carry several labels at once and no
action of a video is another action's background.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pretrain.datasets.base import Annotations, Entry, Segment
from pretrain.datasets.tables import (
    AnnotationError,
    label_id,
    ordered_labels,
    parse_list,
    parse_seconds,
    read_json,
    read_rows,
    report_left_out,
    root_of,
    with_suffix,
)

COLUMNS = ("video_id", "start_second", "end_second", "text", "relevant_windows", "dataset")
PREFIXES = {"HACS": "v_"}  # files are named after the id with this in front


def read_localization(
    annotations: str | Path,
    labels: str | Path,
    root: str | Path | Mapping[str, str | Path],
) -> Annotations:
    """Read labelled stretches of untrimmed videos.

    annotations: the CSV file. labels: JSON ``{dataset: {label: id}}``. root: folder of the videos,
    or one per data set. A stretch that ends before it starts, or at its start, is left out and
    reported. Raises AnnotationError for unknown labels or data sets and unreadable cells.
    """
    label2id = read_json(labels)
    sets = {name: ordered_labels(ids, f"{labels}, {name}") for name, ids in label2id.items()}
    videos: dict[tuple[str, str], dict[Segment, None]] = {}
    left_out: list[str] = []
    for line, row in read_rows(annotations, COLUMNS):
        dataset = row["dataset"]
        if dataset not in sets:
            raise AnnotationError(
                f"{annotations}, line {line}: data set {dataset!r} is not in {labels}, which "
                f"knows {', '.join(map(repr, sets))}"
            )
        number = label_id(label2id[dataset], row["text"], annotations, line)
        segments = videos.setdefault((dataset, row["video_id"]), {})
        for start, end in row_windows(row, annotations, line):
            if end > start:
                segments[Segment(number, start, end)] = None
            else:
                left_out.append(f"line {line}: {row['video_id']} from {start:g} to {end:g} s")
    report_left_out(annotations, left_out)
    entries = []
    for (dataset, video_id), segments in videos.items():
        file = with_suffix(PREFIXES.get(dataset, "") + video_id, ".mp4")
        path = root_of(root, dataset, annotations) / file
        entries.append(Entry(path, label_set=dataset, segments=tuple(segments)))
    return Annotations(entries, sets, tuple(left_out))


def row_windows(row: Mapping[str, str], path: str | Path, line: int) -> list[tuple[float, float]]:
    """When a row's label holds, in seconds: its several windows, else its start and end.

    A single window is not used, as in the released tables, where it repeats start and end.
    """
    windows = parse_list(row["relevant_windows"] or "[]", path, line, "relevant_windows")
    if len(windows) < 2:
        cells = (row[name] for name in ("start_second", "end_second"))
        start, end = (
            parse_seconds(cell, path, line, name)
            for cell, name in zip(cells, ("start_second", "end_second"), strict=True)
        )
        return [(start, end)]
    try:
        return [(float(start), float(end)) for start, end in windows]
    except (TypeError, ValueError) as error:
        raise AnnotationError(
            f"{path}, line {line}: relevant_windows={windows!r} must hold pairs [start, end]"
        ) from error


def frame_labels(segments: tuple[Segment, ...], times: np.ndarray, num_labels: int) -> np.ndarray:
    """Which labels hold at which times: (T, C) bool, both ends of a segment included.

    Times are compared at a hundredth of a second, the precision of the annotations.
    """
    holds = np.zeros((len(times), num_labels), bool)
    stamps = np.round(times, 2)
    for label, start, end in segments:
        holds[:, label] |= (start <= stamps) & (stamps <= end)
    return holds
