"""Small ActivityNet-1.3, FineAction and HACS: stretches of streams with labels.

The three number the same actions differently, so that a mix-up shows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from experiments.miniworld.actions import ACTIONS
from experiments.miniworld.lists import WINDOWS
from experiments.miniworld.releases.source import SPLITS, Source, Video, place
from experiments.miniworld.writers import write_csv, write_json

SUBSETS = ("training", "validation")
CLIP = 2.0  # seconds of a clip of HACS Clips
_COMMON = {"objective": "localization", "sampling": "spread", "augmentation": "crop"}


def write_localization(source: Source, home: Path) -> dict[str, dict]:
    """A folder per data set with the published JSON; localization/ with the released table.

    The table has a row per action, (video_id,start_second,end_second,text,relevant_windows,
    dataset), and label2id.json numbers the labels of each data set.
    """
    names = sorted(ACTIONS)
    labels = {
        "ActivityNet": {name: number for number, name in enumerate(names)},
        "FineAction": {name: number for number, name in enumerate(reversed(names))},
        "HACS": {name: number for number, name in enumerate(ACTIONS)},
    }
    (home / "localization").mkdir(parents=True)
    label2id = home / "localization/label2id.json"
    write_json(label2id, labels)
    tasks = {
        "public/activitynet": _write_database(
            source, home / "ActivityNet", "activity_net.v1-3.min.json", activitynet_video, label2id
        ),
        "public/fineaction": _write_database(
            source, home / "FineAction", "annotations_gt.json", fineaction_video, label2id
        ),
        "public/hacs": _write_database(
            source, home / "HACS", "HACS_segments_v1.1.1.json", hacs_video, label2id
        ),
        "public/hacs_clips": _write_hacs_clips(source, home / "HACS", label2id),
    }
    roots = {name: str(home / name / "videos") for name in labels}
    released = {}
    for split in SPLITS:
        rows = [
            (name, action["start_second"], action["end_second"], action["action"],
             str([[action["start_second"], action["end_second"]]]), dataset)
            for number, video in enumerate(source.streams[split])
            for dataset, name in (
                ("ActivityNet", f"v_{video.youtube_id}"),
                ("FineAction", fineaction_video(video)[0]),
                ("HACS", video.youtube_id),
            )
            for action in video.record["actions"]
        ]  # fmt: skip
        table = home / f"localization/{split}.csv"
        write_csv(table, rows, header=WINDOWS)
        released[split] = {
            "annotations": str(table), "labels": str(label2id), "root": roots
        }  # fmt: skip
    return {"released/localization": {**_COMMON, "reader": "localization", **released}, **tasks}


def activitynet_video(video: Video) -> tuple[str, str, dict]:
    """Key in the database, name of the file, and fields that other data sets lack."""
    url = f"https://www.youtube.com/watch?v={video.youtube_id}"
    return video.youtube_id, f"v_{video.youtube_id}.mp4", {"resolution": "32x32", "url": url}


def fineaction_video(video: Video) -> tuple[str, str, dict]:
    """As `activitynet_video`; FineAction numbers its videos."""
    name = f"v_{int.from_bytes(video.name.encode(), 'big') % 99999989:08d}"
    return name, f"{name}.mp4", {"filename": f"{name}.mp4", "fps": video.record["fps"]}


def hacs_video(video: Video) -> tuple[str, str, dict]:
    """As `activitynet_video`; HACS writes durations as text."""
    url = f"https://www.youtube.com/watch?v={video.youtube_id}"
    extra = {"url": url, "duration": f"{video.duration:.6f}"}
    return video.youtube_id, f"v_{video.youtube_id}.mp4", extra


def _write_database(
    source: Source,
    home: Path,
    file: str,
    naming: Callable[[Video], tuple[str, str, dict]],
    label2id: Path,
) -> dict:
    """{"database": {id: {"subset", "duration", "annotations": [{"segment", "label"}]}}}."""
    database = {}
    for split, subset in zip(SPLITS, SUBSETS, strict=True):
        for video in source.streams[split]:
            name, path, extra = naming(video)
            place(video, home / "videos" / path)
            database[name] = {
                "duration": video.duration,
                "subset": subset,
                **extra,
                "annotations": [
                    {"segment": [action["start_second"], action["end_second"]],
                     "label": action["action"]}
                    for action in video.record["actions"]
                ],
            }  # fmt: skip
    taxonomy = [
        {"nodeId": number, "nodeName": name, "parentId": 0, "parentName": "Root"}
        for number, name in enumerate(ACTIONS, start=1)
    ]
    write_json(home / file, {"version": "1.3", "taxonomy": taxonomy, "database": database})
    reader = {"ActivityNet": "activitynet", "FineAction": "fineaction", "HACS": "hacs"}[home.name]
    arguments = {
        split: {
            "annotations": str(home / file),
            "root": str(home / "videos"),
            "labels": str(label2id),
            "split": subset,
        }
        for split, subset in zip(SPLITS, SUBSETS, strict=True)
    }
    return {**_COMMON, "reader": reader, **arguments}


def _write_hacs_clips(source: Source, home: Path, label2id: Path) -> dict:
    """classname,youtube_id,subset,start,end,label: label 1 where the action is, -1 where not."""
    rows = []
    for split, subset in zip(SPLITS, SUBSETS, strict=True):
        for video in source.streams[split]:
            for action in video.record["actions"]:
                middle = (action["start_second"] + action["end_second"]) / 2
                start = min(max(middle - CLIP / 2, 0.0), video.duration - CLIP)
                name = action["action"]
                rows.append((name, video.youtube_id, subset, start, start + CLIP, 1))
                absent = next(n for n in ACTIONS if n != name)
                rows.append((absent, video.youtube_id, subset, start, start + CLIP, -1))
    path = home / "HACS_clips_v1.1.1.csv"
    write_csv(path, rows, header=("classname", "youtube_id", "subset", "start", "end", "label"))
    arguments = {
        split: {
            "annotations": str(path),
            "root": str(home / "videos"),
            "labels": str(label2id),
            "split": subset,
        }
        for split, subset in zip(SPLITS, SUBSETS, strict=True)
    }
    common = {"objective": "recognition", "sampling": "segments", "augmentation": "strong"}
    return {**common, "reader": "hacs_clips", **arguments}
