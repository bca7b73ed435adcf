"""Windows and videos out of feature files: stored indices, seeds, and files that do not fit."""

import json
import logging

import numpy as np
import pytest
import torch
from mmaction.registry import DATASETS
from mmengine.dataset import default_collate
from torch.utils.data import DataLoader

from integrations.oad import protocols
from integrations.oad.data import DataError, EpochSampler, OadVideos, OadWindows, read_data_info

FACTS = {"encoder": {"kind": "toy"}, "protocol": "clip", "fps": 4.0, "dim": 3}
LENGTHS = {"a": 58, "b": 37, "c": 8}


def write_world(root, lengths=LENGTHS, classes=4, motion=0):
    """Features whose every value is the step's number, targets whose column 1 is."""
    (root / "data" / "target_perframe").mkdir(parents=True)
    (root / "features").mkdir()
    (root / "features" / "features.json").write_text(json.dumps(FACTS))
    for video, length in lengths.items():
        steps = np.arange(length, dtype=np.float32)[:, None]
        np.save(root / "features" / f"{video}.npy", np.repeat(steps, 3, axis=1))
        (root / "features" / f"{video}.json").write_text(json.dumps({**FACTS, "steps": length}))
        target = np.zeros((length, classes), np.float32)
        target[:, 1] = steps[:, 0]
        np.save(root / "data" / "target_perframe" / f"{video}.npy", target)
        if motion:
            (root / "data" / "flow").mkdir(exist_ok=True)
            np.save(root / "data" / "flow" / f"{video}.npy", np.repeat(-steps, motion, axis=1))
    info = {"class_names": [f"c{i}" for i in range(classes)], "num_classes": classes}
    info |= {"ignore_index": 3, "metrics": "AP", "fps": 4, "train_session_set": list(lengths)}
    (root / "data" / "data_info.json").write_text(json.dumps({"TOY": info}))
    return {
        "data_root": str(root / "data"),
        "features": str(root / "features"),
        "dataset": "TOY",
        "session": "train_session_set",
    }


@pytest.fixture
def world(tmp_path):
    return write_world(tmp_path)


def steps_of(item):
    return {
        "inputs": item["inputs"]["visual"][:, 0].astype(int).tolist(),
        "det_target": item["data_samples"]["det_target"][:, 1].astype(int).tolist(),
        "fut_target": item["data_samples"]["fut_target"][:, 1].astype(int).tolist(),
    }


@pytest.mark.golden
def test_windows_equal_the_original(sampling, tmp_path):
    config, stored = sampling
    data = OadWindows(config, **write_world(tmp_path, stored["videos"]))
    videos = list(stored["videos"])
    for draw in stored["train"]:
        data.windows = [
            (index, start)
            for index, (video, offset) in enumerate(zip(videos, draw["offsets"], strict=True))
            for start in protocols.train_windows(stored["videos"][video], config, offset)
        ]
        assert len(data) == len(draw["windows"])
        for item, window in zip(data, draw["windows"], strict=True):
            assert steps_of(item) == {
                "inputs": window["long_indices"] + window["work_indices"],
                "det_target": window["det_target_indices"],
                "fut_target": window["fut_target_indices"],
            }
            masked = np.isneginf(item["inputs"]["padding_mask"])
            assert masked.sum() == window["num_masked"] == masked[: window["num_masked"]].sum()


def test_offsets_are_drawn_from_seed_epoch_and_name(small_config, tmp_path):
    lengths = {f"v{i}": 60 for i in range(20)}
    world = write_world(tmp_path, lengths)
    data = OadWindows(small_config, seed=1, **world)
    offsets = [dict(reversed(data.draw_windows(epoch))) for epoch in range(4)]
    assert {0, small_config.work_steps - 1} <= {o for e in offsets for o in e.values()}
    assert offsets[0] != offsets[1]
    assert len(set(offsets[0].values())) > 1, "videos share one offset"
    again = OadWindows(small_config, seed=1, **world)
    assert again.draw_windows(3) == data.draw_windows(3)
    other = OadWindows(small_config, seed=2, **world)
    assert other.draw_windows(3) != data.draw_windows(3)
    # neither order nor number of videos matters to one of them
    info = read_data_info(world["data_root"], "TOY") | {"train_session_set": ["v7", "v3"]}
    (tmp_path / "data" / "data_info.json").write_text(json.dumps({"TOY": info}))
    few = OadWindows(small_config, seed=1, **world)
    assert dict(reversed(few.draw_windows(2))) == {0: offsets[2][7], 1: offsets[2][3]}


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_are_the_same_with_any_number_of_workers(small_config, world, workers):
    data = OadWindows(small_config, seed=3, **world)
    sampler = EpochSampler(data, seed=3)
    loader = DataLoader(
        data, batch_size=2, sampler=sampler, num_workers=workers, collate_fn=default_collate
    )
    seen = {}
    for epoch in (5, 0, 5):  # as a resumed run would
        sampler.set_epoch(epoch)
        batches = [batch["inputs"]["visual"] for batch in loader]
        assert len(batches) == len(loader) == -(-len(data) // 2)
        seen.setdefault(epoch, []).append(torch.cat(batches))
    assert torch.equal(*seen[5])
    assert seen[5][0].shape != seen[0][0].shape or not torch.equal(seen[5][0], seen[0][0])
    sampler.set_epoch(5)
    expected = sorted(tuple(item["inputs"]["visual"][:, 0]) for item in data)
    assert sorted(tuple(row.tolist()) for row in seen[5][0][:, :, 0]) == expected


def test_iterations_are_counted_over_all_epochs(small_config, world):
    data = OadWindows(small_config, **world)
    sampler = EpochSampler(data)
    loader = DataLoader(data, batch_size=4, sampler=sampler)
    total = 0
    for epoch in range(7):
        sampler.set_epoch(epoch)
        total += len(loader)
    assert data.count_iterations(7, 4) == total


def test_registered_data_sets_are_built_from_configs(small_config, world):
    data = DATASETS.build({"type": "OadWindows", "head": small_config.to_dict(), **world})
    videos = DATASETS.build({"type": "OadVideos", **world})
    assert len(videos) == 3 and data.head == small_config
    assert videos.metainfo["classes"] == ["c0", "c1", "c2", "c3"]
    assert videos[0]["inputs"]["visual"].shape == (58, 3)
    assert videos[0]["data_samples"].target.shape == (58, 4)


@pytest.mark.parametrize("preload", [True, False])
def test_motion_features_are_cut_alike(small_config, tmp_path, preload):
    world = write_world(tmp_path, motion=2)
    data = OadWindows(
        small_config, motion=str(tmp_path / "data" / "flow"), preload=preload, **world
    )
    for item in data:
        assert np.array_equal(item["inputs"]["motion"][:, 0], -item["inputs"]["visual"][:, 0])
        assert item["inputs"]["motion"].dtype == np.float32


def test_features_on_disk_may_be_half_precision(small_config, world, tmp_path):
    path = tmp_path / "features" / "a.npy"
    np.save(path, np.load(path).astype(np.float16))
    for preload in (True, False):
        data = OadWindows(small_config, preload=preload, **world)
        assert {item["inputs"]["visual"].dtype for item in data} == {np.dtype(np.float32)}


def test_short_videos_are_not_trained_on_and_named(small_config, world, caplog):
    with caplog.at_level(logging.WARNING):
        data = OadWindows(small_config, **world)
    assert {video for video, _ in data.windows} == {0, 1}
    assert (
        "1 of 3 videos are shorter than a window of 10 steps and not trained on: c" in caplog.text
    )


def test_a_set_of_short_videos_only_is_refused(small_config, tmp_path):
    world = write_world(tmp_path, {"c": 8, "d": 9})
    with pytest.raises(DataError, match="no video of 'train_session_set' has the 10 steps"):
        OadWindows(small_config, **world)
    assert len(OadVideos(**world)) == 2  # evaluation takes them


def test_lengths_must_agree(tmp_path, world):
    path = tmp_path / "features" / "b.npy"
    np.save(path, np.load(path)[:-2])
    with pytest.raises(DataError, match="b: numbers of steps differ: targets 37, features 35"):
        OadVideos(**world)
    videos = OadVideos(slack=2, **world)
    assert len(videos[1]["inputs"]["visual"]) == len(videos[1]["data_samples"].target) == 35


@pytest.mark.parametrize(
    ("name", "value"), [("encoder", {"kind": "other"}), ("protocol", "stream"), ("fps", 8.0)]
)
def test_mixed_features_are_refused(tmp_path, world, name, value):
    (tmp_path / "features" / "b.json").write_text(json.dumps({**FACTS, name: value}))
    with pytest.raises(DataError, match=f"b: {name} is .*; extract this video again"):
        OadVideos(**world)


def test_features_must_be_what_the_config_asks_for(tmp_path, world):
    with pytest.raises(DataError, match="protocol is 'clip', but the config asks for 'stream'"):
        OadVideos(protocol="stream", **world)
    with pytest.raises(DataError, match="written for 8 steps per second, but TOY has 4"):
        OadVideos(fps=8, **world)
    (tmp_path / "features" / "features.json").write_text(json.dumps({**FACTS, "fps": 6.0}))
    with pytest.raises(DataError, match="fps is 6.0, but the config asks for 4"):
        OadVideos(fps=4, **world)


def test_features_made_elsewhere_need_a_word(tmp_path, world):
    (tmp_path / "features" / "features.json").unlink()
    with pytest.raises(DataError, match=r"has no features.json.* data.foreign"):
        OadVideos(**world)
    assert len(OadVideos(foreign=True, **world)) == 3


@pytest.mark.parametrize("folder", ["features", "data/target_perframe"])
def test_broken_files_are_named(tmp_path, world, folder):
    path = tmp_path / folder / "b.npy"
    good = np.load(path)
    bad = good.copy()
    bad[4] = np.nan
    np.save(path, bad)
    with pytest.raises(DataError, match="b: .* has 1 steps that are not finite, the first is 4"):
        OadVideos(**world)
    np.save(path, good[0])
    with pytest.raises(DataError, match=r"b: .* is \(\d,\), expected \(steps, width\)"):
        OadVideos(**world)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match="b: .*b.npy cannot be read"):
        OadVideos(**world)
    path.unlink()
    with pytest.raises(DataError, match="b: .*b.npy does not exist"):
        OadVideos(**world)


def test_unknown_names_are_answered_with_known_ones(world):
    with pytest.raises(DataError, match="no data set 'THUMOS'; it has TOY"):
        OadVideos(**{**world, "dataset": "THUMOS"})
    with pytest.raises(DataError, match="no set 'test'; it has train_session_set"):
        OadVideos(**{**world, "session": "test"})


def test_packaged_lists_serve_where_the_folder_has_none(tmp_path):
    entry = read_data_info(tmp_path, "THUMOS")
    assert (len(entry["train_session_set"]), len(entry["test_session_set"])) == (200, 213)
    assert entry["class_names"][21] == "Ambiguous" and entry["ignore_index"] == 21
