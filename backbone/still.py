"""Still scenes: what has not moved is not computed again.

Under ``temporal_positions="reset"`` a stream is a row of segments of F frames, each a clip of its
own. Frame p of a segment depends on frames 0 to p of this segment alone, so where they show what
the segment before showed at the same places, its features are the same, and are given again:

    segment k      s0 s1 s2 s3 ...     kept: pixels, features
    segment k + 1  =  =  #  #          frames 0 and 1 cost a comparison; from frame 2 on it moves

A patch has moved when a value of its pixels differs by more than the threshold from what was last
encoded at that place, and then counts as moving until its segment ends: its memory differs now. At
threshold 0 one moving patch makes its whole frame run, for attention spreads it to all the others:
outputs are those of the exact path. At a higher threshold only the moving patches run, and meet the
others' spatial keys and values as they were (the idea of Eventful Transformers, ICCV 2023, with the
decision made once, on pixels). Streams of a batch run one by one, as each has patches of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cache import StepPlan, StreamingCache
from .configuration import StreamformerConfig
from .modeling import StreamformerModel


@dataclass
class _Scene:
    """What one stream saw and made at each place of a segment, and what moves in this one."""

    pixels: Tensor  # (F, C, h, P, w, P), as last encoded; NaN, unlike all, where nothing was yet
    spatial: Tensor | None  # (F, L, 2, A, N, d), keys and values; at threshold 0 nobody reads them
    tokens: dict[int, Tensor]  # (F, N, D) of each layer kept
    moving: Tensor  # (h, w) bool, since this segment began

    @property
    def memory_bytes(self) -> int:
        kept = [self.pixels, self.moving, *self.tokens.values()]
        kept += [] if self.spatial is None else [self.spatial]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)


def check_still(config: StreamformerConfig, threshold: float, memory: torch.dtype | None) -> None:
    """Refuse what cannot be had.

    Raises:
        ValueError: a threshold below 0, or a model whose frames never repeat: another policy than
            ``reset``, or a window that ends inside its segments; or a ``memory`` that rounds.
    """
    if memory is not None:
        raise ValueError(f"still={threshold} gives what was; memory={memory} rounds it: choose one")
    if not threshold >= 0:
        raise ValueError(f"still={threshold}: a change that counts as none is 0 or more")
    if config.temporal_positions != "reset" or config.span != config.num_frames:
        raise ValueError(
            f"still={threshold} needs frames whose past can repeat, the segments of "
            'temporal_positions="reset"; the model has temporal_positions='
            f'"{config.temporal_positions}", num_frames={config.num_frames}, '
            f'window={config.window}: load it with "reset" and no window, or without still'
        )


class StillMemory:
    """A :class:`StreamingCache` and, of each stream, the scene as it was; to be used in its place.

    Args:
        model: whose streams these are.
        cache: their memory.
        threshold: most that a pixel value may differ and count as still, in the units of the
            model's input.
    """

    def __init__(self, model: StreamformerModel, cache: StreamingCache, threshold: float) -> None:
        self.model, self.cache, self.threshold = model, cache, threshold
        self._whole = cache
        self._scenes: dict[int, _Scene] = {}
        self._rows = list(range(cache.batch_size))

    def rows(self, rows: Sequence[int]) -> StillMemory:
        """Some of the streams, sharing this memory; see :meth:`StreamingCache.rows`."""
        view = copy(self)
        view.cache, view._rows = self.cache.rows(rows), list(rows)
        return view

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Let streams start anew; what they saw is forgotten."""
        self.cache.reset(rows)
        for row in self._rows if rows is None else rows:
            self._scenes.pop(row, None)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the memory and of the scenes."""
        return self.cache.memory_bytes + sum(s.memory_bytes for s in self._scenes.values())

    def state_dict(self) -> dict[str, Tensor]:
        """State of the memory; scenes are not saved, and are seen anew within one segment."""
        return self.cache.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`StreamingCache.load_state_dict`."""
        self.cache.load_state_dict(state)
        for row in self._rows:
            self._scenes.pop(row, None)

    @torch.no_grad()
    def trunk(self, frames: Tensor, keep: Collection[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """What :meth:`StreamformerModel.trunk` gives for the next frames of these streams."""
        self.model.check_stream(frames, self.cache)
        last = len(self.model.layers)
        streams = [
            [self._push(row, frame, {*keep, last}) for frame in clip]
            for row, clip in zip(self._rows, frames.unsqueeze(2), strict=True)
        ]
        kept = {
            number: torch.stack([torch.stack([made[number] for made in s]) for s in streams])
            for number in {*keep, last}
        }  # (B, t, N, D)
        return kept[last], {number: kept[number] for number in keep}

    def _push(self, row: int, frame: Tensor, keep: Collection[int]) -> dict[int, Tensor]:
        """Tokens ``(N, D)`` of the layers in ``keep``, of one frame ``(1, C, H, W)``."""
        cache = self._whole.rows([row])
        place = cache.positions[0] % cache.segment
        if row not in self._scenes:
            self._scenes[row] = self._new_scene(frame, keep)
        scene = self._scenes[row]
        self._watch(scene, frame[0], place)
        if scene.moving.any():
            self._encode(scene, frame, place, cache)
        cache.advance(1)
        return {number: scene.tokens[number][place].clone() for number in keep}

    def _new_scene(self, frame: Tensor, keep: Collection[int]) -> _Scene:
        config, segment, size = self.model.config, self.cache.segment, self.model.config.patch_size
        channels, height, width = frame.shape[1:]
        h, w = height // size, width // size
        spatial = None
        if self.threshold:
            spatial = frame.new_empty(
                segment, config.num_hidden_layers, 2, config.num_attention_heads, h * w,
                config.head_dim,
            )  # fmt: skip
        return _Scene(
            pixels=frame.new_full((segment, channels, h, size, w, size), torch.nan),
            spatial=spatial,
            tokens={n: frame.new_empty(segment, h * w, config.hidden_size) for n in keep},
            moving=torch.zeros(h, w, dtype=torch.bool, device=frame.device),
        )

    def _watch(self, scene: _Scene, frame: Tensor, place: int) -> None:
        """Note which patches of a frame ``(C, H, W)`` move, and the pixels of those."""
        if place == 0:
            scene.moving.fill_(False)
        known = scene.pixels[place]  # (C, h, P, w, P)
        seen = frame.reshape(known.shape)
        still = (seen - known).abs() <= self.threshold  # False beside NaN
        scene.moving |= ~still.all(4).all(2).all(0)
        if self.threshold == 0 and scene.moving.any():
            scene.moving.fill_(True)
        known.copy_(torch.where(scene.moving[:, None, :, None], seen, known))

    def _encode(self, scene: _Scene, frame: Tensor, place: int, cache: StreamingCache) -> None:
        """Run the moving patches of a frame ``(1, C, H, W)``, and keep what they become."""
        moving = scene.moving.flatten()  # (N,)
        chosen = slice(None) if moving.all() else moving.nonzero()[:, 0]
        plan, rows = self.model.stream_plan(cache, 1, frame.device)
        plan = replace(
            plan,
            cache=plan.cache and _Past(cache, chosen),
            frame=None if scene.spatial is None else _Frame(scene.spatial[place], chosen),
        )
        tokens = self.model.embeddings(frame[None], rows)[:, :, chosen]  # (1, 1, M, D)
        _, kept = self.model.run_layers(tokens, plan, scene.tokens)
        for number, made in kept.items():
            scene.tokens[number][place, chosen] = made[0, 0]


@dataclass(frozen=True)
class _Past:
    """The temporal memory of some patches of one stream."""

    cache: StreamingCache
    patches: Tensor | slice

    def extend(self, layer: int, plan: StepPlan, new: Tensor) -> Tensor:
        """As :meth:`StreamingCache.extend`, new keys and values ``(2, 1, M, A, 1, d)``."""
        slots = self.cache.slots(layer)  # (2, 1, N, A, slots, d), a view
        slots[:, :, self.patches, :, plan.run] = new
        return slots[:, :, self.patches, :, : plan.visible]


@dataclass(frozen=True)
class _Frame:
    """Spatial keys and values of a whole frame, of which some patches are new."""

    spatial: Tensor  # (L, 2, A, N, d)
    patches: Tensor | slice

    def extend(self, layer: int, plan: None, new: Tensor) -> Tensor:
        """Put ``(2, 1, A, M, d)`` among the others and return all, ``(2, 1, A, N, d)``."""
        self.spatial[layer][:, :, self.patches] = new[:, 0]
        return self.spatial[layer][:, None]
