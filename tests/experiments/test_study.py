"""Ablation and data efficiency short of training: arms, equal clips, and who is told what."""

import pytest

from experiments import ablation, data_efficiency, recipe, study
from experiments.config import UserError
from experiments.study import Arm, equal_clips, merge, resolve


@pytest.fixture(scope="module")
def config():
    return recipe.resolve("miniworld")


def test_rows_of_the_paper(config):
    rows = {arm.label: set(arm.tasks) for arm in ablation.rows(config)}
    assert list(rows) == ["G", "T", "S", "G+T", "G+T+S"]
    assert rows["G"] == {"recognition", "retrieval"}
    assert rows["T"] == {"localization", "grounding"}
    assert rows["S"] == {"instances", "referring"}
    assert rows["G+T"] == rows["G"] | rows["T"] and rows["G+T+S"] == set(config["tasks"])
    assert [arm.label for arm in ablation.rows(config, ["S", "G"])] == ["G", "S"]


def test_a_row_without_tasks_is_refused(config):
    tasks = {name: config["tasks"][name] for name in ("retrieval", "localization")}
    assert [arm.tasks for arm in ablation.rows({"tasks": tasks}, ["G", "T"])] == [
        ("retrieval",), ("localization",),
    ]  # fmt: skip
    message = "--rows S: the config has no task of instance_segmentation or referring_segm"
    with pytest.raises(UserError, match=message):
        ablation.rows({"tasks": tasks})


def test_both_regimes_at_every_share(config):
    arms = data_efficiency.arms(config, [0.1, 1.0])
    assert [(arm.label, arm.share) for arm in arms] == [
        ("contrastive-10", 0.1), ("multitask-10", 0.1),
        ("contrastive-100", 1.0), ("multitask-100", 1.0),
    ]  # fmt: skip
    assert {arm.tasks for arm in arms} == {("retrieval",), tuple(config["tasks"])}
    assert data_efficiency.pairs([], [0.1, 1.0]) == [
        ("multitask-100", "contrastive-100"), ("multitask-10", "contrastive-10"),
        ("multitask-100", "siglip"),
    ]  # fmt: skip


@pytest.mark.parametrize("kept", [("retrieval",), ("localization", "grounding")])
def test_a_comparison_needs_captions_and_something_else(config, kept):
    tasks = {name: config["tasks"][name] for name in kept}
    with pytest.raises(UserError, match="needs one of retrieval, and others beside it"):
        data_efficiency.arms({"tasks": tasks}, [1.0])


@pytest.mark.parametrize("sizes", [(4, 1, 1, 1, 1, 1), (8, 2, 3), (1, 1), (5, 3, 2, 7)])
def test_every_choice_of_tasks_sees_the_same_number_of_clips(sizes):
    names = [f"task{number}" for number in range(len(sizes))]
    tasks = {name: {"batch_size": size} for name, size in zip(names, sizes, strict=True)}
    config = {"tasks": tasks, "run": {"batch_size": 16}}
    for choice in range(1, 2 ** len(names)):
        kept = [name for bit, name in enumerate(names) if choice >> bit & 1]
        grown = {name: task["batch_size"] for name, task in equal_clips(config, kept).items()}
        assert sum(grown.values()) == sum(sizes) and list(grown) == kept
        for name in kept:
            exact = tasks[name]["batch_size"] * sum(sizes) / sum(
                tasks[other]["batch_size"] for other in kept
            )
            assert tasks[name]["batch_size"] <= grown[name] and abs(grown[name] - exact) < 1
    assert tasks == {name: {"batch_size": size} for name, size in zip(names, sizes, strict=True)}


def test_tasks_without_a_size_have_that_of_the_run():
    config = {"tasks": {"a": {}, "b": {"batch_size": 4}}, "run": {"batch_size": 12}}
    assert equal_clips(config, ["b"]) == {"b": {"batch_size": 16}}
    assert equal_clips(config, ["a", "b"]) == {"a": {"batch_size": 12}, "b": {"batch_size": 4}}


def test_overrides_reach_the_config_that_they_name():
    own, others = resolve(
        "miniworld",
        ["oad"],
        ["optim.updates=77", "oad.train.epochs=2", "world.clips_train=9", "launch.processes=1"],
    )
    assert own["optim"]["updates"] == 77 and others["oad"]["train"]["epochs"] == 2
    assert own["world"]["clips_train"] == others["oad"]["world"]["clips_train"] == 9
    _, others = resolve("multitask_1m", ["oad"], ["oad.data.root=/thumos"])
    assert others["oad"]["data"]["dataset"] == "THUMOS"
    assert others["oad"]["data"]["root"] == "/thumos"
    _, others = resolve("multitask_1m", ["oad=tvseries"], [])
    assert others["oad"]["data"]["dataset"] == "TVSeries"


@pytest.mark.parametrize(
    ("downstream", "overrides", "message"),
    [
        (["ocr"], [], "--downstream: no task 'ocr'; there is oad"),
        (["oad"], ["oad.train.epoch=2"], "unknown key 'train.epoch'"),
        (["oad"], ["train.epochs=2"], "unknown key 'train.epochs'"),
        (
            ["oad"],
            ["oad.world.seed=5"],
            "the world of oad differs from that of the pretraining in seed",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(downstream, overrides, message):
    with pytest.raises(UserError, match=message):
        resolve("miniworld", downstream, overrides)


def test_outcomes_of_several_tasks_carry_their_names():
    one = {"siglip": {0: {"metrics": {"mAP": 1.0}, "per_class": {"run": 2.0}}}}
    other = {"siglip": {0: {"metrics": {"AP": 3.0}}}}
    assert merge({"oad": one}) == one
    merged = merge({"oad": one, "ovis": other})["siglip"][0]
    assert merged == {"metrics": {"oad mAP": 1.0, "ovis AP": 3.0}, "per_class": {"run": 2.0}}
    assert one["siglip"][0]["metrics"] == {"mAP": 1.0}, "the outcomes themselves stay"


def test_an_arm_is_trained_anew_when_what_made_it_changes(config, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "train", lambda settings, processes: settings.output)
    source = recipe.Source("here", tmp_path, "/siglip")

    def made(arm, **sections):
        changed = {**config, **sections}
        return study.train_arm(arm, changed, source, tmp_path, "cpu")

    arm = Arm("G", ("recognition", "retrieval"))
    first = made(arm)
    assert first.startswith(f"streamformer:{tmp_path}/encoders/G-")
    assert made(arm) == first
    assert made(arm, run={**config["run"], "name": "another", "trackers": ["wandb"]}) == first
    others = {
        made(arm, optim={**config["optim"], "updates": 300}),
        made(arm, run={**config["run"], "seed": 3}),
        made(arm, world={**config["world"], "seed": 3}),
        made(Arm("G", ("recognition", "retrieval"), 0.5)),
        made(Arm("G", ("recognition",))),
        first,
    }
    assert len(others) == 6
