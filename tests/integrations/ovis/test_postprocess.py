"""From frames to a video's instances: parity, flickers, averages, absent frames, empty videos."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from integrations.ovis import postprocess
from integrations.ovis.postprocess import (
    FrameSizes,
    VideoConfig,
    VideoRecord,
    VideoTracks,
    average_logits,
    enlarge_masks,
    score_tracks,
    segment,
)

SIZES = FrameSizes(original=(20, 31), resized=(30, 45), padded=(32, 48))


def whole(class_logits, mask_logits):
    """Tracks seen in every frame: logits (N, C + 1) and (N, T, h, w)."""
    count, frames = mask_logits.shape[:2]
    every = [list(range(frames))] * count
    return VideoTracks(list(range(count)), class_logits, every, list(mask_logits), frames)


def record_of(shown, config=None, size=4):
    """A record of T frames; ``shown`` (N, T) says in which frames a track is seen."""
    record = VideoRecord(config)
    for frame, column in enumerate(torch.tensor(shown).T):
        ids = torch.where(column > 0, torch.arange(len(shown)), -1)
        logits = torch.full((len(shown), 3), float(frame))
        record.add(ids, logits, torch.full((len(shown), size, size), float(frame)))
    return record


@pytest.mark.golden
def test_instances_of_a_video_match(golden):
    stored = load_file(golden / "ovis" / "video_postprocess.safetensors")
    config = json.loads((golden / "ovis" / "video_postprocess.json").read_text())["config"]
    names = ("original", "resized", "padded")
    sizes = FrameSizes(**{name: tuple(config[f"{name}_size"]) for name in names})
    result = segment(whole(stored["logits"], stored["mask_logits"]), sizes, config["topk"])
    scores = torch.tensor([instance.score for instance in result.instances])
    torch.testing.assert_close(scores, stored["scores"], rtol=0, atol=1e-5)
    assert [instance.label for instance in result.instances] == stored["labels"].tolist()
    masks = np.stack([instance.masks(sizes.original) for instance in result.instances])
    assert (masks != stored["masks"].bool().numpy()).sum() <= 5


def test_frames_enlarged_together_or_apart_give_the_same(monkeypatch):
    tracks = whole(torch.randn(3, 4), torch.randn(3, 7, 8, 12))
    expected = segment(tracks, SIZES)
    monkeypatch.setattr(postprocess, "CHUNK_PIXELS", 2 * 20 * 31)
    found = segment(tracks, SIZES)
    for one, other in zip(found.instances, expected.instances, strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-9)
        assert one.segmentations == other.segmentations


def test_masks_keep_their_place():
    """A box at stride 4 comes out where it lies in the padded frame, whatever the padding."""
    logits = torch.full((1, 8, 12), -5.0)
    logits[0, 2:5, 3:9] = 5
    sizes = FrameSizes(original=(60, 90), resized=(30, 45), padded=(32, 48))
    rows, columns = (enlarge_masks(logits, sizes)[0] > 0).nonzero(as_tuple=True)
    assert (rows.min(), rows.max()) == (16, 39)
    assert (columns.min(), columns.max()) == (24, 71)


def test_absent_frames_have_no_mask():
    record = record_of([[0, 1, 0, 1], [1, 1, 1, 1]])
    tracks = record.finish()
    assert tracks.present.tolist() == [[True] * 4, [False, True, False, True]]
    result = segment(tracks, SIZES)
    late = [i for i in result.instances if i.track == 0]
    assert [rle is None for rle in late[0].segmentations] == [True, False, True, False]
    assert late[0].masks((20, 31)).any((1, 2)).tolist() == [False, True, False, True]


def test_scores_are_class_probability_times_mask_probability():
    logits = torch.tensor([[2.0, 0.0, 1.0]])
    masks = torch.full((1, 2, 8, 12), 1.5)
    masks[0, 1] = -3.0  # outside: does not count
    result = segment(whole(logits, masks), FrameSizes((32, 48), (32, 48), (32, 48)))
    expected = logits.softmax(-1)[0, :2] * torch.tensor(1.5).sigmoid()
    found = torch.tensor([instance.score for instance in result.instances])
    torch.testing.assert_close(found, expected)
    assert result.instances[0].segmentations[1] is None


def test_a_track_without_pixels_scores_zero():
    result = segment(whole(torch.zeros(1, 3), torch.full((1, 2, 8, 12), -1.0)), SIZES)
    assert [instance.score for instance in result.instances] == [0.0, 0.0]
    assert result.instances[0].segmentations == [None, None]


@pytest.mark.parametrize("frames", [0, 1, 5])
def test_a_video_without_tracks_has_no_instances(frames):
    result = segment(record_of([[0] * frames]).finish(), SIZES)
    assert result.instances == []
    assert (result.num_frames, result.size) == (frames, (20, 31))
    assert result.predictions(3, [1]) == []


def test_a_video_of_one_frame():
    result = segment(record_of([[1]]).finish(), SIZES)
    assert [instance.label for instance in result.instances] == [0, 1]
    assert len(result.instances[0].segmentations) == 1


def test_predictions_carry_the_ids_of_the_data_set():
    result = segment(whole(torch.tensor([[0.0, 5.0, 0.0]]), torch.ones(1, 2, 8, 12)), SIZES, 1)
    (entry,) = result.predictions(video_id=17, category_ids=[4, 9])
    assert (entry["video_id"], entry["category_id"]) == (17, 9)
    assert len(entry["segmentations"]) == 2
    json.dumps(entry)


@pytest.mark.parametrize("average", ["mean", "max"])
def test_averages(average):
    logits = torch.tensor([[1.0, 4.0], [3.0, 0.0]])
    expected = {"mean": [2.0, 2.0], "max": [3.0, 4.0]}[average]
    assert average_logits(logits, average).tolist() == expected
    record = VideoRecord(VideoConfig(average=average))
    for row in logits:
        record.add(torch.tensor([5]), row[None], torch.zeros(1, 2, 2))
    assert record.finish().class_logits.tolist() == [expected]


def test_masks_stay_as_they_were_said():
    """The end of the video changes class logits alone."""
    tracks = record_of([[1, 0, 1]]).finish()
    assert tracks.mask_logits[0][:, 0, 0].tolist() == [0.0, 2.0]
    assert tracks.frames == [[0, 2]]


@pytest.mark.parametrize(
    "shown, frames",
    [
        ([0, 0, 1, 1, 0, 0, 0, 0], []),  # seen twice, gone: a flicker
        ([1, 1, 1, 0, 0, 0, 0, 0], [0, 1, 2]),  # seen often enough
        ([0, 0, 0, 0, 0, 1, 1, 0], [5, 6]),  # not gone for long enough
        ([1, 0, 0, 0, 0, 0, 1, 1], [6, 7]),  # dropped in frame 4, back in frame 6
        ([1, 0, 0, 1, 0, 0, 0, 1], [7]),
    ],
)
def test_flickers_are_dropped(shown, frames):
    config = VideoConfig(flicker_from=4, flicker_frames=3, flicker_gap=2)
    tracks = record_of([shown, [1] * 8], config).finish()
    by_id = dict(zip(tracks.ids, tracks.frames, strict=True))
    assert by_id.get(0, []) == frames
    assert by_id[1] == list(range(8))


def test_flickers_stay_before_their_time_or_when_not_asked():
    shown = [1] + [0] * 8
    assert record_of([shown]).finish().ids == [0]  # frame 9 has not come yet
    assert record_of([[*shown, 0]]).finish().ids == []
    everything = VideoConfig(flicker_frames=0)
    assert record_of([[*shown, 0]], everything).finish().ids == [0]


def test_top_pairs_are_the_likeliest_of_all_tracks():
    logits = torch.tensor([[3.0, 0.0, 0.0], [2.0, 1.9, 0.0]])
    rows, labels, scores = score_tracks(logits, 3)
    assert list(zip(rows.tolist(), labels.tolist(), strict=True)) == [(0, 0), (1, 0), (1, 1)]
    torch.testing.assert_close(scores, logits.softmax(-1)[[0, 1, 1], [0, 0, 1]])
    assert len(score_tracks(logits, 99)[0]) == 4


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"average": "median"}, "average='median' is not one of"),
        ({"top_pairs": 0}, "top_pairs=0 is below 1"),
        ({"flicker_gap": 0}, "flicker_gap=0 is below 1"),
    ],
)
def test_unknown_rules_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        VideoConfig(**fields)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"resized to \(30, 50\) exceed the padded \(32, 48\)"):
        FrameSizes((20, 31), (30, 50), (32, 48))
