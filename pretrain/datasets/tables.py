"""Reading annotation tables: checked columns, literal lists, label numbers, file names.

Shared by the readers; every refusal names the file, the line and the mend.
"""

from __future__ import annotations

import ast
import csv
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class AnnotationError(ValueError):
    """An annotation file that does not say what its format promises."""


def read_rows(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and row of a CSV file with a header that has at least ``columns``."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        found = reader.fieldnames or []
        missing = [name for name in columns if name not in found]
        if missing:
            raise AnnotationError(
                f"{path}: no column {', '.join(map(repr, missing))}; the header has "
                f"{', '.join(map(repr, found)) or 'nothing'}"
            )
        for row in reader:
            yield reader.line_num, row


def parse_list(text: str, path: str | Path, line: int, column: str) -> list:
    """A list written as a Python literal, as the released tables hold them."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise AnnotationError(f"{path}, line {line}: {column}={text!r} is no literal") from error
    if not isinstance(value, list | tuple):
        raise AnnotationError(f"{path}, line {line}: {column}={text!r} is no list")
    return list(value)


def parse_seconds(text: str, path: str | Path, line: int, column: str) -> float:
    """A time in seconds."""
    try:
        return float(text)
    except ValueError as error:
        raise AnnotationError(f"{path}, line {line}: {column}={text!r} is no number") from error


def read_json(path: str | Path) -> Any:
    """A JSON file; what is not JSON is refused by name."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise AnnotationError(f"{path}: is not JSON ({error})") from error


def ordered_labels(label2id: Mapping[str, int], source: str) -> tuple[str, ...]:
    """Labels in the order of their ids, which must be 0 to C - 1, each once."""
    labels = sorted(label2id, key=lambda label: label2id[label])
    ids = [label2id[label] for label in labels]
    if ids != list(range(len(ids))):
        raise AnnotationError(
            f"{source}: {len(ids)} labels need the ids 0 to {len(ids) - 1}, each once; found "
            f"{ids[:5]}{' …' if len(ids) > 5 else ''}"
        )
    return tuple(labels)


def label_id(label2id: Mapping[str, int], label: str, path: str | Path, line: int) -> int:
    """Id of a label, or an error that names it and its line."""
    if label not in label2id:
        raise AnnotationError(
            f"{path}, line {line}: label {label!r} is not among the {len(label2id)} of label2id"
        )
    return label2id[label]


def root_of(roots: str | Path | Mapping[str, str | Path], dataset: str, path: str | Path) -> Path:
    """Video folder of a data set: one for all, or one by data set name."""
    if not isinstance(roots, Mapping):
        return Path(roots)
    if dataset not in roots:
        raise AnnotationError(
            f"{path}: rows of data set {dataset!r}, but roots are given only for "
            f"{', '.join(map(repr, roots))}"
        )
    return Path(roots[dataset])


def with_suffix(name: str, suffix: str) -> str:
    """The file name of a video id: ``suffix`` is added unless the id has one of a video."""
    return name if Path(name).suffix in (".mp4", ".avi", ".webm", ".mkv") else name + suffix


def report_left_out(path: str | Path, left_out: Sequence[str]) -> None:
    """Say once how many rows a reader could not use, with examples."""
    if left_out:
        logger.warning(
            "%s: left out %d rows that cannot be trained on: %s%s",
            path,
            len(left_out),
            "; ".join(left_out[:3]),
            " …" if len(left_out) > 3 else "",
        )
