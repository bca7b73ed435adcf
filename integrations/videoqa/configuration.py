"""Configuration of the video question answering model: LLM, tower, and what lies between them.

Defaults are those of the released models (LLaVA-NeXT's layout for video), but for the tower's
layer and norm: there ours are the same for every encoder, see :data:`TOWER_PRESETS`.
"""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PretrainedConfig

import backbone  # noqa: F401  (its configs become known to AutoConfig)

PINPOINTS = ((224, 448), (448, 224), (448, 448), (672, 224), (224, 672))

# Which tokens of the tower the model sees: (layer, whether the final norm follows), by the kind of
# encoder; None stands for any. "released" is the pairing of the published comparison, in which the
# two towers differ in both.
TOWER_PRESETS: dict[str, dict[str | None, tuple[int, bool]]] = {
    "last": {None: (-1, True)},
    "penultimate": {None: (-2, False)},
    "released": {"streamformer": (-1, True), "siglip": (-2, False)},
}


def tower_preset(name: str, kind: str) -> dict[str, Any]:
    """The fields ``tower_layer`` and ``tower_post_norm`` of a preset, for an encoder's kind.

    Raises:
        ValueError: no such preset, or one that says nothing about this kind.
    """
    if name not in TOWER_PRESETS:
        raise ValueError(f"no tower preset {name!r}; known are {', '.join(TOWER_PRESETS)}")
    preset = TOWER_PRESETS[name]
    if (pair := preset.get(kind, preset.get(None))) is None:
        raise ValueError(
            f"tower preset {name!r} knows {', '.join(map(str, preset))}, not {kind!r}; state "
            "tower_layer and tower_post_norm instead"
        )
    return {"tower_layer": pair[0], "tower_post_norm": pair[1]}


@strict
class StreamformerLlavaConfig(PretrainedConfig):
    """Shape and behaviour of a ``modeling.StreamformerLlavaForConditionalGeneration``.

    Args:
        text_config: config of the causal LLM, of any family that transformers knows.
        tower_config: config of the tower whose weights are saved with the model (StreamFormer or
            SigLIP); None when ``tower`` names an encoder that is kept elsewhere.
        tower: spec that the tower was built from, such as ``streamformer:<folder or hub id>``.
        tower_size: width ``D`` of the tower's tokens.
        tower_layer: layer whose tokens are used, as ``VideoEncoder.encode`` counts them.
        tower_post_norm: whether the encoder's final norm follows that layer.
        frame_token: whether each frame of a video also brings its pooled embedding, as one token
            in front of its patches.
        projector_type: ``linear`` or ``mlp<N>x_gelu``.
        pool_mode: how patches of a video frame are pooled, after projection.
        pool_stride: patches per pooled patch, along each side; 1 for no pooling.
        merge_type: ``flat`` has no newline tokens anywhere; ``spatial`` has those of
            ``newline_position`` in videos; ``spatial_unpad`` also cuts the padding off tiled
            images and ends each of their rows with a newline.
        newline_position: where the learned newline stands in a video: after every row of every
            frame (``grid``), after every ``frame``, once at the end (``one_token``, which only
            ``spatial_unpad`` has), or nowhere (``no_token``).
        image_layout: an image as one square (``square``), or as a square and tiles (``anyres``).
        grid_pinpoints: sizes (width, height) in pixels that tiles may cover, for ``anyres``.
        num_frames: most frames sampled from a video; 0 for no bound, unless ``force_sample``.
        video_fps: frames sampled per second of video.
        force_sample: spread ``num_frames`` over every video, whatever its length, as the released
            models were trained. Otherwise short videos give fewer frames.
        time_instruction: whether a sentence in front of the question tells when frames were taken.
        template: name of the prompt template, see ``prompts.TEMPLATES``.
        max_length: tokens, visual ones included, at which training sequences are cut; None for
            no bound. Prompts to be answered are never cut.
        padding_side: side on which training batches are padded.
        lora_rank: rank of LoRA adapters on the LLM; 0 for none.
        lora_alpha: their scale times the rank.
        lora_dropout: dropout in front of them.
        lora_targets: regular expression of the LLM's modules that get one.
    """

    model_type = "streamformer_llava"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig, "tower_config": AutoConfig}

    text_config: dict | PretrainedConfig | None = None
    tower_config: dict | PretrainedConfig | None = None
    tower: str | None = None
    tower_size: int = 768
    tower_layer: int = -1
    tower_post_norm: bool = True
    frame_token: bool = False
    projector_type: str = "mlp2x_gelu"
    pool_mode: Literal["average", "max", "bilinear"] = "average"
    pool_stride: int = 2
    merge_type: Literal["flat", "spatial", "spatial_unpad"] = "spatial_unpad"
    newline_position: Literal["grid", "frame", "one_token", "no_token"] = "no_token"
    image_layout: Literal["anyres", "square"] = "anyres"
    grid_pinpoints: list | tuple = PINPOINTS
    num_frames: int = 16
    video_fps: float | int = 1.0
    force_sample: bool = True
    time_instruction: bool = False
    template: str = "qwen_1_5"
    max_length: int | None = 4096
    padding_side: Literal["left", "right"] = "right"
    lora_rank: int = 0
    lora_alpha: float | int = 16
    lora_dropout: float | int = 0.0
    lora_targets: str = r".*\.(q|k|v|o|gate|up|down)_proj"

    def __post_init__(self, **kwargs: Any) -> None:
        for name in self.sub_configs:
            value = getattr(self, name)
            if isinstance(value, dict):
                value = dict(value)
                setattr(self, name, AutoConfig.for_model(value.pop("model_type"), **value))
        self.grid_pinpoints = [list(size) for size in self.grid_pinpoints]
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Check fields; raises ValueError naming the values."""
        for name in ("tower_size", "pool_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_frames < 0 or (self.force_sample and self.num_frames < 1):
            raise ValueError(
                f"num_frames={self.num_frames} with force_sample={self.force_sample}: give at "
                "least 1, or 0 (no bound) with force_sample=False"
            )
        if self.video_fps <= 0:
            raise ValueError(f"video_fps={self.video_fps} must be positive")
        if self.image_layout == "anyres" and not self.grid_pinpoints:
            raise ValueError('image_layout="anyres" needs grid_pinpoints; use "square" without')
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank={self.lora_rank} must not be negative (0 for no LoRA)")

    @property
    def has_newline(self) -> bool:
        """Whether the model has a learned newline token."""
        return self.merge_type != "flat"
