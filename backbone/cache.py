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

Keys and values can be kept in fewer bits than the model computes in (``kept_as``): bfloat16, or
int8 with a scale for each vector. They are rounded once, when stored, and unfolded block by block
when read; the first promise then holds up to this rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from .rounding import to_int8

_FIRST_CAPACITY = 16
_BLOCK_BYTES = 4 * 2**20  # keys and values unfolded at once; more would leave a CPU's cache
_PARTS = ("keys_values", "scales")  # of a state; scales where keys and values are int8
KEPT_AS = (torch.bfloat16, torch.float16, torch.int8)


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
    scales: Tensor | None  # (L, K and V, B, N, A, slots, 1), where the store is int8
    positions: list[int]  # on the host: planning a step must not wait for a GPU
    scratch: Tensor | None = None

    @property
    def parts(self) -> list[Tensor]:
        return [self.store] if self.scales is None else [self.store, self.scales]


@dataclass(frozen=True)
class StepPlan:
    """How the next frames meet the ring; the same for every layer, so made once per step.

    Attributes:
        reads_first: False to store the new frames and then read slots ``[:visible]``; True to read
            the ring beside the new frames and store them afterwards, for a chunk that overwrites
            what its own first frames still need.
        kept: new frames that are stored, the last ones (a chunk may be longer than the ring).
        run: slots that they take when these are one run, the same in all rows; else None.
        scatter: else row and slot of each, ``(B, 1)`` and ``(B, kept)``, on the device.
        visible: slots read.
        mask: boolean ``(1 or B, t, keys)``, or None when every key may be seen.
        blocks: patches to attend to together, where what is read must first be unfolded; None for
            all at once.
    """

    reads_first: bool
    kept: int
    run: slice | None
    scatter: tuple[Tensor, Tensor] | None
    visible: int
    mask: Tensor | None
    blocks: tuple[slice, ...] | None = None


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
        dtype: type of the keys and values that come and are read.
        device: where they live.
        kept_as: one of ``KEPT_AS`` to store them in; None for ``dtype``.

    Raises:
        ValueError: for a window or a segment below 1, or a type to keep them in that is not known.
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
        kept_as: torch.dtype | None = None,
    ) -> None:
        if kept_as not in (None, *KEPT_AS):
            raise ValueError(f"kept_as={kept_as}: choose one of {KEPT_AS}, or None")
        bounds = [bound for bound in (window, segment) if bound is not None]
        if bounds and min(bounds) < 1:
            raise ValueError(f"window={window}, segment={segment}: a frame always sees itself")
        self.window, self.segment = window, segment
        self.span = min(bounds) if bounds else None
        capacity = _FIRST_CAPACITY if self.span is None else self.span
        shape = (num_layers, 2, batch_size, num_patches, num_heads, capacity, head_dim)
        store, scales = _empty_store(shape, kept_as or dtype, device), None
        if kept_as == torch.int8:
            scales = _empty_store((*shape[:-1], 1), dtype, device)
        self._memory = _Memory(store, scales, [0] * batch_size)
        self.dtype = dtype
        self._rows: list[int] | None = None

    # -- what a stream is ---------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Streams that the next call must bring a frame for."""
        return len(self._active)

    @property
    def positions(self) -> list[int]:
        """Frames each stream has seen."""
        return [self._memory.positions[row] for row in self._active]

    @property
    def num_patches(self) -> int:
        """Patches of a frame, fixed when the stream began."""
        return self._memory.store.shape[3]

    @property
    def made_for(self) -> tuple[int, int, int]:
        """Layers, heads and head width of the model whose keys and values these are."""
        shape = self._memory.store.shape
        return shape[0], shape[4], shape[6]

    @property
    def memory_bytes(self) -> int:
        """Bytes of stored keys and values."""
        return sum(part.numel() * part.element_size() for part in self._memory.parts)

    @property
    def device(self) -> torch.device:
        """Where keys and values live."""
        return self._memory.store.device

    @property
    def kept_as(self) -> torch.dtype:
        """Type in which keys and values are stored."""
        return self._memory.store.dtype

    @property
    def _active(self) -> list[int]:
        return list(range(len(self._memory.positions))) if self._rows is None else self._rows

    @property
    def _index(self) -> slice | list[int]:
        """The rows as an index; a slice where possible, for it reads without a copy."""
        rows = self._active
        adjacent = rows == list(range(rows[0], rows[0] + len(rows)))
        return slice(rows[0], rows[0] + len(rows)) if adjacent else rows

    def rows(self, rows: Sequence[int]) -> StreamingCache:
        """Some of the streams, sharing this memory: feed it when only these have a new frame.

        Args:
            rows: their numbers in the whole batch, in the order in which their frames come.

        Raises:
            ValueError: no row, one that is not of the batch, or one named twice.
        """
        rows, total = [int(row) for row in rows], len(self._memory.positions)
        if not rows or len(set(rows)) != len(rows) or not all(0 <= row < total for row in rows):
            raise ValueError(f"rows={rows}: name some of the streams 0 to {total - 1}, each once")
        view = copy(self)  # the memory itself is shared
        view._rows = rows
        return view

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Let streams start anew at frame 0; all of them unless ``rows`` names some."""
        streams = self if rows is None else self.rows(rows)
        # Unwritten slots are masked, but a masked NaN would still poison the sum: erase.
        for part in self._memory.parts:
            part[:, :, streams._index] = 0
        for row in streams._active:
            self._memory.positions[row] = 0

    # -- one step -----------------------------------------------------------------------------

    def plan(self, num_new: int) -> StepPlan:
        """Decide where ``num_new`` frames of every stream go and what they may see."""
        positions = torch.tensor(self.positions)  # (B,)
        queries = positions[:, None] + torch.arange(num_new)  # (B, t)
        self._reserve(int(queries.max()) + 1)
        capacity = self._memory.store.shape[5]
        # A single frame only ever overwrites the one that has just left its sight.
        reads_first = num_new > 1 and int(queries.max()) >= capacity
        seen = positions if reads_first else positions + num_new
        visible = min(int(seen.max()), capacity)
        keys = frames_in_ring(seen, capacity)[:, :visible]  # (B, visible)
        if reads_first:
            keys = torch.cat([keys, queries], dim=1)  # (B, visible + t)
        mask = attendable(queries, keys, self.window, self.segment)  # (B, t, keys)
        if bool((mask == mask[:1]).all()):
            mask = mask[:1]
        if mask.shape[:2] == (1, 1) and not reads_first:
            # Only the first slots may be seen (a segment has begun): read no others.
            allowed = int(mask.sum())
            if bool(mask[..., :allowed].all()):
                mask, visible = mask[..., :allowed], allowed
        kept = min(num_new, capacity)
        slots = queries[:, -kept:] % capacity  # (B, kept)
        first = int(slots[0, 0])
        run = slice(first, first + kept)
        is_run = bool((slots == torch.arange(run.start, run.stop)).all())
        return StepPlan(
            reads_first=reads_first,
            kept=kept,
            run=run if is_run else None,
            scatter=None if is_run else self._scatter(slots),
            visible=visible,
            mask=None if bool(mask.all()) else mask.to(self.device),
            blocks=self._blocks(mask.shape[-1]),
        )

    def extend(
        self, layer: int, plan: StepPlan, new: Tensor, patches: slice = slice(None)
    ) -> Tensor:
        """Store a layer's new keys and values and return all that the new frames may read.

        Args:
            layer: layer number.
            plan: this step's :meth:`plan`.
            new: keys and values of the new frames ``(2, B, N, A, t, d)``.
            patches: which patches these are.

        Returns:
            Keys and values ``(2, B, N, A, S, d)`` to attend to under ``plan.mask``.
        """
        stores = [part[layer][:, :, patches] for part in self._memory.parts]  # views
        packed = [new.to(self.kept_as)] if len(stores) == 1 else list(to_int8(new))

        def visible() -> Tensor:
            read = [store[:, self._index, :, :, : plan.visible] for store in stores]
            return self._unfolded(read, self._scratch(read[0].shape))

        if not plan.reads_first:
            self._write(stores, plan, packed)
            return visible()
        joined = torch.cat([visible(), self._unfolded(packed)], dim=4)
        self._write(stores, plan, [part[..., -plan.kept :, :] for part in packed])
        return joined

    def _unfolded(self, parts: list[Tensor], into: Tensor | None = None) -> Tensor:
        """What is stored, in the type of the model; as it lies if that is the same."""
        values = parts[0].to(self.dtype) if into is None else into.copy_(parts[0])
        return values if len(parts) == 1 else values.mul_(parts[1])

    def _scratch(self, shape: Sequence[int]) -> Tensor | None:
        """Room to unfold keys and values in, the same for every block and layer: fresh memory for
        each would cost several times what the unfolding does. None where nothing is folded.
        """
        if self.kept_as == self.dtype:
            return None
        memory, size = self._memory, math.prod(shape)
        if memory.scratch is None or memory.scratch.numel() < size:
            memory.scratch = _empty_store((size,), self.dtype, self.device)
        return memory.scratch[:size].view(shape)

    def _blocks(self, keys: int) -> tuple[slice, ...] | None:
        if self.kept_as == self.dtype:
            return None
        patches, heads, width = (self._memory.store.shape[i] for i in (3, 4, 6))
        row = 2 * self.batch_size * heads * keys * width * self.dtype.itemsize
        size = max(1, _BLOCK_BYTES // row)
        return tuple(slice(first, first + size) for first in range(0, patches, size))

    @property
    def keys_values(self) -> Tensor:
        """All that is stored, ``(L, 2, B, N, A, slots, d)``; of a view too that of all streams."""
        return self._memory.store

    def slots(self, layer: int) -> Tensor:
        """A layer's keys and values as they lie, ``(2, B, N, A, slots, d)``."""
        return self._memory.store[layer][:, self._index]

    def advance(self, num_new: int) -> None:
        """Count ``num_new`` frames as seen, once all layers have stored theirs."""
        for row in self._active:
            self._memory.positions[row] += num_new

    def _write(self, stores: list[Tensor], plan: StepPlan, parts: list[Tensor]) -> None:
        for store, new in zip(stores, parts, strict=True):
            if plan.run is not None:
                store[:, self._index, :, :, plan.run] = new
            else:
                by_slot = store.permute(1, 4, 0, 2, 3, 5)  # (B, slots, 2, N, A, d), a view
                by_slot[plan.scatter] = new.permute(1, 4, 0, 2, 3, 5).to(store.dtype)

    def _scatter(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(self._active)[:, None]  # (B, 1)
        return rows.to(self.device), slots.to(self.device)

    def _reserve(self, frames: int) -> None:
        """Without a window the ring never turns: double it until ``frames`` fit."""
        store = self._memory.store
        capacity = store.shape[5]
        if self.span is not None or frames <= capacity:
            return
        while capacity < frames:
            capacity *= 2
        self._memory.store = _grown(store, capacity)
        if self._memory.scales is not None:
            self._memory.scales = _grown(self._memory.scales, capacity)

    def _used(self, positions: list[int]) -> int:
        """Slots in use by streams at ``positions``; without layers nothing was ever stored."""
        if self._memory.store.shape[0] == 0:
            return 0
        return max(positions) if self.span is None else min(max(positions), self.span)

    # -- save and restore ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Everything these streams need to go on, as tensors that safetensors can write.

        Of a view (:meth:`rows`) it holds the streams of the view alone.
        """
        bounds = [-1 if bound is None else bound for bound in (self.window, self.segment)]
        used = self._used(self.positions)
        parts = {
            name: part[:, :, self._index, :, :, :used].clone(memory_format=torch.contiguous_format)
            for name, part in zip(_PARTS, self._memory.parts, strict=False)
        }
        return {
            **parts,
            "positions": torch.tensor(self.positions),
            "bounds": torch.tensor(bounds),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Let these streams go on where those of ``state`` stood; of a view, only its rows.

        Raises:
            ValueError: not such a state, or one of another window, model, frame size or number of
                streams; nothing has changed then.
        """
        _check_state(state)
        for name, bound in zip(("window", "segment"), state["bounds"].tolist(), strict=True):
            saved = None if bound < 0 else bound
            if saved != getattr(self, name):
                raise ValueError(
                    f"the saved streams have {name}={saved}, these have "
                    f"{name}={getattr(self, name)}; build the encoder with the same setting"
                )
        saved, positions = state["keys_values"], state["positions"].tolist()
        store, used = self._memory.store, self._used(positions)
        expected = (*store.shape[:2], self.batch_size, *store.shape[3:5], used, store.shape[6])
        if (tuple(saved.shape), saved.dtype) != (expected, store.dtype):
            raise ValueError(
                "(layers, 2, rows, patches, heads, slots, head width) of the saved streams is "
                f"{tuple(saved.shape)} in {saved.dtype}, here {expected} in {store.dtype}; they "
                "belong to another model, frame size or number of streams"
            )
        self._reserve(used)
        self.reset(self._active)
        for name, part in zip(_PARTS, self._memory.parts, strict=False):
            part[:, :, self._index, :, :, :used] = state[name].to(self.device)
        for row, position in zip(self._active, positions, strict=True):
            self._memory.positions[row] = position

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Tensor],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> StreamingCache:
        """Rebuild a cache from :meth:`state_dict`, on ``device`` if given.

        ``dtype`` is that of the model, where keys and values are kept in another.

        Raises:
            ValueError: not such a state, or a damaged one.
        """
        _check_state(state)
        saved = state["keys_values"]
        layers, _, batch, patches, heads, _, width = saved.shape
        window, segment = (None if bound < 0 else bound for bound in state["bounds"].tolist())
        dtype = dtype or state.get("scales", saved).dtype
        cache = cls(
            layers, batch, patches, heads, width,
            window=window, segment=segment, dtype=dtype, device=device or saved.device,
            kept_as=None if saved.dtype == dtype else saved.dtype,
        )  # fmt: skip
        cache.load_state_dict(state)
        return cache


def _empty_store(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    # A tensor born in inference mode could not be written outside of it, by a later reset, say.
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=dtype, device=device)


def _grown(store: Tensor, capacity: int) -> Tensor:
    shape = (*store.shape[:5], capacity, store.shape[6])
    grown = _empty_store(shape, store.dtype, store.device)
    grown[..., : store.shape[5], :] = store
    return grown


def frames_in_ring(seen: Tensor, capacity: int) -> Tensor:
    """Frame in each slot after ``seen`` ``(B,)`` frames: ``(B, capacity)``, negative if empty."""
    last = seen[:, None] - 1  # (B, 1)
    return last - (last - torch.arange(capacity, device=seen.device)) % capacity


def _check_state(state: Mapping[str, Tensor]) -> None:
    expected = {"keys_values", "positions", "bounds"}
    if "keys_values" in state and state["keys_values"].dtype == torch.int8:
        expected.add("scales")
    if set(state) != expected:
        raise ValueError(
            f"not the state of a StreamingCache: it holds {sorted(state)}, expected "
            f"{sorted(expected)}"
        )
    shape, positions = tuple(state["keys_values"].shape), state["positions"].tolist()
    if len(shape) != 7 or len(positions) != shape[2] or min(positions, default=-1) < 0:
        raise ValueError(
            f"the state of a StreamingCache is damaged: keys and values {shape} for streams at "
            f"{positions}"
        )
