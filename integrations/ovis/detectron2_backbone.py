"""The encoder and its adapter as a backbone of detectron2, with data sets and an evaluator.

Importing this file registers two backbones, so that any stock meta-architecture can be built on a
frozen video encoder:

    build_streamformer_backbone        res2 to res5, strides 4 to 32, for Mask2Former and its like
    build_streamformer_fpn_backbone    p2 to p6 over it, for Mask R-CNN and its like

    from integrations.ovis.detectron2_backbone import add_streamformer_config
    cfg = get_cfg(); add_streamformer_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_streamformer_fpn_backbone"
    cfg.MODEL.STREAMFORMER.ENCODER = "streamformer:<folder>"

Stock models hand over a batch of images without saying which of them are frames of one clip; the
config says how many are, or `set_clip_frames` from step to step. Nothing else of ``integrations``
needs detectron2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from backbone import VideoEncoder, build_encoder
from integrations.ovis.adapter import STRIDE, AdapterConfig, ViTAdapter, adapt_clip
from integrations.ovis.evaluation import NOTHING, evaluate
from integrations.ovis.head import LEVELS
from integrations.ovis.layout import Track, Video, VideoSet
from integrations.ovis.postprocess import VideoResult
from integrations.ovis.rle import boxes, compress, encode

try:
    from detectron2.config import CfgNode
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.evaluation import DatasetEvaluator
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import BACKBONE_REGISTRY, Backbone
    from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
    from detectron2.structures import BoxMode
    from detectron2.utils import comm
except ImportError as error:
    raise ImportError(
        f"integrations.ovis.detectron2_backbone is for detectron2, which cannot be imported here "
        f"({error}). Install it, for example by environment.yml from conda-forge; training and "
        "evaluation of integrations.ovis itself work without it (integrations.ovis.model)"
    ) from error

OPTIONS = ("stem_width", "num_heads", "num_points", "ffn_ratio", "extra_extractors")


class StreamformerBackbone(Backbone):
    """Images in, feature maps "res2" to "res5" out.

    Args:
        encoder: runs frozen and without gradients.
        adapter: made for it; all that trains.
        num_frames: so many images in a row are a clip; the batch holds whole clips.
    """

    def __init__(self, encoder: VideoEncoder, adapter: ViTAdapter, num_frames: int = 1) -> None:
        super().__init__()
        self.encoder, self.adapter = encoder, adapter
        self.num_frames = num_frames
        self._out_features = list(LEVELS)
        self._out_feature_channels = dict.fromkeys(LEVELS, adapter.config.embed_dim)
        self._out_feature_strides = {name: 4 * 2**n for n, name in enumerate(LEVELS)}

    @property
    def size_divisibility(self) -> int:
        """Sides of images are multiples of this; detectron2 pads right and below with zeros."""
        return math.lcm(STRIDE, self.encoder.patch_size)

    @property
    def padding_constraints(self) -> dict[str, int]:
        """The same, as later releases of detectron2 ask for it."""
        return {"size_divisibility": self.size_divisibility}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images ``(B*T, 3, H, W)``, clip by clip, to maps ``(B*T, D, H/s, W/s)``.

        Raises:
            ValueError: a number of images that is not whole clips.
        """
        if len(images) % self.num_frames:
            raise ValueError(
                f"{len(images)} images are not whole clips of {self.num_frames} frames; set "
                "MODEL.STREAMFORMER.NUM_FRAMES, or set_clip_frames(model, …) before this step"
            )
        clips = images.unflatten(0, (-1, self.num_frames))  # (B, T, 3, H, W)
        return adapt_clip(self.encoder, self.adapter, clips)


def set_clip_frames(model: nn.Module, num_frames: int) -> None:
    """Tell all our backbones inside a model how many images in a row are a clip from now on.

    Raises:
        ValueError: there is no such backbone, or ``num_frames`` is below 1.
    """
    found = [module for module in model.modules() if isinstance(module, StreamformerBackbone)]
    if not found or num_frames < 1:
        raise ValueError(
            f"num_frames={num_frames} for {len(found)} backbones in a {type(model).__name__}: "
            "needs at least 1 frame and 1 StreamformerBackbone"
        )
    for module in found:
        module.num_frames = num_frames


def add_streamformer_config(cfg: CfgNode) -> None:
    """Add the section MODEL.STREAMFORMER, and the input that our encoders expect.

    Pictures are RGB, normalised as SigLIP does, masks are bitmaps: YouTube-VIS has no polygons.
    """
    adapter = AdapterConfig.__dataclass_fields__
    cfg.MODEL.STREAMFORMER = CfgNode(
        {
            "ENCODER": "",  # spec for build_encoder
            "NUM_FRAMES": 1,
            "ADAPTER": CfgNode({name.upper(): adapter[name].default for name in OPTIONS}),
        }
    )
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [127.5] * 3, [127.5] * 3
    cfg.MODEL.FPN.IN_FEATURES = list(LEVELS)
    cfg.INPUT.FORMAT, cfg.INPUT.MASK_FORMAT = "RGB", "bitmask"


@BACKBONE_REGISTRY.register()
def build_streamformer_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> StreamformerBackbone:
    """Build encoder and adapter from MODEL.STREAMFORMER.

    Raises:
        ValueError: no encoder is named, or the config normalises pictures otherwise than the
            encoder was trained with.
    """
    section = cfg.MODEL.STREAMFORMER
    if not section.ENCODER:
        raise ValueError(
            "MODEL.STREAMFORMER.ENCODER is empty; name one, such as 'streamformer:<folder>'"
        )
    encoder = build_encoder(section.ENCODER)
    wanted = {
        "MODEL.PIXEL_MEAN": [255 * value for value in encoder.image_mean],
        "MODEL.PIXEL_STD": [255 * value for value in encoder.image_std],
    }
    found = {"MODEL.PIXEL_MEAN": cfg.MODEL.PIXEL_MEAN, "MODEL.PIXEL_STD": cfg.MODEL.PIXEL_STD}
    if cfg.INPUT.FORMAT != "RGB":
        raise ValueError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}, but encoders read 'RGB'; set it")
    for name, values in wanted.items():
        if not np.allclose(found[name], values, atol=1e-2):
            raise ValueError(
                f"{name} is {list(found[name])}, but {section.ENCODER} was trained with "
                f"{values}; set it"
            )
    options = {name: section.ADAPTER[name.upper()] for name in OPTIONS}
    adapter = ViTAdapter(AdapterConfig.for_encoder(encoder, **options))
    if comm.get_world_size() > 1:
        adapter = nn.SyncBatchNorm.convert_sync_batchnorm(adapter)
    return StreamformerBackbone(encoder, adapter, section.NUM_FRAMES)


@BACKBONE_REGISTRY.register()
def build_streamformer_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build the backbone with a feature pyramid of MODEL.FPN on top.

    Raises:
        ValueError: the encoder's patches do not fit the pyramid's padding.
    """
    bottom_up = build_streamformer_backbone(cfg, input_shape)
    if bottom_up.size_divisibility != STRIDE:
        raise ValueError(
            f"{cfg.MODEL.STREAMFORMER.ENCODER} has patches of {bottom_up.encoder.patch_size} "
            f"pixels, so images must be multiples of {bottom_up.size_divisibility}, but "
            f"detectron2's pyramid pads to {STRIDE}; use build_streamformer_backbone"
        )
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


# -- data -----------------------------------------------------------------------------------------


def register_videos(name: str, videos: VideoSet) -> None:
    """Register a video data set: an entry a video, ``annotations`` a list for every frame."""
    DatasetCatalog.register(name, lambda: [_video_entry(v, videos) for v in videos.videos])
    _describe(name, videos, "ytvis")


def register_frames(name: str, videos: VideoSet) -> None:
    """Register the frames as pictures of their own, for models that know no video."""
    DatasetCatalog.register(name, lambda: _frame_entries(videos))
    _describe(name, videos, "coco")


def _describe(name: str, videos: VideoSet, kind: str) -> None:
    MetadataCatalog.get(name).set(
        thing_classes=list(videos.class_names),
        thing_dataset_id_to_contiguous_id={n: at for at, n in enumerate(videos.category_ids)},
        image_root=str(videos.root),
        evaluator_type=kind,
    )


def _video_entry(video: Video, videos: VideoSet) -> dict[str, Any]:
    return {
        "video_id": video.id,
        "file_names": [str(videos.root / file) for file in video.files],
        "height": video.height,
        "width": video.width,
        "length": len(video.files),
        "annotations": _annotations(video),
    }


def _frame_entries(videos: VideoSet) -> list[dict[str, Any]]:
    entries = [
        {
            "file_name": str(videos.root / file),
            "height": video.height,
            "width": video.width,
            "annotations": annotations,
        }
        for video in videos.videos
        for file, annotations in zip(video.files, _annotations(video), strict=True)
    ]
    return [{"image_id": number, **entry} for number, entry in enumerate(entries, start=1)]


def _annotations(video: Video) -> list[list[dict[str, Any]]]:
    """Objects of every frame, as detectron2's mappers read them."""
    frames: list[list[dict[str, Any]]] = [[] for _ in video.files]
    for track in video.tracks:
        for frame in np.flatnonzero(track.present()).tolist():
            frames[frame].append(_annotation(track, frame))
    return frames


def _annotation(track: Track, frame: int) -> dict[str, Any]:
    mask, drawn = track.annotation["segmentations"][frame], track.annotation.get("bboxes")
    return {
        "id": track.id,
        "iscrowd": int(track.crowd),
        "category_id": track.label,
        "bbox": list(drawn[frame]) if drawn else boxes(track.masks([frame]))[0].tolist(),
        "bbox_mode": BoxMode.XYWH_ABS,
        "segmentation": compress(mask, track.size, f"annotation {track.id}", frame),
    }


# -- evaluation -----------------------------------------------------------------------------------


class TrackEvaluator(DatasetEvaluator):
    """YouTube-VIS AP and AR of a video model, in percent, under the task "segm".

    A model is given one video at a time, ``inputs`` a list with its entry, and returns either a
    ``postprocess.VideoResult`` or what video models of detectron2 return: ``{"pred_scores",
    "pred_labels", "pred_masks"}``, the masks (T, H, W) bool each, in the size of the document.
    """

    def __init__(self, videos: VideoSet) -> None:
        self.videos = videos
        self.document = videos.document()
        self.predictions: list[dict[str, Any]] = []

    def reset(self) -> None:
        """Forget all videos."""
        self.predictions = []

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: VideoResult | Mapping[str, Any]
    ) -> None:
        """Keep what was said about one video, as run lengths."""
        if len(inputs) != 1:
            raise ValueError(f"{len(inputs)} videos at once; evaluate with a batch of 1")
        video, ids = inputs[0]["video_id"], self.videos.category_ids
        if isinstance(outputs, VideoResult):
            self.predictions += outputs.predictions(video, ids)
            return
        parts = [outputs[name] for name in ("pred_scores", "pred_labels", "pred_masks")]
        for score, label, masks in zip(*parts, strict=True):
            self.predictions.append(
                {
                    "video_id": video,
                    "category_id": ids[int(label)],
                    "score": float(score),
                    "segmentations": encode(np.asarray(masks, dtype=bool)),
                }
            )

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Score the videos of all ranks; empty on all ranks but the first."""
        comm.synchronize()
        gathered = comm.gather(self.predictions, dst=0)
        if not comm.is_main_process():
            return {}
        scores = evaluate(self.document, [item for part in gathered for item in part])
        return {
            "segm": {
                name: value if value == NOTHING else 100 * value
                for name, value in scores.stats.items()
            }
        }
