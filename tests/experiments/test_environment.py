"""How a job shares the cores: runs side by side, each kept to its threads."""

import pytest
import torch

from experiments import environment


@pytest.mark.parametrize(
    ("threads", "device", "side_by_side"),
    [(1, "cpu", 6), (2, "cpu", 3), (4, "cpu", 1), (8, "cpu", 1), (None, "cpu", 1), (1, "cuda", 1)],
)
def test_runs_share_the_cores_only_where_their_threads_are_bound(
    monkeypatch, threads, device, side_by_side
):
    monkeypatch.setattr(environment, "cores", lambda: 6)
    assert environment.jobs(threads, device) == side_by_side


def test_threads_are_bound_on_demand():
    before = torch.get_num_threads()
    try:
        environment.bound_threads(before + 1)
        assert torch.get_num_threads() == before + 1
        environment.bound_threads(None)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
