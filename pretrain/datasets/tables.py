"""Reading annotation files: checked columns and fields, literal lists, labels, file names.

Shared by the readers. Every refusal names the file, the place in it (its line, or the video) and
what was expected; ``where`` is both of these as one string.
"""

from __future__ import annotations

import ast
import csv
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SUFFIXES = {".mp4", ".avi", ".webm", ".mkv", ".mov", ".m4v", ".mpg", ".3gp", ".wmv", ".ogv"}


class AnnotationError(ValueError):
    """An annotation file that does not say what its format promises."""


def read_rows(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and row of a CSV file with a header that has at least ``columns``.

    Raises AnnotationError for a header without them, and for a row without one of their cells.
    """
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
            short = [name for name in columns if row[name] is None]
            if short:
                raise AnnotationError(
                    f"{path}, line {reader.line_num}: no cell for {', '.join(map(repr, short))}"
                )
            yield reader.line_num, row


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Line number and text of every line with text, stripped."""
    for line, text in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if text.strip():
            yield line, text.strip()


def read_json_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Line number and value of a file with one JSON value a line."""
    for line, text in read_lines(path):
        try:
            yield line, json.loads(text)
        except json.JSONDecodeError as error:
            raise AnnotationError(f"{path}, line {line}: is not JSON ({error})") from error


def read_names(path: str | Path, column: str) -> dict[str, dict[str, str]]:
    """Names listed in a file: one a line, or the cells of ``column`` of a CSV file with header.

    Returns the rows by name; a plain list has empty rows.
    """
    lines = [text for _, text in read_lines(path)]
    if lines and column in lines[0].split(","):
        return {row[column]: row for _, row in read_rows(path, (column,))}
    return {name: {} for name in lines}


def fields(item: Any, names: Sequence[str], where: str) -> tuple:
    """The values of a JSON object by name, or an error that tells which one it lacks."""
    if not isinstance(item, Mapping):
        raise AnnotationError(
            f"{where}: expected an object with {', '.join(names)}, found {_short(item)}"
        )
    missing = [name for name in names if name not in item]
    if missing:
        raise AnnotationError(
            f"{where}: no field {', '.join(map(repr, missing))}; there are "
            f"{', '.join(map(repr, item)) or 'none'}"
        )
    return tuple(item[name] for name in names)


def listed(value: Any, where: str, name: str) -> list:
    """A JSON list, or an error."""
    if not isinstance(value, list):
        raise AnnotationError(f"{where}: {name}={_short(value)} is no list")
    return value


def mapping(value: Any, where: str, name: str) -> Mapping[str, Any]:
    """A JSON object, or an error."""
    if not isinstance(value, Mapping):
        raise AnnotationError(f"{where}: {name}={_short(value)} is no object")
    return value


def seconds(value: Any, where: str, name: str) -> float:
    """A finite number, given as such or as text."""
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise AnnotationError(f"{where}: {name}={value!r} is no number") from error
    if not math.isfinite(number):
        raise AnnotationError(f"{where}: {name}={value!r} is not finite")
    return number


def stretches(value: Any, where: str, name: str) -> list[tuple[float, float]]:
    """A list of [start, end] in seconds."""
    pairs = listed(value, where, name)
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise AnnotationError(f"{where}: {name}={_short(pairs)} must hold pairs [start, end]")
    return [(seconds(start, where, name), seconds(end, where, name)) for start, end in pairs]


def usable(
    windows: Sequence[tuple[float, float]],
    place: str,
    left_out: list[str],
    duration: float | None = None,
) -> list[tuple[float, float]]:
    """Windows (start, end) in seconds that have a length within the video.

    Ends are moved to the video's ``duration`` where that is known; windows that have no length, or
    begin behind it, are named in ``left_out``. ``place`` tells where they stand.
    """
    kept = []
    for start, end in windows:
        clipped = end if duration is None else min(end, duration)
        if clipped > start:
            kept.append((start, clipped))
        else:
            behind = f" (the video ends at {duration:g} s)" if end > start else ""
            left_out.append(f"{place} from {start:g} to {end:g} s{behind}")
    return kept


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def parse_list(text: str, path: str | Path, line: int, column: str) -> list:
    """A list written as a Python literal, as the released tables hold them."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise AnnotationError(f"{path}, line {line}: {column}={text!r} is no literal") from error
    if not isinstance(value, list | tuple):
        raise AnnotationError(f"{path}, line {line}: {column}={text!r} is no list")
    return list(value)


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


_unknown_labels: ContextVar[list[str] | None] = ContextVar("unknown_labels", default=None)


@contextmanager
def collecting_unknown_labels() -> Iterator[list[str]]:
    """Let readers go on past labels without an id; yields the list that names them.

    For checks of whole files: such labels get the id -1, so nothing may be trained on what is read.
    """
    found: list[str] = []
    token = _unknown_labels.set(found)
    try:
        yield found
    finally:
        _unknown_labels.reset(token)


def label_id(label2id: Mapping[str, int], label: str, where: str) -> int:
    """Id of a label, or an error that names it and where it stands."""
    if label in label2id:
        return label2id[label]
    problem = f"{where}: label {label!r} is not among the {len(label2id)} of label2id"
    found = _unknown_labels.get()
    if found is None:
        raise AnnotationError(problem)
    found.append(problem)
    return -1


def label_ids(labels: str | Path | None, name: str, found: Iterable[str]) -> dict[str, int]:
    """Ids of the labels of a set: read from a file, or else those ``found``, in alphabetical order.

    labels: JSON ``{label: id}``, or ``{set: {label: id}}`` with a set of this ``name``; ids may be
    written as text. They must be 0 to C - 1, each once.
    """
    if labels is None:
        return {label: number for number, label in enumerate(sorted(set(found)))}
    label2id = read_json(labels)
    if isinstance(label2id, Mapping) and isinstance(label2id.get(name), Mapping):
        label2id = label2id[name]
    if not isinstance(label2id, Mapping) or not all(
        isinstance(number, int) or (isinstance(number, str) and number.isdecimal())
        for number in label2id.values()
    ):
        raise AnnotationError(
            f"{labels}: expected {{label: id}} or {{{name!r}: {{label: id}}}}, found "
            f"{_short(label2id)}"
        )
    label2id = {label: int(number) for label, number in label2id.items()}
    ordered_labels(label2id, str(labels))
    return label2id


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
    return name if Path(name).suffix.lower() in SUFFIXES else name + suffix


def file_of(root: str | Path, pattern: str, **names: Any) -> Path:
    """A video's path below ``root``: ``pattern`` with what is known of the video filled in."""
    try:
        return Path(root) / pattern.format(**names)
    except (KeyError, IndexError, ValueError) as error:
        raise AnnotationError(
            f"pattern={pattern!r} does not name a file; it may use "
            f"{', '.join(f'{{{name}}}' for name in names)}"
        ) from error


def check_split(found: Iterable[str], split: str | None, path: str | Path) -> None:
    """Refuse a split of which the file has nothing; None asks for all."""
    splits = sorted(set(found))
    if split is not None and split not in splits:
        raise AnnotationError(
            f"{path}: nothing in split {split!r}; splits are "
            f"{', '.join(map(repr, splits)) or 'none'}"
        )


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
