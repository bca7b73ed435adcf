"""Per-frame metrics of online action detection, as NumPy functions and as an mmengine metric.

Frames of all videos are scored together, class by class: average precision (THUMOS'14) or its
calibrated form (TVSeries; De Geest et al., "Online Action Detection", ECCV 2016), both over the
precision-recall curve of mmaction2, in which equal scores form one threshold. Column 0
(background), the ignore column and classes without a positive frame are not scored; frames
marked in the ignore column (THUMOS'14: "Ambiguous") do not count. Beside them: average precision
by decile of the action, by anticipation horizon, and the class-mean top-k recall of
EPIC-Kitchens-100.

``PerFrameAP`` reads what ``model.MatDetector`` predicts, once per protocol.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from mmaction.evaluation.functional.accuracy import binary_precision_recall_curve
from mmaction.registry import METRICS
from mmengine.evaluator import BaseMetric

logger = logging.getLogger(__name__)

STAGES = 10  # deciles of an action


def average_precision(score: np.ndarray, positive: np.ndarray, calibrated: bool = False) -> float:
    """Area under one class's precision-recall curve, without interpolation.

    Args:
        score: (N,) confidence of the class, any monotone scale.
        positive: (N,) bool.
        calibrated: weigh false positives by positives / negatives, so that the value no longer
            depends on how rare the class is.

    Returns:
        The average precision in [0, 1]; NaN if no frame is positive, and also, when calibrated,
        if none is negative.
    """
    positives = int(np.count_nonzero(positive))
    negatives = len(positive) - positives
    if positives == 0 or (calibrated and negatives == 0):
        return float("nan")
    precision, recall, _ = binary_precision_recall_curve(score, positive)
    if calibrated:  # TP / (TP + FP / w) with w = negatives / positives, from TP / (TP + FP)
        weighted = negatives / positives * precision
        precision = weighted / (weighted + 1.0 - precision)
    return float(-np.sum(np.diff(recall) * precision[:-1]))


def perframe_ap(
    score: np.ndarray,
    target: np.ndarray,
    class_names: Sequence[str],
    ignore_index: int = -100,
    calibrated: bool = False,
) -> tuple[float, dict[str, float]]:
    """Mean and per-class (calibrated) average precision over frames.

    Args:
        score: (N, C) float, one column per class.
        target: (N, C) multi-hot; column 0 is background.
        class_names: C names, in column order.
        ignore_index: the column that marks frames to leave out; negative or 0: none.
        calibrated: see :func:`average_precision`.

    Returns:
        The plain mean over classes that occur, and the value of each of them by name.

    Raises:
        ValueError: if the shapes disagree, a score is not finite, or no class occurs.
    """
    _check(score, target, class_names)
    score, target = _counted(score, target, ignore_index)
    per_class = {
        class_names[c]: average_precision(score[:, c], target[:, c] == 1, calibrated)
        for c in _present_classes(target, ignore_index)
    }
    return _mean(per_class, len(score)), per_class


def smooth_scores(score: np.ndarray, width: int = 5) -> np.ndarray:
    """Highest score within ``width`` frames around each frame; (N, C) in and out.

    A look (width - 1) / 2 frames ahead: for comparison with numbers reported that way only.
    """
    if width % 2 == 0 or width < 1:
        raise ValueError(f"smoothing width must be odd and positive, got {width}")
    half = width // 2
    padded = np.pad(score, ((half, half), (0, 0)), mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, width, axis=0).max(axis=-1)


def raise_to_subclass(
    score: np.ndarray,
    class_names: Sequence[str],
    general: str = "Diving",
    special: str = "CliffDiving",
) -> np.ndarray:
    """Let ``general`` score at least as high as ``special``, which implies it; (N, C) copy.

    In THUMOS'14 every CliffDiving frame is also a Diving frame.
    """
    names = list(class_names)
    missing = [name for name in (general, special) if name not in names]
    if missing:
        raise ValueError(f"class {missing[0]!r} is not among the {len(names)} classes scored")
    raised = score.copy()
    column = names.index(general)
    np.maximum(score[:, column], score[:, names.index(special)], out=raised[:, column])
    return raised


def class_prior(target: np.ndarray, ignore_index: int = -100) -> float:
    """Mean share of positive frames over the scored classes: the mAP of a constant score."""
    kept = target[_kept_rows(target, ignore_index)]
    classes = _present_classes(kept, ignore_index)
    if not classes:
        raise ValueError(f"no scored class is positive in any of {len(kept)} frames")
    return float((kept[:, classes] == 1).mean())


def stage_ap(
    score: np.ndarray,
    target: np.ndarray,
    class_names: Sequence[str],
    ignore_index: int = -100,
    calibrated: bool = False,
    lengths: Sequence[int] | None = None,
    released: bool = False,
) -> list[tuple[float, dict[str, float]]]:
    """Average precision by decile of the action: how early is it recognised?

    For decile k of a class, the frames of that decile of each of its actions are positives and
    all frames without the class are negatives; its other frames are left out.

    Args:
        score: (N, C).
        target: (N, C).
        class_names: as in :func:`perframe_ap`.
        ignore_index: as in :func:`perframe_ap`.
        calibrated: as in :func:`perframe_ap`.
        lengths: frames of each video, summing to N; actions end where videos end. None: the
            N frames are one video.
        released: cut actions as the released code does: after the ignored frames are gone, and
            by their length minus one, so that the last frame of an action belongs to no decile.

    Returns:
        Ten pairs as :func:`perframe_ap` returns them.
    """
    _check(score, target, class_names)
    lengths = [len(target)] if lengths is None else list(lengths)
    if sum(lengths) != len(target):
        raise ValueError(f"video lengths sum to {sum(lengths)}, but there are {len(target)} frames")
    kept = _kept_rows(target, ignore_index)
    classes = _present_classes(target[kept], ignore_index)
    ends = np.cumsum(lengths)
    if released:
        ends = np.cumsum(kept)[ends - 1]
        score, target, kept = score[kept], target[kept], np.ones(int(kept.sum()), bool)
    per_stage: list[dict[str, float]] = [{} for _ in range(STAGES)]
    for c in classes:
        positive = target[:, c] == 1
        stages = _decile_rows(positive, ends, 1 if released else 0)
        for values, rows in zip(per_stage, stages, strict=True):
            chosen = (~positive | rows) & kept
            values[class_names[c]] = average_precision(
                score[chosen, c], positive[chosen], calibrated
            )
    return [(float(np.nanmean(list(values.values()))), values) for values in per_stage]


def anticipation_ap(
    score: np.ndarray,
    target: np.ndarray,
    class_names: Sequence[str],
    ignore_index: int = -100,
    calibrated: bool = False,
) -> tuple[float, list[float]]:
    """Average precision by anticipation horizon.

    Args:
        score: (N, C, A): what was said about a frame 1..A anticipation steps before it.
        target: (N, C).
        class_names: as in :func:`perframe_ap`.
        ignore_index: as in :func:`perframe_ap`.
        calibrated: as in :func:`perframe_ap`.

    Returns:
        The mean over horizons, and each horizon's mean over classes.
    """
    means = [
        perframe_ap(score[..., k], target, class_names, ignore_index, calibrated)[0]
        for k in range(score.shape[-1])
    ]
    return float(np.mean(means)), means


def topk_hits(score: np.ndarray, label: np.ndarray, k: int = 5) -> np.ndarray:
    """(N,) bool: is the label among the k highest of (N, C) scores?"""
    if not 1 <= k <= score.shape[1]:
        raise ValueError(f"top-{k} needs 1 <= k <= {score.shape[1]} classes")
    best = np.argpartition(-score, k - 1, axis=1)[:, :k]
    return (best == label[:, None]).any(axis=1)


def class_mean_recall(score: np.ndarray, label: np.ndarray, k: int = 5) -> float:
    """Top-k recall averaged over the classes that occur; score (N, C), label (N,) integer.

    The metric of EPIC-Kitchens-100 anticipation: rows are segments, scored some time before they
    start. For detection, rows are frames that show an action.
    """
    hits = topk_hits(score, label, k)
    _, index = np.unique(label, return_inverse=True)
    return float((np.bincount(index, hits) / np.bincount(index)).mean())


def time_to_action(
    score: np.ndarray, label: np.ndarray, times: Sequence[float], k: int = 5
) -> float:
    """Mean of the earliest time before its start at which a segment is in the top k.

    Args:
        score: (N, A, C), from the longest time to the shortest.
        label: (N,) integer.
        times: A seconds before the start, descending.
        k: how many classes count.

    Returns:
        Seconds, in the mean over segments; one that is never recognised counts 0.
    """
    hits = np.stack([topk_hits(score[:, a], label, k) for a in range(score.shape[1])], axis=1)
    earliest = np.asarray(times)[hits.argmax(axis=1)]
    return float(np.where(hits.any(axis=1), earliest, 0.0).mean())


@METRICS.register_module()
class PerFrameAP(BaseMetric):
    """Per-frame (calibrated) mean average precision of one protocol's scores.

    A sample is one video and holds ``<protocol>_scores`` (T, C) and ``<protocol>_targets``
    (T, C) NumPy arrays. The class names, the ignore column and the kind of metric are the data
    set's (``metainfo`` keys ``classes``, ``ignore_index``, ``calibrated``).

    Results: ``<protocol>/mAP`` (``mcAP`` if calibrated), ``<protocol>/prior`` (the value of a
    score that says nothing), ``<protocol>/classes`` (value by class name), ``<protocol>/frames``
    (frames scored; the window protocol leaves out the end of every video). Where no frame was
    scored, because all videos are shorter than a window, only ``frames`` is there.

    Args:
        protocol: "online" or "window"; also the prefix of the results.
        smooth: see :func:`smooth_scores`, applied to each video by itself.
        switch: see :func:`raise_to_subclass`.
        collect_device: how ranks share their results, "cpu" or "gpu".
    """

    def __init__(
        self,
        protocol: str = "online",
        smooth: bool = False,
        switch: bool = False,
        collect_device: str = "cpu",
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=protocol)
        self.protocol = protocol
        self.smooth = smooth
        self.switch = switch

    def process(self, data_batch: object, data_samples: Sequence[Mapping]) -> None:
        """Keep the scores and targets of the videos of one batch."""
        for sample in data_samples:
            self.results.append(
                (sample[f"{self.protocol}_scores"], sample[f"{self.protocol}_targets"])
            )

    def compute_metrics(self, results: list) -> dict:
        """Score the frames of all videos together."""
        meta = self.dataset_meta
        scores = [smooth_scores(s) if self.smooth and len(s) else s for s, _ in results]
        score = np.concatenate(scores)
        target = np.concatenate([t for _, t in results])
        if not len(score):
            logger.warning("%s protocol: no video is long enough to be scored", self.protocol)
            return {"frames": 0}
        if self.switch:
            score = raise_to_subclass(score, meta["classes"])
        mean, per_class = perframe_ap(
            score, target, meta["classes"], meta["ignore_index"], meta["calibrated"]
        )
        return {
            metric_name(meta["calibrated"]): mean,
            "prior": class_prior(target, meta["ignore_index"]),
            "classes": per_class,
            "frames": len(score),
        }


def metric_name(calibrated: bool) -> str:
    """The name under which :class:`PerFrameAP` reports the mean over classes."""
    return "mcAP" if calibrated else "mAP"


def _check(score: np.ndarray, target: np.ndarray, class_names: Sequence[str]) -> None:
    if score.shape != target.shape or score.shape[1] != len(class_names):
        raise ValueError(
            f"scores {score.shape}, targets {target.shape} and {len(class_names)} class names "
            "must agree: (frames, classes)"
        )
    bad = ~np.isfinite(score).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {len(score)} frames have a score that is not finite, "
            f"the first is frame {int(bad.argmax())}"
        )


def _kept_rows(target: np.ndarray, ignore_index: int) -> np.ndarray:
    """(N,) bool: frames that count. Column 0 is background and never marks a frame as ignored."""
    return target[:, ignore_index] != 1 if ignore_index > 0 else np.ones(len(target), bool)


def _counted(
    score: np.ndarray, target: np.ndarray, ignore_index: int
) -> tuple[np.ndarray, np.ndarray]:
    kept = _kept_rows(target, ignore_index)
    return (score, target) if kept.all() else (score[kept], target[kept])


def _present_classes(target: np.ndarray, ignore_index: int) -> list[int]:
    """Columns that are scored: neither background nor ignored, and positive somewhere."""
    present = (target == 1).any(axis=0)
    return [c for c in range(1, target.shape[1]) if c != ignore_index and present[c]]


def _mean(per_class: dict[str, float], frames: int) -> float:
    if not per_class:
        raise ValueError(f"no scored class is positive in any of {frames} frames")
    return float(np.mean(list(per_class.values())))


def _decile_rows(positive: np.ndarray, ends: np.ndarray, short: int) -> list[np.ndarray]:
    """For each decile, (N,) bool: frames in it, over all actions (runs of positives)."""
    starts = np.concatenate([[0], ends[:-1]])
    stages = [np.zeros(len(positive), bool) for _ in range(STAGES)]
    for begin, end in zip(starts, ends, strict=True):
        edges = np.flatnonzero(np.diff(np.r_[False, positive[begin:end], False])) + begin
        for first, stop in edges.reshape(-1, 2):
            length = stop - first - short
            cuts = [first + length * k // STAGES for k in range(STAGES + 1)]
            for rows, (low, high) in zip(stages, pairwise(cuts), strict=True):
                rows[low : max(low + 1, high)] = True
    return stages
