"""Miniworld's video instances: same bytes, right shares, readable as YouTube-VIS."""
import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from experiments.miniworld import instances as rendering
from experiments.miniworld.instances import (
    CATEGORIES,
    InstanceParams,
    instances_key,
    render_instances,
)
from integrations.ovis.evaluation import evaluate
from integrations.ovis.layout import read_release

TINY = InstanceParams(train=40, val=6, test=10)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return render_instances(tmp_path_factory.mktemp("instances"), TINY, workers=1)


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def objects(home, split="train"):
    return json.loads((home / f"{split}.json").read_text())["annotations"]


def test_same_bytes_whatever_the_number_of_workers(home, tmp_path):
    assert contents(render_instances(tmp_path, TINY, workers=2)) == contents(home)


def test_a_present_folder_is_reused_and_every_parameter_decides_it(home):
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    assert render_instances(home.parent, TINY) == home
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before
    assert home.name == f"instances-{instances_key(TINY)}"
    keys = {instances_key(TINY)}
    for name, value in {"seed": 1, "frames": 9, "test": 11, "spin": 3.0, "noise": 0.0}.items():
        keys.add(instances_key(replace(TINY, **{name: value})))
    assert len(keys) == 6


def test_an_interrupted_render_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(rendering, "write_still", stop)
    with pytest.raises(KeyboardInterrupt):
        render_instances(tmp_path, TINY, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_splits_read_as_youtube_vis_and_masks_score_as_themselves(home):
    for split, count in (("train", 40), ("val", 6), ("test", 10)):
        videos = read_release("miniworld", home, split)
        assert len(videos) == count and videos.class_names == tuple(CATEGORIES)
        for video in videos.videos:
            assert len(video.files) == 8
            for file in video.files:
                assert Image.open(videos.root / file).size == (video.width, video.height)
        document = videos.document()
        perfect = [{**item, "score": 1.0} for item in document["annotations"]]
        assert evaluate(document, perfect).stats["AP"] == pytest.approx(1)


def test_splits_share_no_video(home):
    frames = [path.read_bytes() for path in home.rglob("00000.jpg")]
    assert len(frames) == len(set(frames)) == 56


def test_shares_are_as_asked(home):
    found = objects(home)
    hidden = [item["camouflaged"] for item in found]
    assert 0.3 <= np.mean(hidden) <= 0.4
    assert {item["category_id"] for item in found} == set(CATEGORIES.values())
    for item in found:
        assert (item["category_id"] == CATEGORIES["hidden"]) == item["camouflaged"]
    per_video = np.bincount([item["video_id"] for item in found])[1:]
    assert set(per_video) == {1, 2, 3}
    assert {item["way"] for item in found} == {"stays", "enters", "leaves", "crosses"}


def test_objects_come_in_and_go_out_through_the_border(home):
    for item in objects(home):
        seen = np.array([mask is not None for mask in item["segmentations"]])
        if item["way"] == "leaves":
            assert seen[int(item["camouflaged"])] and not seen[-1]
        if item["way"] == "enters":
            assert seen[-1] and not seen[0]


def test_nothing_hidden_is_annotated_before_it_moves(home):
    whole = [item for item in objects(home) if item["way"] == "stays"]
    for item in whole:
        seen = [mask is not None for mask in item["segmentations"]]
        assert seen == [not item["camouflaged"], *[True] * (len(seen) - 1)]
    assert {item["camouflaged"] for item in whole} == {True, False}


def test_objects_hide_one_another(home):
    """Some masks lose a fifth of their area in the middle of a crossing."""
    changes = []
    for item in objects(home):
        areas = item["areas"][item["camouflaged"] :]
        if item["way"] == "crosses" and all(areas):
            changes.append(min(areas) / max(areas))
    assert min(changes) < 0.8


def test_what_is_hidden_has_the_backgrounds_colour(home):
    """Inside and around a hidden object the mean brightness is the same; of others it is not."""
    videos = read_release("miniworld", home, "train")
    differences = {True: [], False: []}
    for video in videos.videos:
        frame = np.asarray(Image.open(videos.root / video.files[4]), float)
        masks = [track.masks([4])[0] for track in video.tracks]
        outside = ~np.any(masks, axis=0)
        for track, mask in zip(video.tracks, masks, strict=True):
            if mask.sum() > 50:
                difference = abs(frame[mask].mean(0) - frame[outside].mean(0)).max()
                differences[track.annotation["camouflaged"]].append(difference)
    assert np.median(differences[True]) < 6 < 40 < np.median(differences[False])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"frames": 1}, "frames=1 must be at least 2"),
        ({"radius": (9, 17)}, r"radius=\(9, 17\) is too much for frame_size=64"),
        ({"objects": (2, 1)}, r"objects=\(2, 1\) must rise from 1"),
        ({"camouflaged": 1.2}, r"camouflaged=1\.2 must lie in 0\.\.1"),
        ({"train": -1}, "train=-1 must not be negative"),
        ({"jpeg_quality": 0}, "jpeg_quality=0"),
    ],
)
def test_impossible_parameters_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        InstanceParams(**fields)


def test_zero_workers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="workers=0"):
        render_instances(tmp_path, TINY, workers=0)
