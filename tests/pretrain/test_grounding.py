"""Grounding: parity with the released head, what counts, and what its metric makes of answers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from backbone import FrameFeatures
from pretrain import PretrainConfig
from pretrain.alignment import alignment_loss
from pretrain.build import build_dataset, build_objective
from pretrain.config import TaskConfig
from pretrain.datasets import Batch, Entry, Segment
from pretrain.evaluation import evaluate
from pretrain.objectives import Grounding
from pretrain.objectives.grounding import best_run, frame_edges, overlap
from pretrain.text import load_siglip_text


class Told:
    """A tower that embeds texts as it was told to."""

    device = torch.device("cpu")

    def __init__(self, texts, embeddings):
        self.rows = dict(zip(texts, embeddings, strict=True))

    def embed(self, texts):
        return torch.stack([self.rows[text] for text in texts])


def features_of(embeddings):
    return FrameFeatures(patch_tokens=torch.zeros(0), frame_embeddings=embeddings)


def batch_of(segments, times, captions, valid=None):
    times = np.asarray(times, float)
    valid = torch.ones(times.shape, dtype=torch.bool) if valid is None else valid
    return Batch(
        frames=torch.zeros(*times.shape, 3, 1, 1, dtype=torch.uint8),
        valid=valid,
        times=times,
        entries=[
            Entry(Path("v"), segments=tuple(Segment(0, *pair) for pair in pairs))
            for pairs in segments
        ],
        captions=captions,
        errors=[],
    )


@pytest.mark.golden
def test_it_equals_the_released_head(golden):
    tensors = load_file(golden / "pretraining/temporal_grounding.safetensors")
    index = json.loads((golden / "pretraining/index.json").read_text())
    captions = index["cases"]["temporal_grounding"]["captions"]
    pooled = tensors["pooler_output"].requires_grad_()
    scale = torch.tensor(index["logit_scale"], requires_grad=True)
    bias = torch.tensor(index["logit_bias"], requires_grad=True)
    rows = tensors["label"].int().tolist()
    # A stretch of its own around every positive frame, one frame being a second.
    segments = [[(t - 0.1, t + 0.1) for t, holds in enumerate(row) if holds] for row in rows]
    batch = batch_of(segments, [np.arange(len(row)) for row in rows], captions)
    objective = Grounding(reduction="sample_sum")
    aligned = objective(features_of(pooled), batch, Told(captions, tensors["text_embeds"]))
    assert ((aligned.targets[..., 0] > 0) == (tensors["label"] > 0)).all()
    loss = aligned.loss(scale.exp(), bias)
    torch.testing.assert_close(loss, tensors["loss"], rtol=1e-5, atol=0)
    loss.backward()
    for name, value in (("pooler_output", pooled), ("logit_scale", scale), ("logit_bias", bias)):
        torch.testing.assert_close(value.grad, tensors[f"grad.{name}"], rtol=0, atol=1e-5)
    per_frame = Grounding()(features_of(pooled), batch, Told(captions, tensors["text_embeds"]))
    mean = per_frame.loss(scale.exp(), bias)
    torch.testing.assert_close(mean, loss / pooled.shape[1])


def test_frames_are_right_within_any_stretch_and_padding_counts_nowhere():
    valid = torch.tensor([[True] * 5, [True, True, False, False, False]])
    batch = batch_of(
        [[(0.5, 1.0), (2.0, 9.0)], [(0.0, 3.0)]], [[0, 0.5, 1, 1.5, 2]] * 2, ["a", "b"], valid
    )
    aligned = Grounding()(features_of(torch.randn(2, 5, 4)), batch, Told("ab", torch.eye(4)[:2]))
    assert (aligned.targets[..., 0] > 0).int().tolist() == [[0, 1, 1, 0, 1], [1, 1, 1, 1, 1]]
    assert aligned.text.shape == (2, 1, 4)
    losses = alignment_loss(
        aligned.features, aligned.text, aligned.targets, 10.0, -1.0, aligned.mask, "none"
    )
    assert (losses[1, 2:] == 0).all()
    assert (losses[1, :2] > 0).all()


@pytest.mark.parametrize(
    ("scores", "run"),
    [
        ([0.0, 0.1, 0.9, 0.8, 0.0], (2, 4)),
        ([0.9, 0.1, 0.0, 0.8, 0.8], (3, 5)),
        ([0.9, 0.8, 0.4, 0.9, 0.0], (0, 4)),  # a dip does not split what stands out
        ([0.0, 0.0, 0.0], (0, 3)),  # nothing stands out: the whole clip
        ([0.5], (0, 1)),
    ],
)
def test_the_answer_is_the_run_of_frames_that_stands_out(scores, run):
    assert best_run(np.array(scores, np.float32)) == run


def test_every_run_is_weighed():
    rng = np.random.default_rng(0)
    for _ in range(30):
        scores = rng.random(int(rng.integers(1, 9)))
        excess = scores - (scores.min() + scores.max()) / 2
        runs = [(i, j) for i in range(len(scores)) for j in range(i + 1, len(scores) + 1)]
        best = max(excess[i:j].sum() for i, j in runs)
        first, last = best_run(scores)
        assert excess[first:last].sum() == pytest.approx(best)


def test_frames_share_time_among_them():
    assert frame_edges(np.array([1.0, 2.0, 4.0])).tolist() == [0.5, 1.5, 3.0, 5.0]
    assert frame_edges(np.array([0.0, 2.0])).tolist() == [0.0, 1.0, 3.0]
    assert frame_edges(np.array([3.0])).tolist() == [3.0, 3.0]


def test_overlap_is_intersection_over_union():
    assert overlap(0, 4, 2, 6) == pytest.approx(2 / 6)
    assert overlap(0, 4, 1, 3) == pytest.approx(0.5)
    assert overlap(0, 1, 2, 3) == overlap(1, 1, 1, 1) == 0


def test_recall_of_perfect_partial_and_wrong_answers():
    times = [np.arange(10) + 0.5] * 4  # a frame stands for each of ten seconds
    truths = [[(2, 6)], [(2, 6)], [(0, 1), (5, 9)], [(2, 6)]]
    answers = [(2, 6), (4, 10), (5, 9), (0, 2)]  # overlaps 1, 0.25, 1 (of the better one), 0
    embeddings = torch.zeros(4, 10, 4)
    embeddings[..., 3] = 0.5
    for i, (first, last) in enumerate(answers):
        embeddings[i, first:last, 0] = 1.0
    valid = torch.ones(4, 10, dtype=torch.bool)
    batch = batch_of(truths, times, ["q"] * 4, valid)
    metric, tower = Grounding().metric(), Told("q", torch.eye(4)[:1])
    metric.update(features_of(embeddings), batch, tower)
    numbers = metric.compute()
    assert [numbers[f"R1@{m}"] for m in (0.3, 0.5, 0.7)] == [50.0] * 3
    assert numbers["mIoU"] == pytest.approx(100 * (1 + 0.25 + 1 + 0) / 4)
    assert numbers["prior"] == pytest.approx(40.0)
    valid[:, :] = False
    lost = Grounding().metric()
    lost.update(features_of(embeddings), batch, tower)
    with pytest.raises(ValueError, match="no sentence of the validation data has a clip"):
        lost.compute()


def test_padding_is_no_part_of_an_answer():
    valid = torch.arange(10)[None] < 4
    batch = batch_of([[(0, 2)]], [np.arange(10) + 0.5], ["q"], valid)
    embeddings = torch.zeros(1, 10, 4)
    embeddings[..., 3] = 0.5
    embeddings[0, [0, 1, 4, 5, 6, 7, 8, 9], 0] = 1.0
    metric = Grounding().metric()
    metric.update(features_of(embeddings), batch, Told("q", torch.eye(4)[:1]))
    assert metric.compute()["mIoU"] == pytest.approx(100.0)


def test_it_is_built_from_a_config_and_measured_on_videos(world, siglip, tmp_path):
    (tmp_path / "sta.txt").write_text("clip_00 0.5 1.25##it moves\nclip_01 0 2##it stays\n")
    arguments = {"annotations": str(tmp_path / "sta.txt"), "root": str(world / "videos")}
    task = TaskConfig(
        objective="grounding", reader="charades_sta", train=arguments, sampling="fixfps",
        reduction="sample_sum",
    )  # fmt: skip
    dataset = build_dataset(task, arguments, name="moments", image_size=32)
    objective = build_objective(task, dataset)
    assert isinstance(objective, Grounding)
    assert objective.reduction == "sample_sum"
    tower = load_siglip_text(siglip)[0]

    def encode(frames):  # brightness alone
        means = frames.float().mean((2, 3, 4))[..., None]
        return features_of(torch.cat([means, torch.ones(*means.shape[:2], 31)], -1))

    numbers = evaluate(encode, dataset, objective, tower, num_frames=8)
    assert set(numbers) == {"R1@0.3", "R1@0.5", "R1@0.7", "mIoU", "prior"}
    assert numbers["prior"] == pytest.approx(100 * (0.75 / 2.5 + 2 / 2.5) / 2, abs=8)
    assert json.loads(json.dumps(numbers)) == numbers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reduction": "sum"}, "reduction='sum' is unknown; use one of 'mean', 'sample_sum'"),
        ({"objective": "retrieval", "reduction": "sample_sum"}, "is for grounding alone, not ret"),
    ],
)
def test_reductions_that_make_no_sense_are_refused(changes, message):
    task = {"objective": "grounding", "reader": "grounding", "train": {}} | changes
    with pytest.raises(ValueError, match=message):
        PretrainConfig.from_dict(
            {"output": "x", "tasks": {"moments": task}, "model": {"siglip": "x"},
             "optim": {"updates": 1}}
        )  # fmt: skip
    with pytest.raises(ValueError, match="reduction='sum' is unknown; use 'mean' or 'sample_sum'"):
        Grounding("sum")
