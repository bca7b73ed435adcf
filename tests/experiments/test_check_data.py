"""The check before a run: every kind of damage is found, counted and named, and ends with 1."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from backbone.video import VideoWriter
from experiments.check_data import Finding, Part, to_text, walk
from experiments.config import CONFIGS, UserError
from experiments.run import main

SIZE, FPS, FRAMES = 32, 8, 16  # two seconds
CONFIG = """
_base_ = [{base!r}]
tasks = dict(
    _delete_=True,
    moments=dict(
        objective="localization", reader="localization",
        train=dict(annotations="{{root}}/moments.csv", labels="{{root}}/sets.json",
                   root="{{root}}/videos"),
    ),
    actions=dict(
        objective="recognition", reader="kinetics",
        train=dict(annotations="{{root}}/actions.csv", labels="{{root}}/labels.json",
                   root="{{root}}/videos"),
    ),
    things=dict(
        objective="instance_segmentation", reader="youtube_vis",
        train=dict(annotations="{{root}}/things.json", root="{{root}}", pattern="{{id}}"),
    ),
)
"""


def write_moments(root, rows):
    head = ["video_id", "start_second", "end_second", "text", "relevant_windows", "dataset"]
    with open(root / "moments.csv", "w", newline="") as file:
        table = [(name, start, end, label, "[]", "TINY") for name, start, end, label in rows]
        csv.writer(file).writerows([head, *table])


def write_actions(root, rows):
    with open(root / "actions.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)


def write_things(root, names, size=SIZE):
    files = [f"frames/{name}" for name in names]
    mask = {"size": [size, size], "counts": [0, 3, size * size - 3]}
    shape = {"height": SIZE, "width": SIZE, "length": len(files)}
    content = {
        "videos": [{"id": 1, "file_names": files, **shape}],
        "categories": [{"id": 1, "name": "square"}],
        "annotations": [
            {"id": 1, "video_id": 1, "category_id": 1, "segmentations": [mask] * len(files)}
        ],
    }
    (root / "things.json").write_text(json.dumps(content))


@pytest.fixture
def root(tmp_path):
    """Whole data: four videos and a folder of three frames, and a config over them."""
    rng = np.random.default_rng(0)
    (tmp_path / "videos").mkdir()
    (tmp_path / "frames").mkdir()
    for name in "abcd":
        with VideoWriter(tmp_path / "videos" / f"{name}.mp4", FPS, (SIZE, SIZE)) as writer:
            for _ in range(FRAMES):
                writer.write(rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8))
    names = [f"{number:05d}.jpg" for number in range(3)]
    for name in names:
        Image.fromarray(rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)).save(
            tmp_path / "frames" / name
        )
    labels = {"jump": 0, "run": 1}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    (tmp_path / "sets.json").write_text(json.dumps({"TINY": labels}))
    write_moments(tmp_path, [(name, 0.5, 1.5, "jump") for name in "abc"])
    write_actions(tmp_path, [("a.mp4", "jump"), ("d.mp4", "run")])
    write_things(tmp_path, names)
    base = str(CONFIGS / "pretrain" / "multitask_1m.py")
    (tmp_path / "mine.py").write_text(CONFIG.format(base=base))
    return tmp_path


def arguments(root, *more):
    config = ["--config", str(root / "mine.py"), "--set", f"data.root={root}"]
    return ["check-data", *config, "--work-dir", str(root / "work"), *more]


def check(root, *more):
    """Findings of a run that must end with status 1, and what it printed stays in capsys."""
    with pytest.raises(SystemExit) as stop:
        main(arguments(root, *more))
    assert stop.value.code == 1
    result = json.loads((root / "work" / "check_data.json").read_text())
    return result, {(f["part"], f["kind"], f["text"]) for f in result["findings"]}


def one(found, part, kind):
    texts = [text for where, what, text in found if (where, what) == (part, kind)]
    assert len(texts) == 1, (part, kind, found)
    return texts[0]


def test_whole_data_pass(root, capsys):
    result = main(arguments(root))
    assert result["findings"] == []
    assert result["videos"] == 5  # a is shared, the folder of frames is one
    assert result["parts"]["moments.train"] == {
        "entries": 3, "videos": 3, "annotations": 0, "missing": 0, "broken": 0,
        "out of range": 0, "left out": 0,
    }  # fmt: skip
    assert "every file is there and whole: 5 videos" in capsys.readouterr().out


def test_every_damage_is_found_in_its_part_and_counted(root, capsys):
    whole = (root / "videos" / "b.mp4").read_bytes()
    (root / "videos" / "b.mp4").write_bytes(whole[: len(whole) // 2])  # truncated
    (root / "videos" / "d.mp4").unlink()
    write_moments(
        root,
        [
            ("a", 0.5, 1.5, "jump"),
            ("a", 1.0, 1.0, "run"),  # no length
            ("b", 0.5, 1.5, "run"),
            ("c", 0.5, 2.3, "jump"),  # within the slack
            ("c", 5.0, 9.0, "jump"),  # behind the end of 2 s
            ("c", 0.0, 1.0, "fly"),  # no such label
            ("c", 1.0, 2.0, "swim"),
        ],
    )
    write_things(root, ["00000.jpg", "00001.jpg", "00009.jpg"])
    result, found = check(root)
    assert "left out" in result["parts"]["moments.train"]
    assert {k: v for k, v in result["parts"]["moments.train"].items() if v} == {
        "entries": 3, "videos": 3, "broken": 1, "out of range": 3, "left out": 1,
    }  # fmt: skip
    assert "b.mp4" in one(found, "moments.train", "broken")
    assert "from 1 to 1 s" in one(found, "moments.train", "left out")
    texts = [text for part, kind, text in found if kind == "out of range"]
    assert sum("a stretch from 5 to 9 s, but the video ends at 2.00 s" in t for t in texts) == 1
    assert sum("label 'fly' is not among the 2 of label2id" in t for t in texts) == 1
    assert sum("line 8: label 'swim'" in t for t in texts) == 1
    assert "d.mp4: No such file" in one(found, "actions.train", "missing")
    assert "00009.jpg: No such file" in one(found, "things.train", "missing")
    out = capsys.readouterr().out
    assert "out of range: 3\n" in out and "missing: 2\n" in out and "broken: 1\n" in out


def test_masks_of_another_size_and_frames_that_differ(root):
    write_things(root, ["00000.jpg", "00001.jpg", "00002.jpg"], size=20)
    _, found = check(root)
    assert "20" in one(found, "things.train", "out of range")
    write_things(root, ["00000.jpg", "00001.jpg", "00002.jpg"])
    Image.new("RGB", (SIZE, 2 * SIZE)).save(root / "frames" / "00002.jpg")
    _, found = check(root)
    assert "images of 2 sizes" in one(found, "things.train", "broken")
    (root / "frames" / "00002.jpg").write_bytes(b"no image")
    _, found = check(root)
    assert "00002.jpg: image cannot be read" in one(found, "things.train", "broken")


def test_a_file_that_its_reader_refuses_is_one_finding_and_the_others_go_on(root):
    (root / "actions.csv").write_text("a.mp4;jump\n")
    (root / "moments.csv").write_text("video_id,start_second,text\n")
    (root / "things.json").unlink()
    result, found = check(root)
    assert "'a.mp4;jump' has no class" in one(found, "actions.train", "annotations")
    assert "no column 'end_second'" in one(found, "moments.train", "annotations")
    assert "things.json" in one(found, "things.train", "annotations")
    assert result["videos"] == 0


def test_quick_looks_at_files_alone(root):
    whole = (root / "videos" / "b.mp4").read_bytes()
    (root / "videos" / "b.mp4").write_bytes(whole[: len(whole) // 2])
    assert main(arguments(root, "--quick"))["findings"] == []
    (root / "videos" / "c.mp4").write_bytes(b"")
    (root / "videos" / "d.mp4").unlink()
    _, found = check(root, "--quick")
    assert "c.mp4: is empty" in one(found, "moments.train", "broken")
    assert "d.mp4: No such file" in one(found, "actions.train", "missing")
    assert len(found) == 2


def test_workers_find_the_same(root):
    (root / "videos" / "a.mp4").write_bytes(b"no video at all")
    alone, _ = check(root)
    shared, _ = check(root, "--workers", "2")
    assert alone["findings"] == shared["findings"]
    assert [f["part"] for f in alone["findings"]] == ["moments.train", "actions.train"]


def test_slack_decides_what_is_past_the_end(root):
    write_moments(root, [("a", 0.5, 2.3, "jump")])
    assert main(arguments(root))["findings"] == []
    _, found = check(root, "--slack", "0.1")
    assert "from 0.5 to 2.3 s" in one(found, "moments.train", "out of range")


def test_a_place_that_is_not_there_is_refused_at_once(root):
    with pytest.raises(UserError, match="data.root: there is no folder /no/such/place"):
        main([*arguments(root), "--set", "data.root=/no/such/place"])
    with pytest.raises(UserError, match="data.root is None, and the data .* are not rendered"):
        main(["check-data", "--config", "multitask_1m"])
    with pytest.raises(UserError, match="--workers 0: give at least 1"):
        main(arguments(root, "--workers", "0"))


def test_action_detection_is_checked_with_its_targets(tmp_path, root):
    thumos = tmp_path / "thumos"
    (thumos / "target_perframe").mkdir(parents=True)
    names = list("abcd")
    info = {"class_names": ["Background", "Jump"], "ignore_index": 2, "metrics": "AP", "fps": 4}
    info |= {"train_session_set": [*names[:2], "e"], "test_session_set": names[2:]}
    (thumos / "data_info.json").write_text(json.dumps({"THUMOS": info}))
    (root / "videos").rename(thumos / "videos")
    steps = {"a": (8, 2), "b": (80, 2), "c": (8, 5)}  # two seconds, twenty, other classes
    for name, shape in steps.items():
        np.save(thumos / "target_perframe" / f"{name}.npy", np.zeros(shape, np.float32))
    options = ["--of", "oad", "--config", "thumos14", "--set", f"data.root={thumos}"]
    with pytest.raises(SystemExit):
        main(["check-data", *options, "--work-dir", str(tmp_path / "work")])
    findings = json.loads((tmp_path / "work" / "check_data.json").read_text())["findings"]
    found = {(f["part"], f["kind"], f["text"]) for f in findings}
    assert "from 0 to 20 s" in one(found, "train_session_set", "out of range")
    assert "e: no video of this name" in one(found, "train_session_set", "missing")
    assert "(8, 5), expected (steps, 2)" in one(found, "test_session_set", "out of range")
    assert "d.npy: no targets" in one(found, "test_session_set", "missing")


def test_long_lists_are_cut_on_the_screen_alone():
    findings = [Finding("t.train", "missing", f"file {number}") for number in range(9)]
    parts = {"t.train": {"entries": 9, "videos": 9, "annotations": 0, "missing": 9, "broken": 0,
                         "out of range": 0, "left out": 0}}  # fmt: skip
    text = to_text({"parts": parts, "findings": [vars(f) for f in findings]})
    assert "missing: 9, the first 5" in text
    assert "file 4" in text and "file 5" not in text
    assert list(walk([Part("empty", ())], quick=True, slack=0.5)) == []
