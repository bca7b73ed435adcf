"""The mini language model of video question answering: a small Qwen2 and a tokenizer of words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

from integrations.videoqa.prompts import get_template

PAD, UNKNOWN, STOP = "<pad>", "<unk>", "</s>"


@dataclass(frozen=True)
class MiniLlm:
    """Size of the model.

    Attributes:
        width, layers, heads, mlp: of the transformer.
        positions: longest sequence, visual tokens included.
        template: of prompts; it must stop with ``</s>`` or a newline.
    """

    width: int = 96
    layers: int = 3
    heads: int = 4
    mlp: int = 256
    positions: int = 1024
    template: str = "brief"


def build_tokenizer(texts: Iterable[str], template: str = "brief") -> PreTrainedTokenizerFast:
    """One id for every word and mark of the texts and the template, a newline included.

    Answers are decoded with a space between words, as they are written.
    """
    form = get_template(template)
    around = (form.before_system, form.system, form.after_system, form.before_user,
              form.after_user, form.header)  # fmt: skip
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    words = {
        word for text in (*texts, *around, "\n") for word, _ in splitter.pre_tokenize_str(text)
    }
    vocabulary = [PAD, UNKNOWN, STOP, *sorted(words - {PAD, UNKNOWN, STOP})]
    core = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN)
    )
    core.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, unk_token=UNKNOWN, eos_token=STOP
    )


def calm(llm: PreTrainedModel) -> None:
    """Scale what each layer adds, so that a fresh model begins close to its words' embeddings.

    By ``(2 * layers) ** -0.5``, as GPT-2 begins (Radford et al. 2019, section 2.3). Without it the
    layers' noise is several times as large as the embeddings, in a model this narrow.
    """
    factor = (2 * llm.config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for name, weight in llm.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(factor)


def llm_config(tokenizer: PreTrainedTokenizerFast, size: MiniLlm) -> Qwen2Config:
    """Config of a Qwen2 of this size over the tokenizer's words."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.positions,
        initializer_range=size.width**-0.5,  # the usual 0.02 all but silences so narrow a model
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
