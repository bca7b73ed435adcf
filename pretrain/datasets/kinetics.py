"""Recognition lists: Kinetics-400, Something-Something v2 and whatever is written like them.

A CSV file without header: path relative to the root, class name (or its integer id, as in the
lists for fine-tuning), separated by a comma or another character.
"""

from __future__ import annotations

import csv
from pathlib import Path

from pretrain.datasets.base import Annotations, Entry
from pretrain.datasets.tables import AnnotationError, label_id, ordered_labels, read_json


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
    label2id = read_json(labels)
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
                number = label_id(label2id, label, annotations, line)
            entries.append(Entry(Path(root) / path, label_set=name, labels=(number,)))
    return Annotations(entries, {name: classes})
