"""Targets from annotation text: rules, limits, errors, and the real THUMOS'14 files if given."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from integrations.oad.targets import (
    PACKAGED_INFO,
    Segment,
    build_targets,
    label_steps,
    main,
    read_annotations,
    step_count,
)

CLASSES = ["Background", "Run", "Jump", "Ambiguous"]
REAL = "STREAMFORMER_THUMOS_ANNOTATIONS"


@pytest.fixture
def annotations(tmp_path):
    """Two training videos and one test video; v2 has a segment past its end of 4 s."""
    texts = {
        "val/Run_val.txt": "v1 0.0 1.0\nv2  3.5 9.0\n",
        "val/Jump_val.txt": "v1 0.5 1.5\n\n",
        "val/Ambiguous_val.txt": "v1 2.0 2.5\n",
        "test/Run_test.txt": "t1 1.0 2.0\n",
        "test/Jump_test.txt": "",
        "test/Ambiguous_test.txt": "t2 0.0 1.0\n",
        "readme.txt": "not an annotation",
    }
    folder = tmp_path / "annotations"
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def inputs(tmp_path):
    info = {"class_names": CLASSES, "num_classes": 4, "ignore_index": 3, "metrics": "AP"}
    info |= {"train_session_set": ["v1", "v2"], "test_session_set": ["t1", "t2"]}
    videos = {v: {"fps": 30.0, "num_frame": 120} for v in ("v1", "v2", "t1")}
    (tmp_path / "info.json").write_text(json.dumps({"TOY": info}))
    (tmp_path / "videos.json").write_text(json.dumps(videos))
    return info, videos


def labels(rule, *segments, steps=6):
    return np.flatnonzero(
        label_steps([Segment(1, *s) for s in segments], steps, 4, 1.0, rule)[:, 1]
    )


def test_the_rules_differ_as_named():
    segment = (1.4, 3.6)  # covers step 1 and 3 by more than half, touches nothing else
    assert labels("centre", segment).tolist() == [1, 2, 3]
    assert labels("centre", (1.6, 3.4)).tolist() == [2]
    assert labels("overlap", (1.6, 3.4)).tolist() == [1, 2, 3]
    assert labels("overlap", (1.0, 2.0)).tolist() == [1]  # touching is not overlapping
    assert labels("majority", (1.6, 3.4)).tolist() == [2]
    # two parts of a step add up, but what they share counts once
    assert labels("majority", (1.0, 1.3), (1.6, 1.9)).tolist() == [1]
    assert labels("majority", (1.0, 1.3), (1.1, 1.35)).tolist() == []


def test_a_step_may_show_two_actions_or_none():
    target = label_steps([Segment(1, 0, 1), Segment(2, 0.5, 1.5)], 8, 4)
    assert target.dtype == np.float32
    expected = np.array([[0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 0]]).repeat(2, axis=0)
    assert np.array_equal(target[:, :3], expected)


@pytest.mark.parametrize(
    ("frames", "fps", "steps"), [(6476, 30.0, 863), (120, 30.0, 16), (7, 30.0, 0), (100, 24.0, 16)]
)
def test_step_count(frames, fps, steps):
    assert step_count(frames, fps) == steps


def test_command_line_writes_a_data_folder(tmp_path, annotations, inputs):
    out = tmp_path / "data"
    report = main(
        ["--annotations", str(annotations), "--video-info", str(tmp_path / "videos.json")]
        + ["--out", str(out), "--data-info", str(tmp_path / "info.json"), "--name", "TOY"]
    )
    assert sorted(p.name for p in (out / "target_perframe").iterdir()) == [
        "t1.npy",
        "v1.npy",
        "v2.npy",
    ]
    target = np.load(out / "target_perframe" / "v2.npy")
    assert target.shape == (16, 4) and target[14:, 1].all() and target[:14, 0].all()
    entry = json.loads((out / "data_info.json").read_text())["TOY"]
    assert entry["test_session_set"] == entry["clean_test_session_set"] == ["t1"]
    assert entry["fps"] == 4.0
    assert report == json.loads((out / "targets.json").read_text())
    assert report["videos_without_information"] == ["t2"]
    assert report["segments_past_the_end"] == [
        {"video": "v2", "class": "Run", "start": 3.5, "end": 9.0, "duration": 4.0}
    ]
    train = report["sets"]["train_session_set"]
    assert train["steps"] == 32 and train["double_labels"] == {"Run+Jump": 2}
    assert train["share"]["ignored"] == 2 / 32


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("v1 1.0", "Run_val.txt:1: 'v1 1.0' is not 'video start end'"),
        ("v1 one two", "Run_val.txt:1: 'v1 one two' is not"),
        ("v1 2.0 1.0", "Run_val.txt:1: 'v1 2.0 1.0' does not end after it starts"),
        ("v1 nan 1.0", "does not end after it starts"),
    ],
)
def test_unreadable_lines_are_named(annotations, line, message):
    (annotations / "val" / "Run_val.txt").write_text(line)
    with pytest.raises(ValueError, match=message):
        read_annotations(annotations, CLASSES)


def test_files_and_classes_must_fit(tmp_path, annotations, inputs):
    (annotations / "test" / "Jump_test.txt").rename(annotations / "test" / "Leap_test.txt")
    with pytest.raises(ValueError, match=r"_test.txt .*unknown \['Leap'\], missing \['Jump'\]"):
        read_annotations(annotations, CLASSES)
    with pytest.raises(ValueError, match="expected files such as Run_test.txt"):
        read_annotations(tmp_path / "nowhere", CLASSES)
    with pytest.raises(ValueError, match="label rule 'middle' is not one of centre"):
        label_steps([], 3, 4, rule="middle")


@pytest.mark.skipif(REAL not in os.environ, reason=f"{REAL} does not name THUMOS'14 annotations")
def test_real_annotations_give_the_known_counts(tmp_path):
    """The variable names the folder of annotation text; the video information lies beside it."""
    folder = Path(os.environ[REAL])
    videos = json.loads((folder.parent / "thumos14_video_info.json").read_text())
    info = json.loads(PACKAGED_INFO.read_text())["THUMOS"]
    report = build_targets(folder, videos, tmp_path, info)
    assert report["videos_without_information"] == ["video_test_0001292"]
    assert len(report["segments_past_the_end"]) == 30
    train, test = report["sets"].values()
    assert (train["videos"], train["steps"]) == (200, 167_028)
    assert (test["videos"], test["steps"]) == (212, 183_628)
    assert train["double_labels"] == {"CliffDiving+Diving": 1684, "CricketBowling+CricketShot": 151}
    assert test["double_labels"] == {
        "CliffDiving+Diving": 2807,
        "CricketBowling+CricketShot": 166,
        "Shotput+ThrowDiscus": 15,
    }
    for facts, shares in [(train, (70.8, 28.0, 1.3, 1.1)), (test, (67.9, 30.7, 1.4, 1.6))]:
        assert tuple(round(100 * s, 1) for s in facts["share"].values()) == shares
