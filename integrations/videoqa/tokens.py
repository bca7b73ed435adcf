"""The frozen tower's tokens of videos and images: computed once, kept for every training on them.

The tower does not learn, so what it says of a visual is the same in every stage and with every
seed. Tokens are those from before the projector, which does learn.

    FOLDER/tokens.json               what made them: tower, layer, how frames are picked
    FOLDER/<digest>.safetensors      a few hundred visuals each, and which ones these are
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from backbone.files import read_json, replacing, write_json
from backbone.video import VideoError
from integrations.videoqa.data import DataError, Encoded, Record, Unreadable, Vision
from integrations.videoqa.modeling import StreamformerLlavaForConditionalGeneration

FACTS = "tokens.json"
PART = 256  # visuals in one file
BATCH = 32  # visuals that the tower takes at once: speed and memory only
VISUALS = "visuals"  # key of a part's metadata


def encode_visuals(
    model: StreamformerLlavaForConditionalGeneration,
    records: Sequence[Record],
) -> dict[Path, Encoded | Unreadable]:
    """Tower tokens of all visuals of the records, by path, on the CPU; or why there are none."""
    return dict(_encode(model, _visuals(records)))


def describe(model: StreamformerLlavaForConditionalGeneration) -> dict[str, Any]:
    """What decides the tokens of a visual, as JSON values."""
    config = model.config
    facts = {
        "tower": model.tower.encoder.settings(),
        "layer": config.tower_layer,
        "post_norm": config.tower_post_norm,
        "frame_token": config.frame_token,
        "vision": asdict(Vision.of(model)),
    }
    return json.loads(json.dumps(facts))


def write_tokens(
    model: StreamformerLlavaForConditionalGeneration,
    records: Sequence[Record],
    folder: str | Path,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Write the tokens of all visuals of the records that are not there yet.

    Args:
        model: its tower and config; nothing else of it matters.
        records: see ``data.read_records``.
        folder: for this tower and this way of picking frames alone.
        share: number of this process, and how many there are, each with an equal part.

    Raises:
        DataError: the folder holds tokens that were made otherwise.
    """
    folder, facts = Path(folder), describe(model)
    if (folder / FACTS).is_file():
        _check(folder, facts)
    else:
        write_json(folder / FACTS, facts)
    encoded = _encode(model, lacking(records, folder, share))
    while part := dict(islice(encoded, PART)):
        _write_part(folder, part)


def lacking(
    records: Sequence[Record], folder: str | Path, share: tuple[int, int] = (0, 1)
) -> list[tuple[str, Path]]:
    """Kind and path of each visual of the records, or of a share of them, that is not there yet."""
    own = _visuals(records)[share[0] :: share[1]]
    there = {path for part in _parts(Path(folder)) for path in _index(part)}
    return [(kind, path) for kind, path in own if str(path) not in there]


def read_tokens(
    model: StreamformerLlavaForConditionalGeneration,
    records: Sequence[Record],
    folder: str | Path,
) -> dict[Path, Encoded | Unreadable]:
    """What `write_tokens` has written of the records' visuals, by path; read when it is used.

    Raises:
        DataError: tokens that were made otherwise, or none of some visual.
    """
    folder = Path(folder)
    _check(folder, describe(model))
    wanted, known = {str(path) for _, path in _visuals(records)}, {}
    for part in _parts(folder):
        index = _index(part)
        with safe_open(part, "pt") as file:
            for path in wanted & index.keys():
                known[Path(path)] = _read(file, path, index[path])
    if lacking := sorted(wanted - {str(path) for path in known}):
        raise DataError(
            f"{folder} has no tokens of {len(lacking)} visuals, such as {lacking[0]}: write_tokens "
            "first"
        )
    return known


def _visuals(records: Sequence[Record]) -> list[tuple[str, Path]]:
    """Kind and path of each visual, once."""
    return list(dict.fromkeys(item for record in records for item in record.media))


def _encode(
    model: StreamformerLlavaForConditionalGeneration, media: Sequence[tuple[str, Path]]
) -> Iterator[tuple[Path, Encoded | Unreadable]]:
    """Tokens of each visual, or why there are none, as they are made."""
    vision = Vision.of(model)
    for first in tqdm(range(0, len(media), BATCH), desc="tower", unit="batch", disable=not media):
        read: list[tuple[str, Path, Tensor, Any]] = []
        for kind, path in media[first : first + BATCH]:
            try:
                pixels, size, _ = vision.read(kind, path)
                read.append((kind, path, pixels, size))
            except (OSError, VideoError) as error:
                yield path, Unreadable(str(path), str(error))
        tokens = model.tower_features([item[2] for item in read], [item[0] for item in read])
        for (_, path, _, size), part in zip(read, tokens, strict=True):
            yield path, Encoded(part.cpu(), size)


# -- files -----------------------------------------------------------------------------------------


def _check(folder: Path, facts: Mapping[str, Any]) -> None:
    path = folder / FACTS
    if not path.is_file():
        raise DataError(f"{folder} holds no tokens ({FACTS} is missing): write_tokens first")
    found = read_json(path)
    for key in sorted(found.keys() | facts.keys()):
        if found.get(key) != facts.get(key):
            raise DataError(
                f"{path}: {key} is {found.get(key)!r} there and {facts.get(key)!r} now; use "
                "another folder"
            )


def _parts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))


def _index(part: Path) -> dict[str, Any]:
    """Of each visual in a file, its size if it is an image, and why it could not be read if so."""
    with safe_open(part, "pt") as file:
        return json.loads(file.metadata()[VISUALS])


def _write_part(folder: Path, encoded: Mapping[Path, Encoded | Unreadable]) -> None:
    index = {
        str(path): {"unreadable": item.reason}
        if isinstance(item, Unreadable)
        else {"size": item.size}
        for path, item in encoded.items()
    }
    tokens = {
        str(path): item.tokens.contiguous()
        for path, item in encoded.items()
        if isinstance(item, Encoded)
    }
    name = hashlib.sha256("\n".join(index).encode()).hexdigest()[:16]
    with replacing(folder / f"{name}.safetensors") as temporary:
        save_file(tokens, temporary, metadata={VISUALS: json.dumps(index)})


def _read(file: Any, path: str, facts: Mapping[str, Any]) -> Encoded | Unreadable:
    if "unreadable" in facts:
        return Unreadable(path, facts["unreadable"])
    size = facts["size"]
    return Encoded(file.get_tensor(path), None if size is None else tuple(size))


__all__ = ["describe", "encode_visuals", "lacking", "read_tokens", "write_tokens"]
