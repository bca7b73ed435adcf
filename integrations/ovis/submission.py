"""What an evaluation server takes: a zip with ``results.json``, a list of predicted tracks.

Each is ``{"video_id", "category_id", "score", "segmentations"}`` with the ids of the document, and
for every frame of the video compressed run lengths or null. Everything is compared with the
document before anything is written, since a server says little about what it refuses.

    python -m integrations.ovis.submission PRED.json VALID.json submission.zip
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backbone.files import read_json, replacing
from integrations.ovis.evaluation import read_predictions
from integrations.ovis.layout import LayoutError, check_document, check_track
from integrations.ovis.rle import check_cover, compress

logger = logging.getLogger(__name__)

RESULTS = "results.json"


def write_submission(
    path: str | Path, predictions: Sequence[Mapping[str, Any]], document: Mapping[str, Any]
) -> Path:
    """Write the zip; the same predictions give the same bytes.

    Args:
        path: ends in ".zip".
        predictions: as above; masks of any kind that ``rle`` reads.
        document: of the split, its annotations not needed.

    Raises:
        LayoutError: unknown videos or categories, lists of another length than the video, a score
            that is not finite, or no prediction at all.
        rle.MaskError: a mask of another size than its video.
    """
    path = Path(path)
    if path.suffix != ".zip":
        raise LayoutError(f"{path} must end in .zip, which is what the server takes")
    check_document(document, "the document")
    videos = {video["id"]: video for video in document["videos"]}
    categories = {item["id"] for item in document["categories"]}
    entries = [
        _entry(item, f"prediction {number}", videos, categories)
        for number, item in enumerate(predictions)
    ]
    if not entries:
        raise LayoutError("there are no predictions to submit")
    silent = len(videos) - len({entry["video_id"] for entry in entries})
    if silent:
        logger.warning("%d of %d videos have no prediction", silent, len(videos))
    text = json.dumps(entries, separators=(",", ":"), allow_nan=False)
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        # A fixed date: zip files hold one, and would differ from one writing to the next.
        info = zipfile.ZipInfo(RESULTS, date_time=(1980, 1, 1, 0, 0, 0))
        archive.writestr(info, text, zipfile.ZIP_DEFLATED)
    return path


def _entry(item: Mapping, where: str, videos: Mapping, categories: set) -> dict[str, Any]:
    check_track(item, where, videos, categories)
    score = item.get("score")
    if not isinstance(score, (int, float)) or not math.isfinite(score):
        raise LayoutError(f"{where}: score {score!r} is not a finite number")
    video = videos[item["video_id"]]
    size = (video["height"], video["width"])
    masks = [compress(mask, size, where, n) for n, mask in enumerate(item["segmentations"])]
    for number, mask in enumerate(masks):
        if mask:
            check_cover(mask, size, where, number)
    return {
        "video_id": item["video_id"],
        "category_id": item["category_id"],
        "score": float(score),
        "segmentations": [mask and {"size": list(size), "counts": _text(mask)} for mask in masks],
    }


def _text(mask: Mapping) -> str:
    counts = mask["counts"]
    return counts.decode("ascii") if isinstance(counts, bytes) else counts


def main(argv: Sequence[str] | None = None) -> Path:
    """Command line; returns the zip."""
    parser = argparse.ArgumentParser(
        prog="python -m integrations.ovis.submission",
        description="Pack predictions for an evaluation server.",
        epilog="example: python -m integrations.ovis.submission results.json valid.json out.zip",
    )
    parser.add_argument("predictions", type=Path, help="JSON list of predicted tracks")
    parser.add_argument("document", type=Path, help="YouTube-VIS JSON of the split")
    parser.add_argument("zip", type=Path, help="file to write")
    options = parser.parse_args(argv)
    predictions = read_predictions(options.predictions)
    written = write_submission(options.zip, predictions, read_json(options.document))
    logger.info("%s: %d tracks", written, len(predictions))
    return written


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
