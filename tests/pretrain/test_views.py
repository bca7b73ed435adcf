"""Test views of recognition: which frames and squares they are, and how their scores meet."""

from pathlib import Path

import numpy as np
import pytest
import torch

from backbone import FrameFeatures
from backbone.video import VideoWriter
from pretrain.config import TaskConfig
from pretrain.datasets import Annotations, Batch, Entry, VideoDataset
from pretrain.datasets.augment import crop_place
from pretrain.datasets.decode import ClipReader, FrameStore
from pretrain.datasets.frames import VIEWS, View
from pretrain.evaluation import evaluate
from pretrain.objectives import Grounding, Recognition

LABELS = {"A": ("left", "right", "middle")}


class Texts:
    """A tower whose labels are unit vectors."""

    device = torch.device("cpu")

    def embed_labels(self, labels, templates, renormalize):
        return torch.eye(4)[: len(labels)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A video of 12 frames of 32 x 96: three grey squares, each frame a little brighter."""
    path = tmp_path_factory.mktemp("wide") / "wide.mkv"
    with VideoWriter(path, 8, (96, 32)) as writer:
        for t in range(12):
            image = np.empty((32, 96, 3), np.uint8)
            for part, grey in enumerate((20, 120, 220)):
                image[:, 32 * part : 32 * (part + 1)] = grey + 2 * t
            writer.write(image)
    return path


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("rule", VIEWS)
def test_a_view_is_its_frames_and_its_square(wide, rule, stored):
    reader = ClipReader(32, rule, store=FrameStore(32) if stored else None)
    for time in range(2):
        for place in range(3):
            clip = reader.read(Entry(wide), 4, None, View(time, 2, place, 3))
            assert clip.frames.shape == (4, 3, 32, 32)
            chosen = VIEWS[rule](12, 4, 2)[time]
            np.testing.assert_allclose(clip.times, chosen / 8)
            grey = clip.frames.float().mean((1, 2, 3)).numpy()
            np.testing.assert_allclose(grey, (20, 120, 220)[place] + 2 * chosen, atol=3)


def test_places_spread_along_the_long_side_and_resize_first():
    frames = torch.arange(80, dtype=torch.uint8).expand(2, 3, 20, 80)
    lefts = [crop_place(frames, 20, place, 3)[0, 0, 0, 0].item() for place in range(3)]
    assert lefts == [0, 30, 60]
    assert crop_place(frames, 20, 0, 1)[0, 0, 0, 0].item() == 30
    upright = frames.transpose(2, 3)
    assert crop_place(upright, 20, 2, 3)[0, 0, 0, 0].item() == 60
    assert crop_place(frames, 10, 1, 3).shape == (2, 3, 10, 10)


def test_probabilities_are_averaged_over_the_looks_that_could_be_decoded():
    objective = Recognition(LABELS, "plain")
    entries = [Entry(Path("v"), "A", (0,))] * 2 + [Entry(Path("w"), "A", (0,))] * 2
    entries += [Entry(Path("x"), "A", (0,))] * 2
    embeddings = torch.zeros(6, 1, 4)
    embeddings[0, 0] = torch.tensor([0.80, 0.60, 0.0, 0.0])  # sure of the first
    embeddings[1, 0] = torch.tensor([0.70, 0.71, 0.0, 0.0])  # in doubt, leans to the second
    embeddings[2, 0] = torch.tensor([0.0, 1.0, 0.0, 0.0])  # lost, and would be wrong
    embeddings[3, 0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    batch = Batch(
        frames=torch.zeros(6, 1, 3, 1, 1, dtype=torch.uint8),
        valid=torch.tensor([1, 1, 0, 1, 0, 0], dtype=torch.bool)[:, None],
        times=np.zeros((6, 1)),
        entries=entries,
        captions=[""] * 6,
        errors=["lost"] * 3,
    )
    features = FrameFeatures(patch_tokens=torch.zeros(0), frame_embeddings=embeddings)
    metric = objective.metric(views=2)
    metric.update(features, batch, Texts())
    assert len(torch.cat(metric.hits)) == 2  # the third video was lost as a whole
    assert metric.compute() == {"top1": 100.0, "top5": 100.0}
    single = objective.metric()
    single.update(features, batch, Texts())
    assert single.compute()["top1"] == pytest.approx(100 * 2 / 3)


def test_evaluation_sees_every_view_of_every_video(wide, tmp_path):
    missing = tmp_path / "missing.mkv"
    entries = [Entry(wide, "A", (2,)), Entry(missing, "A", (0,)), Entry(wide, "A", (1,))]
    data = VideoDataset(Annotations(entries, LABELS), ClipReader(32, "segments"), views=(2, 3))
    seen = []

    def encode(frames):  # one hot by which of the three squares is seen
        means = frames.float().mean((2, 3, 4))
        seen.extend(means[:, 0].tolist())
        embeddings = torch.eye(4)[torch.bucketize(means, torch.tensor([80.0, 180.0]))]
        return FrameFeatures(patch_tokens=torch.zeros(0), frame_embeddings=embeddings)

    objective = Recognition(LABELS, "plain")
    numbers = evaluate(encode, data, objective, Texts(), num_frames=4, batch_size=4)
    assert len(seen) == 3 * 6
    assert numbers["skipped"] == 1.0
    assert numbers["top5"] == 100.0
    again = evaluate(encode, data, objective, Texts(), num_frames=4, batch_size=100)
    assert again == numbers
    with pytest.raises(TypeError, match="views"):
        evaluate(encode, data, Grounding(), Texts(), num_frames=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": (4, 0)}, r"views=\(4, 0\) must be two numbers from 1 on"),
        ({"views": (4,)}, "must be two numbers"),
        ({"objective": "retrieval"}, "averages are for recognition, not retrieval"),
        ({"sampling": "spread"}, "'spread' has no test views; use one of 'segments', 'blocks'"),
    ],
)
def test_views_that_make_no_sense_are_refused(changes, message):
    task = {"objective": "recognition", "reader": "kinetics", "train": {}, "views": (4, 3)}
    assert TaskConfig(**task | {"views": [4, 3]}).views == (4, 3)
    with pytest.raises(ValueError, match=message):
        TaskConfig(**task | changes)
