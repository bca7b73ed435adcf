"""Small MSR-VTT, MSVD, ActivityNet Captions, DiDeMo, LSMDC and VATEX, read for retrieval.

Each has its own annotation files; the released table of all six is one file beside them.
ActivityNet Captions and DiDeMo serve grounding as well, see `grounding`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from experiments.miniworld.releases.source import (
    SPLITS,
    Source,
    Video,
    moments,
    place,
    sentence,
)
from experiments.miniworld.writers import write_csv, write_json, write_lines

UNIT = 5.0  # seconds that DiDeMo counts time in
CLOCK = 32.966  # seconds into a film at which a clip of LSMDC begins

Arguments = dict[str, dict]  # of a reader, by split
Rows = list[tuple[str, str, str]]  # video_id, text, dataset


def write_retrieval(source: Source, home: Path) -> dict[str, dict]:
    """A folder per data set, and retrieval/{train,val}.csv as released: video_id,text,dataset."""
    writers = {
        "MSRVTT": ("msrvtt", write_msrvtt),
        "MSVD": ("msvd", write_msvd),
        "ActivityNetCaptions": ("activitynet_captions", write_activitynet_captions),
        "DiDeMo": ("didemo", write_didemo),
        "LSMDC": ("lsmdc", write_lsmdc),
        "VATEX": ("vatex", write_vatex),
    }
    (home / "retrieval").mkdir(parents=True)
    tasks: dict[str, dict] = {}
    rows: dict[str, Rows] = {split: [] for split in SPLITS}
    for name, (reader, write) in writers.items():
        (home / name).mkdir()
        arguments = write(source, home / name, rows)
        tasks[f"public/{reader}"] = _task(reader, arguments)
    # The table calls ActivityNet Captions by the name of its videos.
    folders = {name.removesuffix("Captions"): home / name for name in writers}
    roots = {name: str(folder / "videos") for name, folder in folders.items()}
    released = {}
    for split in SPLITS:
        table = home / f"retrieval/{split}.csv"
        write_csv(table, rows[split], header=("video_id", "text", "dataset"))
        released[split] = {"annotations": str(table), "root": roots}
    return {"released/retrieval": _task("captions", released), **tasks}


def _task(reader: str, arguments: Arguments) -> dict:
    common = {"objective": "retrieval", "sampling": "intervals", "augmentation": "crop"}
    return {**common, "reader": reader, **arguments}


def _row(rows: Rows, video_id: str, captions: Sequence[str], dataset: str) -> None:
    rows.append((video_id, str(list(captions)), dataset))


def write_msrvtt(source: Source, home: Path, rows: dict[str, Rows]) -> Arguments:
    """One JSON of videos and sentences for all splits; videos/video<number>.mp4."""
    path = home / "train_val_videodatainfo.json"
    videos, sentences, arguments = [], [], {}
    for split, official in zip(SPLITS, ("train", "validate"), strict=True):
        for video in source.clips[split]:
            name = f"video{len(videos)}"
            place(video, home / "videos" / f"{name}.mp4")
            _row(rows[split], name, video.captions, "MSRVTT")
            videos.append({
                "category": 9, "url": f"https://www.youtube.com/watch?v={video.youtube_id}",
                "video_id": name, "start time": 12.5, "end time": 12.5 + video.duration,
                "split": official, "id": len(videos),
            })  # fmt: skip
            sentences += [{"caption": text, "video_id": name} for text in video.captions]
        arguments[split] = {
            "annotations": str(path), "root": str(home / "videos"), "split": official
        }  # fmt: skip
    sentences = [{**item, "sen_id": number} for number, item in enumerate(sentences)]
    sentences.sort(key=lambda item: item["sen_id"] % 7)  # captions of a video lie apart
    write_json(path, {"info": {"version": "1.0"}, "videos": videos, "sentences": sentences})
    return arguments


def write_msvd(source: Source, home: Path, rows: dict[str, Rows]) -> Arguments:
    """AllVideoDescriptions.txt, a caption a line; lists of ids; videos/<id>_<start>_<end>.avi."""
    path = home / "AllVideoDescriptions.txt"
    lines = ["#A video's id, a space, and what somebody said of it.", ""]
    arguments = {}
    for split in SPLITS:
        names = []
        for video in source.clips[split]:
            names.append(f"{video.youtube_id}_5_{5 + max(1, round(video.duration))}")
            place(video, home / "videos" / f"{names[-1]}.avi")
            _row(rows[split], names[-1], video.captions, "MSVD")
            lines += [f"{names[-1]} {caption}" for caption in video.captions]
        write_lines(home / f"{split}_list.txt", names)
        arguments[split] = {
            "annotations": str(path),
            "root": str(home / "videos"),
            "videos": str(home / f"{split}_list.txt"),
        }
    write_lines(path, lines)
    return arguments


def activitynet_id(video: Video) -> str:
    """The id of a video in ActivityNet Captions, and the name of its file."""
    return f"v_{video.youtube_id}"


def write_activitynet_captions(source: Source, home: Path, rows: dict[str, Rows]) -> Arguments:
    """{"v_<id>": {"duration", "timestamps", "sentences"}} per split; videos/v_<id>.mp4."""
    arguments = {}
    for split, official in zip(SPLITS, ("train", "val_1"), strict=True):
        content = {}
        for video in source.streams[split]:
            name, told = activitynet_id(video), moments(video)
            place(video, home / "videos" / f"{name}.mp4")
            sentences = [sentence(moment.text) for moment in told]
            # Most of the published sentences begin with a space.
            content[name] = {
                "duration": video.duration,
                "timestamps": [[moment.start, moment.end] for moment in told],
                "sentences": [*sentences[:1], *(f" {text}" for text in sentences[1:])],
            }
            _row(rows[split], name, [" ".join(sentences)], "ActivityNet")
        path = home / f"{official}.json"
        write_json(path, content)
        arguments[split] = {"annotations": str(path), "root": str(home / "videos")}
    return arguments


def didemo_id(video: Video) -> str:
    """The name of a video's file in DiDeMo."""
    return f"12090392@N02_{video.code}_{video.youtube_id}.mov"


def write_didemo(source: Source, home: Path, rows: dict[str, Rows]) -> Arguments:
    """Lists of moments, marked by four viewers in units of 5 s; videos/<name>.mov."""
    arguments, number = {}, 0
    for split in SPLITS:
        items = []
        for video in source.streams[split]:
            name, told = didemo_id(video), moments(video)
            place(video, home / "videos" / name)
            for moment in told:
                number += 1
                items.append({
                    "annotation_id": number, "description": moment.text, "video": name,
                    "times": didemo_times(moment.start, moment.end, video.duration),
                    "num_segments": -int(-video.duration // UNIT),
                    "dl_link": f"https://www.flickr.com/video_download.gne?id={video.code}",
                })  # fmt: skip
            paragraph = " ".join(moment.text for moment in told)
            _row(rows[split], name, [paragraph], "DiDeMo")
        path = home / f"{split}_data.json"
        write_json(path, items)
        arguments[split] = {"annotations": str(path), "root": str(home / "videos")}
    return arguments


def didemo_times(start: float, end: float, duration: float) -> list[list[int]]:
    """The units (first, last) that four viewers mark; the second one sees it otherwise."""
    units = -int(-duration // UNIT)
    marked = [int(start // UNIT), min(int(end // UNIT), units - 1)]
    other = [0, units - 1] if marked != [0, units - 1] else [0, 0]
    return [marked, other, marked, marked]


def write_lsmdc(source: Source, home: Path, rows: dict[str, Rows]) -> Arguments:
    """Clip, four times, sentence, separated by tabs; videos/<film>/<film>_<start>-<end>.avi."""
    arguments, number = {}, 0
    for split, official in zip(SPLITS, ("training", "val"), strict=True):
        lines = []
        for video in source.clips[split]:
            number += 1
            film = f"{1004 + number % 2}_Mini_World"
            start = 60 * number + CLOCK
            times = [_clock(start), _clock(start + video.duration)]
            name = f"{film}_{times[0]}-{times[1]}"
            place(video, home / "videos" / film / f"{name}.avi")
            text = sentence(video.captions[0])
            _row(rows[split], f"{film}/{name}", [text], "LSMDC")
            lines.append((name, *times, *times, text))
        path = home / f"LSMDC16_annos_{official}.csv"
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter="\t", lineterminator="\n").writerows(lines)
        arguments[split] = {"annotations": str(path), "root": str(home / "videos")}
    return arguments


def _clock(second: float) -> str:
    """Hours, minutes and seconds, "00.01.32.966"."""
    minutes, second = divmod(second, 60)
    return f"{int(minutes) // 60:02d}.{int(minutes) % 60:02d}.{second:06.3f}"


def write_vatex(source: Source, home: Path, rows: dict[str, Rows]) -> Arguments:
    """Lists of videoID, enCap and chCap; videos/<id>_<start>_<end>.mp4."""
    arguments = {}
    for split, official in zip(SPLITS, ("training", "validation"), strict=True):
        items = []
        for video in source.clips[split]:
            name = f"{video.youtube_id}_000122_000132"
            place(video, home / "videos" / f"{name}.mp4")
            _row(rows[split], name, video.captions, "VATEX")
            items.append({"videoID": name, "enCap": video.captions, "chCap": ["有东西在动"]})
        path = home / f"vatex_{official}_v1.0.json"
        path.write_text(json.dumps(items, ensure_ascii=False), encoding="utf-8")
        arguments[split] = {"annotations": str(path), "root": str(home / "videos")}
    return arguments
