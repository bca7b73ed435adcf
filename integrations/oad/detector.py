"""The live detector: MAT on streams of features, step by step, exact and bounded in memory.

A stream's past is kept in two rings, allocated once. A step is projected when it arrives and never
again; a window is then read from the rings by step number (step i lies at slot i modulo size):

    long ring   keys and values of the first memory stage   L + W steps x 2 D, for each layer
    work ring   work tokens, without position               W steps x D

Long tokens carry no position, so their keys and values stay true while the window moves on. What
the learned queries ask never changes, so it is computed at the start. The rest of a step (W + A
tokens through work decoder, generator and fusions) depends on positions in the moving window.

From step W - 1 on, ``push`` returns the online protocol at batch size 1
(``protocols.online_scores``), because both call ``protocols.newest_logits``; before, what that
protocol gives with ``opening="short"``. Letters as in ``mat.py``, t for the steps of one push.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from integrations.oad.losses import probabilities
from integrations.oad.mat import Embedded, MatHead
from integrations.oad.protocols import Softmax, newest_logits, require_eval

WarmUp = Literal["short", "silent"]


@dataclass(frozen=True)
class Detection:
    """What the detector says after each of t steps of B streams.

    Scores lie on the head's device, in float32 or wider; step and valid on the CPU.
    """

    scores: Tensor  # (B, t, C) class probabilities of the step itself
    anticipation: Tensor  # (B, t, A, C): [:, :, k] for 1 + k * anticipation_rate steps later
    step: Tensor  # (B, t) int64, the step's number in its stream, from 0
    valid: Tensor  # (B, t) bool; False: nothing said yet (silent warm-up), all scores are 0


class OnlineDetector:
    """Detects and anticipates actions in live streams of features.

    Example:
        >>> detector = OnlineDetector(head, batch_size=2, ignore_index=21)
        >>> detector.push(features)             # a step for each stream, (2, Dv)
        >>> detector.push(features)             # several, (2, t, Dv)
        >>> detector.push(features, rows=[1])   # only the second stream has a new step, (1, Dv)
        >>> detector.reset(rows=[0])            # the first stream ends, another takes its place

    Args:
        head: in eval mode. Its weights must not change while the detector lives.
        batch_size: number of streams, each at its own position.
        ignore_index: the target column that was not trained (THUMOS 21, TVSeries -100); for this
            and for ``softmax`` see ``losses.probabilities``.
        warmup: what to say in a stream's first W - 1 steps, while work memory fills. "short", the
            better one live, answers from the first step on: the head reads the steps there are, at
            positions 0, 1, ...; its later stages have met full windows only in training. "silent"
            says nothing, as the release.
        chunk: most steps of a stream that are computed together; a longer push is cut. More is
            faster and takes more room.

    Raises:
        ValueError: a head in training mode, or an option that is not known.
    """

    def __init__(
        self,
        head: MatHead,
        batch_size: int = 1,
        *,
        ignore_index: int,
        softmax: Softmax = "trained",
        warmup: WarmUp = "short",
        chunk: int = 8,
    ):
        require_eval(head)
        if warmup not in ("short", "silent"):
            raise ValueError(f"warmup={warmup!r} is not one of ['short', 'silent']")
        if batch_size < 1 or chunk < 1:
            raise ValueError(f"batch_size={batch_size} and chunk={chunk} must be at least 1")
        self.head, self.batch_size, self.chunk = head, batch_size, chunk
        self.ignore_index, self.softmax, self.warmup = ignore_index, softmax, warmup
        self._seen = np.zeros(batch_size, dtype=np.int64)  # steps that each stream has had
        c, weight = head.config, head.classifier.weight
        slots = c.work_steps + chunk - 1  # a chunk is written before its first step is read
        layers = c.memory_stages[0].layers if c.long_steps else 0
        self._rings = Embedded(
            work=weight.new_zeros(batch_size, slots, c.dim),
            long=[
                weight.new_zeros(batch_size, c.long_steps + slots, 2 * c.dim) for _ in range(layers)
            ],
        )
        with torch.no_grad():
            self._questions = head.questions()

    @torch.inference_mode()
    def push(
        self, features: Tensor, motion: Tensor | None = None, rows: Sequence[int] | None = None
    ) -> Detection:
        """Take the next step or steps of all streams, or of the ``rows`` named, and score them.

        features (B, Dv) or (B, t, Dv), motion likewise (B, Dm) or (B, t, Dm) for a two-stream head.
        Raises ValueError for a wrong shape, another number of streams, or values that are not
        finite (they would stay in memory for L + W steps). The streams then go on unharmed.
        """
        rows = list(range(self.batch_size)) if rows is None else list(rows)
        visual, motion = self._checked(features, motion, rows)
        steps = self._seen[rows][:, None] + np.arange(visual.shape[1])  # (B, t)
        said = []
        for at in range(0, visual.shape[1], self.chunk):
            now = slice(at, at + self.chunk)
            flow = None if motion is None else motion[:, now]
            self._remember(visual[:, now], flow, rows, steps[:, now])
            said.append(self._speak(rows, steps[:, now]))
        self._seen[rows] += visual.shape[1]
        said = torch.cat(said, dim=1)  # (B, t, 1 + A, C)
        return Detection(
            scores=said[:, :, 0],
            anticipation=said[:, :, 1:],
            step=torch.from_numpy(steps),
            valid=torch.from_numpy(steps >= self._first_step),
        )

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Begin anew, all streams or the ``rows`` named; others go on undisturbed."""
        self._seen[slice(None) if rows is None else list(rows)] = 0

    @property
    def positions(self) -> list[int]:
        """Steps that each stream has had."""
        return self._seen.tolist()

    @property
    def memory_bytes(self) -> int:
        """Bytes of the rings; the same for a stream of any length."""
        return sum(ring.nbytes for ring in self._named_rings().values())

    def state_dict(self) -> dict[str, Tensor]:
        """All that the streams need to go on elsewhere, as tensors that safetensors can write."""
        rings = {name: ring.clone() for name, ring in self._named_rings().items()}
        return {"positions": torch.from_numpy(self._seen.copy()), **rings}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where the streams of ``state`` stood; head, batch size and chunk must be the same.

        Raises ValueError with the name and shapes of a tensor that does not fit; nothing is
        changed then.
        """
        targets = {"positions": torch.from_numpy(self._seen), **self._named_rings()}
        expected = {name: tuple(tensor.shape) for name, tensor in targets.items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if found != expected:
            name = min(n for n in found.keys() | expected if found.get(n) != expected.get(n))
            raise ValueError(
                f"the detector's state does not fit: {name!r} is {found.get(name, 'missing')},"
                f" expected {expected.get(name, 'no such tensor')}; it must come from a detector of"
                f" the same head config, batch_size={self.batch_size} and chunk={self.chunk}"
            )
        for name, target in targets.items():
            target.copy_(state[name])

    @property
    def _first_step(self) -> int:
        return self.head.config.work_steps - 1 if self.warmup == "silent" else 0

    def _named_rings(self) -> dict[str, Tensor]:
        return {
            "work": self._rings.work,
            **{f"long.{i}": ring for i, ring in enumerate(self._rings.long)},
        }

    def _checked(
        self, features: Tensor, motion: Tensor | None, rows: list[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Bring features to (B, t, D) on the head's device, or refuse them."""
        like = self.head.classifier.weight
        streams = []
        for name, given in (("visual", features), ("motion", motion)):
            if given is not None:
                given = (given[:, None] if given.ndim == 2 else given).to(like)
                if not given.isfinite().all():
                    raise ValueError(f"{name} features hold values that are not finite")
            streams.append(given)
        visual, motion = streams
        self.head.check_features(visual, motion, steps=None)
        if len(visual) != len(rows):
            raise ValueError(
                f"features for {len(visual)} streams, expected {len(rows)}; name the streams that"
                " have new steps with rows=[...]"
            )
        unknown = [row for row in rows if not 0 <= row < self.batch_size]
        if unknown or len(set(rows)) < len(rows):
            raise ValueError(f"rows={rows} must be different numbers below {self.batch_size}")
        if not visual.shape[1]:
            raise ValueError(f"features of no steps: {tuple(visual.shape)}")
        return visual, motion

    def _remember(
        self, visual: Tensor, motion: Tensor | None, rows: list[int], steps: np.ndarray
    ) -> None:
        """Project steps (B, c, .) and write them over the oldest ones."""
        row = torch.tensor(rows)[:, None]  # (B, 1)
        embedded = self.head.embed(visual, motion)
        for ring, new in zip(
            (self._rings.work, *self._rings.long), (embedded.work, *embedded.long), strict=True
        ):
            ring[row, torch.from_numpy(steps % ring.shape[1])] = new

    def _speak(self, rows: list[int], steps: np.ndarray) -> Tensor:
        """Probabilities (B, c, 1 + A, C) after each of the steps (B, c) of streams ``rows``."""
        c = self.head.config
        shape = (*steps.shape, 1 + c.anticipation_tokens, c.num_classes)
        dtype = torch.promote_types(self._rings.work.dtype, torch.float32)
        said = self._rings.work.new_zeros(shape, dtype=dtype)
        loud = steps >= self._first_step  # (B, c)
        if loud.any():
            stream = np.broadcast_to(np.array(rows)[:, None], steps.shape)[loud]
            stream = torch.from_numpy(stream).to(said.device)
            logits = newest_logits(self.head, self._rings, stream, steps[loud], self._questions)
            said[torch.from_numpy(loud)] = probabilities(logits, self.ignore_index, self.softmax)
        return said
