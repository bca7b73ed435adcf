"""Visual tokens into a prompt, where its placeholders stand.

With three visual tokens ``v``, and ``.`` for a label that no loss counts:

    ids       [ 5  9 -200 7 3 ]          embeddings  [ e5 e9 v0 v1 v2 e7 e3 ]
    labels    [ .  .   .  7 3 ]          labels      [ .  .  .  .  .  7  3  ]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_INDEX = -200  # its id; no tokenizer knows it
IGNORE_INDEX = -100  # label that no loss counts


@dataclass
class Spliced:
    """A batch for the LLM; ``L`` is the longest row, visual tokens included.

    Attributes:
        inputs_embeds: ``(B, L, H)``, zeros where padded.
        attention_mask: ``(B, L)`` int64, 0 where padded.
        position_ids: ``(B, L)`` int64, counted from each row's first token; 0 where padded.
        labels: ``(B, L)`` int64, -100 at visual tokens and padding; None if none were given.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None


def unpad(batch: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """Rows of a padded ``(B, L)`` batch without their padding."""
    if attention_mask is None:
        return list(batch)
    return [row[mask.bool()] for row, mask in zip(batch, attention_mask, strict=True)]


def splice(
    rows: Sequence[Tensor],
    visuals: Sequence[Tensor],
    embed: Callable[[Tensor], Tensor],
    labels: Sequence[Tensor] | None = None,
    max_length: int | None = None,
    padding_side: Literal["left", "right"] = "right",
    missing: Literal["refuse", "repeat"] = "refuse",
) -> Spliced:
    """Embed rows of ids and put visual tokens where their placeholders stand.

    Args:
        rows: ids ``(length,)`` of each row, with placeholders, without padding.
        visuals: tokens ``(n, H)`` in the order of the placeholders, through all rows.
        embed: ids to embeddings ``(length, H)``.
        labels: as ``rows``; those of placeholders are not read.
        max_length: length at which rows are cut, visual tokens included.
        padding_side: where shorter rows are filled up.
        missing: visuals that are missing are refused, or the last one stands in (``repeat``),
            as in the released code.

    Raises:
        ValueError: another number of placeholders than of visuals.
    """
    asked = sum(int((row == IMAGE_TOKEN_INDEX).sum()) for row in rows)
    if asked < len(visuals) or (asked > len(visuals) and (missing == "refuse" or not visuals)):
        raise ValueError(
            f"the prompts hold {asked} placeholders {IMAGE_TOKEN} for {len(visuals)} visuals; "
            "write one for each, where its tokens shall stand"
        )
    supply = iter([*visuals, *[visuals[-1]] * (asked - len(visuals))] if visuals else ())
    spliced = [
        _splice_row(row, supply, embed, None if labels is None else labels[index])
        for index, row in enumerate(rows)
    ]
    embeds = [row[:max_length] for row, _ in spliced]
    ones = [torch.ones(len(row), dtype=torch.long, device=row.device) for row in embeds]
    counts = [torch.arange(len(row), device=row.device) for row in embeds]

    def padded(parts: list[Tensor], value: int = 0) -> Tensor:
        return pad_sequence(parts, batch_first=True, padding_value=value, padding_side=padding_side)

    return Spliced(
        inputs_embeds=padded(embeds),
        attention_mask=padded(ones),
        position_ids=padded(counts),
        labels=None
        if labels is None
        else padded([target[:max_length] for _, target in spliced], IGNORE_INDEX),
    )


def _splice_row(
    row: Tensor,
    supply: Iterator[Tensor],
    embed: Callable[[Tensor], Tensor],
    labels: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Embeddings ``(length, H)`` and labels ``(length,)`` of one row."""
    holes = (row == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
    words = embed(row[row != IMAGE_TOKEN_INDEX])
    labels = torch.full_like(row, IGNORE_INDEX) if labels is None else labels
    parts, targets, start = [], [], 0
    for number, hole in enumerate([*holes, len(row)]):
        parts.append(words[start - number : hole - number])
        targets.append(labels[start:hole])
        start = hole + 1
        if number < len(holes):
            visual = next(supply)
            parts.append(visual.to(words))
            targets.append(labels.new_full((len(visual),), IGNORE_INDEX))
    return torch.cat(parts), torch.cat(targets)
