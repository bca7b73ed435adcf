"""Windows and inference protocols: stored numbers, and causality where it is promised."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from integrations.oad.protocols import (
    detection_indices,
    future_indices,
    long_indices_eval,
    long_indices_train,
    online_scores,
    padding_mask,
    train_windows,
    window_scores,
    work_indices,
)


def features(config, length, seed=3):
    return torch.randn(length, config.visual_size, generator=torch.Generator().manual_seed(seed))


# ----- index rules


@pytest.mark.golden
def test_training_windows_equal_the_original(sampling):
    config, stored = sampling
    for epoch in stored["train"]:
        windows = [
            (video, start)
            for (video, length), offset in zip(
                stored["videos"].items(), epoch["offsets"], strict=True
            )
            for start in train_windows(length, config, offset)
        ]
        assert windows == [(w["video"], w["work_start"]) for w in epoch["windows"]]
        for w in epoch["windows"]:
            check_window(w, long_indices_train(w["work_start"], config), config, stored)


@pytest.mark.golden
def test_evaluation_windows_equal_the_original(sampling):
    config, stored = sampling
    windows = [(v, s) for v, n in stored["videos"].items() for s in train_windows(n, config)]
    assert windows == [(w["video"], w["work_start"]) for w in stored["eval_nonoverlap"]]
    for w in stored["eval_nonoverlap"]:
        check_window(w, long_indices_eval(w["work_start"], config), config, stored)
    for w in stored["online"]:
        # online targets cover work memory only
        w = w | {"det_target_indices": detection_indices(w["work_start"], config).tolist()}
        check_window(w, long_indices_eval(w["work_start"], config), config, stored)


def check_window(window, long, config, stored):
    start, length = window["work_start"], stored["videos"][window["video"]]
    assert long.tolist() == window["long_indices"]
    assert work_indices(start, config).tolist() == window["work_indices"]
    assert np.isinf(padding_mask(long)).sum() == window["num_masked"]
    assert np.isinf(padding_mask(long))[: window["num_masked"]].all()
    assert detection_indices(start, config).tolist() == window["det_target_indices"]
    assert future_indices(start, config, length).tolist() == window["fut_target_indices"]


def test_the_evaluation_grid_hangs_on_step_zero_and_then_moves(small_config):
    # long memory: 24 steps at rate 2; from start 24 on the grid moves with the window
    for start in (3, 4, 23, 24, 25, 40):
        low = max(0, start - 24)
        sampled = list(range(low, start, 2))
        expected = [0] * (12 - len(sampled)) + sampled
        assert long_indices_eval(start, small_config).tolist() == expected
    many = long_indices_eval(np.arange(50), small_config)
    one_by_one = [long_indices_eval(s, small_config) for s in range(50)]
    np.testing.assert_array_equal(many, one_by_one)
    np.testing.assert_array_equal(padding_mask(many), [padding_mask(i) for i in one_by_one])


def test_every_window_reads_at_least_one_long_entry(small_config):
    for start in range(60):
        for rule in (long_indices_train, long_indices_eval):
            indices = rule(start, small_config)
            assert indices.max() <= max(0, start - 1)
            assert (padding_mask(indices) == 0).any()


def test_work_and_anticipation_rates_thin_their_rows(small_config):
    config = replace(
        small_config, work_steps=8, work_rate=2, anticipation_steps=6, anticipation_rate=3
    )
    assert work_indices(5, config).tolist() == [5, 7, 9, 11]
    assert detection_indices(5, config).tolist() == [5, 7, 9, 11, 13, 16]


# ----- online protocol


@pytest.fixture
def online_golden(golden, golden_model):
    info = json.loads((golden / "oad" / "online_inference.json").read_text())
    tensors = load_file(golden / "oad" / "online_inference.safetensors")
    return golden_model("visual_gelu").head(), info, tensors


@pytest.mark.golden
@pytest.mark.parametrize("batch_windows", [1, 16])
def test_online_scores_equal_the_original(online_golden, batch_windows):
    head, info, tensors = online_golden
    for video in info["videos"]:
        scores = online_scores(
            head,
            tensors[f"{video}/features"],
            ignore_index=21,
            softmax="released",
            batch_windows=batch_windows,
        )
        close = {"rtol": 0, "atol": 1e-5}
        torch.testing.assert_close(scores.detection, tensors[f"{video}/det_scores"], **close)
        torch.testing.assert_close(scores.anticipation, tensors[f"{video}/ant_scores"], **close)


@pytest.mark.golden
def test_logits_of_every_stage_and_step_equal_the_original(online_golden):
    head, info, tensors = online_golden
    c = head.config
    for video in info["videos"]:
        newest = tensors[f"{video}/step_frame"].numpy()
        starts = newest - (c.work_steps - 1)
        steps = head.embed(tensors[f"{video}/features"][None])
        long = long_indices_eval(starts, c)
        with torch.no_grad():
            output = head.decode(
                steps.work[0, starts[:, None] + work_indices(0, c)],
                [kv[0, long] for kv in steps.long],
                torch.from_numpy(padding_mask(long)),
            )
        found = torch.stack([logits[:, c.work_tokens - 1 :] for logits in output.work], dim=1)
        torch.testing.assert_close(found, tensors[f"{video}/step_logits"], rtol=0, atol=1e-5)


@pytest.mark.golden
def test_window_scores_equal_the_original(online_golden):
    head, info, tensors = online_golden
    windows, scores, targets = [], [], []
    for video in info["videos"]:
        found = window_scores(
            head, tensors[f"{video}/features"].numpy(), ignore_index=21, softmax="released"
        )
        windows += [[video, s, s + head.config.work_steps] for s in found.starts.tolist()]
        scores.append(found.scores)
        targets.append(tensors[f"{video}/target"][found.frames])
    assert windows == info["window"]["windows"]
    torch.testing.assert_close(torch.cat(scores), tensors["window/scores"], rtol=0, atol=1e-5)
    assert torch.equal(torch.cat(targets), tensors["window/targets"])


@pytest.mark.parametrize("opening", ["window", "short"])
def test_no_score_depends_on_later_steps(make_head, small_config, opening):
    head = make_head(small_config)
    video = features(small_config, 45)
    scores = online_scores(head, video, ignore_index=-1, opening=opening)
    # the published opening scores the first window's 6 steps when the last one has come
    for step in (0, 3, 5, 6, 17, 30, 44) if opening == "short" else (5, 6, 17, 30, 44):
        changed = video.clone()
        changed[step + 1 :] += 2.0
        again = online_scores(head, changed, ignore_index=-1, opening=opening)
        same = {"rtol": 0, "atol": 1e-6}
        known = step + 1
        torch.testing.assert_close(again.detection[:known], scores.detection[:known], **same)
        for k in range(3):  # said k + 1 steps before
            known = step + 1 + k + 1
            torch.testing.assert_close(
                again.anticipation[:known, :, k], scores.anticipation[:known, :, k], **same
            )


def test_the_openings_agree_once_work_memory_is_full(make_head, small_config):
    head = make_head(small_config)
    video = features(small_config, 40)
    window, short = (
        online_scores(head, video, ignore_index=-1, opening=o) for o in ("window", "short")
    )
    torch.testing.assert_close(window.detection[5:], short.detection[5:])
    assert (window.detection[:5] - short.detection[:5]).abs().max() > 1e-4
    for k in range(3):
        torch.testing.assert_close(
            window.anticipation[6 + k :, :, k], short.anticipation[6 + k :, :, k]
        )
        assert short.anticipation[: k + 1, :, k].abs().max() == 0  # nothing could precede them


def test_the_published_opening_repeats_detections_in_the_anticipation(make_head, small_config):
    head = make_head(small_config)
    scores = online_scores(head, features(small_config, 20), ignore_index=-1)
    for k in range(3):
        assert torch.equal(scores.anticipation[:6, :, k], scores.detection[:6])
        for j in range(k + 1):  # steps 6 .. 6 + k hold the first window's tokens 0 .. k
            assert torch.equal(scores.anticipation[6 + j, :, k], scores.anticipation[6 + j, :, j])


@pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 8, 9, 10])
@pytest.mark.parametrize("opening", ["window", "short"])
def test_short_videos_are_scored_on_every_step(make_head, small_config, length, opening):
    head = make_head(small_config)
    video = features(small_config, length)
    scores = online_scores(head, video, ignore_index=4, opening=opening)
    assert scores.detection.shape == (length, 5)
    assert scores.anticipation.shape == (length, 5, 3)
    torch.testing.assert_close(scores.detection.sum(-1), torch.ones(length))
    assert scores.anticipation.isfinite().all()
    windows = window_scores(head, video, ignore_index=4)
    assert windows.scores.shape == (int(length > 9), 9, 5)
    assert windows.frames.shape == (int(length > 9), 9)


def test_a_rate_of_anticipation_is_counted_in_steps(make_head, small_config):
    head = make_head(replace(small_config, anticipation_steps=6, anticipation_rate=3))
    video = features(small_config, 40)
    changed = video.clone()
    changed[21:] += 2.0
    before, after = (online_scores(head, v, ignore_index=-1) for v in (video, changed))
    # the second token is said at step t for step t + 1 + 3: at 20 for 24, at 21 for 25
    torch.testing.assert_close(after.anticipation[24, :, 1], before.anticipation[24, :, 1])
    assert not torch.allclose(after.anticipation[25, :, 1], before.anticipation[25, :, 1])


def test_rates_leave_no_step_without_a_score(make_head, small_config):
    head = make_head(replace(small_config, work_rate=2, anticipation_steps=6, anticipation_rate=3))
    for length in range(1, 18):
        scores = online_scores(head, features(small_config, length), ignore_index=-1)
        torch.testing.assert_close(scores.detection.sum(-1), torch.ones(length))


@pytest.mark.parametrize(
    "changes",
    [{"long_steps": 0}, {"future_tokens": 0, "anticipation_steps": 0}, {"anticipation_steps": 0}],
)
def test_heads_without_a_part_are_scored(make_head, small_config, changes):
    head = make_head(replace(small_config, **changes))
    scores = online_scores(head, features(small_config, 33), ignore_index=4)
    torch.testing.assert_close(scores.detection.sum(-1), torch.ones(33))
    tokens = head.config.anticipation_tokens
    assert scores.anticipation.shape == (33, 5, tokens)


def test_batch_grouping_has_no_say_in_inference(make_head, small_config):
    video = features(small_config, 40)
    scores = [
        online_scores(make_head(replace(small_config, long_grouping=g)), video, ignore_index=4)
        for g in ("sample", "batch")
    ]
    assert torch.equal(scores[0].detection, scores[1].detection)


def test_what_cannot_be_scored_is_refused(make_head, small_config):
    head = make_head(small_config)
    with pytest.raises(ValueError, match="no steps"):
        online_scores(head, torch.zeros(0, 6), ignore_index=4)
    with pytest.raises(ValueError, match=r"visual features are \(1, 9, 5\), expected \(B, N, 6\)"):
        window_scores(head, torch.zeros(9, 5), ignore_index=4)
    with pytest.raises(ValueError, match="opening='late'"):
        online_scores(head, torch.zeros(9, 6), ignore_index=4, opening="late")
    with pytest.raises(ValueError, match=r"training mode; call head.eval\(\)"):
        online_scores(head.train(), torch.zeros(9, 6), ignore_index=4)
