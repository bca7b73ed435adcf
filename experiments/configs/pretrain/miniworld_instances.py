"""Miniworld's moving instances: a mini encoder that has seen many hidden things move.

In the clips of ``miniworld.py`` few shapes are hidden, and most of those rest. Here the mini SigLIP
is lifted by one task alone, the masks of instances, on videos made as those of the comparison
``ovis`` but from a seed of their own, and with four hidden objects in five: 64 pixels, 8 frames.
What the lift adds to the image encoder learns three times as fast as the rest.
"""

_base_ = ["miniworld.py"]

# What differs from InstanceParams in experiments/miniworld.
instances = {"seed": 1, "train": 2048, "val": 64, "test": 0, "camouflaged": 0.8}

model = {"num_frames": 8, "window": 8}

optim = {"updates": 1000, "lr": 2e-3, "temporal_lr_scale": 3.0}

run = {"image_size": 64}


def _masked(split):
    return {
        "annotations": f"{{root}}/{split}.json",
        "name": "MINIWORLD",
        "root": f"{{root}}/{split}/JPEGImages",
    }


tasks = {
    "_delete_": True,
    "instances": {
        "objective": "instance_segmentation",
        "reader": "youtube_vis",
        "batch_size": 4,
        "train": _masked("train"),
        "val": _masked("val"),
        "sampling": "consecutive",
        "templates": ["a {} shape"],
        "flip": True,
        "directional": False,
    },
}
