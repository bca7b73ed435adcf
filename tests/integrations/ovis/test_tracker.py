"""The online tracker: identities as the original gives them, final when said, memory bounded."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from integrations.ovis.contrastive import fuse_by_similarity
from integrations.ovis.postprocess import VideoConfig, VideoRecord
from integrations.ovis.tracker import (
    OnlineTracker,
    TrackerConfig,
    TrackMemory,
    match_scores,
    suppress_masks,
)

FIELDS = {
    "match_metric": "similarity",
    "frame_weight": "frame_weight",
    "match_score_thr": "match_score",
    "match_type": "assignment",
    "inference_select_thr": "select_score",
    "init_score_thr": "start_score",
    "mask_nms_thr": "mask_overlap",
    "num_dead_frames": "forget_after",
    "embed_type": "memory",
    "maximum_cache": "recent",
}
MEMORY_NAMES = {"temporally_weighted_softmax": "temporally_weighted"}
INPUTS = ("pred_logits", "pred_masks", "pred_embeds")


@pytest.fixture(scope="module")
def stored(golden):
    return load_file(golden / "ovis" / "tracker.safetensors")


@pytest.fixture(scope="module")
def described(golden):
    return json.loads((golden / "ovis" / "tracker.json").read_text())


def settings(described, variant):
    """Rules of tracker and video for a variant of the original."""
    original = described["defaults"] | described["variants"][variant]["overrides"]
    original["embed_type"] = MEMORY_NAMES.get(original["embed_type"], original["embed_type"])
    tracker = TrackerConfig.released(**{ours: original[name] for name, ours in FIELDS.items()})
    video = VideoConfig(
        average=original["temporal_score_type"],
        flicker_from=original["noise_frame_num"] + 1,
        flicker_frames=original["suppress_frame_num"],
        flicker_gap=original["none_frame_num"],
    )
    return tracker, video


def track(inputs, tracker, record=None):
    """Identities (T, Q) of frames in three stacked tensors."""
    said = []
    for logits, masks, embeddings in zip(*inputs, strict=True):
        said.append(tracker.push(logits, masks, embeddings))
        if record is not None:
            record.add(said[-1], logits, masks)
    return torch.stack(said)


def pytest_generate_tests(metafunc):
    if "variant" in metafunc.fixturenames:
        names = "default momentum last temporally_weighted cosine no_frame_weight assignment "
        names += "short_memory small_cache strict max_logits"
        metafunc.parametrize("variant", names.split())


@pytest.mark.golden
def test_identities_and_video_tracks_match(stored, described, variant):
    config, video = settings(described, variant)
    tracker, record = OnlineTracker(config), VideoRecord(video)
    ids = track([stored[name] for name in INPUTS], tracker, record)
    assert torch.equal(ids, stored[f"{variant}.ids"])
    assert tracker.started == described["variants"][variant]["num_ids_created"]
    tracks = record.finish()
    assert len(tracks.ids) == described["variants"][variant]["num_tracks_output"]
    torch.testing.assert_close(
        tracks.class_logits, stored[f"{variant}.video_logits"], rtol=0, atol=1e-5
    )
    assert torch.equal(tracks.present, stored[f"{variant}.video_masks_present"])
    if f"{variant}.video_masks" in stored:
        masks = torch.zeros_like(stored[f"{variant}.video_masks"])
        for row, frames, said in zip(masks, tracks.frames, tracks.mask_logits, strict=True):
            row[frames] = said
        torch.testing.assert_close(masks, stored[f"{variant}.video_masks"], rtol=0, atol=1e-5)


@pytest.mark.golden
def test_every_variant_is_tested(described):
    names = "default momentum last temporally_weighted cosine no_frame_weight assignment "
    names += "short_memory small_cache strict max_logits"
    assert set(described["variants"]) == set(names.split())


@pytest.mark.golden
@pytest.mark.parametrize("name", ["default", "small_cache"])
def test_memory_after_the_last_frame_matches(stored, described, name):
    config, _ = settings(described, name)
    tracker = OnlineTracker(config)
    ids = track([stored[key] for key in INPUTS], tracker)
    memory = tracker.memory
    order = memory.ids.argsort()
    expected = stored[f"{name}.bank_ids"].argsort()
    pairs = {"ids": memory.ids, "exist_frames": memory.seen, "last_frame": memory.last_frame}
    for key, values in pairs.items():
        assert torch.equal(values[order], stored[f"{name}.bank_{key}"][expected])
    found = memory.embeddings[order]
    wanted = stored[f"{name}.bank_similarity_guided"][expected]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    # The other memory, fed with the same identities.

    other = TrackMemory(TrackerConfig(memory="momentum"), found.shape[1])
    for frame, row in enumerate(ids):
        alive = row >= 0
        embeddings = stored["pred_embeds"][frame][alive]
        other.update(row[alive], embeddings, torch.ones(len(embeddings)), frame)
    wanted = stored[f"{name}.bank_momentum"][expected]
    torch.testing.assert_close(other.embeddings[other.ids.argsort()], wanted, rtol=0, atol=1e-5)


@pytest.mark.golden
def test_suppressed_masks_match(golden):
    stored = load_file(golden / "ovis" / "mask_nms.safetensors")
    thresholds = [key.removeprefix("keep_") for key in stored if key.startswith("keep_")]
    assert thresholds
    for threshold in thresholds:
        stays = suppress_masks(stored["masks"], float(threshold))
        assert torch.equal(stays, stored[f"keep_{threshold}"])


# -- without goldens ------------------------------------------------------------------------------


def scene(frames=30, queries=8, objects=5, size=12, width=6, classes=3, seed=0):
    """Stacked inputs of objects that come and go, each with its own embedding and place."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator)
    owners = 4 * torch.nn.functional.normalize(draw(objects, width), dim=-1)
    logits = draw(frames, queries, classes + 1)
    masks, embeddings = draw(frames, queries, size, size), draw(frames, queries, width)
    for frame in range(frames):
        order = torch.randperm(queries, generator=generator)
        for number, query in enumerate(order[:objects].tolist()):
            if (frame + 3 * number) % 9 < 6:
                embeddings[frame, query] = owners[number] + 0.2 * draw(width)
                logits[frame, query, number % classes] = 6.0
                masks[frame, query] = -5
                masks[frame, query, 2 * number : 2 * number + 3] = 5
            else:
                logits[frame, query, -1] = 12.0
    return logits, masks, embeddings


def one_hot_inputs(rows, strength=8.0):
    """A frame whose query i has the embedding of object rows[i], its class and its own mask row."""
    count = len(rows)
    logits = torch.full((count, 3), -strength)
    logits[:, 0] = strength - torch.arange(count)  # in falling order of score
    masks = torch.full((count, 8, 8), -5.0)
    embeddings = torch.zeros(count, 8)
    for query, row in enumerate(rows):
        masks[query, row] = 5
        embeddings[query, row] = 4.0
    return logits, masks, embeddings


@pytest.mark.parametrize("memory", ["similarity_guided", "momentum", "last", "temporally_weighted"])
@pytest.mark.parametrize("assignment", ["greedy", "hungarian"])
@pytest.mark.parametrize("similarity", ["bisoftmax", "cosine"])
def test_what_was_said_does_not_change_with_later_frames(memory, assignment, similarity):
    config = TrackerConfig(memory=memory, assignment=assignment, similarity=similarity)
    inputs, others = scene(frames=14), scene(frames=14, seed=9)
    changed = [torch.cat([a[:8], b[8:]]) for a, b in zip(inputs, others, strict=True)]
    said, said_then = (track(x, OnlineTracker(config)) for x in (inputs, changed))
    assert torch.equal(said[:8], said_then[:8])
    assert not torch.equal(said, said_then)


def test_objects_keep_their_identities():
    tracker = OnlineTracker()
    assert tracker.push(*one_hot_inputs([0, 1, 2])).tolist() == [0, 1, 2]
    assert tracker.push(*one_hot_inputs([2, 0, 1])).tolist() == [2, 0, 1]
    assert tracker.push(*one_hot_inputs([1])).tolist() == [1]
    assert tracker.push(*one_hot_inputs([4, 0, 2])).tolist() == [3, 0, 2]


def test_order_of_queries_does_not_matter():
    inputs = scene()
    order = torch.rand(30, 8, generator=torch.Generator().manual_seed(4)).argsort(-1)
    frames = torch.arange(30)[:, None]
    shuffled = [x[frames, order] for x in inputs]
    said = track(inputs, OnlineTracker())
    assert torch.equal(said[frames, order], track(shuffled, OnlineTracker()))


def test_a_new_object_does_not_take_the_only_identity_unless_released():
    for config, expected in ((TrackerConfig(), 1), (TrackerConfig.released(), 0)):
        tracker = OnlineTracker(config)
        tracker.push(*one_hot_inputs([0]))
        assert tracker.push(*one_hot_inputs([5])).tolist() == [expected]


@pytest.mark.parametrize("gap, expected", [(4, 0), (5, 2)])
def test_a_track_is_forgotten_after_its_time(gap, expected):
    tracker = OnlineTracker(TrackerConfig(forget_after=3))
    tracker.push(*one_hot_inputs([0]))
    for _ in range(gap - 1):
        tracker.push(*one_hot_inputs([5]))
    assert tracker.push(*one_hot_inputs([0])).tolist() == [expected]


def test_memory_that_has_become_empty_starts_again():
    tracker = OnlineTracker(TrackerConfig(forget_after=0, start_score=0.5))
    tracker.push(*one_hot_inputs([0]))
    quiet = one_hot_inputs([1], strength=0.0)
    assert tracker.push(*quiet).tolist() == [-1]
    assert len(tracker.memory) == 0
    assert tracker.push(*one_hot_inputs([0])).tolist() == [1]


def test_the_best_query_is_kept_below_the_threshold_but_starts_nothing():
    tracker = OnlineTracker(TrackerConfig(select_score=0.9, start_score=0.9))
    assert tracker.push(*one_hot_inputs([0, 1])).tolist() == [0, 1]
    faint = one_hot_inputs([1, 0], strength=0.2)
    said = tracker.push(*faint)
    assert (said >= 0).sum() == 1  # matched, though too faint for a start
    assert OnlineTracker(tracker.config).push(*faint).tolist() == [-1, -1]


def test_overlapping_masks_leave_the_likeliest():
    logits, masks, embeddings = one_hot_inputs([0, 1, 2])
    masks[2] = masks[0]
    assert OnlineTracker().push(logits, masks, embeddings).tolist() == [0, 1, -1]


def test_suppression_equals_a_plain_loop():
    generator = torch.Generator().manual_seed(2)
    masks = torch.randn(40, 6, 6, generator=generator) + torch.randn(40, 1, 1, generator=generator)
    masks[[3, 7]] = -1.0  # two empty ones
    inside = masks.numpy() > 0
    for threshold in (0.2, 0.5, 0.8):
        kept = []
        for mask in range(40):
            both = [(inside[mask] & inside[k]).sum() for k in kept]
            either = [(inside[mask] | inside[k]).sum() for k in kept]
            ious = (np.array(both) + 1e-6) / (np.array(either) + 1e-6)
            if not (ious > threshold).any():
                kept.append(mask)
        stays = suppress_masks(masks, threshold)
        assert stays.nonzero()[:, 0].tolist() == kept
        assert 1 < len(kept) < 40
        assert 7 not in kept


def test_frame_counts_decide_among_good_matches_only_if_asked():
    # Track 0 has been seen in three frames, track 1 in one and fits better.
    fits = torch.zeros(1, 8)
    fits[0, :2] = torch.tensor([1.0, 1.3])
    for weigh, expected in ((True, 0), (False, 1)):
        tracker = OnlineTracker(TrackerConfig(frame_weight=weigh))
        for rows in ([0], [0], [0, 1]):
            logits, masks, embeddings = one_hot_inputs(rows)
            tracker.push(logits, masks, embeddings / 4)
        said = tracker.push(*one_hot_inputs([3])[:2], fits)
        assert said.tolist() == [expected]


def test_hungarian_assignment_finds_the_best_total():
    remembered = torch.eye(8)[:2] * 2
    found = torch.stack([remembered[0] + 0.9 * remembered[1], remembered[0]])
    said = {}
    for assignment in ("greedy", "hungarian"):
        config = TrackerConfig(
            assignment=assignment, similarity="cosine", match_score=0.1, min_cosine=None
        )
        tracker = OnlineTracker(config)
        tracker.push(*one_hot_inputs([0, 1]))
        said[assignment] = tracker.push(*one_hot_inputs([0, 1])[:2], torch.cat([found])).tolist()
    assert said == {"greedy": [0, 2], "hungarian": [1, 0]}


def test_incremental_memory_equals_the_training_formula():
    embeddings = torch.randn(12, 1, 5)
    memory = TrackMemory(TrackerConfig(recent=4), 5)
    shown = torch.arange(12) % 3 != 1
    expected = fuse_by_similarity(embeddings[:, 0], shown, recent=4)
    for frame in range(12):
        if shown[frame]:
            memory.update(torch.tensor([7]), embeddings[frame], torch.ones(1), frame)
        torch.testing.assert_close(memory.embeddings[0], expected[frame])


def test_temporally_weighted_memory_prefers_late_and_likely_detections():
    memory = TrackMemory(TrackerConfig(memory="temporally_weighted", recent=2), 1)
    for frame, (value, score) in enumerate([(100.0, 1.0), (1.0, 0.5), (3.0, 0.25)]):
        memory.update(torch.tensor([0]), torch.tensor([[value]]), torch.tensor([score]), frame)
    # Weights 0.5 + 1 / 2 and 0.25 + 2 / 2; the first embedding is out of reach.
    torch.testing.assert_close(memory.embeddings, torch.tensor([[(1 + 3 * 1.25) / 2.25]]))


def test_match_scores():
    found, remembered = torch.randn(3, 4), torch.randn(5, 4)
    scores = match_scores(found, remembered, "bisoftmax")
    dots = found @ remembered.T
    torch.testing.assert_close(2 * scores[1, 2], dots[1].softmax(0)[2] + dots[:, 2].softmax(0)[1])
    cosines = match_scores(found, remembered, "cosine")
    expected = torch.nn.functional.cosine_similarity(found[1], remembered[2], dim=0)
    torch.testing.assert_close(cosines[1, 2], expected)


def test_memory_is_bounded_in_a_stream_of_5000_frames():
    config = TrackerConfig(forget_after=5, min_cosine=0.9)  # strict: new tracks all the time
    tracker = OnlineTracker(config)
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[4.0, 0.0]] * 3)
    masks = torch.full((3, 2, 2), -5.0)
    masks[[0, 1, 2], [0, 0, 1], [0, 1, 0]] = 5
    most_bytes = most_tracks = 0
    for frame in range(5000):
        tracker.push(logits, masks, torch.randn(3, 8, generator=generator))
        if frame == 50:
            early = tracker.memory_bytes
        most_bytes = max(most_bytes, tracker.memory_bytes)
        most_tracks = max(most_tracks, len(tracker.memory))
    assert tracker.frame == 5000
    assert tracker.started > 4000
    assert most_tracks <= 3 * (config.forget_after + 1)
    assert most_bytes <= 1.5 * early


def test_reset_begins_anew():
    inputs = scene(frames=5)
    tracker = OnlineTracker()
    first = track(inputs, tracker)
    tracker.reset()
    assert tracker.memory_bytes == 0
    assert torch.equal(track(inputs, tracker), first)


def test_mixed_precision_changes_no_decision():
    inputs = scene()
    said = track(inputs, OnlineTracker())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(track(inputs, OnlineTracker()), said)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c, m, e: (c[0], m, e), r"frame 1: class_logits of shape \(3,\); expected \(Q, C"),
        (lambda c, m, e: (c, m[:1], e), r"frame 1: mask_logits of shape \(1, 8, 8\).* 2 queries"),
        (lambda c, m, e: (c[:0], m[:0], e[:0]), "for the 0 queries of class_logits, at least 1"),
        (lambda c, m, e: (c, m, e * torch.nan), "frame 1: embeddings hold NaN or infinity"),
        (lambda c, m, e: (c, m, e[:, :3]), "frame 1: embeddings of width 3, memory holds width 8"),
    ],
)
def test_broken_frames_are_refused_and_leave_the_tracker_unharmed(change, message):
    tracker = OnlineTracker()
    tracker.push(*one_hot_inputs([0, 1]))
    with pytest.raises(ValueError, match=message):
        tracker.push(*change(*one_hot_inputs([0, 1])))
    assert tracker.push(*one_hot_inputs([1, 0])).tolist() == [1, 0]
    assert tracker.frame == 2


def test_another_width_is_accepted_after_reset():
    tracker = OnlineTracker()
    tracker.push(*one_hot_inputs([0, 1]))
    tracker.reset()
    logits, masks, embeddings = one_hot_inputs([0, 1])
    assert tracker.push(logits, masks, embeddings[:, :3]).tolist() == [0, 1]


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("similarity", "dot", "similarity='dot' is not one of"),
        ("assignment", "auction", "assignment='auction' is not one of"),
        ("memory", "first", "memory='first' is not one of"),
        ("match_score", 1.5, r"match_score=1.5 is not in \[0, 1\]"),
        ("min_cosine", -2.0, "min_cosine=-2.0 is neither None nor in"),
        ("recent", 0, "recent=0 is below 1"),
        ("forget_after", -1, "forget_after=-1 is below 0"),
    ],
)
def test_unknown_rules_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        TrackerConfig(**{field: value})
    assert field in TrackerConfig().to_dict()
