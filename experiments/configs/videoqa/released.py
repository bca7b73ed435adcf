"""The published comparison's own pairing of towers: they differ in layer and final norm.

StreamFormer is seen at its last layer after the norm, SigLIP at its penultimate layer without it.
``llava_video`` has both at the same place.
"""

_base_ = ["llava_video.py"]

model = {"tower_features": "released"}

eval = {"tasks": ["videomme_best_answer", "mlvu_dev"]}  # the tail of the published numbers
