"""Every data set's format: what its reader finds, through the real decoding, is what the world is.

A file's name says nothing of the world's video in it; the tests recognise it by its pictures.
"""

import json
import os
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from experiments.miniworld import ACTIONS, WorldParams, render_world
from experiments.miniworld.releases import write_releases
from pretrain.build import build_dataset
from pretrain.config import TaskConfig
from pretrain.datasets import READERS, Draw, collate
from pretrain.datasets.masks import BACKGROUND, IGNORE

PARAMS = WorldParams(
    stills_train=0, stills_val=0, clips_train=16, clips_train_long=3, clips_val=8, clips_val_long=2,
    streams_train=3, streams_val=2, streams_val_long=1, streams_test=0, streams_test_long=0,
    stream_frames=60, long_stream_frames=100, scene_frames=(50, 60),  # no cuts in clips
)  # fmt: skip
SIZE = PARAMS.frame_size
RECOGNITION = ["released/kinetics400", "released/ssv2", "public/kinetics400", "public/ssv2"]
RETRIEVAL = ["world/retrieval", "released/retrieval", "public/msrvtt", "public/msvd",
             "public/activitynet_captions", "public/didemo", "public/lsmdc",
             "public/vatex"]  # fmt: skip
LOCALIZATION = ["released/localization", "public/activitynet", "public/fineaction", "public/hacs"]
GROUNDING = ["world/grounding", "released/grounding", "public/charades_sta", "public/qvhighlights",
             "public/tacos", "public/activitynet_captions_grounding", "public/didemo_grounding",
             "public/queryd"]  # fmt: skip
INSTANCES = ["world/instances", "released/youtube_vis", "released/lv_vis", "released/coco"]
REFERRING = ["world/referring", "released/mevis", "public/mevis", "released/refer_youtube_vos",
             "public/refer_youtube_vos", "released/refer_coco", "public/refer_coco"]  # fmt: skip
ALL = [*RECOGNITION, *RETRIEVAL, *LOCALIZATION, *GROUNDING, *INSTANCES, *REFERRING,
       "public/hacs_clips"]  # fmt: skip
# Times that a format rounds, in seconds; all others are exact.
COARSE = {"public/tacos": 1 / PARAMS.fps, "public/didemo_grounding": 5.0}

every_split = pytest.mark.parametrize("split", ["train", "val"])


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


class Truth:
    """Videos of the world by their pictures, with their lines of the index and their masks."""

    def __init__(self, world: Path) -> None:
        from backbone.video import open_video

        self.records, self.frames, self.masks, self.found = {}, {}, {}, {}
        for home in (world / "clips", world / "streams"):
            for line in (home / "index.jsonl").read_text().splitlines():
                record = json.loads(line)
                with open_video(home / "videos" / f"{record['id']}.mp4") as reader:
                    self.frames[record["id"]] = np.stack([frame.image for frame in reader])
                self.records[record["id"]] = record
            for path in home.glob("instances_[tv]*.json"):
                document = json.loads(path.read_text())
                names = {v["id"]: Path(v["file_name"]).stem for v in document["videos"]}
                for annotation in document["annotations"]:
                    masks = self.masks.setdefault(names[annotation["video_id"]], [])
                    masks.append(np.stack([unpack(rle) for rle in annotation["segmentations"]]))

    def find(self, frames: torch.Tensor, exact: bool) -> tuple[dict, int]:
        """The record of the video that frames ``(T, 3, H, W)`` come from, and the first's number.

        Not exact: pictures that went through JPEG.
        """
        images = frames.permute(0, 2, 3, 1).numpy().astype(int)
        if (images.tobytes(), exact) in self.found:
            return self.found[images.tobytes(), exact]
        best = None
        for name, known in self.frames.items():
            for first in range(len(known) - len(images) + 1):
                if abs(images[0] - known[first]).mean() > 4:
                    continue
                gap = abs(images - known[first : first + len(images)])
                gap = gap.max() if exact else gap.mean()
                if best is None or gap < best[0]:
                    best = gap, name, first
        assert best is not None, "no video of the world looks like this"
        assert best[0] <= (0 if exact else 3), f"{best[1]} is nearest, but differs by {best[0]}"
        self.found[images.tobytes(), exact] = self.records[best[1]], best[2]
        return self.records[best[1]], best[2]


def unpack(rle: dict | None) -> np.ndarray:
    if rle is None:
        return np.zeros((SIZE, SIZE), bool)
    return coco.decode(coco.frPyObjects(rle, SIZE, SIZE)).astype(bool)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return render_world(tmp_path_factory.mktemp("worlds"), PARAMS, workers=1)


@pytest.fixture(scope="module")
def truth(world) -> Truth:
    return Truth(world)


@pytest.fixture(scope="module")
def releases(world, tmp_path_factory) -> dict[str, dict]:
    written = write_releases(world, tmp_path_factory.mktemp("releases"), videos=3)
    return {**written, **own_lists(world / "clips")}


def own_lists(clips: Path) -> dict[str, dict]:
    """How the lists that lie in a world itself are read, all its clips where they are."""
    common = {"sampling": "consecutive", "augmentation": "crop"}
    videos = {"root": str(clips / "videos")}
    return {
        "world/retrieval": {
            **common, "objective": "retrieval", "reader": "index",
            **{split: {"index": str(clips / "index.jsonl"), "split": split, **videos}
               for split in ("train", "val")},
        },
        "world/grounding": {
            **common, "objective": "grounding", "reader": "grounding",
            **{split: {"annotations": str(clips / f"grounding/{split}.csv"), **videos}
               for split in ("train", "val")},
        },
        "world/instances": {
            **common, "objective": "instance_segmentation", "reader": "youtube_vis",
            **{split: {"annotations": str(clips / f"instances_{split}.json"), "name": "MINIWORLD",
                       "labels": str(clips / "instances_label2id.json"), "pattern": "{id}.mp4",
                       **videos}
               for split in ("train", "val")},
        },
        "world/referring": {
            **common, "objective": "referring_segmentation", "reader": "mevis",
            **{split: {"annotations": str(clips / f"referring/{split}.csv"),
                       "masks": str(clips / f"referring/masks_{split}.json"), **videos}
               for split in ("train", "val")},
        },
    }  # fmt: skip


def size_of(key: str, split: str) -> int:
    """Videos of a data set."""
    if not key.startswith("world/"):
        return 3
    return getattr(PARAMS, f"clips_{split}") + getattr(PARAMS, f"clips_{split}_long")


def dataset(releases: dict, key: str, split: str, *, size: int = SIZE, **changes):
    config = TaskConfig(**{**releases[key], **changes})
    return build_dataset(config, getattr(config, split), name=key, image_size=size)


def whole(releases: dict, key: str, split: str) -> list:
    """Every sample of a data set with all frames of its video, as they are."""
    data = dataset(releases, key, split, sampling="consecutive", augmentation="none")
    samples = [data[Draw(i, 1000)] for i in range(len(data))]
    assert [sample.error for sample in samples if sample.error] == []
    return [(data, sample) for sample in samples]


def plain(text: str) -> str:
    return text.lower().replace(".", "")


def once(record: dict) -> dict[str, list[float]]:
    """Queries of a video that are answered once, and when."""
    return {q["text"]: q["windows"][0] for q in record["queries"] if len(q["windows"]) == 1}


def in_order(record: dict) -> str:
    return " ".join(text for text, _ in sorted(once(record).items(), key=lambda item: item[1]))


def test_every_data_set_is_written(releases):
    assert sorted(releases) == sorted(ALL)


def test_every_reader_is_run(releases):
    used = {task["reader"] for task in releases.values()}
    assert used == set(READERS) - {"union"}  # which is made of others


@every_split
@pytest.mark.parametrize("key", RECOGNITION)
def test_recognition(releases, truth, key, split):
    seen = set()
    for data, sample in whole(releases, key, split):
        record, first = truth.find(sample.frames, exact=True)
        assert first == 0 and len(sample.frames) == record["frames"]
        assert record["split"] == split
        (action,) = record["actions"]
        (number,) = sample.entry.labels
        label = data.label_sets[sample.entry.label_set][number]
        phrase = ACTIONS[action["action"]].phrase
        things = "Something and something" if ACTIONS[action["action"]].actors == 2 else "Something"
        assert label == (f"{things} {phrase}" if "ssv2" in key else action["action"])
        seen.add(record["id"])
    assert len(seen) == 3


@every_split
def test_hacs_clips(releases, truth, split):
    found = set()
    for data, sample in whole(releases, "public/hacs_clips", split):
        record, first = truth.find(sample.frames, exact=True)
        label = data.label_sets["HACS"][sample.entry.labels[0]]
        assert abs(len(sample.frames) - 2 * PARAMS.fps) <= 1
        middle = first + len(sample.frames) // 2
        times = [(a["start_frame"], a["end_frame"]) for a in record["actions"]
                 if a["action"] == label]
        assert any(start - 8 <= middle <= end + 8 for start, end in times)
        found.add((record["id"], sample.entry.start))
    streams = {name for name, _ in found}
    assert len(streams) == 3
    assert len(found) == sum(len(truth.records[name]["actions"]) for name in streams)


@every_split
@pytest.mark.parametrize("key", RETRIEVAL)
def test_retrieval(releases, truth, key, split):
    seen = set()
    for _, sample in whole(releases, key, split):
        record, first = truth.find(sample.frames, exact=True)
        assert first == 0 and len(sample.frames) == record["frames"]
        assert record["split"].startswith(split)
        said = [plain(text) for text in sample.entry.captions]
        if "stream" in record["id"]:
            assert said == [in_order(record)]
        elif len(said) == 1:  # LSMDC
            assert said == record["captions"][:1]
        else:
            assert sorted(said) == sorted(record["captions"])
        seen.add((record["id"], sample.entry.video))
    assert len(seen) == size_of(key, split) * (6 if key == "released/retrieval" else 1)


def test_captions_of_a_table_keep_their_order(releases, truth):
    for _, sample in whole(releases, "public/vatex", "train"):
        record, _ = truth.find(sample.frames, exact=True)
        assert list(sample.entry.captions) == record["captions"]


@every_split
@pytest.mark.parametrize("key", LOCALIZATION)
def test_localization(releases, truth, key, split):
    seen = set()
    for data, sample in whole(releases, key, split):
        record, first = truth.find(sample.frames, exact=True)
        assert first == 0 and record["split"].startswith(split)
        labels = data.label_sets[sample.entry.label_set]
        found = {(labels[label], start, end) for label, start, end in sample.entry.segments}
        assert found == {
            (a["action"], a["start_second"], a["end_second"]) for a in record["actions"]
        }
        seen.add((record["id"], sample.entry.label_set))
    assert len(seen) == 3 * (3 if key == "released/localization" else 1)


@every_split
@pytest.mark.parametrize("key", GROUNDING)
def test_grounding(releases, truth, key, split):
    found, records = set(), {}
    for _, sample in whole(releases, key, split):
        record, first = truth.find(sample.frames, exact=True)
        assert first == 0 and record["split"].startswith(split)
        (text,) = map(plain, sample.entry.captions)
        folder = sample.entry.video.parent.parent.name
        (windows,) = (q["windows"] for q in record["queries"] if q["text"] == text)
        slack = COARSE.get(key, 1 / PARAMS.fps if folder == "TaCoS" else 1e-9)
        read = [(start, end) for label, start, end in sample.entry.segments if label == 0]
        np.testing.assert_allclose(read, windows, atol=slack)
        assert sample.entry.focus == (min(s for s, _ in read), max(e for _, e in read))
        found.add((folder, record["id"], text))
        records[folder, record["id"]] = record
    for (folder, name), record in records.items():
        asked = {text for place, video, text in found if (place, video) == (folder, name)}
        several = folder in ("QVHighlights", "clips")
        assert asked == ({q["text"] for q in record["queries"]} if several else set(once(record)))
    assert len(records) == size_of(key, split) * (6 if key == "released/grounding" else 1)


def test_didemo_takes_what_most_viewers_marked(releases, truth):
    for _, sample in whole(releases, "public/didemo_grounding", "train"):
        record, _ = truth.find(sample.frames, exact=True)
        start, end = once(record)[sample.entry.captions[0]]
        ((_, first, last),) = sample.entry.segments
        assert first <= start < first + 5 and last - 5 <= end <= last


def wanted_masks(truth: Truth, record: dict, frames: range, number_of) -> np.ndarray:
    """(T, H, W): ``number_of(object)`` where a visible object is, BACKGROUND elsewhere."""
    out = np.full((len(frames), SIZE, SIZE), BACKGROUND)
    for thing, masks in zip(record["objects"], truth.masks[record["id"]], strict=True):
        number = number_of(thing)
        if number is not None:
            out[masks[frames.start : frames.stop]] = number
    return out


@every_split
@pytest.mark.parametrize("key", INSTANCES)
def test_instances(releases, truth, key, split):
    seen = set()
    for data, sample in whole(releases, key, split):
        record, first = truth.find(sample.frames, exact=key.startswith("world"))
        assert record["split"] == split
        frames = range(first, first + len(sample.frames))
        assert len(frames) == (1 if key.endswith("coco") else record["frames"])
        labels = data.label_sets[sample.entry.label_set]

        def number_of(thing, labels=labels):
            if key.endswith("coco") and thing["camouflaged"]:
                return IGNORE  # a crowd
            if key.startswith("world"):
                look = "hidden" if thing["camouflaged"] else thing["colour"]
                return labels.index(f"{look} shape")
            return labels.index(thing["name"] if key.endswith("lv_vis") else thing["shape"])

        wanted = wanted_masks(truth, record, frames, number_of)
        assert sample.masks.dtype == torch.int32
        np.testing.assert_array_equal(sample.masks, wanted)
        seen.add(record["id"])
    assert len(seen) == size_of(key, split)


@every_split
@pytest.mark.parametrize("key", REFERRING)
def test_referring(releases, truth, key, split):
    found, videos = set(), ("released/mevis", "world/referring")  # the others are JPEGs
    for _, sample in whole(releases, key, split):
        record, first = truth.find(sample.frames, exact=key in videos)
        assert record["split"] == split
        (text,) = sample.entry.captions
        (meant,) = (e["objects"] for e in record["expressions"] if e["text"] == text)
        wanted = wanted_masks(
            truth, record, range(first, first + len(sample.frames)),
            lambda thing, meant=meant: 0 if thing["id"] in meant else None,
        )  # fmt: skip
        np.testing.assert_array_equal(sample.masks, wanted)
        assert (wanted == 0).any()
        found.add((record["id"], text))
    names = {name for name, _ in found}
    assert len(names) == size_of(key, split)
    said = {(name, e["text"]): e["objects"]
            for name in names for e in truth.records[name]["expressions"]}
    if "mevis" in key or "world" in key:
        assert found == set(said)
    elif "refer_youtube_vos" in key:
        assert found == {pair for pair, objects in said.items() if len(objects) == 1}
    else:  # a still does not show who moves
        assert found and all(" that " not in text for _, text in found)
        assert len(found) >= len(said) // 3


@every_split
@pytest.mark.parametrize("key", ALL)
def test_clips_for_training_go_through_augmentation(releases, key, split):
    size, frames = 24, 8
    data = dataset(releases, key, split, size=size)
    draws = [Draw(i, frames, seed) for i in range(0, len(data), 1 + len(data) // 8)
             for seed in (0, 1)]  # fmt: skip
    samples = [data[draw] for draw in draws]
    assert [sample.error for sample in samples if sample.error] == []
    batch = collate(samples, size)
    assert batch.frames.shape == (len(samples), frames, 3, size, size)
    assert batch.frames.dtype == torch.uint8 and batch.valid.all()
    if key in INSTANCES + REFERRING:
        assert batch.masks.shape == (len(samples), frames, size, size)
        labels = max((len(labels) for labels in data.label_sets.values()), default=1)
        assert batch.masks.max() < labels and batch.masks.min() >= IGNORE
        assert (batch.masks >= 0).any()
    again = [data[draw] for draw in draws[:2]]
    assert torch.equal(collate(again, size).frames, batch.frames[:2])


def test_every_field_is_one_of_a_task(releases):
    known = {field.name for field in fields(TaskConfig)}
    for task in releases.values():
        assert set(task) <= known
        json.dumps(task)  # plain values, as configs are


def test_videos_are_links_not_copies(world, releases):
    originals = {path.stat().st_ino for path in (world / "clips/videos").iterdir()}
    folder = Path(releases["public/msrvtt"]["train"]["root"])
    assert all(path.stat().st_ino in originals for path in folder.iterdir())


def test_without_links_videos_are_copied(world, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    releases = write_releases(world, tmp_path, videos=1)
    path = next(Path(releases["public/charades_sta"]["train"]["root"]).iterdir())
    assert path.read_bytes() in {p.read_bytes() for p in (world / "clips/videos").iterdir()}


def test_a_folder_in_use_is_refused(world, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=f"{tmp_path} is not empty"):
        write_releases(world, tmp_path)


def test_what_is_no_world_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a rendered world: it holds no world.json"):
        write_releases(tmp_path, tmp_path / "out")


def test_a_world_without_streams_is_refused(tmp_path):
    params = replace(PARAMS, clips_train=4, clips_val=4, streams_val=0, streams_val_long=0)
    world = render_world(tmp_path / "worlds", params, workers=1)
    with pytest.raises(ValueError, match="has no streams in split 'val'; render some"):
        write_releases(world, tmp_path / "out")


def test_no_videos_are_refused(world, tmp_path):
    with pytest.raises(ValueError, match="videos=0 must be at least 1"):
        write_releases(world, tmp_path, videos=0)
