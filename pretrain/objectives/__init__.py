"""The tasks: each says what its features, texts and targets are, and how it is measured."""

from pretrain.objectives.base import Aligned, AlignedPixels, LabelSpace, Metric, Objective
from pretrain.objectives.grounding import Grounding
from pretrain.objectives.instance_segmentation import InstanceSegmentation
from pretrain.objectives.localization import Localization
from pretrain.objectives.recognition import Recognition
from pretrain.objectives.referring_segmentation import ReferringSegmentation
from pretrain.objectives.retrieval import Retrieval

OBJECTIVES = (
    "recognition",
    "retrieval",
    "localization",
    "grounding",
    "instance_segmentation",
    "referring_segmentation",
)

__all__ = [
    "OBJECTIVES",
    "Aligned",
    "AlignedPixels",
    "Grounding",
    "InstanceSegmentation",
    "LabelSpace",
    "Localization",
    "Metric",
    "Objective",
    "Recognition",
    "ReferringSegmentation",
    "Retrieval",
]
