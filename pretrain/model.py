"""The model in training: a video encoder, scale and bias, and a text tower that only teaches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from backbone import FrameFeatures, StreamformerModel
from pretrain.config import Freeze
from pretrain.datasets import Batch
from pretrain.objectives import Objective
from pretrain.text import TextTower

# SigLIP normalises pixels by mean 0.5 and standard deviation 0.5: bytes 0 to 255 become -1 to 1.
_HALF_RANGE = 127.5
_TEMPORAL = ("temporal", "time_embedding")
_SPATIAL_ATTENTION = ("spatial_attention.qkv", "spatial_attention.out")


class MultitaskModel(nn.Module):
    """Batch of one task in, loss out.

    The text tower is held but is no part of the module: it is neither trained, moved nor saved.
    Log scale and bias are vectors, of length 1 if shared and one entry per task otherwise; each
    task picks its entry, so every parameter takes part in every mini-batch, as distributed
    training wants it.
    """

    def __init__(
        self,
        backbone: StreamformerModel,
        objectives: Mapping[str, Objective],
        tower: TextTower,
        *,
        log_scale: float = math.log(10),
        bias: float = -2.0,
        shared_scale: bool = True,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.objectives = dict(objectives)
        self.tower = tower
        self.bf16 = bf16
        copies = 1 if shared_scale else len(objectives)
        self.log_scale = nn.Parameter(torch.full((copies,), float(log_scale)))
        self.bias = nn.Parameter(torch.full((copies,), float(bias)))

    def encode(self, frames: Tensor) -> FrameFeatures:
        """Features of clips (B, T, 3, H, W) in bytes."""
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=self.bf16):
            output = self.backbone(normalize(frames))
        return FrameFeatures(
            output.last_hidden_state, output.pooler_output, head=self.backbone.head
        )

    def forward(self, batches: Sequence[tuple[str, Batch]]) -> Tensor:
        """The alignment losses of batches of tasks, (len(batches),) in float32.

        Clips of one shape go through the encoder together.
        """
        return torch.stack(
            [
                self._loss(task, batch, features)
                for (task, batch), features in zip(batches, self._features(batches), strict=True)
            ]
        )

    def _features(self, batches: Sequence[tuple[str, Batch]]) -> list[FrameFeatures]:
        """Features of every batch."""
        shapes = [batch.frames.shape[1:] for _, batch in batches]
        if len(set(shapes)) > 1 or len(batches) == 1:
            return [self.encode(batch.frames) for _, batch in batches]
        whole = self.encode(torch.cat([batch.frames for _, batch in batches]))
        sizes = [len(batch.frames) for _, batch in batches]
        patches, frames = whole.patch_tokens.split(sizes), whole.frame_embeddings.split(sizes)
        return [FrameFeatures(*part, head=whole.head) for part in zip(patches, frames, strict=True)]

    def _loss(self, task: str, batch: Batch, features: FrameFeatures) -> Tensor:
        with torch.autocast(batch.frames.device.type, torch.bfloat16, enabled=self.bf16):
            aligned = self.objectives[task](features, batch, self.tower)
        entry = list(self.objectives).index(task) if len(self.bias) > 1 else 0
        loss = aligned.loss(self.log_scale[entry].exp(), self.bias[entry])
        if aligned.features.ndim > 3:  # patches leave the pooling's probe without a gradient
            loss = loss + 0.0 * features.frame_embeddings.sum()
        return loss


def is_temporal(name: str) -> bool:
    """Whether the lift adds a weight of this name: temporal attention and gate, the time table."""
    return any(part in name for part in _TEMPORAL)


def normalize(frames: Tensor) -> Tensor:
    """Bytes to the range that SigLIP expects, float32 in [-1, 1]."""
    return frames.float().div_(_HALF_RANGE).sub_(1.0)


def freeze(backbone: StreamformerModel, rule: Freeze) -> None:
    """Stop gradients by rule, on top of what LoRA has frozen already (see `ModelConfig.freeze`)."""
    for name, weight in backbone.named_parameters():
        adapter = "lora_" in name
        if rule == "spatial_attention":
            frozen = any(part in name for part in _SPATIAL_ATTENTION) and not adapter
        else:
            frozen = rule == "image" and not adapter and not is_temporal(name)
        if frozen:
            weight.requires_grad_(False)
