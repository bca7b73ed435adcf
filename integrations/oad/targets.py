r"""Per-step targets from THUMOS'14 temporal annotations.

THUMOS'14 annotates seconds (`video start end`, one text file per class); online action detection
learns from steps: 24 frames per second in chunks of six, four steps a second. This file turns one
into the other, in the layout of LSTR, TeSTra and MAT: ``target_perframe/<video>.npy``, one row per
step, one column per class, multi-hot, column 0 for background.

Which rule made the published targets out of seconds is not known, so the rule is a parameter:
"centre" (the default: a step shows what happens at its middle), "overlap" (anything that touches
the step) or "majority" (anything that fills at least half of it).

    python -m integrations.oad.targets --annotations TH14/annotations \
        --video-info TH14_video_info.json --out data/THUMOS
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from backbone.files import replacing, write_json

logger = logging.getLogger(__name__)

RULES = ("centre", "overlap", "majority")
# Class names and video lists of THUMOS'14, TVSeries, HDD and EPIC-Kitchens-100: data/data_info.json
# of Echo0125/MAT-Memory-and-Anticipation-Transformer (Apache-2.0), unchanged.
PACKAGED_INFO = Path(__file__).with_name("data_info.json")
BADLY_ANNOTATED = ("video_test_0000270", "video_test_0001496")  # known, kept in published numbers


@dataclass(frozen=True)
class Segment:
    """One annotated action: class column, start and end in seconds."""

    label: int
    start: float
    end: float


def step_count(num_frames: int, fps: float, video_fps: float = 24, chunk_frames: int = 6) -> int:
    """Steps of a video of ``num_frames`` at ``fps``, read at ``video_fps`` in whole chunks."""
    return int(num_frames / fps * video_fps) // chunk_frames


def read_annotations(folder: Path, class_names: Sequence[str]) -> dict[str, list[Segment]]:
    """Segments by video from the ``<Class>_val.txt`` and ``<Class>_test.txt`` files below a folder.

    Raises:
        ValueError: if a file belongs to no class, a class lacks its file, or a line cannot be read.
    """
    segments: dict[str, list[Segment]] = defaultdict(list)
    for split in ("val", "test"):
        files = sorted(folder.rglob(f"*_{split}.txt"))
        classes = {path: path.stem.removesuffix(f"_{split}") for path in files}
        unknown = sorted(set(classes.values()) - set(class_names[1:]))
        missing = sorted(set(class_names[1:]) - set(classes.values())) if files else []
        if unknown or missing:
            raise ValueError(
                f"annotation files *_{split}.txt in {folder} do not fit the "
                f"{len(class_names) - 1} classes: unknown {unknown}, missing {missing}"
            )
        for path, name in classes.items():
            for video, segment in _read_file(path, class_names.index(name)):
                segments[video].append(segment)
    if not segments:
        raise ValueError(
            f"no annotations in {folder}: expected files such as {class_names[1]}_test.txt "
            "with lines 'video start end'"
        )
    return dict(segments)


def label_steps(
    segments: Iterable[Segment],
    steps: int,
    num_classes: int,
    step_seconds: float = 0.25,
    rule: str = "centre",
) -> np.ndarray:
    """Targets of one video.

    Args:
        segments: its annotated actions; what lies past the end is cut off.
        steps: its length L.
        num_classes: columns C, background and ignore column included.
        step_seconds: duration of a step.
        rule: one of ``RULES``.

    Returns:
        (L, C) float32 of zeros and ones; column 0 is one where no other column is.
    """
    if rule not in RULES:
        raise ValueError(f"label rule {rule!r} is not one of {', '.join(RULES)}")
    target = np.zeros((steps, num_classes), np.float32)
    begins = np.arange(steps) * step_seconds
    by_class: dict[int, list[Segment]] = defaultdict(list)
    for segment in segments:
        by_class[segment.label].append(segment)
    for label, members in by_class.items():
        if rule == "centre":
            centres = begins + step_seconds / 2
            hit = [(s.start <= centres) & (centres < s.end) for s in members]
            target[:, label] = np.any(hit, axis=0)
        else:
            covered = _covered_seconds(members, begins, step_seconds)
            target[:, label] = covered > 0 if rule == "overlap" else covered >= step_seconds / 2
    target[:, 0] = ~target.any(axis=1)
    return target


def build_targets(
    annotations: Path,
    video_info: Mapping[str, Mapping],
    out: Path,
    data_info: Mapping,
    name: str = "THUMOS",
    rule: str = "centre",
    video_fps: float = 24,
    chunk_frames: int = 6,
) -> dict:
    """Write ``target_perframe/``, ``data_info.json`` and the report ``targets.json`` into ``out``.

    The written ``data_info.json`` lists the videos that have targets; beside ``test_session_set``
    stands ``clean_test_session_set``, without the two test videos known to be badly annotated.

    Args:
        annotations: folder of the challenge's text files.
        video_info: by video, at least ``fps`` and ``num_frame``.
        out: the data folder.
        data_info: entry of the data set: ``class_names``, ``train_session_set``, ....
        name: key of that entry in the written ``data_info.json``.
        rule: see :func:`label_steps`.
        video_fps: rate at which videos are read.
        chunk_frames: frames per step.

    Returns:
        The report: counts per set, videos without information, segments past the end.
    """
    class_names = list(data_info["class_names"])
    seconds = chunk_frames / video_fps
    segments = read_annotations(annotations, class_names)
    entry = {**data_info, "data_root": ".", "fps": video_fps / chunk_frames}
    sets, left_out, past_end = {}, [], []
    (out / "target_perframe").mkdir(parents=True, exist_ok=True)
    for key in ("train_session_set", "test_session_set"):
        targets = {}
        for video in data_info[key]:
            if video not in video_info:
                left_out.append(video)
                continue
            facts = video_info[video]
            steps = step_count(facts["num_frame"], facts["fps"], video_fps, chunk_frames)
            duration = facts["num_frame"] / facts["fps"]
            found = segments.get(video, [])
            targets[video] = label_steps(found, steps, len(class_names), seconds, rule)
            past_end += [
                {"video": video, "class": class_names[s.label], "start": s.start, "end": s.end}
                | {"duration": round(duration, 3)}
                for s in found
                if s.end > duration
            ]
            with replacing(out / "target_perframe" / f"{video}.npy") as path:
                np.save(path, targets[video])
        entry[key] = list(targets)
        sets[key] = _summary(targets, class_names, data_info["ignore_index"])
    entry["clean_test_session_set"] = [
        video for video in entry["test_session_set"] if video not in BADLY_ANNOTATED
    ]
    report = {
        "rule": rule,
        "step_seconds": seconds,
        "sets": sets,
        "videos_without_information": left_out,
        "segments_past_the_end": past_end,
    }
    write_json(out / "targets.json", report)
    write_json(out / "data_info.json", {name: entry})
    return report


def main(argv: Sequence[str] | None = None) -> dict:
    """Command line; returns the report that it also writes."""
    parser = argparse.ArgumentParser(
        prog="python -m integrations.oad.targets",
        description="Turn THUMOS'14 annotations into per-step targets.",
        epilog="example: python -m integrations.oad.targets --annotations TH14/annotations "
        "--video-info TH14_video_info.json --out data/THUMOS",
    )
    parser.add_argument(
        "--annotations", type=Path, required=True, help="folder of *_{val,test}.txt"
    )
    parser.add_argument(
        "--video-info", type=Path, required=True, help="JSON: {video: {fps, num_frame}}"
    )
    parser.add_argument("--out", type=Path, required=True, help="data folder to write")
    parser.add_argument("--rule", choices=RULES, default="centre", help="default: %(default)s")
    parser.add_argument(
        "--data-info", type=Path, default=PACKAGED_INFO, help="class names and video lists"
    )
    parser.add_argument("--name", default="THUMOS", help="entry of --data-info (%(default)s)")
    arguments = parser.parse_args(argv)
    entries = json.loads(arguments.data_info.read_text())
    if arguments.name not in entries:
        parser.error(
            f"{arguments.data_info} has no entry {arguments.name!r}; it has {', '.join(entries)}"
        )
    report = build_targets(
        arguments.annotations,
        json.loads(arguments.video_info.read_text()),
        arguments.out,
        entries[arguments.name],
        arguments.name,
        arguments.rule,
    )
    for key, facts in report["sets"].items():
        logger.info(
            "%s: %d videos, %d steps, background %.1f %%, action %.1f %%, ignored %.1f %%",
            *(key, facts["videos"], facts["steps"]),
            *(100 * facts["share"][kind] for kind in ("background", "action", "ignored")),
        )
    for video in report["videos_without_information"]:
        logger.warning("%s is not in %s: left out", video, arguments.video_info)
    logger.info("%d segments reach past the end", len(report["segments_past_the_end"]))
    return report


def _read_file(path: Path, label: int) -> list[tuple[str, Segment]]:
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            video, start, end = line.split()
            segment = Segment(label, float(start), float(end))
        except ValueError:
            raise ValueError(f"{path}:{number}: {line!r} is not 'video start end'") from None
        if not 0 <= segment.start < segment.end < math.inf:
            raise ValueError(f"{path}:{number}: {line!r} does not end after it starts")
        rows.append((video, segment))
    return rows


def _covered_seconds(segments: list[Segment], begins: np.ndarray, seconds: float) -> np.ndarray:
    """Per step, seconds covered by the union of some segments; (L,)."""
    covered = np.zeros(len(begins))
    reached = -math.inf  # end of what has been counted
    for segment in sorted(segments, key=lambda s: s.start):
        start = max(segment.start, reached)
        overlap = np.minimum(begins + seconds, segment.end) - np.maximum(begins, start)
        covered += np.maximum(overlap, 0)
        reached = max(reached, segment.end)
    return covered


def _summary(targets: Mapping[str, np.ndarray], names: Sequence[str], ignore: int) -> dict:
    """Counts of one set: lengths, shares of steps, steps per class, double labels."""
    if not targets:
        return {"videos": 0, "steps": 0}
    lengths = [len(t) for t in targets.values()]
    rows = np.concatenate(list(targets.values())) == 1
    ignored = rows[:, ignore] if ignore > 0 else np.zeros(len(rows), bool)
    actions = rows.copy()
    actions[:, [0, *([ignore] if ignore > 0 else [])]] = False
    doubles = Counter(
        "+".join(names[c] for c in pair)
        for row in np.flatnonzero(actions.sum(axis=1) > 1)
        for pair in combinations(np.flatnonzero(actions[row]), 2)
    )
    return {
        "videos": len(targets),
        "steps": len(rows),
        "length": {
            "min": min(lengths),
            "median": float(np.median(lengths)),
            "mean": float(np.mean(lengths)),
            "max": max(lengths),
        },
        "share": {
            "background": float(rows[:, 0].mean()),
            "action": float(actions.any(axis=1).mean()),
            "ignored": float(ignored.mean()),
            "double": float((actions.sum(axis=1) > 1).mean()),
        },
        "steps_by_class": {names[c]: int(rows[:, c].sum()) for c in range(rows.shape[1])},
        "double_labels": dict(doubles),
    }


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
