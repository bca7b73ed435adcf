"""Windows over a video, and the two inference protocols of online action detection.

Index rules and protocols are those of MAT (ICCV 2023), which took them from LSTR (NeurIPS 2021).
A video has T feature steps. A window that starts at step s has its work memory in s..e-1 with
e = s + W, its long memory before s, and its anticipation tokens at e and after:

    max(0, s - L) ............ s-1 | s ...... e-1 | e ........ e+A-1
    long memory, sampled           | work memory  | anticipation         (L, W, A in steps here)

*Online protocol* (what the MAT paper reports): one window per step; its newest work token scores
the newest step, its anticipation tokens score the steps to come. Causal.
*Window protocol* (what StreamFormer reports): windows side by side, all tokens scored. Its early
work tokens have seen later steps and its anticipation tokens count as detections, so compare it
with nothing but itself.

All windows are computed as at batch size 1: each decides its long-memory path for itself, whatever
``MatConfig.long_grouping`` says about training batches.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from integrations.oad.losses import probabilities
from integrations.oad.mat import Embedded, MatHead, Questions
from integrations.oad.mat_config import MatConfig

Softmax = Literal["trained", "released"]
Opening = Literal["window", "short"]

# --------------------------------------------------------------------------- index rules


def train_windows(length: int, config: MatConfig, offset: int = 0) -> range:
    """Starts of the windows of a video of ``length`` steps, side by side from ``offset`` on.

    Training draws the offset anew from 0..W-1 each epoch; evaluation uses 0. Kept while
    ``start + W < length - A``, a strict comparison as in the release: a window that would end
    exactly with the video is dropped.
    """
    span = config.work_steps + config.anticipation_steps
    return range(offset, max(offset, length - span), span)


def work_indices(start: int, config: MatConfig) -> np.ndarray:
    """Steps of work memory (W,) int64; at a rate r its last r - 1 steps are not read."""
    return np.arange(start, start + config.work_steps, config.work_rate)


def detection_indices(start: int, config: MatConfig) -> np.ndarray:
    """Target rows of all work and anticipation tokens (W + A,) int64."""
    end = start + config.work_steps
    ahead = np.arange(end, end + config.anticipation_steps, config.anticipation_rate)
    return np.concatenate([work_indices(start, config), ahead])


def future_indices(start: int, config: MatConfig, length: int) -> np.ndarray:
    """Target rows of the future tokens (F,) int64; past the video's end the last row repeats.

    They begin at e + 1, one step later than the anticipation tokens, as the release was trained.
    """
    first = start + config.work_steps + 1
    return np.minimum(np.arange(first, first + config.future_tokens), length - 1)


def long_indices_train(start: int, config: MatConfig) -> np.ndarray:
    """Steps of long memory in training (L,) int64: evenly spread over what there is, truncated.

    Early in a video steps repeat; only repetitions of step 0 are masked (``padding_mask``).
    """
    low = max(0, start - config.long_steps)
    spread = np.linspace(low, max(0, start - 1), config.long_tokens)
    return spread.astype(np.int64)


def long_indices_eval(start: int | np.ndarray, config: MatConfig) -> np.ndarray:
    """Steps of long memory in evaluation (..., L) int64, for one start or an array of them.

    Every ``long_rate``-th step from the range's beginning, padded in front with zeros. Until
    start = ``long_steps`` the grid hangs on step 0; from there on it moves with the window.
    """
    start = np.asarray(start, dtype=np.int64)[..., None]  # (..., 1)
    low = np.maximum(0, start - config.long_steps)
    count = -(-(start - low) // config.long_rate)  # sampled steps, at most L
    token = np.arange(config.long_tokens) - (config.long_tokens - count)  # (..., L), pads below 0
    return np.maximum(0, low + token * config.long_rate)


def padding_mask(long_indices: np.ndarray) -> np.ndarray:
    """Additive mask (..., L) float32 that leaves one entry of step 0 open: the last one.

    A window that starts at step 0 so reads one entry, step 0 itself.
    """
    first = long_indices == 0
    repeated = np.zeros_like(first)
    repeated[..., :-1] = first[..., :-1] & first[..., 1:]
    return np.where(repeated, np.float32("-inf"), np.float32(0))


# --------------------------------------------------------------------------- one step


def newest_logits(
    head: MatHead, steps: Embedded, rows: Tensor, newest: np.ndarray, questions: Questions
) -> Tensor:
    """What an online detector says after each of n steps, (n, 1 + A, C): now, then anticipated.

    ``steps`` holds embedded steps (B, S, .) with step i at slot i modulo S: a whole video, or the
    rings of a live detector. ``rows`` (n,) says which of the B streams, ``newest`` (n,) int64 its
    newest step. Before W steps have arrived, work memory is shorter, at positions 0..newest.
    """
    c = head.config
    starts = np.maximum(0, newest + 1 - c.work_steps)
    lengths = newest + 1 - starts  # steps in work memory; differ only in the first W steps
    logits = steps.work.new_empty((len(newest), 1 + c.anticipation_tokens, c.num_classes))
    for length in np.unique(lengths):
        chosen = np.flatnonzero(lengths == length)
        row, start = rows[torch.from_numpy(chosen).to(rows.device)], starts[chosen]
        work = _take(steps.work, row, start[:, None] + np.arange(0, length, c.work_rate))
        long, mask = _long_memory(steps.long, row, start, c)
        answer = head.detect(work, long, mask, questions=questions)
        logits[torch.from_numpy(chosen).to(logits.device)] = answer
    return logits


def _long_memory(
    tables: list[Tensor], rows: Tensor, starts: np.ndarray, config: MatConfig
) -> tuple[list[Tensor], Tensor | None]:
    if not config.long_steps:
        return [], None
    indices = long_indices_eval(starts, config)  # (n, L)
    mask = torch.from_numpy(padding_mask(indices)).to(tables[0].device)
    return [_take(table, rows, indices) for table in tables], mask  # (n, L, 2 D), (n, L)


def _take(table: Tensor, rows: Tensor, steps: np.ndarray) -> Tensor:
    """Read steps (n, k) of streams (n,) from a ring (B, S, D) -> (n, k, D)."""
    slots = torch.from_numpy(steps % table.shape[1]).to(table.device)
    return table[rows[:, None], slots]


# --------------------------------------------------------------------------- protocols


class OnlineScores(NamedTuple):
    """Scores of every step of a video; float tensors on the CPU."""

    detection: Tensor  # (T, C)
    anticipation: Tensor  # (T, C, A): [t, :, k] was said (k + 1) * rate steps before t


class WindowScores(NamedTuple):
    """Scores of non-overlapping windows; no window fits a video of up to W + A steps."""

    starts: np.ndarray  # (n,) int64
    frames: np.ndarray  # (n, W + A) int64, the step that each token is compared with
    scores: Tensor  # (n, W + A, C)


@torch.no_grad()
def online_scores(
    head: MatHead,
    features: Tensor | np.ndarray,
    motion: Tensor | np.ndarray | None = None,
    *,
    ignore_index: int,
    softmax: Softmax = "trained",
    opening: Opening = "window",
    batch_windows: int = 16,
) -> OnlineScores:
    """Score one video of features (T, Dv) and motion (T, Dm) by the online protocol.

    ``softmax``: see ``losses.probabilities``. ``opening`` says who scores the first steps:

    - "window" (the published protocol): the first full window scores all its steps at once, so
      steps before W - 1 have seen up to W - 1 steps of their future; in horizon k, steps before W
      get these detection scores, and steps up to W + k the first window's nearest anticipation.
    - "short": each step by itself with the work memory there is, as ``OnlineDetector`` does live.
      Causal from the first step on; anticipation of steps that nothing could precede is 0.

    A video shorter than W steps has no full window and is always scored "short". ``batch_windows``
    trades memory for speed and changes nothing else. Raises ValueError for wrong shapes, an empty
    video, an unknown rule or a head in training mode.
    """
    if opening not in ("window", "short"):
        raise ValueError(f"opening={opening!r} is not one of ['short', 'window']")
    c = head.config
    steps = _embed_video(head, features, motion)
    length = steps.work.shape[1]
    questions = head.questions()
    from_window = opening == "window" and length >= c.work_steps
    first = c.work_steps - 1 if from_window else 0  # the first step that speaks for itself
    device = steps.work.device
    said = []
    for at in range(first, length, batch_windows):
        batch = np.arange(at, min(at + batch_windows, length))
        rows = torch.zeros(len(batch), dtype=torch.long, device=device)
        logits = newest_logits(head, steps, rows, batch, questions)
        said.append(probabilities(logits, ignore_index, softmax).cpu())
    said = torch.cat(said)  # (T - first, 1 + A, C)
    detection = said.new_zeros(length, c.num_classes)
    detection[first:] = said[:, 0]
    anticipation = said.new_zeros(length, c.num_classes, c.anticipation_tokens)
    if from_window:
        logits = _window_logits(head, steps, np.zeros(1, np.int64), questions)
        opening_scores = probabilities(logits[0], ignore_index, softmax).cpu()  # (W + A, C)
        detection[:first] = opening_scores[np.arange(first) // c.work_rate]
    for k in range(c.anticipation_tokens):
        delay = 1 + k * c.anticipation_rate
        anticipation[first + delay :, :, k] = said[: max(0, length - first - delay), 1 + k]
        if from_window:
            ahead = np.arange(min(length - c.work_steps, delay))  # steps W .. W + k rate
            anticipation[: c.work_steps, :, k] = detection[: c.work_steps]
            nearest = c.work_tokens + ahead // c.anticipation_rate
            anticipation[c.work_steps + ahead, :, k] = opening_scores[nearest]
    return OnlineScores(detection, anticipation)


@torch.no_grad()
def window_scores(
    head: MatHead,
    features: Tensor | np.ndarray,
    motion: Tensor | np.ndarray | None = None,
    *,
    ignore_index: int,
    softmax: Softmax = "trained",
    batch_windows: int = 16,
) -> WindowScores:
    """Score one video by the window protocol; arguments and errors as ``online_scores``."""
    c = head.config
    steps = _embed_video(head, features, motion)
    starts = np.array(train_windows(steps.work.shape[1], c), dtype=np.int64)
    tokens = c.work_tokens + c.anticipation_tokens
    scores = torch.empty(len(starts), tokens, c.num_classes)
    questions = head.questions()
    for at in range(0, len(starts), batch_windows):
        logits = _window_logits(head, steps, starts[at : at + batch_windows], questions)
        scores[at : at + batch_windows] = probabilities(logits, ignore_index, softmax)
    frames = [detection_indices(start, c) for start in starts]
    return WindowScores(starts, np.array(frames, np.int64).reshape(-1, tokens), scores)


def _window_logits(
    head: MatHead, steps: Embedded, starts: np.ndarray, questions: Questions
) -> Tensor:
    """Final-stage logits (n, W + A, C) of all tokens of full windows of the stream in ``steps``."""
    c = head.config
    rows = torch.zeros(len(starts), dtype=torch.long, device=steps.work.device)
    work = _take(steps.work, rows, starts[:, None] + work_indices(0, c))
    long, mask = _long_memory(steps.long, rows, starts, c)
    last = c.work_tokens + c.anticipation_tokens
    return head.detect(work, long, mask, questions=questions, last=last)


def _embed_video(
    head: MatHead, features: Tensor | np.ndarray, motion: Tensor | np.ndarray | None
) -> Embedded:
    require_eval(head)
    like = head.classifier.weight
    visual = torch.as_tensor(features, dtype=like.dtype, device=like.device)[None]
    if motion is not None:
        motion = torch.as_tensor(motion, dtype=like.dtype, device=like.device)[None]
    head.check_features(visual, motion, steps=None)
    if not visual.shape[1]:
        raise ValueError("the video has no steps: features are empty")
    return head.embed(visual, motion)


def require_eval(head: MatHead) -> None:
    """Raise ValueError if the head is in training mode, where dropout would blur its scores."""
    if head.training:
        raise ValueError("the head is in training mode; call head.eval() before inference")
