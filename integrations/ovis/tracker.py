"""The online tracker: which query of this frame is which object seen before.

CTVIS (Ying et al., ICCV 2023) at inference. For each frame, in this order:

    select     queries whose best class is likely enough, by falling score
    suppress   of masks that overlap much, the one of the lower score
    match      embeddings against the memory of each track: bi-softmax, greedily by score
    start      a track for each unmatched detection
    remember   fuse embeddings into memories; forget tracks not seen for long

Every decision uses this frame and memory alone, so an identity, once given, is never taken back.
Memory holds at most Q tracks for each of the frames until it forgets, whatever the stream's length.

Letters: Q queries, D detections (queries that survive), N tracks, K embeddings kept per track,
E width of the embedding, C classes, h w size of the masks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from integrations.ovis.contrastive import similarity_share

SIMILARITIES = ("bisoftmax", "cosine")
ASSIGNMENTS = ("greedy", "hungarian")
MEMORIES = ("similarity_guided", "momentum", "last", "temporally_weighted")
SMOOTHING = 1e-6  # of overlaps: two empty masks are one mask


@dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    """Rules of the tracker; thresholds are those of the published numbers.

    Raises:
        ValueError: every field that is not one of its names or lies outside its range.
    """

    select_score: float = 0.01  # least probability of a detection; one above it is always kept
    start_score: float = 0.01  # probability above which an unmatched detection starts a track
    mask_overlap: float = 0.6  # IoU above which the less likely mask is suppressed
    similarity: Literal["bisoftmax", "cosine"] = "bisoftmax"
    match_score: float = 0.3  # a match scores above this
    # A match's cosine similarity is above this. Where one track is remembered, bi-softmax accepts
    # anything (softmax over one is 1), so a new object would take the only identity. None: as
    # released.
    min_cosine: float | None = 0.3
    # Among several tracks above match_score, prefer those seen in more frames: the scores are
    # multiplied by these counts, so a long track at 0.31 beats a short one at 1.
    frame_weight: bool = True
    assignment: Literal["greedy", "hungarian"] = "greedy"
    memory: Literal["similarity_guided", "momentum", "last", "temporally_weighted"] = (
        "similarity_guided"
    )
    recent: int = 10  # K, embeddings kept for the similarity or for the weighted average
    momentum: float = 0.75  # weight of a new embedding in the momentum memory
    forget_after: int = 20  # a track not seen for more frames than this is forgotten

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ValueError("TrackerConfig: " + "; ".join(problems))

    def _problems(self):
        names = {"similarity": SIMILARITIES, "assignment": ASSIGNMENTS, "memory": MEMORIES}
        for name, known in names.items():
            if getattr(self, name) not in known:
                yield f"{name}={getattr(self, name)!r} is not one of {list(known)}"
        for name in ("select_score", "start_score", "mask_overlap", "match_score", "momentum"):
            if not 0 <= getattr(self, name) <= 1:
                yield f"{name}={getattr(self, name)} is not in [0, 1]"
        if self.min_cosine is not None and not -1 <= self.min_cosine <= 1:
            yield f"min_cosine={self.min_cosine} is neither None nor in [-1, 1]"
        if self.recent < 1:
            yield f"recent={self.recent} is below 1"
        if self.forget_after < 0:
            yield f"forget_after={self.forget_after} is below 0"

    @classmethod
    def released(cls, **changes: Any) -> TrackerConfig:
        """The released rules: a match needs no least cosine similarity."""
        return cls(**{"min_cosine": None, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, defaults included."""
        return asdict(self)


class OnlineTracker:
    """Gives the queries of each frame their identities, frame by frame, for one video.

    Example:
        >>> tracker = OnlineTracker()
        >>> for frame in range(len(class_logits)):
        ...     ids = tracker.push(class_logits[frame], mask_logits[frame], embeddings[frame])
        >>> tracker.reset()    # the next video
    """

    def __init__(self, config: TrackerConfig | None = None) -> None:
        self.config = config or TrackerConfig()
        self.reset()

    def reset(self) -> None:
        """Begin a new video: no memory, identities from 0."""
        self.memory: TrackMemory | None = None
        self.frame = 0  # number of the next frame
        self.started = 0  # identities given so far

    @torch.no_grad()
    def push(self, class_logits: Tensor, mask_logits: Tensor, embeddings: Tensor) -> Tensor:
        """Take the next frame.

        Args:
            class_logits: (Q, C + 1), the last column "no object".
            mask_logits: (Q, h, w), above 0 inside.
            embeddings: (Q, E) tracking embeddings, not normalised.

        Returns:
            (Q,) int64 on the CPU: identity of each query, -1 for those dropped.

        Raises:
            ValueError: wrong shapes, another width than before, or values that are not finite. The
                tracker goes on unharmed.
        """
        scores = self._check(class_logits, mask_logits, embeddings)
        device = embeddings.device
        chosen = select_queries(scores, self.config.select_score)
        masks = mask_logits[chosen.to(mask_logits.device)]
        chosen = chosen[suppress_masks(masks, self.config.mask_overlap)]  # (D,)
        found = embeddings[chosen.to(device)].float()  # (D, E)
        if self.memory is None:
            self.memory = TrackMemory(self.config, found.shape[1], device)
        with torch.autocast(device.type, enabled=False):
            ids = self._match(found)  # (D,)
            starting = (ids < 0) & (scores[chosen] > self.config.start_score)
            ids[starting] = self.started + torch.arange(int(starting.sum()))
            alive = ids >= 0
            self.memory.update(
                ids[alive], found[alive.to(device)], scores[chosen][alive].to(device), self.frame
            )
        self.memory.forget(self.frame)
        self.started += int(starting.sum())
        self.frame += 1
        given = torch.full((len(class_logits),), -1)
        given[chosen] = ids
        return given

    @property
    def memory_bytes(self) -> int:
        """Bytes kept between frames."""
        return 0 if self.memory is None else self.memory.memory_bytes

    def _match(self, found: Tensor) -> Tensor:
        """Identities (D,) of detections with embeddings (D, E), -1 for those without a match."""
        memory, config = self.memory, self.config
        if not len(memory):
            return torch.full((len(found),), -1)
        remembered = memory.embeddings  # (N, E)
        scores = match_scores(found, remembered, config.similarity)  # (D, N)
        if config.min_cosine is not None:
            cosines = match_scores(found, remembered, "cosine")
            scores = torch.where(cosines > config.min_cosine, scores, -1.0)
        if config.assignment == "hungarian":
            rows = _hungarian(scores.cpu().numpy(), config.match_score)
        else:
            counts = memory.seen.numpy() if config.frame_weight else None
            rows = _greedy(scores.cpu().numpy(), counts, config.match_score)
        return torch.where(rows >= 0, memory.ids[rows], -1)

    def _check(self, class_logits: Tensor, mask_logits: Tensor, embeddings: Tensor) -> Tensor:
        """Refuse what does not fit; return the detection scores (Q,) on the CPU."""
        given = {
            "class_logits": (class_logits, "(Q, C + 1)", 2),
            "mask_logits": (mask_logits, "(Q, h, w)", 3),
            "embeddings": (embeddings, "(Q, E)", 2),
        }
        for name, (tensor, shape, dimensions) in given.items():
            if tensor.ndim != dimensions or len(tensor) != len(class_logits) or not len(tensor):
                raise ValueError(
                    f"frame {self.frame}: {name} of shape {tuple(tensor.shape)}; expected {shape} "
                    f"for the {len(class_logits)} queries of class_logits, at least 1"
                )
            if not tensor.isfinite().all():
                raise ValueError(
                    f"frame {self.frame}: {name} hold NaN or infinity, which memory would keep; "
                    "mend the segmentation or drop the frame"
                )
        if self.memory is not None and embeddings.shape[1] != self.memory.width:
            raise ValueError(
                f"frame {self.frame}: embeddings of width {embeddings.shape[1]}, memory holds "
                f"width {self.memory.width}; reset() before another model's video"
            )
        return class_logits.float().softmax(-1)[:, :-1].amax(-1).cpu()


class TrackMemory:
    """What is remembered of each track: rows of tensors, one per track, in order of their start.

    ::

        row   ids   seen   last_frame   recent, newest last (K = 4)
        0     3     2      17           .   .   e   e
        1     8     9      18           e   e   e   e
    """

    def __init__(
        self, config: TrackerConfig, width: int, device: torch.device | str = "cpu"
    ) -> None:
        self.config, self.width = config, width
        self.ids = torch.empty(0, dtype=torch.long)  # (N,)
        self.seen = torch.empty(0, dtype=torch.long)  # (N,) frames with a detection
        self.last_frame = torch.empty(0, dtype=torch.long)  # (N,)
        self.recent = torch.empty(0, config.recent, width, device=device)  # (N, K, E)
        self.scores = torch.empty(0, config.recent, device=device)  # (N, K) of the detections
        self.fused = torch.empty(0, width, device=device)  # (N, E)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def memory_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    @property
    def embeddings(self) -> Tensor:
        """What new detections are compared with, (N, E)."""
        if self.config.memory == "last":
            return self.recent[:, -1]
        if self.config.memory != "temporally_weighted":
            return self.fused
        # Detection score plus a ramp from 1 / n to 1 over the n embeddings kept.
        kept = self._kept()  # (N, K)
        ramp = kept.cumsum(-1) / kept.sum(-1, keepdim=True)
        weights = (self.scores + ramp) * kept
        return (weights[..., None] * self.recent).sum(1) / weights.sum(-1, keepdim=True)

    def update(self, ids: Tensor, embeddings: Tensor, scores: Tensor, frame: int) -> None:
        """Remember this frame's detections: ids (M,) on the CPU, embeddings (M, E), scores (M,)."""
        row_of = {track: row for row, track in enumerate(self.ids.tolist())}
        new = [track for track in ids.tolist() if track not in row_of]
        if new:
            row_of |= {track: len(row_of) + place for place, track in enumerate(new)}
            self._grow(torch.tensor(new))
        rows = torch.tensor([row_of[track] for track in ids.tolist()], dtype=torch.long)
        there = rows.to(self.fused.device)
        share = self._share(there, rows, embeddings)[:, None]  # (M, 1)
        self.fused[there] = (1 - share) * self.fused[there] + share * embeddings
        for kept, new in ((self.recent, embeddings), (self.scores, scores)):
            kept[there] = torch.cat([kept[there][:, 1:], new[:, None].to(kept)], dim=1)
        self.seen[rows] += 1
        self.last_frame[rows] = frame

    def forget(self, frame: int) -> None:
        """Drop tracks that were last seen more than ``forget_after`` frames before ``frame``."""
        alive = frame - self.last_frame <= self.config.forget_after
        if alive.all():
            return
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[alive.to(value.device)])

    def _share(self, there: Tensor, rows: Tensor, embeddings: Tensor) -> Tensor:
        """Weight (M,) of a new embedding in the fused memory; 1 where it is the first."""
        if self.config.memory == "similarity_guided":
            past = self.recent[there]  # (M, K, E)
            cosines = F.cosine_similarity(embeddings[:, None], past, dim=-1)
            share = similarity_share(cosines, self._kept()[there])
        else:
            share = torch.full_like(embeddings[:, 0], self.config.momentum)
        return share.masked_fill((self.seen[rows] == 0).to(share.device), 1.0)

    def _kept(self) -> Tensor:
        """Which places of ``recent`` are filled, (N, K) bool: the last ones."""
        places = torch.arange(self.config.recent)
        filled = places >= self.config.recent - self.seen[:, None]
        return filled.to(self.recent.device)

    def _grow(self, ids: Tensor) -> None:
        """Add empty rows for new tracks."""
        self.ids = torch.cat([self.ids, ids])
        for name in ("seen", "last_frame", "recent", "scores", "fused"):
            value = getattr(self, name)
            setattr(self, name, torch.cat([value, value.new_zeros(len(ids), *value.shape[1:])]))


def select_queries(scores: Tensor, threshold: float) -> Tensor:
    """Queries (D,) with scores (Q,) above the threshold, best first; the best one in any case."""
    order = scores.argsort(descending=True, stable=True)
    chosen = order[scores[order] > threshold]
    return chosen if len(chosen) else order[:1]


def suppress_masks(mask_logits: Tensor, threshold: float) -> Tensor:
    """Which of overlapping masks stay: each one that overlaps no better one which stayed.

    Args:
        mask_logits: (D, h, w), best first; above 0 inside.
        threshold: IoU above which the later mask goes. Two empty masks overlap in full.

    Returns:
        (D,) bool on the CPU.
    """
    inside = (mask_logits > 0).flatten(1).float()  # (D, h w)
    with torch.autocast(inside.device.type, enabled=False):
        common = inside @ inside.T  # (D, D) pixels, exact in float32
    areas = inside.sum(1)
    union = areas[:, None] + areas[None] - common
    overlaps = ((common + SMOOTHING) / (union + SMOOTHING) > threshold).cpu().numpy()
    stays = np.zeros(len(overlaps), dtype=bool)
    for place, row in enumerate(overlaps):
        stays[place] = not (row & stays).any()
    return torch.from_numpy(stays)


def match_scores(found: Tensor, remembered: Tensor, similarity: str) -> Tensor:
    """How well detections (D, E) fit tracks (N, E): (D, N).

    "bisoftmax": mean of the softmax over tracks and the softmax over detections of their dot
    products, in [0, 1]; "cosine": cosine similarities.
    """
    if similarity == "cosine":
        return F.normalize(found, dim=-1) @ F.normalize(remembered, dim=-1).T
    dots = found @ remembered.T
    return (dots.softmax(1) + dots.softmax(0)) / 2


def _greedy(scores: np.ndarray, counts: np.ndarray | None, threshold: float) -> Tensor:
    """Track (D,) of each detection, -1 for none; detections choose in turn, best first.

    Where several tracks score above the threshold, ``counts`` (N,) weight them; all others get the
    mean of these counts.
    """
    free = scores.copy()  # (D, N)
    chosen = np.full(len(scores), -1)
    for detection, row in enumerate(free):
        above = row > threshold
        if counts is not None and above.sum() > 1:
            row = row * np.where(above, counts, counts[above].mean()).astype(row.dtype)
        best = row.argmax()
        if row[best] > threshold:
            chosen[detection] = best
            free[:, best] = -1  # taken
    return torch.from_numpy(chosen)


def _hungarian(scores: np.ndarray, threshold: float) -> Tensor:
    """Track (D,) of each detection, -1 for none: the best total score, then the threshold."""
    chosen = np.full(len(scores), -1)
    detections, tracks = linear_sum_assignment(scores, maximize=True)
    good = scores[detections, tracks] > threshold
    chosen[detections[good]] = tracks[good]
    return torch.from_numpy(chosen)
