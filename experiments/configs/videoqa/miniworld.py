"""Miniworld: questions on rendered videos of two seconds, and a language model of 0.4 M weights.

The model starts from nothing, so it learns to speak from captions in the first stage, too. Towers
are frozen: their tokens of every video are computed once and kept.
"""

_base_ = ["_base.py"]

# What differs from WorldParams, QaParams and MiniLlm in experiments/miniworld, and from
# configs/pretrain/miniworld.py in the making of the mini encoders.
world = {}
mini = {}
qa = {}
mini_llm = {}

data = {"dataset": "miniworld"}

model = {"frame_token": True, "merge_type": "flat"}

_video = {
    "image_layout": "square",
    "num_frames": 16,
    "video_fps": 8.0,
    "force_sample": False,
    "max_length": None,
    "bf16": False,
    "gradient_checkpointing": False,
    "store_features": True,
    "batch_size": 32,
    "per_device": 32,
    "lr": 2e-3,
}

stages = {
    "align": {**_video, "data": [{"json": "{root}/captions_train.json"}], "template": "plain",
              "updates": 200},
    "captions": {**_video, "data": [{"json": "{root}/captions_train.json"}], "template": "brief",
                 "updates": 300},
    "questions": {**_video, "data": [{"json": "{root}/questions_train.json"}], "template": "brief",
                  "updates": 800},
}  # fmt: skip

train = {"threads": 1}  # tensors so small that a second thread costs more than it gives

eval = {
    "tasks": ["miniworld_qa"],
    "validate": ["miniworld_qa_val"],
    "main": ["motion", "appearance", "present", "past"],
    "classes": ["direction", "order", "first", "last", "now", "before", "colour", "count", "place"],
    "chance": 25.0,
    "batch_size": 32,
}
