"""Miniworld's moving instances: a mini encoder that has seen many hidden things move.

In the clips of ``miniworld.py`` few shapes are hidden, and most of those rest. Here the mini SigLIP
is lifted by one task alone, the masks of instances, on videos made as those of the comparison
``ovis`` but from a seed of their own, and with four hidden objects in five: 64 pixels, 8 frames.
What the lift adds to the image encoder learns three times as fast as the rest.

Patches have 4 pixels instead of 8, in the mini SigLIP too: only tokens know where something hidden
ends, since no edge shows it.
"""

_base_ = ["miniworld.py"]

# What differs from SiglipRecipe and InstanceParams in experiments/miniworld.
mini_siglip = {"patch_size": 4}
instances = {"seed": 1, "train": 2048, "val": 64, "test": 0, "camouflaged": 0.8}

model = {"num_frames": 8, "window": 8}

optim = {"updates": 1600, "lr": 2e-3, "temporal_lr_scale": 3.0}

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
        "batch_size": 2,
        "train": _masked("train"),
        "val": _masked("val"),
        "sampling": "consecutive",
        "templates": ["a {} shape"],
        "flip": True,
        "directional": False,
    },
}
