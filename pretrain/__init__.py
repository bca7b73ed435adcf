"""Multitask video-language pretraining: lift an image encoder into time by aligning it with text.

One idea at three granularities: features ``(…, D)`` against texts ``(C, D)``, cosine similarity,
scale, bias, sigmoid loss. `alignment` holds that formula, `objectives` say for each task what the
features, texts and targets are, `datasets` read annotations and videos, `text` the frozen text
tower, `sampling` which clips meet in an update, `model` and `train` put them together. `align` asks
the outcome which of some texts fits a video.
"""

from pretrain.align import Alignment, align
from pretrain.alignment import alignment_loss
from pretrain.config import ModelConfig, OptimConfig, PretrainConfig, TaskConfig
from pretrain.text import TextTower
from pretrain.train import train

__all__ = [
    "Alignment",
    "ModelConfig",
    "OptimConfig",
    "PretrainConfig",
    "TaskConfig",
    "TextTower",
    "align",
    "alignment_loss",
    "train",
]
