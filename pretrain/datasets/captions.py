"""Clips with captions: MSR-VTT, MSVD, ActivityNet, DiDeMo, LSMDC, VATEX. One is drawn per access.

`read_captions` reads the released tables, CSV files with the columns video_id, text and dataset;
text is a list of captions written as a Python literal, or one plain caption (WebVid). `read_index`
reads JSON lines with id, split and captions. The others read what the data sets' own authors
publish:

    MSR-VTT      JSON {"videos": [{"video_id": "video0", "split": "train", …}],
                       "sentences": [{"video_id": "video0", "caption": "…", …}]}
    MSVD         text, "<video> <caption>" a line
    ActivityNet  JSON {"v_<id>": {"duration": 82.7, "timestamps": [[0.8, 19.9], …],
                       "sentences": ["…", …]}}
    DiDeMo       JSON list of {"video": "….avi", "description": "…", "times": [[2, 3], …], …}
    LSMDC        text, separated by tabs: clip, four times, caption
    VATEX        JSON list of {"videoID": "<id>_000010_000020", "enCap": ["…", …], …}

Where a data set describes the parts of a video one by one, as ActivityNet and DiDeMo do, retrieval
takes all its sentences together as one paragraph, in their order in time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pretrain.datasets.base import Annotations, Entry
from pretrain.datasets.tables import (
    AnnotationError,
    check_split,
    fields,
    file_of,
    listed,
    mapping,
    parse_list,
    read_json,
    read_json_lines,
    read_lines,
    read_names,
    read_rows,
    report_left_out,
    root_of,
    stretches,
    with_suffix,
)

SUFFIXES = {"LSMDC": ".avi", "MSVD": ".avi"}  # of the released tables; all others .mp4
TRIMMED = {"DiDeMo": 30.0}  # seconds that its captions speak of
UNIT = 5.0  # seconds that DiDeMo counts time in


def read_captions(
    annotations: str | Path, root: str | Path | Mapping[str, str | Path]
) -> Annotations:
    """Read a table of captioned videos; rows without any words are left out and reported.

    annotations: the CSV file. root: folder of the videos, or one per data set.
    """
    found = _Captioned()
    for line, row in read_rows(annotations, ("video_id", "text", "dataset")):
        dataset, text = row["dataset"], row["text"].strip()
        is_list = text.startswith("[") and text.endswith("]")
        captions = parse_list(text, annotations, line, "text") if is_list else [text]
        file = with_suffix(row["video_id"], SUFFIXES.get(dataset, ".mp4"))
        path = root_of(root, dataset, annotations) / file
        found.add(path, captions, f"line {line}: {row['video_id']}", TRIMMED.get(dataset))
    return found.done(annotations)


def read_index(index: str | Path, root: str | Path, split: str) -> Annotations:
    """Read the captioned videos of one split of an index file.

    index: JSON lines with id, split and captions. root: folder of ``<id>.mp4``.
    """
    found, splits = _Captioned(), set()
    for line, item in read_json_lines(index):
        where = f"{index}, line {line}"
        name, part, captions = fields(item, ("id", "split", "captions"), where)
        splits.add(part)
        if part == split:
            path = Path(root) / with_suffix(name, ".mp4")
            found.add(path, listed(captions, where, "captions"), f"line {line}: {name}")
    check_split(splits, split, index)
    return found.done(index)


def read_msrvtt(
    annotations: str | Path,
    root: str | Path,
    split: str | None = None,
    videos: str | Path | None = None,
    pattern: str = "{id}.mp4",
) -> Annotations:
    """Read MSR-VTT: one entry per video, with all its captions.

    root: folder of the videos, named by ``pattern`` after {id} and {split}. split: train, validate
    or test of the file; None for all. videos: a list of the ids to take, one a line or the column
    video_id of a CSV file, such as MSRVTT_train.9k.csv; where that has a column sentence, such as
    MSRVTT_JSFUSION_test.csv, this is the video's only caption.
    """
    clips, sentences = fields(read_json(annotations), ("videos", "sentences"), str(annotations))
    captions: dict[str, list[str]] = {}
    for place, item in enumerate(listed(sentences, str(annotations), "sentences")):
        video, text = fields(item, ("video_id", "caption"), f"{annotations}, sentence {place}")
        captions.setdefault(video, []).append(text)
    chosen = None if videos is None else read_names(videos, "video_id")
    found, splits = _Captioned(), {}
    for place, item in enumerate(listed(clips, str(annotations), "videos")):
        video, part = fields(item, ("video_id", "split"), f"{annotations}, video {place}")
        splits[video] = part
        if split not in (None, part) or (chosen is not None and video not in chosen):
            continue
        row = {} if chosen is None else chosen[video]
        texts = [row["sentence"]] if "sentence" in row else captions.get(video, [])
        found.add(file_of(root, pattern, id=video, split=part), texts, video)
    check_split(splits.values(), split, annotations)
    _check_listed(chosen, splits, videos, annotations)
    return found.done(annotations)


def read_msvd(
    annotations: str | Path,
    root: str | Path,
    videos: str | Path | None = None,
    pattern: str = "{id}.avi",
) -> Annotations:
    """Read MSVD's descriptions: one entry per video, with all its captions.

    annotations: AllVideoDescriptions.txt; lines that begin with # are remarks. root: folder of the
    videos, named by ``pattern`` after {id}. videos: a list of the ids to take, one a line, such as
    train_list.txt.
    """
    captions: dict[str, list[str]] = {}
    for _, text in read_lines(annotations):
        if not text.startswith("#"):
            video, _, caption = text.partition(" ")
            captions.setdefault(video, []).append(caption)
    chosen = None if videos is None else read_names(videos, "video_id")
    _check_listed(chosen, captions, videos, annotations)
    found = _Captioned()
    for video, texts in captions.items():
        if chosen is None or video in chosen:
            found.add(file_of(root, pattern, id=video), texts, video)
    return found.done(annotations)


def read_activitynet_paragraphs(
    annotations: str | Path, root: str | Path, pattern: str = "{id}.mp4"
) -> Annotations:
    """Read ActivityNet Captions for retrieval: one entry per video, its sentences as one paragraph.

    root: folder of the videos, named by ``pattern`` after {id}, such as v_QOlSCBRmfWY.
    """
    found = _Captioned()
    for video, _, moments in activitynet_moments(annotations):
        text = paragraph((start, sentence) for start, _, sentence in moments)
        found.add(file_of(root, pattern, id=video), [text], video)
    return found.done(annotations)


def activitynet_moments(
    annotations: str | Path,
) -> list[tuple[str, Any, list[tuple[float, float, str]]]]:
    """Videos of an ActivityNet Captions file: id, duration, and (start, end, sentence) of each."""
    videos = []
    for video, item in mapping(read_json(annotations), str(annotations), "content").items():
        where = f"{annotations}, video {video!r}"
        names = ("duration", "timestamps", "sentences")
        duration, times, sentences = fields(item, names, where)
        windows, texts = stretches(times, where, "timestamps"), listed(sentences, where, names[2])
        videos.append((video, duration, in_pairs(windows, texts, where)))
    return videos


def in_pairs(windows: list, texts: list, where: str) -> list[tuple[float, float, str]]:
    """(start, end, sentence) of every moment, or an error where the two lists differ in length."""
    if len(windows) != len(texts):
        raise AnnotationError(f"{where}: {len(windows)} timestamps but {len(texts)} sentences")
    return [
        (start, end, str(text).strip())
        for (start, end), text in zip(windows, texts, strict=True)
    ]


def read_didemo_paragraphs(
    annotations: str | Path, root: str | Path, pattern: str = "{id}"
) -> Annotations:
    """Read DiDeMo for retrieval: one entry per video, its descriptions as one paragraph.

    Only the first 30 seconds of a video are described. root: folder of the videos, named by
    ``pattern`` after {id}, the name with suffix, and {stem}, the name without.
    """
    moments: dict[str, list[tuple[float, str]]] = {}
    for video, text, (start, _) in didemo_moments(annotations):
        moments.setdefault(video, []).append((start, text))
    found = _Captioned()
    for video, texts in moments.items():
        path = file_of(root, pattern, id=video, stem=Path(video).stem)
        found.add(path, [paragraph(texts)], video, TRIMMED["DiDeMo"])
    return found.done(annotations)


def didemo_moments(annotations: str | Path) -> list[tuple[str, str, tuple[float, float]]]:
    """(video, description, (start, end) in seconds) of every item of a DiDeMo file.

    Several people marked each moment, in pieces of five seconds; what most of them marked is taken,
    the first if there are several such.
    """
    moments = []
    for place, item in enumerate(listed(read_json(annotations), str(annotations), "content")):
        where = f"{annotations}, item {place}"
        video, text, times = fields(item, ("video", "description", "times"), where)
        windows = stretches(times, where, "times")
        if not windows:
            raise AnnotationError(f"{where}: times is empty; a moment has at least one")
        first, last = max(windows, key=windows.count)
        moments.append((video, str(text).strip(), (first * UNIT, (last + 1) * UNIT)))
    return moments


def read_lsmdc(
    annotations: str | Path, root: str | Path, pattern: str = "{movie}/{id}.avi"
) -> Annotations:
    """Read an annotation file of LSMDC: clip, four times of day, caption, separated by tabs.

    root: folder of the clips, named by ``pattern`` after {id}, which ends with its times in the
    movie, and {movie}, the id without these.
    """
    found = _Captioned()
    for line, text in read_lines(annotations):
        cells = text.split("\t")
        if len(cells) not in (5, 6):  # a caption may be missing, and its tab with it
            raise AnnotationError(
                f"{annotations}, line {line}: {len(cells)} cells; expected clip, start and end "
                "aligned, start and end extracted, caption, separated by tabs"
            )
        movie = cells[0].rpartition("_")[0] or cells[0]
        path = file_of(root, pattern, id=cells[0], movie=movie)
        found.add(path, cells[5:], f"line {line}: {cells[0]}")
    return found.done(annotations)


def read_vatex(
    annotations: str | Path, root: str | Path, pattern: str = "{id}.mp4"
) -> Annotations:
    """Read a JSON file of VATEX: one entry per clip, with all its English captions.

    root: folder of the clips, named by ``pattern`` after {id}.
    """
    found = _Captioned()
    for place, item in enumerate(listed(read_json(annotations), str(annotations), "content")):
        where = f"{annotations}, item {place}"
        video, captions = fields(item, ("videoID", "enCap"), where)
        found.add(file_of(root, pattern, id=video), listed(captions, where, "enCap"), video)
    return found.done(annotations)


def paragraph(moments: Iterable[tuple[float, str]]) -> str:
    """Sentences (start, text) of a video as one text, in their order in time."""
    return " ".join(text for _, text in sorted(moments, key=lambda moment: moment[0]) if text)


class _Captioned:
    """Captioned videos found so far, and those without any words."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.left_out: list[str] = []

    def add(self, video: Path, captions: list, place: str, end: float | None = None) -> None:
        words = tuple(str(caption).strip() for caption in captions if str(caption).strip())
        if words:
            self.entries.append(Entry(video, captions=words, end=end))
        else:
            self.left_out.append(f"{place} has no caption")

    def done(self, path: str | Path) -> Annotations:
        report_left_out(path, self.left_out)
        return Annotations(self.entries, {}, tuple(self.left_out))


def _check_listed(
    chosen: Mapping[str, Any] | None, known: Iterable[str], videos: Any, annotations: str | Path
) -> None:
    """Refuse a list of videos that names others than the annotations know."""
    unknown = sorted(set(chosen or ()) - set(known))
    if unknown:
        raise AnnotationError(
            f"{videos}: {len(unknown)} videos are not in {annotations}, such as {unknown[0]!r}"
        )
