"""Readers, decoding, augmentation, batches: what comes in, what is refused, what is counted."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from pretrain.datasets import (
    Annotations,
    Draw,
    Entry,
    Segment,
    VideoDataset,
    collate,
    read_captions,
    read_index,
    read_kinetics,
    read_localization,
)
from pretrain.datasets.augment import Augmentation, resize_short_side
from pretrain.datasets.decode import ClipError, ClipReader, FailureLedger, FrameStore
from pretrain.datasets.localization import frame_labels
from pretrain.datasets.tables import AnnotationError

HEAD = "video_id,start_second,end_second,text,relevant_windows,dataset\n"


@pytest.fixture
def files(tmp_path):
    """Write files by keyword: a dot in the name becomes the suffix's."""

    def write(**contents):
        paths = []
        for name, content in contents.items():
            path = tmp_path / name.replace("_", ".")
            path.write_text(content if isinstance(content, str) else json.dumps(content))
            paths.append(path)
        return paths

    return write


# -- readers --------------------------------------------------------------------------------------


def test_kinetics_lists_names_and_ids(files):
    rows, labels = files(train_csv='a/x.mp4,"ride, fast"\nb/y.mp4,1\n', label2id_json={
        "swim": 1, "ride, fast": 0})  # fmt: skip
    read = read_kinetics(rows, labels, "/videos")
    assert read.label_sets == {"Kinetics": ("ride, fast", "swim")}
    assert [(str(e.video), e.labels) for e in read.entries] == [
        ("/videos/a/x.mp4", (0,)),
        ("/videos/b/y.mp4", (1,)),
    ]
    (spaced,) = files(ssv2_csv="1.webm 1\n")
    assert read_kinetics(spaced, labels, "/v", "SSV2", " ").entries[0].labels == (1,)


def test_localization_gathers_the_rows_of_a_video(files):
    rows, labels = files(
        train_csv=HEAD
        + 'v1,0.5,3.0,run,"[[0.5, 3.0]]",A\n'
        + 'v1,2,20,jump,"[[2, 4], [10, 20]]",A\n'
        + 'v1,0.5,3.0,run,"[]",A\n'  # the same once more
        + "v2,1,2,run,[],HACS\n",
        label2id_json={"A": {"run": 0, "jump": 1}, "HACS": {"run": 0}},
    )
    read = read_localization(rows, labels, {"A": "/a", "HACS": "/h"})
    first, second = read.entries
    assert first.segments == (Segment(0, 0.5, 3), Segment(1, 2, 4), Segment(1, 10, 20))
    assert (str(first.video), str(second.video)) == ("/a/v1.mp4", "/h/v_v2.mp4")
    assert (first.label_set, second.label_set) == ("A", "HACS")


def test_stretches_without_length_are_left_out_and_reported(files, caplog):
    rows, labels = files(
        train_csv=HEAD + "v1,3,3,run,[],A\nv1,5,4,run,[],A\nv1,1,2,run,[],A\n",
        label2id_json={"A": {"run": 0}},
    )
    read = read_localization(rows, labels, "/a")
    assert read.entries[0].segments == (Segment(0, 1, 2),)
    assert read.left_out == ("line 2: v1 from 3 to 3 s", "line 3: v1 from 5 to 4 s")
    assert "left out 2 rows" in caplog.text


def test_frames_carry_every_label_whose_stretch_covers_them():
    segments = (Segment(0, 0.5, 1.0), Segment(2, 1.0, 1.25), Segment(0, 2.0, 3.0))
    holds = frame_labels(segments, np.arange(9) / 4, 3)
    assert [tuple(np.flatnonzero(row)) for row in holds] == [
        (), (), (0,), (0,), (0, 2), (2,), (), (), (0,)]  # fmt: skip


@pytest.mark.golden
def test_frame_labels_equal_the_released_ones(golden):
    stored = json.loads((golden / "pretraining/sampling.json").read_text())
    for case in stored["grounding_localization"]:
        if case["sample_type"] != "uniform":
            continue
        windows = case["relevant_windows"]
        if len(windows) < 2:
            windows = [[case["start"], case["end"]]]
        segments = tuple(Segment(0, *window) for window in windows)
        for draw in (case["lo"], case["hi"]):
            holds = frame_labels(segments, np.array(draw["indices"]) / case["fps"], 1)[:, 0]
            background = -1 if case["task"] == "localization" else 0
            assert holds.tolist() == [label != background for label in draw["labels"]]


def test_caption_tables_and_their_file_names(files):
    (rows,) = files(
        train_csv="video_id,text,dataset\n"
        + "v1,\"['one', 'two']\",MSRVTT\nv2,['x'],LSMDC\nv3,plain words,WebVid\n"
        + 'v4,"[\'\', \' \']",MSRVTT\nv5.webm,x,DiDeMo\n'
    )
    read = read_captions(rows, "/v")
    assert [e.video.name for e in read.entries] == ["v1.mp4", "v2.avi", "v3.mp4", "v5.webm"]
    assert [e.captions for e in read.entries][:3] == [("one", "two"), ("x",), ("plain words",)]
    assert read.entries[3].end == 30.0
    assert read.left_out == ("line 5: v4 has no caption",)


def test_an_index_gives_one_split(files):
    lines = [{"id": n, "split": s, "captions": ["c"]} for n, s in [("a", "train"), ("b", "val")]]
    (index,) = files(index_jsonl="\n".join(map(json.dumps, lines)))
    assert [e.video.name for e in read_index(index, "/v", "val").entries] == ["b.mp4"]
    with pytest.raises(AnnotationError, match="split 'test'; splits are 'train', 'val'"):
        read_index(index, "/v", "test")


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        (HEAD + "v,0,1,fly,[],A\n", {"A": {"run": 0}}, "line 2: label 'fly' is not among the 1"),
        (HEAD + "v,0,1,run,[],B\n", {"A": {"run": 0}}, "line 2: data set 'B' is not in"),
        (HEAD + "v,0,one,run,[],A\n", {"A": {"run": 0}}, "line 2: end_second='one' is no number"),
        (HEAD + "v,0,1,run,[1,A\n", {"A": {"run": 0}}, "line 2: relevant_windows='.1' is no lit"),
        (HEAD + 'v,0,1,run,"[1, 2]",A\n', {"A": {"run": 0}}, r"must hold pairs \[start, end\]"),
        (HEAD, {"A": {"run": 1}}, r"label2id.json, A: 1 labels need the ids 0 to 0.*\[1\]"),
        ("video_id,text\n", {"A": {}}, "no column 'start_second', 'end_second', 'relevant_wi"),
        ("", {"A": {}}, "the header has nothing"),
    ],
)
def test_localization_tables_that_lie_are_refused(files, rows, labels, message):
    annotations, label2id = files(train_csv=rows, label2id_json=labels)
    with pytest.raises(AnnotationError, match=message):
        read_localization(annotations, label2id, "/v")


def test_other_tables_that_lie_are_refused(files):
    labels, alone, unknown, broken, index = files(
        label2id_json={"run": 0},
        a_csv="x.mp4\n",
        b_csv="x.mp4,fly\n",
        c_json="{",
        d_jsonl='{"id": 1}',
    )
    with pytest.raises(AnnotationError, match="line 1: 'x.mp4' has no class"):
        read_kinetics(alone, labels, "/v")
    with pytest.raises(AnnotationError, match="b.csv, line 1: label 'fly'"):
        read_kinetics(unknown, labels, "/v")
    with pytest.raises(AnnotationError, match="c.json: is not JSON"):
        read_kinetics(unknown, broken, "/v")
    with pytest.raises(AnnotationError, match="line 1: no field 'split', 'captions'; "):
        read_index(index, "/v", "train")


def test_a_data_set_without_root_is_named(files):
    (rows,) = files(train_csv="video_id,text,dataset\nv,x,LSMDC\n")
    with pytest.raises(AnnotationError, match="'LSMDC', but roots are given only for 'MSVD'"):
        read_captions(rows, {"MSVD": "/v"})


# -- clips ----------------------------------------------------------------------------------------


def read_clip(world, number=0, num_frames=8, rng=None, **changes):
    reader = ClipReader(**{"size": 32, "sampling": "consecutive"} | changes)
    clip = reader.read(Entry(world / f"videos/clip_{number:02d}.mp4"), num_frames, rng)
    return clip.frames, clip.times


@pytest.mark.parametrize("sampling", ["consecutive", "segments"])
@pytest.mark.parametrize("size", [32, 16])
def test_the_store_gives_the_same_clips_as_the_file(world, sampling, size):
    for seed in range(3):
        kept, times = read_clip(
            world, rng=np.random.default_rng(seed), sampling=sampling, size=size,
            store=FrameStore(size),
        )  # fmt: skip
        fresh, fresh_times = read_clip(
            world, rng=np.random.default_rng(seed), sampling=sampling, size=size
        )
        assert kept.shape == (8, 3, size, size)
        assert torch.equal(kept, fresh)
        np.testing.assert_allclose(times, fresh_times)


def test_clips_longer_than_the_video_are_short_and_know_it(world):
    frames, times = read_clip(world, num_frames=48)
    assert len(frames) == len(times) == 20
    reader = ClipReader(size=32, sampling="consecutive", store=FrameStore(32))
    entry = Entry(world / "videos/clip_00.mp4")
    assert reader.lasts(entry, 20)
    assert not reader.lasts(entry, 21)
    assert not reader.lasts(Entry(world / "videos/none.mp4"), 1)
    assert ClipReader(size=32, sampling="segments").lasts(entry, 48)


def test_the_end_of_an_entry_hides_what_follows(world):
    entry = Entry(world / "videos/clip_00.mp4", end=1.0)
    for store in (None, FrameStore(32)):
        reader = ClipReader(size=32, sampling="segments", store=store)
        times = [reader.read(entry, 8, np.random.default_rng(s)).times for s in range(20)]
        assert np.max(times) < 1.0


def test_a_seed_decides_everything_about_a_clip(world):
    entries = Annotations([Entry(world / "videos/clip_00.mp4", captions=("one", "two", "three"))])
    reader = ClipReader(
        size=16, sampling="segments", augment=Augmentation("strong", flip=True)
    )
    dataset = VideoDataset(entries, reader)
    before = torch.get_rng_state()
    first = dataset[Draw(0, 8, 5)]
    assert torch.equal(before, torch.get_rng_state())
    again, other = dataset[Draw(0, 8, 5)], dataset[Draw(0, 8, 6)]
    assert torch.equal(first.frames, again.frames)
    assert first.caption == again.caption
    assert not torch.equal(first.frames, other.frames)
    assert {dataset[Draw(0, 2, seed)].caption for seed in range(20)} == {"one", "two", "three"}
    assert dataset[Draw(0, 2)].caption == "one"  # validation


def test_an_augmentation_treats_all_frames_alike():
    frames = torch.randint(0, 255, (1, 3, 40, 60), dtype=torch.uint8).expand(6, -1, -1, -1)
    for kind in ("none", "crop", "strong"):
        seen = set()
        for seed in range(8):
            out = Augmentation(kind, flip=True)(frames, 32, np.random.default_rng(seed))
            assert out.shape == (6, 3, 32, 32)
            assert out.dtype == torch.uint8
            assert (out == out[:1]).all()
            seen.add(out[0].numpy().tobytes())
        assert len(seen) == 2 if kind == "none" else len(seen) > 4


@pytest.mark.golden
def test_short_sides_round_as_released(golden):
    stored = json.loads((golden / "pretraining/sampling.json").read_text())
    for case in stored["short_side_resize"]:
        frames = torch.zeros(1, 1, case["h"], case["w"], dtype=torch.uint8)
        assert list(resize_short_side(frames, case["size"]).shape[-2:]) == case["out_hw"]


# -- batches and failures -------------------------------------------------------------------------


def test_a_batch_pads_short_clips_and_marks_lost_ones(world, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    paths = [world / "videos/clip_00.mp4", broken, world / "videos/clip_01.mp4"]
    dataset = VideoDataset(
        Annotations([Entry(path) for path in paths]), ClipReader(32, "consecutive")
    )
    batch = collate([dataset[Draw(0, 24)], dataset[Draw(1, 24)], dataset[Draw(2, 8)]], 32)
    assert batch.frames.shape == (3, 20, 3, 32, 32)
    assert batch.valid.sum(1).tolist() == [20, 0, 8]
    assert not batch.frames[1].any()
    assert (batch.frames[2, 8:] == batch.frames[2, 7]).all()
    assert len(batch.errors) == 1
    assert "broken.mp4" in batch.errors[0]
    lost = collate([dataset[Draw(1, 24)]], 32)
    assert lost.frames.shape == (1, 1, 3, 32, 32)


def test_a_store_does_not_open_a_broken_video_twice(tmp_path):
    path, store = tmp_path / "late.mp4", FrameStore(32)
    for _ in range(2):
        with pytest.raises(ClipError, match="late.mp4"):
            store.get(path)
        path.write_bytes(b"something")


def test_the_ledger_forgives_a_share_and_names_files_once(caplog):
    ledger = FailureLedger(0.1, grace=2)
    ledger.record(10, ["a.mp4: gone"])
    ledger.record(10, ["a.mp4: gone"])
    ledger.record(20, ["b.mp4: gone"])
    assert caplog.text.count("a.mp4") == 1
    resumed = FailureLedger(0.1, grace=2)
    resumed.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    message = "6 of 41 clips could not be read, more than the allowed share of 0.1: a.mp4"
    for book in (ledger, resumed):
        with pytest.raises(ClipError, match=message):
            book.record(1, ["c.mp4: gone"] * 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(ClipReader, 32, "random"), "no sampling rule 'random'; known: segments"),
        (partial(ClipReader, 32, "consecutive", stride=0), "stride=0 must be at least 1"),
        (partial(Augmentation, "mirror"), "no augmentation 'mirror'; known: none, crop, strong"),
        (partial(VideoDataset, Annotations([]), ClipReader(32, "blocks")), "has no entries"),
    ],
)
def test_settings_that_make_no_sense_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
