"""Training data in LLaVA's JSON: conversations about videos, images, or nothing, mixed at will.

    [{"id": …, "video": "a.mp4", "conversations": [{"from": "human", "value": "<image> What …?"},
                                                   {"from": "gpt", "value": "…"}, …]}, …]

``image`` instead of ``video``; a list of several; neither for text alone. JSON or JSON Lines. A
source may give a share of its records, as LLaVA-Video's mixes do (``first:10%``).

A video or image that cannot be read is left out of its batch and named there, so that the training
can count and report it; nothing takes its place. A record that is wrong in itself is an error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from backbone.video import VideoError
from integrations.videoqa import prompts
from integrations.videoqa.frames import preprocess, read_video
from integrations.videoqa.modeling import StreamformerLlavaForConditionalGeneration
from integrations.videoqa.splice import IGNORE_INDEX, IMAGE_TOKEN
from integrations.videoqa.visual import tile_image

KINDS = ("video", "image")
LEADING = re.compile(rf"(?:{IMAGE_TOKEN})*\n?")  # placeholders at the start of a text
SHARE = re.compile(r"(first|end|random):(\d+(?:\.\d+)?)(%?)")


class DataError(ValueError):
    """Training data that cannot be used; the text says which, and what to do."""


@dataclass(frozen=True)
class Source:
    """A file of records.

    Attributes:
        json: the file.
        root: folder that its videos and images are named from; None for the file's own.
        share: ``all``, or ``first:``, ``end:`` or ``random:`` with a number or percentage.
    """

    json: Path | str
    root: Path | str | None = None
    share: str = "all"


@dataclass(frozen=True)
class Record:
    """One conversation.

    Attributes:
        name: its id, and the file that it comes from.
        media: ``(kind, path)`` of each video or image, in the order of the placeholders.
        texts: human and model in turns.
    """

    name: str
    media: tuple[tuple[Literal["video", "image"], Path], ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Unreadable:
    """A video or image that could not be read, and why."""

    source: str
    reason: str


# -- reading ---------------------------------------------------------------------------------------


def read_records(sources: Iterable[Source], seed: int = 0) -> list[Record]:
    """All records of some sources, source after source.

    Args:
        sources: files and their shares.
        seed: of random shares.

    Raises:
        DataError: a file that cannot be read, a share that means nothing, a record that is wrong.
    """
    records: list[Record] = []
    for source in sources:
        path = Path(source.json)
        root = path.parent if source.root is None else Path(source.root)
        rows = _share(_rows(path), source.share, path, seed)
        records += [_record(row, number, path, root) for number, row in rows]
    if not records:
        raise DataError("no record to train on; name at least one file that holds some")
    return records


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON or JSON Lines: {error}") from error
    return rows


def _share(
    rows: Sequence[dict], share: str, path: Path, seed: int
) -> list[tuple[int, dict[str, Any]]]:
    """The share's rows with their numbers in the file, in its order."""
    numbered = list(enumerate(rows))
    if share == "all":
        return numbered
    match = SHARE.fullmatch(share)
    if match is None:
        raise DataError(
            f"{path}: share={share!r} means nothing; write all, first:10%, end:500 or random:5%"
        )
    how, amount, percent = match.groups()
    count = math.ceil(len(rows) * float(amount) / 100) if percent else int(float(amount))
    count = min(len(rows), count)
    if how == "random":
        return sorted(Random(f"{seed}/{path.name}").sample(numbered, count))
    return numbered[:count] if how == "first" else numbered[len(rows) - count :]


def _record(row: Mapping[str, Any], number: int, path: Path, root: Path) -> Record:
    name = f"{path.name}[{number}] ({row.get('id', 'without id')})"
    given = [kind for kind in KINDS if row.get(kind)]
    if len(given) > 1:
        raise DataError(f"{name} has both a video and an image; give one kind per record")
    files = row[given[0]] if given else []
    files = [files] if isinstance(files, str) else files
    media = tuple((given[0], root / file) for file in files)
    try:
        texts = prompts.read_conversation(row["conversations"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{name}: {error!s} in its conversations") from error
    if len(texts) % 2:
        raise DataError(f"{name} ends with a question; every question needs its answer")
    placed = sum(text.count(IMAGE_TOKEN) for text in texts)
    if placed not in (0, len(media)):
        raise DataError(f"{name} has {placed} placeholders {IMAGE_TOKEN} for {len(media)} visuals")
    if placed == 0:
        texts = [prompts.question_text(texts[0], len(media)), *texts[1:]]
    return Record(name, media, tuple(texts))


def pack_turns(records: Sequence[Record], most: int) -> list[Record]:
    """Join conversations about the same video or image, up to ``most`` questions each.

    A video's tokens are then computed once for many answers. Records of several visuals and of none
    stay as they are; the order is that of first mention.
    """
    if most < 1:
        raise DataError(f"at most {most} questions a conversation leaves none; give 1 or more")
    packed: dict[Any, list[Record]] = {}
    for number, record in enumerate(records):
        key = record.media if len(record.media) == 1 else number
        group = packed.setdefault(key, [record])
        if group[-1] is record:
            continue
        if (len(group[-1].texts) + len(record.texts)) // 2 > most:
            group.append(record)
            continue
        first, *others = record.texts
        further = first.removeprefix(f"{IMAGE_TOKEN}\n").removeprefix(IMAGE_TOKEN)
        group[-1] = replace(group[-1], texts=(*group[-1].texts, further, *others))
    return [record for group in packed.values() for record in group]


# -- samples ---------------------------------------------------------------------------------------


def with_times(text: str, times: str | None) -> str:
    """A question with the sentence on the frames' times, behind the placeholders that open it."""
    if not times:
        return text
    opening = LEADING.match(text).end()
    return f"{text[:opening]}{times}\n{text[opening:]}"


@dataclass(frozen=True)
class Encoded:
    """What the tower made of a visual: tokens ``(T, N, D)``; of an image, its (width, height)."""

    tokens: Tensor
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Vision:
    """How videos and images become pixels: what worker processes know of a model.

    Attributes:
        size, mean, std: of the tower's input.
        image_layout, grid_pinpoints: see ``StreamformerLlavaConfig``.
        num_frames, video_fps, force_sample, time_instruction: likewise.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_layout: str
    grid_pinpoints: tuple[tuple[int, int], ...]
    num_frames: int
    video_fps: float
    force_sample: bool
    time_instruction: bool

    @classmethod
    def of(cls, model: StreamformerLlavaForConditionalGeneration) -> Vision:
        """As the model's tower and config have it now."""
        encoder, config = model.tower.encoder, model.config
        return cls(
            encoder.image_size,
            tuple(encoder.image_mean),
            tuple(encoder.image_std),
            config.image_layout,
            tuple((width, height) for width, height in config.grid_pinpoints),
            config.num_frames,
            config.video_fps,
            config.force_sample,
            config.time_instruction,
        )

    def read(self, kind: str, path: Path) -> tuple[Tensor, tuple[int, int] | None, str | None]:
        """Pixels of a visual, an image's size, and the sentence on a video's times, if wanted.

        Pixels are ``(T, 3, size, size)`` float32: frames, or the whole image and its tiles.

        Raises:
            VideoError, OSError: it cannot be read.
        """
        if kind == "video":
            frames, sampling = read_video(path, self.num_frames, self.video_fps, self.force_sample)
            told = None
            if self.time_instruction:
                told = prompts.time_sentence(sampling.duration, sampling.times_text, len(frames))
            return preprocess(frames, self.size, self.mean, self.std), None, told
        with Image.open(path) as image:
            picture = image.convert("RGB")
        if self.image_layout == "square":
            tiles: Any = [picture]
        else:
            tiles = tile_image(picture, self.grid_pinpoints, self.size)
        return preprocess(tiles, self.size, self.mean, self.std), picture.size, None


class Conversations(Dataset):
    """Records as `forward` takes them, one by one.

    Args:
        records: see `read_records`.
        vision: how pixels are made.
        tokenizer: a fast one.
        template: of prompts.
        released_targets: see ``prompts.training_ids``.
        features: by path, tower tokens ``(T, N, D)`` and an image's size, where they are known
            already; then no file is read. See ``tokens.encode_visuals``.
    """

    def __init__(
        self,
        records: Sequence[Record],
        vision: Vision,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        released_targets: bool = False,
        features: Mapping[Path, Encoded | Unreadable] | None = None,
    ) -> None:
        self.records, self.vision, self.tokenizer = list(records), vision, tokenizer
        self.template, self.released_targets = template, released_targets
        self.features = features
        if features is not None and vision.time_instruction:
            raise DataError(
                "time_instruction needs the frames' times, which stored features do not have; "
                "switch one of them off"
            )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any] | Unreadable:
        record = self.records[index]
        visuals, sizes, times = [], [], None
        for kind, path in record.media:
            if self.features is not None:
                known = self.features[path]
                if isinstance(known, Unreadable):
                    return known
                visuals.append(known.tokens)
                sizes.append(known.size)
                continue
            try:
                pixels, size, told = self.vision.read(kind, path)
            except (OSError, VideoError) as error:
                return Unreadable(str(path), str(error))
            visuals.append(pixels)
            sizes.append(size)
            times = times or told
        first, *others = record.texts
        ids, labels = prompts.training_ids(
            [with_times(first, times), *others],
            self.template,
            self.tokenizer,
            self.released_targets,
        )
        return {
            "input_ids": ids,
            "labels": labels,
            "visuals": visuals,
            "modalities": [kind for kind, _ in record.media],
            "image_sizes": sizes,
        }


def collate(
    samples: Sequence[dict[str, Any] | Unreadable], *, pad_id: int, side: str, stored: bool
) -> dict[str, Any]:
    """A batch for `forward`, and under ``unreadable`` what was left out of it.

    If nothing is left, the batch is one token that teaches nothing: other processes wait for this
    one's gradients.

    Args:
        samples: of `Conversations`.
        pad_id: fills up shorter rows.
        side: on which they are padded.
        stored: whether the visuals are features rather than pixels.
    """
    lost = [sample for sample in samples if isinstance(sample, Unreadable)]
    kept = [sample for sample in samples if not isinstance(sample, Unreadable)]
    ids = [sample["input_ids"] for sample in kept] or [torch.tensor([pad_id])]
    labels = [sample["labels"] for sample in kept] or [torch.tensor([IGNORE_INDEX])]

    def padded(rows: list[Tensor], value: int) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

    visuals = [part for sample in kept for part in sample["visuals"]]
    return {
        "input_ids": padded(ids, pad_id),
        "labels": padded(labels, IGNORE_INDEX),
        "attention_mask": padded([torch.ones_like(row) for row in ids], 0),
        "visual_features" if stored else "pixel_values": visuals,
        "modalities": [kind for sample in kept for kind in sample["modalities"]],
        "image_sizes": [size for sample in kept for size in sample["image_sizes"]],
        "unreadable": [(item.source, item.reason) for item in lost],
    }
