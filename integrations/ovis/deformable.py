"""Multi-scale deformable attention (Deformable DETR, ICLR 2021, section 4.1) in plain PyTorch.

Each query looks at a few places around its reference point in each level, and learns where and how
much. The core is transformers', the very function that Mask2Former's pixel decoder runs on; here
stands the module around it, for queries that are not the features themselves, with its own start.

Letters: B images, S cells of all levels together, Q queries, D width, A heads, d = D / A,
L levels, P points per level. Places are (x, y) in [0, 1], cell ``i`` of ``n`` has its centre at
(i + 0.5) / n; outside of a level all is zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.models.mask2former.modeling_mask2former import (
    multi_scale_deformable_attention as deformable_attention,
)

__all__ = ["DeformableAttention", "cell_centres", "deformable_attention"]

Shape = tuple[int, int]  # rows and columns of a level


def cell_centres(shapes: Sequence[Shape], like: Tensor) -> Tensor:
    """Centres of all cells, level by level, row by row.

    Args:
        shapes: rows and columns of each level.
        like: a tensor of the wanted type and device.

    Returns:
        ``(S, 2)``, (x, y) in [0, 1].
    """
    levels = []
    for height, width in shapes:
        y = (torch.arange(height, device=like.device, dtype=like.dtype) + 0.5) / height
        x = (torch.arange(width, device=like.device, dtype=like.dtype) + 0.5) / width
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        levels.append(torch.stack((grid_x, grid_y), -1).flatten(0, 1))  # (h*w, 2)
    return torch.cat(levels)


class DeformableAttention(nn.Module):
    """Queries look at a few learned places of each level.

    Args:
        width: ``D``, of queries, features and output.
        num_heads: ``A``, divides the width.
        num_levels: ``L``.
        num_points: ``P``, places per head and level.
    """

    def __init__(self, width: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width={width} is not a multiple of num_heads={num_heads}")
        self.places = (num_heads, num_levels, num_points)
        count = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(width, 2 * count)
        self.attention_weights = nn.Linear(width, count)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start so that each head looks in its own direction, one step further with each point."""
        heads, levels, points = self.places
        angles = torch.arange(heads) * (2 * math.pi / heads)
        directions = torch.stack((angles.cos(), angles.sin()), -1)  # (A, 2)
        directions /= directions.abs().amax(-1, keepdim=True)  # onto the border of a square
        steps = torch.arange(1, points + 1)
        offsets = directions[:, None, None] * steps[:, None]  # (A, 1, P, 2)
        self.sampling_offsets.bias.copy_(offsets.expand(-1, levels, -1, -1).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        centres: Tensor,
        features: Tensor,
        shapes: Sequence[Shape],
        padding: Tensor | None = None,
    ) -> Tensor:
        """Gather what the queries look at.

        Args:
            query: ``(B, Q, D)``.
            centres: reference points, ``(B or 1, Q, L or 1, 2)``.
            features: ``(B, S, D)``, level by level, row by row.
            shapes: rows and columns of each level; their cells sum to ``S``.
            padding: ``(B, S)`` bool, cells that hold nothing.

        Returns:
            ``(B, Q, D)``.

        Raises:
            ValueError: features and shapes that do not belong together.
        """
        cells = sum(height * width for height, width in shapes)
        if features.shape[1] != cells or len(shapes) != self.places[1]:
            raise ValueError(
                f"{features.shape[1]} cells of features for levels {list(shapes)}, which hold "
                f"{cells}; this attention reads {self.places[1]} levels"
            )
        value = self.value_proj(features)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        value = value.unflatten(-1, (self.places[0], -1))  # (B, S, A, d)
        offsets = self.sampling_offsets(query).unflatten(-1, (*self.places, 2))
        sizes = query.new_tensor([(width, height) for height, width in shapes])  # (L, 2)
        places = centres[:, :, None, :, None] + offsets / sizes[:, None]  # (B, Q, A, L, P, 2)
        weights = self.attention_weights(query).unflatten(-1, (self.places[0], -1)).softmax(-1)
        weights = weights.unflatten(-1, self.places[1:])  # (B, Q, A, L, P)
        return self.output_proj(deformable_attention(value, shapes, places, weights))
