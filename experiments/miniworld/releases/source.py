"""What releases are made from: some videos of a world, and how they get to their new places.

Names are made up in each data set's own style (`youtube_id`), from the video's name in the world,
so that a reader meets what it will meet: ids that start with a minus or a digit, prefixes, folders.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from experiments.miniworld.writers import write_still

SPLITS = ("train", "val")
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Video:
    """A video of the world, its line of the index, and its YouTube-VIS annotations."""

    path: Path
    record: Mapping
    annotations: tuple[Mapping, ...]

    @property
    def name(self) -> str:
        """Its id in the world."""
        return self.record["id"]

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.record["frames"] / self.record["fps"]

    @property
    def captions(self) -> list[str]:
        """What may be said of it."""
        return self.record["captions"]

    @property
    def youtube_id(self) -> str:
        """Eleven characters, as YouTube's."""
        return base64.urlsafe_b64encode(self._digest).decode()[:11]

    @property
    def code(self) -> str:
        """Five capital letters and digits, as Charades'."""
        return base64.b32encode(self._digest).decode()[:5]

    @property
    def _digest(self) -> bytes:
        return hashlib.sha256(self.name.encode()).digest()

    def frames(self) -> np.ndarray:
        """All pictures, ``(L, H, W, 3)`` uint8."""
        with av.open(str(self.path)) as container:
            return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


@dataclass(frozen=True)
class Source:
    """Videos of a world by split: clips, clips that end with their only action, and streams."""

    clips: Mapping[str, Sequence[Video]]
    endings: Mapping[str, Sequence[Video]]
    streams: Mapping[str, Sequence[Video]]


def read_source(world: Path, videos: int) -> Source:
    """Up to ``videos`` of each kind and split, spread over the world.

    Raises FileNotFoundError where ``world`` is not a rendered world, ValueError where ``videos`` is
    below 1 or a split has none.
    """
    if not (world / "world.json").is_file():
        raise FileNotFoundError(f"{world} is not a rendered world: it holds no world.json")
    if videos < 1:
        raise ValueError(f"videos={videos} must be at least 1")
    clips, endings, streams = {}, {}, {}
    for split in SPLITS:
        found = _read(world / "clips", lambda name, split=split: name == split)
        clips[split] = _spread(found, videos)
        endings[split] = _spread([video for video in found if _ends_in_action(video)], videos)
        streams[split] = _spread(
            _read(world / "streams", lambda name, split=split: name.startswith(split)), videos
        )
    source = Source(clips, endings, streams)
    for kind in ("clips", "endings", "streams"):
        for split, some in getattr(source, kind).items():
            if not some:
                raise ValueError(f"{world} has no {kind} in split {split!r}; render some")
    return source


def _read(home: Path, wanted) -> list[Video]:
    records = [json.loads(line) for line in (home / "index.jsonl").read_text().splitlines()]
    records = [record for record in records if wanted(record["split"])]
    annotations: dict[str, list[Mapping]] = {record["id"]: [] for record in records}
    for split in sorted({record["split"] for record in records}):
        document = json.loads((home / f"instances_{split}.json").read_text())
        names = {video["id"]: Path(video["file_name"]).stem for video in document["videos"]}
        for annotation in document["annotations"]:
            annotations[names[annotation["video_id"]]].append(annotation)
    return [
        Video(home / "videos" / f"{r['id']}.mp4", r, tuple(annotations[r["id"]])) for r in records
    ]


def _ends_in_action(video: Video) -> bool:
    actions = video.record["actions"]
    return len(actions) == 1 and actions[0]["end_frame"] == video.record["frames"]


def _spread(found: list[Video], videos: int) -> list[Video]:
    chosen = np.unique(np.linspace(0, len(found) - 1, min(videos, len(found))).round().astype(int))
    return [found[i] for i in chosen]


class Moment(NamedTuple):
    """What happens once in a video, and when (seconds)."""

    start: float
    end: float
    text: str


def moments(video: Video) -> list[Moment]:
    """What may be said of a video that happens in it exactly once, in the order of time."""
    return sorted(
        Moment(*query["windows"][0], query["text"])
        for query in video.record["queries"]
        if len(query["windows"]) == 1
    )


def sentence(text: str) -> str:
    """With a capital letter and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


def looks(thing: Mapping) -> str:
    """What an object of the index looks like, whatever its size."""
    return f"{'hidden' if thing['camouflaged'] else thing['colour']} {thing['shape']}"


def place(video: Video, path: Path) -> None:
    """Bring a video to ``path``, in the container that its suffix names; pictures stay the same.

    A hard link where that is all it takes; other packets for .avi and .mkv, other (lossless)
    coding for .webm, which allows no H.264. Raises FileExistsError where something is there.
    """
    if path.exists():
        raise FileExistsError(f"{path} is taken; {video.name} needs another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".webm":
        _transcode(video.path, path)
    elif path.suffix == video.path.suffix:
        try:
            os.link(video.path, path)
        except OSError:  # another file system, or one without links
            shutil.copyfile(video.path, path)
    else:
        _remux(video.path, path)


def _remux(source: Path, target: Path) -> None:
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        pictures = old.streams.video[0]
        stream = new.add_stream_from_template(pictures)
        # AVI wants H.264 as it is broadcast, with its headers inside.
        name = "h264_mp4toannexb" if target.suffix == ".avi" else "null"
        convert = av.BitStreamFilterContext(name, pictures)
        for packet in old.demux(pictures):
            for ready in convert.filter(packet if packet.dts is not None else None):
                ready.stream = stream
                new.mux(ready)


def _transcode(source: Path, target: Path) -> None:
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        rate = old.streams.video[0].average_rate
        stream = new.add_stream("libvpx-vp9", rate=rate)
        stream.options = {"lossless": "1", "deadline": "realtime", "cpu-used": "8"}
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(old.decode(video=0)):
            if number == 0:
                stream.width, stream.height = frame.width, frame.height
                stream.pix_fmt = frame.format.name
            frame.pts, frame.time_base = number, Fraction(1) / rate
            new.mux(stream.encode(frame))
        new.mux(stream.encode())


def place_images(video: Video, folder: Path, step: int = 1) -> list[str]:
    """The pictures of a video as ``<folder>/<number>.jpg``, numbers ``step`` apart; their stems."""
    stems = [f"{number * step:05d}" for number in range(video.record["frames"])]
    folder.mkdir(parents=True)
    for stem, image in zip(stems, video.frames(), strict=True):
        write_still(folder / f"{stem}.jpg", image, JPEG_QUALITY)
    return stems
