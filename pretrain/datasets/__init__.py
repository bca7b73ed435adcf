"""Annotated videos: one reader per family of annotation files, decoding and augmentation shared."""

from pretrain.datasets.base import (
    Annotations,
    Batch,
    Draw,
    Entry,
    Sample,
    Segment,
    VideoDataset,
    collate,
)
from pretrain.datasets.captions import (
    read_activitynet_paragraphs,
    read_captions,
    read_didemo_paragraphs,
    read_index,
    read_lsmdc,
    read_msrvtt,
    read_msvd,
    read_vatex,
)
from pretrain.datasets.grounding import (
    read_activitynet_moments,
    read_charades_sta,
    read_didemo_moments,
    read_grounding,
    read_queryd,
    read_qvhighlights,
    read_tacos,
)
from pretrain.datasets.instances import read_coco, read_youtube_vis
from pretrain.datasets.kinetics import (
    read_hacs_clips,
    read_kinetics,
    read_kinetics_official,
    read_ssv2,
)
from pretrain.datasets.localization import (
    read_activitynet,
    read_fineaction,
    read_hacs,
    read_localization,
)
from pretrain.datasets.referring import (
    read_mevis,
    read_mevis_official,
    read_refer_coco,
    read_refer_coco_official,
    read_refer_youtube_vos,
    read_refer_youtube_vos_official,
)
from pretrain.datasets.union import read_union

READERS = {
    # recognition
    "kinetics": read_kinetics,
    "kinetics_official": read_kinetics_official,
    "ssv2": read_ssv2,
    "hacs_clips": read_hacs_clips,
    # retrieval
    "captions": read_captions,
    "index": read_index,
    "msrvtt": read_msrvtt,
    "msvd": read_msvd,
    "activitynet_captions": read_activitynet_paragraphs,
    "didemo": read_didemo_paragraphs,
    "lsmdc": read_lsmdc,
    "vatex": read_vatex,
    # localization
    "localization": read_localization,
    "activitynet": read_activitynet,
    "fineaction": read_fineaction,
    "hacs": read_hacs,
    # grounding
    "grounding": read_grounding,
    "charades_sta": read_charades_sta,
    "qvhighlights": read_qvhighlights,
    "tacos": read_tacos,
    "activitynet_captions_grounding": read_activitynet_moments,
    "didemo_grounding": read_didemo_moments,
    "queryd": read_queryd,
    # instance segmentation
    "youtube_vis": read_youtube_vis,
    "coco": read_coco,
    # referring segmentation
    "mevis": read_mevis,
    "mevis_official": read_mevis_official,
    "refer_youtube_vos": read_refer_youtube_vos,
    "refer_youtube_vos_official": read_refer_youtube_vos_official,
    "refer_coco": read_refer_coco,
    "refer_coco_official": read_refer_coco_official,
    # several of these at once
    "union": read_union,
}

__all__ = [
    "READERS",
    "Annotations",
    "Batch",
    "Draw",
    "Entry",
    "Sample",
    "Segment",
    "VideoDataset",
    "collate",
    "read_captions",
    "read_index",
    "read_kinetics",
    "read_localization",
]
