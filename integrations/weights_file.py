"""What was trained, in one file: weights, and in the file's metadata (JSON) what builds them again.

A safetensors file. Its metadata holds the format, any records that the task needs, such as the
config of a head, and the notes of whoever saved it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from backbone.checkpoints import CheckpointError
from backbone.files import replacing


@dataclass(frozen=True)
class WeightsFile:
    """One kind of such files.

    Attributes:
        format: name and version, written into each file.
        what: it holds, for messages: "a MAT head".
        otherwise: what to do with a file of another kind, for messages.
    """

    format: str
    what: str
    otherwise: str

    def save(
        self,
        path: str | Path,
        weights: Mapping[str, Tensor],
        notes: Mapping[str, Any] | None = None,
        **records: Mapping[str, Any],
    ) -> None:
        """Write ``weights``, ``notes`` and ``records``; the latter two are JSON-able."""
        texts = {**records, "notes": notes or {}}
        metadata = {name: json.dumps(dict(text), allow_nan=False) for name, text in texts.items()}
        state = {name: value.cpu().contiguous() for name, value in weights.items()}
        with replacing(path) as temporary:
            save_file(state, temporary, {"format": self.format, **metadata})

    def read(self, path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The records by name, and the weights.

        Raises:
            FileNotFoundError: no such file.
            CheckpointError: a file that is damaged or of another kind.
        """
        return self._read(path, weights=True)

    def notes(self, path: str | Path) -> dict[str, Any]:
        """The notes alone; errors as ``read``."""
        return self._read(path, weights=False)[0]["notes"]

    def _read(self, path: str | Path, weights: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                names = file.keys() if weights else ()
                state = {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            size = Path(path).stat().st_size
            raise CheckpointError(f"{path} ({size} bytes) cannot be read: {error}") from error
        found = metadata.pop("format", None)
        if found != self.format:
            raise CheckpointError(
                f"{path} is not {self.what} of format {self.format!r}, its metadata says "
                f"{found!r}; {self.otherwise}"
            )
        return {name: json.loads(text) for name, text in metadata.items()}, state
