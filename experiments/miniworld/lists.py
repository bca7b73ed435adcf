"""The lists of a world, in the layouts that public data sets have made usual."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .actions import CLASS_NAMES, PRETRAINING_ACTIONS
from .jobs import Job
from .params import WorldParams
from .scene import COLOURS, Item
from .writers import write_csv, write_json, write_lines

DATASET = "MINIWORLD"
IGNORE_INDEX = -100  # no class is left out of the metric
# What masks are told apart by: patches are coarse for shapes and fine for colours; what is hidden
# shows by its motion alone.
HIDDEN = "hidden shape"
CATEGORIES = {
    name: number
    for number, name in enumerate([*(f"{colour} shape" for colour in COLOURS), HIDDEN], start=1)
}
WINDOWS = ("video_id", "start_second", "end_second", "text", "relevant_windows", "dataset")
REFERRING = ("video_id", "text", "frames", "length", "obj_id", "anno_id")

Done = Sequence[tuple[Job, dict]]


def category(item: Item) -> int:
    """Number of an item's category, from 1."""
    return CATEGORIES[HIDDEN if item.camouflaged else f"{item.colour} shape"]


def list_stills(home: Path, done: Done) -> None:
    """Image-text pairs, one list per split; images are named relative to ``home``."""
    for split in ("train", "val"):
        rows = [record["row"] for job, record in done if job.split == split]
        write_csv(home / f"{split}.csv", rows, header=("image", "caption", "shape", "colour"))


def list_clips(home: Path, done: Done) -> None:
    """The lists of all six tasks over the clips, masks and the index.

    Recognition (Kinetics) lists the clips that end with their only action; localization
    (ActivityNet) every action of every clip, by its label; grounding the same by what one may ask
    for; referring (MeViS) every expression. All name videos relative to ``home/videos``, all but
    recognition without extension.
    """
    labels = {name: number for number, name in enumerate(PRETRAINING_ACTIONS)}
    write_json(home / "recognition/label2id.json", labels, indent=2)
    write_json(home / "localization/label2id.json", {DATASET: labels}, indent=2)
    write_json(home / "instances_label2id.json", {DATASET: CATEGORIES}, indent=2)
    for split in ("train", "val"):
        here = [(job, record) for job, record in done if job.split == split]
        write_csv(
            home / f"recognition/{split}.csv",
            [(f"{job.name}.mp4", job.actions[0]) for job, _ in here if job.layout == "ending"],
        )
        write_csv(
            home / f"localization/{split}.csv",
            [_window_row(job.name, action["action"], [_span(action)])
             for job, record in here for action in record["actions"]],
            header=WINDOWS,
        )
        write_csv(
            home / f"grounding/{split}.csv",
            [_window_row(job.name, query["text"], query["windows"])
             for job, record in here for query in record["queries"]],
            header=WINDOWS,
        )
        _list_referring(home / "referring", split, here)
        _list_instances(home / f"instances_{split}.json", here)
    write_lines(home / "index.jsonl", (record["index"] for _, record in done))


def _span(action: dict) -> tuple[float, float]:
    return action["start_second"], action["end_second"]


def _window_row(video: str, text: str, windows: Sequence[tuple[float, float]]) -> tuple:
    """A row of WINDOWS; start and end are those of the first window."""
    return video, *windows[0], text, str([list(window) for window in windows]), DATASET


def _list_referring(home: Path, split: str, done: Done) -> None:
    """MeViS: a table of expressions, and the masks by annotation, RLE or null per frame."""
    rows, masks = [], []
    for job, record in done:
        frames = str([f"{frame:05d}" for frame in range(job.frames)])
        ids, used = record["annotation_ids"], set()
        for expression in record["expressions"]:
            objects = expression["objects"]
            used.update(objects)
            numbers = str(list(objects)), str([ids[number] for number in objects])
            rows.append((job.name, expression["text"], frames, job.frames, *numbers))
        masks += [f'"{ids[number]}": {record["segmentations"][number]}' for number in sorted(used)]
    write_csv(home / f"{split}.csv", rows, header=REFERRING)
    text = ",\n".join(masks)
    (home / f"masks_{split}.json").write_text(f"{{\n{text}\n}}\n")


def list_streams(home: Path, done: Done, params: WorldParams) -> None:
    """Session sets (THUMOS style), masks and the index of the untrimmed videos."""
    sessions: dict[str, list[str]] = {}
    for split in _stream_splits(params):
        here = [(job, record) for job, record in done if job.split == split]
        key = "test" if split == f"test_{params.stream_frames}" else split
        sessions[f"{key}_session_set"] = [job.name for job, _ in here]
        _list_instances(home / f"instances_{split}.json", here)
    write_json(
        home / "data_info.json",
        {
            DATASET: {
                "data_root": ".",
                "class_names": list(CLASS_NAMES),
                "num_classes": len(CLASS_NAMES),
                "ignore_index": IGNORE_INDEX,
                "metrics": "AP",
                "fps": params.fps,
                **sessions,
            }
        },
        indent=2,
    )
    write_lines(home / "index.jsonl", (record["index"] for _, record in done))


def _stream_splits(params: WorldParams) -> list[str]:
    lengths = (params.stream_frames, params.long_stream_frames)
    return ["train", *(f"{part}_{n}" for part in ("val", "test") for n in lengths)]


def _list_instances(path: Path, done: Done) -> None:
    """YouTube-VIS: videos, categories (colours), one annotation per shape with a mask per frame."""
    videos = ",\n".join(record["video"] for _, record in done)
    annotations = ",\n".join(text for _, record in done for text in record["annotations"])
    categories = json.dumps(
        [{"id": number, "name": name, "supercategory": "shape"}
         for name, number in CATEGORIES.items()]
    )
    path.write_text(
        f'{{"videos": [\n{videos}\n],\n"categories": {categories},\n'
        f'"annotations": [\n{annotations}\n]}}\n'
    )
