"""The streaming video encoder: StreamFormer, its lift from SigLIP, and the interface to both.

>>> from backbone import StreamformerModel, build_encoder
>>> stream = build_encoder("streamformer:<folder or hub id>", window=64).stream()
>>> features = stream.push(frame)            # frame (1, 3, H, W), normalised
"""

from transformers import AutoConfig, AutoModel, AutoModelForVideoClassification

from .cache import StreamingCache
from .checkpoints import CheckpointError, lift_siglip, load_released
from .classification import StreamformerForVideoClassification
from .configuration import StreamformerConfig
from .encoders import (
    EncoderStream,
    FrameFeatures,
    SiglipEncoder,
    StreamformerEncoder,
    VideoEncoder,
    build_encoder,
    register_encoder,
)
from .fusion import fuse
from .inference import StaticStreams
from .modeling import StreamformerModel, project_patches

AutoConfig.register(StreamformerConfig.model_type, StreamformerConfig, exist_ok=True)
AutoModel.register(StreamformerConfig, StreamformerModel, exist_ok=True)
AutoModelForVideoClassification.register(
    StreamformerConfig, StreamformerForVideoClassification, exist_ok=True
)

__all__ = [
    "CheckpointError",
    "EncoderStream",
    "FrameFeatures",
    "SiglipEncoder",
    "StaticStreams",
    "StreamformerConfig",
    "StreamformerEncoder",
    "StreamformerForVideoClassification",
    "StreamformerModel",
    "StreamingCache",
    "VideoEncoder",
    "build_encoder",
    "fuse",
    "lift_siglip",
    "load_released",
    "project_patches",
    "register_encoder",
]
