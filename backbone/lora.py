"""LoRA on spatial attention, through PEFT.

StreamFormer trains time in full and touches the image encoder's attention only through low-rank
adapters (rank 32, scale 1, no bias): on the joint query-key-value projection, whose three outputs
so share one bottleneck, and on the output projection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    import peft

RANK = 32
TARGETS = r".*\.spatial_attention\.(qkv|out)"


def lora_config(rank: int = RANK) -> peft.LoraConfig:
    """PEFT config of the house recipe: ``rank`` on spatial attention, scale 1."""
    import peft

    return peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, bias="none")


def add_lora(model: nn.Module, rank: int = RANK) -> nn.Module:
    """Put adapters into ``model``, in place; what they wrap is frozen, nothing else.

    The adapters start without effect (``B`` is zero).
    """
    import peft

    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    wrapped = {
        f"{name}.{weight}"
        for name, module in model.named_modules()
        if name.endswith(("spatial_attention.qkv", "spatial_attention.out"))
        for weight, _ in module.named_parameters()
    }
    peft.inject_adapter_in_model(lora_config(rank), model)
    # PEFT freezes everything but its adapters; the recipe freezes only what they wrap.
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name or (name in trainable and name not in wrapped))
    return model


def merge_lora(model: nn.Module) -> nn.Module:
    """Fold all adapters into the weights they wrap, in place and in fp32; plain linears remain.

    Raises:
        ValueError: when a merged weight is not finite, naming it.
    """
    from peft.tuners.lora import Linear as LoraLinear

    for name, module in list(model.named_modules()):
        if not isinstance(module, LoraLinear):
            continue
        base = module.get_base_layer()
        merged = base.weight.detach().float()
        for adapter in module.active_adapters:
            merged = merged + module.get_delta_weight(adapter).float()
        if not merged.isfinite().all():
            raise ValueError(f"LoRA of {name} merges to weights that are not finite; not merged")
        base.weight.data = merged.to(base.weight.dtype)
        base.requires_grad_(True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)
    if hasattr(model, "peft_config"):
        del model.peft_config
    if hasattr(model, "config"):
        model.config.lora_rank = 0
    return model
