"""Small YouTube-VIS 2019, LV-VIS and COCO: pictures with masks of all things in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from pycocotools import mask as coco

from experiments.miniworld.releases.source import (
    JPEG_QUALITY,
    SPLITS,
    Source,
    Video,
    place_images,
)
from experiments.miniworld.scene import COLOURS, SHAPES
from experiments.miniworld.writers import write_json, write_still

STEP = 5  # between the numbers of neighbouring pictures, as YouTube-VIS takes every fifth

# LV-VIS, with more than a hundred classes: every look at every size.
LOOKS = [
    *(f"{size}{colour} {shape}"
      for shape in SHAPES for colour in COLOURS for size in ("", "small ", "large ")),
    *(f"hidden {shape}" for shape in SHAPES),
]  # fmt: skip
# COCO's numbers have gaps.
SPARSE = {shape: 2 * number + (number > 3) for number, shape in enumerate(SHAPES, start=1)}

_COMMON = {
    "objective": "instance_segmentation",
    "sampling": "padded_blocks",
    "augmentation": "crop",
    "templates": "plain",
}


def write_instances(source: Source, home: Path) -> dict[str, dict]:
    """The three data sets; the released layout is their own, with a label2id.json beside."""
    return {
        "released/youtube_vis": _write_videos(source, home, "YoutubeVIS", _shape, list(SHAPES)),
        "released/lv_vis": _write_videos(source, home, "LVVIS", _look, LOOKS, compressed),
        "released/coco": write_coco(source, home / "COCOPseudoVIS"),
    }


def _shape(thing: Mapping) -> str:
    return thing["shape"]


def _look(thing: Mapping) -> str:
    return thing["name"]


def compressed(rle: Mapping | None) -> dict | None:
    """COCO's run lengths as text."""
    if rle is None:
        return None
    packed = coco.frPyObjects(dict(rle), *rle["size"])
    return {"size": list(packed["size"]), "counts": packed["counts"].decode("ascii")}


def _write_videos(
    source: Source,
    home: Path,
    name: str,
    category: Callable[[Mapping], str],
    names: list[str],
    packing: Callable[[Mapping | None], Mapping | None] = lambda rle: rle,
) -> dict:
    """{train,val}_<name>.json in YouTube-VIS layout, JPEGImages/<video>/<number>.jpg."""
    home = home / name
    numbers = {label: number for number, label in enumerate(names, start=1)}
    categories = [
        {"id": number, "name": label, "supercategory": "object"}
        for label, number in numbers.items()
    ]
    (home / "JPEGImages").mkdir(parents=True)
    label2id = home / "label2id.json"
    write_json(label2id, {name: numbers})
    arguments = {}
    for split in SPLITS:
        videos, annotations = [], []
        for video in source.clips[split]:
            # Numbers of videos start at 2 and have gaps: they are no places in the list.
            number = 2 + 3 * len(videos)
            folder = video.youtube_id
            stems = place_images(video, home / "JPEGImages" / folder, STEP)
            size = {name: video.annotations[0][name] for name in ("height", "width")}
            videos.append({
                "id": number, **size, "length": len(stems),
                "file_names": [f"{folder}/{stem}.jpg" for stem in stems],
            })  # fmt: skip
            things = zip(video.annotations, video.record["objects"], strict=True)
            for annotation, thing in things:
                annotations.append({
                    "id": len(annotations) + 1, "video_id": number, **size, "length": 1,
                    "category_id": numbers[category(thing)], "iscrowd": 0,
                    "segmentations": [packing(rle) for rle in annotation["segmentations"]],
                    "bboxes": annotation["bboxes"], "areas": annotation["areas"],
                })  # fmt: skip
        path = home / f"{split}_{name}.json"
        content = {"videos": videos, "categories": categories, "annotations": annotations}
        write_json(path, content)
        arguments[split] = {
            "annotations": str(path),
            "root": str(home / "JPEGImages"),
            "labels": str(label2id),
            "name": name,
        }
    return {**_COMMON, "reader": "youtube_vis", **arguments}


def picture(video: Video) -> tuple[int, np.ndarray]:
    """The picture of a clip that serves as a still: its number and ``(H, W, 3)`` uint8."""
    number = video.record["frames"] // 2
    return number, video.frames()[number]


def polygons(rle: Mapping) -> list[list[float]]:
    """A mask as COCO draws most: polygons (x, y, x, y, …). One for each run down a column."""
    mask = coco.decode(coco.frPyObjects(dict(rle), *rle["size"]))
    padded = np.pad(mask.astype(np.int8), ((1, 1), (0, 0)))
    column, top = np.nonzero(np.diff(padded, axis=0).T == 1)
    _, bottom = np.nonzero(np.diff(padded, axis=0).T == -1)
    return [
        [float(v) for v in (x, y0, x, y1, x + 1, y1, x + 1, y0)]
        for x, y0, y1 in zip(column, top, bottom, strict=True)
    ]


def write_coco(source: Source, home: Path) -> dict:
    """{train,val}_COCOPseudoVIS.json, COCO instances; train2017/ and val2017/<number>.jpg.

    Masks are polygons; what is hidden counts as a crowd, with run lengths, as COCO marks what
    nobody could outline.
    """
    home.mkdir(parents=True)
    label2id = home / "label2id.json"
    write_json(label2id, {home.name: SPARSE})
    categories = [
        {"id": number, "name": shape, "supercategory": "shape"} for shape, number in SPARSE.items()
    ]
    arguments, annotation_id = {}, 100
    for split in SPLITS:
        root = home / f"{split}2017"
        root.mkdir()
        images, annotations = [], []
        for number, video in enumerate(source.clips[split]):
            image_id = 9 + 16 * number
            frame, image = picture(video)
            write_still(root / f"{image_id:012d}.jpg", image, JPEG_QUALITY)
            images.append({"id": image_id, "file_name": f"{image_id:012d}.jpg",
                           "height": image.shape[0], "width": image.shape[1]})  # fmt: skip
            things = zip(video.annotations, video.record["objects"], strict=True)
            for annotation, thing in things:
                rle = annotation["segmentations"][frame]
                if rle is None:
                    continue
                annotation_id += 1
                crowd = thing["camouflaged"]
                annotations.append({
                    "id": annotation_id, "image_id": image_id, "iscrowd": int(crowd),
                    "category_id": SPARSE[thing["shape"]],
                    "segmentation": rle if crowd else polygons(rle),
                    "bbox": annotation["bboxes"][frame], "area": annotation["areas"][frame],
                })  # fmt: skip
        path = home / f"{split}_COCOPseudoVIS.json"
        write_json(path, {"images": images, "annotations": annotations, "categories": categories})
        arguments[split] = {
            "annotations": str(path),
            "root": str(root),
            "labels": str(label2id),
            "name": home.name,
        }
    return {**_COMMON, "reader": "coco", **arguments}
