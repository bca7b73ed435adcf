"""THUMOS'14: 200 validation videos train, 213 test videos test; 20 actions, per-frame mAP.

Features of frames alone. ``data.root`` holds ``videos/`` and ``target_perframe/``, which
``python -m integrations.oad.targets`` builds from the challenge's annotations.
"""

_base_ = ["_base.py"]

data = {
    "root": None,
    "videos": "videos",
    "dataset": "THUMOS",
    "train_set": "train_session_set",
    "val_sets": [],
    "test_sets": ["test_session_set"],
    "fps": 4.0,
    "video_fps": 24.0,
    "chunk_frames": 6,
    "protocol": "clip",
}
