"""Several annotation files as one, for a task that learns from data sets of different formats."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pretrain.datasets.base import Annotations, Entry


def read_union(parts: Sequence[Mapping[str, Any]]) -> Annotations:
    """Read several annotation files, each with the reader of its format.

    parts: one mapping each, ``reader`` being a name of `datasets.READERS` and the rest that
    reader's arguments. Label sets of the same name must hold the same labels. Raises ValueError for
    a part without a known reader, with arguments that it does not take, or with other labels.
    """
    from pretrain.datasets import READERS  # this reader is one of them

    entries: list[Entry] = []
    label_sets: dict[str, tuple[str, ...]] = {}
    left_out: list[str] = []
    for number, part in enumerate(parts):
        name, where = part.get("reader"), f"part {number} of {len(parts)}"
        if name not in READERS:
            raise ValueError(
                f"{where}: reader={name!r} is unknown; use one of {', '.join(READERS)}"
            )
        arguments = {key: value for key, value in part.items() if key != "reader"}
        check_arguments(READERS[name], arguments, f"{where}: reader {name!r}")
        found = READERS[name](**arguments)
        for set_name, labels in found.label_sets.items():
            if label_sets.setdefault(set_name, labels) != labels:
                raise ValueError(
                    f"{where}: its label set {set_name!r} differs from that of an earlier part; "
                    "give both the same labels file, or different names"
                )
        entries += found.entries
        left_out += found.left_out
    return Annotations(entries, label_sets, tuple(left_out))


def check_arguments(reader: Callable, arguments: Mapping[str, Any], who: str) -> None:
    """Refuse arguments that a reader does not take, or the lack of one that it needs."""
    try:
        inspect.signature(reader).bind(**arguments)
    except TypeError as error:
        raise ValueError(
            f"{who} takes {', '.join(inspect.signature(reader).parameters)} ({error})"
        ) from error
