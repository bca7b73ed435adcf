"""Processes of one job: shares of a batch, one gradient, errors that end all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pretrain.launch import average_gradients, gather_shares, own_share, run_processes

ROOT = Path(__file__).resolve().parents[2]

# A job in a file of its own: what a fresh interpreter runs must be importable there.
JOB = """
import json, sys
from pathlib import Path
import torch, torch.distributed as dist
from torch import nn
from pretrain.launch import average_gradients, gather_shares, own_share, run_processes

def model_and_rows():
    torch.manual_seed(0)
    return nn.Linear(3, 5), torch.randn(6, 3)

def loss_of(model, rows):
    embedded = gather_shares(model(own_share(rows)))
    return (embedded @ embedded.T).sigmoid().square().mean()  # every row meets every other

def work(out, fail):
    if fail and dist.get_rank() == 1:
        raise RuntimeError("process 1 cannot go on")
    model, rows = model_and_rows()
    loss = loss_of(model, rows)
    loss.backward()
    average_gradients(model.parameters())
    rank = dist.get_rank() if dist.is_initialized() else 0
    result = {"loss": loss.item(), "weight": model.weight.grad.tolist(),
              "bias": model.bias.grad.tolist(), "threads": torch.get_num_threads(),
              "rows": own_share(rows).tolist()}
    Path(out, f"{rank}.json").write_text(json.dumps(result))

if __name__ == "__main__":
    run_processes(work, sys.argv[1], sys.argv[3] == "fail", processes=int(sys.argv[2]))
"""


def launch(folder: Path, processes: int, fail: bool = False) -> subprocess.CompletedProcess:
    script = folder / "job.py"
    script.write_text(JOB)
    return subprocess.run(
        [sys.executable, script, folder, str(processes), "fail" if fail else "work"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_two_processes_have_the_gradient_of_one_with_the_whole_batch(tmp_path):
    results = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        done = launch(folder, processes)
        assert done.returncode == 0, done.stderr
        results[processes] = [
            json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)
        ]
    whole, (first, second) = results[1][0], results[2]
    assert first["rows"] + second["rows"] == whole["rows"]
    assert first["threads"] == second["threads"] == 1
    for part in (first, second):
        assert part["loss"] == pytest.approx(whole["loss"], rel=1e-6)
        for name in ("weight", "bias"):
            torch.testing.assert_close(torch.tensor(part[name]), torch.tensor(whole[name]))


def test_a_failing_process_ends_the_job_with_its_error(tmp_path):
    done = launch(tmp_path, 2, fail=True)
    assert done.returncode != 0
    assert "process 1 of 2 failed" in done.stderr
    assert done.stderr.strip().endswith("RuntimeError: process 1 cannot go on")


def test_alone_nothing_is_spawned_shared_or_averaged():
    seen = []
    run_processes(seen.append, os.getpid(), processes=1)
    assert seen == [os.getpid()]
    rows, model = torch.randn(3, 2), nn.Linear(2, 2)
    assert own_share(rows) is rows and gather_shares(rows) is rows
    model(rows).sum().backward()
    before = model.weight.grad.clone()
    average_gradients(model.parameters())
    assert torch.equal(model.weight.grad, before)


def test_no_process_is_refused():
    with pytest.raises(ValueError, match="processes=0"):
        run_processes(print, processes=0)
