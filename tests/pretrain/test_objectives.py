"""Objectives: which features, texts and targets they build, and what their metrics count."""

from pathlib import Path

import numpy as np
import pytest
import torch

from backbone import FrameFeatures
from pretrain.alignment import alignment_loss
from pretrain.datasets import Batch, Entry, Segment
from pretrain.objectives import Localization, Recognition, Retrieval
from pretrain.objectives.localization import average_precision

SETS = {"A": ("walk", "run"), "B": ("swim", "run", "jump")}


class Texts:
    """A tower whose embeddings are told: a unit vector of its own for every text."""

    device = torch.device("cpu")

    def __init__(self, *texts):
        self.texts = list(texts)

    def embed(self, texts):
        return torch.eye(16)[[self.texts.index(text) for text in texts]]

    def embed_labels(self, labels, templates, renormalize):
        return torch.eye(16)[: len(labels)] * (1.0 if renormalize else 0.5)


def make_batch(entries, steps=4, valid=None, captions=None):
    lengths = valid or [steps] * len(entries)
    return Batch(
        frames=torch.zeros(len(entries), steps, 3, 1, 1, dtype=torch.uint8),
        valid=torch.arange(steps) < torch.tensor(lengths)[:, None],
        times=np.tile(np.arange(steps) / 2, (len(entries), 1)),
        entries=entries,
        captions=captions or [""] * len(entries),
        errors=[],
    )


def features_of(embeddings):
    return FrameFeatures(patch_tokens=torch.zeros(0), frame_embeddings=embeddings)


def entry(label_set="", labels=(), segments=(), video="v"):
    return Entry(Path(video), label_set, labels, tuple(Segment(*s) for s in segments))


def test_recognition_scores_a_clip_against_its_own_labels_after_its_last_real_frame():
    objective = Recognition(SETS, "plain")
    batch = make_batch([entry("A", (1,)), entry("B", (0, 2)), entry("B", (1,))], valid=[4, 2, 0])
    embeddings = torch.randn(3, 4, 16)
    aligned = objective(features_of(embeddings), batch, Texts())
    assert torch.equal(aligned.features[:2], embeddings[[0, 1], [3, 1]])
    assert (aligned.targets > 0).int().tolist() == [
        [0, 1, 0, 0, 0], [0, 0, 1, 0, 1], [0, 0, 0, 1, 0]]  # fmt: skip
    assert aligned.mask.int().tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0] * 5]
    assert aligned.normalize_text


def test_released_label_embeddings_keep_their_length_in_the_loss():
    objective = Recognition(SETS, "plain", renormalize=False)
    batch = make_batch([entry("A", (1,))])
    aligned = objective(features_of(torch.randn(1, 4, 16)), batch, Texts())
    assert not aligned.normalize_text
    assert aligned.text.norm(dim=-1).tolist() == [0.5] * 5


def test_recognition_accuracy_ranks_within_the_label_set():
    metric = Recognition(SETS, "plain").metric()
    batch = make_batch([entry("A", (1,)), entry("B", (1,)), entry("B", (0,))], valid=[4, 4, 0])
    embeddings = torch.zeros(3, 4, 16)
    embeddings[0, :, [4, 1]] = torch.tensor([1.0, 0.5])  # nearest text belongs to the other set
    embeddings[1, :, [4, 3]] = torch.tensor([1.0, 0.5])
    metric.update(features_of(embeddings), batch, Texts())
    assert metric.compute() == {"top1": 50.0, "top5": 100.0}


def test_localization_gives_frames_several_labels_and_masks_padding():
    objective = Localization(SETS, "plain")
    batch = make_batch(
        [entry("B", segments=[(0, 0.5, 1.0), (2, 1.0, 9.0)]), entry("A")], valid=[4, 2]
    )
    aligned = objective(features_of(torch.randn(2, 4, 16)), batch, Texts())
    positive = aligned.targets > 0
    assert positive[0].int().tolist() == [
        [0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 0, 1], [0, 0, 0, 0, 1]]  # fmt: skip
    assert not positive[1].any()
    assert aligned.mask.shape == (2, 4, 5)
    assert aligned.mask[1].int().tolist() == [[1, 1, 0, 0, 0]] * 2 + [[0] * 5] * 2
    losses = alignment_loss(
        aligned.features, aligned.text, aligned.targets, 10.0, -1.0, aligned.mask, "none"
    )
    assert losses.shape == (2, 4)
    assert (losses[1, 2:] == 0).all()


def test_frame_map_is_that_of_a_perfect_and_of_a_blind_model():
    objective = Localization({"A": ("walk", "run")}, "plain")
    batch = make_batch([entry("A", segments=[(1, 0.5, 1.0)])])
    perfect, blind = objective.metric(), objective.metric()
    embeddings = torch.zeros(1, 4, 16)
    embeddings[0, 1:3, 1] = 1.0
    embeddings[..., 5] = 0.1
    perfect.update(features_of(embeddings), batch, Texts())
    assert perfect.compute() == {"mAP": 100.0, "prior": 50.0}
    blind.update(features_of(torch.ones(1, 4, 16)), batch, Texts())
    assert blind.compute() == {"mAP": 50.0, "prior": 50.0}
    with pytest.raises(ValueError, match="no frame of the validation data carries a label"):
        objective.metric().compute()


def test_average_precision_equals_its_definition():
    rng = np.random.default_rng(0)
    for _ in range(20):
        right = rng.random(50) < 0.3
        right[0] = True
        scores = rng.integers(0, 12, 50).astype(float)  # with ties
        area, recall = 0.0, 0.0
        for threshold in sorted(set(scores), reverse=True):
            found = scores >= threshold
            now = right[found].sum() / right.sum()
            area += (now - recall) * right[found].mean()
            recall = now
        assert average_precision(scores, right) == pytest.approx(area)


def test_retrieval_masks_equal_captions_and_videos_unless_released():
    entries = [entry(video=name) for name in ("x", "y", "y", "z")]
    batch = make_batch(entries, valid=[4, 4, 4, 0], captions=["one", "two", "three", "one"])
    tower = Texts("one", "two", "three")
    aligned = Retrieval()(features_of(torch.randn(4, 4, 16)), batch, tower)
    assert (aligned.targets == torch.eye(4) * 2 - 1).all()
    assert aligned.mask.int().tolist() == [
        [1, 1, 1, 0], [1, 1, 0, 1], [1, 0, 1, 1], [0, 0, 0, 0]]  # fmt: skip
    released = Retrieval(mask_duplicates=False)(features_of(torch.randn(4, 4, 16)), batch, tower)
    assert released.mask.int().tolist() == [[1] * 4] * 3 + [[0] * 4]


def test_recall_counts_the_same_words_as_right():
    captions = ["one", "two", "one", "three"]
    batch = make_batch([entry(video=str(i)) for i in range(4)], captions=captions)
    embeddings = torch.eye(16)[[0, 2, 0, 1]][:, None].repeat(1, 4, 1)  # "two", "three" swapped
    metric = Retrieval().metric()
    metric.update(features_of(embeddings), batch, Texts("one", "two", "three"))
    numbers = metric.compute()
    assert numbers["video_to_text_R@1"] == 50.0
    assert numbers["text_to_video_R@1"] == pytest.approx(100 / 3)
    assert numbers["video_to_text_R@5"] == 100.0


def test_objectives_on_labels_need_label_sets():
    with pytest.raises(ValueError, match="needs label sets"):
        Recognition({}, "plain")
