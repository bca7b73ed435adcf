"""Small Charades-STA, QVHighlights, TaCoS, ActivityNet Captions, DiDeMo and QuerYD, for grounding.

Queries are what the index of the world asks for; most data sets know one stretch per query, so they
get the queries that are answered once.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

from experiments.miniworld.lists import WINDOWS
from experiments.miniworld.releases.captions import (
    Arguments,
    activitynet_id,
    didemo_id,
)
from experiments.miniworld.releases.source import (
    SPLITS,
    Moment,
    Source,
    Video,
    moments,
    place,
    sentence,
)
from experiments.miniworld.writers import write_csv, write_json, write_lines

HIGHLIGHT = 2.0  # seconds of a piece that QVHighlights rates
Rows = list[tuple]  # of WINDOWS


def write_grounding(source: Source, home: Path) -> dict[str, dict]:
    """A folder per data set, and grounding/{train,val}.csv as released.

    ActivityNet Captions and DiDeMo lie there from retrieval.
    """
    writers = {
        "CharadesSTA": ("charades_sta", write_charades_sta),
        "QVHighlights": ("qvhighlights", write_qvhighlights),
        "TaCoS": ("tacos", write_tacos),
        "ActivityNetCaptions": ("activitynet_captions_grounding", write_activitynet_moments),
        "DiDeMo": ("didemo_grounding", write_didemo_moments),
        "QuerYD": ("queryd", write_queryd),
    }
    (home / "grounding").mkdir(parents=True)
    tasks: dict[str, dict] = {}
    rows: dict[str, Rows] = {split: [] for split in SPLITS}
    for name, (reader, write) in writers.items():
        (home / name).mkdir(exist_ok=True)
        tasks[f"public/{reader}"] = _task(reader, write(source, home / name, rows))
    roots = {name: str(home / name / "videos") for name in writers}
    released = {}
    for split in SPLITS:
        table = home / f"grounding/{split}.csv"
        write_csv(table, rows[split], header=WINDOWS)
        released[split] = {"annotations": str(table), "root": roots}
    return {"released/grounding": _task("grounding", released), **tasks}


def _task(reader: str, arguments: Arguments) -> dict:
    common = {"objective": "grounding", "sampling": "fixfps", "augmentation": "crop"}
    return {**common, "reader": reader, **arguments}


def _rows(video_id: str, told: list[Moment], dataset: str) -> Rows:
    return [
        (video_id, start, end, text, str([[start, end]]), dataset) for start, end, text in told
    ]


def write_charades_sta(source: Source, home: Path, rows: dict[str, Rows]) -> Arguments:
    """"<ID> <start> <end>##<query>" a line; videos/<ID>.mp4."""
    arguments = {}
    for split, official in zip(SPLITS, ("train", "test"), strict=True):
        lines = []
        for video in source.clips[split]:
            told = [Moment(start, end, f"{text}.") for start, end, text in moments(video)]
            place(video, home / "videos" / f"{video.code}.mp4")
            lines += [f"{video.code} {start} {end}##{text}" for start, end, text in told]
            rows[split] += _rows(video.code, told, "CharadesSTA")
        path = home / f"charades_sta_{official}.txt"
        write_lines(path, lines)
        arguments[split] = {"annotations": str(path), "root": str(home / "videos")}
    return arguments


def write_qvhighlights(source: Source, home: Path, rows: dict[str, Rows]) -> Arguments:
    """JSON lines, a query each, with one or several windows; videos/<id>_<start>_<end>.mp4."""
    arguments, number = {}, 7000
    for split in SPLITS:
        lines = []
        for video in source.streams[split]:
            name = f"{video.youtube_id}_210.0_{210.0 + video.duration}"
            place(video, home / "videos" / f"{name}.mp4")
            for query in video.record["queries"]:
                number += 1
                text, windows = query["text"], query["windows"]
                pieces = sorted({
                    piece for start, end in windows
                    for piece in range(int(start // HIGHLIGHT), int(end // HIGHLIGHT) + 1)
                })  # fmt: skip
                lines.append(json.dumps({
                    "qid": number, "query": text, "duration": video.duration, "vid": name,
                    "relevant_windows": windows, "relevant_clip_ids": pieces,
                    "saliency_scores": [[4, 3, 2]] * len(pieces),
                }))  # fmt: skip
                rows[split].append((name, *windows[0], text, str(windows), "QVHighlights"))
        path = home / f"highlight_{split}_release.jsonl"
        write_lines(path, lines)
        arguments[split] = {"annotations": str(path), "root": str(home / "videos")}
    return arguments


def write_tacos(source: Source, home: Path, rows: dict[str, Rows]) -> Arguments:
    """{"s13-d21.avi": {...}}, times in whole frames; videos/s13-d21-cam-002.avi."""
    arguments, number = {}, 13
    for split in SPLITS:
        content = {}
        for video in source.streams[split]:
            number += 1
            name, fps = f"s{number}-d21", video.record["fps"]
            place(video, home / "videos" / f"{name}-cam-002.avi")
            told = moments(video)
            frames = [[round(start * fps), round(end * fps)] for start, end, _ in told]
            content[f"{name}.avi"] = {
                "fps": fps,
                "num_frames": video.record["frames"],
                "timestamps": frames,
                "sentences": [sentence(moment.text) for moment in told],
            }
            rows[split] += _rows(
                name,
                [Moment(first / fps, last / fps, sentence(moment.text))
                 for (first, last), moment in zip(frames, told, strict=True)],
                "TaCoS",
            )  # fmt: skip
        path = home / f"{split}.json"
        write_json(path, content)
        arguments[split] = {"annotations": str(path), "root": str(home / "videos")}
    return arguments


def write_activitynet_moments(source: Source, home: Path, rows: dict[str, Rows]) -> Arguments:
    """The files that retrieval reads, see `captions`."""
    arguments = {}
    for split, official in zip(SPLITS, ("train", "val_1"), strict=True):
        for video in source.streams[split]:
            told = [Moment(start, end, sentence(text)) for start, end, text in moments(video)]
            rows[split] += _rows(activitynet_id(video), told, home.name)
        arguments[split] = {
            "annotations": str(home / f"{official}.json"), "root": str(home / "videos")
        }  # fmt: skip
    return arguments


def write_didemo_moments(source: Source, home: Path, rows: dict[str, Rows]) -> Arguments:
    """The files that retrieval reads, see `captions`."""
    arguments = {}
    for split in SPLITS:
        for video in source.streams[split]:
            rows[split] += _rows(didemo_id(video), moments(video), home.name)
        arguments[split] = {
            "annotations": str(home / f"{split}_data.json"), "root": str(home / "videos")
        }  # fmt: skip
    return arguments


def write_queryd(source: Source, home: Path, rows: dict[str, Rows]) -> Arguments:
    """Pickles {"video-<id>": [...]} of captions (lists of words) and of their times, all splits in
    one; lists of ids; videos/video-<id>.mp4.
    """
    captions, times, arguments = {}, {}, {}
    paths = {
        "annotations": home / "raw_captions_combined_filtered.pkl",
        "times": home / "times_captions_combined_filtered.pkl",
    }
    for split in SPLITS:
        names = []
        for video in source.streams[split]:
            told = moments(video)
            names.append(_queryd_id(video))
            place(video, home / "videos" / f"{names[-1]}.mp4")
            captions[names[-1]] = [moment.text.split() for moment in told]
            times[names[-1]] = [[moment.start, moment.end] for moment in told]
            rows[split] += _rows(names[-1], told, "QuerYD")
        write_lines(home / f"{split}_list.txt", names)
        arguments[split] = {
            **{name: str(path) for name, path in paths.items()},
            "root": str(home / "videos"),
            "videos": str(home / f"{split}_list.txt"),
        }
    paths["annotations"].write_bytes(pickle.dumps(captions))
    paths["times"].write_bytes(pickle.dumps(times))
    return arguments


def _queryd_id(video: Video) -> str:
    return f"video-{video.youtube_id}"
