"""Miniworld: rendered videos of 8 frames of 64 pixels, six colours and what is hidden.

The mini encoders know 32 pixels; at 64 their position table is resized, and a patch is as large as
it was. They are frozen, so their tokens of every video are computed once and kept.
"""

_base_ = ["_base.py"]

# What differs from InstanceParams and WorldParams in experiments/miniworld; the mini encoders are
# made by the recipe of configs/pretrain that ``config`` names, and what differs from it. Earlier
# recipes read the test videos of seed 0.
instances = {"seed": 2, "test": 256}
world = {}
mini = {"config": "miniworld_instances"}

data = {
    "dataset": "miniworld",
    "val_split": "val",
    "test_split": "test",
    "submit_split": None,
    "num_frames": 2,
    "short": 64,
    "augmentation": {"crop": 0.0, "flip": 0.0},
    "stored": True,
}

adapter = {"num_heads": 4, "stem_width": 16, "extra_extractors": 0}

head = {
    "num_queries": 10,
    "width": 64,
    "mask_size": 64,
    "num_heads": 4,
    "pixel_layers": 1,
    "pixel_feedforward": 128,
    "decoder_layers": 3,
    "decoder_feedforward": 128,
    "embedding_size": 64,
}

loss = {"num_points": 512}

video = {"top_pairs": 10}

train = {
    "iterations": 1200,
    "batch_size": 8,
    "lr": 2e-3,
    "rates": {"_delete_": True},  # adapter and head learn alike
    "schedule": "cosine",
    "warmup": 20,
    "clip_norm": 1.0,
    "num_workers": 0,
    "threads": 1,  # tensors so small that a second thread costs more than it gives
    "checkpoint_every": 100,
}

eval = {"groups": {"camouflaged": "camouflaged"}}
