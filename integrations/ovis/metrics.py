"""Track AP and AR as an mmengine metric over what ``model.OvisModel`` predicts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS

from backbone.files import write_text
from integrations.ovis.evaluation import NOTHING, evaluate
from integrations.ovis.model import VideoPrediction


@METRICS.register_module()
class TrackAP(BaseMetric):
    """The twelve YouTube-VIS numbers, in percent; -1 where nothing is annotated.

    A sample is the ``VideoPrediction`` of one video. Category ids and ground truth are the data
    set's (``metainfo`` keys ``category_ids`` and ``document``, see ``data.WholeVideos``); a video
    that nothing was predicted for counts as one where nothing was found.

    Results: ``ytvis/AP`` and the others of ``evaluation.STATISTICS``, ``ytvis/agnostic_AP`` (all
    categories as one: are things found, whatever they are called?), ``ytvis/classes`` (AP by
    category), and for each group its recall at IoU 0.5, ``ytvis/recall_<group>``.

    Args:
        groups: field of an annotation by name of a group: objects that have it are looked at apart,
            such as ``{"camouflaged": "camouflaged"}``.
        out: JSON file for the predictions, which ``evaluation`` and ``submission`` read.
        collect_device: how ranks share their results, "cpu" or "gpu".
    """

    default_prefix = "ytvis"

    def __init__(
        self,
        groups: Mapping[str, str] | None = None,
        out: str | None = None,
        collect_device: str = "cpu",
    ) -> None:
        super().__init__(collect_device=collect_device)
        self.groups, self.out = dict(groups or {}), out

    def process(self, data_batch: Any, data_samples: Sequence[VideoPrediction]) -> None:
        """Keep what is said about the videos of one batch, as run lengths."""
        category_ids = self.dataset_meta["category_ids"]
        for sample in data_samples:
            self.results.append(sample.result.predictions(sample.video_id, category_ids))

    def compute_metrics(self, results: list[list[dict]]) -> dict[str, Any]:
        """Score all videos together."""
        document = self.dataset_meta["document"]
        if document is None:
            raise ValueError(
                "the data set has no annotations: write a submission (submission) for its server, "
                "and evaluate on a hold-out of the training videos"
            )
        predictions = [item for video in results for item in video]
        if self.out:
            write_text(self.out, json.dumps(predictions, allow_nan=False))
        scores = evaluate(document, predictions)
        anything = evaluate(document, predictions, categories=False)
        names = {item["id"]: item["name"] for item in document["categories"]}
        values = {name: _percent(value) for name, value in scores.stats.items()}
        values["agnostic_AP"] = _percent(anything.stats["AP"])
        values["classes"] = {
            names[category]: _percent(row["AP"])
            for category, row in scores.per_category.items()
            if row["AP"] != NOTHING
        }
        for group, field in self.groups.items():
            chosen = [
                item["id"]
                for item in document["annotations"]
                if item.get(field) and not item.get("iscrowd", 0)
            ]
            values[f"recall_{group}"] = _percent(scores.recall(chosen))
        return values


def _percent(value: float) -> float:
    return value if value == NOTHING else 100 * value
