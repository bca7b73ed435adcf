"""YouTube-VIS 2019 at 480, as CTVIS trains: clips of 10 frames, many sizes, wide windows.

Encoder and adapter see frames of about three times the pixels of ``ytvis2019``.
"""

_base_ = ["ytvis2019.py"]

data = {
    "num_frames": 10,
    "short": 480,
    "augmentation": {
        "crop": 0.5,
        "crop_sizes": [384, 600],
        "sizes": [320, 352, 392, 416, 448, 480, 512, 544, 576, 608, 640],
        "max_size": 768,
        "flip": 0.5,
    },
}

train = {"iterations": 16_000, "batch_size": 16, "milestones": [6_000, 12_000]}
