"""The step of a stream as a function of tensors alone: for compilers, CUDA graphs and servers.

`StreamingCache` plans each step on the host, which is what lets it take chunks of any size and
memory of any length. A compiled or captured step must be the same program every time. So here the
memory has a fixed shape, one frame comes per stream and tick, and what depends on a stream's
position (its slot in the ring, its row of the time table, the frames it may see) is computed from a
tensor of positions, on the device: nothing is copied to the host, and no step is like no other.

The rows of the batch are seats: streams join (``reset``), leave and skip a tick (``active``)
without a change of shape. (`export.py` has the same step without a state, for other runtimes, which
costs a copy of the memory; here it is written where it lies.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .cache import StepPlan, attendable, frames_in_ring
from .modeling import Memory, StreamformerModel, TimePlan, time_rows


def tick(
    model: StreamformerModel, frames: Tensor, positions: Tensor, memory: Memory, slots: int
) -> tuple[Tensor, Tensor]:
    """A frame of every stream, where all that depends on its position comes from a tensor.

    Args:
        model: in eval mode, causal.
        frames: ``(B, C, H, W)``, normalised.
        positions: frames that each stream has seen, ``(B,)`` int64.
        memory: a ring that takes the new keys and values before it is read.
        slots: of that ring.

    Returns:
        Patch tokens ``(B, N, D)`` and frame embeddings ``(B, D)``.
    """
    numbers = positions[:, None]  # (B, 1)
    rows = time_rows(model.config, numbers, clip_length=None)
    ring = frames_in_ring(positions + 1, slots)  # (B, slots)
    mask = attendable(numbers, ring, model.config.window, model.segment)  # (B, 1, slots)
    tokens = model.embeddings(frames[:, None], rows)  # (B, 1, N, D)
    mask = mask[:, None].expand(-1, tokens.shape[2], -1, -1).flatten(0, 1).unsqueeze(1)
    tokens, _ = model.run_layers(tokens, TimePlan(mask=mask, cache=memory))
    tokens = model.post_layernorm(tokens)
    return tokens[:, 0], model.head(tokens)[:, 0]


class StaticStreams(nn.Module):
    """Streams whose every step is the same program: the next frame of each of ``batch_size``.

    Example:
        >>> streams = StaticStreams(fuse(model), batch_size=8)
        >>> step = torch.compile(streams, dynamic=False)
        >>> patch_tokens, frame_embeddings = step(frames)  # (8, N, D) and (8, D) of (8, C, H, W)
        >>> streams.reset([3])  # another stream takes the fourth seat

    Args:
        model: in eval mode, causal, with a bounded memory: a window, or segments (``reset``).
        batch_size: streams ``B``.
        grid: patches of a frame, (h, w); None for the model's own.

    Attributes:
        keys_values: ``(L, 2, B, N, A, slots, d)``.
        positions: frames each stream has seen, ``(B,)`` int64.

    Raises:
        ValueError: a model that cannot stream, or not in bounded memory.
    """

    def __init__(
        self, model: StreamformerModel, batch_size: int, grid: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        if model.config.span is None:
            raise ValueError(
                'window=None and temporal_positions="'
                f'{model.config.temporal_positions}": memory without a bound has no fixed shape; '
                "load the model with a window"
            )
        height, width = grid or (model.embeddings.grid,) * 2
        cache = model.new_cache(batch_size, (height, width))
        channels, size = model.config.num_channels, model.config.patch_size
        frames = torch.empty(
            batch_size, 1, channels, height * size, width * size, device="meta"
        )  # (B, 1, C, H, W)
        model.check_stream(frames, cache)
        self.model = model
        self.register_buffer("keys_values", cache.keys_values, persistent=False)
        self.register_buffer(
            "positions",
            torch.zeros(batch_size, dtype=torch.int64, device=cache.device),
            persistent=False,
        )

    @torch.no_grad()
    def forward(self, frames: Tensor, active: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode ``frames`` ``(B, C, H, W)``.

        Args:
            frames: normalised, one for each stream.
            active: ``(B,)`` bool, False for streams that skip this tick: they stay where they are,
                and what is returned for them means nothing. None if all have a frame.

        Returns:
            Patch tokens ``(B, N, D)`` and frame embeddings ``(B, D)``.
        """
        memory = _Ring(self.keys_values, self.positions, active)
        features = tick(self.model, frames, self.positions, memory, self.keys_values.shape[5])
        self.positions += 1 if active is None else active
        return features

    @torch.no_grad()
    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Let streams start anew at frame 0; all of them unless ``rows`` names some."""
        chosen = slice(None) if rows is None else list(rows)
        self.keys_values[:, :, chosen] = 0
        self.positions[chosen] = 0


@dataclass(frozen=True)
class _Ring:
    """Where the new frames go, by tensors."""

    keys_values: Tensor  # (L, 2, B, N, A, slots, d)
    positions: Tensor  # (B,)
    active: Tensor | None  # (B,)

    def extend(self, layer: int, plan: StepPlan | None, new: Tensor) -> Tensor:
        """As `StreamingCache.extend`, for new keys and values ``(2, B, N, A, 1, d)``."""
        ring = self.keys_values[layer]  # (2, B, N, A, slots, d), a view
        rows = torch.arange(len(self.positions), device=ring.device)
        slots = self.positions % ring.shape[4]
        new = new[..., 0, :].transpose(0, 1)  # (B, 2, N, A, d)
        if self.active is not None:
            old = ring[:, rows, :, :, slots]  # (B, 2, N, A, d)
            new = torch.where(self.active[:, None, None, None, None], new, old)
        ring[:, rows, :, :, slots] = new
        return ring
