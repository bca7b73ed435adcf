"""YouTube-VIS numbers: parity with the original, against a plain loop, and what is refused."""

import copy
import json
import zipfile

import numpy as np
import pytest

from integrations.ovis import evaluation
from integrations.ovis.evaluation import (
    IOU_THRESHOLDS,
    STATISTICS,
    EvaluationError,
    evaluate,
    read_predictions,
    track_ious,
)
from integrations.ovis.layout import LayoutError
from integrations.ovis.rle import MaskError, decode, encode

SIZE = (12, 16)


@pytest.fixture(scope="module")
def expected(golden):
    return json.loads((golden / "ovis/ytvis_expected.json").read_text())


def golden_case(golden, name):
    folder = golden / "ovis"
    return (
        json.loads((folder / f"ytvis_{name}_gt.json").read_text()),
        json.loads((folder / f"ytvis_{name}_pred.json").read_text()),
    )


def derived_case(golden, name):
    """Ground truth and predictions of every stored case, as the file describes them."""
    truth, predictions = golden_case(golden, "crowd" if name == "crowd" else "main")
    if name == "main_perfect_predictions":
        fields = ("video_id", "category_id", "segmentations")
        predictions = [
            {**{key: a[key] for key in fields}, "score": 1.0} for a in truth["annotations"]
        ]
    if name == "main_without_first_video_predictions":
        first = truth["videos"][0]["id"]
        predictions = [item for item in predictions if item["video_id"] != first]
    return truth, predictions


@pytest.mark.golden
@pytest.mark.parametrize(
    "name",
    ["main", "crowd", "main_perfect_predictions", "main_without_first_video_predictions"],
)
def test_all_statistics_are_the_originals(golden, expected, name):
    case = expected["cases"][name]
    scores = evaluate(*derived_case(golden, name))
    assert list(scores.stats) == expected["stat_names"] == list(STATISTICS)
    assert scores.stats == pytest.approx(case["stats"], abs=expected["tolerance"]["stats_abs"])
    for category, value in case.get("AP_per_category", {}).items():
        found = scores.per_category[int(category)]["AP"]
        assert found == pytest.approx(-1 if value is None else value, abs=1e-9)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["main", "crowd"])
def test_track_ious_are_the_originals(golden, expected, name):
    truth, predictions = golden_case(golden, name)
    sizes = {video["id"]: (video["height"], video["width"]) for video in truth["videos"]}
    for entry in expected["cases"][name]["ious"]:
        tracks = []
        for items in (predictions, truth["annotations"]):
            here = [i for i in items if all(i[k] == entry[k] for k in ("video_id", "category_id"))]
            here.sort(key=lambda item: -item.get("score", 0))
            tracks.append([item["segmentations"] for item in here])
        found = track_ious(*tracks, sizes[entry["video_id"]])
        np.testing.assert_allclose(found, entry["rows_by_descending_score"], atol=1e-9)


# ------------------------------------------------------------------ against the plain definition


def random_case(rng, crowds=True):
    """Blocks of pixels: many IoUs are equal, many scores tie, many frames are empty."""
    videos = [
        {"id": n, "height": SIZE[0], "width": SIZE[1], "file_names": ["x"] * int(t)}
        for n, t in zip((9, 4, 7), rng.integers(1, 4, 3), strict=True)
    ]

    def track(frames):
        masks = np.zeros((frames, *SIZE), bool)
        for mask in masks:
            if rng.random() < 0.75:
                y, x = rng.integers(0, 3, 2) * 4
                mask[y : y + rng.integers(2, 8), x : x + 8] = True
        return encode(masks)

    def items(count):
        chosen = [videos[n] for n in rng.integers(0, 3, count)]
        return [
            {"video_id": v["id"], "category_id": int(rng.integers(1, 3)), "segmentations":
             track(len(v["file_names"]))} for v in chosen
        ]  # fmt: skip

    annotations = [
        {**item, "id": n, "iscrowd": int(crowds and rng.random() < 0.25)}
        for n, item in enumerate(items(10))
    ]
    predictions = [{**item, "score": float(rng.integers(1, 6) / 8)} for item in items(30)]
    categories = [{"id": n, "name": str(n)} for n in (1, 2, 3)]
    truth = {"videos": videos, "categories": categories, "annotations": annotations}
    return truth, predictions


def plain_iou(one, other):
    one, other = (decode(track, SIZE, "") for track in (one, other))
    union = (one | other).sum()
    return (one & other).sum() / union if union else 0.0


def plain_ap(truth, predictions, threshold, category, most=100):
    """AP and recall of one category, all sizes, one prediction after the other."""
    rows, wanted = [], 0
    for video in sorted(video["id"] for video in truth["videos"]):
        here = [a for a in truth["annotations"]
                if (a["video_id"], a["category_id"]) == (video, category)]  # fmt: skip
        here.sort(key=lambda a: a["iscrowd"])
        wanted += sum(not a["iscrowd"] for a in here)
        said = [p for p in predictions if (p["video_id"], p["category_id"]) == (video, category)]
        said.sort(key=lambda p: -p["score"])
        free = [True] * len(here)
        for guess in said[:most]:
            best, taken = threshold, None
            for n, annotation in enumerate(here):
                if not free[n]:
                    continue
                if taken is not None and annotation["iscrowd"] and not here[taken]["iscrowd"]:
                    break
                iou = guess["ious"][annotation["id"]]
                if iou >= best:
                    best, taken = iou, n
            if taken is not None:
                free[taken] = bool(here[taken]["iscrowd"])
                if here[taken]["iscrowd"]:
                    continue
            rows.append((guess["score"], taken is not None))
    if not wanted:
        return -1.0, -1.0
    rows.sort(key=lambda row: -row[0])
    hits = np.cumsum([hit for _, hit in rows], dtype=float)
    precision = hits / np.arange(1, len(hits) + 1)
    values = [
        max(precision[hits / wanted >= recall], default=0.0) for recall in np.linspace(0, 1, 101)
    ]
    return float(np.mean(values)), (hits[-1] / wanted if len(hits) else 0.0)


@pytest.mark.parametrize("seed", range(6))
def test_equals_a_plain_loop_over_pairs(seed):
    truth, predictions = random_case(np.random.default_rng(seed))
    scores = evaluate(truth, predictions)
    for guess in predictions:
        guess["ious"] = {
            a["id"]: plain_iou(guess["segmentations"], a["segmentations"])
            for a in truth["annotations"]
            if a["video_id"] == guess["video_id"]
        }
    for category in (1, 2, 3):
        plain = [plain_ap(truth, predictions, t, category) for t in IOU_THRESHOLDS]
        found = scores.per_category[category]
        assert found["AP"] == pytest.approx(np.mean([ap for ap, _ in plain]))
        assert found["AP50"] == pytest.approx(plain[0][0])
        assert found["AP75"] == pytest.approx(plain[5][0])
        assert found["AR100"] == pytest.approx(np.mean([recall for _, recall in plain]))
        single = [plain_ap(truth, predictions, t, category, 1)[1] for t in IOU_THRESHOLDS]
        assert found["AR1"] == pytest.approx(np.mean(single))
    present = [row["AP"] for row in scores.per_category.values() if row["AP"] >= 0]
    assert scores.stats["AP"] == pytest.approx(np.mean(present))


def test_order_of_videos_and_annotations_does_not_matter():
    truth, predictions = random_case(np.random.default_rng(1), crowds=False)
    expected = evaluate(truth, predictions).stats
    truth["videos"].reverse()
    assert evaluate(truth, predictions).stats == expected


# ------------------------------------------------------------------ edges


def one_video(frames=2, **changes):
    masks = np.zeros((frames, *SIZE), bool)
    masks[:, 2:8, 2:8] = True
    rles = encode(masks)
    video = {"id": 5, "height": SIZE[0], "width": SIZE[1], "file_names": ["x.jpg"] * frames}
    annotation = {"id": 1, "video_id": 5, "category_id": 2, "iscrowd": 0, "segmentations": rles}
    truth = {"videos": [video], "categories": [{"id": 2, "name": "cat"}],
             "annotations": [annotation]}  # fmt: skip
    guess = {"video_id": 5, "category_id": 2, "score": 0.5, "segmentations": rles} | changes
    return truth, [guess]


def test_no_predictions_is_zero_and_not_nothing():
    truth, _ = one_video()
    stats = evaluate(truth, []).stats
    assert stats["AP"] == stats["AR100"] == stats["APs"] == 0
    assert stats["APm"] == stats["ARl"] == -1


def test_a_video_of_one_frame():
    assert evaluate(*one_video(frames=1)).stats["AP"] == pytest.approx(1)


def test_null_and_an_all_zero_mask_are_the_same():
    truth, [guess] = one_video()
    empty = {"size": list(SIZE), "counts": [SIZE[0] * SIZE[1]]}
    alternatives = []
    for nothing in (None, empty):
        changed = copy.deepcopy(truth)
        changed["annotations"][0]["segmentations"][1] = nothing
        alternatives.append(evaluate(changed, [guess]).stats)
    assert alternatives[0] == alternatives[1]
    assert alternatives[0]["AP50"] == pytest.approx(1)  # IoU is just 0.5
    assert alternatives[0]["AP75"] == 0


def test_two_absent_tracks_have_no_overlap():
    truth, [guess] = one_video()
    nothing = {"segmentations": [None, None]}
    truth["annotations"][0] |= nothing
    assert evaluate(truth, [guess | nothing]).stats["AP"] == 0


def test_a_track_of_more_than_255_frames():
    assert evaluate(*one_video(frames=300)).stats["AR1"] == 1


def test_found_annotations_are_told_apart():
    truth, [guess] = one_video()
    away = np.zeros((2, *SIZE), bool)
    away[:, 9:, 9:] = True
    hidden = {**truth["annotations"][0], "id": 2, "segmentations": encode(away)}
    truth["annotations"].append(hidden)
    scores = evaluate(truth, [guess])
    assert scores.recall([1]) == 1
    assert scores.recall([2]) == 0
    assert scores.recall([1, 2], iou=0.75) == 0.5
    assert scores.recall([]) == -1
    with pytest.raises(EvaluationError, match="annotation 3 was not scored"):
        scores.recall([3])
    with pytest.raises(EvaluationError, match=r"iou=0\.42"):
        scores.recall([1], iou=0.42)


def test_without_categories_a_wrong_name_does_not_matter():
    truth, [guess] = one_video(category_id=3)
    truth["categories"].append({"id": 3, "name": "dog"})
    assert evaluate(truth, [guess]).stats["AP"] == 0
    anything = evaluate(truth, [guess], categories=False)
    assert anything.stats["AP"] == pytest.approx(1)
    assert list(anything.per_category) == [-1]


def test_only_the_best_hundred_of_a_video_and_category_count():
    truth, [guess] = one_video()
    wrong = {**guess, "score": 0.9, "segmentations": [None, None]}
    assert evaluate(truth, [wrong] * 99 + [guess]).stats["AR100"] == 1
    assert evaluate(truth, [wrong] * 100 + [guess]).stats["AR100"] == 0


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"video_id": 6}, LayoutError, "prediction 0 is of video 6"),
        ({"category_id": 9}, LayoutError, "prediction 0 is of category 9, but there are only 2"),
        ({"score": float("nan")}, EvaluationError, "prediction 0: score nan"),
        ({"score": None}, EvaluationError, "prediction 0: score None"),
        ({"segmentations": [None]}, LayoutError, "has 1 segmentations, but video 5 has 2"),
        ({"segmentations": [{"size": [16, 12], "counts": [192]}, None]}, MaskError,
         "prediction 0, frame 0: the mask is 16 x 12"),
        ({"segmentations": [None, {"size": [12, 16], "counts": [100]}]}, MaskError,
         "prediction 0, frame 1: run lengths cover 100 pixels"),
        ({"segmentations": [None, {"size": [12, 16], "counts": "d0"}]}, MaskError,
         "prediction 0, frame 1: the compressed counts cover 20 pixels"),
    ],
)  # fmt: skip
def test_refuses_predictions_that_do_not_fit(changes, kind, message):
    with pytest.raises(kind, match=message):
        evaluate(*one_video(**changes))


def test_refuses_unknown_categories_in_the_ground_truth():
    truth, predictions = one_video()
    truth["annotations"][0]["category_id"] = 41
    with pytest.raises(LayoutError, match="annotation 1 is of category 41"):
        evaluate(truth, predictions)


def test_refuses_a_split_whose_annotations_a_server_keeps():
    truth, predictions = one_video()
    truth["annotations"] = None
    with pytest.raises(EvaluationError, match="no annotations.*hold-out"):
        evaluate(truth, predictions)


# ------------------------------------------------------------------ command line


def test_command_reads_json_and_zip(tmp_path, capsys):
    truth, predictions = one_video()
    (tmp_path / "gt.json").write_text(json.dumps(truth, default=bytes.decode))
    (tmp_path / "pred.json").write_text(json.dumps(predictions))
    with zipfile.ZipFile(tmp_path / "pred.zip", "w") as archive:
        archive.writestr("results.json", json.dumps(predictions))
    arguments = [str(tmp_path / "gt.json"), "--per-class", "--out", str(tmp_path / "out.json")]
    for name in ("pred.json", "pred.zip"):
        evaluation.main([arguments[0], str(tmp_path / name), *arguments[1:]])
        printed = capsys.readouterr().out.splitlines()
        assert printed[0].split() == list(STATISTICS)
        assert printed[2].split()[:2] == ["cat", "100.00"]
        assert json.loads(printed[-1])["AP"] == pytest.approx(1)
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["per_category"]["2"]["AP50"] == pytest.approx(1)


def test_reading_refuses_what_are_no_predictions(tmp_path):
    (tmp_path / "p.json").write_text("{}")
    with pytest.raises(EvaluationError, match="a list, not a dict"):
        read_predictions(tmp_path / "p.json")
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.writestr("other.json", "[]")
    with pytest.raises(EvaluationError, match=r"no results\.json"):
        read_predictions(tmp_path / "p.zip")
