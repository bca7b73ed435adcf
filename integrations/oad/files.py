"""Files that outlive a run: written beside their name, then renamed, so that none is ever half."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: Path | str) -> Iterator[Path]:
    """A temporary name in the folder of ``path``; renamed to it on success, removed on failure.

    The temporary name keeps the suffix, which ``np.save`` and others look at.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path | str, content: object) -> None:
    """Write ``content`` as indented JSON."""
    with replaced(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
