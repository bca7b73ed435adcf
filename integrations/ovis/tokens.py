"""The encoder's tokens of whole videos, computed once and kept, and clips that bring them along.

Nothing flows from the adapter into the frozen encoder, so its tokens are those of the video
whatever is trained on them. They are written as a stream gives them, every frame after all those
before it; a clip of some frames of the video then holds exactly what these frames get online.

    FOLDER/tokens.json           what made them: encoder, layers, size of the frames
    FOLDER/<video>.safetensors   "layer<k>": (T, N, D) for each layer that is read
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from backbone import VideoEncoder
from backbone.files import read_json, replacing, write_json
from integrations.ovis.adapter import STRIDE
from integrations.ovis.data import ClipKey, ClipSource, VideoClips, collate_clips, read_video
from integrations.ovis.layout import VideoSet

FACTS = "tokens.json"
CHUNK = 16  # frames that the encoder takes at once: speed and memory only


class TokenError(ValueError):
    """Tokens that are missing, or made otherwise than they are to be read."""


def write_tokens(
    encoder: VideoEncoder,
    taps: Sequence[int],
    videos: VideoSet,
    folder: str | Path,
    short: int,
    longest: int = 1333,
) -> Path:
    """Write the tokens of all videos that are not there yet.

    Args:
        encoder: frozen.
        taps: its layers, ``ViTAdapter.taps``.
        videos: of one size, since padding to others of a batch would change tokens.
        folder: for these videos, this encoder and this size alone.
        short: pixels of the frames' short side.
        longest: the long side never gets longer.

    Raises:
        TokenError: the folder holds others, or the videos are of several sizes.
    """
    folder = Path(folder)
    sizes = sorted({(video.height, video.width) for video in videos.videos})
    if len(sizes) > 1:
        raise TokenError(
            f"{videos.name} has videos of {len(sizes)} sizes, such as {sizes[0]} and {sizes[-1]} "
            "(height, width); tokens are kept of videos of one size: set data.stored=False"
        )
    facts = describe(encoder, taps, short, longest)
    if (folder / FACTS).is_file():
        check(folder, facts)
    else:
        write_json(folder / FACTS, facts)
    missing = [video for video in videos.videos if not _file(folder, video.id).is_file()]
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (encoder.image_mean, encoder.image_std)
    )
    for video in tqdm(missing, desc="tokens", unit="video", disable=not missing, leave=False):
        frames = torch.stack(list(read_video(video, videos.root, short, longest)))
        frames = _padded((frames.float() / 255 - mean) / std, encoder.patch_size)  # (T, 3, H, W)
        stream = encoder.stream(layers=taps)
        parts = [stream.push(part[None]).layers for part in frames.split(CHUNK)]
        state = {
            f"layer{tap}": torch.cat([part[tap][0] for part in parts]).cpu().contiguous()
            for tap in dict.fromkeys(taps)
        }
        with replacing(_file(folder, video.id)) as temporary:
            save_file(state, temporary)
    return folder


def describe(
    encoder: VideoEncoder, taps: Sequence[int], short: int, longest: int
) -> dict[str, Any]:
    """What decides the tokens of a video, as JSON values."""
    return {
        "encoder": encoder.settings(),
        "taps": list(taps),
        "short": short,
        "longest": longest,
    }


def check(folder: Path, facts: Mapping[str, Any]) -> None:
    """Refuse a folder of tokens that were made otherwise."""
    path = folder / FACTS
    if not path.is_file():
        raise TokenError(f"{folder} holds no tokens ({FACTS} is missing): write_tokens first")
    found = read_json(path)
    for key in sorted(found.keys() | facts.keys()):
        if found.get(key) != facts.get(key):
            raise TokenError(
                f"{path}: {key} is {found.get(key)!r} there and {facts.get(key)!r} now; use "
                "another folder"
            )


def read_tokens(folder: Path, video: int, frames: Sequence[int]) -> dict[int, Tensor]:
    """Tokens ``(t, N, D)`` of some frames of a video, by layer.

    Raises:
        TokenError: there are none of this video.
    """
    path = _file(folder, video)
    if not path.is_file():
        raise TokenError(f"{folder} has no tokens of video {video}: write_tokens first")
    rows = [int(frame) for frame in frames]
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        slices = {name: file.get_slice(name) for name in names}
        return {
            int(name.removeprefix("layer")): torch.stack([part[row] for row in rows])
            for name, part in slices.items()
        }


class TokenClips(VideoClips):
    """Clips as of :class:`VideoClips`, with the tokens of their frames as ``"layers"``."""

    def __init__(self, sources: Sequence[ClipSource], folder: str | Path, seed: int = 0) -> None:
        super().__init__(sources, seed)
        self.folder = Path(folder)

    def __getitem__(self, key: ClipKey) -> dict[str, Any]:
        """Read one clip and its tokens."""
        item = super().__getitem__(key)
        item["layers"] = read_tokens(self.folder, item["video_id"], item["numbers"].tolist())
        return item


def collate_tokens(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items of :class:`TokenClips` as ``model.ClipPreprocessor`` takes them."""
    batch = collate_clips(items)
    taps = items[0]["layers"]
    batch["inputs"]["layers"] = {tap: [item["layers"][tap] for item in items] for tap in taps}
    return batch


def _padded(frames: Tensor, patch_size: int) -> Tensor:
    """Zeros right and below, as ``model.ClipPreprocessor`` adds them."""
    multiple = math.lcm(STRIDE, patch_size)
    height, width = (-side % multiple for side in frames.shape[-2:])
    return F.pad(frames, (0, width, 0, height))


def _file(folder: Path, video: int) -> Path:
    return folder / f"{video}.safetensors"
