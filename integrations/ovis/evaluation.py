"""The numbers of video instance segmentation: average precision and recall of tracks.

COCO's metric with tracks in the place of boxes, as YouTube-VIS defined it (Yang et al., "Video
Instance Segmentation", ICCV 2019, section 3). The overlap of two tracks is the sum over frames of
their intersections, over the sum of their unions; so whoever confuses two objects in the middle of
a video loses both. For every video, category, IoU threshold and range of sizes, predictions take
ground truth greedily, by descending score:

* a prediction takes the free ground truth of the highest IoU that reaches the threshold; of equal
  ones the last. At most 100 predictions per video and category play, ties in the file's order.
* crowds, and ground truth outside the range of sizes, are ignored: taken only if nothing else can
  be, counting neither for nor against. A crowd absorbs any number of predictions; IoU stays IoU.
  Predictions outside the range that take nothing do not count either.
* precision is made monotone and read at 101 recalls; a category without ground truth has no value.

A category's predictions are scored together over all videos. Where others sum masks pair by pair,
here one call per frame gives all intersections of a category, and one array holds all thresholds
and sizes (``benchmarks/ytvis_evaluation.py`` measures the difference).

    python -m integrations.ovis.evaluation GT.json PRED.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zipfile
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco

from backbone.files import read_json, write_json
from integrations.ovis.layout import check_document, check_track
from integrations.ovis.rle import areas, check_cover, compress

STATISTICS = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
)  # fmt: skip
REPORTED = ("AP", "AP50", "AP75", "AR1", "AR10")  # what papers print, times 100
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
MOST = (1, 10, 100)  # predictions per video and category that count
# Mean area in pixels over the frames where a track is seen; borders belong to both sides.
SIZES = np.array([[0, 1e10], [0, 128**2], [128**2, 256**2], [256**2, 1e10]])
NOTHING = -1.0  # the value where there is no ground truth


class EvaluationError(ValueError):
    """Ground truth or predictions that cannot be scored."""


@dataclass(frozen=True)
class TrackScores:
    """What :func:`evaluate` found, values in 0..1, -1 where nothing is annotated.

    Attributes:
        stats: the twelve numbers by name, see :data:`STATISTICS`.
        per_category: the same twelve by category id; without categories, under -1.
        matched: by id of annotation, crowds apart: ``(10,)`` bool, was it found at each of
            :data:`IOU_THRESHOLDS`, by any prediction that counts?
    """

    stats: dict[str, float]
    per_category: dict[int, dict[str, float]]
    matched: dict[int, np.ndarray]

    def recall(self, annotations: Collection[int], iou: float = 0.5) -> float:
        """Share of some annotations, by id, that were found at one of the thresholds; -1 of none.

        They competed with all the others for predictions: for a kind of object that no category
        tells, such as what is camouflaged.
        """
        near = np.flatnonzero(np.isclose(IOU_THRESHOLDS, iou))
        if not len(near):
            raise EvaluationError(
                f"iou={iou} is not among the thresholds {IOU_THRESHOLDS.round(2).tolist()}"
            )
        unknown = [number for number in annotations if number not in self.matched]
        if unknown:
            raise EvaluationError(f"annotation {unknown[0]} was not scored: unknown, or a crowd")
        if not annotations:
            return NOTHING
        return float(np.mean([self.matched[number][near[0]] for number in annotations]))


@dataclass(frozen=True)
class _Tracks:
    """Tracks of one category in one video: ``n`` of them over ``T`` frames."""

    masks: list[list[dict | None]]  # n x T, compressed
    pixels: np.ndarray  # (n, T) areas of the masks
    areas: np.ndarray  # (n,) mean area that decides the size


@dataclass(frozen=True)
class _Video:
    """The outcome of one category in one video; letters as in :func:`_match`."""

    scores: np.ndarray  # (D,) descending
    hits: np.ndarray  # (A, I, D) bool
    ignored: np.ndarray  # (A, I, D) bool
    wanted: np.ndarray  # (A,) ground truth that counts


def evaluate(
    ground_truth: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    *,
    categories: bool = True,
) -> TrackScores:
    """Score predicted tracks.

    Args:
        ground_truth: a YouTube-VIS document: ``videos``, ``categories``, ``annotations``.
        predictions: ``{"video_id", "category_id", "score", "segmentations"}`` each, as in a
            submission: one segmentation or None for every frame of the video.
        categories: False scores all categories as one: how well are things found, whatever they
            are?

    Raises:
        EvaluationError: a document without annotations, or scores that are not finite.
        layout.LayoutError: unknown videos or categories, lists of another length than the video.
        rle.MaskError: masks of another size than their video.
    """
    videos, names, annotations = _checked(ground_truth)
    truth = _grouped(annotations, categories)
    guesses = _grouped(_checked_predictions(predictions, videos, names), categories)
    outcomes: dict[int, list[_Video]] = defaultdict(list)
    matched: dict[int, np.ndarray] = {}
    for key in sorted(truth.keys() | guesses.keys()):  # videos ascend within a category
        here, said = truth.get(key, []), guesses.get(key, [])
        said = sorted(said, key=lambda item: -item["score"])[: MOST[-1]]  # stable
        outcome, found = _score_video(here, said, videos[key[0]])
        outcomes[key[1]].append(outcome)
        for annotation, row in zip(here, found.T, strict=True):
            if not _is_crowd(annotation):
                matched[annotation["id"]] = row
    chosen = list(names) if categories else [-1]
    values = {category: _accumulate(outcomes.get(category, [])) for category in chosen}
    precision = np.stack([p for p, _ in values.values()])  # (C, A, I)
    recall = np.stack([r for _, r in values.values()])  # (C, 6, I)
    return TrackScores(
        stats=_twelve(precision, recall),
        per_category={category: _twelve(p[None], r[None]) for category, (p, r) in values.items()},
        matched=matched,
    )


def track_ious(
    predictions: Sequence[Sequence[Mapping | None]],
    truth: Sequence[Sequence[Mapping | None]],
    size: tuple[int, int],
) -> np.ndarray:
    """IoU of every predicted with every annotated track, ``(D, G)``; 0 where neither has a pixel.

    Args:
        predictions: ``D`` lists of ``T`` segmentations, see ``rle``.
        truth: ``G`` of them.
        size: ``(H, W)`` of the video.
    """
    guesses, annotated = (
        _tracks([{"segmentations": masks} for masks in tracks], size, name)
        for tracks, name in ((predictions, "prediction"), (truth, "annotation"))
    )
    return _ious(guesses, annotated)


def read_predictions(path: str | Path) -> list[dict]:
    """Predictions of a JSON file, or of the ``results.json`` in a submission's zip."""
    path = Path(path)
    if path.suffix != ".zip":
        content = read_json(path)
    else:
        with zipfile.ZipFile(path) as archive:
            if "results.json" not in archive.namelist():
                raise EvaluationError(f"{path} holds {archive.namelist()[:5]}, no results.json")
            content = json.loads(archive.read("results.json"))
    if not isinstance(content, list):
        raise EvaluationError(f"{path}: predictions are a list, not a {type(content).__name__}")
    return content


def main(argv: Sequence[str] | None = None) -> TrackScores:
    """Command line: a table on stdout, its last line one JSON document."""
    parser = argparse.ArgumentParser(
        prog="python -m integrations.ovis.evaluation",
        description="YouTube-VIS average precision and recall of predicted tracks.",
        epilog="example: python -m integrations.ovis.evaluation val.json results.json",
    )
    parser.add_argument("ground_truth", type=Path, help="YouTube-VIS JSON with annotations")
    parser.add_argument("predictions", type=Path, help="results.json, or the zip that holds it")
    parser.add_argument("--agnostic", action="store_true", help="score all categories as one")
    parser.add_argument("--per-class", action="store_true", help="a row for every category")
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    options = parser.parse_args(argv)
    document = read_json(options.ground_truth)
    scores = evaluate(
        document, read_predictions(options.predictions), categories=not options.agnostic
    )
    names = {item["id"]: str(item["name"]) for item in document["categories"]}
    rows = [("all", scores.stats)]
    if options.per_class:
        rows += [(names.get(key, "any"), row) for key, row in scores.per_category.items()]
    width = max(len(name) for name, _ in rows) + 1
    table = [" " * width + "".join(f"{name:>7}" for name in STATISTICS)]
    table += [
        f"{name:<{width}}" + "".join(f"{_percent(row[key]):>7}" for key in STATISTICS)
        for name, row in rows
    ]
    sys.stdout.write("\n".join([*table, json.dumps(scores.stats)]) + "\n")
    if options.out:
        write_json(options.out, {"stats": scores.stats, "per_category": scores.per_category})
    return scores


def _percent(value: float) -> str:
    return "-" if value == NOTHING else f"{100 * value:.2f}"


# ------------------------------------------------------------------------------------ input


def _checked(document: Mapping[str, Any]) -> tuple[dict, dict, list]:
    """Videos and names of categories by id, and annotations that fit them."""
    check_document(document, "ground truth")
    if not document.get("annotations"):
        raise EvaluationError(
            "the ground truth has no annotations: the splits that a server scores come without; "
            "use a local hold-out of the training videos"
        )
    videos = {video["id"]: video for video in document["videos"]}
    names = {category["id"]: category["name"] for category in document["categories"]}
    return videos, names, list(document["annotations"])


def _checked_predictions(
    predictions: Sequence[Mapping], videos: Mapping, names: Mapping
) -> list[Mapping]:
    for number, item in enumerate(predictions):
        where = f"prediction {number}"
        check_track(item, where, videos, names)
        score = item.get("score")
        if not isinstance(score, (int, float)) or not math.isfinite(score):
            raise EvaluationError(f"{where}: score {score!r} is not a finite number")
    return [{**item, "id": number} for number, item in enumerate(predictions)]


def _grouped(items: Sequence[Mapping], categories: bool) -> dict[tuple[int, int], list[Mapping]]:
    """By (video, category), in the order of the file."""
    groups: dict[tuple[int, int], list[Mapping]] = defaultdict(list)
    for item in items:
        groups[item["video_id"], item["category_id"] if categories else -1].append(item)
    return groups


def _is_crowd(annotation: Mapping) -> bool:
    return bool(annotation.get("iscrowd", 0))


def _tracks(items: Sequence[Mapping], size: tuple[int, int], kind: str) -> _Tracks:
    """Compress the masks; sizes follow the annotated ``areas`` where there are any."""
    masks = []
    for number, item in enumerate(items):
        where = f"{kind} {item.get('id', number)}"
        row = [compress(m, size, where, n) for n, m in enumerate(item["segmentations"])]
        first = next((n for n, mask in enumerate(row) if mask), None)
        if first is not None:  # whoever writes masks of another size does so everywhere
            check_cover(row[first], size, where, first)
        masks.append(row)
    frames = len(masks[0]) if masks else 0
    flat = [mask for row in masks for mask in row]
    seen = np.array([mask is not None for mask in flat], bool)
    pixels = np.zeros(len(flat))
    pixels[seen] = areas([mask for mask in flat if mask is not None])
    pixels = pixels.reshape(len(items), frames)
    means = pixels.sum(1) / np.maximum((pixels > 0).sum(1), 1)
    for number, item in enumerate(items):
        annotated = [area for area in item.get("areas") or () if area]
        if annotated:
            means[number] = np.mean(annotated)
    return _Tracks(masks, pixels, means)


# ------------------------------------------------------------------------------------ arithmetic


def _ious(guesses: _Tracks, truth: _Tracks) -> np.ndarray:
    """``(D, G)``, all pairs of a frame in one call."""
    count, wanted = len(guesses.masks), len(truth.masks)
    if not count or not wanted:
        return np.zeros((count, wanted))
    # For a crowd pycocotools divides the intersection by the prediction's own area alone, from
    # which the whole number of pixels comes back.
    shares = np.zeros((guesses.pixels.shape[1], count, wanted))
    frames = zip(zip(*guesses.masks, strict=True), zip(*truth.masks, strict=True), strict=True)
    for share, (said, annotated) in zip(shares, frames, strict=True):
        rows = [d for d, mask in enumerate(said) if mask]
        columns = [g for g, mask in enumerate(annotated) if mask]
        if rows and columns:
            share[np.array(rows)[:, None], columns] = coco.iou(
                [said[d] for d in rows], [annotated[g] for g in columns], [1] * len(columns)
            )
    shared = np.rint(shares * guesses.pixels.T[..., None]).sum(0)
    union = guesses.pixels.sum(1)[:, None] + truth.pixels.sum(1) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _match(ious: np.ndarray, ignored: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Which ground truth each prediction takes: ``(A, I, D)`` int, -1 for none.

    A ranges of sizes, I thresholds, D predictions by descending score, G ground truth.

    Args:
        ious: ``(D, G)``.
        ignored: ``(A, G)`` bool, crowds included.
        crowd: ``(G,)`` bool.
    """
    count, last = len(ious), ious.shape[1] - 1
    taken = np.full((len(SIZES), len(IOU_THRESHOLDS), count), -1)
    free = np.ones((len(SIZES), len(IOU_THRESHOLDS), last + 1), bool)
    least = IOU_THRESHOLDS[:, None]
    for d in np.flatnonzero((ious >= least[0]).any(1)) if last >= 0 else ():
        reached = free & (ious[d] >= least)  # (A, I, G)
        ordinary = reached & ~ignored[:, None]
        pool = np.where(ordinary.any(-1, keepdims=True), ordinary, reached)
        best = last - np.where(pool, ious[d], -1)[..., ::-1].argmax(-1)  # of equals the last
        hit = pool.any(-1)  # (A, I)
        taken[..., d] = np.where(hit, best, -1)
        free[(*np.nonzero(hit), best[hit])] = crowd[best[hit]]
    return taken


def _score_video(
    annotations: Sequence[Mapping], predictions: Sequence[Mapping], video: Mapping
) -> tuple[_Video, np.ndarray]:
    """One category in one video; also which annotations were found at which threshold (I, G)."""
    size = (video["height"], video["width"])
    truth = _tracks(annotations, size, "annotation")
    guesses = _tracks(predictions, size, "prediction")
    crowd = np.array([_is_crowd(item) for item in annotations], bool)  # (G,)
    ignored = crowd | _outside(truth.areas)  # (A, G)
    taken = _match(_ious(guesses, truth), ignored, crowd)  # (A, I, D)
    hits = taken >= 0
    lost = np.zeros_like(hits)
    if len(crowd):
        ranges = np.arange(len(SIZES))[:, None, None]
        lost = hits & ignored[ranges, taken.clip(0)]
    lost |= ~hits & _outside(guesses.areas)[:, None]
    found = (taken[0][:, None, :] == np.arange(len(crowd))[:, None]).any(-1)  # (I, G)
    scores = np.array([item["score"] for item in predictions], float)
    return _Video(scores, hits, lost, (~ignored).sum(1)), found


def _outside(areas: np.ndarray) -> np.ndarray:
    """Which tracks lie outside each range of sizes, ``(A, n)`` bool."""
    return (areas < SIZES[:, :1]) | (areas > SIZES[:, 1:])


def _accumulate(videos: Sequence[_Video]) -> tuple[np.ndarray, np.ndarray]:
    """Of one category: average precision ``(A, I)`` and recall ``(6, I)``, -1 without truth.

    The six: at most 1, 10 and 100 predictions, then 100 of each size.
    """
    precision = np.full((len(SIZES), len(IOU_THRESHOLDS)), NOTHING)
    recall = np.full((len(MOST) + len(SIZES) - 1, len(IOU_THRESHOLDS)), NOTHING)
    wanted = sum((video.wanted for video in videos), np.zeros(len(SIZES), int))
    if not wanted[0]:
        return precision, recall
    for place, most in enumerate(MOST):
        right, wrong = _ranked(videos, most)
        reached = right[..., -1] / np.maximum(wanted, 1)[:, None]  # (A, I)
        recall[place] = reached[0]
        if most < MOST[-1]:
            continue
        for size in np.flatnonzero(wanted):
            if size:
                recall[len(MOST) + size - 1] = reached[size]
            precision[size] = _interpolated(right[size], wrong[size], wanted[size])
    return precision, recall


def _ranked(videos: Sequence[_Video], most: int) -> tuple[np.ndarray, np.ndarray]:
    """True and false positives ``(A, I, 1 + N)`` among the first 0, 1, … N of all videos."""
    scores = np.concatenate([video.scores[:most] for video in videos])
    order = np.argsort(-scores, kind="stable")
    hits, ignored = (
        np.concatenate([getattr(video, name)[..., :most] for video in videos], -1)[..., order]
        for name in ("hits", "ignored")
    )
    return tuple(
        np.pad(np.cumsum(counted & ~ignored, -1), ((0, 0), (0, 0), (1, 0)))
        for counted in (hits, ~hits)
    )


def _interpolated(right: np.ndarray, wrong: np.ndarray, wanted: int) -> np.ndarray:
    """Mean over RECALLS of the highest precision at that recall or beyond, ``(I,)``."""
    right, wrong = right[:, 1:], wrong[:, 1:]  # (I, N)
    precision = right / (right + wrong + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    padded = np.pad(precision, ((0, 0), (0, 1)))  # beyond the last recall: 0
    reached = right / wanted
    return np.array(
        [row[np.searchsorted(at, RECALLS)].mean() for row, at in zip(padded, reached, strict=True)]
    )


def _twelve(precision: np.ndarray, recall: np.ndarray) -> dict[str, float]:
    """The statistics of precision ``(C, A, I)`` and recall ``(C, 6, I)``."""
    half, three_quarters = 0, 5  # places of 0.5 and 0.75 among the thresholds
    parts = [
        precision[:, 0], precision[:, 0, half], precision[:, 0, three_quarters],
        *(precision[:, size] for size in (1, 2, 3)),
        *(recall[:, kind] for kind in range(6)),
    ]  # fmt: skip
    return {
        name: float(part[part > NOTHING].mean()) if (part > NOTHING).any() else NOTHING
        for name, part in zip(STATISTICS, parts, strict=True)
    }


if __name__ == "__main__":
    main()
