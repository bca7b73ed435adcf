"""Miniworld: rendered streams of 160 frames, eight a second, one step per frame.

A head small enough to train within seconds on one core; streams of 768 frames show what happens
when a stream outgrows everything seen in training.
"""

_base_ = ["_base.py"]

# What differs from WorldParams in experiments/miniworld, and from configs/pretrain/miniworld.py in
# the making of the mini encoders.
world = {}
mini = {}

data = {
    "root": None,
    "videos": "videos",
    "dataset": "MINIWORLD",
    "train_set": "train_session_set",
    "val_sets": ["val_160_session_set", "val_768_session_set"],
    "test_sets": ["test_session_set", "test_768_session_set"],
    "fps": 8.0,
    "video_fps": 8.0,
    "chunk_frames": 1,
    "protocol": "stream",
}

head = {
    "dim": 64,
    "feedforward": 128,
    "long_steps": 64,  # 8 s
    "long_rate": 4,
    "work_steps": 16,  # 2 s, longer than the longest action
    "anticipation_steps": 4,
    "future_tokens": 8,
    "groups": 0,  # so few long tokens need no groups, and one path for all samples is faster
    "refinements": 1,
    "memory_stages": [[8, 1, True]],
    "work_stack": [-1, 1, True],
    "generator": [8, 1, True],
    "future_stack": [8, 1, True],
}

train = {
    "epochs": 20,
    "batch_size": 32,
    "lr": 1e-3,
    "weight_decay": 1e-4,
    "warmup_epochs": 2.0,
    "ema_momentum": 0.02,  # averages over the last fifty of some four hundred steps
    "threads": 1,  # tensors so small that a second thread costs more than it gives
    "validate_every": 0,
    "checkpoint_every": 5,
}

eval = {
    "opening": "short",  # no step is scored by one that has seen later ones
    "batch_windows": 512,
    "batch_videos": 24,
}
