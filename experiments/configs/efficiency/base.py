"""ViT-B/16 at 224 pixels, the size of the released encoders; what a GPU is asked for."""

model = {
    "image_size": 224,
    "patch_size": 16,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}

measure = {
    "lengths": [1, 16, 64, 256, 512, 1024, 2048, 4096],
    "window": 64,
    "streams": [1, 2, 4, 8, 16, 32, 64],
    "seconds": 3.0,
    "longest": 60.0,
}

run = {
    "dtype": "auto",
    "compile": "auto",
}
