"""The sizes of miniworld: one frozen record that decides every byte of a rendered world."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

# Raise it whenever rendering changes in any way: worlds of another version are never reused.
RENDER_VERSION = 10


@dataclass(frozen=True)
class WorldParams:
    """Everything that decides a world: same parameters, same bytes.

    Lengths in pixels (``jitter``) refer to the frame as rendered; sizes of shapes and
    distances of moves follow ``frame_size``. Raises ValueError for an impossible value.
    """

    seed: int = 0
    frame_size: int = 32  # pixels, height and width; even, as H.264 4:2:0 needs
    fps: int = 8

    stills_train: int = 6000
    stills_val: int = 500
    stills_single: float = 0.5  # share of stills that show one shape only

    clips_train: int = 3000
    clips_train_long: int = 600
    clips_val: int = 300
    clips_val_long: int = 60
    clip_frames: int = 16
    long_clip_frames: int = 48  # longer than the model's time table: trains what streaming meets

    streams_train: int = 192
    streams_val: int = 24
    streams_val_long: int = 6
    streams_test: int = 48
    streams_test_long: int = 12
    stream_frames: int = 160
    long_stream_frames: int = 768
    scene_frames: tuple[int, int] = (110, 220)  # a stream cuts to a new scene this often

    action_frames: tuple[int, int] = (6, 14)  # shortest and longest action
    background: tuple[float, float] = (0.35, 0.45)  # share of frames of a stream at rest
    overlap: float = 0.12  # share of actions in streams that start before the last one ended
    camouflaged: float = 0.15  # share of shapes made of the background's texture
    jitter: float = 0.35  # standard deviation of the camera's shake, pixels
    flicker: float = 0.03  # standard deviation of the brightness of a frame, relative
    noise: float = 0.012  # standard deviation of sensor noise, of full scale
    crf: int = 10  # x264 constant rate factor
    jpeg_quality: int = 95

    def __post_init__(self) -> None:
        for name in ("scene_frames", "action_frames", "background"):  # JSON brings lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        problems = [text for wrong, text in self._checks() if wrong]
        if problems:
            raise ValueError("WorldParams cannot be rendered: " + "; ".join(problems))

    def _checks(self) -> list[tuple[bool, str]]:
        counts = [name for name in self.__dataclass_fields__ if name.startswith(_COUNTED)]
        shares = ("stills_single", "overlap", "camouflaged")
        spreads = ("jitter", "flicker", "noise")
        low, high = self.action_frames
        return [
            *((getattr(self, n) < 0, f"{n}={getattr(self, n)} must not be negative")
              for n in counts),
            *((not 0 <= getattr(self, n) <= 1, f"{n}={getattr(self, n)} must lie in 0..1")
              for n in shares),
            *((getattr(self, n) < 0, f"{n}={getattr(self, n)} must not be negative")
              for n in spreads),
            (self.frame_size < 16 or self.frame_size % 2 == 1,
             f"frame_size={self.frame_size} must be even and at least 16"),
            (self.fps < 1, f"fps={self.fps} must be at least 1"),
            (not 4 <= low <= high, f"action_frames={self.action_frames} must rise from 4 or more"),
            (self.clip_frames < 2 * low + 2,
             f"clip_frames={self.clip_frames} must hold two actions of {low} frames and a rest"),
            (self.long_clip_frames < self.clip_frames,
             f"long_clip_frames={self.long_clip_frames} must reach "
             f"clip_frames={self.clip_frames}"),
            (self.stream_frames < 4 * high,
             f"stream_frames={self.stream_frames} must be at least four times the longest "
             f"action ({high})"),
            (self.long_stream_frames <= self.stream_frames,
             f"long_stream_frames={self.long_stream_frames} must exceed "
             f"stream_frames={self.stream_frames}"),
            (not 2 * high <= self.scene_frames[0] <= self.scene_frames[1],
             f"scene_frames={self.scene_frames} must rise from {2 * high} or more"),
            (not 0.2 <= self.background[0] <= self.background[1] <= 0.8,
             f"background={self.background} must rise within 0.2..0.8"),
            (not 0 <= self.crf <= 51, f"crf={self.crf} must lie in 0..51"),
            (not 1 <= self.jpeg_quality <= 100,
             f"jpeg_quality={self.jpeg_quality} must lie in 1..100"),
        ]


_COUNTED = ("stills_train", "stills_val", "clips_", "streams_")


def world_key(params: WorldParams) -> str:
    """Digest (16 hex digits) of the parameters and of the version of the renderer."""
    text = json.dumps({"version": RENDER_VERSION, **asdict(params)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def seed_of(*parts: object) -> int:
    """A seed that depends on what is drawn, never on when or by which process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big")
