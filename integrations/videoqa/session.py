"""A running video, and questions about it at any time.

The tower encodes each frame once, as it comes, and remembers as far back as its window reaches.
The LLM sees the last ``context_frames`` of them. What has been fed to it stays in its cache as far
as the next prompt begins with the same tokens: the system's words and past turns are not computed
again, and frames are not where they have not moved.

    history="text"      system | Q1 A1 | Q2 A2 | last frames, Q3      past turns never move
    history="frames"    system | frames, Q1 A1 | frames, Q2 A2 | new frames, Q3
                        nothing moves until the oldest frames fall out of the context
    history="none"      system | last frames, Q3                      each question for itself

A question may also come first: `pose` it, and the frames after it stand after it in the prompt.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from integrations.videoqa.answering import shared_start
from integrations.videoqa.modeling import StreamformerLlavaForConditionalGeneration
from integrations.videoqa.prompts import get_template, render, tokenize
from integrations.videoqa.splice import IMAGE_TOKEN, IMAGE_TOKEN_INDEX

logger = logging.getLogger(__name__)

CHUNK = 16  # frames that the tower encodes at once


@dataclass(frozen=True)
class Turn:
    """A question that was answered, and the frames that it was about.

    Attributes:
        question: as it was asked.
        answer: as it was given.
        first: number of the first frame that came after the turn before.
        asked: frames seen when the question was put.
        last: frames seen when it was answered.
    """

    question: str
    answer: str
    first: int
    asked: int
    last: int


@dataclass(frozen=True)
class Cost:
    """What the last answer took.

    Attributes:
        prompt_tokens: length of the prompt, visual tokens included.
        reused_tokens: of these, how many were in the LLM's cache already.
        first_token_seconds: from the question to the first token.
        new_tokens: length of the answer.
        encoded_frames: frames that the tower had to encode for it.
    """

    prompt_tokens: int
    reused_tokens: int
    first_token_seconds: float
    new_tokens: int
    encoded_frames: int


class StreamingSession:
    """One stream and one conversation about it.

    Example:
        >>> session = StreamingSession(model, context_frames=16)
        >>> session.push(frames)                 # (t, H, W, 3) uint8, as they come
        >>> session.ask("What is happening?")
        >>> session.pose("Has the red ball left?")
        >>> session.push(more)
        >>> session.ask(keep=False)              # as of now; ask again after more frames

    Args:
        model: with its tokenizer, as `checkpoints.load_model` gives it. It may serve several
            sessions; all state is in the session.
        context_frames: most frames whose tokens the LLM sees; None for ``config.num_frames``.
        last_frames: a baseline without memory: only as many last frames, encoded as a clip of
            their own whenever a question comes. Instead of ``context_frames``.
        history: what later questions know of earlier ones, see above.
        system: the system's words, instead of the template's own.
        max_length: most tokens of prompt and answer; the oldest turns are forgotten when they do
            not fit. None for what the LLM was made for.

    Raises:
        ValueError: a tower whose memory has no bound, or settings that exclude each other.
    """

    def __init__(
        self,
        model: StreamformerLlavaForConditionalGeneration,
        *,
        context_frames: int | None = None,
        last_frames: int | None = None,
        history: Literal["text", "frames", "none"] = "text",
        system: str | None = None,
        max_length: int | None = None,
    ) -> None:
        if context_frames is not None and last_frames is not None:
            raise ValueError(
                f"context_frames={context_frames} and last_frames={last_frames}: the latter is a "
                "baseline of its own; give one of them"
            )
        if history not in ("text", "frames", "none"):
            raise ValueError(f"history={history!r} is unknown; use 'text', 'frames' or 'none'")
        kept = last_frames or context_frames or model.config.num_frames
        if kept < 1 or 0 in (last_frames, context_frames):
            raise ValueError(f"a context of {kept} frames shows nothing; give at least 1")
        if last_frames is None:
            _refuse_endless(model)
        self.model = model.eval()
        self.history, self.system = history, system
        self.context_frames, self.last_frames = kept, last_frames
        limit = getattr(model.config.text_config, "max_position_embeddings", None)
        self.max_length = max_length or limit
        self.reset()

    def reset(self) -> None:
        """Begin anew: another video, no past turns."""
        self.frames_seen = 0
        self.turns: list[Turn] = []
        self.cost: Cost | None = None
        self._posed: tuple[str, int] | None = None
        self._stream = self.model.tower.stream() if self.last_frames is None else None
        # Of the last frames, tokens of the LLM (n, H); or, for the baseline, pixels (3, H, W).
        self._frames: deque[Tensor] = deque(maxlen=self.context_frames)
        self._clip: tuple[int, Tensor] | None = None  # the baseline's tokens, as of so many frames
        self._cache = DynamicCache()
        self._fed: list[Hashable] = []  # what each position of the cache holds

    # -- the video --------------------------------------------------------------------------------

    @torch.no_grad()
    def push(self, frames: np.ndarray | Tensor) -> int:
        """Take the next frame (H, W, 3) or frames (t, H, W, 3), uint8 RGB.

        Or frames that the model's ``preprocess`` has prepared, ``(t, 3, size, size)``.

        Returns:
            Frames seen so far.
        """
        frames = frames[None] if frames.ndim == 3 else frames
        prepared = isinstance(frames, Tensor) and frames.is_floating_point()
        for start in range(0, len(frames), CHUNK):
            part = frames[start : start + CHUNK]
            pixels = part if prepared else self.model.preprocess(part)  # (t, 3, H, W)
            if self._stream is None:  # rows of their own: a view would keep the chunk alive
                self._frames.extend(row.clone() for row in pixels)
            else:
                features = self._stream.push(pixels[None])[0]  # (t, N, D)
                self.model.encoded_frames += len(pixels)
                self._frames.extend(row.clone() for row in self.model.frame_tokens(features))
            self.frames_seen += len(pixels)
        return self.frames_seen

    @property
    def memory_bytes(self) -> int:
        """Bytes kept between calls: the tower's memory, frames, and the LLM's cache."""
        kept = list(self._frames)
        if self._clip is not None:
            kept.append(self._clip[1])
        for layer in self._cache.layers:
            if (keys := getattr(layer, "keys", None)) is not None:
                kept += [keys, layer.values]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        return sum(storages.values()) + (0 if self._stream is None else self._stream.memory_bytes)

    # -- the conversation -------------------------------------------------------------------------

    def pose(self, question: str) -> None:
        """Put a question now, to be answered later, by ``ask()`` without one.

        Raises:
            ValueError: the question before is still open.
        """
        if self._posed is not None:
            raise ValueError(
                f"the question {self._posed[0]!r} is still open; ask() for its answer, or "
                "withdraw() it"
            )
        self._posed = question, self.frames_seen

    def withdraw(self) -> None:
        """Forget the question that was posed."""
        self._posed = None

    def ask(self, question: str | None = None, *, keep: bool = True, **settings: Any) -> str:
        """Answer a question, or the one that was posed, by what has been seen so far.

        Args:
            question: None for the posed one.
            keep: whether this becomes a past turn. If not, a posed question stays open, and can
                be asked again after more frames.
            settings: of `reply`.

        Raises:
            ValueError: no question, or a prompt that the LLM cannot take.
        """
        return "".join(self.reply(question, keep=keep, **settings)).strip()

    @torch.no_grad()
    def reply(
        self,
        question: str | None = None,
        *,
        keep: bool = True,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
    ) -> Iterator[str]:
        """As `ask`, but piece by piece, as the LLM says it.

        Args:
            question: None for the posed one.
            keep: whether this becomes a past turn; it does when the last piece was taken.
            max_new_tokens: length at which the answer is cut.
            temperature: 0 for the likeliest answer, else how freely it is drawn.
        """
        begun, encoded = time.perf_counter(), self.model.encoded_frames
        if question is None and self._posed is None:
            raise ValueError("there is no question; ask one, or pose() one before")
        text, asked = (question, self.frames_seen) if question is not None else self._posed
        now = Turn(text, "", self.turns[-1].last if self.turns else 0, asked, self.frames_seen)
        keys, embeds = self._prompt(now, max_new_tokens)
        reused = min(shared_start(keys, self._fed), len(keys) - 1)
        self._forget(reused)
        logits = self._feed(embeds[reused:], keys[reused:])
        tokenizer, stop = self.model.tokenizer, get_template(self.model.config.template).stop
        ids: list[int] = []
        said, first, ended = "", 0.0, False
        while not ended and len(ids) < max_new_tokens:
            if ids:
                word = torch.tensor(ids[-1:], device=embeds.device)
                logits = self._feed(self.model.get_input_embeddings()(word), ids[-1:])
            token = _choose(logits, temperature)
            first = first or time.perf_counter() - begun
            ended = token in self.model.stop_ids
            ids += [] if ended else [token]
            whole, rest = _split(tokenizer.decode(ids, skip_special_tokens=True), stop)
            ended = ended or bool(rest)
            ready = whole if ended or len(ids) == max_new_tokens else _ready(whole, stop)
            if len(ready) > len(said):
                yield ready[len(said) :]
                said = ready
        self.cost = Cost(
            prompt_tokens=len(keys),
            reused_tokens=reused,
            first_token_seconds=first,
            new_tokens=len(ids),
            encoded_frames=self.model.encoded_frames - encoded,
        )
        if keep:
            self.turns.append(Turn(text, said.strip(), now.first, now.asked, now.last))
            if question is None:
                self._posed = None

    # -- prompts ----------------------------------------------------------------------------------

    def _prompt(self, now: Turn, max_new_tokens: int) -> tuple[list[Hashable], Tensor]:
        """What each position of the prompt holds, and its embeddings ``(length, H)``."""
        while True:
            past = [] if self.history == "none" else self.turns
            messages, spans = self._messages(past, now)
            ids = tokenize(render([*messages, None], self.model.config.template, self.system),
                           self.model.tokenizer)  # fmt: skip
            keys, embeds = self._fill(ids, spans)
            if self.max_length is None or len(keys) + max_new_tokens <= self.max_length:
                return keys, embeds
            if not past:
                raise ValueError(
                    f"a prompt of {len(keys)} tokens and {max_new_tokens} for the answer exceed "
                    f"{self.max_length}; show fewer frames than context_frames="
                    f"{self.context_frames}, or ask for a shorter answer"
                )
            logger.info("forgot the oldest turn, %r: the prompt grew too long", past[0].question)
            self.turns = self.turns[1:]

    def _messages(self, past: list[Turn], now: Turn) -> tuple[list[str], list[tuple[int, int]]]:
        """Texts in turns with placeholders, and the frames [first, last) of each placeholder."""
        oldest = self.frames_seen - len(self._frames)
        messages, spans = [], []
        for turn in [*past, now]:
            shows = self.history == "frames" or turn is now
            first = turn.first if self.history == "frames" else 0
            before = (max(first, oldest), turn.asked)
            after = (max(first, turn.asked, oldest), turn.last)
            text = turn.question
            if shows and before[0] < before[1]:
                text = f"{IMAGE_TOKEN}\n{text}"
                spans.append(before)
            if shows and after[0] < after[1]:
                text = f"{text}\n{IMAGE_TOKEN}"
                spans.append(after)
            messages += [text] if turn is now else [text, turn.answer]
        return messages, spans

    def _fill(self, ids: list[int], spans: list[tuple[int, int]]) -> tuple[list[Hashable], Tensor]:
        """Put frames where the placeholders stand."""
        keys: list[Hashable] = []
        parts: list[Tensor] = []
        embed, places = self.model.get_input_embeddings(), iter(spans)
        words: list[int] = []
        for token in [*ids, None]:
            if token is not None and token != IMAGE_TOKEN_INDEX:
                words.append(token)
                continue
            parts.append(embed(torch.tensor(words, dtype=torch.long, device=embed.weight.device)))
            keys += words
            words = []
            if token == IMAGE_TOKEN_INDEX:
                span = next(places)
                shown = self._shown(*span).to(parts[-1])
                parts.append(shown)
                # The last token may be a newline that ends the video wherever that is.
                keys += [("video", self._origin(span), place) for place in range(len(shown) - 1)]
                keys.append(("video", span, "end"))
        return keys, torch.cat(parts)

    def _origin(self, span: tuple[int, int]) -> Hashable:
        """What a visual token depends on, besides its place in its span.

        A streamed frame is what it is whatever follows; a clip of the baseline is encoded anew.
        """
        return span[0] if self._stream is not None else span

    def _shown(self, first: int, last: int) -> Tensor:
        """Tokens of the frames [first, last), ``(tokens, H)``."""
        frames = self._frames if self._stream is not None else self._clip_frames()
        start = self.frames_seen - len(self._frames)
        rows = [frames[number - start] for number in range(first, last)]
        return self.model.join_frames(torch.stack(rows))

    def _clip_frames(self) -> Tensor:
        """The baseline's frames ``(T, n, H)``, encoded as a clip once per state of the video."""
        if self._clip is None or self._clip[0] != self.frames_seen:
            features = self.model.tower_features([torch.stack(list(self._frames))])[0]
            self._clip = self.frames_seen, self.model.frame_tokens(features)
        return self._clip[1]

    # -- the LLM ----------------------------------------------------------------------------------

    def _feed(self, embeds: Tensor, keys: list[Hashable]) -> Tensor:
        """Feed embeddings ``(length, H)`` after all that the cache holds; logits of the last."""
        output = self.model.language_model(
            inputs_embeds=embeds[None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._fed += keys
        return output.logits[0, -1]

    def _forget(self, kept: int) -> None:
        """Cut the cache down to its first ``kept`` positions."""
        surplus = len(self._fed) - kept
        if surplus and kept:
            self._cache.crop(-surplus)
        elif surplus:
            self._cache = DynamicCache()
        del self._fed[kept:]


def _choose(logits: Tensor, temperature: float) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits.float() / temperature).softmax(-1), 1))


def _split(text: str, stop: str) -> tuple[str, str]:
    """A text before its stop, and from there on; nothing if there is none."""
    before, found, after = text.partition(stop) if stop else (text, "", "")
    return before, found + after


def _ready(text: str, stop: str) -> str:
    """A text without what may still change: half a character, or the beginning of a stop."""
    text = text.rstrip("\ufffd")
    held = next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
    return text[: len(text) - held]


def _refuse_endless(model: StreamformerLlavaForConditionalGeneration) -> None:
    """Refuse a tower that would remember every frame of an endless stream."""
    config = getattr(model.tower.encoder, "config", None)
    if getattr(config, "temporal_attention", False) and config.span is None:
        raise ValueError(
            f"the tower's window=None with temporal_positions={config.temporal_positions!r} "
            "remembers every frame; load the model with window=64, say"
        )
