"""How several processes hold one model: each a whole copy of it, or each a shard.

Copies (DDP) exchange gradients once per update. Shards (FSDP 2) hold a part of every weight, its
gradient and its moments, and gather the weights of a layer while it runs: for models too large to
be copied. Both come through accelerate, under ``torchrun`` or ``accelerate launch``. To a
checkpoint they are the same: whole tensors by the name of their weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from torch import Tensor, nn

LAYER = "StreamformerLayer"  # the weights that are gathered together
_PATIENCE = timedelta(hours=2)  # one process may evaluate while the others wait for it


def make_accelerator(
    *, cpu: bool, sharded: bool, trackers: Sequence[str] = (), folder: Path | None = None
) -> Accelerator:
    """The engine of a run. Precision is the model's own business: the engine leaves it alone.

    Raises ValueError if the launcher asks for the first version of FSDP.
    """
    plugin = None
    if sharded:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[LAYER],
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
        )
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="no",
        log_with=list(trackers) or None,
        project_dir=folder,
        fsdp_plugin=plugin,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate takes up its plugin on accelerators alone; torch shards on processors as well.
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState().distributed_type = DistributedType.FSDP
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(
            "the launcher asks for version 1 of FSDP, whose checkpoints do not hold whole tensors; "
            "launch with --fsdp_version 2, or plainly with sharded=True in the config"
        )
    return accelerator


def widen_scalars(model: nn.Module) -> None:
    """Give scalar weights one dimension, in place: a shard is a part of the first dimension."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.ndim == 0:
                wide = nn.Parameter(weight.detach().reshape(1), weight.requires_grad)
                setattr(module, name, wide)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights by name: the model's own tensors, or shards put together in the first process.

    Every process has to call; of shards the others get nothing.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    return get_model_state_dict(model, options=_whole(model))


def whole_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """The optimizer's state by names of weights, as `whole_weights`."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return get_optimizer_state_dict(model, _plain(optimizer), options=_whole(model))


def load_whole(
    model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Tensor], moments: dict
) -> None:
    """Take up what `whole_weights` and `whole_moments` gave; every process brings all of it."""
    from torch.distributed.checkpoint.state_dict import (
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    # Weights last: to have moments to load into, torch takes a step of rate 0 first.
    set_optimizer_state_dict(model, _plain(optimizer), moments, options=_whole(model))
    set_model_state_dict(model, weights, options=_whole(model))


def _whole(model: nn.Module):
    from torch.distributed.checkpoint.state_dict import StateDictOptions
    from torch.distributed.fsdp import FSDPModule

    return StateDictOptions(full_state_dict=True, cpu_offload=isinstance(model, FSDPModule))


def _plain(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer without accelerate's wrapping."""
    return getattr(optimizer, "optimizer", optimizer)
