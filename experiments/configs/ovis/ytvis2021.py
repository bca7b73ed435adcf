"""YouTube-VIS 2021 at 224: 40 categories.

``data.root`` holds ``train/instances.json`` and ``train/JPEGImages/``, and ``valid/`` likewise.
"""

_base_ = ["_base.py"]

data = {"dataset": "ytvis2021"}
