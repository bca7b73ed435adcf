"""Readers of masks: released and public layouts, whole and lying."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from pretrain.datasets import READERS
from pretrain.datasets.instances import dataset_name, read_coco, read_youtube_vis
from pretrain.datasets.masks import BACKGROUND, IGNORE
from pretrain.datasets.referring import (
    read_mevis,
    read_mevis_official,
    read_refer_coco,
    read_refer_coco_official,
    read_refer_youtube_vos,
    read_refer_youtube_vos_official,
)
from pretrain.datasets.tables import AnnotationError

SIZE = (4, 6)
LEFT = {"size": [4, 6], "counts": [0, 8, 16]}  # the first two columns
RIGHT = {"size": [4, 6], "counts": "`08"}  # the last two, packed: 16 outside, 8 inside


def columns(masks, frame=0):
    """What each column of a frame holds, all rows being alike."""
    found = masks.read(np.array([frame]), SIZE)[0]
    assert (found == found[:1]).all()
    return found[0].tolist()


@pytest.fixture
def write(tmp_path):
    """Write a value as JSON, or a text as it is, and return its path."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def changed(value, path, new):
    """A copy of nested lists and dicts with the value at ``path`` replaced, or removed by None."""
    value = json.loads(json.dumps(value))
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if new is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return value


# -- things ---------------------------------------------------------------------------------------

VIDEOS = {
    "videos": [
        {"id": 2, "file_names": ["a/00000.jpg", "a/00005.jpg"], "height": 4, "width": 6},
        {"id": 3, "file_names": ["b/00000.jpg"], "height": 4, "width": 6},
        {"id": 7, "file_names": ["c/00000.jpg"], "height": 4, "width": 6},
    ],
    "categories": [{"id": 1, "name": "giant_panda"}, {"id": 3, "name": "Lizard"}],
    "annotations": [
        {"id": 1, "video_id": 7, "category_id": 3, "segmentations": [LEFT]},
        {"id": 2, "video_id": 2, "category_id": 1, "segmentations": [LEFT, None]},
        {"id": 3, "video_id": 2, "category_id": 3, "segmentations": [RIGHT, RIGHT]},
    ],
}
LABELS = {"LVVIS": {"x": 1}, "YoutubeVIS": {"__background__": 0, "lizard": 3, "giant panda": 1}}


def test_released_names_of_data_sets():
    assert dataset_name("/meta/train_YoutubeVIS.json") == "YoutubeVIS"
    assert dataset_name("val_COCOPseudoVIS.v2.json") == "COCOPseudoVIS"
    assert dataset_name("instances.json") == "instances"


def test_youtube_vis_maps_categories_and_leaves_out_by_id(write, caplog):
    path = write("train_YoutubeVIS.json", VIDEOS)
    read = read_youtube_vis(path, "/v", write("label2id.json", LABELS))
    assert read.label_sets == {"YoutubeVIS": ("giant panda", "lizard")}
    first, last = read.entries  # ids 2 and 7: the third video, not the second, has no place 3
    assert (str(first.video), first.files) == ("/v/a", ("00000.jpg", "00005.jpg"))
    assert (str(last.video), last.label_set) == ("/v/c", "YoutubeVIS")
    assert columns(first.masks) == [0, 0, -1, -1, 1, 1]
    assert columns(first.masks, 1) == [-1] * 4 + [1, 1]
    assert columns(last.masks) == [1, 1] + [-1] * 4
    assert read.left_out == ("video 3 has no annotations",)
    assert "left out 1 rows" in caplog.text


def test_without_labels_the_categories_are_the_labels(write):
    path = write("train.json", VIDEOS)
    read = read_youtube_vis(path, "/v", name="OVIS", pattern="{id}.mp4")
    assert read.label_sets == {"OVIS": ("giant panda", "Lizard")}
    assert [(str(entry.video), entry.files) for entry in read.entries] == [
        ("/v/a.mp4", ()), ("/v/c.mp4", ())]  # fmt: skip


def test_without_categories_ids_count_and_zero_is_background(write):
    content = changed(VIDEOS, ["categories"], None)
    labels = write("label2id.json", LABELS["YoutubeVIS"])
    read = read_youtube_vis(write("a.json", content), "/v", labels, name="Y")
    assert read.label_sets == {"Y": ("giant panda", "lizard")}
    assert columns(read.entries[0].masks) == [0, 0, -1, -1, 1, 1]
    zero = changed(content, ["annotations", 0, "category_id"], 0)
    with pytest.raises(AnnotationError, match="annotation 1: category_id=0 .* 0 is the background"):
        read_youtube_vis(write("b.json", zero), "/v", labels, name="Y")
    with pytest.raises(AnnotationError, match="has no categories; give a label2id"):
        read_youtube_vis(write("c.json", content), "/v")


def test_a_label_with_id_zero_counts_if_a_category_bears_its_name(write):
    """COCO as released numbers its labels from 0: the first is a person, not the background."""
    content = {
        "images": [{"id": 9, "file_name": "9.jpg", "height": 4, "width": 6}],
        "categories": [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}],
        "annotations": [{"id": 5, "image_id": 9, "category_id": 1, "segmentation": LEFT}],
    }
    labels = write("label2id.json", {"COCOPseudoVIS": {"person": 0, "toothbrush": 1}})
    read = read_coco(write("train_COCOPseudoVIS.json", content), "/v", labels)
    assert read.label_sets == {"COCOPseudoVIS": ("person", "toothbrush")}
    assert columns(read.entries[0].masks) == [0, 0] + [-1] * 4


def test_coco_draws_polygons_over_crowds(write):
    square = [0, 0, 0, 4, 1, 4, 1, 0]
    content = {
        "images": [
            {"id": 3, "file_name": "x/3.jpg", "height": 4, "width": 6},
            {"id": 4, "file_name": "4.jpg", "height": 4, "width": 6},
        ],
        "categories": [{"id": 2, "name": "cat"}, {"id": 5, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 5, "iscrowd": 0, "segmentation": [square]},
            {"id": 2, "image_id": 3, "category_id": 2, "iscrowd": 1, "segmentation": LEFT},
            {"id": 3, "image_id": 3, "category_id": 2, "iscrowd": 0, "segmentation": RIGHT},
        ],
    }
    read = read_coco(write("instances_train2017.json", content), "/v", name="COCO")
    (entry,) = read.entries
    assert str(entry.video) == "/v/x/3.jpg"
    assert columns(entry.masks) == [1, IGNORE, BACKGROUND, BACKGROUND, 0, 0]
    assert read.left_out == ("image 4 has no annotations",)


@pytest.mark.parametrize(
    ("path", "new", "message"),
    [
        (["videos"], None, "no field 'videos'; there are 'categories', 'annotations'"),
        (["videos", 0, "id"], None, "video at place 0: no field 'id'"),
        (["videos", 0, "id"], 5, "annotations of video_id=2, which is not among its videos"),
        (["videos", 0, "height"], 0, "video 2: height=0, width=6 are no pixels"),
        (["videos", 0, "file_names"], ["a/0.jpg", "b/1.jpg"], "must lie in one folder; found"),
        (["videos", 0, "file_names"], ["a/0.jpg"], "1 file_names, but an annotation with 2 segm"),
        (["annotations", 1, "category_id"], 2, "annotation 2: category_id=2 is not among the 2"),
        (["annotations", 1, "segmentations"], None, "annotation 2: no field 'segmentations'"),
        (["annotations", 1, "segmentations"], "x", "annotation 2: segmentations='x' is no list"),
        (["annotations", 1], 3, "annotation at place 1: expected an object"),
        (["categories", 1, "name"], "newt", "category 3 is 'newt', which is not among the 3 labe"),
        (["categories", 1, "id"], 1, "two categories have the id 1"),
    ],
)
def test_youtube_vis_files_that_lie_are_refused(write, path, new, message):
    annotations = write("train_YoutubeVIS.json", changed(VIDEOS, path, new))
    with pytest.raises(AnnotationError, match=message):
        read_youtube_vis(annotations, "/v", write("label2id.json", LABELS))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"LVVIS": {"x": 1}}, "no labels of data set 'YoutubeVIS'; there are those of 'LVVIS'"),
        ({"lizard": "1"}, "expected {label: id} for 'YoutubeVIS', ids whole numbers"),
        ({}, "expected {label: id}"),
        ({"lizard": 1, "giant panda": 1}, "two labels of 'YoutubeVIS' have the same id"),
        ([], "is no object"),
    ],
)
def test_label_files_that_lie_are_refused(write, labels, message):
    annotations = write("train_YoutubeVIS.json", VIDEOS)
    with pytest.raises(AnnotationError, match=message):
        read_youtube_vis(annotations, "/v", write("label2id.json", labels))


# -- what words mean ------------------------------------------------------------------------------

HEAD = "video_id,text,frames,length,obj_id,anno_id\n"
ROWS = (
    HEAD
    + "v1,both of them,\"['00000', '00001']\",2,\"[0, 1]\",\"[40, 41]\"\n"
    + "v1, the left one ,\"['00000', '00001']\",2,[0],[40]\n"
    + "v1,nobody,\"['00000', '00001']\",2,[],[]\n"
    + "v1,  ,\"['00000', '00001']\",2,[0],[40]\n"
)
MASKS = {"40": [LEFT, None], "41": [RIGHT, RIGHT]}


@pytest.mark.parametrize("stored", ["folder", "file"])
def test_mevis_tables_unite_objects(write, tmp_path, stored):
    annotations = write("train_MEVIS.csv", ROWS)
    for number, masks in MASKS.items():
        write(f"masks/{number}.json", masks)
    masks = tmp_path / "masks" if stored == "folder" else write("mask_dict.json", MASKS)
    read = read_mevis(annotations, "/v", masks)
    both, left = read.entries
    assert (str(both.video), both.captions, both.files) == ("/v/v1.mp4", ("both of them",), ())
    assert left.captions == ("the left one",)
    assert columns(both.masks) == [0, 0, -1, -1, 0, 0]
    assert columns(both.masks, 1) == [-1] * 4 + [0, 0]
    assert columns(left.masks) == [0, 0] + [-1] * 4
    assert columns(left.masks, 1) == [-1] * 6
    assert read.left_out == (
        "line 4: v1 means no annotated object", "line 5: v1 has an empty expression")  # fmt: skip
    folders = read_mevis(annotations, "/v", masks, pattern="{id}")
    assert str(folders.entries[0].video) == "/v/v1"
    assert folders.entries[0].files == ("00000.jpg", "00001.jpg")


META = {
    "videos": {
        "v1": {
            "frames": ["00000", "00001"],
            "vid_id": 0,
            "expressions": {
                "0": {"exp": "both of them", "obj_id": [0, 1], "anno_id": [40, 41]},
                "1": {"exp": "nobody", "obj_id": [], "anno_id": []},
            },
        }
    }
}


def test_mevis_as_published(write):
    read = read_mevis_official(
        write("meta_expressions.json", META), "/v", write("mask_dict.json", MASKS)
    )
    (entry,) = read.entries
    assert (str(entry.video), entry.files) == ("/v/v1", ("00000.jpg", "00001.jpg"))
    assert entry.captions == ("both of them",)
    assert columns(entry.masks) == [0, 0, -1, -1, 0, 0]
    assert read.left_out == ("video v1, expression 1 means no annotated object",)


def paint(folder, stems):
    folder.mkdir(parents=True)
    numbers = np.zeros(SIZE, np.uint8)
    numbers[:, :2], numbers[:, 4:] = 1, 2
    for stem in stems:
        image = Image.fromarray(numbers, mode="P")
        image.putpalette([0, 0, 0, 236, 95, 103, 249, 145, 87])
        image.save(folder / f"{stem}.png")


def test_refer_youtube_vos_in_both_layouts(write, tmp_path):
    stems = ["00000", "00005"]
    paint(tmp_path / "Annotations/v1", stems)
    table = write("train_ReferYoutubeVOS.csv", HEAD + f'v1,the right one,"{stems}",2,[\'2\'],[2]\n')
    meta = {"videos": {"v1": {"frames": stems, "expressions": {
        "0": {"exp": "the right one", "obj_id": "2"}}}}}  # fmt: skip
    places = ("/v/JPEGImages", tmp_path / "Annotations")
    for read in (
        read_refer_youtube_vos(table, *places),
        read_refer_youtube_vos_official(write("meta_expressions.json", meta), *places),
    ):
        (entry,) = read.entries
        assert str(entry.video) == "/v/JPEGImages/v1"
        assert entry.files == ("00000.jpg", "00005.jpg")
        assert entry.captions == ("the right one",)
        assert columns(entry.masks, 1) == [-1] * 4 + [0, 0]
    blind = changed(meta, ["videos", "v1", "expressions", "0", "obj_id"], None)
    with pytest.raises(AnnotationError, match="video v1, expression 0: no field 'obj_id'"):
        read_refer_youtube_vos_official(write("meta_expressions.json", blind), *places)


def test_refer_coco_as_released(write):
    content = {
        "images": [
            {"file_name": "COCO_train2014_000000000009.jpg", "caption": c, "height": 4, "width": 6}
            for c in ("left", "right", " ")
        ],
        "annotations": [{"segmentation": s} for s in (LEFT, [[4, 0, 4, 4, 6, 4, 6, 0]], LEFT)],
    }
    read = read_refer_coco(write("train_ReferCOCOPseudo.json", content), "/v")
    left, right = read.entries
    assert str(left.video) == "/v/000000000009.jpg"
    assert columns(left.masks) == [0, 0] + [-1] * 4
    assert (right.captions, columns(right.masks)) == (("right",), [-1] * 4 + [0, 0])
    assert read.left_out == ("image 2 has an empty expression",)
    short = changed(content, ["annotations", 2], None)
    with pytest.raises(AnnotationError, match="3 images and 2 annotations"):
        read_refer_coco(write("train_ReferCOCOPseudo.json", short), "/v")


INSTANCES = {
    "images": [
        {"id": 9, "file_name": "COCO_train2014_000000000009.jpg", "height": 4, "width": 6}
    ],
    "annotations": [{"id": 70, "image_id": 9, "segmentation": LEFT}],
}


def references(**changes):
    sentences = [{"sent": "left one", "raw": "Left one"}, {"sent": "the left"}]
    return {"ann_id": 70, "image_id": 9, "split": "train", "sentences": sentences} | changes


def test_refer_coco_as_published(write, tmp_path):
    path, instances = tmp_path / "refs(unc).p", write("instances.json", INSTANCES)
    path.write_bytes(pickle.dumps([references(), references(split="val")], protocol=2))
    read = read_refer_coco_official(path, instances, "/v", "train", pattern="{file}")
    assert [entry.captions for entry in read.entries] == [("left one",), ("the left",)]
    assert str(read.entries[0].video) == "/v/000000000009.jpg"
    assert columns(read.entries[1].masks) == [0, 0] + [-1] * 4
    whole = read_refer_coco_official(path, instances, "/v").entries
    assert len(whole) == 4
    assert whole[0].video.name == "COCO_train2014_000000000009.jpg"
    with pytest.raises(AnnotationError, match="nothing in split 'test'; splits are 'train', 'val'"):
        read_refer_coco_official(path, instances, "/v", "test")
    path.write_bytes(pickle.dumps([references(ann_id=71)]))
    with pytest.raises(AnnotationError, match="reference 0: ann_id=71 has no annotation in"):
        read_refer_coco_official(path, instances, "/v")


class Harmful:
    """A pickle that would write a file if it were simply loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_runs_nothing(write, tmp_path):
    path, instances = tmp_path / "refs(unc).p", write("instances.json", INSTANCES)
    path.write_bytes(pickle.dumps([Harmful(tmp_path / "written")]))
    with pytest.raises(AnnotationError, match=r"is no pickle of plain .*asks for \w+.open"):
        read_refer_coco_official(path, instances, "/v")
    assert not (tmp_path / "written").exists()
    for content in (b"", b"no pickle", pickle.dumps([references()])[:-20]):
        path.write_bytes(content)
        with pytest.raises(AnnotationError, match="is no pickle of plain"):
            read_refer_coco_official(path, instances, "/v")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("v,x,['0'],2,[0],[40]", "length='2', but 1 frames are listed"),
        ("v,x,0,1,[0],[40]", "line 2: frames='0' is no list"),
        ("v,x,['0'],1,[0],[42]", "line 2: anno_id 42 is not in .*mask_dict.json"),
        ("v,x,['0'],1,[0],[40]", "1 frames, but annotation 40 of .* has 2 masks"),
    ],
)
def test_mevis_tables_that_lie_are_refused(write, row, message):
    annotations = write("train_MEVIS.csv", HEAD + row + "\n")
    with pytest.raises(AnnotationError, match=message):
        read_mevis(annotations, "/v", write("mask_dict.json", MASKS))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("v,x,['0'],1,['a'],[1]", r"obj_id=\['a'\] are no numbers"),
        ("v,x,['0'],1,['0'],[1]", r"obj_id=\['0'\]; 0 is the background"),
        ("v,x,['0'],3,['1'],[1]", "length='3', but 1 frames are listed"),
    ],
)
def test_refer_youtube_vos_tables_that_lie_are_refused(write, row, message):
    annotations = write("train_ReferYoutubeVOS.csv", HEAD + row + "\n")
    with pytest.raises(AnnotationError, match=f"line 2: {message}"):
        read_refer_youtube_vos(annotations, "/v", "/m")


def test_every_reader_of_masks_has_a_name():
    names = ("youtube_vis", "coco", "mevis", "mevis_official", "refer_youtube_vos")
    names += ("refer_youtube_vos_official", "refer_coco", "refer_coco_official")
    assert set(names) <= set(READERS)
