"""The tasks: each says what its features, texts and targets are, and how it is measured."""

from pretrain.objectives.base import Aligned, LabelSpace, Metric, Objective
from pretrain.objectives.localization import Localization
from pretrain.objectives.recognition import Recognition
from pretrain.objectives.retrieval import Retrieval

OBJECTIVES = ("recognition", "retrieval", "localization")

__all__ = [
    "OBJECTIVES",
    "Aligned",
    "LabelSpace",
    "Localization",
    "Metric",
    "Objective",
    "Recognition",
    "Retrieval",
]
