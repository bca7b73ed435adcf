"""Sentences and when they hold: Charades-STA, QVHighlights, TaCoS, ActivityNet Captions, DiDeMo,
QuerYD. One entry per sentence; its stretches have the label 0, and the sentence is its caption.

`read_grounding` reads the released tables, CSV files with the columns of `localization`, text being
the sentence. The others read what the data sets' own authors, or those who brought the task to
them, publish:

    Charades-STA   text, "<video> 24.3 30.4##a person turns the light on." a line
    QVHighlights   JSON lines {"qid": 9769, "query": "…", "duration": 150, "vid": "…",
                   "relevant_windows": [[96, 114], …], …}
    TaCoS          JSON {"s13-d21.avi": {"fps": 29.4, "num_frames": 7084,
                   "timestamps": [[252, 452], …], "sentences": ["…", …]}}, in frames
    ActivityNet    as for retrieval, see `captions`
    DiDeMo         as for retrieval, see `captions`
    QuerYD         two files {"video-<id>": […]}: captions, each a text or a list of words, and
                   their times [start, end]; published as pickles, read as these or as JSON
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.datasets.base import Annotations, Entry, Segment
from pretrain.datasets.captions import (
    TRIMMED,
    activitynet_moments,
    didemo_moments,
    in_pairs,
)
from pretrain.datasets.localization import COLUMNS, PREFIXES, row_windows
from pretrain.datasets.tables import (
    AnnotationError,
    fields,
    file_of,
    listed,
    mapping,
    read_json,
    read_json_lines,
    read_lines,
    read_names,
    read_rows,
    report_left_out,
    root_of,
    seconds,
    stretches,
    usable,
    with_suffix,
)

CAMERA = "-cam-002.avi"  # of the several that TaCoS was filmed with


def read_grounding(
    annotations: str | Path, root: str | Path | Mapping[str, str | Path]
) -> Annotations:
    """Read a released table of sentences and their stretches.

    annotations: the CSV file. root: folder of the videos, or one per data set. Rows without words,
    or without a stretch that has a length, are left out and reported.
    """
    found = _Moments()
    for line, row in read_rows(annotations, COLUMNS):
        dataset, video = row["dataset"], row["video_id"]
        if dataset == "TaCoS":
            file = Path(video).stem + CAMERA
        else:
            file = with_suffix(PREFIXES.get(dataset, "") + video, ".mp4")
        windows = row_windows(row, annotations, line)
        path = root_of(root, dataset, annotations) / file
        found.add(path, row["text"], windows, f"line {line}: {video}")
    return found.done(annotations)


def read_charades_sta(
    annotations: str | Path, root: str | Path, pattern: str = "{id}.mp4"
) -> Annotations:
    """Read a text file of Charades-STA. root: folder of the videos, named by ``pattern``."""
    found = _Moments()
    for line, text in read_lines(annotations):
        place, marks, query = text.partition("##")
        cells = place.split()
        if not marks or len(cells) != 3:
            raise AnnotationError(
                f"{annotations}, line {line}: {text[:60]!r} is not '<video> <start> <end>##<query>'"
            )
        video, where = cells[0], f"{annotations}, line {line}"
        window = (seconds(cells[1], where, "start"), seconds(cells[2], where, "end"))
        found.add(file_of(root, pattern, id=video), query, [window], f"line {line}: {video}")
    return found.done(annotations)


def read_qvhighlights(
    annotations: str | Path, root: str | Path, pattern: str = "{id}.mp4"
) -> Annotations:
    """Read a file of QVHighlights; a query may have several windows.

    root: folder of the videos, named by ``pattern`` after {id}. The test split, which has no
    windows, is refused.
    """
    found = _Moments()
    names = ("vid", "query", "duration", "relevant_windows")
    for line, item in read_json_lines(annotations):
        where = f"{annotations}, line {line}"
        video, query, duration, windows = fields(item, names, where)
        found.add(
            file_of(root, pattern, id=video),
            query,
            stretches(windows, where, "relevant_windows"),
            f"line {line}: {video}",
            seconds(duration, where, "duration"),
        )
    return found.done(annotations)


def read_tacos(
    annotations: str | Path, root: str | Path, pattern: str = "{stem}" + CAMERA
) -> Annotations:
    """Read a JSON file of TaCoS, whose timestamps are numbers of frames.

    root: folder of the videos, named by ``pattern`` after {id}, the name as it stands, such as
    s13-d21.avi, and {stem}, the name without suffix.
    """
    found = _Moments()
    for video, item in mapping(read_json(annotations), str(annotations), "content").items():
        where = f"{annotations}, video {video!r}"
        names = ("fps", "num_frames", "timestamps", "sentences")
        rate, length, times, sentences = fields(item, names, where)
        fps = seconds(rate, where, "fps")
        if not fps > 0:
            raise AnnotationError(f"{where}: fps={rate!r} must be positive")
        texts = listed(sentences, where, "sentences")
        duration = seconds(length, where, "num_frames") / fps
        path = file_of(root, pattern, id=video, stem=Path(video).stem)
        for start, end, text in in_pairs(stretches(times, where, "timestamps"), texts, where):
            found.add(path, text, [(start / fps, end / fps)], video, duration)
    return found.done(annotations)


def read_activitynet_moments(
    annotations: str | Path, root: str | Path, pattern: str = "{id}.mp4"
) -> Annotations:
    """Read ActivityNet Captions for grounding. root: folder of the videos, named by ``pattern``."""
    found = _Moments()
    for video, length, moments in activitynet_moments(annotations):
        duration = seconds(length, f"{annotations}, video {video!r}", "duration")
        path = file_of(root, pattern, id=video)
        for start, end, text in moments:
            found.add(path, text, [(start, end)], video, duration)
    return found.done(annotations)


def read_didemo_moments(
    annotations: str | Path, root: str | Path, pattern: str = "{id}"
) -> Annotations:
    """Read DiDeMo for grounding, in pieces of five seconds within the first thirty.

    root: folder of the videos, named by ``pattern`` after {id}, the name with suffix, and {stem},
    the name without.
    """
    found = _Moments()
    for video, text, window in didemo_moments(annotations):
        path = file_of(root, pattern, id=video, stem=Path(video).stem)
        found.add(path, text, [window], video, end=TRIMMED["DiDeMo"])
    return found.done(annotations)


def read_queryd(
    annotations: str | Path,
    times: str | Path,
    root: str | Path,
    videos: str | Path | None = None,
    pattern: str = "{id}.mp4",
) -> Annotations:
    """Read QuerYD's captions and their times.

    annotations, times: raw_captions_combined_filtered and times_captions_combined_filtered, .pkl or
    .json. root: folder of the videos, named by ``pattern`` after {id}. videos: a list of the ids to
    take, one a line, such as train_list.txt.
    """
    captions, windows = (
        mapping(_plain(path), str(path), "content") for path in (annotations, times)
    )
    chosen = list(captions) if videos is None else list(read_names(videos, "video_id"))
    found = _Moments()
    for video in chosen:
        where = f"{annotations}, video {video!r}"
        (said,) = fields(captions, (video,), str(annotations))
        (when,) = fields(windows, (video,), str(times))
        texts = [
            " ".join(map(str, text)) if isinstance(text, list) else text
            for text in listed(said, where, "captions")
        ]
        pairs = stretches(when, f"{times}, video {video!r}", "times")
        for start, end, text in in_pairs(pairs, texts, where):
            found.add(file_of(root, pattern, id=video), text, [(start, end)], video)
    return found.done(annotations)


class _Moments:
    """Sentences with their stretches found so far, and those that cannot be trained on."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.left_out: list[str] = []

    def add(
        self,
        video: Path,
        query: Any,
        windows: Sequence[tuple[float, float]],
        place: str,
        duration: float | None = None,
        end: float | None = None,
    ) -> None:
        """Windows are seconds; ``duration`` is the video's, ``end`` what of it may be seen."""
        query = str(query).strip()
        kept = usable(windows, place, self.left_out, duration)
        if not query:
            self.left_out.append(f"{place} has no caption")
        elif kept:
            self.entries.append(
                Entry(
                    video,
                    segments=tuple(Segment(0, *window) for window in kept),
                    captions=(query,),
                    end=end,
                    focus=(min(start for start, _ in kept), max(stop for _, stop in kept)),
                )
            )

    def done(self, path: str | Path) -> Annotations:
        report_left_out(path, self.left_out)
        return Annotations(self.entries, {}, tuple(self.left_out))


class _PlainUnpickler(pickle.Unpickler):
    """Takes lists, dicts, texts and numbers; whatever needs code is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def _plain(path: str | Path) -> Any:
    """Content of a JSON file, or of a pickle of nothing but plain values."""
    if Path(path).suffix not in (".pkl", ".pickle"):
        return read_json(path)
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError) as error:
        raise AnnotationError(
            f"{path}: is no pickle of lists, dicts, texts and numbers alone ({error}); write it "
            "as JSON"
        ) from error
