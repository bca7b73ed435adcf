"""Frame sampling: parity with the released rules at their lowest and highest draws, and bounds."""

import json

import numpy as np
import pytest

from pretrain.datasets.frames import RULES


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
def test_localization_rule_equals_the_released_one(golden):
    for case in released(golden, "grounding_localization"):
        if case["sample_type"] != "uniform":
            continue
        arguments = case["n_frames"], case["clip_len"]
        low = RULES["spread"](*arguments, Extreme(False), 1)
        high = RULES["spread"](*arguments, Extreme(True), 1)
        assert (low.tolist(), high.tolist()) == (case["lo"]["indices"], case["hi"]["indices"])


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
