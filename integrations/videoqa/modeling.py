"""The video question answering model: frozen tower, projector, causal LLM.

    frames -> tower -> projector -> pooling, newlines -> spliced into the prompt -> LLM -> answer

After LLaVA-NeXT, with any ``backbone.VideoEncoder`` for a tower and any causal LLM of transformers.
Its parts are in `tower`, `visual`, `splice` and `prompts`; here they become one model that trains
(`forward`) and is saved. How it answers is in `answering`. Importing this file makes it known to
``AutoConfig``, ``AutoModel`` and ``AutoModelForImageTextToText``.

Letters: B rows, L their length, T frames, N patches of a frame, D width of the tower, H of the LLM.
A *visual* is what one placeholder stands for: a video or an image.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from backbone import CheckpointError, StreamformerConfig, VideoEncoder
from integrations.videoqa import visual
from integrations.videoqa.answering import IMAGE_SUFFIXES, Answering, Score, Visual, VisualCache
from integrations.videoqa.configuration import StreamformerLlavaConfig
from integrations.videoqa.frames import preprocess
from integrations.videoqa.splice import IGNORE_INDEX, IMAGE_TOKEN, Spliced, splice, unpad
from integrations.videoqa.tower import VisionTower, build_tower_model, load_tower_model

HUB_OPTIONS = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
)  # fmt: skip


class StreamformerLlavaPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the model."""

    config_class = StreamformerLlavaConfig
    base_model_prefix = "streamformer_llava"
    main_input_name = "input_ids"
    input_modalities = ("video", "image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _skip_keys_device_placement = ["past_key_values"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fresh projectors start as torch's linears, the newline as a unit vector by expectation.

        A fixed deviation of 0.02 would all but silence frames in front of a narrow LLM.
        """
        if isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.in_features**-0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, StreamformerLlavaPreTrainedModel):
            if module.image_newline is not None:
                init.normal_(module.image_newline, std=module.image_newline.numel() ** -0.5)
        else:
            super()._init_weights(module)


class StreamformerLlavaForConditionalGeneration(Answering, StreamformerLlavaPreTrainedModel):
    """A causal LLM that answers questions on videos and images.

    ``checkpoints.load_model`` loads it with its tokenizer, ``checkpoints.build_model`` makes a
    fresh one of an LLM and an encoder.

    Example:
        >>> model, tokenizer = load_model("<folder or hub id>", device="cuda")
        >>> model.answer(["What happens?", "Who?"], ["a.mp4", "a.mp4"], max_new_tokens=16)

    Attributes:
        tower: the frozen encoder.
        projector: into the LLM's width.
        image_newline: learned token ``(H,)``, or None.
        language_model: any causal LLM.
        tokenizer: needed by `answer` and `score`; set by the loaders.
        visual_cache: tokens of the last videos that were read from files.
        encoded_frames: frames and tiles that the tower has encoded so far.
    """

    def __init__(self, config: StreamformerLlavaConfig) -> None:
        super().__init__(config)
        if config.text_config is None:
            raise ValueError(
                "text_config=None: the config names no LLM; checkpoints.build_model makes a model "
                "of an LLM and an encoder"
            )
        width = config.text_config.hidden_size
        tower = None if config.tower_config is None else build_tower_model(config.tower_config)
        self.tower = self._make_tower(tower)
        self.projector = visual.build_projector(config.projector_type, config.tower_size, width)
        self.image_newline = nn.Parameter(torch.empty(width)) if config.has_newline else None
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.visual_cache = VisualCache(capacity=8)
        self.encoded_frames = 0
        self.post_init()
        self.tower.requires_grad_(False)
        if config.lora_rank:  # after post_init, which would draw the adapters anew
            self._inject_lora()

    # accelerate scales the loss by the tokens of a whole update, see `forward`
    accepts_loss_kwargs = True

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        tower: str | VideoEncoder | None = None,
        window: int | None = None,
        temporal_positions: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load from a folder or hub id in this layout.

        Takes what transformers' ``from_pretrained`` takes; keyword arguments that name config
        fields change them. A ``lora_rank`` where there was none adds adapters without effect, and
        0 merges those that there are. For released checkpoints there is `checkpoints.load_model`.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            args: as in transformers.
            tower: another tower than the saved one, see ``tower.load_tower_model``.
            window: frames that the tower may see; None keeps the checkpoint's.
            temporal_positions: the tower's policy past its time table; None keeps the
                checkpoint's.
            kwargs: as in transformers.

        Raises:
            CheckpointError: weights that do not cover the model; the message names the keys.
        """
        source, wants_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        config = kwargs.pop("config", None)
        if not isinstance(config, PretrainedConfig):
            known = StreamformerLlavaConfig.__annotations__
            fields = {name: kwargs.pop(name) for name in list(kwargs) if name in known}
            hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
            lora = {name: fields.pop(name) for name in list(fields) if name.startswith("lora_")}
            config = cls.config_class.from_pretrained(config or source, **hub, **fields)
        else:
            lora = {}
        spec = tower or (config.tower if config.tower_config is None else None)
        if spec is not None:  # before the LLM: what does not exist should fail at once
            part = load_tower_model(spec, window, temporal_positions)
            config.tower_config = None
        else:
            _change_time(config.tower_config, window, temporal_positions)
        model, info = super().from_pretrained(
            source,
            *args,
            config=config,
            output_loading_info=True,
            **{"ignore_mismatched_sizes": True, **kwargs},  # mismatches are reported by name
        )
        refuse_gaps(
            source,
            missing=info["missing_keys"],
            unexpected=[k for k in info["unexpected_keys"] if spec is None or k[:6] != "tower."],
            misshapen=[
                f"{key} {tuple(found)} instead of {tuple(expected)}"
                for key, found, expected in info["mismatched_keys"]
            ],
        )
        if spec is not None:
            model.attach_tower(part, spec if isinstance(spec, str) else None)
        model._change_lora(**lora)
        return (model, info) if wants_info else model

    # -- the parts --------------------------------------------------------------------------------

    def _make_tower(self, model: nn.Module | None) -> VisionTower:
        config = self.config
        return VisionTower(
            model, config.tower, config.tower_layer, config.tower_post_norm, config.frame_token
        )

    def attach_tower(self, model: nn.Module, name: str | None = None) -> None:
        """Take another tower: a ``StreamformerModel``, ``SiglipVisionModel`` or ``VideoEncoder``.

        The first two are saved with the model from now on; of others only the name.

        Raises:
            ValueError: tokens of another width than the projector takes.
        """
        config = self.config
        config.tower = name or getattr(model, "name", None)
        config.tower_config = None if isinstance(model, VideoEncoder) else model.config
        tower = self._make_tower(model)
        if (width := tower.encoder.embed_dim) != config.tower_size:
            raise ValueError(
                f"tower {config.tower} has tokens of width {width}, the projector was made for "
                f"{config.tower_size}; choose an encoder of that width, or train a projector for "
                "this one"
            )
        self.tower = tower.to(self.projector_device, self.projector_dtype).requires_grad_(False)
        self._keys_to_ignore_on_save = {
            f"tower.{key}" for key in tower.state_dict() if config.tower_config is None
        }
        self.visual_cache.clear()

    @property
    def projector_device(self) -> torch.device:
        """Where visual tokens are made."""
        return next(self.projector.parameters()).device

    def get_input_embeddings(self) -> nn.Module:
        """The LLM's token embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the LLM's token embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The LLM's output layer."""
        return self.language_model.get_output_embeddings()

    def train_only(self, *parts: str) -> None:
        """Freeze all but the named parts; the tower is always frozen.

        Args:
            parts: of ``projector`` and ``language_model``. With the latter goes the newline token,
                as in the released training; with LoRA, of the LLM only the adapters train.

        Raises:
            ValueError: another part.
        """
        unknown = set(parts) - {"projector", "language_model"}
        if unknown or not parts:
            raise ValueError(
                f"parts to train {sorted(parts)}: name 'projector', 'language_model' or both"
            )
        self.requires_grad_(False)
        if "projector" in parts:
            self.projector.requires_grad_(True)
        if "language_model" in parts:
            for name, weight in self.language_model.named_parameters():
                weight.requires_grad_(not self.config.lora_rank or ".lora_" in name)
            if self.image_newline is not None:
                self.image_newline.requires_grad_(True)

    # -- LoRA -------------------------------------------------------------------------------------

    def add_lora(
        self,
        rank: int,
        alpha: float = 16,
        dropout: float = 0.0,
        targets: str | None = None,
    ) -> None:
        """Put LoRA adapters into the LLM, in place and without effect yet (PEFT).

        They are saved and loaded with the model; the LLM's own weights are frozen.

        Args:
            rank: of the adapters.
            alpha: scale times rank.
            dropout: in front of them, in training.
            targets: regular expression of modules; None for all linears of attention and MLP.

        Raises:
            ValueError: there are adapters already, or no module matches.
        """
        if self.config.lora_rank:
            raise ValueError(
                f"the LLM has LoRA of rank {self.config.lora_rank} already; merge_lora() first"
            )
        config = self.config
        config.lora_rank, config.lora_alpha, config.lora_dropout = rank, alpha, dropout
        config.lora_targets = targets or config.lora_targets
        try:
            self._inject_lora()
        except ValueError:  # no module matches
            config.lora_rank = 0
            raise

    def _change_lora(self, lora_rank: int | None = None, **others: Any) -> None:
        """Bring a loaded model to the adapters that were asked for; None for those it has."""
        if lora_rank is None or lora_rank == self.config.lora_rank:
            return
        if lora_rank == 0:
            self.merge_lora()
        else:
            self.add_lora(lora_rank, **{k.removeprefix("lora_"): v for k, v in others.items()})

    def _inject_lora(self) -> None:
        import peft

        config = self.config
        lora = peft.LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=config.lora_targets,
        )
        peft.inject_adapter_in_model(lora, self.language_model)

    def merge_lora(self) -> None:
        """Fold the adapters into the LLM, in place; a plain LLM remains, free to train."""
        from backbone.lora import merge_lora

        merge_lora(nn.ModuleList([self.language_model]))  # in a list: the LLM's config has no rank
        del self.language_model.peft_config
        self.language_model.requires_grad_(True)
        self.config.lora_rank = 0

    # -- from frames to visual tokens -------------------------------------------------------------

    def preprocess(self, frames: np.ndarray | Tensor | Sequence[Image.Image]) -> Tensor:
        """Frames (T, H, W, 3) uint8 as the tower takes them, ``(T, 3, size, size)`` float32."""
        encoder = self.tower.encoder
        return preprocess(frames, encoder.image_size, encoder.image_mean, encoder.image_std)

    def preprocess_image(self, image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """An image as the tower takes it, ``(1 + tiles, 3, size, size)``, and its (width, height).

        The tiles are those of ``config.image_layout``.
        """
        side = self.tower.encoder.image_size
        if self.config.image_layout == "square":
            return self.preprocess([image]), image.size
        tiles = visual.tile_image(image, self.config.grid_pinpoints, side)
        return self.preprocess(tiles), image.size

    @torch.no_grad()
    def tower_features(
        self, pixel_values: Sequence[Tensor], modalities: Sequence[str] | None = None
    ) -> list[Tensor]:
        """Encode visuals; clips of the same length run through the tower together.

        Args:
            pixel_values: of each visual, frames or tiles ``(T, 3, H, W)``, normalised.
            modalities: ``video`` (one clip) or ``image`` (each tile a clip of its own); None for
                videos only.

        Returns:
            Tokens ``(T, N, D)`` of each, what `forward` takes for ``visual_features``.
        """
        modalities = modalities or ["video"] * len(pixel_values)
        clips: list[Tensor] = []
        for pixels, modality in zip(pixel_values, modalities, strict=True):
            clips += [pixels] if modality == "video" else pixels.unsqueeze(1).unbind(0)
        encoded: dict[int, Tensor] = {}
        for shape in dict.fromkeys(clip.shape for clip in clips):
            places = [place for place, clip in enumerate(clips) if clip.shape == shape]
            tokens = self.tower(torch.stack([clips[place] for place in places]))
            encoded |= zip(places, tokens, strict=True)
        self.encoded_frames += sum(len(clip) for clip in clips)
        supply = iter(encoded[place] for place in range(len(clips)))
        return [
            next(supply)
            if modality == "video"
            else torch.cat(list(itertools.islice(supply, len(pixels))))
            for pixels, modality in zip(pixel_values, modalities, strict=True)
        ]

    def frame_tokens(self, features: Tensor) -> Tensor:
        """Tower tokens of video frames ``(T, N, D)`` to the LLM's ``(T, n, H)``, newlines included.

        Frames do not see each other here: a stream's frames may come one by one.
        """
        config = self.config
        tokens = self.projector(features.to(self.projector_device, self.projector_dtype))
        lead = int(config.frame_token)
        patches = visual.pool_patches(tokens[:, lead:], config.pool_mode, config.pool_stride)
        laid = visual.lay_out_frames(
            patches, self.image_newline, config.merge_type, config.newline_position
        )
        return torch.cat([tokens[:, :1], laid], dim=1) if lead else laid

    def join_frames(self, frames: Tensor) -> Tensor:
        """Tokens of frames ``(T, n, H)`` one after the other, as a video, ``(tokens, H)``."""
        config = self.config
        return visual.join_frames(
            frames, self.image_newline, config.merge_type, config.newline_position
        )

    def image_tokens(self, features: Tensor, size: tuple[int, int] | None) -> Tensor:
        """Tower tokens of an image's tiles ``(1 + tiles, N, D)`` to the LLM's ``(tokens, H)``."""
        patches = features[:, int(self.config.frame_token) :]
        tokens = self.projector(patches.to(self.projector_device, self.projector_dtype))
        side = self.tower.encoder.image_size
        grid = (1, 1)
        if len(tokens) > 1:
            best = visual.best_resolution(size, self.config.grid_pinpoints)
            grid = (best[0] // side, best[1] // side)
        return visual.lay_out_image(tokens, grid, size, self.image_newline, self.config.merge_type)

    def visual_tokens(
        self,
        features: Sequence[Tensor],
        modalities: Sequence[str] | None = None,
        image_sizes: Sequence[tuple[int, int] | None] | None = None,
    ) -> list[Tensor]:
        """Tower tokens of visuals ``(T, N, D)`` to tokens of the LLM ``(n, H)``, with gradients.

        Args:
            features: as `tower_features` gives them.
            modalities: ``video`` or ``image``; ``text`` marks a stand-in of a row that has no
                visual, which is left out. None for videos only.
            image_sizes: (width, height) of each image; None for videos.

        Raises:
            ValueError: another modality.
        """
        modalities = modalities or ["video"] * len(features)
        sizes = image_sizes or [None] * len(features)
        tokens = []
        for part, modality, size in zip(features, modalities, sizes, strict=True):
            if modality == "video":
                tokens.append(self.join_frames(self.frame_tokens(part)))
            elif modality == "image":
                tokens.append(self.image_tokens(part, None if size is None else tuple(size)))
            elif modality != "text":
                raise ValueError(f"modality {modality!r}: use 'video', 'image' or 'text'")
        return tokens

    @torch.no_grad()
    def encode_video(self, frames: np.ndarray | Tensor) -> Tensor:
        """Visual tokens ``(n, H)`` of a video's frames (T, H, W, 3) uint8 RGB, all of them."""
        return self.visual_tokens(self.tower_features([self.preprocess(frames)]))[0]

    @torch.no_grad()
    def encode_image(self, image: Image.Image) -> Tensor:
        """Visual tokens ``(n, H)`` of an image."""
        pixels, size = self.preprocess_image(image)
        return self.visual_tokens(self.tower_features([pixels], ["image"]), ["image"], [size])[0]

    @property
    def projector_dtype(self) -> torch.dtype:
        """Type of the projector's weights."""
        return next(self.projector.parameters()).dtype

    # -- training ---------------------------------------------------------------------------------

    def splice_batch(
        self,
        input_ids: Tensor,
        visuals: Sequence[Tensor],
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Spliced:
        """Embed ids ``(B, L)`` with visual tokens ``(n, H)`` in place of the placeholders.

        Rows are cut at ``config.max_length`` and padded on ``config.padding_side``.
        """
        return splice(
            unpad(input_ids, attention_mask),
            visuals,
            self.get_input_embeddings(),
            None if labels is None else unpad(labels, attention_mask),
            max_length=self.config.max_length,
            padding_side=self.config.padding_side,
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Sequence[Tensor] | None = None,
        visual_features: Sequence[Tensor] | None = None,
        modalities: Sequence[str] | None = None,
        image_sizes: Sequence[tuple[int, int] | None] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits of whole sequences, and the loss if labels are given.

        Args:
            input_ids: ``(B, L)``, -200 where a visual goes.
            attention_mask: ``(B, L)``, 0 at padding; None if there is none.
            labels: ``(B, L)``, -100 where nothing is learnt.
            pixel_values: of each visual, in the order of the placeholders, frames or tiles
                ``(T, 3, H, W)``, normalised (`preprocess`, `preprocess_image`).
            visual_features: instead of them what `tower_features` made of them, ``(T, N, D)``.
            modalities: of each visual, ``video`` or ``image``; None for videos only.
            image_sizes: of each visual, (width, height) of an image; None for a video.
            num_items_in_batch: tokens that the loss is divided by; None for those of this batch.
            logits_to_keep: logits of only so many last positions; 0 for all.
            return_dict: False for a tuple.

        Raises:
            ValueError: both kinds of visuals, or another number of them than of placeholders.
        """
        if pixel_values is not None and visual_features is not None:
            raise ValueError("give pixel_values or visual_features, not both")
        if pixel_values is not None:
            visual_features = self.tower_features(pixel_values, modalities)
        tokens = self.visual_tokens(visual_features or (), modalities, image_sizes)
        batch = self.splice_batch(input_ids, tokens, attention_mask, labels)
        embeds = batch.inputs_embeds
        if self.training:
            embeds = embeds + self._touch(with_projector=not tokens).to(embeds)
        scaled = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        return self.language_model(
            inputs_embeds=embeds,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            labels=batch.labels,
            logits_to_keep=logits_to_keep,
            use_cache=False,
            return_dict=return_dict,
            **scaled,
        )

    def _touch(self, with_projector: bool) -> Tensor:
        """Zero, but with a gradient: what is unused in one process must still be synchronised."""
        zero = next(self.projector.parameters()).new_zeros(())
        if self.image_newline is not None:
            zero = zero + 0 * self.image_newline.sum()
        if with_projector:
            blank = torch.zeros(
                1, self.config.tower_size, device=zero.device, dtype=self.projector_dtype
            )
            zero = zero + 0 * self.projector(blank).sum()
        return zero


def _change_time(
    config: PretrainedConfig | None, window: int | None, temporal_positions: str | None
) -> None:
    """Set how far a StreamFormer looks back; image encoders do not look back at all."""
    if isinstance(config, StreamformerConfig):
        config.window = config.window if window is None else window
        config.temporal_positions = temporal_positions or config.temporal_positions
        config.validate_architecture()


def refuse_gaps(source: object, **problems: Iterable[str]) -> None:
    """Refuse weights that do not cover a model, naming the first few keys of each problem.

    Raises:
        CheckpointError: if there is a problem.
    """
    found = [
        f"{len(keys)} {kind}: {', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}"
        for kind, keys in ((kind, sorted(keys)) for kind, keys in problems.items())
        if keys
    ]
    if found:
        raise CheckpointError(
            f"{source} does not fit the model of its config (keys under our names): "
            + "; ".join(found)
        )


AutoConfig.register(StreamformerLlavaConfig.model_type, StreamformerLlavaConfig, exist_ok=True)
for auto in (AutoModel, AutoModelForImageTextToText):
    auto.register(StreamformerLlavaConfig, StreamformerLlavaForConditionalGeneration, exist_ok=True)

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_SUFFIXES",
    "IMAGE_TOKEN",
    "Score",
    "StreamformerLlavaForConditionalGeneration",
    "Visual",
    "VisualCache",
]
