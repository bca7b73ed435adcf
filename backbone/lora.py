"""LoRA on spatial attention, through PEFT.

StreamFormer trains time in full and touches the image encoder's attention only through low-rank
adapters (rank 32, scale 1, no bias): on the joint query-key-value projection, whose three outputs
so share one bottleneck, and on the output projection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import peft

RANK = 32
INITIAL_STD = 0.02  # of the matrix A; B starts at zero
TARGETS = r".*\.spatial_attention\.(qkv|out)"


def lora_config(rank: int = RANK) -> peft.LoraConfig:
    """PEFT config of the house recipe: ``rank`` on spatial attention, scale 1."""
    import peft

    return peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, bias="none")


def add_lora(model: nn.Module, rank: int = RANK) -> nn.Module:
    """Put adapters into ``model``, in place; what they wrap is frozen, nothing else.

    The adapters start without effect (``B`` is zero).

    Raises:
        ValueError: when the model has adapters already.
    """
    import peft

    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    if any(".lora_A." in name for name, _ in model.named_parameters()):
        raise ValueError("the model has LoRA adapters already; merge them first (merge_lora)")
    peft.inject_adapter_in_model(lora_config(rank), model)
    for name, weight in model.named_parameters():
        # PEFT freezes everything but its adapters; the recipe freezes only what they wrap.
        weight.requires_grad_("lora_" in name or name in trainable)
        if ".lora_A." in name:
            nn.init.normal_(weight, std=INITIAL_STD)
    for name, module in model.named_modules():
        if name.endswith(".lora_B.default"):  # for transformers, which draws fresh weights anew
            module.starts_at_zero = True
    if hasattr(model, "config"):
        model.config.lora_rank = rank
    return freeze_wrapped(model)


def freeze_wrapped(model: nn.Module) -> nn.Module:
    """Freeze the weights that adapters wrap, in place; a loaded model has forgotten which."""
    for name, weight in model.named_parameters():
        if ".base_layer." in name:
            weight.requires_grad_(False)
    return model


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Fold all adapters into the weights they wrap, in place and in fp32; plain linears remain.

    Raises:
        ValueError: when a merged weight is not finite, naming it; nothing is merged then.
    """
    from peft.tuners.lora import Linear as LoraLinear

    adapted = {name: part for name, part in model.named_modules() if isinstance(part, LoraLinear)}
    merged = {name: _merged_weight(part) for name, part in adapted.items()}
    for name, weight in merged.items():
        if not weight.isfinite().all():
            raise ValueError(f"LoRA of {name} merges to weights that are not finite; not merged")
    for name, module in adapted.items():
        base = module.get_base_layer()
        base.weight.copy_(merged[name])
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base.requires_grad_(True))
    if hasattr(model, "peft_config"):
        del model.peft_config
    if hasattr(model, "config"):
        model.config.lora_rank = 0
    return model


def _merged_weight(module: nn.Module) -> Tensor:
    weight = module.get_base_layer().weight.float()
    for adapter in module.active_adapters:
        down, up = module.lora_A[adapter].weight.float(), module.lora_B[adapter].weight.float()
        weight = weight + module.scaling[adapter] * (up @ down)
    return weight
