"""A small model, for any machine: ViT-Tiny's width at half its depth, frames of 96 pixels."""

model = {
    "image_size": 96,
    "patch_size": 16,
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "intermediate_size": 768,
}

measure = {
    "lengths": [1, 16, 64, 256, 1024],  # frames of a stream when its newest one is measured
    "window": 64,
    "streams": [1, 2, 4, 8, 16, 32],  # side by side, each with a full window
    "seconds": 1.5,  # spent on each number
    "longest": 30.0,  # seconds that one answer may take, the frames before it included
}

run = {
    "dtype": "auto",  # bfloat16 on a GPU that computes in it, else float32
    "compile": "auto",  # streams side by side, on a GPU
}
