"""Questions in, answers out: what the model does with texts, files and its tokenizer.

A prompt is written (`prompts`), its visuals are encoded, both are spliced, and the LLM continues
or scores them. Rows of any lengths form one batch; a video is encoded once for all questions on
it, also in later calls.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from integrations.videoqa.frames import Sampling, VideoClip, read_video
from integrations.videoqa.prompts import (
    get_template,
    question_text,
    render,
    time_sentence,
    tokenize,
)
from integrations.videoqa.splice import IMAGE_TOKEN, Spliced, splice, unpad

# What `answer` and `score` take for a visual: a video or image file, decoded frames
# (T, H, W, 3) uint8, an image, or tokens (n, H) that `encode_video` gave.
Visual = str | Path | VideoClip | np.ndarray | Image.Image | Tensor
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp"}


@dataclass(frozen=True)
class Score:
    """How likely a given answer is.

    Attributes:
        loglikelihood: sum over its tokens, natural logarithm.
        tokens: how many they are, the stop included.
        greedy: whether greedy decoding would give exactly these.
    """

    loglikelihood: float
    tokens: int
    greedy: bool


class VisualCache:
    """The last few videos' visual tokens, by what identifies a video; 0 keeps none."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._kept: OrderedDict[Hashable, tuple[Tensor, Sampling]] = OrderedDict()

    def get(self, key: Hashable) -> tuple[Tensor, Sampling] | None:
        """Tokens and sampling of a video, if they are kept."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: Hashable, value: tuple[Tensor, Sampling]) -> None:
        """Keep a video's tokens, and forget the video that was longest not asked for."""
        self._kept[key] = value
        while len(self._kept) > self.capacity:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        """Forget all: the weights have changed, say."""
        self._kept.clear()


class Answering:
    """The part of the model that answers; `modeling` mixes it in."""

    tokenizer: PreTrainedTokenizerBase | None
    visual_cache: VisualCache

    def encode_file(self, video: str | Path | VideoClip) -> tuple[Tensor, Sampling]:
        """Visual tokens ``(n, H)`` of a video file's sampled frames, and which frames these are.

        Videos that were asked for lately are not encoded again.

        Raises:
            backbone.video.VideoError: it cannot be read.
        """
        config = self.config
        clip = video if isinstance(video, VideoClip) else VideoClip(video)
        rule = (config.num_frames, config.video_fps, config.force_sample)
        key = (*clip.key, *rule)
        if (kept := self.visual_cache.get(key)) is None:
            frames, sampling = read_video(clip, *rule)
            kept = self.encode_video(frames), sampling
            self.visual_cache.put(key, kept)
        return kept

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | Sequence[Tensor],
        visuals: Sequence[Tensor] = (),
        attention_mask: Tensor | None = None,
        **generation: Any,
    ) -> Tensor:
        """Continue prompts of any lengths.

        Args:
            input_ids: ``(B, L)``, or rows of unequal lengths; -200 where a visual goes.
            visuals: tokens ``(n, H)`` of the visuals, in the order of the placeholders.
            attention_mask: ``(B, L)``, 0 at padding; None if there is none.
            generation: fields of ``transformers.GenerationConfig``; greedy unless they say else.
                ``streamer``, ``logits_processor`` and the like are handed on too.

        Returns:
            New ids ``(B, at most max_new_tokens)``.
        """
        rows = list(input_ids) if attention_mask is None else unpad(input_ids, attention_mask)
        batch = splice(
            [row.to(self._device) for row in rows],
            visuals,
            self.get_input_embeddings(),
            padding_side="left",
        )
        settings, handed_on = self._generation(generation)
        return self.language_model.generate(
            inputs_embeds=batch.inputs_embeds,
            attention_mask=batch.attention_mask,
            generation_config=settings,
            **handed_on,
        )

    @torch.no_grad()
    def answer(
        self,
        prompts: Sequence[str | Sequence[str | None]],
        visuals: Sequence[Visual | Sequence[Visual] | None] | None = None,
        until: Sequence[str] = (),
        **generation: Any,
    ) -> list[str]:
        """Answer a batch of questions, each on its own visuals or none.

        Args:
            prompts: of each row, the question; or a conversation, user and assistant in turns,
                that ends with the user. Placeholders may be left out: then the visuals stand in
                front of the first user text.
            visuals: of each row one visual, several, or None.
            until: texts that end an answer; they are cut off with all that follows.
            generation: see `generate`; ``max_new_tokens`` is 128 unless given.

        Raises:
            ValueError: visuals that do not fit the prompts.
            backbone.video.VideoError: a video that cannot be read; it is never answered for.
        """
        texts, tokens = self._prompts(prompts, visuals)
        rows = [torch.tensor(tokenize(text, self._tokenizer)) for text in texts]
        new = self.generate(rows, tokens, **{"max_new_tokens": 128, **generation})
        texts = self._tokenizer.batch_decode(new, skip_special_tokens=True)
        stop = get_template(self.config.template).stop
        return [_cut(text, (stop, *until)).strip() for text in texts]

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[str | Sequence[str | None]],
        answers: Sequence[str],
        visuals: Sequence[Visual | Sequence[Visual] | None] | None = None,
    ) -> list[Score]:
        """How likely given answers are, each to its prompt; see `answer` for the others."""
        texts, tokens = self._prompts(prompts, visuals)
        rows, tails = [], []  # whole rows, and how many tokens at their ends are the answer's
        for text, answer in zip(texts, answers, strict=True):
            (row,), (asked,) = self._answered(text, [answer])
            rows.append(row)
            tails.append(len(row) - asked)
        batch = splice(rows, tokens, self.get_input_embeddings(), padding_side="left")
        longest = max(tails)
        logits = self.language_model(
            inputs_embeds=batch.inputs_embeds,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            logits_to_keep=longest + 1,
            use_cache=False,
        ).logits  # (B, longest + 1, vocabulary): all rows end at the right
        scores = []
        for row, tail, predicted in zip(rows, tails, logits.float().log_softmax(-1), strict=True):
            wanted, predicted = row[-tail:], predicted[longest - tail : longest]
            chosen = predicted.gather(1, wanted[:, None]).sum()
            greedy = (predicted.argmax(-1) == wanted).all()
            scores.append(Score(float(chosen), tail, bool(greedy)))
        return scores

    def choose(
        self,
        prompts: Sequence[str | Sequence[str | None]],
        choices: Sequence[Sequence[str]],
        visuals: Sequence[Visual | Sequence[Visual] | None] | None = None,
    ) -> list[str]:
        """Of each prompt's choices the likeliest, all its tokens and the stop taken together.

        The first of equals. A prompt is read once for all its choices. See `answer` for prompts
        and visuals.

        Raises:
            ValueError: a prompt without choices.
        """
        if not all(choices):
            raise ValueError(f"prompt {[*map(bool, choices)].index(False)} has no choices")
        texts, tokens = self._prompts(prompts, visuals)
        starts, tails, owners = [], [], []
        for number, (text, offered) in enumerate(zip(texts, choices, strict=True)):
            rows, asked = self._answered(text, offered)
            common = min(asked)
            starts.append(rows[0][:common])
            tails += [row[common:] for row in rows]
            owners += [number] * len(rows)
        batch = splice(starts, tokens, self.get_input_embeddings(), padding_side="left")
        likely = self._continued(batch, torch.tensor(owners, device=self._device), tails)
        split = likely.split([len(offered) for offered in choices])
        return [offered[int(own.argmax())] for offered, own in zip(choices, split, strict=True)]

    def _answered(self, text: str, answers: Sequence[str]) -> tuple[list[Tensor], list[int]]:
        """For each answer the ids of prompt, answer and stop, and how many stay the prompt's."""
        template = get_template(self.config.template)
        asked = tokenize(text, self._tokenizer)
        rows = [
            tokenize(text + template.before_reply + answer + template.stop, self._tokenizer)
            for answer in answers
        ]
        shared = [shared_start(asked, row) for row in rows]
        return [torch.tensor(row, device=self._device) for row in rows], shared

    def _continued(self, batch: Spliced, owners: Tensor, tails: Sequence[Tensor]) -> Tensor:
        """Log-likelihood ``(R,)`` of each tail of ids behind its owner, a row of the batch."""
        read = self.language_model(
            inputs_embeds=batch.inputs_embeds,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            logits_to_keep=1,
            use_cache=True,
        )
        cache = read.past_key_values
        cache.batch_select_indices(owners)
        ids = pad_sequence(tails, batch_first=True)  # (R, S)
        there = pad_sequence([torch.ones_like(tail) for tail in tails], batch_first=True)
        before = batch.attention_mask[owners]  # (R, L)
        places = before.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=ids.device)
        rest = self.language_model(
            input_ids=ids,
            attention_mask=torch.cat([before, there], dim=1),
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
        )
        logits = torch.cat([read.logits[owners], rest.logits[:, :-1]], dim=1)  # (R, S, vocabulary)
        each = logits.float().log_softmax(-1).gather(2, ids[..., None]).squeeze(2)
        return each.masked_fill(there == 0, 0).sum(1)

    def _prompts(
        self,
        prompts: Sequence[str | Sequence[str | None]],
        visuals: Sequence[Visual | Sequence[Visual] | None] | None,
    ) -> tuple[list[str], list[Tensor]]:
        """Prompts as texts, and the tokens of their visuals in order."""
        given = [
            [] if own is None else [own] if isinstance(own, Visual) else list(own)
            for own in ([None] * len(prompts) if visuals is None else visuals)
        ]
        if len(given) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and visuals for {len(given)} of them")
        texts, tokens = [], []
        encoded: dict[int, tuple[Tensor, Sampling | None]] = {}  # one object encodes once
        for number, (prompt, own) in enumerate(zip(prompts, given, strict=True)):
            for item in own:
                if id(item) not in encoded:
                    encoded[id(item)] = self._encode(item)
            seen = [encoded[id(item)] for item in own]
            text = render([*self._conversation(prompt, seen), None], self.config.template)
            if (count := text.count(IMAGE_TOKEN)) != len(own):
                raise ValueError(
                    f"prompt {number} has {count} placeholders {IMAGE_TOKEN} and {len(own)} "
                    "visuals; write one for each, or none at all"
                )
            texts.append(text)
            tokens += [part for part, _ in seen]
        return texts, tokens

    def _conversation(
        self,
        prompt: str | Sequence[str | None],
        seen: Sequence[tuple[Tensor, Sampling | None]],
    ) -> list[str]:
        """Texts in turns, with placeholders and, if the config wants it, the frames' times."""
        texts = [prompt] if isinstance(prompt, str) else [t for t in prompt if t is not None]
        if len(texts) % 2 == 0:
            raise ValueError(f"a conversation of {len(texts)} texts does not end with the user")
        sampling = next((sampling for _, sampling in seen if sampling is not None), None)
        times = None
        if self.config.time_instruction and sampling is not None:
            times = time_sentence(sampling.duration, sampling.times_text, len(sampling.times))
        written = any(IMAGE_TOKEN in text for text in texts)
        first = question_text(texts[0], 0 if written else len(seen), times)
        return [first, *texts[1:]]

    def _encode(self, item: Visual) -> tuple[Tensor, Sampling | None]:
        """Tokens ``(n, H)`` of one visual, and which frames they are of, if it was sampled here."""
        if isinstance(item, Tensor) and item.is_floating_point():
            return item, None
        if isinstance(item, np.ndarray | Tensor):
            return self.encode_video(item), None
        if isinstance(item, Image.Image):
            return self.encode_image(item), None
        if not isinstance(item, VideoClip) and Path(item).suffix.lower() in IMAGE_SUFFIXES:
            with Image.open(item) as image:
                return self.encode_image(image), None
        return self.encode_file(item)

    def _generation(self, given: Mapping[str, Any]) -> tuple[GenerationConfig, dict[str, Any]]:
        """Settings of one generation; a checkpoint's own sampling defaults do not count."""
        known = GenerationConfig().to_dict()
        fields = {name: value for name, value in given.items() if name in known}
        others = {name: value for name, value in given.items() if name not in known}
        defaults = {"do_sample": False, "eos_token_id": self.stop_ids, "pad_token_id": self.pad_id}
        return GenerationConfig(**{**defaults, **fields}), others

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the LLM's own, the tokenizer's, the template's."""
        own = self.language_model.generation_config.eos_token_id
        ids = set(own if isinstance(own, list) else [own])
        if self.tokenizer is not None:
            ids.add(self.tokenizer.eos_token_id)
            stop = get_template(self.config.template).stop
            encoded = self.tokenizer(stop, add_special_tokens=False).input_ids if stop else []
            if len(encoded) == 1:
                ids.add(encoded[0])
        return sorted(ids - {None})

    @property
    def pad_id(self) -> int:
        """Id that fills up answers which ended before others of their batch."""
        own = self.language_model.config.pad_token_id
        if own is None and self.tokenizer is not None:
            own = self.tokenizer.pad_token_id
        return own if own is not None else (self.stop_ids or [0])[0]

    @property
    def _device(self) -> torch.device:
        return self.get_input_embeddings().weight.device

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError(
                "the model has no tokenizer to write prompts with; load it with "
                "checkpoints.load_model, or set model.tokenizer"
            )
        return self.tokenizer


def shared_start(first: Sequence, second: Sequence) -> int:
    """How many items two sequences have in common from their start on."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _cut(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of the stops."""
    places = [text.find(stop) for stop in stops if stop]
    return text[: min((place for place in places if place >= 0), default=len(text))]
