"""Exact folding for inference: fewer and faster matrix products, the same numbers.

What is linear in a row is one linear: LoRA joins the weight that it wraps, and the temporal
branch's out-projection ``Wo``, ``temporal_dense`` ``Wd`` and gate ``g`` become

    tanh(g) * (Wd (Wo x + bo) + bd)  =  (tanh(g) Wd Wo) x  +  tanh(g) (Wd bo + bd)

computed in fp64 and stored in the model's own type: outputs agree to 1e-5 of their scale in fp32.
At ViT-B/16 and 224 pixels this saves 1.4 of 24.5 GMAC a frame. The pooling head's query is computed
once (``PoolingHead``), and an MLP's activation joins the linear in front (``FoldedLinear``).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lora import merge_lora
from .modeling import StreamformerLayer, StreamformerModel

_LEAST_WORK = 2**25  # multiplications from which on oneDNN's overhead is paid back
_POST_OPS = {"gelu": ("gelu", "none"), "gelu_pytorch_tanh": ("gelu", "tanh")}  # oneDNN's names


class FoldedLinear(nn.Linear):
    """A linear for inference, with the activation behind it.

    On a CPU in fp32 oneDNN runs both in one pass, which is what PyTorch's own compiler emits there
    (measured in docs/performance.md); everywhere else, for small models, compilers and exporters,
    these are the plain operations. Gradients reach the input as ever.

    Args:
        linear: whose weight and bias these are, shared.
        activation: module applied to the output; None for none.
        name: the activation's name in transformers.
    """

    def __init__(
        self, linear: nn.Linear, activation: nn.Module | None = None, name: str | None = None
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.activation = nn.Identity() if activation is None else activation
        self._post_op = ("none", "") if activation is None else _POST_OPS.get(name)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform tokens ``(…, D)``."""
        small = tokens.numel() * self.out_features < _LEAST_WORK
        if self._post_op is None or small or not _is_plain_inference(tokens):
            return self.activation(F.linear(tokens, self.weight, self.bias))
        post_op, form = self._post_op
        return torch.ops.mkldnn._linear_pointwise(tokens, self.weight, self.bias, post_op, [], form)


def _is_plain_inference(tokens: Tensor) -> bool:
    """Whether oneDNN may be called by name: fp32 on a CPU that has it, nobody looking on."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and tokens.device.type == "cpu"
        and tokens.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and tokens.requires_grad)
    )


@torch.no_grad()
def fuse(model: StreamformerModel) -> StreamformerModel:
    """A copy of ``model`` for inference, folded, frozen and in eval mode.

    Save and train the original: a fused model has no gate to train, and refuses to be saved.
    """
    fused = merge_lora(deepcopy(model)).eval().requires_grad_(False)
    for layer in fused.layers:
        if layer.has_time and layer.temporal_dense is not None:
            _fold_gate(layer)
        if not isinstance(layer.mlp.fc1, FoldedLinear):
            layer.mlp.fc1 = FoldedLinear(layer.mlp.fc1, layer.mlp.act, model.config.hidden_act)
            layer.mlp.act = nn.Identity()
    replace_linears(fused.layers, nn.Linear, FoldedLinear)
    fused.head.query = fused.head.folded_query()
    fused.save_pretrained = fused.push_to_hub = _refuse_to_save
    return fused


def _fold_gate(layer: StreamformerLayer) -> None:
    out, dense = layer.temporal_attention.out, layer.temporal_dense
    gate = layer.temporal_gate.double().tanh()
    weight = gate * dense.weight.double() @ out.weight.double()
    bias = gate * (dense.weight.double() @ out.bias.double() + dense.bias.double())
    out.weight.copy_(weight)
    out.bias.copy_(bias)
    layer.temporal_dense = layer.temporal_gate = None


def replace_linears(root: nn.Module, kind: type[nn.Module], make: Callable) -> None:
    """Replace, in place, every linear of just this ``kind`` below ``root`` by ``make(linear)``."""
    for part in list(root.modules()):
        for name, child in list(part.named_children()):
            if type(child) is kind:
                setattr(part, name, make(child))


def _refuse_to_save(*_args: object, **_kwargs: object) -> None:
    raise ValueError("a fused model is for inference only; save the model that it was fused from")
