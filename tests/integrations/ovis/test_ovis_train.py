"""Training by mmengine: resuming, checkpoints of what trains, stored tokens, groups and configs.

The videos are a handful of squares on grey; nothing here says how well anything is segmented.
"""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from backbone import StreamformerConfig, StreamformerEncoder, StreamformerModel
from backbone.files import read_json, write_json
from integrations.ovis import rle
from integrations.ovis.config import OvisConfig
from integrations.ovis.evaluation import REPORTED
from integrations.ovis.hooks import learning_rate_curve, parameter_groups
from integrations.ovis.tokens import TokenError, read_tokens, write_tokens
from integrations.ovis.train import SEGMENTER, read_splits, run_ovis
from integrations.ovis.weights import load_segmenter, read_notes

FRAMES, SIDE = 3, 32


def encoder(seed=0) -> StreamformerEncoder:
    torch.manual_seed(seed)
    config = StreamformerConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, num_frames=4,
    )  # fmt: skip
    model = StreamformerModel(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "gate" in name or "time_embedding" in name:
                weight.normal_()
    return StreamformerEncoder(model)


def write_set(root, split, count, size=(SIDE, SIDE)):
    """Videos of one red or green square that moves to the right; every third one is empty."""
    videos, annotations = [], []
    folder = root / split / "JPEGImages"
    for number in range(1, count + 1):
        (folder / f"v{number}").mkdir(parents=True)
        files, masks = [], []
        for frame in range(FRAMES):
            pixels = np.full((*size, 3), 90, np.uint8)
            mask = np.zeros(size, bool)
            mask[4:16, 3 * frame + number % 5 : 3 * frame + number % 5 + 12] = True
            if number % 3:
                pixels[mask, number % 2] = 250
            files.append(f"v{number}/{frame}.jpg")
            Image.fromarray(pixels).save(folder / files[-1], quality=95)
            masks.append(mask)
        videos.append(
            {"id": number, "height": size[0], "width": size[1], "length": FRAMES,
             "file_names": files}
        )  # fmt: skip
        if number % 3:
            encoded = rle.encode(np.stack(masks))
            annotations.append(
                {"id": number, "video_id": number, "category_id": 1 + number % 2, "iscrowd": 0,
                 "segmentations": [{**m, "counts": _text(m["counts"])} for m in encoded],
                 "bboxes": [[0, 0, 1, 1]] * FRAMES, "areas": [144.0] * FRAMES,
                 "camouflaged": number % 2 == 0}
            )  # fmt: skip
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "green"}]
    document = {"videos": videos, "categories": categories, "annotations": annotations}
    write_json(root / f"{split}.json", document)


def _text(counts):
    return counts.decode() if isinstance(counts, bytes) else counts


def config(**changes) -> dict:
    """A tiny run; sections are changed key by key."""
    values = {
        "data": {
            "dataset": "miniworld", "val_split": "val", "test_split": "test", "num_frames": 2,
            "short": SIDE, "augmentation": {"crop": 0.0, "flip": 0.5},
        },
        "adapter": {"num_heads": 2, "stem_width": 4, "extra_extractors": 0},
        "head": {
            "num_queries": 4, "width": 64, "mask_size": 32, "num_heads": 2, "pixel_layers": 1,
            "pixel_feedforward": 32, "decoder_layers": 1, "decoder_feedforward": 32,
            "embedding_size": 16,
        },
        "loss": {"num_points": 32},
        "contrastive": {}, "tracker": {}, "video": {"top_pairs": 5},
        "train": {
            "iterations": 6, "batch_size": 2, "lr": 1e-3, "rates": {"adapter.": 0.1},
            "schedule": "cosine", "warmup": 2, "clip_norm": 1.0, "threads": 1,
            "checkpoint_every": 2,
        },
        "eval": {"groups": {"camouflaged": "camouflaged"}},
    }  # fmt: skip
    return {name: {**section, **changes.get(name, {})} for name, section in values.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    for split, count in (("train", 7), ("val", 2), ("test", 3)):
        write_set(root, split, count)
    return root


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """An uninterrupted run: its folder and result."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run_ovis(config(), encoder(), world, folder, seed=3, device="cpu")


def weights(folder):
    adapter, head = load_segmenter(folder / SEGMENTER)
    return {**adapter.state_dict(prefix="adapter."), **head.state_dict(prefix="head.")}


def test_a_run_leaves_result_segmenter_and_predictions(finished, world):
    folder, result = finished
    assert result == json.loads((folder / "results.json").read_text())
    assert result["iterations"] == 6 and result["parameters"] > 1000
    for kind in ("val", "test"):
        assert {*REPORTED, "agnostic_AP", "recall_camouflaged"} <= set(result[kind])
        assert isinstance(read_json(folder / f"predictions_{kind}.json"), list)
    notes = read_notes(folder / SEGMENTER)
    assert notes["classes"] == ["red", "green"] and notes["short"] == SIDE
    assert notes["encoder"] == encoder().settings()


def test_a_finished_run_is_not_run_again(finished, world):
    folder, result = finished
    before = (folder / SEGMENTER).stat().st_mtime_ns
    assert run_ovis(config(), encoder(), world, folder, seed=3, device="cpu") == result
    assert (folder / SEGMENTER).stat().st_mtime_ns == before


def test_a_killed_run_goes_on_as_if_nothing_had_happened(finished, world, tmp_path, monkeypatch):
    from integrations.ovis.model import OvisModel

    step, calls = OvisModel.train_step, []

    def killed(self, data, optim_wrapper):
        calls.append(len(calls))
        if len(calls) == 5:  # in the fifth of six iterations; the last checkpoint is of the fourth
            raise KeyboardInterrupt
        return step(self, data, optim_wrapper)

    with monkeypatch.context() as patch:
        patch.setattr(OvisModel, "train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run_ovis(config(), encoder(), world, tmp_path, seed=3, device="cpu")
    assert sorted(path.name for path in (tmp_path / "training").glob("*.pth")) == [
        "iter_2.pth", "iter_4.pth",
    ]  # fmt: skip
    result = run_ovis(config(), encoder(), world, tmp_path, seed=3, device="cpu")
    folder, expected = finished
    assert result == expected
    ours, theirs = weights(tmp_path), weights(folder)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_checkpoints_hold_what_trains_and_load_safely(finished):
    folder, _ = finished
    saved = torch.load(folder / "training" / "iter_6.pth", weights_only=True)
    names = {name.split(".")[0] for name in saved["state_dict"]}
    assert names == {"adapter", "head"}


def test_another_seed_config_or_encoder_is_another_run(finished, world):
    folder, _ = finished
    with pytest.raises(ValueError, match="seed is 3 there and 4 now"):
        run_ovis(config(), encoder(), world, folder, seed=4, device="cpu")
    with pytest.raises(ValueError, match="train.lr is 0.001 there and 0.5 now"):
        run_ovis(config(train={"lr": 0.5}), encoder(), world, folder, seed=3, device="cpu")
    with pytest.raises(ValueError, match="encoder.weights is"):
        run_ovis(config(), encoder(1), world, folder, seed=3, device="cpu")


# -- stored tokens --------------------------------------------------------------------------------

STORED = {"stored": True, "augmentation": {"crop": 0.0, "flip": 0.0}}


def test_stored_tokens_train_like_tokens_computed_on_the_way(world, tmp_path):
    whole = {"num_frames": FRAMES, "val_split": None}  # all frames: what a clip sees, a video sees
    vision = encoder()
    train = read_splits(OvisConfig.from_dict(config()).data, world).train
    taps = (1, 1, 2, 2)
    tokens = write_tokens(vision, taps, train, tmp_path / "tokens", SIDE)
    stored = config(data={**STORED, **whole})
    fresh = config(data={**STORED, **whole, "stored": False})
    results = [
        run_ovis(how, encoder(), world, tmp_path / name, device="cpu", tokens_root=tokens)
        for name, how in (("stored", stored), ("fresh", fresh))
    ]
    assert results[0]["test"].keys() == results[1]["test"].keys()
    one, other = weights(tmp_path / "stored"), weights(tmp_path / "fresh")
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-2, atol=1e-3, msg=name)


def test_tokens_are_those_of_the_stream_and_of_this_encoder_alone(world, tmp_path):
    vision = encoder()
    train = read_splits(OvisConfig.from_dict(config()).data, world).train
    folder = write_tokens(vision, (1, 2), train, tmp_path, SIDE)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    write_tokens(vision, (1, 2), train, tmp_path, SIDE)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    from integrations.ovis.data import read_video

    video = train.videos[0]
    frames = torch.stack(list(read_video(video, train.root, SIDE))).float() / 255 * 2 - 1
    whole = vision.encode(frames[None], (1, 2)).layers
    found = read_tokens(folder, video.id, [2, 0])
    for tap in (1, 2):
        torch.testing.assert_close(found[tap], whole[tap][0, [2, 0]], rtol=1e-4, atol=1e-5)
    with pytest.raises(TokenError, match="encoder is .* use another folder"):
        write_tokens(encoder(1), (1, 2), train, tmp_path, SIDE)
    with pytest.raises(TokenError, match="no tokens of video 99"):
        read_tokens(folder, 99, [0])


def test_tokens_are_kept_of_videos_of_one_size(tmp_path):
    write_set(tmp_path, "train", 2)
    write_set(tmp_path / "wide", "train", 2, (32, 64))
    from dataclasses import replace

    from integrations.ovis.layout import read_release

    small, wide = (read_release("miniworld", r, "train") for r in (tmp_path, tmp_path / "wide"))
    mixed = replace(small, videos=small.videos + wide.videos)
    with pytest.raises(TokenError, match=r"2 sizes, such as \(32, 32\) and \(32, 64\)"):
        write_tokens(encoder(), (1,), mixed, tmp_path / "tokens", SIDE)


# -- config and optimiser -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"dataset": "ytvis1999"}}, "data.dataset='ytvis1999' is not known"),
        ({"data": {"stored": True}}, "data.stored=True with data.coco=None"),
        ({"data": {"augmentation": {"flipp": 0.5}}}, "no key 'flipp'; did you mean 'flip'"),
        ({"data": {"coco": "a.json"}}, "pictures need both"),
        ({"head": {"width": 64, "depth": 2}}, "head has no key 'depth'"),
        ({"adapter": {"taps": (1,)}}, "adapter has no key 'taps'"),
        ({"train": {"schedule": "linear"}}, "train.schedule='linear' is not one of step, cosine"),
        ({"train": {"iterations": 0}}, "train.iterations=0 must be at least 1"),
        ({"train": {"lr": 0.0}}, "train.lr=0.0"),
        ({"eval": {"mode": "offline"}}, "eval.mode='offline'"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OvisConfig.from_dict(config(**changes))


def test_half_precision_needs_a_gpu(world, tmp_path):
    with pytest.raises(ValueError, match="train.precision='float16' needs a GPU"):
        half = config(train={"precision": "float16"})
        run_ovis(half, encoder(), world, tmp_path, device="cpu")


def test_groups_of_the_sheet():
    model = nn.Module()
    model.adapter = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model.head = nn.Sequential(nn.Linear(2, 2), nn.Embedding(3, 2))
    model.encoder = nn.Linear(2, 2).requires_grad_(False)
    groups = parameter_groups(model, 1e-4, 0.05, {"adapter.": 0.1})
    found = {
        id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]
    }
    assert len(found) == 7 and len(groups) == 4
    assert found[id(model.adapter[0].weight)] == pytest.approx((1e-5, 0.05))
    assert found[id(model.adapter[1].weight)] == pytest.approx((1e-5, 0.0))
    assert found[id(model.head[0].bias)] == pytest.approx((1e-4, 0.05))
    assert found[id(model.head[1].weight)] == pytest.approx((1e-4, 0.0))
    with pytest.raises(ValueError, match="starts with 'adaptor'"):
        parameter_groups(model, 1e-4, 0.05, {"adaptor": 0.1})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("step", 10, (4, 8), 0), [1.0] * 4 + [0.1] * 4 + [0.01] * 2),
        (("cosine", 10, (), 0), [(1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)]),
    ],
)
def test_learning_rate_curves(options, expected):
    from mmengine.registry import PARAM_SCHEDULERS

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    curves = [
        PARAM_SCHEDULERS.build({**curve, "optimizer": optimizer})
        for curve in learning_rate_curve(*options)
    ]
    rates = []
    for _ in expected:
        rates.append(optimizer.param_groups[0]["lr"])
        for curve in curves:
            curve.step()
    assert rates == pytest.approx(expected, abs=1e-6)
