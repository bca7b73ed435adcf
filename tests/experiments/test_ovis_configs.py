"""The packaged configs of video instance segmentation say what the papers say."""

import pytest
import torch

from experiments.config import packaged_configs
from experiments.ovis import SECTIONS, resolve
from integrations.ovis.config import OvisConfig
from integrations.ovis.head import HeadConfig, SegmentationHead

CONFIGS = packaged_configs("ovis")
REAL = ["ytvis2019", "ytvis2019_480", "ytvis2021", "ovis"]


def settings(name):
    values = resolve(name, [])
    return OvisConfig.from_dict({section: values[section] for section in SECTIONS})


def test_all_data_sets_have_one():
    assert set(CONFIGS) == {"miniworld", *REAL}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_complete_and_name_no_encoder(name):
    assert "encoder" not in resolve(name, [])
    settings(name)


@pytest.mark.parametrize("name", REAL)
def test_real_data_are_trained_on_as_published(name):
    config = settings(name)
    train, data = config.train, config.data
    large = name.endswith("480")
    assert (train.lr, train.weight_decay, train.clip_norm) == (1e-4, 0.05, 0.01)
    assert train.rates == {"adapter.": 0.1}
    assert train.iterations == (16_000 if large else 32_000)
    assert train.milestones == ((6_000, 12_000) if large else (12_000, 24_000))
    assert (train.batch_size, data.num_frames) == ((16, 10) if large else (8, 16))
    assert (data.short, data.reach) == (480 if large else 224, 20)
    clips = data.clips()
    assert (clips.crop, clips.flip) == (0.5, 0.5)
    assert clips.crop_sizes == ((384, 600) if large else (224, 224))
    assert (len(clips.sizes), clips.max_size) == ((11, 768) if large else (1, 1333))
    assert data.clips(pictures=True).rotation == 15
    assert config.loss.num_points == 112 * 112
    assert data.test_split is None, "servers keep the annotations of the others"
    head = HeadConfig(in_channels=768, num_classes=40, **config.head)
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in SegmentationHead(head).parameters())
    assert round(parameters / 1e6, 1) == 20.5  # 20.3 of Mask2Former, and the embedding


def test_miniworld_trains_all_alike_and_evaluates_online_with_camouflage_apart():
    config = settings("miniworld")
    assert config.eval.mode == "stream" and config.eval.groups == {"camouflaged": "camouflaged"}
    assert (config.data.val_split, config.data.test_split) == ("val", "test")
    assert config.train.rates == {}, "an adapter that starts anew learns as fast as the head"
