"""Fixtures shared by all tests, and the switches that keep them offline and repeatable."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(scope="session")
def golden() -> Path:
    """Root of the golden numbers; ``STREAMFORMER_GOLDEN`` points the same tests at another set."""
    root = Path(os.environ.get("STREAMFORMER_GOLDEN", Path(__file__).parent / "golden"))
    if not root.is_dir():
        pytest.fail(f"STREAMFORMER_GOLDEN={root} is not a folder; unset it or point it at goldens")
    return root


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)
