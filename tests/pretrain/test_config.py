"""The config: plain dicts in, unknown or impossible values refused by name."""

import json

import pytest

from pretrain import PretrainConfig

TASK = {"objective": "recognition", "reader": "kinetics", "train": {}}


def make(**changes):
    values = {
        "output": "run",
        "tasks": {"actions": dict(TASK)},
        "model": {"siglip": "folder"},
        "optim": {"updates": 10},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if section == "task":
            values["tasks"]["actions"][name] = value
        elif name:
            values[section][name] = value
        else:
            values[section] = value
    return PretrainConfig.from_dict(values)


def test_a_config_survives_json():
    config = make(task__templates=["now {}"], optim__betas=[0.9, 0.99], trackers=["tensorboard"])
    again = PretrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.tasks["actions"].templates == ("now {}",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batchsize": 4}, "unknown key 'batchsize'; did you mean 'batch_size'"),
        ({"model__windows": 4}, "unknown key 'model.windows'; did you mean 'window'"),
        ({"task__sampler": "x"}, "unknown key 'tasks.actions.sampler'; did you mean 'sampling'"),
        ({"optim": {}}, "missing key 'optim.updates'"),
        ({"tasks": {}}, "tasks is empty"),
        ({"sampler": "random"}, "sampler='random' is unknown; use one of 'rounds', 'balanced'"),
        (
            {"sampler": "unique", "task__batch_size": 2},
            "sampler='unique' is the released order.*leave out batch_size of task 'actions'",
        ),
        ({"task__objective": "naming"}, "objective='naming' is unknown; use one of 'recognition'"),
        ({"task__reader": "imagenet"}, "reader='imagenet' is unknown"),
        ({"task__sampling": "all"}, "sampling='all' is unknown"),
        ({"task__augmentation": "all"}, "no augmentation 'all'"),
        ({"task__templates": "all"}, "no template set named 'all'"),
        ({"task__weight": 0}, "weight=0 must be positive"),
        ({"task__flip": True}, "flip=True mirrors clips whose labels may tell left from right"),
        ({"task__batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"model__freeze": "all"}, "freeze='all' is unknown"),
        (
            {"model__freeze": "image", "model__temporal_attention": False},
            "leaves nothing to train",
        ),
        ({"optim__decay": "some"}, "decay='some' is unknown"),
        ({"optim__warmup_updates": 11}, "warmup_updates=11 must lie in 0 to updates=10"),
        ({"precision": "fp16"}, "precision='fp16' is unknown; use one of 'fp32', 'bf16'"),
        ({"cache_in_memory": True, "num_workers": 2}, "cache_in_memory with num_workers=2"),
        ({"long_share": 0.5}, "long_share=0.5 needs long_frames=0 above num_frames=16"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_flips_are_allowed_where_labels_have_no_direction():
    assert make(task__flip=True, task__directional=False).tasks["actions"].flip
