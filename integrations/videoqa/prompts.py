"""Prompts: templates, tokenisation around the placeholders, and what of it training learns.

A conversation is a list of texts, user and assistant in turns; None at its end asks for a reply.
``<image>`` stands where the tokens of a video or an image go. The text around placeholders is
tokenised piece by piece, so that no token ever reaches across one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from integrations.videoqa.splice import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX


@dataclass(frozen=True)
class Template:
    """How turns become one text; all fields but two are that text, in the order of their use.

    Attributes:
        system: the system's own words, between ``before_system`` and ``after_system``.
        header: what precedes a reply, and ends a prompt that asks for one.
        stop: what ends a reply; generation stops there.
        says_question: whether user turns are written. If not, only their placeholders are.
        marks: tokens that released training takes for targets wherever they stand, and with
            them the headers; empty if it learns replies alone.
    """

    before_system: str = ""
    system: str = ""
    after_system: str = ""
    before_user: str = ""
    after_user: str = ""
    header: str = ""
    before_reply: str = ""
    stop: str = ""
    after_reply: str = ""
    says_question: bool = True
    marks: tuple[str, ...] = ()


_VICUNA = Template(
    system="A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user's questions.",
    after_system=" ",
    before_user="USER: ",
    after_user=" ",
    header="ASSISTANT:",
    before_reply=" ",
    stop="</s>",
)

TEMPLATES: dict[str, Template] = {
    "vicuna_v1": _VICUNA,
    "v1": _VICUNA,
    "qwen_1_5": Template(
        before_system="<|im_start|>system\n",
        system="You are a helpful assistant.",
        after_system="<|im_end|>\n",
        before_user="<|im_start|>user\n",
        after_user="<|im_end|>\n",
        header="<|im_start|>assistant\n",
        stop="<|im_end|>",
        after_reply="\n",
        marks=("<|im_start|>", "<|im_end|>", "\n"),
    ),
    # Captions of the first training stage: no roles, and the instruction is left out.
    "plain": Template(stop="\n", says_question=False),
    # Roles without a system's words, for small models.
    "brief": Template(
        before_user="USER: ",
        after_user=" ",
        header="ASSISTANT:",
        before_reply=" ",
        stop="</s>",
    ),
}

Kind = Literal["fixed", "header", "reply"]


def get_template(name: str) -> Template:
    """A template by its name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in TEMPLATES:
        raise ValueError(f"no prompt template {name!r}; known are {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]


def render(
    messages: Sequence[str | None], template: str | Template, system: str | None = None
) -> str:
    """The prompt of a conversation.

    Args:
        messages: texts of user and assistant in turns, the user first; None at the end asks for
            the assistant's.
        template: itself, or its name.
        system: the system's words, instead of the template's own.

    Raises:
        ValueError: an empty conversation, or None elsewhere.
    """
    return "".join(text for text, _ in _pieces(messages, template, system))


def _pieces(
    messages: Sequence[str | None], template: str | Template, system: str | None = None
) -> list[tuple[str, Kind]]:
    """Parts of the prompt, each with what it is."""
    form = get_template(template) if isinstance(template, str) else template
    if not messages or None in messages[:-1] or (messages[-1] is None and len(messages) % 2):
        raise ValueError(
            f"a conversation of {len(messages)} texts, {list(messages)}: give user and assistant "
            "in turns, and None only at the end, for the reply that is asked for"
        )
    words = form.system if system is None else system
    pieces: list[tuple[str, Kind]] = []
    if words or form.before_system:
        pieces.append((form.before_system + words + form.after_system, "fixed"))
    for turn, text in enumerate(messages):
        if turn % 2 == 0:
            said = text if form.says_question else IMAGE_TOKEN * text.count(IMAGE_TOKEN)
            pieces.append((form.before_user + said + form.after_user, "fixed"))
            continue
        pieces.append((form.header, "header"))
        if text is not None:
            pieces.append((form.before_reply + text + form.stop, "reply"))
            pieces.append((form.after_reply, "fixed"))
    return pieces


def tokenize(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a prompt, with -200 for each placeholder.

    Of the ``BOS`` that a tokenizer puts before every text only the first one stays.
    """
    ids: list[int] = []
    for number, chunk in enumerate(prompt.split(IMAGE_TOKEN)):
        if number:
            ids.append(IMAGE_TOKEN_INDEX)
        ids += tokenizer(chunk).input_ids[_extra_bos(chunk, number, tokenizer) :]
    return ids


def _extra_bos(chunk: str, number: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many ids at the start of a chunk are a BOS that stands in the prompt already."""
    if number == 0 or tokenizer.bos_token_id is None:
        return 0
    return int(tokenizer(chunk).input_ids[:1] == [tokenizer.bos_token_id])


# -- training -------------------------------------------------------------------------------------


def read_conversation(turns: Sequence[Mapping[str, str]]) -> list[str]:
    """Texts of a conversation in LLaVA's JSON, a single placeholder brought to its front.

    Args:
        turns: ``{"from": "human" or "gpt", "value": text}``, the human first.

    Raises:
        ValueError: turns out of order, or by somebody else.
    """
    roles = [turn.get("from") for turn in turns]
    if not turns or any(role != ("human", "gpt")[i % 2] for i, role in enumerate(roles)):
        raise ValueError(f"turns by {roles}: needed are 'human' and 'gpt' in turns, 'human' first")
    texts = [turn["value"] for turn in turns]
    return [
        f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}"
        if text.count(IMAGE_TOKEN) == 1
        else text
        for text in texts
    ]


def training_ids(
    messages: Sequence[str],
    template: str | Template,
    tokenizer: PreTrainedTokenizerBase,
    released_targets: bool = False,
) -> tuple[Tensor, Tensor]:
    """Ids of a whole conversation and the labels that training learns from.

    Args:
        messages: as for `render`, complete.
        template: itself, or its name.
        tokenizer: a fast one; it tells which characters a token stands for.
        released_targets: also learn what the released Qwen models learnt by accident: headers, and
            the template's ``marks`` in the texts of system and user too.

    Returns:
        Ids and labels, both ``(length,)`` int64. Labels are -100 but for replies and their stop.

    Raises:
        ValueError: a tokenizer that cannot tell characters.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} cannot tell which characters a token stands for; load "
            "the fast tokenizer (tokenizer.json)"
        )
    form = get_template(template) if isinstance(template, str) else template
    kinds = ("reply", "header") if released_targets and form.marks else ("reply",)
    text, spans = "", []
    for piece, kind in _pieces(messages, form):
        if kind in kinds or (piece == form.after_reply and len(kinds) > 1 and spans):
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    marks = _single_ids(form.marks, tokenizer) if released_targets else set()
    ids, labels, start = [], [], 0
    for number, chunk in enumerate(text.split(IMAGE_TOKEN)):
        if number:
            ids.append(IMAGE_TOKEN_INDEX)
            labels.append(IGNORE_INDEX)
        encoded = tokenizer(chunk, return_offsets_mapping=True)
        skipped = _extra_bos(chunk, number, tokenizer)
        for token, (first, last) in list(
            zip(encoded.input_ids, encoded.offset_mapping, strict=True)
        )[skipped:]:
            learnt = token in marks or _inside(start + first, start + last, spans)
            ids.append(token)
            labels.append(token if learnt else IGNORE_INDEX)
        start += len(chunk) + len(IMAGE_TOKEN)
    return torch.tensor(ids), torch.tensor(labels)


def _inside(first: int, last: int, spans: list[tuple[int, int]]) -> bool:
    """Whether a token of characters [first, last) belongs to a span; it may be of no width."""
    return any(begin <= first < end or begin < last <= end for begin, end in spans)


def _single_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> set[int]:
    encoded = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    return {ids[0] for ids in encoded if len(ids) == 1}


# -- what stands around a question ----------------------------------------------------------------


def question_text(question: str, visuals: int = 1, times: str | None = None) -> str:
    """A user's text: a placeholder for each visual that has none, then times, then the question.

    Args:
        question: its placeholders, if it has any, stay where they are.
        visuals: how many videos and images it is about.
        times: sentence on when frames were taken, see `time_sentence`.
    """
    if times:
        question = f"{times}\n{question}"
    if not visuals or IMAGE_TOKEN in question:
        return question
    return f"{IMAGE_TOKEN * visuals}\n{question}"


def time_sentence(duration: float, times: str, count: int) -> str:
    """Sentence on how long a video is and when its frames were taken, both in seconds."""
    return (
        f"The video lasts {duration:.2f} seconds. Of it you see {count} frames, taken at {times}. "
        "Answer the following question about the video."
    )
