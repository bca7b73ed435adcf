"""Contrastive learning of the tracking embedding: a clip remembers its instances as a tracker will.

Maths of CTVIS (Ying et al., ICCV 2023, section 3): training repeats what the online tracker does.
Each frame's matched query stands for an instance; its embedding goes into a memory that is fused
by similarity. An item compares the embedding of one instance in one frame (the anchor) with one
positive, what was remembered of the instance, and with other queries as negatives:

    frame          0      1      2      3
    instance a     a0     a1     .      a3      anchor a3; positive: a1, or the memory of a0, a1
    all queries    ....   ....   ....   ....    negatives: the other queries of frame 1 (the frame
                                                of the positive), or all those of frame 2

Two losses, both averaged over items: contrastive, log(1 + sum exp(a.n - a.p)) on dot products;
auxiliary, squared error of cosine similarities against 1 for positives and 0 for negatives.

Letters: B clips, T frames, Q queries, E width of the embedding, N instances (padded over clips:
an instance that a clip does not have is absent everywhere), I items, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

NEGATIVES = ("positive_frame", "previous_frame")
AVERAGES = ("global", "rank")
ABSENT = -1


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """Rules of the items and weights of the losses; ``released`` gives those of published numbers.

    Raises:
        ValueError: an unknown rule, or a probability outside [0, 1].
    """

    weight: float = 2.0  # of the contrastive loss
    auxiliary_weight: float = 3.0  # of the auxiliary loss
    memory_probability: float = 0.5  # that a positive is the fused memory, not the last embedding
    # Where negatives come from. "positive_frame": the other queries of the frame that the positive
    # was (last) seen in. "previous_frame" (released): the frame before the anchor's, wherever the
    # positive is from; all its queries where the instance is absent.
    negatives: Literal["positive_frame", "previous_frame"] = "positive_frame"
    # An instance that is hidden after it was seen stores, with this probability per frame, the
    # embedding of a query that nothing matched: memory learns to bear mistakes. Released: 0.
    noise_probability: float = 0.0
    # "global": items of all ranks count alike; "rank" (released): each rank averages its own.
    average: Literal["global", "rank"] = "global"

    def __post_init__(self) -> None:
        for name, known in (("negatives", NEGATIVES), ("average", AVERAGES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {list(known)}")
        for name in ("memory_probability", "noise_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is not in [0, 1]")

    @classmethod
    def released(cls) -> ContrastiveConfig:
        """The rules of the released training code."""
        return cls(negatives="previous_frame", average="rank")


class ContrastiveLosses(NamedTuple):
    """Unweighted losses, scalars with gradients; ``items`` is this rank's number of items."""

    contrastive: Tensor
    auxiliary: Tensor
    items: int

    def weighted(self, config: ContrastiveConfig) -> dict[str, Tensor]:
        """Both losses times their weights, by the names under which training logs them."""
        return {
            "loss_contrastive": config.weight * self.contrastive,
            "loss_auxiliary": config.auxiliary_weight * self.auxiliary,
        }


class Items(NamedTuple):
    """Anchors and their candidates: the positive first, then all queries of the negatives' frame.

    ``negative`` marks which candidates count as negatives; the positive is always candidate 0.
    """

    anchors: Tensor  # (I, E)
    candidates: Tensor  # (I, 1 + Q, E)
    negative: Tensor  # (I, 1 + Q) bool


def contrastive_losses(
    embeddings: Tensor,
    queries: Tensor,
    config: ContrastiveConfig | None = None,
    generator: torch.Generator | None = None,
) -> ContrastiveLosses:
    """Contrastive and auxiliary loss of a batch of clips.

    Args:
        embeddings: (B, T, Q, E) tracking embeddings of all queries.
        queries: (B, T, N) int64, the query matched to each instance in each frame, -1 where it is
            absent; `pad_instances` brings clips together.
        config: rules; None for the defaults.
        generator: decides memory or last embedding, and noise; on the CPU, None for torch's own.

    Raises:
        ValueError: shapes that do not agree, or a query that does not exist.
    """
    config = config or ContrastiveConfig()
    _check(embeddings, queries)
    with torch.autocast(embeddings.device.type, enabled=False):
        return _losses(embeddings.float(), queries, config, generator)


def _losses(
    embeddings: Tensor,
    queries: Tensor,
    config: ContrastiveConfig,
    generator: torch.Generator | None,
) -> ContrastiveLosses:
    items = build_items(embeddings, queries, config, generator)
    count = len(items.anchors)
    share = _share_of_items(count, config.average, embeddings.device)
    if not count:  # zero, with a gradient: other ranks wait for it
        nothing = embeddings.sum() * 0
        return ContrastiveLosses(nothing, nothing, 0)
    dots = torch.einsum("ie,ike->ik", items.anchors, items.candidates)
    cosines = F.cosine_similarity(items.anchors[:, None], items.candidates, dim=-1)
    positive = torch.zeros_like(items.negative)
    positive[:, 0] = True
    return ContrastiveLosses(
        contrastive_loss(dots, positive, items.negative).sum() * share,
        auxiliary_loss(cosines, positive, items.negative).sum() * share,
        count,
    )


def contrastive_loss(dots: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """log(1 + sum over negatives n and positives p of exp(a.n - a.p)), for each item.

    Args:
        dots: (I, K) dot products of each anchor with its candidates, float.
        positive: (I, K) bool; every item has at least one.
        negative: (I, K) bool; without any, the loss is 0. Other candidates do not count.

    Returns:
        (I,)
    """
    # A finite stand-in for minus infinity: an item without negatives must not give NaN gradients.
    never = torch.finfo(dots.dtype).min / 4
    against = dots.masked_fill(~negative, never).logsumexp(-1)
    towards = (-dots).masked_fill(~positive, never).logsumexp(-1)
    return F.softplus(against + towards)


def auxiliary_loss(cosines: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Mean over an item's candidates of (cosine - label)^2; arguments as `contrastive_loss`."""
    counted = positive | negative
    errors = (cosines - positive.to(cosines.dtype)).square() * counted
    return errors.sum(-1) / counted.sum(-1)


def build_items(
    embeddings: Tensor,
    queries: Tensor,
    config: ContrastiveConfig,
    generator: torch.Generator | None = None,
) -> Items:
    """Choose anchors, positives and negatives; arguments as `contrastive_losses`.

    Anchors are all instances present in frames 1 to T - 1, clip by clip, frame by frame. The
    positive is what is remembered from before; for an instance not seen before, its next later
    embedding; an instance seen in one frame only gives no item.
    """
    B, T, Q, _ = embeddings.shape
    present = queries != ABSENT  # (B, T, N)
    queries = queries.clamp(min=0)
    stored_queries, stored = _with_noise(queries, present, Q, config.noise_probability, generator)
    clips = torch.arange(B, device=queries.device)[:, None, None]  # (B, 1, 1)
    frames = torch.arange(T, device=queries.device)[None, :, None]  # (1, T, 1)
    kept = embeddings[clips, frames, stored_queries]  # (B, T, N, E) what memory is offered
    memory = fuse_by_similarity(kept.transpose(1, 2), stored.transpose(1, 2)).transpose(1, 2)
    earlier = _latest_before(stored)  # (B, T, N) frame, -1 for none
    later = T - 1 - _latest_before(present.flip(1)).flip(1)  # (B, T, N) frame, T for none

    anchor = present & ((earlier >= 0) | (later < T))
    anchor[:, 0] = False
    b, t, n = anchor.nonzero(as_tuple=True)  # (I,) each
    seen = earlier[b, t, n] >= 0
    source = torch.where(seen, earlier[b, t, n], later[b, t, n])  # (I,) the positive's frame
    chance = torch.rand(len(b), generator=generator).to(seen.device)
    fused = seen & (chance < config.memory_probability)
    positives = torch.where(fused[:, None], memory[b, t - 1, n], kept[b, source, n])  # (I, E)

    against = source if config.negatives == "positive_frame" else t - 1  # (I,)
    negative = torch.ones(len(b), 1 + Q, dtype=torch.bool, device=seen.device)
    negative[:, 0] = False
    own = stored[b, against, n]  # its own query there is no negative
    negative[own.nonzero()[:, 0], 1 + stored_queries[b, against, n][own]] = False
    return Items(
        anchors=embeddings[b, t, queries[b, t, n]],
        candidates=torch.cat([positives[:, None], embeddings[b, against]], dim=1),
        negative=negative,
    )


def fuse_by_similarity(embeddings: Tensor, present: Tensor, recent: int | None = None) -> Tensor:
    """Fuse what is seen of an instance into one memory, guided by similarity (CTVIS, equation 4).

    The first embedding is taken as it is. Each later one gets the weight beta = max(0, mean cosine
    similarity to the embeddings stored before): memory = (1 - beta) memory + beta embedding.

    Args:
        embeddings: (..., T, E)
        present: (..., T) bool; absent frames leave the memory as it is.
        recent: only so many of the latest stored embeddings count for the mean (the tracker: 10);
            None for all (training).

    Returns:
        (..., T, E): the memory after each frame; zeros before the first embedding.
    """
    units = F.normalize(embeddings, dim=-1, eps=1e-8)
    similarity = units @ units.transpose(-1, -2)  # (..., T, T)
    rank = present.cumsum(-1)  # (..., T) how many were stored up to here
    age = rank[..., :, None] - rank[..., None, :]  # (..., T, T) stored since, this one included
    counts = present[..., None, :] & (age >= 1)
    if recent is not None:
        counts &= age <= recent
    share = similarity_share(similarity, counts)  # (..., T)
    memory = torch.zeros_like(embeddings[..., 0, :])
    memories = []
    for t in range(embeddings.shape[-2]):
        first = (rank[..., t] == 1)[..., None]
        beta = torch.where(first, 1.0, share[..., t, None])
        updated = (1 - beta) * memory + beta * embeddings[..., t, :]
        memory = torch.where(present[..., t, None], updated, memory)
        memories.append(memory)
    return torch.stack(memories, dim=-2)


def similarity_share(similarity: Tensor, counts: Tensor) -> Tensor:
    """Weight of a new embedding: its mean cosine similarity (..., K) to those that count, or 0."""
    total = (similarity * counts).sum(-1)
    return (total / counts.sum(-1).clamp(min=1)).clamp(min=0)


def pad_instances(queries: Sequence[Tensor]) -> Tensor:
    """Bring the matches of clips together, (T, n) each with -1 for absent: (B, T, N).

    Raises:
        ValueError: no clips, or clips of different lengths.
    """
    if len({len(clip) for clip in queries}) != 1:
        raise ValueError(
            f"matches of clips of shapes {[tuple(clip.shape) for clip in queries]}; expected (T, n)"
            " for each clip, with one T"
        )
    most = max(clip.shape[1] for clip in queries)
    return torch.stack([F.pad(c, (0, most - c.shape[1]), value=ABSENT) for c in queries])


def _check(embeddings: Tensor, queries: Tensor) -> None:
    if embeddings.ndim != 4:
        raise ValueError(f"embeddings of shape {tuple(embeddings.shape)}; expected (B, T, Q, E)")
    if queries.ndim != 3 or queries.shape[:2] != embeddings.shape[:2]:
        raise ValueError(
            f"queries of shape {tuple(queries.shape)}; embeddings of shape "
            f"{tuple(embeddings.shape)} need (B, T, N)"
        )
    if queries.numel() and not (queries.min() >= ABSENT and queries.max() < embeddings.shape[2]):
        raise ValueError(
            f"matches name queries {queries.min()} to {queries.max()}; there are 0 to "
            f"{embeddings.shape[2] - 1}, and {ABSENT} for absent"
        )


def _latest_before(stored: Tensor) -> Tensor:
    """For each frame of ``stored`` (B, T, N), the latest frame before it that is stored, or -1."""
    frames = torch.arange(stored.shape[1], device=stored.device)[None, :, None]
    latest = torch.where(stored, frames, -1).cummax(1).values
    return F.pad(latest, (0, 0, 1, 0), value=-1)[:, :-1]


def _with_noise(
    queries: Tensor,
    present: Tensor,
    num_queries: int,
    probability: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Queries (B, T, N) that memory stores, and where it stores one: present, or by mistake."""
    if not probability:
        return queries, present
    chance = torch.rand(present.shape, generator=generator).to(present.device)
    hidden = ~present & (_latest_before(present) >= 0)  # seen before: there is a memory to disturb
    free = torch.ones(*present.shape[:2], num_queries, device=present.device)  # (B, T, Q)
    # Absent instances point at query 0; scattering a minimum leaves it free unless it is taken.
    free = free.scatter_reduce(2, queries, (~present).float(), "amin")
    noise = hidden & (chance < probability) & (free.amax(-1, keepdim=True) > 0)
    luck = torch.rand(*present.shape, num_queries, generator=generator).to(present.device)
    drawn = (luck * free[:, :, None]).argmax(-1)  # (B, T, N) uniform among the free queries
    return torch.where(noise, drawn, queries), present | noise


def _share_of_items(count: int, average: str, device: torch.device) -> float:
    """What one item weighs, so that ranks whose gradients are averaged give the mean over items."""
    if average == "rank" or not (dist.is_available() and dist.is_initialized()):
        return 1 / max(count, 1)
    total = torch.tensor(float(count), device=device)
    dist.all_reduce(total)
    return dist.get_world_size() / max(total.item(), 1.0)
