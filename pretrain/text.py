"""The frozen text side: SigLIP's text tower, prompt templates, and label embeddings kept in memory.

A text's embedding is the tower's pooled output: last position of the sequence padded to its full
length, final norm, linear head (SigLIP). A label's embedding is the mean over prompt templates of
unit-length text embeddings (prompt ensembling, Radford et al. 2021, section 3.1.4), brought back
to unit length: without that, labels whose prompts disagree would get a lower temperature.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STEMS = ("a photo of", "a video of", "a example of", "a demonstration of")  # sic: "a example"
_TAILS = (
    "{}.",
    "a person {}.",
    "a person using {}.",
    "a person doing {}.",
    "a person during {}.",
    "a person performing {}.",
    "a person practicing {}.",
)

_ROWS = 16  # texts per run of the tower

TEMPLATES: dict[str, tuple[str, ...]] = {
    "video": tuple(f"{stem} {tail}" for stem in _STEMS for tail in _TAILS),  # 28, actions
    "plain": ("{}",),  # objects and scenes, and labels that are sentences already
}


def resolve_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """The prompts behind a name of `TEMPLATES`, or a custom set checked for its one ``{}``."""
    if isinstance(templates, str):
        if templates not in TEMPLATES:
            raise ValueError(
                f"no template set named {templates!r}; known: {', '.join(TEMPLATES)}. "
                "Give a list of templates for a set of your own"
            )
        return TEMPLATES[templates]
    if not templates:
        raise ValueError("the template set is empty; use 'plain' for the label alone")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"template {template!r} needs exactly one {{}} where the label goes")
    return tuple(templates)


class TextTower:
    """SigLIP's text tower, frozen, running once per distinct text.

    Deliberately not an ``nn.Module``: a model that holds one neither trains, moves nor saves it.
    ``cache_size`` bounds how many texts stay in memory, the longest unused ones going first; a
    hundred thousand texts of width 768 are about 0.3 GB.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        max_length: int,
        device: torch.device | str = "cpu",
        cache_size: int = 100_000,
    ) -> None:
        self.model = model.eval().requires_grad_(False).to(device)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.device = torch.device(device)
        self.encoded = 0  # texts that went through the tower so far
        self._cache_size = cache_size
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._banks: dict[tuple[tuple[str, ...], tuple[str, ...], bool], Tensor] = {}

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Pooled embeddings (len(texts), D), float32, not normalised, without gradient."""
        new = [text for text in dict.fromkeys(texts) if text not in self._cache]
        rows = dict(zip(new, self._encode(new), strict=True)) if new else {}
        for text in dict.fromkeys(texts):
            if text not in rows:
                rows[text] = self._cache[text]
                self._cache.move_to_end(text)
            else:
                self._cache[text] = rows[text]
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return torch.stack([rows[text] for text in texts])

    def embed_labels(
        self,
        labels: Sequence[str],
        templates: str | Sequence[str] = "video",
        *,
        renormalize: bool = True,
    ) -> Tensor:
        """Label embeddings (C, D) in the order of the labels, float32, computed once and kept.

        ``renormalize=False`` keeps the plain mean of the prompts, shorter than 1: the released
        checkpoints were trained against these.
        """
        prompts = resolve_templates(templates)
        key = (tuple(labels), prompts, renormalize)
        if key not in self._banks:
            texts = [prompt.replace("{}", label) for label in labels for prompt in prompts]
            embeddings = F.normalize(self._encode(texts), dim=-1)
            bank = embeddings.view(len(labels), len(prompts), -1).mean(1)  # (C, D)
            self._banks[key] = F.normalize(bank, dim=-1) if renormalize else bank
        return self._banks[key]

    @torch.no_grad()
    def _encode(self, texts: Sequence[str]) -> Tensor:
        """Run the tower on (n) texts; every text gets the same bits whatever its company.

        Matrix products round differently at different sizes, and which texts are still to be
        encoded depends on where a run was resumed: so the tower always sees `_ROWS` texts.
        """
        empty = [i for i, text in enumerate(texts) if not text.strip()]
        if empty:
            raise ValueError(f"text {empty[0]} of {len(texts)} is empty; give it words")
        parts = []
        for start in range(0, len(texts), _ROWS):
            rows = list(texts[start : start + _ROWS])
            # input_ids alone: SigLIP was trained without an attention mask, padding included.
            ids = self.tokenizer(
                rows + rows[-1:] * (_ROWS - len(rows)),
                padding="max_length",
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            )["input_ids"]
            with torch.autocast(self.device.type, enabled=False):
                pooled = self.model(input_ids=ids.to(self.device)).pooler_output  # (_ROWS, D)
            parts.append(pooled[: len(rows)].float())
        self.encoded += len(texts)
        return torch.cat(parts)


def load_siglip_text(
    source: str | Path, *, device: torch.device | str = "cpu", cache_size: int = 100_000
) -> tuple[TextTower, float, float]:
    """Text tower, log scale and bias of a SigLIP model in a folder or on the hub.

    The two scalars are where training starts: the log of the factor, and the bias, of the sigmoid
    loss that SigLIP itself was trained with. Raises ValueError if the source is no SigLIP model or
    lacks a weight.
    """
    from transformers import AutoConfig, AutoTokenizer, SiglipModel

    config = AutoConfig.from_pretrained(source)
    if config.model_type != "siglip":
        raise ValueError(
            f"{source} holds a {config.model_type!r} model; the text tower comes from a SigLIP "
            "model with both towers (model_type 'siglip'), such as google/siglip-base-patch16-224"
        )
    model, info = SiglipModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    missing = sorted(k for k in info["missing_keys"] if not k.startswith("vision_model."))
    if missing:
        raise ValueError(f"{source} lacks {len(missing)} weights of the text tower: {missing[:3]}")
    tower = TextTower(
        model.text_model,
        AutoTokenizer.from_pretrained(source),
        max_length=config.text_config.max_position_embeddings,
        device=device,
        cache_size=cache_size,
    )
    return tower, model.logit_scale.item(), model.logit_bias.item()
