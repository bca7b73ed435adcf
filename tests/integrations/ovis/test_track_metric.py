"""Track AP inside mmengine's evaluator: percent, groups, files, and partial results."""

import json

import numpy as np
import pytest
from mmengine.evaluator import Evaluator

from integrations.ovis.evaluation import evaluate, read_predictions
from integrations.ovis.metrics import TrackAP
from integrations.ovis.model import VideoPrediction
from integrations.ovis.postprocess import Instance, VideoResult
from integrations.ovis.rle import encode

SIZE = (12, 16)


def masks(left):
    out = np.zeros((2, *SIZE), bool)
    out[:, 2:8, left : left + 6] = True
    return encode(out)


@pytest.fixture
def meta():
    videos = [{"id": n, "height": 12, "width": 16, "file_names": ["a", "b"]} for n in (11, 12)]
    annotations = [
        {"id": n, "video_id": video, "category_id": category, "iscrowd": 0, "camouflaged": hidden,
         "segmentations": masks(left)}
        for n, (video, category, left, hidden) in enumerate(
            [(11, 30, 0, False), (11, 50, 8, True), (12, 30, 4, False)], start=1
        )
    ]  # fmt: skip
    categories = [{"id": 30, "name": "cat"}, {"id": 50, "name": "owl"}]
    document = {"videos": videos, "categories": categories, "annotations": annotations}
    return {"category_ids": (30, 50), "document": document}


def said(video, *instances):
    found = [
        Instance(n, label, score, masks(left)) for n, (label, score, left) in enumerate(instances)
    ]
    return VideoPrediction(video, VideoResult(found, 2, SIZE))


def score(meta, *predictions, **options):
    evaluator = Evaluator(TrackAP(**options))
    evaluator.dataset_meta = meta
    for prediction in predictions:
        evaluator.process([prediction])
    return evaluator.evaluate(len(predictions))


def test_reports_percent_by_category_and_group(meta, tmp_path):
    predictions = [said(11, (0, 0.9, 0), (0, 0.8, 8)), said(12, (0, 0.7, 4))]
    found = score(
        meta, *predictions, groups={"camouflaged": "camouflaged"}, out=str(tmp_path / "p.json")
    )
    assert found["ytvis/classes"] == pytest.approx({"cat": 100 * (51 + 50 * 2 / 3) / 101, "owl": 0})
    assert found["ytvis/AP"] == pytest.approx(50 * (51 + 50 * 2 / 3) / 101)
    assert found["ytvis/agnostic_AP"] == pytest.approx(100)
    assert found["ytvis/recall_camouflaged"] == 0
    assert found["ytvis/APl"] == -1
    kept = read_predictions(tmp_path / "p.json")
    assert [(p["video_id"], p["category_id"]) for p in kept] == [(11, 30), (11, 30), (12, 30)]
    assert 100 * evaluate(meta["document"], kept).stats["AR10"] == found["ytvis/AR10"]


def test_a_group_that_is_found(meta):
    found = score(meta, said(11, (1, 0.5, 8)), said(12), groups={"hidden": "camouflaged"})
    assert found["ytvis/recall_hidden"] == 100
    assert found["ytvis/AP"] == pytest.approx(50)


def test_silent_videos_count_as_not_found(meta):
    found = score(meta, said(11), said(12), groups={"crowded": "crowd"})
    assert found["ytvis/AP"] == found["ytvis/agnostic_AP"] == 0
    assert found["ytvis/recall_crowded"] == -1  # nothing belongs to it
    json.dumps(found)


def test_a_split_without_annotations_is_the_servers(meta):
    with pytest.raises(ValueError, match="no annotations: write a submission"):
        score(meta | {"document": None}, said(11), said(12))
