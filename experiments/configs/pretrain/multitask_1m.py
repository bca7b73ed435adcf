"""StreamFormer's pretraining: seven tasks over nineteen data sets, a million clips, ViT-B at 224.

Annotations in the layout of the authors' release, below one root (docs/pretraining.md shows it):

    ROOT/annotations/<task>/{train,val}.csv, label2id.json, train_<data set>.json …
    ROOT/videos/<data set>/                                the videos, or folders of frames

A data set whose annotations you have in the publishers' own format is read by its own reader
(``pretrain.datasets.READERS``): put the parts of a task side by side with ``reader="union"``, as
``instances`` does here. Leave out what you do not have: a task by ``name=None``, a data set by its
rows or its part.

Batch sizes are per process: with eight processes an update has 7 x 16 x 8 = 896 clips and a peak
rate of 2e-5 * 896 / 256 = 7e-5, as released. Where the release is mended, its ways have names:
``model.shared_scale``, ``renormalize_labels``, ``mask_duplicates``, ``optim.decay``, and of tasks
``reduction``, ``spatial_loss``, ``sampling="fixfps_released"``.
"""

data = {"root": None}

model = {
    "siglip": "google/siglip-base-patch16-224",
    "num_frames": 16,
    "lora_rank": 32,
}

optim = {
    "updates": 30_000,  # about twenty epochs of what the release calls one
    "lr": 2e-5,
    "scale_lr": True,
    "weight_decay": 0.05,
}

run = {
    "batch_size": 16,
    "precision": "bf16",
    "num_workers": 12,
    "eval_every": 5_000,
    "checkpoint_every": 1_000,
    "seed": 42,
    "name": "StreamFormer",
}

_notes = "{root}/annotations"
_videos = "{root}/videos"


def _recognition(task, folder, split):
    return {
        "annotations": f"{_notes}/{task}/{split}.csv",
        "labels": f"{_notes}/{task}/label2id.json",
        "root": f"{_videos}/{folder}",
        "name": task,
    }


def _captions(split):
    sets = ("MSRVTT", "MSVD", "ActivityNet", "DiDeMo", "LSMDC", "VATEX")
    return {
        "annotations": f"{_notes}/TaskRetrieval/{split}.csv",
        "root": {name: f"{_videos}/{name}" for name in sets},
    }


def _localization(split):
    sets = ("ActivityNet", "FineAction", "HACS")
    return {
        "annotations": f"{_notes}/TaskLocalization/{split}.csv",
        "labels": f"{_notes}/TaskLocalization/label2id.json",
        "root": {name: f"{_videos}/{name}" for name in sets},
    }


def _grounding(split):
    folders = {
        "CharadesSTA": "Charades",
        "QVHighlights": "QVHighlights",
        "TaCoS": "TaCoS",
        "ActivityNetCaptions": "ActivityNet",
        "DiDeMo": "DiDeMo",
        "QuerYD": "QuerYD",
    }
    return {
        "annotations": f"{_notes}/TaskGrounding/{split}.csv",
        "root": {name: f"{_videos}/{folder}" for name, folder in folders.items()},
    }


def _things(reader, name, split, folder):
    return {
        "reader": reader,
        "annotations": f"{_notes}/TaskVIS/{split}_{name}.json",
        "labels": f"{_notes}/TaskVIS/label2id.json",
        "name": name,
        "root": f"{_videos}/{folder}",
    }


def _mevis(split):
    return {
        "reader": "mevis",
        "annotations": f"{_notes}/TaskReferVOS/{split}_MEVIS.csv",
        "masks": f"{_notes}/TaskReferVOS/MEVIS_masks",
        "root": f"{_videos}/MEVIS",
    }


tasks = {
    "kinetics": {
        "objective": "recognition",
        "reader": "kinetics",
        "train": _recognition("Kinetics", "Kinetics400", "train"),
        "val": _recognition("Kinetics", "Kinetics400", "val"),
        "sampling": "segments",
        "augmentation": "strong",
        "flip": True,
        "directional": False,
    },
    "ssv2": {  # its labels tell left from right: never mirrored
        "objective": "recognition",
        "reader": "kinetics",
        "train": _recognition("SSV2", "SSV2", "train"),
        "val": _recognition("SSV2", "SSV2", "val"),
        "sampling": "blocks",
        "augmentation": "strong",
    },
    "retrieval": {
        "objective": "retrieval",
        "reader": "captions",
        "train": _captions("train"),
        "val": _captions("val"),
        "sampling": "intervals",
        "augmentation": "crop",
    },
    "localization": {
        "objective": "localization",
        "reader": "localization",
        "train": _localization("train"),
        "val": _localization("val"),
        "sampling": "spread",
        "augmentation": "crop",
    },
    "grounding": {
        "objective": "grounding",
        "reader": "grounding",
        "train": _grounding("train"),
        "val": _grounding("val"),
        "sampling": "fixfps",
        "augmentation": "crop",
    },
    "instances": {
        "objective": "instance_segmentation",
        "reader": "union",
        "train": {
            "parts": [
                _things("youtube_vis", "YoutubeVIS", "train", "YoutubeVIS/train/JPEGImages"),
                _things("youtube_vis", "LVVIS", "train", "LVVIS/train/JPEGImages"),
                _things("coco", "COCOPseudoVIS", "train", "COCO/train2017"),
            ]
        },
        "val": {  # the labels of YouTube-VIS 2019's own validation set are not public
            "parts": [
                _things("youtube_vis", "LVVIS", "val", "LVVIS/val/JPEGImages"),
                _things("coco", "COCOPseudoVIS", "val", "COCO/val2017"),
            ]
        },
        "sampling": "padded_blocks",
        "augmentation": "things",
        "flip": True,
        "directional": False,
        "templates": "plain",
    },
    "referring": {
        "objective": "referring_segmentation",
        "reader": "union",
        "train": {
            "parts": [
                _mevis("train"),
                {
                    "reader": "refer_youtube_vos",
                    "annotations": f"{_notes}/TaskReferVOS/train_ReferYoutubeVOS.csv",
                    "masks": f"{_videos}/YoutubeVOS/train/Annotations",
                    "root": f"{_videos}/YoutubeVOS/train/JPEGImages",
                },
            ]
        },
        "val": {"parts": [_mevis("val")]},
        "sampling": "padded_blocks",
        "augmentation": "things",
    },
}
