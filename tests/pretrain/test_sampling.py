"""The sampler's promises: one task per batch, whole passes, ranks in step, exact resume."""

import json
from collections import Counter

import pytest

from pretrain.released_sampling import ReleasedSampler, repeats
from pretrain.sampling import RoundSampler

LENGTHS = {"large": 23, "small": 5, "tiny": 2}


def epoch(sampler, task, rounds=None):
    return [
        draw.index
        for round_ in range(len(sampler) if rounds is None else rounds)
        for draw in sampler.batch(task, round_)
    ]


def test_a_round_has_one_batch_of_every_task_in_order():
    batches = RoundSampler(LENGTHS, 4).batches()
    for _ in range(5):
        for task in LENGTHS:
            batch = next(batches)
            assert [name for name, _ in batch] == [task] * 4
            assert all(0 <= draw.index < LENGTHS[task] for _, draw in batch)


@pytest.mark.parametrize("task", LENGTHS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_pass_over_a_task_holds_every_clip_once(task, ranks):
    samplers = [RoundSampler(LENGTHS, 2, rank=r, world_size=ranks) for r in range(ranks)]
    walk = []
    for round_ in range(60):
        parts = [sampler.batch(task, round_) for sampler in samplers]
        walk += [draw.index for draws in zip(*parts, strict=True) for draw in draws]
    size = LENGTHS[task]
    passes = [walk[i : i + size] for i in range(0, len(walk) - size + 1, size)]
    assert all(sorted(one) == list(range(size)) for one in passes)
    if size > 2:
        assert passes[0] != passes[1]


def test_an_epoch_is_known_in_advance_and_shows_every_clip():
    sampler = RoundSampler(LENGTHS, 4)
    assert len(sampler) == 6  # 23 clips in batches of 4
    for task, size in LENGTHS.items():
        assert set(epoch(sampler, task)) == set(range(size))
    assert len(set(epoch(sampler, "large", 5))) < 23


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_are_in_the_same_task_and_share_the_batch_of_one_process(ranks):
    one = RoundSampler(LENGTHS, {"large": 6, "small": 6, "tiny": 12}, seed=3)
    sizes = {task: size // ranks for task, size in one.batch_size.items()}
    several = [RoundSampler(LENGTHS, sizes, seed=3, rank=r, world_size=ranks) for r in range(ranks)]
    streams = [sampler.batches() for sampler in several]
    for batch in (batch for _, batch in zip(range(12), one.batches(), strict=False)):
        parts = [next(stream) for stream in streams]
        assert len({name for part in parts for name, _ in part}) == 1
        assert Counter(item for part in parts for item in part) == Counter(batch)


def test_a_resumed_sampler_goes_on_as_the_straight_one():
    straight, first = RoundSampler(LENGTHS, 4, seed=1), RoundSampler(LENGTHS, 4, seed=1)
    expected = [batch for _, batch in zip(range(3 * 20), straight.batches(), strict=False)]
    first.round = 11  # in the middle of an epoch
    resumed = RoundSampler(LENGTHS, 4, seed=1)
    resumed.load_state_dict(first.state_dict())
    tail = [batch for _, batch in zip(range(3 * 9), resumed.batches(), strict=False)]
    assert tail == expected[3 * 11 :]


def test_the_global_generators_are_left_alone_and_seeds_differ():
    import random

    import numpy as np
    import torch

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    draws = RoundSampler(LENGTHS, 4).batch("large", 0)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    assert len({draw.seed for draw in draws}) == 4
    assert RoundSampler(LENGTHS, 4, seed=1).batch("large", 0) != draws


def test_long_batches_come_at_their_share_from_long_clips_and_in_turns():
    sampler = RoundSampler(
        LENGTHS,
        4,
        num_frames=16,
        long_frames=48,
        long_share=0.25,
        long_entries={"large": [3, 7, 11, 12, 20], "small": [0, 1, 2, 3, 4]},
    )
    rounds = {
        task: [r for r in range(400) if sampler.batch(task, r)[0].num_frames == 48]
        for task in LENGTHS
    }
    assert len(rounds["large"]) == len(rounds["small"]) == 100
    assert not rounds["tiny"]  # none of its clips lasts
    assert not set(rounds["large"]) & set(rounds["small"])
    drawn = [draw.index for r in rounds["large"][:5] for draw in sampler.batch("large", r)]
    assert Counter(drawn) == dict.fromkeys([3, 7, 11, 12, 20], 4)
    assert len(sampler) == 7  # six normal batches of "large" and a long one among them
    assert set(epoch(sampler, "large")) == set(range(23))


def test_a_task_smaller_than_its_batch_is_announced(caplog):
    RoundSampler({"tiny": 2}, 3)
    assert "task 'tiny' has 2 clips for batches of 3" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": {}}, "no tasks"),
        ({"lengths": {"a": 0}}, "task 'a' has no clips"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"rank": 2, "world_size": 2}, "rank=2 must lie in 0 to world_size - 1 = 1"),
        ({"long_share": 0.5, "long_frames": 8}, "long_frames=8 must exceed num_frames=16"),
        ({"long_share": 1.0, "long_frames": 48}, "long_share=1.0 must lie in 0 to 1"),
    ],
)
def test_what_cannot_be_sampled_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        RoundSampler(**{"lengths": {"a": 4}, "batch_size": 2} | change)


def test_a_position_in_other_data_is_refused():
    state = RoundSampler({"a": 10}, 2).state_dict()
    with pytest.raises(ValueError, match=r"lengths=\{'a': 10\}, this run \{'a': 11\}"):
        RoundSampler({"a": 11}, 2).load_state_dict(state)
    with pytest.raises(ValueError, match="seed=0, this run 1"):
        RoundSampler({"a": 10}, 2, seed=1).load_state_dict(state)


# -- released orders -------------------------------------------------------------------------------


def released(golden):
    """Cases of the goldens: our sampler for each rank, its epochs, and what they should be."""
    cases = json.loads((golden / "pretraining/samplers.json").read_text())["cases"]
    return {f"{case['sampler']}-{case['name']}": case for case in cases}


CASES = {
    "balanced-equal": None,
    "balanced-double": None,
    "balanced-longer_first_overrun": None,
    "balanced-two_ranks": None,
    "unique-basic": None,
    "unique-two_ranks": None,
    "balanced-longer_last_crash": "task 'taskA' has 10 batches, no multiple of 3, and is the last",
    "balanced-tiny_task_mixed": "task 'taskA' has 3 clips, less than a batch of 4",
    "unique-tiny_task_mixed": "task 'taskA' has 3 clips, less than a batch of 4",
}


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_released_orders_are_reproduced_where_they_are_valid(golden, name):
    case, error = released(golden)[name], CASES[name]
    starts, start = {}, 0
    for task, length in case["tasks"].items():
        starts[task], start = start, start + length
    for rank, expected in enumerate(case["ranks"]):
        arguments = {"length_scale": None, "rank": rank, "world_size": case["world_size"]}
        arguments |= {"rule": case["sampler"], "batch_size": case["batch_size"]}
        if error is not None:
            with pytest.raises(ValueError, match=error):
                ReleasedSampler(case["tasks"], **arguments)
            continue
        sampler = ReleasedSampler(case["tasks"], **arguments)
        found = sampler.epochs([epoch["epoch"] for epoch in expected])
        for epoch, batches in zip(expected, found, strict=True):
            numbers = [[starts[task] + clip for clip in clips] for task, clips in batches]
            assert numbers == epoch["batches"]


@pytest.mark.golden
def test_no_case_of_the_goldens_is_left_out(golden):
    assert set(released(golden)) == set(CASES)


@pytest.mark.golden
def test_tasks_are_repeated_as_released(golden):
    for case in json.loads((golden / "pretraining/sampling.json").read_text())["task_balancing"]:
        lengths = {str(i): length for i, length in enumerate(case["lengths"])}
        times = repeats(lengths, case["scale"])
        assert [lengths[task] * times[task] for task in lengths] == case["after"]


@pytest.mark.parametrize("rule", ["balanced", "unique"])
def test_a_released_sampler_resumes_and_keeps_ranks_in_step(rule):
    lengths = {"large": 24, "small": 12, "tiny": 5}

    def make(rank=0, world_size=1, size=4):
        return ReleasedSampler(
            lengths, size, rule, num_frames=8, seed=5, rank=rank, world_size=world_size
        )

    straight, count = make(), 3 * (2 * len(make()) + 2)  # into the third epoch
    expected = [batch for _, batch in zip(range(count), straight.batches(), strict=False)]
    assert all(len({task for task, _ in batch}) == 1 for batch in expected)
    assert all(0 <= d.index < lengths[t] and d.num_frames == 8 for b in expected for t, d in b)
    first, resumed = make(), make()
    first.round = len(make()) + 1
    resumed.load_state_dict(first.state_dict())
    tail = [batch for _, batch in zip(range(count - 3 * first.round), resumed.batches(),
                                      strict=False)]  # fmt: skip
    assert tail == expected[3 * first.round :]
    ranks = [make(rank, 2, 2).batches() for rank in range(2)]
    for batch in expected[:10]:
        parts = [next(stream) for stream in ranks]
        assert [item for pair in zip(*parts, strict=True) for item in pair] == batch
    with pytest.raises(ValueError, match="rule=balanced, this run unique|rule=unique, this run ba"):
        other = {"balanced": "unique", "unique": "balanced"}[rule]
        ReleasedSampler(lengths, 4, other, seed=5).load_state_dict(first.state_dict())


def test_an_unknown_released_order_is_refused():
    with pytest.raises(ValueError, match="no released sampler 'random'; use 'balanced'"):
        ReleasedSampler({"a": 8}, 2, "random")
