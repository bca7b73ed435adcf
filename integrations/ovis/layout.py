"""YouTube-VIS documents: what YouTube-VIS 2019 and 2021, OVIS, LV-VIS and miniworld have in common.

    videos       id, file_names (relative to a folder of frames), height, width
    categories   id, name
    annotations  id, video_id, category_id, iscrowd; segmentations, bboxes, areas: a value per frame
                 of the video, null where the object is not seen

An object counts as seen in a frame only if it has both mask and box there. A COCO document is read
as videos of one frame, for pseudo-videos. Labels are 0, 1, … in the order of category ids, which
have gaps. Nothing here reads pictures: see ``data``.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from backbone.files import read_json
from integrations.ovis.rle import MaskError, decode

logger = logging.getLogger(__name__)

# COCO id -> YouTube-VIS 2019 id, as CTVIS pairs them.
COCO_TO_YTVIS2019 = {
    1: 1, 2: 21, 3: 6, 4: 21, 5: 28, 7: 17, 8: 29, 9: 34, 17: 14, 18: 8, 19: 18, 21: 15, 22: 32,
    23: 20, 24: 30, 25: 22, 35: 33, 36: 33, 41: 5, 42: 27, 43: 40,
}  # fmt: skip

# By data set and split: where the document may lie, and where the frames, below the data root.
RELEASES: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "ytvis2019": {
        split: ((f"{split}.json", f"annotations/{split}.json"), (f"{split}/JPEGImages",))
        for split in ("train", "valid", "test")
    },
    "ytvis2021": {
        split: ((f"{split}/instances.json", f"{split}.json"), (f"{split}/JPEGImages",))
        for split in ("train", "valid", "test")
    },
    "ovis": {
        split: ((f"annotations_{split}.json", f"{split}.json"), (split, f"Images/{split}"))
        for split in ("train", "valid", "test")
    },
    "lvvis": {
        split: ((f"{split}_instances.json", f"annotations/{split}_instances.json"),
                (f"{split}/JPEGImages",))
        for split in ("train", "val", "test")
    },
    "miniworld": {
        split: ((f"{split}.json",), (f"{split}/JPEGImages",)) for split in ("train", "val", "test")
    },
}  # fmt: skip


class LayoutError(ValueError):
    """A document that lacks something or contradicts itself."""


@dataclass(frozen=True)
class Track:
    """One object of a video.

    Attributes:
        annotation: as in the document.
        label: place of its category in ``VideoSet.categories``.
        size: ``(H, W)`` of the video.
    """

    annotation: Mapping[str, Any]
    label: int
    size: tuple[int, int]

    @property
    def id(self) -> int:
        """Of the annotation."""
        return self.annotation["id"]

    @property
    def crowd(self) -> bool:
        """Whether it stands for several objects: evaluated as COCO does, never trained on."""
        return bool(self.annotation.get("iscrowd", 0))

    def present(self) -> np.ndarray:
        """Frames that have both mask and box, ``(T,)`` bool."""
        masks = self.annotation["segmentations"]
        boxes = self.annotation.get("bboxes") or masks
        return np.array(
            [None not in (mask, box) for mask, box in zip(masks, boxes, strict=True)], bool
        )

    def masks(self, frames: Sequence[int] | None = None) -> np.ndarray:
        """Masks ``(t, H, W)`` bool of some frames, None for all; empty where it is absent.

        Raises:
            MaskError: run lengths that do not fill the frame.
        """
        here = self.present()
        chosen = range(len(here)) if frames is None else [int(frame) for frame in frames]
        wanted = {
            frame: decode(
                [self.annotation["segmentations"][frame]], self.size, f"annotation {self.id}", frame
            )[0]
            for frame in set(chosen)
            if here[frame]
        }
        nothing = np.zeros(self.size, bool)
        return np.stack([wanted.get(frame, nothing) for frame in chosen])


@dataclass(frozen=True)
class Video:
    """A video as frames in files, relative to the root of its set."""

    id: int
    files: tuple[str, ...]
    height: int
    width: int
    tracks: tuple[Track, ...] = ()

    @property
    def landscape(self) -> bool:
        """At least as wide as high; clips of both kinds share no batch, which would be padding."""
        return self.width >= self.height


@dataclass(frozen=True)
class VideoSet:
    """Videos of one document.

    Attributes:
        name: for logs and reports.
        root: folder of the frames.
        videos: in the order of the document.
        categories: names by id, ascending; labels count them.
        annotated: False for splits whose annotations a server keeps.
    """

    name: str
    root: Path
    videos: tuple[Video, ...]
    categories: Mapping[int, str]
    annotated: bool = True

    @property
    def category_ids(self) -> tuple[int, ...]:
        """Id of every label."""
        return tuple(self.categories)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of every label."""
        return tuple(self.categories.values())

    def __len__(self) -> int:
        return len(self.videos)

    def document(self) -> dict[str, list]:
        """The YouTube-VIS document of just these videos, to evaluate against.

        Raises:
            LayoutError: the annotations are not public.
        """
        if not self.annotated:
            raise LayoutError(
                f"{self.name} comes without annotations: its numbers are the server's "
                "(submission.write_submission); evaluate on a hold-out of the training videos"
            )
        return {
            "videos": [
                {"id": video.id, "height": video.height, "width": video.width,
                 "length": len(video.files), "file_names": list(video.files)}
                for video in self.videos
            ],
            "categories": [{"id": n, "name": name} for n, name in self.categories.items()],
            "annotations": [track.annotation for v in self.videos for track in v.tracks],
        }  # fmt: skip


def read_ytvis(annotations: str | Path, root: str | Path, name: str | None = None) -> VideoSet:
    """Read a YouTube-VIS document; ``root`` is the folder that its file names are relative to.

    A document without annotations, as servers' splits have, gives videos without tracks.

    Raises:
        LayoutError: a field that is missing, ids that are there twice, unknown videos or
            categories, lists of another length than the video.
        rle.MaskError: masks of another size than their video.
    """
    where = str(annotations)
    document = read_json(annotations)
    check_document(document, where)
    categories = {item["id"]: str(item["name"]) for item in document["categories"]}
    categories = dict(sorted(categories.items()))
    labels = {number: label for label, number in enumerate(categories)}
    sizes = {item["id"]: (item["height"], item["width"]) for item in document["videos"]}
    tracks: dict[int, list[Track]] = defaultdict(list)
    for item in document.get("annotations") or ():
        video = item["video_id"]
        tracks[video].append(Track(item, labels[item["category_id"]], sizes[video]))
    videos = tuple(
        Video(item["id"], tuple(item["file_names"]), *sizes[item["id"]], tuple(tracks[item["id"]]))
        for item in document["videos"]
    )
    annotated = bool(document.get("annotations"))
    return VideoSet(name or Path(annotations).stem, Path(root), videos, categories, annotated)


def read_release(name: str, root: str | Path, split: str) -> VideoSet:
    """Read a split of a data set of :data:`RELEASES` that lies below ``root`` as published.

    Raises:
        LayoutError: no such data set or split, or its files are not there.
    """
    if name not in RELEASES:
        raise LayoutError(
            f"data set {name!r} is not known; there are {', '.join(RELEASES)}, and read_ytvis "
            "reads any document of that layout"
        )
    if split not in RELEASES[name]:
        raise LayoutError(f"{name} has no split {split!r}; it has {', '.join(RELEASES[name])}")
    found = []
    for places in RELEASES[name][split]:
        there = [Path(root) / place for place in places if (Path(root) / place).exists()]
        if not there:
            raise LayoutError(
                f"{name} {split}: below {root} there is no {' or '.join(places)}; unpack the "
                "published archives there, or name document and folder to read_ytvis"
            )
        found.append(there[0])
    return read_ytvis(*found, name=f"{name} {split}")


def read_coco(
    annotations: str | Path,
    root: str | Path,
    categories: Mapping[int, str],
    mapping: Mapping[int, int],
    name: str | None = None,
) -> VideoSet:
    """Read COCO instances as videos of one frame in the categories of a video data set.

    Crowds, other categories and pictures that are left empty are dropped, and counted in the log.

    Args:
        annotations: COCO's document; masks are polygons or run lengths.
        root: folder of the pictures.
        categories: of the video data set, ``VideoSet.categories``.
        mapping: COCO id to its id, such as :data:`COCO_TO_YTVIS2019` or :func:`match_categories`.
        name: for logs.

    Raises:
        LayoutError: a mapping to a category that is not there or from one COCO does not have, or
            nothing is left.
    """
    where = str(annotations)
    document = read_json(annotations)
    _require(document, ("images", "categories", "annotations"), where)
    known = {item["id"] for item in document["categories"]}
    for source, target in mapping.items():
        if source not in known or target not in categories:
            raise LayoutError(
                f"{where}: the mapping {source} -> {target} names a category that "
                f"{'COCO' if source not in known else 'the video data set'} does not have"
            )
    labels = {number: label for label, number in enumerate(categories)}
    images = {item["id"]: item for item in document["images"]}
    tracks: dict[int, list[Track]] = defaultdict(list)
    for item in document["annotations"]:
        _require(item, ("id", "image_id", "category_id", "segmentation", "bbox"), where)
        if item["image_id"] not in images:
            raise LayoutError(f"{where}: annotation {item['id']} is of no image in the document")
        if item.get("iscrowd") or item["category_id"] not in mapping:
            continue
        image = images[item["image_id"]]
        category = mapping[item["category_id"]]
        annotation = {
            "id": item["id"], "video_id": image["id"], "category_id": category, "iscrowd": 0,
            "segmentations": [item["segmentation"]], "bboxes": [item["bbox"]],
            "areas": [item.get("area")],
        }  # fmt: skip
        size = (image["height"], image["width"])
        tracks[image["id"]].append(Track(annotation, labels[category], size))
    videos = tuple(
        Video(n, (image["file_name"],), image["height"], image["width"], tuple(tracks[n]))
        for n, image in images.items()
        if n in tracks
    )
    if not videos:
        raise LayoutError(f"{where}: no picture shows any of the {len(mapping)} mapped categories")
    logger.info("%s: %d of %d pictures have mapped objects", where, len(videos), len(images))
    return VideoSet(name or Path(annotations).stem, Path(root), videos, dict(categories))


def match_categories(source: Mapping[int, str], target: Mapping[int, str]) -> dict[int, int]:
    """Ids of ``source`` to those of ``target`` with the same name, but for case and spaces.

    Raises:
        LayoutError: no name is common to both.
    """

    def plain(name: str) -> str:
        return name.lower().replace("_", " ").replace("-", " ").strip()

    numbers = {plain(name): number for number, name in target.items()}
    found = {n: numbers[plain(name)] for n, name in source.items() if plain(name) in numbers}
    if not found:
        raise LayoutError(
            f"no category is common to {list(source.values())[:5]}… and "
            f"{list(target.values())[:5]}…; give a mapping of ids"
        )
    return found


def hold_out(videos: VideoSet, share: float = 0.1) -> tuple[VideoSet, VideoSet]:
    """Split training videos into those to train on and a fixed share to evaluate on.

    Which ones is decided by digests of the names of their folders: the same on every machine, and
    for a video that two releases share. A video stays in training if it alone shows a category.
    Numbers on a hold-out are not comparable with those of a server.

    Raises:
        LayoutError: the share leaves one side empty.
    """
    count = round(share * len(videos))
    counts = Counter(label for video in videos.videos for label in _labels(video))
    held: set[int] = set()
    for video in sorted(videos.videos, key=_digest):
        if len(held) < count and all(counts[label] > 1 for label in _labels(video)):
            counts.subtract(_labels(video))
            held.add(video.id)
    if not 0 < len(held) < len(videos):
        raise LayoutError(
            f"a share of {share} holds out {len(held)} of the {len(videos)} videos of "
            f"{videos.name}; both sides need some"
        )
    return tuple(
        replace(
            videos,
            name=f"{videos.name}, {name}",
            videos=tuple(v for v in videos.videos if (v.id in held) == inside),
        )
        for name, inside in (("kept", False), ("held out", True))
    )


def check_document(document: Any, where: str) -> None:
    """Compare a YouTube-VIS document with itself; annotations may be missing.

    Raises:
        LayoutError: see :func:`read_ytvis`.
        rle.MaskError: see there.
    """
    _require(document, ("videos", "categories"), where)
    for kind in ("videos", "categories", "annotations"):
        numbers = [_require(item, ("id",), where)["id"] for item in document.get(kind) or ()]
        twice = [number for number, count in Counter(numbers).items() if count > 1]
        if twice:
            raise LayoutError(f"{where}: {kind} has the id {twice[0]} twice")
        if not numbers and kind != "annotations":
            raise LayoutError(f"{where}: {kind} is empty")
    categories = {_require(item, ("name",), where)["id"] for item in document["categories"]}
    videos = {}
    for item in document["videos"]:
        _require(item, ("file_names", "height", "width"), f"{where}: video {item['id']}")
        if not item["file_names"]:
            raise LayoutError(f"{where}: video {item['id']} has no frames; remove it")
        videos[item["id"]] = item
    for item in document.get("annotations") or ():
        place = f"{where}: annotation {item['id']}"
        check_track(item, place, videos, categories)
        video = videos[item["video_id"]]
        size = [video["height"], video["width"]]
        for frame, mask in enumerate(item["segmentations"]):
            if isinstance(mask, Mapping) and list(mask.get("size", ())) != size:
                raise MaskError(
                    f"{place}, frame {frame}: the mask is {mask.get('size')} (height, width), but "
                    f"its video is {size}; write masks at the size of the video"
                )


def check_track(item: Mapping, where: str, videos: Mapping[int, Mapping], categories: Any) -> None:
    """Compare an annotation or prediction with its video, all but the masks themselves.

    Raises:
        LayoutError: a field is missing, video or category unknown, a list of another length.
    """
    _require(item, ("video_id", "category_id", "segmentations"), where)
    if item["video_id"] not in videos:
        raise LayoutError(f"{where} is of video {item['video_id']!r}, which is not in the document")
    if item["category_id"] not in categories:
        known = ", ".join(map(str, list(categories)[:10]))
        raise LayoutError(
            f"{where} is of category {item['category_id']!r}, but there are only {known}"
            f"{', …' if len(categories) > 10 else ''}"
        )
    video = videos[item["video_id"]]
    frames = len(video["file_names"])
    for field in ("segmentations", "bboxes", "areas"):
        values = item.get(field)
        if values is not None and len(values) != frames:
            raise LayoutError(
                f"{where} has {len(values)} {field}, but video {item['video_id']} has {frames} "
                "frames; give null where the object is absent"
            )


def _require(item: Any, fields: Sequence[str], where: str) -> Any:
    if not isinstance(item, Mapping):
        raise LayoutError(f"{where}: {str(item)[:60]!r} is not an object with {fields}")
    for field in fields:
        if field not in item:
            raise LayoutError(f"{where} lacks {field!r}; it has {', '.join(map(str, item))}")
    return item


def _labels(video: Video) -> set[int]:
    return {track.label for track in video.tracks}


def _digest(video: Video) -> str:
    file = PurePosixPath(video.files[0])
    name = file.parent.name or file.name
    return hashlib.sha256(name.encode()).hexdigest()
