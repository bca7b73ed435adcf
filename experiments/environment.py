"""What ran where: versions, machine, commit. Goes into every report and into issue reports.

Also what a job may use of the machine: device, cores, threads.

``python experiments/run.py env`` must work exactly where nothing else does, so versions are read
from the installed metadata without importing the packages, and a probe that fails becomes a value
that says so.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = {  # what a result may depend on: name in the report -> distribution
    "torch": "torch",
    "torchvision": "torchvision",
    "transformers": "transformers",
    "peft": "peft",
    "mmengine": "mmengine",
    "mmaction": "mmaction2",
    "numpy": "numpy",
    "av": "av",
    "detectron2": "detectron2",
    "lmms_eval": "lmms-eval",
    "streamformer": "streamformer",
}

ABOUT = "Never fails: what cannot be found out is shown as such."
EXAMPLES = "  python experiments/run.py env"


def add_arguments(parser: Any) -> None:
    """The verb takes no arguments."""


def run(args: Any) -> dict[str, Any]:
    """The verb ``env``: print the environment as a Markdown table."""
    found = environment()
    print(to_markdown(found))  # noqa: T201 (the verb's result)
    return found


def environment() -> dict[str, Any]:
    """Versions, machine and commit as JSON values; None where something is absent. Never raises."""
    probes: dict[str, Callable[[], Any]] = {
        "date": lambda: datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": _commit,
        "python": platform.python_version,
        **{name: lambda d=dist: _version(d) for name, dist in PACKAGES.items()},
        "platform": platform.platform,
        "cpu": _cpu,
        "cores": cores,
        "threads": _threads,
        "gpu": _gpu,
    }
    return {name: _try(probe) for name, probe in probes.items()}


def choose_device(name: str) -> str:
    """Make ``auto`` the CPU, or the GPU where there is one, under torchrun this process's own."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return name


def cores() -> int:
    """The cores this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bound_threads(count: int | None) -> None:
    """Keep torch in this process to ``count`` CPU threads; None leaves it as it is.

    Threads spin while they wait for one another: with small tensors the second core gains little on
    an idle machine, and one busy neighbour on it makes two threads seven times slower than one.
    """
    if count is not None:
        import torch

        torch.set_num_threads(count)


def jobs(threads: int | None, device: str) -> int:
    """Runs side by side: as many as the cores take, on a CPU and where ``threads`` bounds each."""
    if threads is None or choose_device(device) != "cpu":
        return 1
    return max(1, cores() // threads)


def to_markdown(values: dict[str, Any]) -> str:
    """Two columns, one row each."""
    rows = [f"| {name} | {'-' if value is None else value} |" for name, value in values.items()]
    return "\n".join(["| what | value |", "|---|---|", *rows])


def _try(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:  # a broken installation may raise anything; naming it is the purpose
        return f"not known ({type(error).__name__}: {error})"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the clone that this file lies in, with ``+changes`` where it was edited."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    if head.returncode:
        return None
    status = [*git, "status", "--porcelain", "--untracked-files=no"]
    changed = subprocess.run(status, capture_output=True, text=True, timeout=10).stdout.strip()
    return head.stdout.strip() + ("+changes" if changed else "")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0].partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _gpu() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(names)
