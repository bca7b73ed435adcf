"""Configuration of the streaming video encoder.

Field names follow SigLIP's vision config, so that a lifted encoder reads like its source; what
StreamFormer adds is time: how many frames the time table knows, what a frame may look back at, and
where in the table a frame lands once a stream has outrun it.
"""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from .names import hint


@strict
class StreamformerConfig(PretrainedConfig):
    """Shape and temporal behaviour of a :class:`~backbone.StreamformerModel`.

    Args:
        image_size: side of the square the position table was trained on, in pixels. Other sizes
            are accepted by the model; the table is then resized.
        patch_size: side of a patch, in pixels.
        num_channels: colour channels of a frame.
        hidden_size: width ``D`` of a token.
        num_hidden_layers: number of layers.
        num_attention_heads: heads of every attention; must divide ``hidden_size``.
        intermediate_size: inner width of the MLPs.
        hidden_act: activation of the MLPs. SigLIP was trained with the tanh form of GELU; released
            StreamFormer checkpoints name their own.
        layer_norm_eps: epsilon of all layer norms.
        qkv_bias: whether query, key and value projections have a bias.
        hidden_dropout_prob: dropout on embeddings and after each projection (training only).
        attention_probs_dropout_prob: dropout on attention weights (training only).
        drop_path_rate: stochastic depth of the last layer; layers before it have less, linearly.
        initializer_range: standard deviation of fresh weights.
        num_frames: rows ``F`` of the time table, the clip length of training.
        temporal_attention: whether layers have their temporal branch. Without it the model is an
            image encoder that sees frames one by one: the control of an experiment about time.
        causal: whether a frame sees only itself and earlier frames. Streaming needs it.
        window: frames a frame may attend to, itself included; the same for clips and streams, and
            the bound of a stream's memory. None: all earlier frames.
        temporal_positions: which row of the time table frame ``i`` uses. All policies agree for
            the first ``num_frames`` frames. After them ``reset``, the default, starts over and
            forgets, so that a stream is a row of clips as in training, and a window beyond
            ``num_frames`` changes nothing; ``cycle`` starts over but goes on seeing the last
            ``window`` frames; ``hold`` repeats the last row; ``nearest`` stretches the table over
            the clip, as the released code does: it makes early frames depend on how many follow,
            so it refuses to stream. Measured in docs/streaming.md.
        lora_rank: rank of the LoRA adapters on spatial attention; 0 for none.
        classifier_dropout: dropout before the classifier of a classification model (training only).
        released_pooling: in a classification model, pool tokens in the order of the released code,
            which mixes frames; its published recognition numbers and fine-tuned weights need it.
    """

    model_type = "streamformer"

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02
    num_frames: int = 16
    temporal_attention: bool = True
    causal: bool = True
    window: int | None = None
    temporal_positions: Literal["hold", "cycle", "reset", "nearest"] = "reset"
    lora_rank: int = 0
    classifier_dropout: float | int = 0.0
    released_pooling: bool = False

    def validate_architecture(self) -> None:
        """Check fields, alone and against each other; raises ValueError naming the values."""
        for name in (
            "image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers",
            "num_attention_heads", "intermediate_size", "num_frames",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}"
            )
        for name in (
            "hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate",
            "classifier_dropout",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is no rate between 0 and 1")
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"hidden_act={self.hidden_act!r} is unknown to transformers; "
                + hint(self.hidden_act, ACT2FN)
            )
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"window={self.window}: a frame always sees itself, so window is at least 1 "
                "(None for no bound)"
            )
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank={self.lora_rank} must not be negative (0 for no LoRA)")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def span(self) -> int | None:
        """Frames a stream must remember: the window, or a whole segment under ``reset``."""
        if self.temporal_positions != "reset":
            return self.window
        return self.num_frames if self.window is None else min(self.window, self.num_frames)
