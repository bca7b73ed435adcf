"""The memory of a stream: temporal keys and values of the last ``span`` frames, in a ring.

Frame ``i`` of a stream lies in slot ``i % span``. With a span of 4, before and after the turn:

    after frame 2:  [ 0 | 1 | 2 |   ]      three frames to see, one slot still empty
    after frame 5:  [ 4 | 5 | 2 | 3 ]      frames 0 and 1 are out of reach and overwritten

Which frame a slot holds follows from the number of frames seen alone, so nothing else is stored,
and no value ever moves. Time is part of the tokens themselves (time embeddings), so attention need
not read the ring in order; a mask by frame number is enough, and once the ring is full a single new
frame needs none.

Promises, each with a test of the same name:

1. *any chunking equals one pass*: frame by frame, in chunks, or as one clip;
2. *the past never changes*: what was output for a frame does not depend on later frames;
3. *memory is bounded*: ``span`` slots, allocated once (without a window: grown by doubling);
4. *rows are independent*: streams of a batch stand at positions of their own, join and leave at any
   time, and can be saved and restored.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

_FIRST_CAPACITY = 16


def attendable(
    query_frames: Tensor, key_frames: Tensor, window: int | None, segment: int | None
) -> Tensor:
    """The one rule of causality: which frames a frame may attend to.

    Args:
        query_frames: frame numbers ``(…, T)``.
        key_frames: frame numbers ``(…, S)``; negative for an empty slot.
        window: frames a frame may see, itself included; None for all earlier ones.
        segment: frames after which memory starts anew; None for never.

    Returns:
        Boolean ``(…, T, S)``, True where attention is allowed.
    """
    distance = query_frames.unsqueeze(-1) - key_frames.unsqueeze(-2)  # (..., T, S)
    allowed = (distance >= 0) & (key_frames.unsqueeze(-2) >= 0)
    if window is not None:
        allowed &= distance < window
    if segment is not None:
        allowed &= query_frames.unsqueeze(-1) // segment == key_frames.unsqueeze(-2) // segment
    return allowed


@dataclass
class _Memory:
    """What a cache and its views of some rows share."""

    store: Tensor  # (L, K and V, B, N, A, slots, d): one head's slots lie side by side, as it reads
    positions: list[int]  # on the host: planning a step must not wait for a GPU


@dataclass(frozen=True)
class StepPlan:
    """How the next frames meet the ring; the same for every layer, so made once per step.

    Attributes:
        mode: ``append`` writes first and then reads slots ``[:visible]``; ``concat`` reads the ring
            beside the new frames and writes afterwards, for chunks that overwrite what they need.
        slots: slot of each new frame, ``(B, t)``; the same run in all rows if ``start`` is set.
        start: first slot written when all rows write the same contiguous run, else None.
        visible: slots read.
        mask: boolean ``(1 or B, t, keys)``, or None when every key may be seen.
    """

    mode: str
    slots: Tensor
    start: int | None
    visible: int
    mask: Tensor | None


class StreamingCache:
    """Temporal keys and values of a batch of streams.

    Args:
        num_layers: layers that keep keys and values.
        batch_size: streams ``B`` held side by side.
        num_patches: patches ``N`` of a frame.
        num_heads: attention heads ``A``.
        head_dim: width ``d`` of a head.
        window: frames a frame may attend to, itself included; None for all.
        segment: frames after which a stream forgets (policy ``reset``); None for never.
        dtype: type of the stored keys and values.
        device: where they live.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_patches: int,
        num_heads: int,
        head_dim: int,
        *,
        window: int | None,
        segment: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        bounds = [bound for bound in (window, segment) if bound is not None]
        self.window, self.segment = window, segment
        self.span = min(bounds) if bounds else None
        capacity = self.span or _FIRST_CAPACITY
        store = torch.zeros(
            num_layers, 2, batch_size, num_patches, num_heads, capacity, head_dim,
            dtype=dtype, device=device,
        )  # fmt: skip
        self._memory = _Memory(store, [0] * batch_size)
        self._rows: list[int] | None = None

    # -- what a stream is -------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Streams that the next call must bring a frame for."""
        return len(self._memory.positions) if self._rows is None else len(self._rows)

    @property
    def positions(self) -> list[int]:
        """Frames each stream has seen."""
        return [self._memory.positions[row] for row in self._active]

    @property
    def num_patches(self) -> int:
        """Patches of a frame, fixed when the stream began."""
        return self._memory.store.shape[3]

    @property
    def memory_bytes(self) -> int:
        """Bytes of stored keys and values."""
        return self._memory.store.numel() * self._memory.store.element_size()

    @property
    def device(self) -> torch.device:
        """Where keys and values live."""
        return self._memory.store.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of keys and values."""
        return self._memory.store.dtype

    @property
    def _active(self) -> Sequence[int]:
        return range(len(self._memory.positions)) if self._rows is None else self._rows

    def rows(self, rows: Sequence[int]) -> StreamingCache:
        """Some of the streams, sharing this memory: feed it when only these have a new frame.

        Raises:
            ValueError: when a row is not one of the batch, or named twice.
        """
        total = len(self._memory.positions)
        if len(set(rows)) != len(rows) or not all(0 <= row < total for row in rows):
            raise ValueError(f"rows={list(rows)}: give each of 0..{total - 1} at most once")
        view = copy(self)  # the memory itself is shared
        view._rows = list(rows)
        return view

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Let streams start anew at frame 0; all of them unless ``rows`` names some."""
        rows = list(self._active if rows is None else self.rows(rows)._active)
        # Unwritten slots are masked, but a masked NaN would still poison the sum: erase.
        self._memory.store[:, :, rows] = 0
        for row in rows:
            self._memory.positions[row] = 0

    # -- one step ---------------------------------------------------------------------------------

    def plan(self, num_new: int) -> StepPlan:
        """Decide where ``num_new`` frames of every stream go and what they may see."""
        positions = torch.tensor(self.positions)  # (B,)
        queries = positions[:, None] + torch.arange(num_new)  # (B, t)
        self._reserve(int(queries.max()) + 1)
        capacity = self._memory.store.shape[5]
        together = bool((positions == positions[0]).all())
        first, last = int(queries[0, 0]), int(queries.max())
        turns = last >= capacity  # some new frame overwrites an older one
        if num_new == 1 or not turns:
            visible = min(last + 1, capacity)
            keys = _frames_in_ring(queries[:, -1] + 1, capacity)[:, :visible]
            slots = queries % capacity
            start = int(slots[0, 0]) if together else None
            mask = attendable(queries, keys, self.window, self.segment)
            if together and num_new == 1:
                # Only slots 0..k may be seen at the start of a segment: read those, without a mask.
                seen = int(mask[0, 0].sum())
                if bool(mask[0, 0, :seen].all()):
                    return StepPlan("append", slots, start, seen, None)
            return StepPlan("append", slots, start, visible, self._compact(mask))
        visible = min(int(positions.max()), capacity)
        keys = torch.cat([_frames_in_ring(positions, capacity)[:, :visible], queries], dim=1)
        mask = attendable(queries, keys, self.window, self.segment)  # (B, t, visible + t)
        kept = queries[:, -capacity:]
        start = first % capacity if together and num_new < capacity else None
        if start is not None and start + kept.shape[1] > capacity:
            start = None
        return StepPlan("concat", kept % capacity, start, visible, self._compact(mask))

    def extend(self, layer: int, plan: StepPlan, keys: Tensor, values: Tensor) -> tuple:
        """Store a layer's new keys and values and return all that the new frames may read.

        Args:
            layer: layer number.
            plan: this step's :meth:`plan`.
            keys: new keys ``(B, N, A, t, d)``.
            values: new values, same shape.

        Returns:
            Keys and values ``(B, N, A, S, d)`` to attend to under ``plan.mask``.
        """
        store = self._memory.store[layer]  # (2, B, N, A, slots, d), a view
        if plan.mode == "append":
            self._write(store, plan, keys, values)
            read = self._read(store, plan.visible)
            return read[0], read[1]
        past = self._read(store, plan.visible)
        joined = torch.cat([past[0], keys], dim=3), torch.cat([past[1], values], dim=3)
        kept = plan.slots.shape[1]
        self._write(store, plan, keys[..., -kept:, :], values[..., -kept:, :])
        return joined

    def advance(self, num_new: int) -> None:
        """Count ``num_new`` frames as seen, once all layers have stored theirs."""
        for row in self._active:
            self._memory.positions[row] += num_new

    def _write(self, store: Tensor, plan: StepPlan, keys: Tensor, values: Tensor) -> None:
        if self._rows is None and plan.start is not None:
            slots = slice(plan.start, plan.start + plan.slots.shape[1])
            store[0, :, :, :, slots] = keys
            store[1, :, :, :, slots] = values
            return
        rows = torch.tensor(list(self._active), device=store.device)[:, None]  # (B, 1)
        slots = plan.slots.to(store.device)  # (B, t)
        for kind, new in enumerate((keys, values)):
            store[kind].permute(0, 3, 1, 2, 4)[rows, slots] = new.permute(0, 3, 1, 2, 4)

    def _read(self, store: Tensor, visible: int) -> Tensor:
        if self._rows is not None:
            store = store[:, self._rows]
        return store[..., :visible, :]

    def _compact(self, mask: Tensor) -> Tensor | None:
        """Drop what a mask does not need: all of it where all is allowed, rows that are alike."""
        if bool(mask.all()):
            return None
        if bool((mask == mask[:1]).all()):
            mask = mask[:1]
        return mask.to(self.device)

    def _reserve(self, frames: int) -> None:
        """Without a window the ring never turns: double it until ``frames`` fit."""
        capacity = self._memory.store.shape[5]
        if self.span is not None or frames <= capacity:
            return
        while capacity < frames:
            capacity *= 2
        grown = self._memory.store.new_zeros(
            *self._memory.store.shape[:5], capacity, self._memory.store.shape[6]
        )
        grown[..., : self._memory.store.shape[5], :] = self._memory.store
        self._memory.store = grown

    # -- save and restore -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a stream needs to go on, as tensors that safetensors can write."""
        bounds = [-1 if bound is None else bound for bound in (self.window, self.segment)]
        return {
            "keys_values": self._memory.store.clone(),
            "positions": torch.tensor(self._memory.positions),
            "bounds": torch.tensor(bounds),
        }

    @classmethod
    def from_state_dict(
        cls, state: dict[str, Tensor], device: torch.device | str | None = None
    ) -> StreamingCache:
        """Rebuild a cache from :meth:`state_dict`, on ``device`` if given.

        Raises:
            ValueError: when entries are missing or foreign.
        """
        expected = {"keys_values", "positions", "bounds"}
        if set(state) != expected:
            raise ValueError(
                f"not the state of a StreamingCache: it holds {sorted(state)}, expected "
                f"{sorted(expected)}"
            )
        store = state["keys_values"]
        layers, _, batch, patches, heads, capacity, width = store.shape
        window, segment = (None if b < 0 else b for b in state["bounds"].tolist())
        cache = cls(
            layers, batch, patches, heads, width,
            window=window, segment=segment, dtype=store.dtype, device="meta",
        )  # fmt: skip
        if cache.span is not None and cache.span != capacity:
            raise ValueError(
                f"the saved ring has {capacity} slots but window={window}, segment={segment} need "
                f"{cache.span}: the file is damaged"
            )
        cache._memory.store = store.to(device if device is not None else store.device, copy=True)
        cache._memory.positions = state["positions"].tolist()
        return cache

    def must_match(self, other: StreamingCache) -> None:
        """Refuse to stand in for ``other``: ValueError when made for another model or size."""
        for name in ("window", "segment"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(
                    f"the saved streams have {name}={getattr(self, name)}, this encoder has "
                    f"{name}={getattr(other, name)}; build it with the same setting"
                )
        mine, theirs = (
            [*s[:5], s[6]] for s in (self._memory.store.shape, other._memory.store.shape)
        )
        if mine != theirs:
            raise ValueError(
                f"the saved streams have (layers, 2, rows, patches, heads, head width) {mine}, "
                f"this encoder {theirs}; they belong to another model or frame size"
            )


def _frames_in_ring(seen: Tensor, capacity: int) -> Tensor:
    """Frame in each slot after ``seen`` ``(B,)`` frames: ``(B, capacity)``, negative if empty."""
    last = seen[:, None] - 1  # (B, 1)
    return last - (last - torch.arange(capacity)) % capacity
