"""What ``import backbone`` brings along: PyTorch and transformers, none of the task frameworks."""

import subprocess
import sys

FOREIGN = [
    "mmengine", "mmaction", "mmcv", "lmms_eval", "detectron2", "llava", "cv2", "decord",
]  # fmt: skip
HOUSE = ["pretrain", "integrations", "experiments"]


def test_import_is_light():
    code = f"import sys, backbone; print(*[m for m in {FOREIGN + HOUSE} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_everything_promised_is_there():
    import backbone

    assert sorted(backbone.__all__) == backbone.__all__
    for name in backbone.__all__:
        assert getattr(backbone, name).__doc__, name
