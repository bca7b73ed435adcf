"""The MAT head as an mmengine model: losses in training, both protocols' scores in evaluation.

All maths is in ``mat`` and ``protocols``; here it meets mmengine's three ways of calling a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from mmaction.registry import MODELS
from mmaction.structures import ActionDataSample
from mmengine.model import BaseModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from integrations.oad.detector import OnlineDetector
from integrations.oad.losses import FUTURE_LOSS_WEIGHT, mat_loss
from integrations.oad.mat import MatHead, MatOutput
from integrations.oad.mat_config import MatConfig
from integrations.oad.protocols import (
    OnlineScores,
    Opening,
    Softmax,
    online_scores,
    window_scores,
)

PROTOCOLS = ("online", "window")


@MODELS.register_module()
class MatDetector(BaseModel):
    """A ``MatHead`` over features, trained and evaluated by mmengine's ``Runner``.

    Args:
        head: ``MatConfig`` or its fields.
        ignore_index: target column whose frames do not count; negative: none.
        protocols: what evaluation runs, of "online" and "window".
        softmax: over the "trained" columns, or all of them as "released".
        opening: who scores the first steps of a video in the online protocol, see
            ``protocols.online_scores``.
        batch_windows: windows that evaluation computes at once; changes speed and memory only.
        stage_weights: of the losses of the work stages; None: as released.
        future_weight: of the loss of each future stage.
        data_preprocessor: mmengine's, moves batches to the device.
    """

    def __init__(
        self,
        head: MatConfig | Mapping,
        ignore_index: int,
        protocols: Sequence[str] = PROTOCOLS,
        softmax: Softmax = "trained",
        opening: Opening = "window",
        batch_windows: int = 64,
        stage_weights: Sequence[float] | None = None,
        future_weight: float = FUTURE_LOSS_WEIGHT,
        data_preprocessor: Mapping | None = None,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor)
        unknown = sorted(set(protocols) - set(PROTOCOLS))
        if unknown or not protocols:
            raise ValueError(f"protocols={list(protocols)}: choose from {', '.join(PROTOCOLS)}")
        config = head if isinstance(head, MatConfig) else MatConfig.from_dict(dict(head))
        self.head = MatHead(config)
        self.ignore_index = ignore_index
        self.protocols = tuple(protocols)
        self.softmax: Softmax = softmax
        self.opening: Opening = opening
        self.batch_windows = batch_windows
        self._scoring = {
            "ignore_index": ignore_index,
            "softmax": softmax,
            "batch_windows": batch_windows,
        }
        self.stage_weights = stage_weights
        self.future_weight = future_weight

    def forward(
        self,
        inputs: Mapping[str, Tensor | Sequence[Tensor]],
        data_samples: Mapping[str, Tensor] | Sequence[ActionDataSample] | None = None,
        mode: str = "tensor",
    ) -> MatOutput | dict[str, Tensor] | list[ActionDataSample]:
        """Call the head in one of mmengine's modes.

        - "tensor": ``inputs`` of a batch of windows, "visual" (B, L + W, Dv), "padding_mask"
          (B, L), "motion" (B, L + W, Dm) if any -> logits of all stages.
        - "loss": the same with ``data_samples`` "det_target" (B, W + A, C) and "fut_target"
          (B, F, C) -> "loss" and its unweighted parts.
        - "predict": ``inputs`` of whole videos, lists of "visual" (T, Dv) and "motion" (T, Dm);
          ``data_samples`` with "video" and "target" (T, C) -> the same samples with
          ``<protocol>_scores`` and ``<protocol>_targets`` (frames, C), NumPy, and
          ``anticipation_scores`` (T, C, A).
        """
        if mode == "predict":
            return self._predict(inputs, data_samples)
        output = self.head(inputs["visual"], inputs.get("motion"), inputs["padding_mask"])
        if mode == "tensor":
            return output
        if mode != "loss":
            raise ValueError(f"mode={mode!r} is not one of tensor, loss, predict")
        total, parts = mat_loss(
            output,
            **data_samples,
            ignore_index=self.ignore_index,
            stage_weights=self.stage_weights,
            future_weight=self.future_weight,
        )
        return {"loss": total, **parts}

    def _predict(
        self, inputs: Mapping[str, Sequence[Tensor]], samples: Sequence[ActionDataSample]
    ) -> list[ActionDataSample]:
        visuals = inputs["visual"]
        motions = inputs.get("motion") or [None] * len(visuals)
        if "online" in self.protocols:
            for sample, scores in zip(samples, self._online(visuals, motions), strict=True):
                sample.set_field(scores.detection.numpy(), "online_scores")
                sample.set_field(sample.target, "online_targets")
                sample.set_field(scores.anticipation.numpy(), "anticipation_scores")
        if "window" in self.protocols:
            for sample, visual, motion in zip(samples, visuals, motions, strict=True):
                windows = window_scores(self.head, visual, motion, **self._scoring)
                frames = np.ravel(windows.frames)
                sample.set_field(windows.scores.flatten(0, 1).numpy(), "window_scores")
                sample.set_field(sample.target[frames], "window_targets")
        return list(samples)

    def _online(
        self, visuals: Sequence[Tensor], motions: Sequence[Tensor | None]
    ) -> list[OnlineScores]:
        """Online scores of each video, (T, C) and (T, C, A)."""
        if self.opening == "window":
            return [
                online_scores(self.head, visual, motion, opening="window", **self._scoring)
                for visual, motion in zip(visuals, motions, strict=True)
            ]
        # Every step speaks for itself: the videos run side by side through the live detector.
        detector = OnlineDetector(
            self.head,
            len(visuals),
            ignore_index=self.ignore_index,
            softmax=self.softmax,
            chunk=max(1, self.batch_windows // len(visuals)),
        )
        motion = None if motions[0] is None else pad_sequence(motions, batch_first=True)
        said = detector.push(pad_sequence(visuals, batch_first=True), motion)
        return [
            OnlineScores(scores[: len(visual)].cpu(), self._by_horizon(ahead[: len(visual)].cpu()))
            for visual, scores, ahead in zip(visuals, said.scores, said.anticipation, strict=True)
        ]

    def _by_horizon(self, ahead: Tensor) -> Tensor:
        """From when it was said (T, A, C) to what it was said about (T, C, A); else 0."""
        steps, rate = len(ahead), self.head.config.anticipation_rate
        about = torch.zeros_like(ahead).transpose(1, 2)
        for k in range(ahead.shape[1]):
            delay = 1 + k * rate
            about[delay:, :, k] = ahead[: max(0, steps - delay), k]
        return about
