"""Small MeViS, Refer-YouTube-VOS and RefCOCO: expressions, and masks of what they mean."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from experiments.miniworld.lists import REFERRING
from experiments.miniworld.releases.instances import STEP, compressed, picture, polygons
from experiments.miniworld.releases.source import (
    JPEG_QUALITY,
    SPLITS,
    Source,
    Video,
    place,
    place_images,
)
from experiments.miniworld.scene import SHAPES
from experiments.miniworld.writers import write_csv, write_json, write_still

# Colours of the objects in a PNG of masks; number 0 is nothing.
PALETTE = (0, 0, 0, 236, 95, 103, 249, 145, 87, 250, 200, 99, 153, 199, 148)


def write_referring(source: Source, home: Path) -> dict[str, dict]:
    """The three data sets."""
    return {
        **write_mevis(source, home / "MEVIS"),
        **write_refer_youtube_vos(source, home / "ReferYoutubeVOS"),
        **write_refer_coco(source, home / "ReferCOCOPseudo"),
    }


def _task(reader: str, arguments: dict[str, dict]) -> dict:
    common = {
        "objective": "referring_segmentation",
        "sampling": "padded_blocks",
        "augmentation": "crop",
    }
    return {**common, "reader": reader, **arguments}


def write_mevis(source: Source, home: Path) -> dict[str, dict]:
    """Published: <split>/meta_expressions.json, mask_dict.json, JPEGImages/<video>/<frame>.jpg.

    Released: <split>_MEVIS.csv, masks/<annotation>.json, videos/<video>.mp4.
    """
    (home / "masks").mkdir(parents=True)
    released, public = {}, {}
    annotation_id = 40
    for split in SPLITS:
        here, rows, meta, masks = home / split, [], {}, {}
        for video in source.clips[split]:
            # MeViS names its videos by twelve digits of a hash.
            name = video.youtube_id.encode().hex()[:12]
            place(video, home / "videos" / f"{name}.mp4")
            frames = place_images(video, here / "JPEGImages" / name)
            ids = {}
            for number, annotation in enumerate(video.annotations):
                annotation_id += 1
                ids[number] = annotation_id
                packed = [compressed(rle) for rle in annotation["segmentations"]]
                masks[str(annotation_id)] = packed
                write_json(home / f"masks/{annotation_id}.json", packed)
            expressions = {}
            for number, expression in enumerate(video.record["expressions"]):
                objects = expression["objects"]
                meant = [ids[thing] for thing in objects]
                expressions[str(number)] = {
                    "exp": expression["text"], "obj_id": objects, "anno_id": meant
                }  # fmt: skip
                rows.append((name, expression["text"], str(frames), len(frames),
                             str(objects), str(meant)))  # fmt: skip
            meta[name] = {"expressions": expressions, "vid_id": len(meta), "frames": frames}
        write_csv(home / f"{split}_MEVIS.csv", rows, header=REFERRING)
        write_json(here / "meta_expressions.json", {"videos": meta})
        write_json(here / "mask_dict.json", masks)
        released[split] = {
            "annotations": str(home / f"{split}_MEVIS.csv"),
            "root": str(home / "videos"),
            "masks": str(home / "masks"),
        }
        public[split] = {
            "annotations": str(here / "meta_expressions.json"),
            "root": str(here / "JPEGImages"),
            "masks": str(here / "mask_dict.json"),
        }
    return {
        "released/mevis": _task("mevis", released),
        "public/mevis": _task("mevis_official", public),
    }


def write_refer_youtube_vos(source: Source, home: Path) -> dict[str, dict]:
    """Pictures and PNGs of masks as <split>/{JPEGImages,Annotations}/<video>/<frame>.{jpg,png}.

    Published: meta_expressions/<split>/meta_expressions.json, one object per expression, by its
    number in the PNGs. Released: <split>_ReferYoutubeVOS.csv.
    """
    home.mkdir(parents=True)
    released, public = {}, {}
    for split in SPLITS:
        rows, meta = [], {}
        images, masks = (home / split / part for part in ("JPEGImages", "Annotations"))
        for video in source.clips[split]:
            name = video.youtube_id.encode().hex()[:10]
            frames = place_images(video, images / name, STEP)
            _write_palette(video, masks / name, frames)
            expressions = {}
            for expression in video.record["expressions"]:
                if len(expression["objects"]) > 1:
                    continue
                thing = str(expression["objects"][0] + 1)
                expressions[str(len(expressions))] = {"exp": expression["text"], "obj_id": thing}
                rows.append((name, expression["text"], str(frames), len(frames),
                             str([thing]), str([thing])))  # fmt: skip
            meta[name] = {"expressions": expressions, "frames": frames}
        write_csv(home / f"{split}_ReferYoutubeVOS.csv", rows, header=REFERRING)
        path = home / f"meta_expressions/{split}/meta_expressions.json"
        path.parent.mkdir(parents=True)
        write_json(path, {"videos": meta})
        places = {"root": str(images), "masks": str(masks)}
        released[split] = {"annotations": str(home / f"{split}_ReferYoutubeVOS.csv"), **places}
        public[split] = {"annotations": str(path), **places}
    return {
        "released/refer_youtube_vos": _task("refer_youtube_vos", released),
        "public/refer_youtube_vos": _task("refer_youtube_vos_official", public),
    }


def _write_palette(video: Video, folder: Path, stems: list[str]) -> None:
    """One PNG per frame, pixels the number of the object there from 1, 0 for none."""
    folder.mkdir(parents=True)
    size = (video.annotations[0]["height"], video.annotations[0]["width"])
    for frame, stem in enumerate(stems):
        numbers = np.zeros(size, np.uint8)
        for number, annotation in enumerate(video.annotations, start=1):
            rle = annotation["segmentations"][frame]
            if rle is not None:
                numbers[coco.decode(coco.frPyObjects(dict(rle), *size)) > 0] = number
        image = Image.fromarray(numbers, mode="P")
        image.putpalette(PALETTE)
        image.save(folder / f"{stem}.png")


def write_refer_coco(source: Source, home: Path) -> dict[str, dict]:
    """Published: refs(unc).p, a pickle of who is meant, and COCO's instances.json.

    Released: <split>_ReferCOCOPseudo.json, where image i goes with annotation i and comes once per
    expression. All images are COCO's of 2014, train2014/COCO_train2014_<number>.jpg in their
    file_name and <number>.jpg on disk, as since 2017.
    """
    root = home / "train2014"
    root.mkdir(parents=True)
    released, references, images, things = {}, [], [], []
    for split in SPLITS:
        shown, meant = [], []
        for video in source.clips[split]:
            frame, still = picture(video)
            file = f"{9 + 16 * len(images):012d}.jpg"
            write_still(root / file, still, JPEG_QUALITY)
            image = {
                "id": 9 + 16 * len(images), "file_name": f"COCO_train2014_{file}",
                "height": still.shape[0], "width": still.shape[1],
            }  # fmt: skip
            images.append(image)
            for number, annotation in enumerate(video.annotations):
                texts = _said_of(video, number)
                if annotation["segmentations"][frame] is None or not texts:
                    continue
                thing = {
                    "id": 5000 + 3 * len(things), "image_id": image["id"], "iscrowd": 0,
                    "category_id": annotation["category_id"],
                    "segmentation": polygons(annotation["segmentations"][frame]),
                    "bbox": annotation["bboxes"][frame], "area": annotation["areas"][frame],
                }  # fmt: skip
                things.append(thing)
                references.append({
                    "ref_id": len(references), "ann_id": thing["id"], "image_id": image["id"],
                    "category_id": thing["category_id"], "split": split,
                    "file_name": f"{image['file_name'].removesuffix('.jpg')}_{number}.jpg",
                    "sentences": [
                        {"sent_id": 10 * len(references) + i, "sent": text, "raw": text,
                         "tokens": text.split()}
                        for i, text in enumerate(texts)
                    ],
                })  # fmt: skip
                for text in texts:
                    place = {"id": len(shown), "image_id": len(shown)}
                    shown.append({**image, "id": len(shown), "caption": text})
                    meant.append({**thing, **place})
        path = home / f"{split}_ReferCOCOPseudo.json"
        write_json(path, {"images": shown, "annotations": meant, "categories": []})
        released[split] = {"annotations": str(path), "root": str(root)}
    categories = [{"id": number, "name": shape} for number, shape in enumerate(SHAPES, start=1)]
    write_json(
        home / "instances.json",
        {"images": images, "annotations": things, "categories": categories},
    )
    (home / "refs(unc).p").write_bytes(pickle.dumps(references, protocol=2))
    public = {
        split: {
            "annotations": str(home / "refs(unc).p"),
            "instances": str(home / "instances.json"),
            "root": str(root),
            "split": split,
            "pattern": "{file}",
        }
        for split in SPLITS
    }
    return {
        "released/refer_coco": _task("refer_coco", released),
        "public/refer_coco": _task("refer_coco_official", public),
    }


def _said_of(video: Video, number: int) -> list[str]:
    """Expressions that mean one object alone, without those by motion, which no still shows."""
    return [
        expression["text"]
        for expression in video.record["expressions"]
        if expression["objects"] == [number] and " that " not in expression["text"]
    ]
