"""Head, training and evaluation of MAT and of StreamFormer's online action detection.

Lengths are in steps, four a second. What each key means stands in ``integrations.oad``, in
``config`` and ``mat_config``. Parity with published numbers needs three more words, because the
defaults of the suite mend what they state: ``head.long_grouping="batch"``,
``eval.softmax="released"`` and ``data.chunk_starts="released"`` (see there).
"""

head = {
    "dim": 1024,
    "num_heads": 4,
    "feedforward": 1024,
    "dropout": 0.0,
    "activation": "gelu",
    "long_steps": 1024,  # 256 s
    "long_rate": 4,
    "work_steps": 32,  # 8 s
    "work_rate": 1,
    "anticipation_steps": 8,  # 2 s
    "anticipation_rate": 1,
    "future_tokens": 48,  # 12 s
    "groups": 8,
    "refinements": 2,
    "memory_stages": [[16, 1, True], [-1, 2, True]],
    "work_stack": [-1, 2, True],
    "generator": [32, 2, True],
    "future_stack": [48, 1, True],
}

train = {
    "epochs": 25,
    "batch_size": 16,
    "lr": 7e-5,
    "weight_decay": 5e-5,
    "warmup_epochs": 10.0,
    "warmup_factor": 0.3,
    "ema_momentum": 0.001,
}

eval = {
    "protocols": ["online", "window"],
    "opening": "window",
}

stream = {}  # memory and positions of the encoder: as its checkpoint says
