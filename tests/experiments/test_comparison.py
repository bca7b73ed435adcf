"""The controlled comparison: equal but for the encoder, resumed, and never mixed."""

import importlib
import json
import logging
import os

import pytest

from backbone.files import write_json
from experiments.comparison import (
    ComparisonError,
    carry_out,
    compare_as_run,
    config_difference,
    encoder_labels,
    plan,
    run_all,
)
from experiments.config import UserError, digest

ENCODERS = {
    "siglip": {"spec": "siglip:/a", "settings": {"kind": "siglip", "weights": "1a"}},
    "streamformer": {
        "spec": "streamformer:/b",
        "settings": {"kind": "streamformer", "weights": "2b", "window": 64},
    },
}
CONFIG = {"train": {"epochs": 3, "betas": (0.9, 0.99)}, "data": {"root": None}}


class Task:
    """Counts the runs; each metric tells which run it came from."""

    def __init__(self):
        self.calls = []

    def __call__(self, config, folder):
        self.calls.append((config["encoder"]["spec"], config["seed"]))
        return {"metrics": {"online/mAP": len(config["encoder"]["spec"]) + config["seed"]}}


def test_every_encoder_and_seed_runs_in_its_own_folder(tmp_path):
    task = Task()
    outcomes, difference = run_all(plan(CONFIG, ENCODERS, [0, 1], tmp_path), task)
    assert task.calls == [
        ("siglip:/a", 0),
        ("streamformer:/b", 0),
        ("siglip:/a", 1),
        ("streamformer:/b", 1),
    ]
    assert outcomes["streamformer"][1]["metrics"]["online/mAP"] == len("streamformer:/b") + 1
    assert difference == [
        "encoder.settings.kind",
        "encoder.settings.weights",
        "encoder.settings.window",
        "encoder.spec",
    ]
    result = json.loads((tmp_path / "siglip" / "seed1" / "result.json").read_text())
    config = json.loads((tmp_path / "siglip" / "seed1" / "config.json").read_text())
    assert result["digest"] == digest(config)
    assert config["seed"] == 1 and config["train"]["betas"] == [0.9, 0.99]


ABROAD = """
import os
def work(config, folder):
    if config["seed"] == 9:
        raise RuntimeError("seed 9 fails")
    return {"metrics": {"online/mAP": config["seed"]}, "process": os.getpid()}
"""


def test_runs_share_the_cores_and_an_error_in_one_comes_back(tmp_path, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    (tmp_path / "abroad.py").write_text(ABROAD)
    monkeypatch.syspath_prepend(tmp_path)
    work = importlib.import_module("abroad").work
    outcomes, _ = run_all(plan(CONFIG, ENCODERS, [0, 1], tmp_path), work, jobs=2)
    found = {label: [run["metrics"]["online/mAP"] for run in by_seed.values()]
             for label, by_seed in outcomes.items()}  # fmt: skip
    assert found == {"siglip": [0, 1], "streamformer": [0, 1]}
    assert os.getpid() not in {run["process"] for by in outcomes.values() for run in by.values()}
    with pytest.raises(RuntimeError, match="seed 9 fails"):
        run_all(plan(CONFIG, ENCODERS, [0, 9], tmp_path), work, jobs=2)
    assert "TQDM_DISABLE" not in os.environ


def test_finished_runs_are_taken_from_earlier_calls(tmp_path):
    first = run_all(plan(CONFIG, ENCODERS, [0], tmp_path), Task())
    task = Task()
    assert run_all(plan(CONFIG, ENCODERS, [0], tmp_path), task) == first
    assert task.calls == []
    run_all(plan(CONFIG, ENCODERS, [0, 7], tmp_path), task)
    assert [seed for _, seed in task.calls] == [7, 7]


def test_an_interrupted_run_is_called_again_in_its_folder(tmp_path):
    def interrupted(config, folder):
        (folder / "checkpoint").write_text("half way")
        raise KeyboardInterrupt

    runs = plan(CONFIG, ENCODERS, [0], tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_all(runs, interrupted)

    def resumed(config, folder):
        found = folder / "checkpoint"
        return {"metrics": {"resumed": float(found.exists())}}

    outcomes, _ = run_all(runs, resumed)
    assert outcomes["siglip"][0]["metrics"]["resumed"] == 1
    assert outcomes["streamformer"][0]["metrics"]["resumed"] == 0  # it had not begun


def test_a_run_of_another_config_is_set_aside_and_the_difference_named(tmp_path, caplog):
    run_all(plan(CONFIG, ENCODERS, [0], tmp_path), Task())
    changed = {**CONFIG, "train": {**CONFIG["train"], "epochs": 5}}
    task = Task()
    with caplog.at_level(logging.WARNING):
        run_all(plan(changed, ENCODERS, [0], tmp_path), task)
    assert len(task.calls) == 2
    assert "train.epochs is 3 (there), 5 (now)" in caplog.text
    aside = [path for path in (tmp_path / "siglip").iterdir() if path.name.startswith("seed0.")]
    assert len(aside) == 1
    assert json.loads((aside[0] / "config.json").read_text())["train"]["epochs"] == 3
    run_all(plan(CONFIG, ENCODERS, [0], tmp_path), task)  # and back: nothing is lost or reused
    run_all(plan(changed, ENCODERS, [0], tmp_path), task)
    assert len(task.calls) == 6
    assert len(list((tmp_path / "siglip").glob("seed0.*"))) == 3


def test_retrained_weights_make_a_run_stale(tmp_path):
    run_all(plan(CONFIG, ENCODERS, [0], tmp_path), Task())
    siglip = {**ENCODERS["siglip"], "settings": {"kind": "siglip", "weights": "3c"}}
    task = Task()
    run_all(plan(CONFIG, {**ENCODERS, "siglip": siglip}, [0], tmp_path), task)
    assert task.calls == [("siglip:/a", 0)]


def test_a_result_that_belongs_to_another_config_is_refused(tmp_path):
    runs = plan(CONFIG, ENCODERS, [0], tmp_path)
    run_all(runs, Task())
    path = runs[0].folder / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "digest": "0" * 16}))
    with pytest.raises(ComparisonError, match=r"seed0/result.json does not belong .* 0000000"):
        run_all(runs, Task())


def test_a_truncated_result_names_its_file(tmp_path):
    runs = plan(CONFIG, ENCODERS, [0], tmp_path)
    run_all(runs, Task())
    path = runs[0].folder / "result.json"
    path.write_text(path.read_text()[:20])
    with pytest.raises(ValueError, match=r"result.json is not JSON .*delete it and run again"):
        run_all(runs, Task())


def test_runs_are_compared_as_they_ran(tmp_path):
    runs = plan(CONFIG, ENCODERS, [0], tmp_path)
    for run in runs:
        found = {"train": {"lr": 1}, "encoder": {"dim": len(run.label)}, "features": {"fps": 4}}
        write_json(run.folder / "resolved.json", found)
    compare_as_run(runs)
    write_json(run.folder / "resolved.json", {**found, "train": {"lr": 2}, "features": {"fps": 8}})
    with pytest.raises(ComparisonError, match=r"features.fps is 4 \(siglip\), 8 .*; train.lr is 1"):
        compare_as_run(runs)


@pytest.mark.parametrize("slip", [0, 1])
def test_carrying_out_plans_runs_and_compares(tmp_path, slip):
    def work(config, folder):
        found = {"train": {"lr": slip * len(config["encoder"]["spec"])}}
        write_json(folder / "resolved.json", found)
        return Task()(config, folder)

    config = {**CONFIG, "train": {"threads": None}}
    if slip:
        with pytest.raises(ComparisonError, match=r"train.lr is 9 \(siglip\), 15 \(streamformer\)"):
            carry_out(config, ENCODERS, [0, 1], tmp_path, work, "cpu")
        return
    runs, outcomes, difference = carry_out(config, ENCODERS, [0, 1], tmp_path, work, "cpu")
    assert runs == plan(config, ENCODERS, [0, 1], tmp_path)
    assert (outcomes, difference) == run_all(runs, Task())


@pytest.mark.parametrize("key", ["encoders", "encoder_size", "train"])
def test_any_other_difference_is_refused_before_anything_runs(tmp_path, key):
    runs = plan(CONFIG, ENCODERS, [0], tmp_path)
    runs[1].config[key] = {"lr": 1}
    task = Task()
    with pytest.raises(ComparisonError, match=rf"{key}.lr is '\(absent\)' \(siglip\), 1 \(streamf"):
        run_all(runs, task)
    assert task.calls == []


def test_config_difference_of_three_lists_what_differs_in_any():
    configs = {
        "a": {"train": 1, "encoder": {"spec": "x", "size": 8}},
        "b": {"train": 1, "encoder": {"spec": "x", "size": 8}},
        "c": {"train": 1, "encoder": {"spec": "y", "size": 8}},
    }
    assert config_difference(configs) == ["encoder.spec"]
    assert config_difference({"a": configs["a"], "b": configs["b"]}) == []


def test_a_config_may_not_name_an_encoder(tmp_path):
    with pytest.raises(UserError, match="the config names an encoder .*use --encoders"):
        plan({**CONFIG, "encoder": "siglip:/a"}, ENCODERS, [0], tmp_path)


def test_labels_of_encoder_specs():
    assert encoder_labels(["siglip", "streamformer"]) == {
        "siglip": "siglip",
        "streamformer": "streamformer",
    }
    assert encoder_labels(["siglip:a/b", "streamformer:/x/one/", "streamformer:/x/two"]) == {
        "siglip": "siglip:a/b",
        "streamformer-one": "streamformer:/x/one/",
        "streamformer-two": "streamformer:/x/two",
    }
    with pytest.raises(UserError, match="would both be called 'siglip-a'"):
        encoder_labels(["siglip:/x/a", "siglip:/y/a"])
    with pytest.raises(UserError, match="'siglip' and 'siglip' would both be called 'siglip'"):
        encoder_labels(["siglip", "siglip"])
