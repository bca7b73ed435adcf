"""Sections of a config: nested mappings, read into dataclasses and checked by name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from backbone.names import hint

Record = TypeVar("Record")


def read_section(record: type[Record], values: Mapping[str, Any], name: str) -> Record:
    """Build a dataclass from the section ``name``; lists, as JSON has them, become tuples.

    Raises:
        ValueError: a key that the dataclass lacks, a field without value, or a value that it
            refuses.
    """
    refuse_unknown(values, record, name)
    tupled = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return record(**tupled)
    except TypeError as error:  # a field without a default is missing
        raise ValueError(f"section {name!r}: {error}") from error


def refuse_other_sections(values: Mapping[str, Any], record: type) -> None:
    """Raise a ValueError unless the sections are just the fields of the dataclass ``record``."""
    refuse_unknown(values, record, "config")
    missing = [field.name for field in fields(record) if field.name not in values]
    if missing:
        raise ValueError(f"config lacks the section {missing[0]!r}")


def refuse_unknown(
    keys: Iterable[str], record: type, where: str, given: Collection[str] = ()
) -> None:
    """Raise a ValueError for a key that is no field of a dataclass, with the nearest that is one.

    Args:
        keys: to look at.
        record: the dataclass.
        where: the keys stand, for the message.
        given: fields that come from elsewhere, and that no key may name.
    """
    known = [field.name for field in fields(record) if field.name not in given]
    for key in keys:
        if key not in known:
            raise ValueError(f"{where} has no key {key!r}; {hint(key, known)}")
