"""What the verbs share that watch a running video: options, the trained model, speed.

A model that reads a frozen encoder knows which one it was trained with; it is used with that one,
or with another on one's own responsibility, and then the differences are named.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.config import UserError
from experiments.report import say

logger = logging.getLogger(__name__)

WARM_UP = 5  # frames that do not count in the speed, where there are enough others
STREAM = ("window", "temporal_positions")  # settings of an encoder that its caller may choose


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Options of every such verb; its models are those of ``verb``, the comparison."""
    add = parser.add_argument
    add("video", help="file, folder of images, camera:0, or an http, rtsp, … address")
    add(
        "--work-dir",
        type=Path,
        default=Path("work_dirs") / verb,
        metavar="DIR",
        help=f"of the verb {verb}",
    )
    add("--window", type=int, metavar="FRAMES", help="of the encoder; default: as trained with")
    add("--max-seconds", type=float, metavar="S", help="stop after this much of the video")
    add("--device", default="auto", help="auto (the default), cpu, cuda, …")


def find_trained(path: Path | None, work_dir: Path, file_name: str, verb: str, option: str) -> Path:
    """The file that was asked for, or that of StreamFormer's first run in ``work_dir``.

    Args:
        path: a run's folder, a file, or None.
        work_dir: of ``verb``, the comparison that trains such files.
        file_name: in a run's folder.
        verb: for the message.
        option: that gives the path.

    Raises:
        UserError: there is none.
    """
    if path is not None:
        file = path / file_name if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"{option}: there is no {file}; give a run's folder, or its file")
        return file
    numbered = {
        file: int(number)
        for file in sorted(work_dir.glob(f"*/seed*/{file_name}"))
        if (number := file.parent.name.removeprefix("seed")).isdigit()
    }
    if not numbered:
        raise UserError(
            f"there is no {file_name} of a run under {work_dir}; run this first:\n  python "
            f"experiments/run.py {verb}\nor name one with {option}, or its folder with --work-dir"
        )
    ours = [file for file in numbered if file.parts[-3].startswith("streamformer")]
    return min(ours or numbered, key=lambda file: numbered[file])


def spec_beside(file: Path) -> str | None:
    """Spec of the encoder that the run of a trained file names in its config, if it does."""
    from backbone.files import read_json

    config = file.parent / "config.json"
    return read_json(config).get("encoder", {}).get("spec") if config.is_file() else None


def build_as_trained(
    spec: str | None, file: Path, known: Mapping[str, Any], window: int | None, device: str
) -> Any:
    """Build an encoder as ``file`` knows it; what is not as there is logged.

    Args:
        spec: of the encoder.
        file: trained on it, for messages.
        known: settings of the encoder then; empty if nothing is known.
        window: frames, instead of that of ``known``.
        device: name of it.

    Raises:
        UserError: no encoder is named, or it is not there or cannot be built so.
    """
    from backbone import build_encoder
    from experiments.environment import choose_device
    from experiments.preflight import encoder as missing

    if spec is None:
        raise UserError(
            f"--encoder: {file} does not say which encoder it was trained with; name it, such as "
            "--encoder streamformer:FOLDER"
        )
    if problems := missing(spec):
        raise UserError(problems[0])
    options = {name: known.get(name) for name in STREAM}
    if window is not None:
        options["window"] = window
    try:
        encoder = build_encoder(spec, **options, device=choose_device(device))
    except ValueError as error:
        raise UserError(f"--encoder {spec}: {error}") from error
    found = encoder.settings()
    for name in sorted(known.keys() | found.keys()) if known else ():
        if known.get(name) != found.get(name):
            logger.warning(
                "%s was trained with %s=%r, this encoder has %r: results may be worse",
                file.name,
                name,
                known.get(name),
                found.get(name),
            )
    return encoder


def refuse_width(spec: str, width: int, file: Path, wanted: int) -> None:
    """Raise a UserError if an encoder's features are not as wide as ``file`` reads them."""
    if width != wanted:
        raise UserError(
            f"--encoder {spec}: its features are {width} wide, but {file} reads {wanted}; use the "
            "encoder that it was trained with"
        )


class Stopwatch:
    """Seconds that each part of a frame took, by part; "decode" is the first of them."""

    def __init__(self, parts: Sequence[str], device: Any = None) -> None:
        self.device = device  # a torch.device; what a GPU still has to do counts, too
        self.seconds: dict[str, list[float]] = {part: [] for part in ("decode", *parts)}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time a block."""
        start = time.perf_counter()
        yield
        if self.device is not None and self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        self.seconds[part].append(time.perf_counter() - start)

    def frames(self, reader: Any) -> Iterator[Any]:
        """Frames of the reader, with the time that each one took to come."""
        start = time.perf_counter()
        for frame in reader:
            self.seconds["decode"].append(time.perf_counter() - start)
            yield frame
            start = time.perf_counter()

    @property
    def count(self) -> int:
        """Frames so far."""
        return len(self.seconds["decode"])


def speed(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Milliseconds per frame of each part, means without the first frames."""
    frames = len(seconds["decode"])
    skip = WARM_UP if frames > 4 * WARM_UP else 0
    costs = {}
    for part, spent in seconds.items():
        per_call = frames / max(len(spent), 1)  # some parts answer once in several frames
        counted = spent[int(skip / per_call) :]
        costs[part] = 1000 * sum(counted) / max(len(counted) * per_call, 1)
    return costs


def say_costs(costs: Mapping[str, float], needed: float) -> None:
    """Print what a frame costs, and whether ``needed`` frames per second can be kept up with."""
    possible = 1000 / max(sum(costs.values()), 1e-9)
    say("per frame: " + ", ".join(f"{part} {cost:.2f} ms" for part, cost in costs.items()))
    say(f"so {possible:.0f} frames per second are possible, {needed:g} are needed live")
