"""The examples of ``docs/streaming.md`` run, and its figures are right."""

import re
from pathlib import Path

import pytest

from backbone import StreamformerConfig, StreamingCache

PAGE = Path(__file__).parents[2] / "docs" / "streaming.md"


def test_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(examples) >= 7
    for example in examples:
        exec(compile(example, PAGE.name, "exec"), names)
    assert names["stream"].positions == [40]


def test_memory_table():
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \|$", PAGE.read_text(), flags=re.MULTILINE)
    assert len(rows) == 3
    config = StreamformerConfig()
    for window, stated in rows:
        cache = StreamingCache(
            config.num_hidden_layers, 1, 196, config.num_attention_heads, config.head_dim,
            window=int(window), device="meta",
        )  # fmt: skip
        assert float(stated) == pytest.approx(cache.memory_bytes / 2**20, abs=0.05)


def test_policies_and_default():
    policies = re.findall(r"^\| `(\w+)`( \(default\))? \|", PAGE.read_text(), flags=re.MULTILINE)
    default = StreamformerConfig().temporal_positions
    assert [name for name, mark in policies if mark] == [default]
    for name, _ in policies:
        assert StreamformerConfig(temporal_positions=name).temporal_positions == name
    assert len(policies) == 4
