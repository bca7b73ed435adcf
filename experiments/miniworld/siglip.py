"""The mini SigLIP: transformers' own model, trained on miniworld's stills and captions.

Images meet captions in the pairwise sigmoid loss (Zhai et al. 2023, section 3.1). The text tower
alone also learns to tell actions apart, by pairing two captions of one clip in the same loss: what
web captions full of verbs give the real one. The image tower sees stills only, and nothing of time.
"""

from __future__ import annotations

import csv
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from tqdm import trange
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipModel

from pretrain.alignment import alignment_loss
from pretrain.launch import average_gradients, gather_shares, own_share, run_processes

from .actions import PRETRAINING_ACTIONS

logger = logging.getLogger(__name__)

PAD, UNKNOWN = "<pad>", "<unk>"
BARE_SHARE = 0.3  # of caption pairs whose second text is the bare name of the action
_TEXT_SEED, _IMAGE_SEED = 1, 2


@dataclass(frozen=True)
class SiglipRecipe:
    """Size and training of the mini SigLIP.

    Attributes:
        width, layers, heads, mlp: of both towers; the text tower has ``text_layers``.
        patch_size: side of a patch, in pixels.
        text_length: tokens that a caption is padded to.
        steps, batch_size, lr, warmup, weight_decay: AdamW with a cosine schedule.
        text_batch: pairs of captions in each step of the text tower's own loss.
        processes: that share a batch, each with one thread.
        seed: of weights and batches.
    """

    width: int = 64
    layers: int = 3
    heads: int = 4
    mlp: int = 128
    text_layers: int = 2
    patch_size: int = 8
    text_length: int = 24
    steps: int = 600
    batch_size: int = 256
    text_batch: int = 64
    lr: float = 4e-3
    warmup: int = 40
    weight_decay: float = 0.05
    processes: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Stills:
    """Image-text pairs of one split."""

    images: Tensor  # (M, 3, H, W) uint8
    captions: list[str]
    shapes: list[str]
    colours: list[str]

    @property
    def single(self) -> np.ndarray:
        """Where a still shows one shape alone, ``(M,)`` bool."""
        return np.array([" and " not in caption for caption in self.captions])


def read_stills(world: Path, split: str) -> Stills:
    """Images, captions and looks of a split of ``world/stills``."""
    with (world / "stills" / f"{split}.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    images = np.stack([np.asarray(Image.open(world / "stills" / row["image"])) for row in rows])
    return Stills(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        [row["caption"] for row in rows],
        [row["shape"] for row in rows],
        [row["colour"] for row in rows],
    )


def train_siglip(world: Path, out: Path, recipe: SiglipRecipe) -> None:
    """Train on ``world`` and save model and tokenizer to ``out``, as transformers lays them out."""
    run_processes(_train, world, out, recipe, processes=recipe.processes)


def _train(world: Path, out: Path, recipe: SiglipRecipe) -> None:
    """One process's part: each embeds a share of a batch, and all see all pairs of it."""
    stills = read_stills(world, "train")
    clips = _clip_texts(world)
    tokenizer = build_tokenizer(
        [*stills.captions, *(text for texts, _ in clips for text in texts), *PRETRAINING_ACTIONS]
    )
    torch.manual_seed(recipe.seed)
    model = SiglipModel(_config(recipe, stills.images.shape[-1], len(tokenizer)))
    with torch.no_grad():
        model.logit_scale.fill_(math.log(10.0))
        model.logit_bias.fill_(-math.log(recipe.batch_size))  # nearly all pairs are negative
    scalars = [model.logit_scale, model.logit_bias]
    others = [p for name, p in model.named_parameters() if not name.startswith("logit_")]
    optimizer = torch.optim.AdamW(
        [{"params": others, "weight_decay": recipe.weight_decay, "lr": recipe.lr},
         {"params": scalars, "weight_decay": 0.0, "lr": 10 * recipe.lr}]
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / recipe.warmup)
        * (1 + math.cos(math.pi * step / recipe.steps)) / 2,
    )  # fmt: skip
    ids = _tokens(tokenizer, stills.captions, recipe.text_length)
    pairs = _CaptionPairs(clips, tokenizer, recipe)
    number = {caption: i for i, caption in enumerate(dict.fromkeys(stills.captions))}
    captions = torch.tensor([number[caption] for caption in stills.captions])
    images = torch.Generator().manual_seed(recipe.seed + _IMAGE_SEED)
    texts = np.random.default_rng(recipe.seed + _TEXT_SEED)
    first = not dist.is_initialized() or dist.get_rank() == 0
    quiet = {} if first else {"disable": True}
    bar = trange(recipe.steps, desc="mini SigLIP", unit="step", mininterval=1, **quiet)
    for _ in bar:
        rows = torch.randint(len(ids), (recipe.batch_size,), generator=images)
        pixels = normalize(stills.images[own_share(rows)])
        vision = gather_shares(model.vision_model(pixel_values=pixels).pooler_output)
        text = gather_shares(model.text_model(input_ids=ids[own_share(rows)]).pooler_output)
        # The same words for two images are a match for both.
        match = captions[rows, None] == captions[rows]
        loss = _pair_loss(model, vision, text, match)
        loss = loss + pairs.loss(model, texts)
        loss.backward()
        average_gradients(model.parameters())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    if first:
        model.eval().save_pretrained(out)
        tokenizer.save_pretrained(out)


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words: those of ``texts``, padding, and one for unknown words."""
    splitter = pre_tokenizers.Whitespace()
    words = sorted({word for text in set(texts) for word, _ in splitter.pre_tokenize_str(text)})
    vocabulary = {word: number for number, word in enumerate([UNKNOWN, PAD, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN,
        model_input_names=["input_ids"],  # SigLIP reads padding too: no attention mask
    )  # fmt: skip


def normalize(images: Tensor) -> Tensor:
    """Bytes ``(…, 3, H, W)`` to [-1, 1], as SigLIP expects."""
    return images.float().div_(127.5).sub_(1.0)


def _config(recipe: SiglipRecipe, image_size: int, words: int) -> SiglipConfig:
    shared = {
        "hidden_size": recipe.width,
        "intermediate_size": recipe.mlp,
        "num_attention_heads": recipe.heads,
    }
    text = {
        **shared,
        "num_hidden_layers": recipe.text_layers,
        "vocab_size": words,
        "max_position_embeddings": recipe.text_length,
        "pad_token_id": 1,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {
        **shared,
        "num_hidden_layers": recipe.layers,
        "image_size": image_size,
        "patch_size": recipe.patch_size,
    }
    return SiglipConfig(text_config=text, vision_config=vision)


def _clip_texts(world: Path) -> list[tuple[list[str], str]]:
    """Captions and action of every pre-training clip that shows one action."""
    lines = (world / "clips" / "index.jsonl").read_text(encoding="utf-8").splitlines()
    clips = [record for record in map(json.loads, lines) if record["split"] == "train"]
    return [
        (clip["captions"], clip["actions"][0]["action"])
        for clip in clips
        if len(clip["actions"]) == 1
    ]


def _tokens(tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int) -> Tensor:
    return tokenizer(
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )["input_ids"]


def _pair_loss(
    model: SiglipModel, left: Tensor, right: Tensor, match: Tensor, mask: Tensor | None = None
) -> Tensor:
    return alignment_loss(
        left,
        right,
        torch.where(match, 1.0, -1.0),
        scale=model.logit_scale.exp(),
        bias=model.logit_bias,
        mask=mask,
    )


class _CaptionPairs:
    """Captions of a clip belong together, or a caption and the bare name of its action."""

    def __init__(
        self,
        clips: list[tuple[list[str], str]],
        tokenizer: PreTrainedTokenizerFast,
        recipe: SiglipRecipe,
    ) -> None:
        self.batch = recipe.text_batch
        texts = [*PRETRAINING_ACTIONS, *(text for captions, _ in clips for text in captions)]
        self.ids = _tokens(tokenizer, texts, recipe.text_length)
        self.action = np.array([PRETRAINING_ACTIONS.index(action) for _, action in clips])
        self.count = np.array([len(captions) for captions, _ in clips])
        self.first = len(PRETRAINING_ACTIONS) + np.cumsum(self.count) - self.count

    def loss(self, model: SiglipModel, rng: np.random.Generator) -> Tensor:
        """Sigmoid loss of a fresh batch of pairs."""
        clips = rng.integers(len(self.action), size=self.batch)
        left, right = (self.first[clips] + rng.integers(self.count[clips]) for _ in range(2))
        bare = rng.random(self.batch) < BARE_SHARE
        actions = self.action[clips]
        rows = torch.from_numpy(np.concatenate([left, np.where(bare, actions, right)]))
        texts = model.text_model(input_ids=self.ids[own_share(rows)])
        embedded = F.normalize(gather_shares(texts.pooler_output), dim=-1)
        match = torch.eye(self.batch, dtype=torch.bool)
        # A bare name fits every clip of that action: no negative.
        fits = torch.from_numpy((actions[:, None] == actions) & bare)
        return _pair_loss(model, *embedded.chunk(2), match, mask=match | ~fits)
