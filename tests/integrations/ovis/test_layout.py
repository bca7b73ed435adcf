"""Documents of video data sets and their masks: read whole, or refused by name."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco

from integrations.ovis.layout import (
    COCO_TO_YTVIS2019,
    RELEASES,
    LayoutError,
    hold_out,
    match_categories,
    read_coco,
    read_release,
    read_ytvis,
)
from integrations.ovis.rle import MaskError, areas, boxes, check_cover, compress, decode, encode

SIZE = (6, 9)


def blob(*frames):
    """Masks with a block of 2 x 3 in the frames named, four frames in all."""
    masks = np.zeros((4, *SIZE), bool)
    masks[list(frames), 1:3, 2:5] = True
    return masks


@pytest.fixture
def document():
    videos = [
        {"id": n, "height": 6, "width": 9, "length": 4,
         "file_names": [f"v{n}/{t:05d}.jpg" for t in range(4)]} for n in (7, 3)
    ]  # fmt: skip
    categories = [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}]
    annotations = []
    for n, (video, category, frames) in enumerate([(7, 4, (0, 1)), (3, 9, (2,)), (7, 9, ())]):
        masks = encode(blob(*frames))
        annotations.append(
            {"id": n + 1, "video_id": video, "category_id": category, "iscrowd": 0,
             "segmentations": masks, "bboxes": [mask and [2, 1, 3, 2] for mask in masks],
             "areas": [mask and 6 for mask in masks]}
        )  # fmt: skip
    return {"videos": videos, "categories": categories, "annotations": annotations}


def read(document, folder: Path, root="frames"):
    path = folder / "document.json"
    path.write_text(json.dumps(document))
    return read_ytvis(path, root)


# ------------------------------------------------------------------ masks


def test_masks_go_through_all_forms_of_run_lengths():
    rng = np.random.default_rng(0)
    masks = rng.random((5, *SIZE)) < 0.4
    masks[2] = False
    packed = encode(masks)
    assert packed[2] is None
    json.dumps(packed)
    np.testing.assert_array_equal(decode(packed, SIZE, "x"), masks)
    flat = masks[0].ravel(order="F").astype(int)
    changes = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
    counts = np.diff(np.concatenate([[0], changes])).tolist()
    plain = {"size": list(SIZE), "counts": counts}
    np.testing.assert_array_equal(decode([plain], SIZE, "x")[0], masks[0])
    assert areas([compress(plain, SIZE, "x"), packed[1]]).tolist() == masks[:2].sum((1, 2)).tolist()


def test_polygons_are_masks_too():
    square = [[2.0, 1.0, 5.0, 1.0, 5.0, 3.0, 2.0, 3.0]]
    np.testing.assert_array_equal(decode([square], SIZE, "x")[0], blob(0)[0])
    assert compress([], SIZE, "x") is None


def test_boxes_hold_their_pixels():
    masks = blob(0, 2)
    masks[2] = False
    masks[2, 5, 8] = True
    expected = [[2, 1, 3, 2], [0, 0, 0, 0], [8, 5, 1, 1], [0, 0, 0, 0]]
    assert boxes(masks).tolist() == expected
    assert boxes(np.stack([masks, masks])).shape == (2, 4, 4)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [9, 6], "counts": [54]}, r"thing, frame 3: the mask is 9 x 6 .* video is 6 x 9"),
        ({"size": [6, 9], "counts": [50]}, "run lengths cover 50 pixels, but 6 x 9 .* are 54"),
        ({"size": [6, 9], "counts": [60, -6]}, "neither run lengths nor a text"),
        ({"size": [6, 9]}, "expected an object with 'size' and 'counts'"),
        (7, "the segmentation is '7'"),
        ([[1.0, 2.0, 3.0]], r"polygon \[1\.0, 2\.0, 3\.0\] is not a list of three or more points"),
    ],
)
def test_broken_masks_are_refused(segmentation, message):
    with pytest.raises(MaskError, match=message):
        compress(segmentation, SIZE, "thing", 3)


def test_compressed_text_of_another_size_is_refused():
    for side, pixels in ((3, "9 pixels"), (30, "900 pixels")):
        text = coco.encode(np.asfortranarray(np.eye(side, dtype=np.uint8)))["counts"].decode()
        with pytest.raises(MaskError, match=f"thing, frame 5: .* cover {pixels}, but 6 x 9 .* 54"):
            decode([{"size": [6, 9], "counts": text}], SIZE, "thing", 5)
    for text in ("", "é", "oo"):
        with pytest.raises(MaskError, match="cover nothing readable"):
            decode([{"size": [6, 9], "counts": text}], SIZE, "thing", 5)


def test_the_pixels_that_a_text_covers_are_counted_right():
    rng = np.random.default_rng(0)
    for side, density in ((1, 1.0), (7, 0.5), (90, 0.02), (200, 0.0), (90, 0.98)):
        mask = rng.random((side, 2 * side)) < density
        packed = coco.encode(np.asfortranarray(mask, np.uint8))
        check_cover(packed, mask.shape, "x", 0)


# ------------------------------------------------------------------ documents


def test_reads_videos_with_tracks_and_labels(document, tmp_path):
    videos = read(document, tmp_path)
    assert videos.category_ids == (4, 9)
    assert videos.class_names == ("cat", "dog")
    assert [video.id for video in videos.videos] == [7, 3]
    first = videos.videos[0]
    assert first.landscape
    assert [track.label for track in first.tracks] == [0, 1]
    np.testing.assert_array_equal(first.tracks[0].masks(), blob(0, 1))
    np.testing.assert_array_equal(first.tracks[0].masks([2, 1, 1]), blob(0, 1)[[2, 1, 1]])
    assert not first.tracks[1].present().any()  # in no frame at all


def test_a_frame_counts_only_with_mask_and_box(document, tmp_path):
    document["annotations"][0]["bboxes"][1] = None
    track = read(document, tmp_path).videos[0].tracks[0]
    assert track.present().tolist() == [True, False, False, False]
    assert not track.masks([1]).any()


def test_the_document_of_a_part_is_evaluated_against(document, tmp_path):
    again = read(document, tmp_path).document()
    assert again["annotations"] == [document["annotations"][n] for n in (0, 2, 1)]
    assert {item["id"]: item["name"] for item in again["categories"]} == {4: "cat", 9: "dog"}
    assert [video["file_names"] for video in again["videos"]] == [
        video["file_names"] for video in document["videos"]
    ]


def test_a_split_without_annotations_can_be_read_but_not_scored(document, tmp_path):
    del document["annotations"]
    videos = read(document, tmp_path)
    assert not videos.annotated
    with pytest.raises(LayoutError, match="numbers are the server's"):
        videos.document()


def broken(document, change):
    document = copy.deepcopy(document)
    change(document)
    return document


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda d: d["annotations"][1].update(category_id=41), LayoutError,
         "annotation 2 is of category 41, but there are only 9, 4"),
        (lambda d: d["annotations"][1].update(video_id=5), LayoutError,
         "annotation 2 is of video 5"),
        (lambda d: d["annotations"][0]["segmentations"].pop(), LayoutError,
         "annotation 1 has 3 segmentations, but video 7 has 4 frames"),
        (lambda d: d["annotations"][0]["bboxes"].pop(), LayoutError, "has 3 bboxes"),
        (lambda d: d["annotations"][0]["segmentations"][0].update(size=[9, 6]), MaskError,
         r"annotation 1, frame 0: the mask is \[9, 6\] .* video is \[6, 9\]"),
        (lambda d: d["annotations"][2].update(id=1), LayoutError, "annotations has the id 1 twice"),
        (lambda d: d["videos"][0].update(file_names=[]), LayoutError, "video 7 has no frames"),
        (lambda d: d["videos"][0].pop("height"), LayoutError, "video 7 lacks 'height'"),
        (lambda d: d.pop("categories"), LayoutError, "lacks 'categories'"),
        (lambda d: d["categories"].clear(), LayoutError, "categories is empty"),
        (lambda d: d["annotations"].append(3), LayoutError, "'3' is not an object"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(document, tmp_path, change, kind, message):
    with pytest.raises(kind, match=message):
        read(broken(document, change), tmp_path)


def test_a_truncated_file_is_named(tmp_path):
    (tmp_path / "d.json").write_text('{"videos": [')
    with pytest.raises(ValueError, match=r"d\.json is not JSON"):
        read_ytvis(tmp_path / "d.json", ".")


@pytest.mark.parametrize("name", RELEASES)
def test_published_trees_are_found(document, tmp_path, name):
    for split, (documents, frames) in RELEASES[name].items():
        (tmp_path / frames[-1]).mkdir(parents=True)
        path = tmp_path / documents[-1]
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(document))
        videos = read_release(name, tmp_path, split)
        assert videos.root == tmp_path / frames[-1]
        assert videos.name == f"{name} {split}"


def test_missing_trees_are_explained(tmp_path):
    with pytest.raises(LayoutError, match="data set 'davis' is not known; there are ytvis2019"):
        read_release("davis", tmp_path, "train")
    with pytest.raises(LayoutError, match="ovis has no split 'val'; it has train, valid, test"):
        read_release("ovis", tmp_path, "val")
    with pytest.raises(LayoutError, match=r"there is no annotations_train\.json or train\.json"):
        read_release("ovis", tmp_path, "train")


# ------------------------------------------------------------------ hold-out


def many(document, tmp_path, count=40, rare=None):
    videos, annotations = [], []
    for n in range(count):
        category = 9 if n == rare else 4
        videos.append({**document["videos"][0], "id": n, "file_names": [f"name{n}/0.jpg"] * 4})
        annotations.append(
            {**document["annotations"][0], "id": n, "video_id": n, "category_id": category}
        )
    return read(document | {"videos": videos, "annotations": annotations}, tmp_path)


def test_the_hold_out_is_fixed_by_names_alone(document, tmp_path):
    videos = many(document, tmp_path)
    kept, held = hold_out(videos, 0.25)
    assert (len(kept), len(held)) == (30, 10)
    assert {v.id for v in kept.videos} | {v.id for v in held.videos} == set(range(40))
    assert "held out" in held.name
    backwards = type(videos)("x", videos.root, videos.videos[::-1], videos.categories)
    assert {v.id for v in hold_out(backwards, 0.25)[1].videos} == {v.id for v in held.videos}


def test_the_only_video_of_a_category_stays_in_training(document, tmp_path):
    first = many(document, tmp_path)
    chosen = next(iter(hold_out(first, 0.25)[1].videos)).id
    kept, held = hold_out(many(document, tmp_path, rare=chosen), 0.25)
    assert chosen in {video.id for video in kept.videos}
    assert len(held) == 10


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_hold_out_leaves_videos_on_both_sides(document, tmp_path, share):
    videos = many(document, tmp_path)
    if share:  # every category must stay in training, so one video is always left
        assert len(hold_out(videos, share)[0]) == 1
    else:
        with pytest.raises(LayoutError, match=r"a share of 0\.0 holds out 0 of the 40"):
            hold_out(videos, share)


# ------------------------------------------------------------------ pictures


@pytest.fixture
def pictures(tmp_path):
    def annotation(number, image, category, **changes):
        mask = encode(blob(0))[0]
        return {"id": number, "image_id": image, "category_id": category, "iscrowd": 0,
                "segmentation": mask, "bbox": [2, 1, 3, 2], "area": 6} | changes  # fmt: skip

    content = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "height": 6, "width": 9} for n in (1, 2, 3)],
        "categories": [{"id": 17, "name": "cat"}, {"id": 18, "name": "Dog"},
                       {"id": 44, "name": "bottle"}],
        "annotations": [
            annotation(1, 1, 17), annotation(2, 1, 44), annotation(3, 2, 44),
            annotation(4, 3, 18, segmentation=[[2.0, 1.0, 5.0, 1.0, 5.0, 3.0, 2.0, 3.0]]),
            annotation(5, 3, 17, iscrowd=1),
        ],
    }  # fmt: skip
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(content))
    return path


def test_pictures_become_videos_of_one_frame(pictures):
    videos = read_coco(pictures, "train2017", {4: "cat", 9: "dog"}, {17: 4, 18: 9})
    assert [(v.id, [t.label for t in v.tracks]) for v in videos.videos] == [(1, [0]), (3, [1])]
    for video in videos.videos:
        np.testing.assert_array_equal(video.tracks[0].masks(), blob(0)[:1])
        np.testing.assert_array_equal(video.tracks[0].masks([0, 0, 0]), blob(0)[[0, 0, 0]])
    videos.document()


def test_names_pair_categories():
    coco_names = {17: "cat", 35: "skis", 43: "tennis racket"}
    assert match_categories(coco_names, {40: "tennis_racket", 1: "Cat"}) == {17: 1, 43: 40}
    with pytest.raises(LayoutError, match="no category is common"):
        match_categories(coco_names, {1: "fish"})


def test_the_published_pairing_is_the_sheets():
    assert len(COCO_TO_YTVIS2019) == 21
    assert len(set(COCO_TO_YTVIS2019.values())) == 19


def test_pairings_must_fit_both_sides(pictures):
    with pytest.raises(LayoutError, match="17 -> 5 names a category that the video data set"):
        read_coco(pictures, ".", {4: "cat"}, {17: 5})
    with pytest.raises(LayoutError, match="99 -> 4 names a category that COCO"):
        read_coco(pictures, ".", {4: "cat"}, {99: 4})
    content = json.loads(pictures.read_text())
    content["annotations"] = content["annotations"][1:3]
    pictures.write_text(json.dumps(content))
    with pytest.raises(LayoutError, match="no picture shows any of the 1 mapped"):
        read_coco(pictures, ".", {4: "cat"}, {17: 4})
