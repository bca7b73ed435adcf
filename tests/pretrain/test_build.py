"""From a task's config to its data: a share of the videos is the same share for every task."""

import dataclasses

import pytest

from pretrain import PretrainConfig, TaskConfig
from pretrain.build import build_dataset, read_annotations, share_of


def names(annotations):
    return {entry.video.stem for entry in annotations.entries}


def test_shares_nest_and_are_the_same_videos_for_every_task(tasks):
    found = {
        share: {
            name: names(share_of(read_annotations(TaskConfig(**task), task["train"], name), share))
            for name, task in tasks.items()
        }
        for share in (0.3, 0.6, 1.0)
    }
    for by_task in found.values():
        assert len({frozenset(videos) for videos in by_task.values()}) == 1
    small, middle, whole = (by_task["actions"] for by_task in found.values())
    assert small < middle < whole and len(whole) == 16
    assert 2 <= len(small) <= 8 and 7 <= len(middle) <= 13  # near the share, not exactly it


def test_a_data_set_may_be_a_share(tasks):
    task = TaskConfig(**tasks["captions"])
    whole, part = (
        build_dataset(task, task.train, name="captions", image_size=32, share=share)
        for share in (1.0, 0.5)
    )
    assert 0 < len(part) < len(whole) == 16
    assert names(part) < names(whole)


def test_a_share_without_any_video_is_refused(tasks):
    task = TaskConfig(**tasks["captions"])
    with pytest.raises(ValueError, match="the data set has no entries"):
        build_dataset(task, task.train, name="captions", image_size=32, share=1e-9)


@pytest.mark.parametrize("share", [0, -0.1, 1.5])
def test_shares_lie_within_0_and_1(tasks, share):
    values = {"output": "x", "tasks": tasks, "model": {"siglip": "y"}, "optim": {"updates": 1}}
    with pytest.raises(ValueError, match=f"data_share={share} must lie in 0 to 1, 0 excluded"):
        PretrainConfig.from_dict({**values, "data_share": share})
    assert dataclasses.replace(PretrainConfig.from_dict(values), data_share=0.5).data_share == 0.5
