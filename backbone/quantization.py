"""int8 linears: faster and a little less exact, for CPUs and GPUs that multiply bytes.

Weights are rounded once, each output channel in steps of its own; activations as they come, each
token in steps of its own, so that no token pays for the range of another:

    y  =  (s_x s_w) (x / s_x) (w / s_w) + b,    s = largest value / 127, products in int32

Only the linears of the layers are int8, which is where the time goes; patch embedding, norms,
attention and the pooling head stay as they were. What it costs and saves: docs/performance.md, and
``python benchmarks/int8_step.py`` for any encoder and video.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .fusion import FoldedLinear, fuse, replace_linears
from .modeling import StreamformerModel
from .rounding import to_int8


class Int8Linear(nn.Module):
    """A linear in int8, with the activation behind it.

    Args:
        linear: what it rounds.

    Attributes:
        weight: ``(out, in)`` int8.
        scale: size of a weight's step, ``(out,)``.
    """

    def __init__(self, linear: FoldedLinear) -> None:
        super().__init__()
        weight, scale = to_int8(linear.weight.detach().float())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale[:, 0].to(linear.weight.dtype))
        bias = torch.zeros_like(self.scale) if linear.bias is None else linear.bias.detach()
        self.register_buffer("bias", bias)
        self.activation = linear.activation

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform tokens ``(…, in)`` to ``(…, out)``."""
        rounded, scale = to_int8(tokens.flatten(0, -2))  # (rows, in), (rows, 1)
        products = torch._int_mm(rounded, self.weight.t())  # (rows, out) int32
        output = torch.addcmul(self.bias, products.to(scale.dtype).mul_(scale), self.scale)
        return self.activation(output.unflatten(0, tokens.shape[:-1]))


@torch.no_grad()
def quantize(model: StreamformerModel) -> StreamformerModel:
    """A copy of ``model`` for inference, fused (:func:`fuse`), its layers' linears in int8."""
    quantized = fuse(model)
    replace_linears(quantized.layers, FoldedLinear, Int8Linear)
    return quantized
