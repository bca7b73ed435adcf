"""OVIS at 224: 607 training videos of crowded scenes, 25 categories.

``data.root`` holds ``annotations_train.json``, ``train/``, ``annotations_valid.json``, ``valid/``.
"""

_base_ = ["_base.py"]

data = {"dataset": "ovis"}
