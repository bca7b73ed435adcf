"""Numbers in eight bits: each row of values in steps of its own size."""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = 127  # of an int8, symmetric
_SMALLEST = 1e-12  # of a step: a row of zeros stays one


def to_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round values ``(…, n)``: int8 ``(…, n)``, and the step ``(…, 1)`` that gives them back."""
    step = values.abs().amax(dim=-1, keepdim=True).div_(_LARGEST).clamp_(min=_SMALLEST)
    return (values / step).round_().to(torch.int8), step
