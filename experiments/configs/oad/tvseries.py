"""TVSeries: 20 episodes train, 7 test; 30 actions, per-frame calibrated mAP."""

_base_ = ["_base.py"]

data = {
    "root": None,
    "videos": "videos",
    "dataset": "TVSeries",
    "train_set": "train_session_set",
    "val_sets": [],
    "test_sets": ["test_session_set"],
    "fps": 4.0,
    "video_fps": 24.0,
    "chunk_frames": 6,
    "protocol": "clip",
}

train = {"epochs": 20, "warmup_epochs": 8.0}
