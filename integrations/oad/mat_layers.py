"""Layers of a MAT head (letters as in ``mat``): attention, stacks of layers, feature heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from integrations.oad.mat_config import ACTIVATIONS, MatConfig, Stack


class TopKAttention(nn.Module):
    """Multi-head attention in which each query keeps only its best three quarters of the keys.

    Which keys survive is decided on the masked scores, for each query and head; at least one does.
    The choice is discontinuous: scores that differ by rounding may flip a key.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))  # rows: query, key, value
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from ``x`` (B, Q, D) to ``source`` (B, K, D); the mask is added to the scores.

        ``mask`` is (Q, K), or (B, H, Q, K) with ones where it is shared. Returns (B, Q, D).
        """
        if x is source:  # self attention: one projection for all three
            q, keys_values = F.linear(x, self.in_proj_weight, self.in_proj_bias).split(
                [x.shape[-1], 2 * x.shape[-1]], dim=-1
            )
            return self.attend(self._split_heads(q) * self.scale, keys_values, mask)
        return self.attend(self.queries(x), self.keys_values(source), mask)

    def queries(self, x: Tensor) -> Tensor:
        """Project ``x`` (B, Q, D) to scaled queries (B, H, Q, E)."""
        dim = x.shape[-1]
        q = F.linear(x, self.in_proj_weight[:dim], self.in_proj_bias[:dim])
        return self._split_heads(q) * self.scale

    def keys_values(self, source: Tensor) -> Tensor:
        """Project ``source`` (B, K, D) to keys and values side by side (B, K, 2 D)."""
        dim = source.shape[-1]
        return F.linear(source, self.in_proj_weight[dim:], self.in_proj_bias[dim:])

    def attend(self, q: Tensor, keys_values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix values for queries (B or 1, H, Q, E) -> (B, Q, D)."""
        k, v = (self._split_heads(part) for part in keys_values.chunk(2, dim=-1))  # (B, H, K, E)
        scores = q @ k.transpose(-2, -1)  # (B, H, Q, K)
        if mask is not None:
            scores = scores + mask
        keep = max(1, 3 * scores.shape[-1] // 4)
        best, place = scores.topk(keep, dim=-1, sorted=False)  # (B, H, Q, keep)
        best = best.softmax(-1)  # may be wider than the scores under autocast
        weights = torch.zeros_like(scores, dtype=best.dtype).scatter(-1, place, best)
        weights = F.dropout(weights.to(v.dtype), self.dropout, self.training)  # (B, H, Q, K)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2))  # (B, Q, D)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, N, E)


class _Layer(nn.Module):
    """What encoder and decoder layers share: post-norm residual branches and the feed-forward."""

    def __init__(self, config: MatConfig):
        super().__init__()
        self.dropout = config.dropout
        self.activation = ACTIVATIONS[config.activation]
        self.self_attn = TopKAttention(config.dim, config.num_heads, config.dropout)
        self.linear1 = nn.Linear(config.dim, config.feedforward)
        self.linear2 = nn.Linear(config.feedforward, config.dim)
        self.norm1 = nn.LayerNorm(config.dim)
        self.norm2 = nn.LayerNorm(config.dim)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def _feed(self, x: Tensor) -> Tensor:
        return self._drop(self.linear2(self._drop(self.activation(self.linear1(x)))))

    def _attend_self(self, x: Tensor, mask: Tensor | None, last: int | None) -> Tensor:
        if last is None:
            return self.norm1(x + self._drop(self.self_attn(x, x, mask)))
        wanted = x[:, -last:]
        mask = None if mask is None else mask[-last:]
        return self.norm1(wanted + self._drop(self.self_attn(wanted, x, mask)))


class EncoderLayer(_Layer):
    """Self attention and feed-forward."""

    def forward(self, x: Tensor, mask: Tensor | None = None, last: int | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D), or only the ``last`` rows of it."""
        x = self._attend_self(x, mask, last)
        return self.norm2(x + self._feed(x))


class Asked(NamedTuple):
    """A decoder layer's tokens after self attention, and the queries they put to the memory."""

    tokens: Tensor  # (B or 1, Q, D)
    queries: Tensor  # (B or 1, H, Q, E)


class DecoderLayer(_Layer):
    """Self attention (``ask``), then cross attention and feed-forward (``read``).

    The layer is cut where the memory comes in: what learned queries ask does not depend on any
    input and can be computed once; keys and values of long memory can be computed frame by frame.
    """

    def __init__(self, config: MatConfig):
        super().__init__(config)
        self.multihead_attn = TopKAttention(config.dim, config.num_heads, config.dropout)
        self.norm3 = nn.LayerNorm(config.dim)

    def ask(self, x: Tensor, mask: Tensor | None = None, last: int | None = None) -> Asked:
        """Prepare tokens (B, Q, D), or only the ``last`` rows of them."""
        x = self._attend_self(x, mask, last)
        return Asked(x, self.multihead_attn.queries(x))

    def read(self, asked: Asked, keys_values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read a memory given as ``keys_values`` (B, K, 2 D) -> (B, Q, D)."""
        x = asked.tokens
        x = self.norm2(x + self._drop(self.multihead_attn.attend(asked.queries, keys_values, mask)))
        return self.norm3(x + self._feed(x))


class EncoderStack(nn.Module):
    """Encoder layers over tokens of the data."""

    def __init__(self, config: MatConfig, stack: Stack):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(stack.layers))
        self.norm = nn.LayerNorm(config.dim) if stack.norm else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None, last: int | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D), or only the ``last`` rows of it."""
        for layer in self.layers[:-1]:
            x = layer(x, mask)
        return self.norm(self.layers[-1](x, mask, last))


class DecoderStack(nn.Module):
    """Decoder layers: tokens or learned queries that read a memory."""

    def __init__(self, config: MatConfig, stack: Stack):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(stack.layers))
        self.norm = nn.LayerNorm(config.dim) if stack.norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        self_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        last: int | None = None,
    ) -> Tensor:
        """Tokens (B, Q, D) read ``memory`` (B, K, D) -> (B, Q, D), or only the ``last`` rows of it.

        Masks are additive: ``self_mask`` (Q, Q), ``memory_mask`` (Q, K).
        """
        asked = self.layers[0].ask(x, self_mask, last if len(self.layers) == 1 else None)
        return self.read(asked, self.keys_values(memory), self_mask, memory_mask, last)

    def ask(self, queries: nn.Embedding) -> Asked:
        """First layer's questions of learned queries (Q, D): the same for every input, batch 1.

        With dropout in training, this one branch shares its mask over the batch.
        """
        return self.layers[0].ask(queries.weight[None])

    def keys_values(self, memory: Tensor) -> list[Tensor]:
        """Project ``memory`` (B, K, D) for each layer -> [(B, K, 2 D)]."""
        return [layer.multihead_attn.keys_values(memory) for layer in self.layers]

    def read(
        self,
        asked: Asked,
        keys_values: Sequence[Tensor],
        self_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        last: int | None = None,
    ) -> Tensor:
        """Run the stack from what the first layer asked and each layer's keys and values."""
        x = asked.tokens
        final = len(self.layers) - 1
        for i, (layer, kv) in enumerate(zip(self.layers, keys_values, strict=True)):
            mask = memory_mask
            if last is not None and i == final and mask is not None:
                mask = mask[-last:]
            if i > 0:
                asked = layer.ask(x, self_mask, last if i == final else None)
            x = layer.read(asked, kv, mask)
        return self.norm(x)


class FeatureHead(nn.Module):
    """Features of a step, one or two streams, to one token."""

    def __init__(self, visual_size: int, motion_size: int, dim: int):
        super().__init__()
        self.visual_linear = _linear_block(visual_size, dim)
        if motion_size:
            self.motion_linear = _linear_block(motion_size, dim)
            self.input_linear = _linear_block(2 * dim, dim)

    def forward(self, visual: Tensor, motion: Tensor | None = None) -> Tensor:
        """Visual (B, N, Dv) and motion (B, N, Dm) -> (B, N, D)."""
        x = self.visual_linear(visual)
        if motion is None:
            return x
        return self.input_linear(torch.cat([x, self.motion_linear(motion)], dim=-1))


def _linear_block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.ReLU())


def sinusoid_table(length: int, dim: int) -> Tensor:
    """Position table (length, dim), float32: sine in even, cosine in odd columns."""
    position = torch.arange(length, dtype=torch.float32)[:, None]  # (N, 1)
    frequency = torch.exp(torch.arange(0, dim, 2, dtype=torch.float32) * (-math.log(10000.0) / dim))
    angle = position * frequency  # (N, D / 2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)  # (N, D)


def causal_mask(length: int) -> Tensor:
    """Additive mask (length, length): 0 at and before the own position, -inf after it."""
    return torch.full((length, length), -math.inf).triu(1)
