"""The packaged configs of online action detection say what the papers say."""

import pytest
import torch
from mmengine.config import Config

from experiments.config import packaged_configs
from integrations.oad.config import OadConfig
from integrations.oad.mat import MatHead

CONFIGS = packaged_configs("oad")
SECTIONS = ("data", "head", "train", "eval")


def read(name):
    return Config.fromfile(str(CONFIGS[name])).to_dict()


def settings(name):
    values = read(name)
    return OadConfig.from_dict({section: values[section] for section in SECTIONS})


def test_real_data_come_with_and_without_flow():
    assert set(CONFIGS) == {"miniworld", "thumos14", "thumos14_flow", "tvseries", "tvseries_flow"}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_complete_and_name_no_encoder(name):
    values = read(name)
    settings(name).mat(visual_size=64, motion_size=0, num_classes=10)
    assert "encoder" not in values
    assert ("world" in values) == (name == "miniworld")


@pytest.mark.parametrize("name", ["thumos14", "thumos14_flow", "tvseries", "tvseries_flow"])
def test_real_data_are_trained_on_as_published(name):
    config = settings(name)
    train = config.train
    assert (train.batch_size, train.lr, train.weight_decay) == (16, 7e-5, 5e-5)
    assert (train.epochs, train.warmup_epochs) == ((25, 10) if "thumos" in name else (20, 8))
    assert (train.warmup_factor, train.ema_momentum, train.schedule_ahead) == (0.3, 0.001, 1)
    head = config.mat(768, 1024 if "flow" in name else 0, 22)
    assert (head.long_tokens, head.work_tokens, head.anticipation_tokens) == (256, 32, 8)
    assert (head.future_tokens, head.generator.queries) == (48, 32)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in MatHead(head).parameters())
    assert round(parameters / 1e6, 1) == (104.6 if "flow" in name else 98.3)
    assert config.data.fps * config.data.chunk_frames == config.data.video_fps == 24
    assert not config.data.val_sets, "the release chose on the test set; nothing is chosen here"


def test_miniworld_scores_no_step_by_one_that_saw_later_ones():
    assert settings("miniworld").eval.opening == "short"
