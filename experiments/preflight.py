"""What can be known before hours of work: weights, disk and memory that are not there.

Every check returns a list of problems, each a sentence that names the thing and the mend, so that
a user sees all of them at once: ``refuse`` raises them together.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.config import UserError

RELEASED = {  # what a bare label means on real data
    "siglip": "siglip:google/siglip-base-patch16-224",
    "streamformer": "streamformer:StreamFormer/streamformer-timesformer",
}
WIDEST_FEATURE = 1152  # so400m, the widest usual image encoder
COPIES_ON_DISK = 2 * 4 + 1  # two checkpoints (weights, average, two moments) and the final head
COPIES_IN_MEMORY = 6  # weights, average, gradients, two moments, room for activations
MINIWORLD_BYTES = 500 * 2**20  # rendered world, mini encoders, features


def refuse(problems: Sequence[str]) -> None:
    """Raise a UserError of all problems, if there are any."""
    if problems:
        raise UserError("cannot start:\n  - " + "\n  - ".join(problems))


def repeated_seeds(seeds: Sequence[int]) -> list[str]:
    """Seeds that are given twice."""
    repeated = sorted({seed for seed in seeds if list(seeds).count(seed) > 1})
    return [f"--seeds: {some(map(str, repeated))} given twice"] if repeated else []


def data_root(root: str | None, rendered: bool) -> list[str]:
    """A data root that is not there; None stands for data that the suite can render."""
    if root is None and not rendered:
        return [
            "data.root is None, and the data of this config are not rendered: say where they lie, "
            "--set data.root=FOLDER"
        ]
    if root is not None and not Path(root).is_dir():
        return [f"data.root: there is no folder {root}"]
    return []


def encoders(labels: Mapping[str, str], mini: bool) -> list[str]:
    """Encoders (label -> spec) that are not there.

    Args:
        labels: of ``comparison.encoder_labels``.
        mini: whether bare labels mean the mini encoders; if not, they mean released weights.
    """
    named = labels if mini else released(labels)
    found = [text for spec in named.values() if ":" in spec for text in encoder(spec)]
    bare = [spec for spec in named.values() if ":" not in spec]
    return found + (_no_mini_encoder(bare) if mini else _not_released(bare))


def released(labels: Mapping[str, str]) -> dict[str, str]:
    """Label -> spec on real data, where bare labels mean released weights."""
    return {label: RELEASED.get(spec, spec) for label, spec in labels.items()}


def _not_released(labels: Sequence[str]) -> list[str]:
    return [
        f"--encoders: no released weights are called {label!r} (known: {', '.join(RELEASED)}); "
        f"give kind:folder, such as streamformer:/weights/{label}"
        for label in labels
    ]


def _no_mini_encoder(labels: Sequence[str]) -> list[str]:
    from experiments.miniworld.encoders import ARMS

    return [
        f"--encoders: no mini encoder is called {label!r}; there are {', '.join(ARMS)}, or give "
        "kind:folder"
        for label in labels
        if label not in ARMS
    ]


def encoder(spec: str) -> list[str]:
    """Weights that a spec names and that are neither a folder nor within reach of a hub."""
    return weights(spec.partition(":")[2], f"--encoders {spec}")


def weights(source: str, option: str) -> list[str]:
    """Weights, a folder or hub id, that are neither there nor within reach of a hub.

    ``option`` says where they were asked for; nothing is wrong with an empty ``source``.
    """
    if not source or Path(source).is_dir():
        return []
    if Path(source).is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        return [f"{option}: there is no folder {source}"]
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE and not isinstance(try_to_load_from_cache(source, "config.json"), str):
        return [
            f"{option}: {source} is no folder here and not in the hub's cache, and "
            "HF_HUB_OFFLINE is set; unset it, or give a folder"
        ]
    return []


def disk(folder: Path, needed: int) -> list[str]:
    """Too little room for ``needed`` bytes where ``folder`` is or will be."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return [f"--work-dir {folder}: {existing} is no folder that can be written to"]
    free = shutil.disk_usage(existing).free
    if free < needed:
        return [f"--work-dir {folder}: about {size(needed)} are needed, {size(free)} are free"]
    return []


def memory(needed: int, mend: str | None = None) -> list[str]:
    """Too little memory for ``needed`` bytes, where the system tells what is available."""
    available = available_memory()
    if available is None or available >= needed:
        return []
    problem = f"about {size(needed)} of memory are needed, {size(available)} are available"
    return [f"{problem}; {mend}" if mend else problem]


def available_memory() -> int | None:
    """Bytes that a process could have without swapping; None if the system does not tell."""
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def some(names: Sequence[str], most: int = 3) -> str:
    """The number of names and the first few of them: ``5 (a, b, c, …)``."""
    names = list(names)
    return f"{len(names)} ({', '.join(names[:most])}{', …' if len(names) > most else ''})"
