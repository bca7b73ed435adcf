"""Miniworld: the mini StreamFormer, lifted from the mini SigLIP by aligning rendered clips.

Clips of 16 frames at eight a second. Batch sizes are per process.
"""

# What differs from WorldParams and SiglipRecipe in experiments/miniworld.
world = {}
mini_siglip = {}

data = {"root": None}  # rendered

launch = {"processes": 2}  # models this small gain nothing from threads

model = {
    "siglip": None,  # the mini SigLIP
    "num_frames": 16,
    "window": 16,
    "temporal_positions": "reset",
    "gate": 1.0,
    "time_scale": 0.5,
}

optim = {
    "updates": 1600,
    "lr": 1.2e-3,
    "warmup_updates": 40,
    "clip_norm": 1.0,
}

run = {
    "cache_in_memory": True,  # a few thousand clips of 32 pixels: some 200 MB
    "joint_rounds": True,
    "eval_every": 1000,
    "checkpoint_every": 300,
    "keep_checkpoints": 1,
    "seed": 0,
    "name": "mini StreamFormer",
}

_common = {"sampling": "consecutive", "templates": "plain"}
_videos = "{root}/videos"


def _listed(task, split):
    return {
        "annotations": f"{{root}}/{task}/{split}.csv",
        "labels": f"{{root}}/{task}/label2id.json",
        "root": _videos,
    }


def _captioned(split):
    return {"index": "{root}/index.jsonl", "root": _videos, "split": split}


def _asked(split):
    return {"annotations": f"{{root}}/grounding/{split}.csv", "root": _videos}


def _masked(split):
    return {
        "annotations": f"{{root}}/instances_{split}.json",
        "labels": "{root}/instances_label2id.json",
        "name": "MINIWORLD",
        "root": _videos,
        "pattern": "{id}.mp4",
    }


def _meant(split):
    return {
        "annotations": f"{{root}}/referring/{split}.csv",
        "masks": f"{{root}}/referring/masks_{split}.json",
        "root": _videos,
    }


tasks = {
    "localization": {
        "objective": "localization",
        "reader": "localization",
        "batch_size": 4,
        "train": _listed("localization", "train"),
        "val": _listed("localization", "val"),
        **_common,
    },
    "recognition": {
        "objective": "recognition",
        "reader": "kinetics",
        "batch_size": 1,
        "weight": 0.25,
        "train": _listed("recognition", "train"),
        "val": _listed("recognition", "val"),
        **_common,
    },
    "retrieval": {
        "objective": "retrieval",
        "reader": "index",
        "batch_size": 1,
        "weight": 0.25,
        "train": _captioned("train"),
        "val": _captioned("val"),
        **_common,
    },
    "grounding": {
        "objective": "grounding",
        "reader": "grounding",
        "batch_size": 1,
        "weight": 0.25,
        "train": _asked("train"),
        "val": _asked("val"),
        **_common,
    },
    "instances": {
        "objective": "instance_segmentation",
        "reader": "youtube_vis",
        "batch_size": 1,
        "weight": 0.5,
        "train": _masked("train"),
        "val": _masked("val"),
        **_common,
        "templates": ["a {}"],
    },
    "referring": {
        "objective": "referring_segmentation",
        "reader": "mevis",
        "batch_size": 2,
        "weight": 1.0,
        "train": _meant("train"),
        "val": _meant("val"),
        **_common,
    },
}
