"""Whether the data of a config are whole: every annotation and every file, before a run.

Annotations are read by the readers that training uses, videos are decoded from end to end, masks
read for every frame. Each finding is of one kind:

    annotations   a file that a reader refuses; nothing behind the refusal was looked at
    missing       a video, or a folder of frames, that is not there
    broken        a video that cannot be opened, or breaks off; masks that cannot be read
    out of range  a stretch past the end of its video, a label without id, masks of another size
    left out      rows that a reader leaves out: a stretch without length, a caption without words
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments import preflight, recipe
from experiments.config import UserError
from experiments.report import aligned, say

logger = logging.getLogger(__name__)

ABOUT = """\
Walks every annotation and every file of a config and says what is missing, broken
or out of range, with counts; ends with status 1 if anything is. Videos that several
tasks share are decoded once. --quick only looks whether files are there."""
EXAMPLES = """\
  python experiments/run.py check-data
  python experiments/run.py check-data --config multitask_1m --set data.root=/data --quick
  python experiments/run.py check-data --config multitask_1m --set data.root=/data --workers 16
  python experiments/run.py check-data --of oad --config thumos14 --set data.root=/data/thumos14"""

KINDS = ("annotations", "missing", "broken", "out of range", "left out")
EXAMPLES_SHOWN = 5  # of each kind; the JSON file has all
FILE = "check_data.json"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: in which part of the config, of which kind, and what."""

    part: str
    kind: str
    text: str


@dataclass(frozen=True)
class Part:
    """One list of annotated videos of a config: ``localization.train``, ``test_session_set``."""

    name: str
    entries: Sequence[Any]  # pretrain.datasets.Entry
    findings: Sequence[Finding] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add = parser.add_argument
    add("--of", choices=("pretrain", "oad"), default="pretrain", help="whose config it is")
    add("--config", default="miniworld", metavar="NAME|PATH", help="default: miniworld")
    add("--quick", action="store_true", help="only look whether files are there and not empty")
    add("--workers", type=int, default=1, metavar="N", help="processes that decode, default 1")
    add(
        "--slack",
        type=float,
        default=0.5,
        metavar="S",
        help="seconds that a stretch may reach past the end of its video, default 0.5",
    )
    add(
        "--work-dir",
        type=Path,
        metavar="DIR",
        help=f"default: work_dirs/<verb of the config>; {FILE} is written here",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change the config, such as data.root=/data; values are Python literals",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read, walk, print, write; ends the process with status 1 if anything is wrong."""
    from backbone.files import write_json

    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: give at least 1")
    folder = (args.work_dir or Path("work_dirs") / args.of).resolve()
    parts = (oad_parts if args.of == "oad" else pretrain_parts)(args.config, args.set, folder)
    found = [finding for part in parts for finding in part.findings]
    found += walk(parts, quick=args.quick, slack=args.slack, workers=args.workers)
    result = {
        "config": args.config,
        "command": args.command,
        "quick": args.quick,
        "slack": args.slack,
        "videos": len({entry.video for part in parts for entry in part.entries}),
        "parts": {part.name: summary(part, found) for part in parts},
        "findings": [vars(finding) for finding in found],
    }
    write_json(folder / FILE, result)
    say(f"{to_text(result)}\n{folder / FILE}")
    if found:
        raise SystemExit(1)
    return result


# -- what there is to check ------------------------------------------------------------------------


def pretrain_parts(config: str, overrides: Sequence[str], folder: Path) -> list[Part]:
    """The training and validation lists of every task of a pretraining config."""
    resolved = recipe.resolve(config, overrides)
    preflight.refuse(preflight.data_root(resolved["data"]["root"], "world" in resolved))
    source = recipe.find_data(resolved, folder)
    settings = recipe.training(resolved, source, folder)
    parts = []
    for name, task in settings.tasks.items():
        both = [
            read_part(f"{name}.{split}", task, arguments)
            for split, arguments in (("train", task.train), ("val", task.val))
            if arguments is not None
        ]
        parts += both
    return parts


def read_part(name: str, task: Any, arguments: Mapping[str, Any]) -> Part:
    """Annotations by the reader of a task, with all that it refuses or leaves out."""
    from pretrain.build import read_annotations
    from pretrain.datasets.decode import ClipError
    from pretrain.datasets.tables import collecting_unknown_labels

    logger.info("reading the annotations of %s", name)
    with collecting_unknown_labels() as unknown:
        try:
            read = read_annotations(task, arguments, name)
        except (ValueError, OSError, ClipError) as error:
            unread = [*unknown, str(error)]
            kinds = ["out of range"] * len(unknown) + ["annotations"]
            texts = zip(kinds, unread, strict=True)
            return Part(name, (), [Finding(name, kind, text) for kind, text in texts])
    findings = [Finding(name, "out of range", text) for text in unknown]
    findings += [Finding(name, "left out", text) for text in read.left_out]
    return Part(name, read.entries, findings)


def oad_parts(config: str, overrides: Sequence[str], folder: Path) -> list[Part]:
    """The sets of an action detection config; targets are checked for their length and classes."""
    from experiments import oad
    from experiments.miniworld import WorldParams, render_world

    resolved = oad.resolve(config, overrides)
    data = resolved["data"]
    preflight.refuse(preflight.data_root(data["root"], "world" in resolved))
    if data["root"] is None:
        world = render_world(folder / "miniworld", WorldParams(**resolved["world"]))
        root = world / "streams"
    else:
        root = Path(data["root"])
    videos = oad.find_videos(data, root)
    classes = oad.class_count(data, root)
    parts = []
    for name, members in oad.read_sets(data, root).items():
        entries, findings = [], []
        for member in members:
            if member not in videos:
                findings.append(Finding(name, "missing", f"{member}: no video of this name"))
                continue
            steps, problem = _read_targets(root / "target_perframe" / f"{member}.npy", classes)
            if problem:
                findings.append(Finding(name, *problem))
            entries.append(_targets_entry(videos[member], steps / data["fps"]))
        parts.append(Part(name, entries, findings))
    return parts


def _targets_entry(video: Path, seconds: float) -> Any:
    """A video of which every second up to ``seconds`` is labelled."""
    from pretrain.datasets import Entry, Segment

    return Entry(video, segments=(Segment(0, 0.0, seconds),) if seconds else ())


def _read_targets(path: Path, classes: int) -> tuple[int, tuple[str, str] | None]:
    """Steps of a file of targets, and what is wrong with it."""
    import numpy as np

    try:
        targets = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        return 0, ("missing", f"{path}: no targets")
    except (OSError, ValueError) as error:
        return 0, ("broken", f"{path}: {error}")
    if targets.ndim != 2 or targets.shape[1] != classes:
        return 0, ("out of range", f"{path}: shape {targets.shape}, expected (steps, {classes})")
    return len(targets), None


# -- walking ---------------------------------------------------------------------------------------


def walk(
    parts: Sequence[Part], *, quick: bool, slack: float, workers: int = 1
) -> Iterator[Finding]:
    """Look at every video once, with all entries that refer to it, and yield what is wrong."""
    uses: dict[tuple, list[tuple[str, Any]]] = {}
    for part in parts:
        for entry in part.entries:
            uses.setdefault((entry.video, entry.files), []).append((part.name, entry))
    look = partial(_glance if quick else _examine, slack=slack)
    bar = partial(tqdm, total=len(uses), desc="videos", unit="video", mininterval=1)
    if workers == 1 or quick:
        for found in bar(map(look, uses.values())):
            yield from found
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context)
    try:
        for found in bar(pool.map(look, uses.values(), chunksize=8)):
            yield from found
    finally:
        pool.shutdown(cancel_futures=True)


Uses = Sequence[tuple[str, Any]]  # parts of the config, and their entries of one video


def _glance(uses: Uses, slack: float) -> list[Finding]:
    """Whether a video's file is there and has bytes, or its folder has the frames."""
    from pretrain.datasets.decode import image_paths

    entry = uses[0][1]
    found = []
    for path in image_paths(entry.video, entry.files) or [entry.video]:
        try:
            empty = not any(path.iterdir()) if path.is_dir() else not path.stat().st_size
        except OSError as error:
            found += _for_all(uses, "missing", f"{path}: {error.strerror or error}")
        else:
            found += _for_all(uses, "broken", f"{path}: is empty") if empty else []
    return found


def _examine(uses: Uses, slack: float) -> list[Finding]:
    """Decode a video from end to end and hold what its entries say against it."""
    from backbone.video import VideoError
    from pretrain.datasets.decode import ClipError

    if found := _glance(uses, slack):
        return found
    entry = uses[0][1]
    try:
        facts = measure(entry.video, entry.files)
    except (ClipError, VideoError, OSError) as error:
        text = str(error) if isinstance(error, ClipError) else f"{entry.video}: {error}"
        return _for_all(uses, "broken", text)
    found = []
    for part, entry in uses:
        past = _past_the_end(entry, facts, slack)
        found += [Finding(part, "out of range", text) for text in past]
        if entry.masks is not None:
            found += _check_masks(part, entry, facts)
    return found


@dataclass(frozen=True)
class Facts:
    """What decoding a whole video tells: frames, length in seconds, height and width."""

    frames: int
    seconds: float
    size: tuple[int, int]


def measure(path: Path, files: tuple[str, ...] = ()) -> Facts:
    """Decode a video, or the images that are its frames, from end to end.

    Raises VideoError or ClipError where it breaks off, and for a video without frames.
    """
    from backbone import video
    from pretrain.datasets.decode import IMAGE_RATE, ClipError, image_paths, read_images

    images = image_paths(path, files)
    if images:
        sizes = {read_images([image]).shape[1:3] for image in images}
        if len(sizes) > 1:
            raise ClipError(f"{path}: images of {len(sizes)} sizes, such as {sorted(sizes)[:2]}")
        return Facts(len(images), len(images) / IMAGE_RATE, sizes.pop())
    with video.open_video(path, image_fps=IMAGE_RATE) as reader:
        count, last, before, size = 0, 0.0, 0.0, (reader.height, reader.width)
        for frame in reader:
            count, before, last, size = count + 1, last, frame.time, frame.image.shape[:2]
        if not count:
            raise ClipError(f"{path}: holds no frames")
        shown = 1 / float(reader.fps) if reader.fps else last - before  # of the last frame
        return Facts(count, last + shown, size)


def _past_the_end(entry: Any, facts: Any, slack: float) -> Iterator[str]:
    for start, end in {(segment.start, segment.end) for segment in entry.segments}:
        if start >= facts.seconds or end > facts.seconds + slack:
            yield (
                f"{entry.video}: a stretch from {start:g} to {end:g} s, but the video ends at "
                f"{facts.seconds:.2f} s"
            )
    if entry.start >= facts.seconds:
        yield (
            f"{entry.video}: is used from {entry.start:g} s on, but ends at {facts.seconds:.2f} s"
        )


def _check_masks(part: str, entry: Any, facts: Any) -> list[Finding]:
    import numpy as np

    from pretrain.datasets.decode import ClipError

    try:
        entry.masks.read(np.arange(facts.frames), facts.size)
    except ClipError as error:
        kind = "broken" if "cannot be read" in str(error) else "out of range"
        return [Finding(part, kind, str(error))]
    return []


def _for_all(uses: Sequence[tuple[str, Any]], kind: str, text: str) -> list[Finding]:
    return [Finding(part, kind, text) for part in dict.fromkeys(part for part, _ in uses)]


# -- saying ----------------------------------------------------------------------------------------


def summary(part: Part, found: Sequence[Finding]) -> dict[str, int]:
    """Counts of a part: entries, videos, and findings by kind."""
    counts = Counter(finding.kind for finding in found if finding.part == part.name)
    videos = {entry.video for entry in part.entries}
    return {"entries": len(part.entries), "videos": len(videos), **{k: counts[k] for k in KINDS}}


def to_text(result: Mapping[str, Any]) -> str:
    """A table of counts, and the first findings of each kind."""
    header = ["part", "entries", "videos", *KINDS]
    rows = [
        [name, *(str(counts[key]) for key in header[1:])]
        for name, counts in result["parts"].items()
    ]
    lines = aligned([header, *rows])
    rule = "-" * len(lines[0])
    text = [rule, lines[0], rule, *lines[1:], rule]
    for kind in KINDS:
        found = [f"{f['part']}: {f['text']}" for f in result["findings"] if f["kind"] == kind]
        if found:
            more = f", the first {EXAMPLES_SHOWN}" if len(found) > EXAMPLES_SHOWN else ""
            text += [f"{kind}: {len(found)}{more}", *(f"  {t}" for t in found[:EXAMPLES_SHOWN])]
    if not result["findings"]:
        how = "is there" if result["quick"] else "is there and whole"
        text.append(f"every file {how}: {result['videos']} videos")
    return "\n".join(text)
