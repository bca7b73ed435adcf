"""The verb oad short of training: what it refuses beforehand, and what it makes of results."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from backbone.files import write_json
from experiments import oad, preflight
from experiments.comparison import encoder_labels
from experiments.config import UserError, packaged_configs

LOCAL = ("siglip:{0}", "streamformer:{0}")


def room(monkeypatch, disk, memory):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=disk))
    monkeypatch.setattr(preflight, "available_memory", lambda: memory)


@pytest.fixture
def thumos(tmp_path, monkeypatch):
    """A data root of four videos in THUMOS' layout, and a folder that stands for weights.

    The room that THUMOS' features need is there, whatever this machine has left.
    """
    room(monkeypatch, disk=10**12, memory=10**12)
    root = tmp_path / "thumos"
    names = ["train_a", "train_b", "test_a", "test_b"]
    info = {"class_names": ["Background", "Jump", "Ambiguous"], "ignore_index": 2, "metrics": "AP"}
    info |= {"fps": 4, "train_session_set": names[:2], "test_session_set": names[2:]}
    write_json(root / "data_info.json", {"THUMOS": info})
    for part in ("target_perframe", "videos/test", "flow_kinetics_bninception"):
        (root / part).mkdir(parents=True)
    for name in names:
        np.save(root / "target_perframe" / f"{name}.npy", np.zeros((50, 3), np.float32))
        (root / "videos" / "test" / f"{name}.mp4").write_bytes(b"")
    (tmp_path / "weights").mkdir()
    return root


def check(root, tmp_path, *overrides, config="thumos14", encoders=LOCAL, seeds=(0,)):
    resolved = oad.resolve(config, [f"data.root={root}", *overrides])
    labels = encoder_labels([spec.format(tmp_path / "weights") for spec in encoders])
    oad.preflight(resolved, labels, seeds, tmp_path / "work")


@pytest.mark.parametrize("name", packaged_configs("oad"))
def test_packaged_configs_resolve_and_name_no_encoder(name):
    config = oad.resolve(name, [])
    assert {"data", "head", "train", "eval", "stream"} <= set(config)
    assert ("world" in config) == (config["data"]["dataset"] == "MINIWORLD")
    text = json.dumps(config).lower()
    assert "siglip:" not in text and "streamformer:" not in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("head.dims=8", r"unknown key 'head.dims' \(did you mean 'head.dim'"),
        ("head.num_heads=7", "config miniworld: .*num_heads=7"),
        ("world.frame_size=33", "config miniworld: .*frame_size=33"),
    ],
)
def test_a_config_that_cannot_work_is_refused_when_it_is_read(override, message):
    with pytest.raises(UserError, match=message):
        oad.resolve("miniworld", [override])


def test_complete_real_data_pass(thumos, tmp_path):
    check(thumos, tmp_path)


def test_all_that_is_missing_is_named_at_once(thumos, tmp_path):
    (thumos / "videos" / "test" / "train_b.mp4").unlink()
    (thumos / "target_perframe" / "test_a.npy").unlink()
    with pytest.raises(UserError) as refused:
        check(
            thumos,
            tmp_path,
            config="thumos14_flow",
            encoders=("siglip:/no/such", "streamformer:{0}"),
            seeds=(0, 1, 0),
        )
    for problem in (
        "--seeds: 1 (0) given twice",
        "videos lacks 1 (train_b) of 4 videos",
        "target_perframe lacks 1 (test_a) of 4 files",
        "flow_kinetics_bninception lacks 4 (test_a, test_b, train_a, …) of 4 files",
        "--encoders siglip:/no/such: there is no folder /no/such",
    ):
        assert problem in str(refused.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.root=/no/such/place", "data.root: there is no folder /no/such/place"),
        ("data.root=None", "data.root is None, and the data .* not rendered: .*--set data.root=F"),
        ("data.dataset=TVSeries", "has no data set 'TVSeries'; it has THUMOS"),
        (
            "data.test_sets=('val_set',)",
            "THUMOS has no set val_set; it has train_session_set, test",
        ),
    ],
)
def test_wrong_places_and_names_are_refused(thumos, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        check(thumos, tmp_path, override)


def test_ready_features_need_no_videos(thumos, tmp_path):
    for path in (thumos / "videos" / "test").iterdir():
        path.unlink()
    check(thumos, tmp_path, encoders=["features:{0}"])
    with pytest.raises(UserError, match="videos lacks 4"):
        check(thumos, tmp_path)
    with pytest.raises(UserError, match="features:/no/where: there is no folder /no/where"):
        check(thumos, tmp_path, encoders=["features:/no/where"])


def test_labels_mean_released_weights_on_real_data(thumos, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    check(thumos, tmp_path, encoders=("siglip", "streamformer"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = r"siglip:google/siglip-base-patch16-224: .*hub's cache, and HF_HUB_OFFLINE is set"
    with pytest.raises(UserError, match=message):
        check(thumos, tmp_path, encoders=("siglip", "streamformer"))
    with pytest.raises(
        UserError, match="no released weights are called 'image' .*streamformer:/we"
    ):
        check(thumos, tmp_path, encoders=("image", "streamformer:{0}"))


def test_labels_mean_mini_encoders_on_miniworld(tmp_path):
    config, work = oad.resolve("miniworld", []), tmp_path / "work"
    oad.preflight(config, encoder_labels(["siglip", "streamformer"], third_arm=True), [0], work)
    with pytest.raises(UserError, match="no mini encoder is called 'clip'; there are siglip, str"):
        oad.preflight(config, encoder_labels(["clip", "streamformer"]), [0], work)


def test_too_little_disk_and_memory_are_refused(thumos, tmp_path, monkeypatch):
    room(monkeypatch, disk=10**9, memory=10**9)
    with pytest.raises(UserError) as refused:
        check(thumos, tmp_path)
    assert "work: about 7.1 GB are needed, 1.0 GB are free" in str(refused.value)
    assert "of memory are needed, 1.0 GB are available; set data.preload=False" in str(
        refused.value
    )


def test_a_work_dir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    problem = preflight.disk(tmp_path / "file" / "work", 0)[0]
    assert (
        problem == f"--work-dir {tmp_path}/file/work: {tmp_path}/file is no folder that can be "
        "written to"
    )


def test_results_become_points_and_the_first_test_set_leads():
    def scored(value):
        return {
            "online/mAP": value,
            "online/prior": 0.05,
            "online/classes": {"Jump": value, "Spin": value / 2},
            "window/mAP": value - 0.1,
            "window/prior": 0.04,
            "window/classes": {"Jump": 0.1, "Spin": 0.2},
        }

    result = {
        "val": {"val_session_set": scored(0.6)},
        "test": {"test_session_set": scored(0.5), "test_768_session_set": scored(0.4)},
        "parameters": 12,
        "iterations": 34,
    }
    sets = {"val_sets": ["val_session_set"], "test_sets": list(result["test"])}
    outcome = oad.outcome_of(result, sets)
    assert outcome["metrics"] == pytest.approx(
        {
            "online/mAP": 50,
            "window/mAP": 40,
            "online/mAP@test_768": 40,
            "window/mAP@test_768": 30,
        }
    )
    assert outcome["chance"]["window/mAP@test_768"] == pytest.approx(4)
    assert outcome["per_class"] == pytest.approx({"Jump": 50, "Spin": 25})
    assert outcome["validation"] == pytest.approx({"online/mAP": 60, "window/mAP": 50})
