"""Labelled stretches of untrimmed videos: ActivityNet-1.3, FineAction, HACS Segments.

`read_localization` reads the released tables, CSV files with the columns video_id, start_second,
end_second, text (the label), relevant_windows (a list of [start, end]) and dataset; one row per
label and video or per label and occurrence. `read_activitynet` and its siblings read the JSON files
that the three data sets are published as, all of one form:

    {"database": {"<video>": {"subset": "training", "duration": 82.7, "filename": "…" (FineAction),
                              "annotations": [{"segment": [0.1, 9.5], "label": "Dodgeball"}, …]}}}

All stretches of a video make one entry, so that a frame may carry several labels at once and no
action of a video is another action's background.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pretrain.datasets.base import Annotations, Entry, Segment
from pretrain.datasets.tables import (
    AnnotationError,
    check_split,
    fields,
    file_of,
    label_id,
    label_ids,
    listed,
    mapping,
    ordered_labels,
    parse_list,
    read_json,
    read_rows,
    report_left_out,
    root_of,
    seconds,
    stretches,
    usable,
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
        number = label_id(label2id[dataset], row["text"], f"{annotations}, line {line}")
        windows = row_windows(row, annotations, line)
        kept = usable(windows, f"line {line}: {row['video_id']}", left_out)
        if kept:
            segments = videos.setdefault((dataset, row["video_id"]), {})
            segments |= dict.fromkeys(Segment(number, *window) for window in kept)
    report_left_out(annotations, left_out)
    entries = []
    for (dataset, video_id), segments in videos.items():
        file = with_suffix(PREFIXES.get(dataset, "") + video_id, ".mp4")
        path = root_of(root, dataset, annotations) / file
        entries.append(Entry(path, label_set=dataset, segments=tuple(segments)))
    return Annotations(entries, sets, tuple(left_out))


def read_activitynet(
    annotations: str | Path,
    root: str | Path,
    labels: str | Path | None = None,
    split: str | None = "training",
    name: str = "ActivityNet",
    pattern: str = "v_{id}.mp4",
) -> Annotations:
    """Read the JSON file of ActivityNet-1.3, or another of its form.

    root: folder of the videos, named by ``pattern`` after {id}, {split} and, if the file gives one,
    {filename}. labels: JSON ``{label: id}`` or ``{name: {label: id}}``; None numbers the labels of
    all splits by alphabet. split: the subset to read; None for all. Stretches without length within
    the video, and videos that are left without any, are left out and reported.
    """
    (database,) = fields(read_json(annotations), ("database",), str(annotations))
    found: dict[str, tuple[Mapping, list[tuple[str, float, float]]]] = {}
    for video, item in mapping(database, str(annotations), "database").items():
        where = f"{annotations}, video {video!r}"
        _, actions = fields(item, ("subset", "annotations"), where)
        found[video] = item, []
        for action in listed(actions, where, "annotations"):
            label, segment = fields(action, ("label", "segment"), where)
            ((start, end),) = stretches([segment], where, "segment")
            found[video][1].append((label, start, end))
    check_split((item["subset"] for item, _ in found.values()), split, annotations)
    label2id = label_ids(
        labels, name, (label for _, actions in found.values() for label, _, _ in actions)
    )
    entries: list[Entry] = []
    left_out: list[str] = []
    for video, (item, actions) in found.items():
        if split not in (None, item["subset"]):
            continue
        where, length = f"{annotations}, video {video!r}", item.get("duration")
        duration = None if length is None else seconds(length, where, "duration")
        segments: dict[Segment, None] = {}
        for label, start, end in actions:
            number = label_id(label2id, label, where)
            for window in usable([(start, end)], video, left_out, duration):
                segments[Segment(number, *window)] = None
        if not segments:
            left_out.append(f"{video} without any action")
            continue
        names = {"id": video, "split": item["subset"]}
        if "filename" in item:
            names["filename"] = item["filename"]
        path = file_of(root, pattern, **names)
        entries.append(Entry(path, label_set=name, segments=tuple(segments)))
    report_left_out(annotations, left_out)
    classes = ordered_labels(label2id, str(labels or annotations))
    return Annotations(entries, {name: classes}, tuple(left_out))


def read_fineaction(
    annotations: str | Path,
    root: str | Path,
    labels: str | Path | None = None,
    split: str | None = "training",
    name: str = "FineAction",
    pattern: str = "{filename}",
) -> Annotations:
    """Read annotations_gt.json of FineAction; arguments as in `read_activitynet`."""
    return read_activitynet(annotations, root, labels, split, name, pattern)


def read_hacs(
    annotations: str | Path,
    root: str | Path,
    labels: str | Path | None = None,
    split: str | None = "training",
    name: str = "HACS",
    pattern: str = "v_{id}.mp4",
) -> Annotations:
    """Read HACS_segments.json of HACS Segments; arguments as in `read_activitynet`."""
    return read_activitynet(annotations, root, labels, split, name, pattern)


def row_windows(row: Mapping[str, str], path: str | Path, line: int) -> list[tuple[float, float]]:
    """When a row's label holds, in seconds: its several windows, else its start and end.

    A single window is not used, as in the released tables, where it repeats start and end.
    """
    windows = parse_list(row["relevant_windows"] or "[]", path, line, "relevant_windows")
    where = f"{path}, line {line}"
    if len(windows) > 1:
        return stretches(windows, where, "relevant_windows")
    start, end = (seconds(row[name], where, name) for name in ("start_second", "end_second"))
    return [(start, end)]


def frame_labels(segments: tuple[Segment, ...], times: np.ndarray, num_labels: int) -> np.ndarray:
    """Which labels hold at which times: (T, C) bool, both ends of a segment included.

    Times are compared at a hundredth of a second, the precision of the annotations.
    """
    holds = np.zeros((len(times), num_labels), bool)
    stamps = np.round(times, 2)
    for label, start, end in segments:
        holds[:, label] |= (start <= stamps) & (stamps <= end)
    return holds
