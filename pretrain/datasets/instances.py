"""Things and their masks: YouTube-VIS 2019, LV-VIS, COCO, and whatever is written like them.

    youtube_vis  {"videos": [{"id", "file_names", "height", "width"}], "categories": [{"id",
                 "name"}], "annotations": [{"video_id", "category_id", "segmentations": run lengths
                 or null for each frame}]}; LV-VIS packs its run lengths into text
    coco         {"images": [{"id", "file_name", "height", "width"}], "categories", "annotations":
                 [{"image_id", "category_id", "iscrowd", "segmentation": polygons or run lengths}]}

The released pretraining reads the same files and numbers the labels by a label2id.json,
``{data set: {label: id}}``; without one the labels are those of ``categories``. Either way every
category is matched with its label when the file is read, whatever the ids: numbers in masks are
places in the label set, and none is kept free for the background.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pretrain.datasets.base import Annotations, Entry
from pretrain.datasets.masks import IGNORE, RleMasks
from pretrain.datasets.tables import (
    SUFFIXES,
    AnnotationError,
    fields,
    file_of,
    listed,
    mapping,
    read_json,
    report_left_out,
)


def read_youtube_vis(
    annotations: str | Path,
    root: str | Path,
    labels: str | Path | None = None,
    name: str | None = None,
    pattern: str = "{id}",
) -> Annotations:
    """Read videos with masks of all things, as YouTube-VIS writes them.

    annotations: the JSON file. root: folder of the videos, named by ``pattern`` after {id}, the
    folder of its ``file_names``: "{id}" for folders of images, of which those listed are read;
    "{id}.mp4" for videos, one frame for each name. labels: JSON ``{data set: {label: id}}`` or
    ``{label: id}``; None for the names in ``categories``. name: of the data set; None takes it from
    the file, what follows the first "_" as released. Videos without annotations are left out and
    reported.
    """
    name = name or dataset_name(annotations)
    content = read_json(annotations)
    videos, things = fields(content, ("videos", "annotations"), str(annotations))
    label_set, numbers = number_categories(content, labels, name, str(annotations))
    found: dict[Any, list[tuple[int, Sequence]]] = {}
    for where, thing in _items(things, "annotations", annotations):
        video, category, masks = fields(thing, ("video_id", "category_id", "segmentations"), where)
        number = numbers(category, where)
        found.setdefault(video, []).append((number, listed(masks, where, "segmentations")))
    entries, left_out = [], []
    for where, video in _items(videos, "videos", annotations):
        key, files = fields(video, ("id", "file_names"), where)
        masks, size = found.pop(key, []), size_of(video, where)
        if not masks:
            left_out.append(f"video {key} has no annotations")
            continue
        for _, segmentations in masks:
            if len(segmentations) != len(files):
                raise AnnotationError(
                    f"{where}: {len(files)} file_names, but an annotation with "
                    f"{len(segmentations)} segmentations; there must be one for each, or null"
                )
        folder = folder_of(files, where)
        path = file_of(root, pattern, id=folder)
        is_file = path.suffix.lower() in SUFFIXES
        names = () if is_file else tuple(PurePosixPath(file).name for file in files)
        source = RleMasks(where, size, tuple(masks))
        entries.append(Entry(path, label_set=name, masks=source, files=names))
    _check_all_used(found, "video_id", "videos", annotations)
    report_left_out(annotations, left_out)
    return Annotations(entries, {name: label_set}, tuple(left_out))


def read_coco(
    annotations: str | Path,
    root: str | Path,
    labels: str | Path | None = None,
    name: str | None = None,
) -> Annotations:
    """Read images with masks of all things, as COCO writes them; each is a video of one frame.

    annotations: the JSON file. root: folder of the images. labels, name: as for `read_youtube_vis`.
    What is marked as a crowd is neither a thing nor background. Images without annotations are
    left out and reported.
    """
    name = name or dataset_name(annotations)
    content = read_json(annotations)
    images, things = fields(content, ("images", "annotations"), str(annotations))
    label_set, numbers = number_categories(content, labels, name, str(annotations))
    found: dict[Any, list[tuple[int, Sequence]]] = {}
    for where, thing in _items(things, "annotations", annotations):
        image, category, mask = fields(thing, ("image_id", "category_id", "segmentation"), where)
        number = numbers(category, where)
        if thing.get("iscrowd"):  # behind all things, so that these are seen
            found.setdefault(image, []).insert(0, (IGNORE, [mask]))
        else:
            found.setdefault(image, []).append((number, [mask]))
    entries, left_out = [], []
    for where, image in _items(images, "images", annotations):
        key, file = fields(image, ("id", "file_name"), where)
        masks, size = found.pop(key, []), size_of(image, where)
        if not masks:
            left_out.append(f"image {key} has no annotations")
            continue
        source = RleMasks(where, size, tuple(masks))
        entries.append(Entry(Path(root) / file, label_set=name, masks=source))
    _check_all_used(found, "image_id", "images", annotations)
    report_left_out(annotations, left_out)
    return Annotations(entries, {name: label_set}, tuple(left_out))


def dataset_name(annotations: str | Path) -> str:
    """What the released code calls a data set: ``train_YoutubeVIS.json`` is YoutubeVIS."""
    stem = Path(annotations).name.split(".")[0]
    return stem.split("_", 1)[-1]


def number_categories(
    content: Mapping, labels: str | Path | None, name: str, where: str
) -> tuple[tuple[str, ...], Callable[[Any, str], int]]:
    """Labels of a set in order, and a function from a category's id and place to its number.

    With a label2id, a category belongs to the label of its name, whatever its id; a file without
    ``categories`` goes by the ids, of which 0 is the background then, and may have an entry of its
    own that is no label. Raises AnnotationError for a category without label, and for an annotation
    without category.
    """
    categories = content.get("categories") or []
    names: dict[Any, str] = {}
    for i, category in enumerate(listed(categories, where, "categories")):
        key, label = fields(category, ("id", "name"), f"{where}, category {i}")
        if names.setdefault(key, str(label)) != str(label):
            raise AnnotationError(f"{where}: two categories have the id {key}")
    if labels is None:
        if not names:
            raise AnnotationError(f"{where}: has no categories; give a label2id as labels=")
        label_set = tuple(label.replace("_", " ") for label in names.values())
        table = {key: number for number, key in enumerate(names)}
    else:
        ids = _label_ids(labels, name)
        ordered = sorted(ids, key=ids.__getitem__)
        if names:
            places = {_plain(label): label for label in ordered}
            for key, label in names.items():
                if _plain(label) not in places:
                    raise AnnotationError(
                        f"{where}: category {key} is {label!r}, which is not among the "
                        f"{len(ids)} labels of {labels}"
                    )
            used = {places[_plain(label)] for label in names.values()}
            label_set = tuple(label for label in ordered if label in used or ids[label] != 0)
            table = {key: label_set.index(places[_plain(label)]) for key, label in names.items()}
        else:
            label_set = tuple(label for label in ordered if ids[label] != 0)
            table = {ids[label]: number for number, label in enumerate(label_set)}

    def number_of(category: Any, place: str) -> int:
        if category not in table:
            raise AnnotationError(
                f"{place}: category_id={category!r} is not among the {len(table)} categories"
                + ("" if names else f" of {labels}, in which 0 is the background")
            )
        return table[category]

    return label_set, number_of


def _label_ids(labels: str | Path, name: str) -> dict[str, int]:
    """``{label: id}`` of a data set, ids all different."""
    content = mapping(read_json(labels), str(labels), "content")
    if content and all(isinstance(value, Mapping) for value in content.values()):
        if name not in content:
            raise AnnotationError(
                f"{labels}: no labels of data set {name!r}; there are those of "
                f"{', '.join(map(repr, content))}. Give one of these as name="
            )
        content = content[name]
    if not content or not all(type(value) is int for value in content.values()):
        raise AnnotationError(f"{labels}: expected {{label: id}} for {name!r}, ids whole numbers")
    if len(set(content.values())) < len(content):
        raise AnnotationError(f"{labels}: two labels of {name!r} have the same id")
    return dict(content)


def _plain(label: str) -> str:
    return label.replace("_", " ").strip().lower()


def size_of(item: Mapping, where: str) -> tuple[int, int]:
    """(H, W) of a video or an image."""
    size = fields(item, ("height", "width"), where)
    if not all(type(side) is int and side > 0 for side in size):
        raise AnnotationError(f"{where}: height={size[0]!r}, width={size[1]!r} are no pixels")
    return size


def folder_of(files: Any, where: str) -> str:
    """The folder that holds all frames of a video, as its file names say."""
    names = listed(files, where, "file_names")
    folders = {str(PurePosixPath(str(file)).parent) for file in names}
    if len(folders) != 1:
        raise AnnotationError(
            f"{where}: file_names must lie in one folder; found {sorted(folders)[:3]}"
        )
    return folders.pop()


def _items(values: Any, field: str, path: str | Path) -> Iterator[tuple[str, Any]]:
    """The items of a list of the file, each behind what messages call it."""
    for place, item in enumerate(listed(values, str(path), field)):
        key = item.get("id") if isinstance(item, Mapping) else None
        name = f"at place {place}" if key is None else key
        yield f"{path}, {field.removesuffix('s')} {name}", item


def _check_all_used(found: Mapping, field: str, items: str, path: str | Path) -> None:
    if found:
        key = next(iter(found))
        raise AnnotationError(
            f"{path}: annotations of {field}={key!r}, which is not among its {items} "
            f"({len(found)} such)"
        )
