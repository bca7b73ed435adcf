"""Masks: their encodings, their sizes, and what happens to them along with their frames."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from backbone.video import VideoWriter
from pretrain.datasets import Annotations, Draw, Entry, VideoDataset, collate
from pretrain.datasets.augment import (
    Augmentation,
    crop_around_masks,
    crop_range,
    resize_short_side,
    turned,
)
from pretrain.datasets.decode import ClipError, ClipReader, FrameStore
from pretrain.datasets.masks import (
    BACKGROUND,
    IGNORE,
    PaletteMasks,
    RleFiles,
    RleMasks,
    decode_rle,
    fill_polygons,
    fit,
)


def run_lengths(mask):
    """COCO's run lengths of a mask (H, W) bool, as a list."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def box(height, width, top, left, bottom, right):
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask


# -- encodings ------------------------------------------------------------------------------------


def test_run_lengths_in_both_forms_equal_pycocotools():
    coco = pytest.importorskip("pycocotools.mask", reason="the reference for run lengths")
    rng = np.random.default_rng(0)
    for case in range(60):
        size = tuple(rng.integers(1, 70, 2).tolist())
        mask = rng.random(size) < rng.random()
        if case % 3 == 0:  # long runs, whose lengths take several characters
            mask = box(300, 400, *sorted(rng.integers(0, 300, 2)), 0, 0)
            mask[20:200, 30:350] = True
        packed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
        for counts in (packed, packed.decode(), run_lengths(mask)["counts"]):
            assert (decode_rle(counts, mask.shape, "here") == mask).all()


def test_polygons_are_those_of_pycocotools_but_for_cut_pixels():
    coco = pytest.importorskip("pycocotools.mask", reason="the reference for polygons")
    rng = np.random.default_rng(0)
    for _ in range(30):
        angles, radius = np.sort(rng.random(9)) * 2 * np.pi, rng.uniform(8, 30)
        points = np.stack([40 + radius * np.cos(angles), 30 + radius * np.sin(angles)], 1)
        polygon = points.ravel().tolist()
        expected = coco.decode(coco.merge(coco.frPyObjects([polygon], 60, 80))) > 0
        found = fill_polygons([polygon], (60, 80), "here")
        inside = expected[1:-1, 1:-1] & expected[2:, 1:-1] & expected[:-2, 1:-1]
        inside &= expected[1:-1, 2:] & expected[1:-1, :-2]
        assert found[1:-1, 1:-1][inside].all()
        assert (found & expected).sum() > 0.85 * (found | expected).sum()


def test_polygons_fill_the_pixels_whose_centres_they_hold():
    square = [2.0, 1.0, 2.0, 5.0, 6.0, 5.0, 6.0, 1.0]
    far = [-5.0, -5.0, -5.0, 0.6, 0.6, 0.6, 0.6, -5.0]  # reaches out of the image
    found = fill_polygons([square, far], (8, 10), "here")
    expected = box(8, 10, 1, 2, 5, 6)
    expected[0, 0] = True
    assert (found == expected).all()
    with pytest.raises(ClipError, match="here: .1, 2, 3, 4. is no polygon"):
        fill_polygons([[1, 2, 3, 4]], (8, 10), "here")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([3, 4], "run lengths cover 7 pixels of 4 x 3 = 12; the mask is damaged, or of another"),
        ([20, -8], "run lengths cover 12 pixels"),
        (["a"], "counts=.'a'. are no run lengths"),
        (None, "run lengths cover|are no run lengths"),
        ("", "are no packed run lengths"),
        ("o", "are no packed run lengths"),
        ("1ü", "are no packed run lengths"),
        ("o" * 13 + "0", "hold a number of 14 characters"),
    ],
)
def test_damaged_run_lengths_are_refused(counts, message):
    with pytest.raises(ClipError, match=message):
        decode_rle(counts, (3, 4), "here")


def test_cut_run_lengths_are_refused():
    coco = pytest.importorskip("pycocotools.mask", reason="writes packed run lengths")
    whole = coco.encode(np.asfortranarray(box(40, 50, 5, 5, 30, 30).astype(np.uint8)))["counts"]
    for length in range(len(whole)):
        with pytest.raises(ClipError, match="here: "):
            decode_rle(whole[:length], (40, 50), "here")


# -- sources --------------------------------------------------------------------------------------


def test_later_things_are_in_front_and_frames_may_repeat():
    first, second = box(8, 10, 0, 0, 6, 6), box(8, 10, 4, 4, 8, 10)
    masks = RleMasks("video 1", (8, 10), (
        (3, [run_lengths(first), None, run_lengths(first)]),
        (1, [run_lengths(second), run_lengths(second), []]),
    ))  # fmt: skip
    found = masks.read(np.array([1, 0, 0, 2]), (8, 10))
    assert found.dtype == np.int32
    expected = np.full((4, 8, 10), BACKGROUND)
    expected[1:, first] = 3
    expected[:3, second] = 1
    assert (found == expected).all()


def test_masks_are_scaled_to_frames_of_their_shape_only():
    mask = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert (fit(mask, (4, 6), "here") == mask.repeat(2, 0).repeat(2, 1)).all()
    assert (fit(mask.repeat(2, 0).repeat(2, 1), (2, 3), "here") == mask).all()
    for size in ((224, 398), (256, 455), (128, 227)):  # as short sides round
        assert fit(np.zeros((720, 1280), np.int32), size, "here").shape == size
    for size in ((398, 224), (224, 224), (224, 401), (90, 150)):
        with pytest.raises(ClipError, match=f"of 1280 x 720 pixels do not fit .* {size[1]} x"):
            fit(np.zeros((720, 1280), np.int32), size, "here")


def test_run_lengths_of_another_size_are_refused():
    right, wrong = run_lengths(box(8, 10, 0, 0, 4, 4)), run_lengths(box(10, 8, 0, 0, 4, 4))
    masks = RleMasks("video 7", (8, 10), ((0, [right, wrong]),))
    assert (masks.read(np.array([0]), (8, 10)) == 0).sum() == 16
    with pytest.raises(ClipError, match="video 7, frame 1: run lengths of 8 x 10 pixels in frames"):
        masks.read(np.array([0, 1]), (8, 10))
    with pytest.raises(ClipError, match="video 7: no mask for frame 2, there are 2"):
        masks.read(np.array([2]), (8, 10))
    with pytest.raises(ClipError, match="has no size"):
        RleMasks("video 7", None, ((0, [{"counts": [80]}]),)).read(np.array([0]), (8, 10))


def test_json_files_hold_one_thing_each(tmp_path):
    left, right = box(8, 10, 0, 0, 8, 3), box(8, 10, 0, 7, 8, 10)
    (tmp_path / "1.json").write_text(json.dumps([run_lengths(left), None]))
    (tmp_path / "2.json").write_text(json.dumps([run_lengths(right), None]))
    (tmp_path / "3.json").write_text('[{"size": [8')
    files = tuple(tmp_path / f"{i}.json" for i in range(1, 5))
    found = RleFiles(files[:2], 2).read(np.array([0, 1]), (16, 20))
    assert ((found[0] == 0) == (left | right).repeat(2, 0).repeat(2, 1)).all()
    assert (found[1] == BACKGROUND).all()
    assert (RleFiles(files[:1], 2).read(np.array([1]), (16, 20)) == BACKGROUND).all()
    for files_, length, message in (
        (files[:1], 3, "1.json: 2 entries; the video has 3 annotated frames"),
        (files[2:3], 2, "3.json: masks cannot be read"),
        (files[3:], 2, "4.json: masks cannot be read .*No such file"),
    ):
        with pytest.raises(ClipError, match=message):
            RleFiles(files_, length).read(np.array([0]), (8, 10))


def test_palettes_number_things(tmp_path):
    numbers = np.zeros((6, 8), np.uint8)
    numbers[:3, :4], numbers[3:, 4:], numbers[0, 7] = 1, 2, 255
    image = Image.fromarray(numbers, mode="P")
    image.putpalette([0, 0, 0, 236, 95, 103, 249, 145, 87])
    image.save(tmp_path / "00005.png")
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(tmp_path / "00010.png")
    (tmp_path / "00015.png").write_bytes(b"no image")
    stems = ("00005", "00010", "00015", "00020")
    found = PaletteMasks(tmp_path, stems, (2,)).read(np.array([0, 0]), (6, 8))
    assert ((found[1] == 0) == (numbers == 2)).all()
    assert (found == 0).sum() == 2 * 12
    both = PaletteMasks(tmp_path, stems, (1, 2)).read(np.array([0]), (6, 8))
    assert (both == 0).sum() == 24
    for frame, message in (
        (1, "00010.png: pixels are RGB, but numbers of objects are expected"),
        (2, "00015.png: mask cannot be read"),
        (3, "00020.png: mask cannot be read .*No such file"),
        (4, "no mask for frame 4, there are 4"),
    ):
        with pytest.raises(ClipError, match=message):
            PaletteMasks(tmp_path, stems, (1,)).read(np.array([frame]), (6, 8))


# -- augmentation ---------------------------------------------------------------------------------


@pytest.mark.golden
def test_crops_begin_where_the_released_ones_do_or_are_kept_within_the_frame(golden):
    stored = json.loads((golden / "pretraining/sampling.json").read_text())
    mended = 0
    for case in stored["mask_crop_ranges"]:
        boxes = np.array(case["mask_boxes_inclusive_y0x0y1x1"])
        first, last, crop = boxes[:, :2].min(0), boxes[:, 2:].max(0), case["crop"]
        sides = case["h"], case["w"]
        released = case["y_range"], case["x_range"]
        ours = [crop_range(int(first[i]), int(last[i]), sides[i], crop) for i in (0, 1)]
        empty = any(
            max(0, first[i] - crop // 2) > min(sides[i] - crop, last[i] - crop // 2) for i in (0, 1)
        )
        if not empty:
            assert [list(pair) for pair in ours] == list(released)
        mended += empty
        for i, (low, high) in enumerate(ours):
            assert 0 <= low <= high <= sides[i] - crop
            for begin in (low, high):  # some of the thing is always seen
                assert begin <= last[i]
                assert begin + crop > first[i]
    assert mended == 2


def painted(height, width, top, left, bottom, right, steps=3):
    """Frames whose pixels are bright exactly where their masks show a thing."""
    mask = torch.from_numpy(np.where(box(height, width, top, left, bottom, right), 4, BACKGROUND))
    frames = torch.where(mask >= 0, 255, 0).to(torch.uint8).expand(steps, 3, -1, -1)
    return frames.contiguous(), mask.int().expand(steps, -1, -1).contiguous()


@pytest.mark.parametrize("kind", ["none", "crop", "things"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("place", [(0, 0, 10, 14), (50, 80, 60, 90), (20, 30, 48, 70)])
def test_masks_go_where_their_frames_go(kind, flip, place):
    frames, masks = painted(60, 90, *place)
    seen = set()
    for seed in range(12):
        rng = np.random.default_rng(seed) if seed else None
        out, cut = Augmentation(kind, flip).with_masks(frames, masks, 28, rng)
        assert type(out) is type(cut) is torch.Tensor
        assert (out.dtype, cut.dtype) == (torch.uint8, torch.int32)
        assert out.shape == (3, 3, 28, 28)
        assert cut.shape == (3, 28, 28)
        assert (cut == cut[:1]).all()
        differ = (out[:, 0] > 127) != (cut == 4)  # but for a border's width
        assert differ.float().mean() < 0.08
        if kind == "things" and seed:
            assert (cut == 4).any()
        seen.add(cut.numpy().tobytes())
    if kind == "none" and not flip:
        assert len(seen) == 1
    elif kind == "things" or place == (20, 30, 48, 70):  # others may miss the thing
        assert len(seen) > 1


def test_crops_without_a_thing_are_anywhere():
    frames, masks = painted(60, 90, 0, 0, 0, 0)
    frames[..., 45:] = 200
    rng = np.random.default_rng(0)
    shares = [crop_around_masks(frames, masks, 28, rng)[0].float().mean() for _ in range(20)]
    assert max(shares) - min(shares) > 60


def test_stills_turn_from_frame_to_frame_with_their_masks():
    frames, masks = painted(60, 90, 20, 30, 40, 60, steps=6)
    out, cut = turned(frames, masks, np.random.default_rng(0))
    assert not any(torch.equal(out[0], later) for later in out[1:])
    assert ((out[:, 0] > 127) != (cut == 4)).float().mean() < 0.02
    corners = cut[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == IGNORE).any(1).all()
    assert set(cut.unique().tolist()) == {4, BACKGROUND, IGNORE}
    still, kept = Augmentation("things").with_masks(
        frames, masks, 56, np.random.default_rng(0), still=True
    )
    assert not torch.equal(still[0], still[1])
    assert not torch.equal(kept[0], kept[1])
    calm, _ = Augmentation("things").with_masks(frames, masks, 56, None, still=True)
    assert (calm == calm[:1]).all()


def test_things_are_a_seventh_larger_than_their_crop():
    frames, masks = painted(60, 90, 20, 30, 40, 60)
    out, cut = crop_around_masks(frames, masks, 28, np.random.default_rng(0))
    whole = resize_short_side(frames, 32)[0, 0]
    assert whole.shape[0] == 32
    assert any(
        torch.equal(whole[y : y + 28, x : x + 28], out[0, 0])
        for y in range(5) for x in range(whole.shape[1] - 27)
    )  # fmt: skip
    assert Augmentation("things")(frames, 28, np.random.default_rng(0)).shape == (3, 3, 28, 28)


# -- clips with masks -----------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """A folder of images 0, 5, 10, … with a bright column that moves by ten, and its masks."""
    folder = tmp_path / "images"
    folder.mkdir()
    segmentations = []
    for i in range(9):
        mask = box(64, 96, 0, 10 * i, 64, 10 * i + 10)
        image = np.where(mask[..., None], 255, 0).astype(np.uint8).repeat(3, 2)
        Image.fromarray(image).save(folder / f"{5 * i:05d}.png")
        segmentations.append(run_lengths(mask))
    return folder, segmentations


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("form", ["folder", "files", "video"])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_masks_are_those_of_the_frames_that_are_read(pictures, tmp_path, kept, form, seed):
    folder, segmentations = pictures
    files = ()
    if form == "files":  # every other image is part of the video
        files = tuple(f"{10 * i:05d}.png" for i in range(5))
        segmentations = segmentations[::2]
    if form == "video":
        with VideoWriter(tmp_path / "video.mp4", 8, (96, 64)) as writer:
            for image in sorted(folder.iterdir()):
                writer.write(np.array(Image.open(image)))
        folder = tmp_path / "video.mp4"
    masks = RleMasks("here", (64, 96), ((0, segmentations),))
    reader = ClipReader(
        32, "padded_blocks", augment=Augmentation("things", flip=True),
        store=FrameStore(32) if kept else None,
    )  # fmt: skip
    dataset = VideoDataset(Annotations([Entry(folder, masks=masks, files=files)]), reader)
    sample = dataset[Draw(0, 4, seed)]
    assert sample.error == ""
    assert sample.masks.shape == (4, 32, 32)
    bright = sample.frames.float().mean(1) > 127
    assert (bright != (sample.masks == 0)).float().mean() < 0.08
    assert (sample.masks == 0).any()
    short = dataset[Draw(0, 12, seed)]
    assert short.masks.shape == (12, 32, 32)


def test_a_still_is_a_video_of_one_frame(pictures):
    folder, segmentations = pictures
    masks = RleMasks("here", (64, 96), ((7, segmentations[4:5]),))
    entry = Entry(folder / "00020.png", masks=masks)
    for store in (None, FrameStore(32)):
        reader = ClipReader(32, "padded_blocks", augment=Augmentation("things"), store=store)
        calm = reader.read(entry, 4, None)
        assert (calm.frames == calm.frames[:1]).all()
        assert (calm.masks == 7).any()
        moving = reader.read(entry, 4, np.random.default_rng(0))
        assert not (moving.frames == moving.frames[:1]).all()
        assert (moving.masks == IGNORE).any() or not moving.masks.eq(moving.masks[:1]).all()


def test_batches_know_nothing_of_padding_and_of_lost_clips(pictures):
    folder, segmentations = pictures
    whole = RleMasks("here", (64, 96), ((0, segmentations),))
    part = RleMasks("there", (64, 96), ((0, segmentations[:3]),))
    entries = [Entry(folder, masks=whole), Entry(folder, masks=part), Entry(folder)]
    dataset = VideoDataset(Annotations(entries), ClipReader(32, "consecutive"))
    batch = collate([dataset[Draw(0, 9)], dataset[Draw(1, 9)], dataset[Draw(0, 4, 3)]], 32)
    assert batch.masks.shape == (3, 9, 32, 32)
    assert (batch.masks[0] != IGNORE).all()
    assert (batch.masks[1] == IGNORE).all()
    assert "there: no mask for frame 3, there are 3" in batch.errors[0]
    assert (batch.masks[2, 4:] == IGNORE).all()
    assert (batch.masks[2, :4] != IGNORE).all()
    assert batch.seeds == [None, None, 3]
    assert batch.to(torch.device("cpu")).masks.dtype == torch.int32
    assert collate([dataset[Draw(2, 9)]], 32).masks is None


def test_images_that_cannot_be_a_video_are_named(pictures):
    folder, _ = pictures
    Image.new("RGB", (10, 10)).save(folder / "small.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    reader = ClipReader(32, "padded_blocks")
    for files, message in (
        (("00000.png", "small.png"), "small.png: 10 x 10 pixels, but the video's frames are 96 x"),
        (("00000.png", "broken.jpg"), "broken.jpg: image cannot be read"),
        (("00000.png", "gone.jpg"), "gone.jpg: image cannot be read"),
    ):
        with pytest.raises(ClipError, match=message):
            reader.read(Entry(folder, files=files), 2, None)
        with pytest.raises(ClipError, match=message):
            FrameStore(32).get(folder, files)


def test_strong_augmentation_would_lose_the_masks(pictures):
    folder, segmentations = pictures
    entry = Entry(folder, masks=RleMasks("here", (64, 96), ((0, segmentations),)))
    strong = Augmentation("strong")
    with pytest.raises(ValueError, match="'strong' would leave the masks of these annotations"):
        VideoDataset(Annotations([entry]), ClipReader(32, "blocks", augment=strong))
    with pytest.raises(ValueError, match="'strong' would leave masks behind; use 'things'"):
        strong.with_masks(*painted(40, 40, 0, 0, 5, 5), 32, np.random.default_rng(0))
