"""Recognition lists: one class for a whole clip. Kinetics-400, Something-Something v2, HACS Clips.

`read_kinetics` reads the released lists, CSV files without header: path relative to the root, class
name (or its integer id, as in the lists for fine-tuning), separated by a comma or another
character. The others read what the data sets' own authors publish:

    Kinetics   CSV with label,youtube_id,time_start,time_end,split
    SSv2       JSON list of {"id": "78687", "template": "Holding [something]", …}, and labels.json
               {"Holding something": "103", …}
    HACS       CSV with classname,youtube_id,subset,start,end,label; label 1 if the class is there
"""

from __future__ import annotations

import csv
from pathlib import Path

from pretrain.datasets.base import Annotations, Entry
from pretrain.datasets.tables import (
    AnnotationError,
    check_split,
    fields,
    file_of,
    label_id,
    label_ids,
    listed,
    ordered_labels,
    read_json,
    read_rows,
    report_left_out,
    seconds,
    usable,
)


def read_kinetics(
    annotations: str | Path,
    labels: str | Path,
    root: str | Path,
    name: str = "Kinetics",
    separator: str = ",",
) -> Annotations:
    """Read a list of videos with one class each.

    annotations: the CSV file. labels: JSON ``{class: id}``. root: folder that paths start from.
    name: name of the label set. Raises AnnotationError for a row without class or an unknown one.
    """
    label2id = label_ids(labels, name, ())
    classes = ordered_labels(label2id, str(labels))
    entries = []
    with open(annotations, newline="", encoding="utf-8") as file:
        for line, row in enumerate(csv.reader(file, delimiter=separator), 1):
            if not row:
                continue
            if len(row) < 2:
                raise AnnotationError(
                    f"{annotations}, line {line}: {row[0]!r} has no class; expected "
                    f"path{separator}class"
                )
            path, label = row[0].strip(), row[1].strip()
            if label.isdecimal() and label not in label2id and int(label) < len(classes):
                number = int(label)
            else:
                number = label_id(label2id, label, f"{annotations}, line {line}")
            entries.append(Entry(Path(root) / path, label_set=name, labels=(number,)))
    return Annotations(entries, {name: classes})


def read_kinetics_official(
    annotations: str | Path,
    root: str | Path,
    labels: str | Path | None = None,
    split: str | None = None,
    name: str = "Kinetics",
    pattern: str = "{id}_{start:06d}_{end:06d}.mp4",
) -> Annotations:
    """Read the CSV file that Kinetics is published as.

    root: folder of the trimmed clips, named by ``pattern`` after {id}, {start}, {end} (whole
    seconds), {label} and {split}. labels: JSON ``{class: id}``; None numbers the classes of the
    file by alphabet, as is the custom. split: only rows that name it; None for all.
    """
    columns = ("label", "youtube_id", "time_start", "time_end", "split")
    rows = list(read_rows(annotations, columns))
    label2id = label_ids(labels, name, (row["label"] for _, row in rows))
    check_split((row["split"] for _, row in rows), split, annotations)
    entries = []
    for line, row in rows:
        where = f"{annotations}, line {line}"
        number = label_id(label2id, row["label"], where)
        if split is None or row["split"] == split:
            path = file_of(
                root,
                pattern,
                id=row["youtube_id"],
                start=int(seconds(row["time_start"], where, "time_start")),
                end=int(seconds(row["time_end"], where, "time_end")),
                label=row["label"],
                split=row["split"],
            )
            entries.append(Entry(path, label_set=name, labels=(number,)))
    return Annotations(entries, {name: ordered_labels(label2id, str(labels or annotations))})


def read_ssv2(
    annotations: str | Path,
    labels: str | Path,
    root: str | Path,
    name: str = "SSV2",
    pattern: str = "{id}.webm",
) -> Annotations:
    """Read the JSON list of a split of Something-Something v2.

    The class of a clip is its template without brackets. labels: the published labels.json.
    root: folder of the videos, named by ``pattern`` after {id}.
    """
    label2id = label_ids(labels, name, ())
    entries = []
    for place, item in enumerate(listed(read_json(annotations), str(annotations), "content")):
        where = f"{annotations}, item {place}"
        video, template = fields(item, ("id", "template"), where)
        label = str(template).replace("[", "").replace("]", "")
        number = label_id(label2id, label, where)
        path = file_of(root, pattern, id=video)
        entries.append(Entry(path, label_set=name, labels=(number,)))
    return Annotations(entries, {name: ordered_labels(label2id, str(labels))})


def read_hacs_clips(
    annotations: str | Path,
    root: str | Path,
    labels: str | Path | None = None,
    split: str | None = "training",
    name: str = "HACS",
    pattern: str = "v_{id}.mp4",
) -> Annotations:
    """Read HACS Clips: stretches of two seconds out of untrimmed videos, one class each.

    Only positive rows are clips. root: folder of the whole videos, named by ``pattern`` after {id},
    {label} and {split}. labels: JSON ``{class: id}``; None numbers by alphabet. Rows without length
    are left out and reported.
    """
    columns = ("classname", "youtube_id", "subset", "start", "end", "label")
    rows = list(read_rows(annotations, columns))
    label2id = label_ids(labels, name, (row["classname"] for _, row in rows))
    check_split((row["subset"] for _, row in rows), split, annotations)
    entries: list[Entry] = []
    left_out: list[str] = []
    for line, row in rows:
        where = f"{annotations}, line {line}"
        number = label_id(label2id, row["classname"], where)
        if row["label"] not in ("1", "-1"):
            raise AnnotationError(f"{where}: label={row['label']!r} must be 1 or -1")
        if row["label"] == "-1" or split not in (None, row["subset"]):
            continue
        window = tuple(seconds(row[column], where, column) for column in ("start", "end"))
        path = file_of(
            root, pattern, id=row["youtube_id"], label=row["classname"], split=row["subset"]
        )
        for start, end in usable([window], f"line {line}: {row['youtube_id']}", left_out):
            entries.append(Entry(path, label_set=name, labels=(number,), start=start, end=end))
    report_left_out(annotations, left_out)
    classes = ordered_labels(label2id, str(labels or annotations))
    return Annotations(entries, {name: classes}, tuple(left_out))
