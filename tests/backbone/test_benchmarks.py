"""The programs that measure run on any machine, and measure what they say."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(program, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / program, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def program(monkeypatch):
    """A program of benchmarks/ as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_gpu_streams_on_a_cpu():
    done = run(
        "gpu_streams.py",
        *("--size", "tiny", "--device", "cpu", "--dtype", "float32", "--window", "8"),
        *("--streams", "1", "3", "--ways", "plain", "compiled", "--backend", "eager"),
        *("--repeats", "3"),
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert [(row["streams"], row["way"]) for row in results["rows"]] == [
        (1, "plain"), (1, "compiled"), (3, "plain"), (3, "compiled"),
    ]  # fmt: skip
    assert all(row["seconds"] > 0 for row in results["rows"])
    # Three layers of 64: (3 + 1 + 3 + 1) * 64² + 2 * 64 * 128 weights, and those of the patches.
    operations = 2 * 16 * (3 * (8 * 64**2 + 2 * 64 * 128) + 192 * 64 + 2 * 3 * 64 * (8 + 16))
    row = results["rows"][0]
    share = operations / row["seconds"] / results["matrix_rate"]
    assert row["share_of_rate"] == pytest.approx(share)


def test_a_cpu_captures_nothing():
    done = run("gpu_streams.py", "--size", "tiny", "--device", "cpu")
    assert done.returncode == 2
    assert "--device cpu captures no graphs; leave 'captured' out of --ways" in done.stderr


def test_a_step_at_several_windows():
    done = run(
        *("streaming_step.py", "--windows", "2", "64", "--layers", "1", "--threads", "1"),
        *("--repeats", "2", "--warm-up", "0"),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [(row["window"], row["layers"], row["limit"]) for row in rows] == [
        (2, 1, None), (64, 1, 1.10),
    ]  # fmt: skip
    assert all(row["ratios"]["step / floor"]["median"] > 0 for row in rows)


def test_too_few_repeats_are_refused_before_the_first(program):
    with pytest.raises(SystemExit, match="--repeats 1: quartiles want 2 or more"):
        program("floor").take_turns({"never": pytest.fail}, repeats=1)


def test_layers_whose_keys_and_values_fit(program):
    fitting = program("streaming_step").layers_that_fit
    layer = 3 * 1024 * 2 * 196 * 768 * 4  # bytes at window 1,024: the step's and both floors'
    assert fitting(1024, streams=1, available=2 * layer) == 1  # a fifth is left to the rest
    assert fitting(1024, streams=1, available=4 * layer) == 3
    assert fitting(16, streams=1, available=4 * layer) == 12
    assert fitting(16, streams=1, available=None) == 12
    with pytest.raises(SystemExit, match=r"--windows 1024: .* a single layer take 8.6 GB, 3.7 GB"):
        fitting(1024, streams=2, available=layer)


def test_a_surveillance_clip(program, tmp_path, make_model):
    encoder = make_model(image_size=32, patch_size=4, temporal_positions="reset")
    encoder.save_pretrained(tmp_path / "encoder")
    done = run(
        *("still_scene.py", "--surveillance", "--encoder", tmp_path / "encoder"),
        *("--frames", "96", "--thresholds", "0", "0.2", "--threads", "1"),
    )
    assert done.returncode == 0, done.stderr
    exact, skipping = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert exact["difference"] < 1e-5
    assert exact["patches_run"] == 1  # a camera's noise changes every pixel
    assert skipping["patches_run"] < 0.8

    write, files = program("still_scene").write_surveillance, []
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        write(tmp_path / f"{name}.mp4", frames=32, size=32, seed=seed)
        files.append((tmp_path / f"{name}.mp4").read_bytes())
    assert files[0] == files[1] != files[2]


def test_a_profile_tells_what_an_update_consists_of(program):
    profiling = program("training_profile")
    watch = profiling.Watch(skip=2, updates=3)
    weight = torch.nn.Parameter(torch.eye(64))
    optimizer = torch.optim.SGD([weight])
    optimizer.register_step_post_hook(watch)
    with pytest.raises(profiling.Finished):
        while watch.done < 100:
            (weight @ weight).softmax(-1)[0].exp().sum().backward()
            optimizer.step()
    assert watch.done == 8
    kinds = {name: profiling.kind_of(name) for name in watch.operators}
    assert kinds["mm"] == "products"
    assert kinds["_softmax"] == kinds["_softmax_backward_data"] == "attention"
    assert kinds["exp"] == kinds["add_"] == "other operators"
    assert watch.seconds > 0
    assert all(share >= 0 for share in watch.shares().values())


def test_a_profile_wants_updates_in_its_own_process(program, monkeypatch):
    profiling = program("training_profile")
    monkeypatch.setattr("experiments.run.main", lambda verb: None)
    with pytest.raises(SystemExit, match="oad: ended after 0 updates in this process; 80 are want"):
        profiling.main(["oad"])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    for _ in range(200):
        optimizer.step()  # watched no more
