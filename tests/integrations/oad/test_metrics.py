"""Per-frame metrics: the stored numbers of the original code, and properties of their own."""

import json

import numpy as np
import pytest
from mmaction.evaluation import mean_average_precision
from safetensors.numpy import load_file

from integrations.oad import metrics

CASES = ["thumos_map", "thumos_map_ties_missing", "tvseries_mcap", "tvseries_mcap_missing"]
NAMES = ["Background", "run", "jump", "swim", "Ambiguous"]


@pytest.fixture(scope="module")
def stored(golden):
    folder = golden / "oad"
    return load_file(folder / "metrics.safetensors"), json.loads(
        (folder / "metrics.json").read_text()
    )


def case(stored, name):
    tensors, numbers = stored
    facts = numbers[name]
    arguments = (
        tensors[f"{name}/score"],
        tensors[f"{name}/target"],
        facts["class_names"],
        facts["ignore_index"],
        facts["metric"] == "cAP",
    )
    return arguments, facts


def random_frames(n=300, seed=0):
    rng = np.random.default_rng(seed)
    target = np.zeros((n, 5), np.float32)
    target[np.arange(n), rng.choice(5, n, p=[0.5, 0.2, 0.15, 0.1, 0.05])] = 1
    return rng.random((n, 5)).astype(np.float32), target


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_mean_and_classes_equal_the_original(stored, name):
    arguments, facts = case(stored, name)
    mean, per_class = metrics.perframe_ap(*arguments)
    assert mean == pytest.approx(facts["mean"], abs=1e-7)
    assert per_class == pytest.approx(facts["per_class"], abs=1e-7)
    assert set(facts["class_names"]) - set(per_class) == set(facts["excluded"])


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES[:2])
def test_smooth_and_switch_equal_the_original(stored, name):
    (score, *rest), facts = case(stored, name)
    smooth = metrics.smooth_scores(score)
    for changed, key in [
        (smooth, "mean_smooth"),
        (metrics.raise_to_subclass(score, rest[1]), "mean_switch"),
        (metrics.raise_to_subclass(smooth, rest[1]), "mean_smooth_switch"),
    ]:
        assert metrics.perframe_ap(changed, *rest)[0] == pytest.approx(facts[key], abs=1e-7), key


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_deciles_equal_the_original(stored, name):
    arguments, facts = case(stored, name)
    stages = metrics.stage_ap(*arguments, released=True)
    for (_, per_class), expected in zip(stages, facts["per_stage"].values(), strict=True):
        assert per_class == pytest.approx(expected["per_class"], abs=1e-7)


@pytest.mark.golden
def test_anticipation_equals_the_original(stored):
    tensors, numbers = stored
    names = numbers["thumos_map"]["class_names"]
    mean, by_horizon = metrics.anticipation_ap(
        tensors["anticipation/score"], tensors["anticipation/target"], names, 21
    )
    assert mean == pytest.approx(numbers["anticipation"]["mean"], abs=1e-7)
    assert by_horizon == pytest.approx(numbers["anticipation"]["mAP"], abs=1e-7)


@pytest.mark.golden
def test_recall_equals_the_original(stored):
    tensors, numbers = stored
    score, label, expected = tensors["ek100/scores"], tensors["ek100/labels"], numbers["ek100"]
    times = np.arange(8, 0, -1) / 4
    recall = [metrics.class_mean_recall(score[:, a], label) for a in range(8)]
    accuracy = [metrics.topk_hits(score[:, a], label).mean() for a in range(8)]
    assert recall == pytest.approx(expected["mean_top5_recall"], abs=1e-7)
    assert accuracy == pytest.approx(expected["top5_accuracy"], abs=1e-7)
    assert metrics.time_to_action(score, label, times) == pytest.approx(
        expected["time_to_action_top5"], abs=1e-7
    )


def test_mean_is_the_mean_average_precision_of_mmaction2():
    score, target = random_frames()
    score = np.round(score, 1)  # ties
    kept = target[:, 4] != 1
    expected = mean_average_precision(score[kept, 1:4], target[kept, 1:4])
    assert metrics.perframe_ap(score, target, NAMES, 4)[0] == expected


@pytest.mark.parametrize("calibrated", [False, True])
def test_order_of_frames_does_not_matter_even_with_ties(calibrated):
    score, target = random_frames()
    score = np.round(score, 1)
    order = np.random.default_rng(1).permutation(len(score))
    first = metrics.perframe_ap(score, target, NAMES, 4, calibrated)
    assert metrics.perframe_ap(score[order], target[order], NAMES, 4, calibrated) == first


def test_calibration_makes_a_class_as_valuable_when_it_is_rare():
    rng = np.random.default_rng(0)
    positive = rng.normal(1, 1, 4000)
    negative = rng.normal(0, 1, 400_000)

    def ap(n, calibrated):
        score = np.concatenate([positive, negative[:n]])
        return metrics.average_precision(score, np.arange(len(score)) < 4000, calibrated)

    assert ap(400_000, True) == pytest.approx(ap(4000, True), abs=0.02)
    assert ap(4000, True) == pytest.approx(ap(4000, False), abs=1e-12)
    assert ap(400_000, False) < 0.2


def test_prior_is_what_a_constant_score_earns():
    _, target = random_frames()
    constant = np.zeros(target.shape, np.float32)
    assert metrics.class_prior(target, 4) == pytest.approx(
        metrics.perframe_ap(constant, target, NAMES, 4)[0]
    )


def test_deciles_cover_each_action_once_and_end_with_videos():
    target = np.zeros((60, 5), np.float32)
    target[20:40, 1] = 1  # one run of the array, two actions: a video ends at 30
    target[:, 0] = 1 - target[:, 1]
    score = np.zeros((60, 5), np.float32)
    score[29, 1] = score[39, 1] = 1  # recognised at the last frame of each, and never before
    stages = metrics.stage_ap(score, target, NAMES, 4, lengths=[30, 30])
    values = [mean for mean, _ in stages]
    assert values[-1] == 1.0
    assert max(values[:-1]) < 0.1


@pytest.mark.parametrize("ignore_index", [-100, -1, 0])
def test_only_a_positive_ignore_column_drops_frames(ignore_index):
    score, target = random_frames()
    _, per_class = metrics.perframe_ap(score, target, NAMES, ignore_index)
    assert list(per_class) == NAMES[1:]


def test_errors_name_what_is_wrong():
    score, target = random_frames(20)
    broken = score.copy()
    broken[7, 2] = np.nan
    with pytest.raises(ValueError, match="1 of 20 frames .* first is frame 7"):
        metrics.perframe_ap(broken, target, NAMES, 4)
    with pytest.raises(ValueError, match=r"\(20, 4\).*\(20, 5\).*5 class names"):
        metrics.perframe_ap(score[:, :4], target, NAMES, 4)
    with pytest.raises(ValueError, match="no scored class is positive in any of 20 frames"):
        metrics.perframe_ap(score, np.zeros_like(target), NAMES, 4)
    with pytest.raises(ValueError, match="'Diving' is not among the 5 classes"):
        metrics.raise_to_subclass(score, NAMES)
    with pytest.raises(ValueError, match="odd and positive, got 4"):
        metrics.smooth_scores(score, 4)
    with pytest.raises(ValueError, match="sum to 19, but there are 20"):
        metrics.stage_ap(score, target, NAMES, 4, lengths=[10, 9])


def test_metric_object_scores_all_videos_together():
    score, target = random_frames()
    metric = metrics.PerFrameAP("window")
    metric.dataset_meta = {"classes": NAMES, "ignore_index": 4, "calibrated": False}
    videos = [
        {"window_scores": score[a:b], "window_targets": target[a:b]}
        for a, b in [(200, 300), (0, 200), (0, 0)]
    ]
    metric.process(None, videos[:1])
    metric.process(None, videos[1:])
    results = metric.evaluate(3)
    mean, per_class = metrics.perframe_ap(score, target, NAMES, 4)
    assert results["window/mAP"] == pytest.approx(mean, abs=1e-12)
    assert results["window/classes"] == pytest.approx(per_class, abs=1e-12)
    assert results["window/prior"] == pytest.approx(metrics.class_prior(target, 4))
    assert results["window/frames"] == 300


def test_metric_object_says_when_no_video_was_long_enough(caplog):
    metric = metrics.PerFrameAP("window")
    metric.dataset_meta = {"classes": NAMES, "ignore_index": 4, "calibrated": False}
    empty = np.zeros((0, 5), np.float32)
    metric.process(None, [{"window_scores": empty, "window_targets": empty}])
    assert metric.evaluate(1) == {"window/frames": 0}
    assert "window protocol: no video is long enough" in caplog.text
