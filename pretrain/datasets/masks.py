"""Where the masks of a video's frames are, and what their numbers mean."""

from __future__ import annotations

from typing import Protocol

import numpy as np

BACKGROUND = -1  # no annotated thing is here
IGNORE = -2  # nothing is known about this pixel


class MaskSource(Protocol):
    """Masks of one video, read when its frames are."""

    def read(self, frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Masks of ``frames``, numbers within the video, (T,), scaled to ``size`` (H, W).

        Returns (T, H, W) int32: number of a label within the entry's label set, `BACKGROUND` where
        no annotated thing is, `IGNORE` where nothing is known. Raises ClipError for masks that are
        missing, damaged or of another shape than the frames.
        """
