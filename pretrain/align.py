"""Texts against a video, at the three granularities that training aligned: clip, frame, patch.

The same features and the same cosine similarity as in the objectives: a clip is its last frame's
embedding, a frame its own, a patch its token in the space of frame embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from backbone import VideoEncoder, video
from pretrain.alignment import similarity
from pretrain.text import TextTower


@dataclass(frozen=True)
class Alignment:
    """Cosine similarity, float32, of `C` texts with a clip, its `T` frames and `h w` patches."""

    texts: tuple[str, ...]
    clip: Tensor  # (C,)
    frames: Tensor  # (T, C)
    patches: Tensor  # (T, h, w, C)

    def probabilities(self, scale: float, bias: float) -> Alignment:
        """The same with the probability that each text fits, ``sigmoid(scale * cosine + bias)``.

        scale and bias are those of the sigmoid loss that the encoder was trained with; scale is
        the factor itself, not its logarithm.
        """
        levels = (self.clip, self.frames, self.patches)
        return Alignment(self.texts, *(torch.sigmoid(scale * level + bias) for level in levels))


@torch.no_grad()
def align(
    encoder: VideoEncoder, tower: TextTower, frames: np.ndarray | Tensor, texts: Sequence[str]
) -> Alignment:
    """Say how well each text fits a clip, each of its frames, and each patch of each frame.

    encoder, tower: of the same SigLIP model, or trained towards its texts.
    frames: one clip (T, H, W, 3) uint8 RGB, in order; cropped to the encoder's square.
    texts: as they are; no prompt is put around them.

    Raises ValueError without frames or texts, for an empty text, and for an encoder and a tower of
    different widths; VideoError for frames of another shape or type.
    """
    if not len(frames) or not texts:
        raise ValueError(f"{len(frames)} frames and {len(texts)} texts: give at least one of each")
    clip = video.preprocess(frames, encoder.image_size, encoder.image_mean, encoder.image_std)
    features = encoder.encode(clip[None])  # (1, T, N, D) and (1, T, D)
    embedded = tower.embed(texts).to(encoder.device)  # (C, D)
    side = encoder.image_size // encoder.patch_size
    by_frame = similarity(features.frame_embeddings, embedded)[0].cpu()  # (T, C)
    by_patch = similarity(features.patch_embeddings(), embedded)[0].cpu()  # (T, N, C)
    return Alignment(
        texts=tuple(texts),
        clip=by_frame[-1],
        frames=by_frame,
        patches=by_patch.unflatten(1, (side, side)),
    )
