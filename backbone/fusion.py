"""Exact folding for inference: fewer matrix products, the same numbers.

What is linear in a row is one linear: LoRA joins the weight that it wraps, and the temporal
branch's out-projection ``Wo``, ``temporal_dense`` ``Wd`` and gate ``g`` become

    tanh(g) * (Wd (Wo x + bo) + bd)  =  (tanh(g) Wd Wo) x  +  tanh(g) (Wd bo + bd)

computed in fp64 and stored in the model's own type: outputs agree to 1e-5 of their scale in fp32.
At ViT-B/16 and 224 pixels this saves 1.4 of 24.5 GMAC a frame.
"""

from __future__ import annotations

from copy import deepcopy

import torch

from .lora import merge_lora
from .modeling import StreamformerModel


@torch.no_grad()
def fuse(model: StreamformerModel) -> StreamformerModel:
    """A copy of ``model`` for inference, folded, frozen and in eval mode.

    Save and train the original: a fused model has no gate to train, and refuses to be saved.
    """
    fused = merge_lora(deepcopy(model)).eval().requires_grad_(False)
    for layer in fused.layers:
        if not layer.has_time or layer.temporal_dense is None:
            continue
        out, dense = layer.temporal_attention.out, layer.temporal_dense
        gate = layer.temporal_gate.double().tanh()
        weight = gate * dense.weight.double() @ out.weight.double()
        bias = gate * (dense.weight.double() @ out.bias.double() + dense.bias.double())
        out.weight.copy_(weight)
        out.bias.copy_(bias)
        layer.temporal_dense = layer.temporal_gate = None
    fused.save_pretrained = fused.push_to_hub = _refuse_to_save
    return fused


def _refuse_to_save(*_args: object, **_kwargs: object) -> None:
    raise ValueError("a fused model is for inference only; save the model that it was fused from")
