"""What importing a part brings along: the maths works where mmengine is not installed."""

import subprocess
import sys

PURE = [
    "adapter", "augment", "contrastive", "criterion", "data", "deformable", "evaluation", "head",
    "layout", "online", "postprocess", "rle", "submission", "tracker", "weights",
]  # fmt: skip
FOREIGN = ["mmengine", "mmaction", "detectron2", "pretrain", "experiments", "integrations.oad"]


def test_the_maths_needs_no_framework():
    code = (
        "import sys, importlib; sys.modules['mmengine'] = None\n"
        f"for name in {PURE}: importlib.import_module('integrations.ovis.' + name)\n"
        f"print(*[name for name in {FOREIGN} if sys.modules.get(name)])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []
