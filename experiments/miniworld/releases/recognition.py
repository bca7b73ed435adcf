"""Small Kinetics-400 and Something-Something v2: clips of one class each."""

from __future__ import annotations

from pathlib import Path

from experiments.miniworld.actions import ACTIONS, PRETRAINING_ACTIONS
from experiments.miniworld.releases.source import SPLITS, Source, Video, looks, place
from experiments.miniworld.writers import write_csv, write_json

KINETICS_START = 7  # second of the imagined YouTube video at which its clip begins


def write_kinetics400(source: Source, home: Path) -> dict[str, dict]:
    """Released lists; the official CSV. Videos as <split>/<class>/<id>_<start>_<end>.mp4.

    home/annotations/{train,validate}.csv: label,youtube_id,time_start,time_end,split
    home/metadata/{train,val}.csv, label2id.json: path, class name
    """
    labels = {name: number for number, name in enumerate(sorted(PRETRAINING_ACTIONS))}
    (home / "metadata").mkdir(parents=True)
    (home / "annotations").mkdir()
    write_json(home / "metadata/label2id.json", labels)
    tasks = _tasks("kinetics400", "kinetics_official", "segments")
    for split, official in zip(SPLITS, ("train", "validate"), strict=True):
        released, rows = [], []
        for video in source.endings[split]:
            label = _label(video)
            end = KINETICS_START + max(1, round(video.duration))
            file = f"{video.youtube_id}_{KINETICS_START:06d}_{end:06d}.mp4"
            place(video, home / official / label / file)
            released.append((f"{official}/{label}/{file}", label))
            rows.append((label, video.youtube_id, KINETICS_START, end, official))
        write_csv(home / f"metadata/{split}.csv", released)
        write_csv(
            home / f"annotations/{official}.csv",
            rows,
            header=("label", "youtube_id", "time_start", "time_end", "split"),
        )
        tasks["released/kinetics400"][split] = {
            "annotations": str(home / f"metadata/{split}.csv"),
            "labels": str(home / "metadata/label2id.json"),
            "root": str(home),
        }
        tasks["public/kinetics400"][split] = {
            "annotations": str(home / f"annotations/{official}.csv"),
            "labels": str(home / "metadata/label2id.json"),
            "root": str(home / official),
            "split": official,
            "pattern": "{label}/{id}_{start:06d}_{end:06d}.mp4",
        }
    return tasks


def write_ssv2(source: Source, home: Path) -> dict[str, dict]:
    """Released lists; the official JSON. Videos as 20bn-something-something-v2/<number>.webm.

    home/labels/{train,validation}.json: id, label, template, placeholders; labels.json: template
    without brackets -> number, written as text.
    """
    templates = {name: _template(name) for name in PRETRAINING_ACTIONS}
    classes = sorted(_bare(template) for template in templates.values())
    (home / "metadata").mkdir(parents=True)
    (home / "labels").mkdir()
    write_json(home / "metadata/label2id.json", {name: i for i, name in enumerate(classes)})
    write_json(home / "labels/labels.json", {name: str(i) for i, name in enumerate(classes)})
    videos = home / "20bn-something-something-v2"
    tasks = _tasks("ssv2", "ssv2", "blocks")
    number = 100
    for split, official in zip(SPLITS, ("train", "validation"), strict=True):
        released, items = [], []
        for video in source.endings[split]:
            number += 7
            (action,) = video.record["actions"]
            template = templates[action["action"]]
            things = [looks(video.record["objects"][k]) for k in action["objects"]]
            label = template.lower()
            for thing in things:
                label = label.replace("[something]", f"a {thing}", 1)
            place(video, videos / f"{number}.webm")
            released.append((f"{number}.webm", _bare(template)))
            items.append({"id": str(number), "label": label, "template": template,
                          "placeholders": [f"a {thing}" for thing in things]})
        write_csv(home / f"metadata/{split}.csv", released)
        write_json(home / f"labels/{official}.json", items)
        tasks["released/ssv2"][split] = {
            "annotations": str(home / f"metadata/{split}.csv"),
            "labels": str(home / "metadata/label2id.json"),
            "root": str(videos),
            "name": "SSV2",
        }
        tasks["public/ssv2"][split] = {
            "annotations": str(home / f"labels/{official}.json"),
            "labels": str(home / "labels/labels.json"),
            "root": str(videos),
        }
    return tasks


def _tasks(name: str, public_reader: str, sampling: str) -> dict[str, dict]:
    common = {"objective": "recognition", "sampling": sampling, "augmentation": "strong"}
    return {
        f"released/{name}": {**common, "reader": "kinetics"},
        f"public/{name}": {**common, "reader": public_reader},
    }


def _label(video: Video) -> str:
    return video.record["actions"][0]["action"]


def _template(name: str) -> str:
    """"[Something] moves left", "[Something] and [something] swap places"."""
    action = ACTIONS[name]
    who = "[Something]" if action.actors == 1 else "[Something] and [something]"
    return f"{who} {action.phrase}"


def _bare(template: str) -> str:
    return template.replace("[", "").replace("]", "")
