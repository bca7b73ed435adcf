"""How much faster tracks are evaluated together than pair by pair.

The YouTube-VIS numbers of synthetic videos, once by ``integrations.ovis.evaluation`` and once by
the straightforward way: for every pair of prediction and annotation and every frame one
intersection and one union of pycocotools' run lengths, then COCO's matching threshold by threshold
in plain loops. Both start from the same parsed documents. They take turns, so that a busy machine
slows both, and must agree to 1e-9 before anything is timed.

    OMP_NUM_THREADS=1 python benchmarks/ytvis_evaluation.py --videos 50 --repeats 3

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

import numpy as np
from pycocotools import mask as coco

from integrations.ovis.evaluation import STATISTICS, evaluate
from integrations.ovis.rle import encode

LIMIT = 5.0  # times faster


def make_case(
    videos: int,
    frames: int,
    size: tuple[int, int],
    predictions: int,
    objects: tuple[int, int] = (2, 10),
    seed: int = 0,
) -> tuple[dict, list[dict]]:
    """Documents: moving ellipses of a few kinds, and guesses beside them.

    By default as in OVIS: about six objects a video, most of them of one kind, so 2 to 10 of one or
    two kinds. The fewer objects share a kind, the fewer pairs there are to save. Each prediction
    follows one of them, more or less closely, under its category or the other.
    """
    rng = np.random.default_rng(seed)
    truth = {"videos": [], "annotations": [],
             "categories": [{"id": n, "name": str(n)} for n in range(1, 41)]}  # fmt: skip
    said = []

    def drawn(path: np.ndarray) -> list[dict | None]:
        """RLE per frame of an ellipse with centre and half axes ``(T, 4)``, gone now and then."""
        masks = np.zeros((len(path), *size), bool)
        for mask, (cx, cy, rx, ry) in zip(masks, path, strict=True):
            top, left = max(0, int(cy - ry)), max(0, int(cx - rx))
            window = mask[top : max(0, int(cy + ry) + 2), left : max(0, int(cx + rx) + 2)]
            y, x = np.ogrid[: window.shape[0], : window.shape[1]]
            window[:] = ((x + left - cx) / rx) ** 2 + ((y + top - cy) / ry) ** 2 < 1
        masks[rng.random(len(masks)) < 0.05] = False
        return encode(masks)

    for video in range(1, videos + 1):
        files = [f"{video}/{frame:05d}.jpg" for frame in range(frames)]
        truth["videos"].append(
            {"id": video, "height": size[0], "width": size[1], "file_names": files}
        )
        kinds = rng.choice(40, rng.integers(1, 3), replace=False) + 1
        paths = []
        for _ in range(rng.integers(objects[0], objects[1] + 1)):
            start = np.array([*(rng.random(2) * size[::-1]), *(rng.uniform(0.06, 0.2, 2) * size)])
            path = start + np.arange(frames)[:, None] * [*rng.normal(0, 3, 2), 0, 0]
            kind = int(rng.choice(kinds))
            paths.append((kind, path))
            truth["annotations"].append(
                {"id": len(truth["annotations"]) + 1, "video_id": video, "category_id": kind,
                 "iscrowd": 0, "segmentations": drawn(path)}
            )  # fmt: skip
        for _ in range(predictions):
            kind, path = paths[rng.integers(len(paths))]
            kind = kind if rng.random() < 0.8 else int(rng.choice(kinds))
            near = path + rng.normal(0, rng.choice([2, 8, 30]), 4) * [1, 1, 0.3, 0.3]
            near[:, 2:] = near[:, 2:].clip(4)
            said.append(
                {"video_id": video, "category_id": kind, "score": float(rng.random()),
                 "segmentations": drawn(near)}
            )  # fmt: skip
    return truth, said


def pair_iou(one: list[dict | None], other: list[dict | None]) -> float:
    """Of two tracks, frame by frame."""
    shared = union = 0.0
    for first, second in zip(one, other, strict=True):
        if first and second:
            shared += float(coco.area(coco.merge([first, second], True)))
            union += float(coco.area(coco.merge([first, second], False)))
        elif first or second:
            union += float(coco.area(first or second))
    return shared / union if union else 0.0


def pair_by_pair(truth: dict, predictions: list[dict]) -> dict[str, float]:
    """The twelve numbers by plain loops."""
    thresholds, recalls = np.linspace(0.5, 0.95, 10), np.linspace(0, 1, 101)
    ranges = [(0, 1e10), (0, 128**2), (128**2, 256**2), (256**2, 1e10)]
    groups: dict[tuple[int, int], tuple[list, list]] = {}
    for side, items in enumerate((truth["annotations"], predictions)):
        for item in items:
            seen = [float(coco.area(mask)) for mask in item["segmentations"] if mask]
            entry = (item, sum(seen) / len(seen) if seen else 0.0)
            key = (item["category_id"], item["video_id"])
            groups.setdefault(key, ([], []))[side].append(entry)
    ious = {}
    for key, (annotated, guessed) in groups.items():
        guessed.sort(key=lambda entry: -entry[0]["score"])
        del guessed[100:]
        ious[key] = [
            [pair_iou(g["segmentations"], a["segmentations"]) for a, _ in annotated]
            for g, _ in guessed
        ]
    values: dict[str, list] = {name: [] for name in STATISTICS}
    for category in sorted({key[0] for key in groups}):
        keys = sorted(key for key in groups if key[0] == category)
        for size, (low, high) in enumerate(ranges):
            for level, threshold in enumerate(thresholds):
                rows, wanted = [], 0
                for key in keys:
                    annotated, guessed = groups[key]
                    outside = [not low <= area <= high for _, area in annotated]
                    order = sorted(range(len(annotated)), key=outside.__getitem__)
                    wanted += outside.count(False)
                    taken = set()
                    for rank, (guess, area) in enumerate(guessed):
                        best, match = threshold, None
                        for n in order:
                            if n in taken:
                                continue
                            if match is not None and outside[n] and not outside[match]:
                                break
                            if ious[key][rank][n] >= best:
                                best, match = ious[key][rank][n], n
                        if match is not None:
                            taken.add(match)
                        ignored = outside[match] if match is not None else not low <= area <= high
                        rows.append((guess["score"], match is not None, ignored, rank))
                if not wanted:
                    continue
                rows.sort(key=lambda row: -row[0])
                for most in (1, 10, 100):
                    kept = [row for row in rows if row[3] < most and not row[2]]
                    right = np.cumsum([hit for _, hit, _, _ in kept])
                    recall = right / wanted
                    name = f"AR{most}" if size == 0 else f"AR{'  sml'[size + 1]}"
                    if size == 0 or most == 100:
                        values[name].append(recall[-1] if len(recall) else 0.0)
                precision = list(right / (np.arange(len(right)) + 1 + np.spacing(1)))
                for n in range(len(precision) - 1, 0, -1):
                    precision[n - 1] = max(precision[n - 1], precision[n])
                places = np.searchsorted(recall, recalls)
                mean = sum(precision[n] if n < len(precision) else 0.0 for n in places) / 101
                values["AP" if size == 0 else f"AP{'  sml'[size + 1]}"].append(mean)
                if size == 0 and level in (0, 5):
                    values["AP50" if level == 0 else "AP75"].append(mean)
    return {name: float(np.mean(found)) if found else -1.0 for name, found in values.items()}


def timed(function, *arguments) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def main() -> None:
    """Compare, time, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--videos", type=int, default=50, help="synthetic videos (50)")
    parser.add_argument("--frames", type=int, default=20, help="of each (20)")
    parser.add_argument("--size", type=int, nargs=2, default=(360, 640), help="height and width")
    parser.add_argument("--predictions", type=int, default=40, help="tracks per video (40)")
    parser.add_argument(
        "--objects", type=int, nargs=2, default=(2, 10), help="fewest and most in a video (2 10)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed pairs (3)")
    options = parser.parse_args()
    case = make_case(
        *(options.videos, options.frames, tuple(options.size)),
        *(options.predictions, tuple(options.objects)),
    )
    found, expected = evaluate(*case).stats, pair_by_pair(*case)
    difference = max(abs(found[name] - expected[name]) for name in STATISTICS)
    if difference > 1e-9:
        raise SystemExit(f"the two differ by {difference:.1e}: {found} and {expected}")
    ways = {"together": evaluate, "pair by pair": pair_by_pair}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, way in ways.items():
            times[name].append(timed(way, *case))
    pairs = zip(times["pair by pair"], times["together"], strict=True)
    ratio = statistics.median(slow / fast for slow, fast in pairs)
    for name, seconds in times.items():
        print(f"{name:14}{statistics.median(seconds):9.3f} s   {[round(s, 3) for s in seconds]}")
    print(f"{'ratio':14}{ratio:9.1f} x   (aim: {LIMIT:g})")
    print(
        json.dumps(
            {
                "benchmark": "ytvis_evaluation",
                "seconds": times,
                "ratio": ratio,
                "limit": LIMIT,
                "within_limit": ratio >= LIMIT,
                "difference": difference,
                "AP": found["AP"],
                **vars(options),
                "numpy": np.__version__,
                "machine": platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
