"""Clips and whole videos: which frames, which objects, in which order; and what is refused."""

import itertools
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from integrations.ovis.augment import ClipAugmentation
from integrations.ovis.data import (
    ClipBatches,
    ClipKey,
    ClipSource,
    DataError,
    VideoClips,
    WholeVideos,
    choose_frames,
    collate_clips,
    collate_videos,
    read_clip,
    read_video,
)
from integrations.ovis.layout import read_ytvis
from integrations.ovis.rle import encode

PLAIN = ClipAugmentation(crop=0, flip=0, sizes=(32,))
SIZES = {1: (32, 48, 30), 2: (48, 32, 5), 3: (32, 48, 1), 4: (32, 48, 20)}  # height, width, frames


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Frames as bright as their number; the objects of a video cover certain frames."""
    root = tmp_path_factory.mktemp("ytvis")
    videos, annotations = [], []
    seen = {1: [range(30), range(3)], 2: [range(5)], 3: [range(1)], 4: [range(2, 4), range(20)]}
    for number, (height, width, length) in SIZES.items():
        files = []
        for frame in range(length):
            files.append(f"v{number}/{frame:05d}.png")
            path = root / "frames" / files[-1]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (width, height), (frame * 8, 10, number)).save(path)
        videos.append({"id": number, "height": height, "width": width, "file_names": files})
        for frames in seen[number]:
            masks = np.zeros((length, height, width), bool)
            masks[list(frames), 4:20, 6:30] = True
            rle = encode(masks)
            annotations.append(
                {"id": len(annotations) + 1, "video_id": number, "iscrowd": 0,
                 "category_id": 5 + len(annotations) % 2, "segmentations": rle,
                 "bboxes": [mask and [6, 4, 24, 16] for mask in rle]}
            )  # fmt: skip
    annotations[-1]["iscrowd"] = 1
    categories = [{"id": 5, "name": "cat"}, {"id": 6, "name": "dog"}]
    content = {"videos": videos, "categories": categories, "annotations": annotations}
    (root / "train.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def videos(folder):
    return read_ytvis(folder / "train.json", folder / "frames")


def only(videos, number):
    return replace(videos, videos=tuple(v for v in videos.videos if v.id == number))


# ------------------------------------------------------------------ which frames


@pytest.mark.parametrize("spacing", ["distinct", "even"])
@pytest.mark.parametrize(
    ("length", "count", "reach"),
    [(30, 16, 20), (17, 16, 3), (60, 4, 5), (16, 16, 0), (9, 1, 2), (100, 2, 1)],
)
def test_frames_are_distinct_ascending_and_near(spacing, length, count, reach):
    starts = set()
    for seed in range(600):
        frames = choose_frames(length, count, np.random.default_rng(seed), reach, spacing)
        assert len(frames) == count
        assert (np.diff(frames) > 0).all()
        assert frames[0] >= 0 and frames[-1] < length
        assert frames[-1] - frames[0] <= max(2 * reach, count - 1)
        if spacing == "even" and count > 1:
            assert len(set(np.diff(frames))) == 1
        starts.add((frames[0], frames[-1]))
    assert len(starts) > 1 or length == count
    if count < length:
        assert min(first for first, _ in starts) == 0
        assert max(last for _, last in starts) == length - 1


@pytest.mark.parametrize("spacing", ["distinct", "even"])
@pytest.mark.parametrize("length", [1, 2, 5, 15])
def test_short_videos_are_slowed_down(spacing, length):
    frames = choose_frames(length, 16, np.random.default_rng(0), spacing=spacing)
    assert (np.diff(frames) >= 0).all()
    counts = Counter(frames.tolist())
    assert set(counts) == set(range(length))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_the_released_way_repeats_frames():
    drawn = [choose_frames(30, 16, np.random.default_rng(n), 20, "released") for n in range(20)]
    assert all((np.diff(frames) >= 0).all() and len(frames) == 16 for frames in drawn)
    assert any(len(set(frames)) < 16 for frames in drawn)


# ------------------------------------------------------------------ clips


def test_a_clip_holds_the_frames_and_masks_it_names(videos):
    clips = VideoClips([ClipSource(videos=videos, augmentation=PLAIN, num_frames=4)])
    for draw in range(10):
        item = clips[ClipKey(0, 0, draw)]
        frames, targets = item["frames"], item["targets"]
        assert frames.shape == (4, 3, 32, 48) and frames.dtype == torch.uint8
        assert frames[:, 0, 0, 0].tolist() == (item["numbers"] * 8).tolist()
        assert targets.masks.shape == (len(targets.labels), 4, 32, 48)
        early = (item["numbers"] < 3).tolist()
        assert item["annotations"] == ([1, 2] if any(early) else [1])
        assert targets.labels.tolist() == ([0, 1] if any(early) else [0])
        assert targets.present[:, 0].all()
        if any(early):
            assert targets.present[:, 1].tolist() == early


def test_an_object_that_no_frame_shows_is_left_out_and_a_crowd_always(videos):
    clips = VideoClips([ClipSource(videos=only(videos, 4), augmentation=PLAIN, num_frames=2)])
    counts = Counter()
    for draw in range(40):
        item = clips[ClipKey(0, 0, draw)]
        shown = bool(((item["numbers"] == 2) | (item["numbers"] == 3)).any())
        assert item["annotations"] == ([5] if shown else [])
        counts[shown] += 1
        assert item["targets"].masks.shape[1:] == (2, 32, 48)
    assert min(counts.values()) > 0 and len(counts) == 2


def test_a_video_of_one_frame_is_a_clip(videos):
    source = ClipSource(videos=only(videos, 3), augmentation=ClipAugmentation.for_pictures())
    item = VideoClips([source])[ClipKey(0, 0, 0)]
    assert item["numbers"].tolist() == [0] * 16
    assert item["frames"].shape[0] == item["targets"].masks.shape[1] == 16
    assert (item["frames"][0] != item["frames"][-1]).any()  # the picture moves


def test_clips_depend_on_seed_and_draw_alone(videos):
    source = ClipSource(
        videos=videos, augmentation=ClipAugmentation(crop_scales=(40,), sizes=(32,)), num_frames=3
    )
    one, other = VideoClips([source], seed=5), VideoClips([source], seed=5)
    other[ClipKey(0, 1, 3)]
    first, second = one[ClipKey(0, 0, 7)], other[ClipKey(0, 0, 7)]
    assert torch.equal(first["frames"], second["frames"])
    assert torch.equal(first["targets"].masks, second["targets"].masks)
    third = VideoClips([source], seed=6)[ClipKey(0, 0, 7)]
    assert third["numbers"].tolist() != first["numbers"].tolist()


def test_batches_come_from_a_loader_in_any_number_of_processes(videos):
    sources = [ClipSource(videos=videos, augmentation=PLAIN, num_frames=3)]
    clips, seen = VideoClips(sources), []
    for workers in (0, 2):
        loader = DataLoader(
            clips,
            batch_sampler=ClipBatches(sources, 2, 4),
            collate_fn=collate_clips,
            num_workers=workers,
        )
        seen.append([batch["inputs"]["frames"] for batch in loader])
    for plain, parallel in zip(*seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, parallel, strict=True))
    batch = next(iter(loader))
    assert [len(sample.labels) == len(sample.masks) for sample in batch["data_samples"]]


# ------------------------------------------------------------------ batches


def keys_of(sources, *args, **options):
    return list(ClipBatches(sources, *args, **options))


def test_a_run_goes_on_where_it_stopped(videos):
    sources = [ClipSource(videos=videos, weight=1.5), ClipSource(videos=only(videos, 3))]
    whole = keys_of(sources, 4, 20, seed=1)
    assert keys_of(sources, 4, 20, seed=1, start=13) == whole[13:]
    assert keys_of(sources, 4, 12, seed=1) == whole[:12]
    assert keys_of(sources, 4, 20, seed=2) != whole
    assert len(ClipBatches(sources, 4, 20, start=13)) == 7
    draws = [key.draw for batch in whole for key in batch]
    assert len(set(draws)) == len(draws)


def test_a_batch_is_of_one_format_and_mixes_sources_by_weight(videos):
    sources = [ClipSource(videos=videos, weight=3), ClipSource(videos=only(videos, 3), weight=1)]
    batches = keys_of(sources, 6, 800)
    formats = [
        {sources[key.source].videos.videos[key.video].landscape for key in batch}
        for batch in batches
    ]
    assert all(len(found) == 1 for found in formats)
    counts = Counter(key.source for batch in batches for key in batch)
    assert counts[0] / (counts[0] + counts[1]) == pytest.approx(0.75, abs=0.03)
    portrait = sum(not found.pop() for found in formats) / len(formats)
    assert portrait == pytest.approx(0.75 / 4, abs=0.05)
    assert any(len({key.source for key in batch}) == 2 for batch in batches)


def test_every_video_is_seen_before_one_is_seen_again(videos):
    landscape = replace(videos, videos=tuple(v for v in videos.videos if v.landscape))
    keys = itertools.chain(*keys_of([ClipSource(videos=landscape)], 1, 30))
    order = [key.video for key in keys]
    assert all(set(order[n : n + 3]) == {0, 1, 2} for n in range(0, 30, 3))
    assert len({tuple(order[n : n + 3]) for n in range(0, 30, 3)}) > 1


def test_ranks_share_each_batch(videos, monkeypatch):
    sources = [ClipSource(videos=videos)]
    whole = keys_of(sources, 6, 5)
    batches = ClipBatches(sources, 6, 5)
    parts = []
    for rank in range(2):
        batches.rank, batches.world = rank, 2
        parts.append(list(batches))
    for batch, first, second in zip(whole, *parts, strict=True):
        assert sorted(first + second) == sorted(batch) and len(first) == len(second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 5), "batch_size=0"), ((2, 5, 0, 6), "start=6 lies outside a run of 5")],
)
def test_impossible_batches_are_refused(videos, arguments, message):
    with pytest.raises(ValueError, match=message):
        ClipBatches([ClipSource(videos=videos)], *arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"spacing": "odd"}, "spacing='odd' is not one of distinct, even, released"),
     ({"num_frames": 0}, "num_frames=0"), ({"weight": 0}, "weight=0")],
)  # fmt: skip
def test_impossible_sources_are_refused(videos, fields, message):
    with pytest.raises(ValueError, match=message):
        ClipSource(videos=videos, **fields)


def test_sources_must_belong_together(videos):
    with pytest.raises(DataError, match="has no annotated videos"):
        ClipSource(videos=replace(videos, annotated=False))
    first = ClipSource(videos=videos)
    with pytest.raises(DataError, match="different categories"):
        VideoClips([first, ClipSource(videos=replace(videos, categories={5: "cat"}))])
    with pytest.raises(DataError, match="clips of 8 and 16 frames"):
        VideoClips([first, ClipSource(videos=videos, num_frames=8)])
    with pytest.raises(DataError, match="no source"):
        VideoClips([])


# ------------------------------------------------------------------ whole videos


def test_whole_videos_are_resized_and_know_their_size(videos):
    data = WholeVideos(videos, short=16)
    assert len(data) == 4
    item = data[1]
    assert item["frames"].shape == (5, 3, 24, 16)
    assert item["size"] == (48, 32) and item["video_id"] == 2
    frames = list(read_video(videos.videos[1], videos.root, 16))
    assert torch.equal(torch.stack(frames), item["frames"])
    batch = collate_videos([item, data[2]])
    assert [len(frames) for frames in batch["inputs"]["frames"]] == [5, 1]
    assert batch["data_samples"][0].video_id == 2
    assert data.metainfo["category_ids"] == (5, 6)
    assert data.metainfo["classes"] == ("cat", "dog")
    assert len(data.metainfo["document"]["annotations"]) == 6
    assert WholeVideos(replace(videos, annotated=False)).metainfo["document"] is None


# ------------------------------------------------------------------ broken files


@pytest.fixture
def copied(videos, folder, tmp_path):
    """Video 3, whose only frame can be broken."""
    path = tmp_path / "v3" / "00000.png"
    path.parent.mkdir()
    path.write_bytes((folder / "frames/v3/00000.png").read_bytes())
    return replace(only(videos, 3), root=tmp_path), path


def test_broken_frames_are_named(copied):
    videos, path = copied
    video = videos.videos[0]
    Image.new("RGB", (40, 32)).save(path)
    with pytest.raises(DataError, match=r"video 3, frame 0: .* 32 x 40 pixels.* says 32 x 48"):
        read_clip(video, videos.root, [0])
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match="video 3, frame 0: .*is broken"):
        read_clip(video, videos.root, [0])
    path.unlink()
    with pytest.raises(DataError, match="video 3, frame 0: .*is missing"):
        read_clip(video, videos.root, [0])
