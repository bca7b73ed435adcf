"""Frame sampling: parity with the released rules at their lowest and highest draws, and bounds."""

import json
from pathlib import Path

import numpy as np
import pytest

from pretrain.datasets import Entry, Segment
from pretrain.datasets.captions import TRIMMED
from pretrain.datasets.decode import span
from pretrain.datasets.frames import RULES, VIEWS, choose
from pretrain.datasets.localization import frame_labels


class Extreme:
    """A generator whose every draw is the lowest or the highest value it may take."""

    def __init__(self, highest: bool) -> None:
        self.highest = highest

    def integers(self, low, high, endpoint=False):
        return np.asarray(high) - (0 if endpoint else 1) if self.highest else np.asarray(low)


def released(golden, name):
    return json.loads((golden / "pretraining/sampling.json").read_text())[name]


@pytest.mark.golden
@pytest.mark.parametrize(
    ("family", "rule", "length"),
    [("kinetics", "segments", "clip_len"), ("ssv2", "blocks", "num_segment")],
)
def test_recognition_rules_equal_the_released_ones(golden, family, rule, length):
    for case in released(golden, family):
        arguments = case["n_frames"], case[length]
        assert RULES[rule](*arguments, Extreme(False), 1).tolist() == case["train_lo"]
        assert RULES[rule](*arguments, Extreme(True), 1).tolist() == case["train_hi"]
        assert RULES[rule](*arguments, None, 1).tolist() == case["validation"]


@pytest.mark.golden
def test_retrieval_rule_equals_the_released_one(golden):
    for case in released(golden, "retrieval"):
        arguments = case["n_frames"], case["clip_len"]
        assert RULES["intervals"](*arguments, None, 1).tolist() == case["middle"]
        if case["falls_back_to_sorted_random_permutation"]:
            drawn = RULES["intervals"](*arguments, np.random.default_rng(0), 1)
            kept = drawn[: min(arguments)]
            assert (np.diff(kept) > 0).all()
            assert (drawn[len(kept) :] == kept[-1]).all()
        else:
            assert RULES["intervals"](*arguments, Extreme(False), 1).tolist() == case["train_lo"]
            assert RULES["intervals"](*arguments, Extreme(True), 1).tolist() == case["train_hi"]


@pytest.mark.golden
def test_the_first_thirty_seconds_of_didemo_are_the_released_ones(golden):
    for case in released(golden, "retrieval_trim_30s"):
        entry = Entry(Path("v"), end=TRIMMED.get(case["dataset"]))
        first, last = span(entry, case["n_frames"], case["fps"])
        drawn = RULES["intervals"](last - first, case["clip_len"], Extreme(True), 1)
        assert (first + drawn).tolist() == case["train_hi"]


@pytest.mark.golden
def test_localization_rule_equals_the_released_one(golden):
    for case in released(golden, "grounding_localization"):
        if case["sample_type"] != "uniform":
            continue
        arguments = case["n_frames"], case["clip_len"]
        low = RULES["spread"](*arguments, Extreme(False), 1)
        high = RULES["spread"](*arguments, Extreme(True), 1)
        assert (low.tolist(), high.tolist()) == (case["lo"]["indices"], case["hi"]["indices"])


@pytest.mark.golden
def test_mask_rule_equals_the_released_one(golden):
    for case in released(golden, "vis_and_refervos"):
        arguments = case["n_frames"], case["num_segment"]
        assert RULES["padded_blocks"](*arguments, Extreme(False), 1).tolist() == case["train_lo"]
        assert RULES["padded_blocks"](*arguments, Extreme(True), 1).tolist() == case["train_hi"]


@pytest.mark.golden
def test_grounding_rule_and_its_labels_equal_the_released_ones(golden):
    cases = [
        case
        for case in released(golden, "grounding_localization")
        if case["sample_type"] == "fixfps"
    ]
    assert cases
    for case in cases:
        windows = case["relevant_windows"]
        if len(windows) < 2:
            windows = [[case["start"], case["end"]]]
        segments = tuple(Segment(0, *window) for window in windows)
        for name, highest in (("lo", False), ("hi", True)):
            drawn = RULES["fixfps_released"](
                case["n_frames"], case["clip_len"], Extreme(highest), 1, case["fps"],
                (case["start"], case["end"]),
            )  # fmt: skip
            assert drawn.tolist() == case[name]["indices"]
            holds = frame_labels(segments, drawn / case["fps"], 1)[:, 0]
            if case["task"] == "grounding":
                assert holds.tolist() == [label == 1 for label in case[name]["labels"]]


@pytest.mark.golden
@pytest.mark.parametrize(
    ("family", "rule", "length", "count", "key"),
    [
        ("kinetics", "segments", "clip_len", 4, "test_4_segments"),
        ("ssv2", "blocks", "num_segment", 2, "test_2_segments_interleaved"),
    ],
)
def test_views_equal_the_released_ones(golden, family, rule, length, count, key):
    for case in released(golden, family):
        views = VIEWS[rule](case["n_frames"], case[length], count)
        assert views.shape == (count, case[length])
        if rule == "blocks":
            views = views.T.reshape(-1)  # stored as dealt, in turn
        assert views.tolist() == case[key]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [1, 2, 7, 16, 17, 100])
@pytest.mark.parametrize("training", [False, True])
def test_frames_exist_and_ascend(rule, length, training):
    rng = np.random.default_rng(length) if training else None
    frames = RULES[rule](length, 16, rng, 1)
    assert frames.dtype == np.int64
    assert 0 <= frames.min() <= frames.max() < length
    assert (np.diff(frames) >= 0).all()
    assert len(frames) == (min(length, 16) if rule == "consecutive" else 16)


def test_consecutive_frames_reach_every_start_and_keep_their_step():
    rng = np.random.default_rng(0)
    draws = [RULES["consecutive"](20, 5, rng, 3) for _ in range(200)]
    assert all((np.diff(frames) == 3).all() for frames in draws)
    assert {int(frames[0]) for frames in draws} == set(range(8))
    assert RULES["consecutive"](20, 5, None, 3).tolist() == [3, 6, 9, 12, 15]
    assert RULES["consecutive"](10, 16, rng, 4).tolist() in ([0, 4, 8], [1, 5, 9])


FPS = 10.0


def around(length, focus, seeds=60, num_frames=8, rule="fixfps"):
    draws = [
        choose(rule, length, num_frames, np.random.default_rng(seed), fps=FPS, focus=focus)
        for seed in range(seeds)
    ]
    assert all(len(frames) == num_frames for frames in draws)
    assert all((np.diff(frames) >= 0).all() for frames in draws)
    assert min(frames[0] for frames in draws) >= 0
    assert max(frames[-1] for frames in draws) < length
    return np.stack(draws) / FPS


def test_a_short_moment_is_seen_within_about_as_many_seconds_as_frames():
    times = around(1000, (50.0, 53.0))
    assert (times.max(1) - times.min(1) <= 8.2).all()
    assert ((times >= 50) & (times <= 53)).any(1).all()
    begins = times[:, 0]
    assert begins.min() < 46.5  # the moment is anywhere in the window
    assert begins.max() > 49


def test_a_long_moment_has_frames_outside_of_it():
    times = around(1000, (30.0, 60.0))
    outside = (times < 30) | (times > 60)
    assert 0.3 < outside.mean() < 0.7
    released = around(1000, (30.0, 60.0), rule="fixfps_released")
    assert not ((released < 30) | (released > 60)).any()


@pytest.mark.parametrize("focus", [(0.0, 0.5), (0.0, 2.9), (2.5, 2.9), (2.5, 9.0), (7.0, 9.0)])
@pytest.mark.parametrize("rule", ["fixfps", "fixfps_released"])
def test_short_videos_and_moments_past_their_end_give_frames_that_exist(focus, rule):
    around(30, focus, rule=rule)
    around(1, focus, rule=rule, seeds=3)


def test_the_end_of_a_video_keeps_the_moment_in_sight():
    times = around(400, (38.0, 39.9))
    assert (times.min(1) >= 31.5).all()
    assert (times >= 38).any(1).all()


def test_without_a_moment_the_whole_video_is_seen():
    rng = np.random.default_rng(0)
    assert choose("fixfps", 1000, 8, rng, fps=FPS)[-1] > 800
    for focus in (None, (50.0, 53.0)):
        frames = choose("fixfps", 1000, 8, None, fps=FPS, focus=focus)
        assert (frames[0], frames[-1]) == (0, 999)


def test_masks_of_a_still_image_repeat_it_and_short_videos_stay_whole():
    rng = np.random.default_rng(0)
    for draws in (rng, None):
        assert RULES["padded_blocks"](1, 4, draws).tolist() == [0] * 4
        assert RULES["padded_blocks"](3, 5, draws).tolist() == [0, 0, 0, 1, 2]
    assert RULES["padded_blocks"](10, 5, None).tolist() == [1, 3, 5, 7, 9]


@pytest.mark.parametrize("rule", VIEWS)
@pytest.mark.parametrize("length", [1, 3, 16, 50])
def test_views_lie_within_the_video_and_differ_where_they_can(rule, length):
    views = VIEWS[rule](length, 4, 3)
    assert views.shape == (3, 4)
    assert 0 <= views.min() <= views.max() < length
    assert (np.diff(views, axis=1) >= 0).all()
    if length == 50:
        assert len({tuple(view) for view in views}) == 3
