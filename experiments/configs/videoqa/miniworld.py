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
    "batch_size": 8,
    "per_device": 8,
    "lr": 1.2e-3,
}

_captions = [{"json": "{root}/captions_train.json"}]
_questions = [{"json": "{root}/questions_open_train.json"}]  # the answers to choose from unsaid
_steady = {**_video, "schedule": "constant_with_warmup"}  # the rate falls in the last stage alone

stages = {
    "align": {**_steady, "data": _captions, "template": "plain", "questions": 5, "updates": 100},
    "questions": {**_steady, "data": _questions, "template": "brief", "updates": 800},
    "refine": {**_video, "data": _questions, "template": "brief", "updates": 1100},
}

train = {"threads": 1}  # tensors so small that a second thread costs more than it gives

eval = {
    "tasks": ["miniworld_qa"],
    "validate": ["miniworld_qa_val"],
    "main": ["motion", "appearance", "present", "past"],
    "classes": ["direction", "order", "first", "last", "now", "before", "colour", "count", "place"],
    "chance": 25.0,
    "batch_size": 32,
}
