"""The live detector is the online protocol, however the steps arrive."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from integrations.oad.detector import Detection, OnlineDetector
from integrations.oad.protocols import online_scores

LENGTH = 47  # long memory of the small head: 24 steps, its grid moves from step 30 on
CLOSE = {"rtol": 0, "atol": 1e-5}


def video(config, seed, length=LENGTH):
    generator = torch.Generator().manual_seed(seed)
    visual = torch.randn(length, config.visual_size, generator=generator)
    motion = torch.randn(length, config.motion_size, generator=generator)
    return visual, motion if config.motion_size else None


def join(detections: list[Detection]) -> Detection:
    names = ("scores", "anticipation", "step", "valid")
    return Detection(*(torch.cat([getattr(d, n) for d in detections], dim=1) for n in names))


def reference(head, visual, motion=None, **options):
    """Said at each step (T, C) and (T, A, C), from the offline protocol."""
    c = head.config
    scores = online_scores(head, visual, motion, opening="short", ignore_index=4, **options)
    said = torch.full((len(visual), c.anticipation_tokens, c.num_classes), float("nan"))
    for k in range(c.anticipation_tokens):
        delay = 1 + k * c.anticipation_rate
        said[: len(visual) - delay, k] = scores.anticipation[delay:, :, k]
    return scores.detection, said


def assert_same(found: Detection, row: int, head, visual, motion=None):
    detection, anticipation = reference(head, visual, motion)
    torch.testing.assert_close(found.scores[row], detection, **CLOSE)
    known = ~anticipation.isnan()  # the video ends before the last ones can be compared
    torch.testing.assert_close(found.anticipation[row][known], anticipation[known], **CLOSE)


CONFIGS = {
    "small": {},
    "two streams": {"motion_size": 3},
    "two-layer queries": {"memory_stages": ((4, 2, True), (3, 1, True))},
    "no groups": {"groups": 0},
    "rates": {"work_rate": 2, "anticipation_rate": 2},
    "no long memory": {"long_steps": 0},
    "detection only": {"future_tokens": 0, "anticipation_steps": 0},
    "three refinements": {"refinements": 3, "future_stack": (6, 2, False)},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_step_by_step_equals_the_online_protocol(make_head, small_config, changes):
    head = make_head(replace(small_config, **changes))
    visual, motion = video(head.config, 5)
    detector = OnlineDetector(head, ignore_index=4)
    said = []
    for t in range(LENGTH):
        flow = None if motion is None else motion[None, t]
        said.append(detector.push(visual[None, t], flow))
    found = join(said)
    assert_same(found, 0, head, visual, motion)
    assert found.step[0].tolist() == list(range(LENGTH))
    assert found.valid.all()


@pytest.mark.golden
def test_the_detector_says_what_the_original_says(golden, golden_model):
    head = golden_model("visual_gelu").head()
    stored = load_file(golden / "oad" / "online_inference.safetensors")
    for name in ("vid_a", "vid_b"):
        detector = OnlineDetector(head, ignore_index=21, softmax="released", warmup="silent")
        found = detector.push(stored[f"{name}/features"][None])
        newest = stored[f"{name}/step_frame"]
        assert found.step[found.valid].tolist() == newest.tolist()
        logits = stored[f"{name}/step_logits"][:, -1]  # (steps, 1 + A, C), last stage
        torch.testing.assert_close(found.scores[0, newest], logits[:, 0].softmax(-1), **CLOSE)
        anticipation = found.anticipation[0, newest]
        torch.testing.assert_close(anticipation, logits[:, 1:].softmax(-1), **CLOSE)


@pytest.mark.parametrize("chunk", [1, 4, 8, 64])
@pytest.mark.parametrize("sizes", [(7,), (1, 9, 2), (LENGTH,)], ids=str)
def test_the_size_of_pushes_changes_nothing(make_head, small_config, sizes, chunk):
    head = make_head(small_config)
    visual, _ = video(small_config, 6)
    detector = OnlineDetector(head, ignore_index=4, chunk=chunk)
    said, at = [], 0
    while at < LENGTH:
        size = sizes[len(said) % len(sizes)]
        said.append(detector.push(visual[None, at : at + size]))
        at += size
    assert_same(join(said), 0, head, visual)


def test_streams_at_different_positions_share_a_batch(make_head, small_config):
    head = make_head(small_config)
    first, second, third = (video(small_config, seed, 80)[0] for seed in (7, 8, 9))
    detector = OnlineDetector(head, batch_size=2, ignore_index=4)
    alone = detector.push(first[None, :33], rows=[0])
    both = detector.push(torch.stack([first[33:36], second[:3]]))
    detector.reset(rows=[0])  # a third stream takes the first one's place
    after = detector.push(torch.stack([third[:40], second[3:43]]))
    assert detector.positions == [40, 43]
    head_of_first = join([alone, Detection(*(getattr(both, n)[:1] for n in vars(both)))])
    assert_same(head_of_first, 0, head, first[:36])
    assert_same(join([both, after]), 1, head, second[:43])
    assert_same(after, 0, head, third[:40])
    assert after.step[:, 0].tolist() == [0, 3]
    crossed = detector.push(torch.stack([second[43], third[40]]), rows=[1, 0])
    assert crossed.step.tolist() == [[43], [40]]


def test_a_saved_stream_goes_on_elsewhere(make_head, small_config, tmp_path):
    head = make_head(small_config)
    visual, _ = video(small_config, 10)
    detector = OnlineDetector(head, ignore_index=4)
    said = [detector.push(visual[None, :35])]
    save_file(detector.state_dict(), tmp_path / "stream.safetensors")
    detector.push(visual[None, :9])  # what follows must not reach the saved state
    other = OnlineDetector(head, ignore_index=4)
    other.load_state_dict(load_file(tmp_path / "stream.safetensors"))
    assert other.positions == [35]
    said.append(other.push(visual[None, 35:]))
    assert_same(join(said), 0, head, visual)


def test_silence_until_work_memory_is_full(make_head, small_config):
    head = make_head(small_config)
    visual, _ = video(small_config, 11)
    silent = OnlineDetector(head, ignore_index=4, warmup="silent").push(visual[None])
    short = OnlineDetector(head, ignore_index=4).push(visual[None])
    assert silent.valid[0].tolist() == [t >= 5 for t in range(LENGTH)]
    assert silent.scores[0, :5].abs().max() == 0
    assert silent.anticipation[0, :5].abs().max() == 0
    torch.testing.assert_close(silent.scores[0, 5:], short.scores[0, 5:], **CLOSE)
    assert short.valid.all()


def test_the_ignored_column_gets_nothing_unless_asked(make_head, small_config):
    head = make_head(small_config)
    visual, _ = video(small_config, 12)
    trained = OnlineDetector(head, ignore_index=4).push(visual[None])
    released = OnlineDetector(head, ignore_index=4, softmax="released").push(visual[None])
    assert (trained.scores[..., 4] == 0).all()
    assert (trained.anticipation[..., 4] == 0).all()
    assert (released.scores[..., 4] > 0).all()
    for found in (trained, released):
        torch.testing.assert_close(found.scores.sum(-1), torch.ones(1, LENGTH))


def test_half_precision_heads_give_float32_scores(make_head, small_config):
    head = make_head(small_config).to(torch.bfloat16)
    found = OnlineDetector(head, ignore_index=4).push(torch.randn(1, 12, 6))
    assert found.scores.dtype == found.anticipation.dtype == torch.float32
    torch.testing.assert_close(found.scores.sum(-1), torch.ones(1, 12))
    scores = online_scores(head, torch.randn(12, 6), ignore_index=4)
    assert scores.detection.dtype == torch.float32


def test_memory_does_not_grow_with_the_stream(make_head, small_config):
    head = make_head(small_config)
    detector = OnlineDetector(head, ignore_index=4, chunk=3)
    # float32: work memory 6 + 2 steps x 8, long memory 24 + 6 + 2 steps x 16
    assert detector.memory_bytes == 4 * (8 * 8 + 32 * 16)
    detector.push(torch.randn(1, 100, 6))
    assert detector.memory_bytes == 4 * (8 * 8 + 32 * 16)


def test_a_long_stream_forgets_what_left_its_memory(make_head, small_config):
    head = make_head(small_config)
    visual, _ = video(small_config, 13, 90)
    whole = OnlineDetector(head, ignore_index=4).push(visual[None]).scores[0]
    other = visual.clone()
    other[:40] += 3.0
    again = OnlineDetector(head, ignore_index=4).push(other[None]).scores[0]
    assert not torch.allclose(again[60], whole[60])
    torch.testing.assert_close(again[40 + 30 :], whole[40 + 30 :], **CLOSE)


def test_wrong_pushes_are_refused_and_leave_the_streams_unharmed(make_head, small_config):
    head = make_head(small_config)
    visual, _ = video(small_config, 14)
    detector = OnlineDetector(head, batch_size=2, ignore_index=4)
    both = visual.expand(2, -1, -1)
    said = [detector.push(both[:, :20])]
    broken = both[:, 20:22].clone()
    broken[1, 1, 0] = float("nan")
    for bad, message in (
        ((broken,), "visual features hold values that are not finite"),
        ((both[:1, 20],), r"features for 1 streams, expected 2; name the streams .* rows="),
        ((both[:, 20, :5],), r"visual features are \(2, 1, 5\)"),
        ((both[:, :0],), "features of no steps"),
        ((both[:, 20], both[:, 20]), "motion_size=0"),
        ((both[:, 20], None, [0, 2]), r"rows=\[0, 2\] must be different numbers below 2"),
        ((both[:, 20], None, [1, 1]), r"rows=\[1, 1\] must be different numbers below 2"),
    ):
        with pytest.raises(ValueError, match=message):
            detector.push(*bad)
    said.append(detector.push(both[:, 20:]))
    assert_same(join(said), 1, head, visual)


def test_wrong_options_and_states_are_refused(make_head, small_config):
    head = make_head(small_config)
    with pytest.raises(ValueError, match="warmup='loud'"):
        OnlineDetector(head, ignore_index=4, warmup="loud")
    with pytest.raises(ValueError, match="batch_size=0 and chunk=8"):
        OnlineDetector(head, 0, ignore_index=4)
    detector = OnlineDetector(head, ignore_index=4, chunk=2)
    state = OnlineDetector(head, ignore_index=4, chunk=3).state_dict()
    with pytest.raises(
        ValueError, match=r"'long.0' is \(1, 32, 16\), expected \(1, 31, 16\).*chunk=2"
    ):
        detector.load_state_dict(state)
    state = detector.state_dict()
    del state["work"]
    with pytest.raises(ValueError, match="'work' is missing"):
        detector.load_state_dict(state)
    with pytest.raises(ValueError, match=r"'extra' is \(1,\), expected no such tensor"):
        detector.load_state_dict(detector.state_dict() | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="training mode"):
        OnlineDetector(head.train(), ignore_index=4)
