"""Adapter, head, tracking, training and evaluation of CTVIS and StreamFormer.

``integrations.ovis.config`` says what each key means. Short side 224, clips of 16 frames: the
setting of StreamFormer's table. Three defaults mend what the released code does: distinct frames
(``data.spacing="released"`` draws with replacement), windows cut after resizing
(``data.augmentation.crop_scales=[]``), and an encoder that remembers across the whole video
(``eval.mode="chunk"`` restarts it every 16 frames).
"""

data = {
    "root": None,  # say where the data lie: --set data.root=FOLDER
    "coco": None,  # pictures that become clips: instances_train2017.json
    "coco_root": None,  # and the folder train2017
    "train_split": "train",
    "val_split": None,
    "test_split": None,  # servers keep the annotations: a hold-out of the training videos
    "hold_out": 0.1,
    "submit_split": "valid",
    "num_frames": 16,
    "reach": 20,
    "video_weight": 1.5,
    "coco_weight": 1.0,
    "short": 224,
    "longest": 1333,
    "augmentation": {"crop": 0.5, "crop_sizes": [224, 224], "flip": 0.5},
}

adapter = {"num_heads": 12, "num_points": 4, "stem_width": 64, "extra_extractors": 2}

head = {
    "num_queries": 100,
    "width": 256,
    "mask_size": 256,
    "num_heads": 8,
    "pixel_layers": 6,
    "pixel_feedforward": 1024,
    "decoder_layers": 9,
    "decoder_feedforward": 2048,
    "embedding_size": 256,
}

loss = {
    "class_weight": 2.0,
    "mask_weight": 5.0,
    "dice_weight": 5.0,
    "no_object_weight": 0.1,
    "num_points": 12544,  # 112 x 112
    "oversampling": 3.0,
    "importance": 0.75,
}

contrastive = {"weight": 2.0, "auxiliary_weight": 3.0, "memory_probability": 0.5}

tracker = {}
video = {"top_pairs": 40}

train = {
    "iterations": 32_000,
    "batch_size": 8,
    "lr": 1e-4,
    "weight_decay": 0.05,
    "rates": {"adapter.": 0.1},  # it counts as backbone there
    "schedule": "step",
    "milestones": [12_000, 24_000],
    "clip_norm": 0.01,
    "num_workers": 4,
    "validate_every": 0,
    "checkpoint_every": 1_000,
}

eval = {"mode": "stream", "chunk_frames": 16}

stream = {}  # memory and positions of the encoder: as its checkpoint says
