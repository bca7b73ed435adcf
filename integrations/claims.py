"""A folder belongs to one run: what decides it lies there, and another run is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backbone.files import read_json, write_json

RESOLVED = "resolved.json"  # in the folder of a run


def claim(folder: Path, resolved: Mapping[str, Any], trained: bool) -> None:
    """Make sure that what was trained in a folder belongs to this very run.

    Args:
        folder: of the run; ``resolved.json`` in it holds what decided the run that was there.
        resolved: all that decides this run, as JSON values or tuples of them.
        trained: whether there is something of such a run.

    Raises:
        ValueError: it was another run; the text says in what they differ.
    """
    resolved = json.loads(json.dumps(resolved))
    path = folder / RESOLVED
    if not path.is_file() or not trained:
        write_json(path, resolved)
        return
    found = _differing(read_json(path), resolved)
    if found:
        raise ValueError(
            f"{folder} holds another run: {'; '.join(found)}. Use another folder, or delete "
            "this one"
        )


def _differing(there: object, now: object, where: str = "") -> list[str]:
    """One line for each value that two nested dicts do not share."""
    if isinstance(there, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted({*there, *now})
            for line in _differing(there.get(key), now.get(key), f"{where}.{key}".lstrip("."))
        ]
    return [] if there == now else [f"{where} is {there!r} there and {now!r} now"]
