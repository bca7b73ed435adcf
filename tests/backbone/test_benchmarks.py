"""The program that measures GPUs runs without one too, and counts what a frame takes rightly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu_streams.py", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_gpu_streams_on_a_cpu():
    done = run(
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
    done = run("--size", "tiny", "--device", "cpu")
    assert done.returncode == 2
    assert "--device cpu captures no graphs; leave 'captured' out of --ways" in done.stderr
