"""Several processes of one job on this machine, for models so small that threads gain nothing.

Threads of one process meet after every operation, which takes longer than a small operation does;
processes meet once per update. They form a gloo group that finds itself through a file and talks
over loopback, so nothing listens on a network. `accelerate` and `torch.distributed` see what they
would see under ``torchrun``.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessRaisedException, spawn

from pretrain.alignment import gather_ranks

_LOOPBACK = "lo0" if os.uname().sysname == "Darwin" else "lo"
_PATIENCE = timedelta(hours=2)  # one process may evaluate while the others wait for it


def run_processes(work: Callable[..., None], *args: Any, processes: int) -> None:
    """Call ``work(*args)`` in so many processes at once, one torch thread each, and wait for all.

    ``work`` must be importable and ``args`` picklable, as they travel to fresh interpreters. With
    ``processes=1`` the call happens here, in this process and with its threads.

    Raises RuntimeError with the traceback of the process that failed first; the others, which fail
    for want of it, are ended.
    """
    if processes < 1:
        raise ValueError(f"processes={processes} must be at least 1")
    if processes == 1:
        work(*args)
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(_enter, (work, args, processes, Path(folder)), nprocs=processes)
        except ProcessRaisedException as error:
            first = min(Path(folder).glob("failed-*"), key=lambda path: path.stat().st_mtime_ns)
            rank = first.name.removeprefix("failed-")
            raise RuntimeError(
                f"process {rank} of {processes} failed:\n{first.read_text()}"
            ) from error


def _enter(rank: int, work: Callable[..., None], args: tuple, processes: int, folder: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": _LOOPBACK,
    }
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=processes,
        timeout=_PATIENCE,
    )
    try:
        work(*args)
    except Exception:
        (folder / f"failed-{rank}").write_text(traceback.format_exc(), encoding="utf-8")
        raise
    finally:
        dist.destroy_process_group()


def own_share(rows: Tensor) -> Tensor:
    """The part of ``rows`` (B, …) that is this process's; B must divide by the processes."""
    if not dist.is_initialized():
        return rows
    if len(rows) % dist.get_world_size():
        raise ValueError(f"{len(rows)} rows do not divide among {dist.get_world_size()} processes")
    return rows.chunk(dist.get_world_size())[dist.get_rank()]


def gather_shares(rows: Tensor) -> Tensor:
    """All processes' rows in order, with gradient: the inverse of `own_share`.

    For a loss that every process computes alike of all rows: `average_gradients` then leaves each
    with the gradient of that loss.
    """
    return _Gather.apply(rows) if dist.is_initialized() else rows


class _Gather(torch.autograd.Function):
    """All shares forward; backward the own share's gradient, once for every process's same loss."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return gather_ranks(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return own_share(gradient) * dist.get_world_size()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, in one exchange."""
    if not dist.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
