"""Expressions and masks of what they mean: MeViS, Refer-YouTube-VOS, RefCOCO.

As the released pretraining reads them:

    mevis               CSV with video_id, text, frames, length, obj_id, anno_id (frames and ids are
                        lists); <anno_id>.json: run lengths or null for each frame
    refer_youtube_vos   the same table; Annotations/<video>/<frame>.png, pixels number the objects
    refer_coco          {"images": [{"file_name", "caption", "height", "width"}], "annotations":
                        [{"segmentation"}]}; image i goes with annotation i

As they are published:

    mevis_official               meta_expressions.json {"videos": {video: {"frames": […],
                                 "expressions": {number: {"exp", "obj_id": […], "anno_id": […]}}}}},
                                 mask_dict.json {anno_id: run lengths or null for each frame}
    refer_youtube_vos_official   meta_expressions.json, an expression with one "obj_id" as text
    refer_coco_official          refs(….).p, a pickled list of {"ann_id", "split", "sentences":
                                 [{"sent"}]}, and COCO's instances.json

Every expression of a video is an entry; its masks are 0 where what it means is, be it one thing or
several.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pretrain.datasets.base import Annotations, Entry
from pretrain.datasets.instances import size_of
from pretrain.datasets.masks import MaskSource, PaletteMasks, RleFiles, RleMasks
from pretrain.datasets.tables import (
    SUFFIXES,
    AnnotationError,
    check_split,
    fields,
    file_of,
    listed,
    mapping,
    parse_list,
    read_json,
    read_rows,
    report_left_out,
)

COLUMNS = ("video_id", "text", "frames", "length", "obj_id", "anno_id")


def read_mevis(
    annotations: str | Path,
    root: str | Path,
    masks: str | Path,
    pattern: str = "{id}.mp4",
) -> Annotations:
    """Read a table of expressions as released for MeViS.

    annotations: the CSV file. root: folder of the videos, named by ``pattern`` after {id}: a file
    with one frame for each of ``frames``, or, without suffix, a folder of images named after them.
    masks: folder of ``<anno_id>.json``, or one file with all of them by anno_id.
    """
    source = _mevis_masks(masks)
    entries, left_out = [], []
    for line, row in read_rows(annotations, COLUMNS):
        where = f"{annotations}, line {line}"
        frames = parse_list(row["frames"], annotations, line, "frames")
        ids = parse_list(row["anno_id"], annotations, line, "anno_id")
        _check_length(row["length"], frames, where)
        video = row["video_id"]
        entry = _entry(file_of(root, pattern, id=video), row["text"], frames)
        _keep(entry, source(ids, len(frames), where), f"line {line}: {video}", entries, left_out)
    report_left_out(annotations, left_out)
    return Annotations(entries, {}, tuple(left_out))


def read_mevis_official(
    annotations: str | Path, root: str | Path, masks: str | Path, pattern: str = "{id}"
) -> Annotations:
    """Read MeViS as published.

    annotations: ``meta_expressions.json``. root: ``JPEGImages``, whose folders are named by
    ``pattern`` after {id}. masks: ``mask_dict.json``; a folder of ``<anno_id>.json`` spares the
    memory that the file of the training split takes.
    """
    source = _mevis_masks(masks)
    entries, left_out = [], []
    for video, frames, number, expression in _expressions(annotations):
        where = f"{annotations}, video {video}, expression {number}"
        text, ids = fields(expression, ("exp", "anno_id"), where)
        found = source(listed(ids, where, "anno_id"), len(frames), where)
        entry = _entry(file_of(root, pattern, id=video), text, frames)
        _keep(entry, found, f"video {video}, expression {number}", entries, left_out)
    report_left_out(annotations, left_out)
    return Annotations(entries, {}, tuple(left_out))


def read_refer_youtube_vos(
    annotations: str | Path, root: str | Path, masks: str | Path, pattern: str = "{id}"
) -> Annotations:
    """Read a table of expressions as released for Refer-YouTube-VOS.

    annotations: the CSV file. root: ``JPEGImages``, whose folders are named by ``pattern`` after
    {id}. masks: ``Annotations``, with a folder of PNGs for each video.
    """
    entries, left_out = [], []
    for line, row in read_rows(annotations, COLUMNS):
        where, video = f"{annotations}, line {line}", row["video_id"]
        frames = parse_list(row["frames"], annotations, line, "frames")
        ids = parse_list(row["obj_id"], annotations, line, "obj_id")
        _check_length(row["length"], frames, where)
        entry = _entry(file_of(root, pattern, id=video), row["text"], frames)
        found = _palette(masks, video, frames, ids, where)
        _keep(entry, found, f"line {line}: {video}", entries, left_out)
    report_left_out(annotations, left_out)
    return Annotations(entries, {}, tuple(left_out))


def read_refer_youtube_vos_official(
    annotations: str | Path, root: str | Path, masks: str | Path, pattern: str = "{id}"
) -> Annotations:
    """Read Refer-YouTube-VOS as published: ``meta_expressions.json``; the rest as released.

    The validation and test splits have expressions without objects, and no masks.
    """
    entries, left_out = [], []
    for video, frames, number, expression in _expressions(annotations):
        where = f"{annotations}, video {video}, expression {number}"
        text, thing = fields(expression, ("exp", "obj_id"), where)
        entry = _entry(file_of(root, pattern, id=video), text, frames)
        found = _palette(masks, video, frames, [thing], where)
        _keep(entry, found, f"video {video}, expression {number}", entries, left_out)
    report_left_out(annotations, left_out)
    return Annotations(entries, {}, tuple(left_out))


def read_refer_coco(annotations: str | Path, root: str | Path) -> Annotations:
    """Read RefCOCO as released: one image and one annotation for every expression.

    annotations: the JSON file. root: folder of the images, named by what follows the last "_" of
    ``file_name``, as COCO names them since 2017.
    """
    images, things = fields(read_json(annotations), ("images", "annotations"), str(annotations))
    if len(images) != len(things):
        raise AnnotationError(
            f"{annotations}: {len(images)} images and {len(things)} annotations; there must be one "
            "for each, in the same order"
        )
    entries, left_out = [], []
    for i, (image, thing) in enumerate(zip(images, things, strict=True)):
        where = f"{annotations}, image {i}"
        file, text = fields(image, ("file_name", "caption"), where)
        (mask,) = fields(thing, ("segmentation",), f"{annotations}, annotation {i}")
        source = RleMasks(where, size_of(image, where), ((0, [mask]),))
        entry = _entry(Path(root) / str(file).rsplit("_", 1)[-1], text, ())
        _keep(entry, source, f"image {i}", entries, left_out)
    report_left_out(annotations, left_out)
    return Annotations(entries, {}, tuple(left_out))


def read_refer_coco_official(
    annotations: str | Path,
    instances: str | Path,
    root: str | Path,
    split: str | None = None,
    pattern: str = "{id}",
) -> Annotations:
    """Read RefCOCO, RefCOCO+ or RefCOCOg as published: every sentence is an expression.

    annotations: the pickle, such as ``refs(unc).p``, of which only plain values are read; nothing
    in it is run. instances: ``instances.json`` beside it. root: folder of the images, named by
    ``pattern`` after {id}, the name in 2014, and {file}, what follows its last "_". split: such as
    train or val; None for all.
    """
    references = listed(read_plain_pickle(annotations), str(annotations), "content")
    images, things = fields(read_json(instances), ("images", "annotations"), str(instances))
    sizes = {image["id"]: image for image in listed(images, str(instances), "images")}
    by_id = {thing["id"]: thing for thing in listed(things, str(instances), "annotations")}
    wanted = ("ann_id", "split", "sentences")
    places = [f"{annotations}, reference {i}" for i in range(len(references))]
    values = [fields(item, wanted, where) for item, where in zip(references, places, strict=True)]
    check_split((part for _, part, _ in values), split, annotations)
    entries, left_out = [], []
    for (thing, part, sentences), where in zip(values, places, strict=True):
        if split not in (None, part):
            continue
        if thing not in by_id or by_id[thing].get("image_id") not in sizes:
            raise AnnotationError(f"{where}: ann_id={thing!r} has no annotation in {instances}")
        mask, image = by_id[thing].get("segmentation"), sizes[by_id[thing]["image_id"]]
        (file,) = fields(image, ("file_name",), f"{instances}, image {image['id']}")
        path = file_of(root, pattern, id=file, file=str(file).rsplit("_", 1)[-1])
        source = RleMasks(where, size_of(image, str(instances)), ((0, [mask]),))
        for sentence in listed(sentences, where, "sentences"):
            (text,) = fields(sentence, ("sent",), where)
            _keep(_entry(path, text, ()), source, where, entries, left_out)
    report_left_out(annotations, left_out)
    return Annotations(entries, {}, tuple(left_out))


class _PlainUnpickler(pickle.Unpickler):
    """Lists, dicts, texts and numbers; whatever asks for a class or a function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_plain_pickle(path: str | Path) -> Any:
    """The plain values of a pickle. Raises AnnotationError for anything that could run code."""
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file, encoding="latin1").load()  # written by Python 2
    except (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError) as error:
        raise AnnotationError(
            f"{path}: is no pickle of plain lists, dicts, texts and numbers ({error})"
        ) from error


def _expressions(path: str | Path) -> Iterator[tuple[str, list, str, Any]]:
    """Video, frames, number and content of every expression of a ``meta_expressions.json``."""
    (videos,) = fields(read_json(path), ("videos",), str(path))
    for video, item in mapping(videos, str(path), "videos").items():
        where = f"{path}, video {video}"
        frames, expressions = fields(item, ("frames", "expressions"), where)
        frames = listed(frames, where, "frames")
        for number, expression in mapping(expressions, where, "expressions").items():
            yield video, frames, number, expression


def _mevis_masks(masks: str | Path) -> Callable[[Sequence, int, str], MaskSource | None]:
    """A function from the ids of annotations to their masks, out of a folder or of one file."""
    masks = Path(masks)
    if masks.is_dir():

        def from_folder(ids: Sequence, length: int, where: str) -> MaskSource | None:
            files = tuple(masks / f"{number}.json" for number in ids)
            return RleFiles(files, length) if files else None

        return from_folder
    content = mapping(read_json(masks), str(masks), "content")

    def from_file(ids: Sequence, length: int, where: str) -> MaskSource | None:
        things = []
        for number in ids:
            if str(number) not in content:
                raise AnnotationError(f"{where}: anno_id {number!r} is not in {masks}")
            found = listed(content[str(number)], f"{masks}, annotation {number}", "masks")
            if len(found) != length:
                raise AnnotationError(
                    f"{where}: {length} frames, but annotation {number} of {masks} has "
                    f"{len(found)} masks"
                )
            things.append((0, found))
        return RleMasks(where, None, tuple(things)) if things else None

    return from_file


def _palette(
    masks: str | Path, video: str, frames: Sequence, ids: Sequence, where: str
) -> PaletteMasks | None:
    try:
        objects = tuple(int(number) for number in ids)
    except (TypeError, ValueError) as error:
        raise AnnotationError(f"{where}: obj_id={ids!r} are no numbers") from error
    if 0 in objects:
        raise AnnotationError(f"{where}: obj_id={ids!r}; 0 is the background")
    folder = Path(masks) / video
    return PaletteMasks(folder, tuple(map(str, frames)), objects) if objects else None


def _check_length(length: str, frames: Sequence, where: str) -> None:
    if str(len(frames)) != length.strip():
        raise AnnotationError(f"{where}: length={length!r}, but {len(frames)} frames are listed")


def _entry(path: Path, text: Any, frames: Sequence) -> Entry:
    """An entry without masks; images of a folder are named after its frames."""
    files = () if path.suffix.lower() in SUFFIXES else tuple(f"{frame}.jpg" for frame in frames)
    return Entry(path, captions=(str(text).strip(),), files=files)


def _keep(
    entry: Entry,
    masks: MaskSource | None,
    place: str,
    entries: list[Entry],
    left_out: list[str],
) -> None:
    """Add an entry with its masks, or why there is none."""
    if not entry.captions[0]:
        left_out.append(f"{place} has an empty expression")
    elif masks is None:
        left_out.append(f"{place} means no annotated object")
    else:
        entries.append(replace(entry, masks=masks))
