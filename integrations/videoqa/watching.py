"""Watch a video file as if it ran, and answer when it ends: streams for lmms-eval.

Benchmarks of streaming show the video up to the moment of the question, as a file that ends there.
Of several questions on one video, each file begins with the one before; a :class:`Watcher` then
goes on where it stopped instead of watching it all again.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F

from backbone.video import open_video, prefetched
from integrations.videoqa.frames import VideoClip
from integrations.videoqa.modeling import StreamformerLlavaForConditionalGeneration
from integrations.videoqa.session import StreamingSession

AHEAD = 16  # frames decoded ahead, and pushed at once
GRID = 8  # a frame is remembered as so many by so many mean colours
SAME = 3.0  # grey levels by which these differ, on average, in two encodings of one picture


class Watcher:
    """A stream of one video, in one or several files that begin alike.

    Args:
        model: with its tokenizer.
        fps: frames per second that the stream shows.
        last_frames: the baseline without memory, see ``session.StreamingSession``; 0 for none.
    """

    def __init__(
        self, model: StreamformerLlavaForConditionalGeneration, fps: float, last_frames: int = 0
    ) -> None:
        self.fps = fps
        self.session = StreamingSession(model, last_frames=last_frames or None, history="none")
        self._watched: list[np.ndarray] = []  # (GRID, GRID, 3) of each frame

    def watch(self, clip: VideoClip) -> None:
        """See the frames of a clip that have not been seen yet.

        Raises:
            backbone.video.VideoError: it cannot be read.
        """
        if self._watched and not self._begins_alike(clip):
            self._watched.clear()
            self.session.reset()
        frames = islice(self._frames(clip), len(self._watched), None)
        while chunk := list(islice(frames, AHEAD)):
            self._watched += [_grid(frame) for frame in chunk]
            self.session.push(np.stack(chunk))

    def ask(self, question: str, max_new_tokens: int, temperature: float = 0.0) -> str:
        """Answer by what has been watched; no question knows of another."""
        return self.session.ask(
            question, keep=False, max_new_tokens=max_new_tokens, temperature=temperature
        )

    def _frames(self, clip: VideoClip) -> Iterator[np.ndarray]:
        with open_video(clip.source, fps=self.fps, start=clip.start, end=clip.end) as reader:
            for frame in prefetched(reader, AHEAD):
                yield frame.image

    def _begins_alike(self, clip: VideoClip) -> bool:
        """Whether the clip shows what has been watched, and ends no earlier."""
        frames = self._frames(clip)
        try:
            for known in self._watched:
                frame = next(frames, None)
                if frame is None or np.abs(_grid(frame) - known).mean() > SAME:
                    return False
            return True
        finally:
            frames.close()


def _grid(frame: np.ndarray) -> np.ndarray:
    """Mean colours of a frame's parts, (GRID, GRID, 3) float32."""
    pixels = torch.from_numpy(frame).permute(2, 0, 1).float()
    return F.adaptive_avg_pool2d(pixels, GRID).permute(1, 2, 0).numpy()
