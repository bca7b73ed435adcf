"""Several processes, killed processes: the same weights as one process that is left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain import train
from pretrain.objectives import OBJECTIVES

ROOT = Path(__file__).parents[2]

# Jobs in a file, one after the other; "stop" is (rank, update): that rank alone gets a SIGTERM once
# so many updates are done, and the job is then run again.
SCRIPT = """
import json, os, signal, sys
from pretrain import PretrainConfig, train
from pretrain.sampling import RoundSampler
from pretrain.train import Interrupted

def advance(self, value):
    self.__dict__["round"] = value
    if stop == [int(os.environ.get("RANK", 0)), value]:
        os.kill(os.getpid(), signal.SIGTERM)

RoundSampler.round = property(lambda self: self.__dict__["round"], advance)
for job in json.load(open(sys.argv[1])):
    config, stop = PretrainConfig.from_dict(job["config"]), job["stop"]
    if stop:
        try:
            train(config, progress=False)
        except Interrupted:
            stop = None
        else:
            sys.exit("the run was not interrupted")
    train(config, progress=False)
"""


def launch(folder, jobs, processes):
    """A running ``torchrun`` of jobs: configs, or pairs of a config and where to stop it."""
    jobs = [job if isinstance(job, tuple) else (job, None) for job in jobs]
    content = [{"config": config.to_dict(), "stop": stop} for config, stop in jobs]
    (folder / "jobs.json").write_text(json.dumps(content))
    (folder / "job.py").write_text(SCRIPT)
    run = [sys.executable]
    if processes > 1:
        run += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    return subprocess.Popen(
        [*run, str(folder / "job.py"), str(folder / "jobs.json")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that a test can end all of its processes
    )


def finish(process):
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output[-3000:]


def weights_of(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_near(one, other, tolerance=1e-5):
    one, other = weights_of(one), weights_of(other)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=tolerance, msg=name)


def updates_of(folder):
    log = Path(folder) / "log.jsonl"
    return len(log.read_text().splitlines()) if log.is_file() else 0


def wait_for(updates, folder, process):
    deadline = time.monotonic() + 600  # a busy machine takes minutes to import torch
    while updates_of(folder) < updates:
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline, f"no {updates} updates in {folder}"
        time.sleep(0.01)


RELEASED = {
    "retrieval": {"model": {"mask_duplicates": False}},
    "grounding": {"task": {"reduction": "sample_sum"}},
    "instance_segmentation": {"task": {"spatial_loss": "softmax"}},
    "referring_segmentation": {"task": {"spatial_loss": "softmax"}},
}


def test_the_tasks_of_these_tests_are_all_there_are(six_tasks):
    assert set(six_tasks) == set(OBJECTIVES)


@pytest.mark.job
def test_two_processes_train_as_one_with_the_double_batch(config, six_tasks, tmp_path):
    # Each rank has half of every global batch, and half of the videos fill their clips only in
    # part. A large eps keeps Adam from blowing up the rounding of gradients that are truly zero.
    def pair(name, tasks, **changes):
        common = {"updates": 3, "optim__eps": 1e-3, "optim__clip_norm": 1.0} | changes
        return [
            config(tasks=tasks, output=str(tmp_path / f"{name}-{n}"), batch_size=8 // n, **common)
            for n in (1, 2)
        ]

    pairs = {name: pair(name, {name: task}) for name, task in six_tasks.items()}
    for name, change in RELEASED.items():
        model = {f"model__{key}": value for key, value in change.get("model", {}).items()}
        tasks = {name: six_tasks[name] | change.get("task", {})}
        pairs[f"{name}-released"] = pair(f"{name}-released", tasks, **model)
    pairs["all"] = pair("all", six_tasks, model__shared_scale=False, model__lora_rank=2)
    pairs["joint"] = pair("joint", six_tasks, joint_rounds=True)
    apart = pair("apart", six_tasks)[0]
    running = launch(tmp_path, [two for _, two in pairs.values()], 2)
    for one, _ in pairs.values():
        train(one, progress=False)
    finish(running)
    for one, two in pairs.values():
        assert_near(one.output, two.output)
    assert_near(train(apart, progress=False), pairs["joint"][0].output)


@pytest.mark.job
def test_shards_train_as_one_process_and_resume_exactly(config, six_tasks, tmp_path):
    def sharded(name, **changes):
        common = {"updates": 4, "optim__eps": 1e-3, "optim__clip_norm": 1.0, "eval_every": 3}
        common |= {"model__lora_rank": 2, "model__gradient_checkpointing": True} | changes
        return config(tasks=tasks, output=str(tmp_path / name), **common)

    names = ("recognition", "instance_segmentation")
    tasks = {name: six_tasks[name] | {"val": six_tasks[name]["train"]} for name in names}
    straight = sharded("straight", sharded=True)
    parted = sharded("parted", sharded=True, checkpoint_every=0)
    running = launch(tmp_path, [straight, (parted, (1, 3))], 2)
    one = train(sharded("one", batch_size=8), progress=False)
    finish(running)
    assert_near(one, straight.output)
    assert_near(straight.output, parted.output, tolerance=0)
    alone, split = (
        json.loads((Path(folder) / "metrics.json").read_text())["zero_shot"]
        for folder in (one, straight.output)
    )
    for name in names:
        assert split[name] == pytest.approx(alone[name]), name
    saved = [
        load_file(Path(folder) / "checkpoints/00000004/model.safetensors")
        for folder in (one, straight.output)
    ]
    sizes, whole = ({name: value.numel() for name, value in part.items()} for part in saved)
    assert sizes == whole


@pytest.mark.job
def test_a_killed_run_ends_in_the_very_same_weights(config, six_tasks, tmp_path):
    # Killed at random moments, twice, with a worker that reads ahead.
    def run(name):
        return config(
            tasks=six_tasks, output=str(tmp_path / name), updates=40, batch_size=1, num_workers=1
        )

    chance = random.Random()
    for _ in range(2):
        process = launch(tmp_path, [run("killed")], 1)
        reached = updates_of(tmp_path / "killed")
        wait_for(reached + chance.randint(1, 6), tmp_path / "killed", process)
        time.sleep(chance.uniform(0, 0.15))
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
        process.stdout.close()
    assert not (tmp_path / "killed/metrics.json").exists()
    train(run("killed"), progress=False)
    assert_near(train(run("straight"), progress=False), tmp_path / "killed", tolerance=0)


@pytest.mark.job
def test_sigterm_under_torchrun_saves_all_processes_at_one_update(config, six_tasks, tmp_path):
    tasks = {name: six_tasks[name] for name in ("recognition", "referring_segmentation")}

    def run(name, updates):
        return config(
            tasks=tasks,
            output=str(tmp_path / name),
            updates=updates,
            batch_size=1,
            num_workers=1,
            checkpoint_every=0,
        )

    process = launch(tmp_path, [run("told", 40)], 2)
    wait_for(5, tmp_path / "told", process)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on, to the workers of data as well
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    saved = sorted((tmp_path / "told/checkpoints").iterdir())
    assert len(saved) == 1, output[-3000:]
    assert int(saved[0].name) == updates_of(tmp_path / "told") < 40
    assert output.count("told to stop") >= 1
    assert "Error" not in output.replace("ChildFailedError", ""), output[-3000:]
    finish(launch(tmp_path, [run("told", 40), run("straight", 40)], 2))
    assert_near(tmp_path / "straight", tmp_path / "told", tolerance=0)
