"""YouTube-VIS 2019 at 224: 2,238 training videos, 40 categories.

``data.root`` holds ``train.json``, ``train/JPEGImages/``, ``valid.json`` and ``valid/JPEGImages/``.
"""

_base_ = ["_base.py"]

data = {"dataset": "ytvis2019"}
