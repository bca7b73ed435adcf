"""Spatial objectives: parity with the released heads, targets on patches, what metrics count."""

import json
import math
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import SiglipVisionConfig, SiglipVisionModel

from backbone import (
    FrameFeatures,
    SiglipEncoder,
    StreamformerConfig,
    StreamformerEncoder,
    StreamformerModel,
    project_patches,
)
from backbone.modeling import PoolingHead
from pretrain.alignment import alignment_loss, softmax_loss
from pretrain.config import TaskConfig
from pretrain.datasets import Batch, Entry
from pretrain.datasets.masks import BACKGROUND, IGNORE
from pretrain.model import MultitaskModel
from pretrain.objectives import InstanceSegmentation, ReferringSegmentation
from pretrain.objectives.dense import columns_of, patch_targets
from pretrain.objectives.referring_segmentation import (
    THRESHOLDS,
    borders,
    contour_accuracy,
    region_similarity,
)

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
SHAPE |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 8, "hidden_act": "gelu"}


class Texts:
    """A tower whose embeddings are told, row by row."""

    device = torch.device("cpu")

    def __init__(self, table):
        self.table = table  # text -> (D,)

    def embed(self, texts):
        return torch.stack([self.table[text] for text in texts])

    def embed_labels(self, labels, templates, renormalize):
        return self.embed(labels)


class Plain(torch.nn.Module):
    """A pooling head whose dense projection changes nothing."""

    def __init__(self, width):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(width, 1, batch_first=True)
        with torch.no_grad():
            self.attention.in_proj_weight.copy_(torch.eye(width).repeat(3, 1))
            self.attention.out_proj.weight.copy_(torch.eye(width))
        self.layernorm = torch.nn.Identity()
        self.mlp = torch.zeros_like


def features_of(patches, head=None):
    return FrameFeatures(patches, patches.mean(2), head=head or Plain(patches.shape[-1]))


def make_batch(masks, entries=None, captions=None, valid=None, seeds=None):
    rows, steps, high, wide = masks.shape
    lengths = torch.tensor(valid or [steps] * rows)
    return Batch(
        frames=torch.zeros(rows, steps, 3, high, wide, dtype=torch.uint8),
        valid=torch.arange(steps) < lengths[:, None],
        times=np.zeros((rows, steps)),
        entries=entries or [Entry(Path(f"v{i}"), "A") for i in range(rows)],
        captions=captions or [f"caption {i}" for i in range(rows)],
        errors=[],
        masks=masks.int(),
        seeds=seeds or [],
    )


# -- the dense projection -------------------------------------------------------------------------


@pytest.fixture
def spatial(golden):
    """A golden case: its tensors, the pooling head, and the scalars ready for gradients."""

    def load(name):
        tensors = load_file(golden / "pretraining" / f"{name}.safetensors")
        index = json.loads((golden / "pretraining/index.json").read_text())
        head = PoolingHead(StreamformerConfig(**SHAPE))
        source = tensors
        if not any(key.startswith("pool_head.") for key in tensors):  # the second rank's file
            source = load_file(golden / "pretraining/spatial_refervos.safetensors")
        head.load_state_dict({
            key.removeprefix("pool_head."): value
            for key, value in source.items() if key.startswith("pool_head.")
        })  # fmt: skip
        scale = torch.tensor(index["logit_scale"], requires_grad=True)
        bias = torch.tensor(index["logit_bias"], requires_grad=True)
        return tensors, head, scale, bias, index["cases"][name]

    return load


@pytest.mark.golden
def test_the_dense_projection_equals_the_released_one(spatial):
    tensors, head, *_ = spatial("spatial_vis")
    projected = project_patches(head, tensors["last_hidden_state"])
    torch.testing.assert_close(projected, tensors["projected"], rtol=1e-5, atol=1e-5)


def test_a_patch_is_projected_as_a_frame_that_is_all_of_it():
    torch.manual_seed(0)
    ours = StreamformerModel(StreamformerConfig(**SHAPE)).head
    theirs = SiglipVisionModel(SiglipVisionConfig(**SHAPE)).head
    tokens = torch.randn(2, 3, 1, 32)
    with torch.no_grad():
        for head in (ours, theirs):
            for weight in head.parameters():
                weight.normal_(std=0.3)
        torch.testing.assert_close(
            project_patches(ours, tokens), ours(tokens)[:, :, None], rtol=1e-5, atol=1e-5
        )
        alone = theirs(tokens.flatten(0, 1)).view(2, 3, 1, 32)
        torch.testing.assert_close(project_patches(theirs, tokens), alone, rtol=1e-5, atol=1e-5)


def test_every_encoder_gives_patch_embeddings():
    clip = torch.rand(1, 2, 3, 32, 32) * 2 - 1
    image = SiglipEncoder(SiglipVisionModel(SiglipVisionConfig(**SHAPE)))
    video = StreamformerEncoder(StreamformerModel(StreamformerConfig(**SHAPE)))
    for encoder in (image, video):
        features = encoder.encode(clip)
        assert features.patch_embeddings().shape == (1, 2, 16, 32)
    with pytest.raises(ValueError, match="without a pooling head"):
        FrameFeatures(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 8)).patch_embeddings()


# -- the released losses --------------------------------------------------------------------------


@pytest.mark.golden
def test_instance_softmax_equals_the_released_head(spatial):
    """Losses of all samples and all gradients, the released code's slip with class 0 included."""
    tensors, head, scale, _, case = spatial("spatial_vis")
    tokens = tensors["last_hidden_state"].requires_grad_()
    patches = project_patches(head, tokens).unflatten(2, (4, 4))
    losses = []
    for i, name in enumerate(case["datasets"]):
        bank, masks = tensors[f"label_embeddings.{name}"], tensors[f"mask_target.{i}"].int()[None]
        labels = torch.arange(len(bank))
        if len(bank) > case["num_max_classes"]:
            shown = masks.unique()
            labels = torch.cat([shown[shown > 0], tensors[f"negatives.{i}"]])
        answers = masks.long()
        if 0 not in labels or len(bank) <= case["num_max_classes"]:
            answers = answers.masked_fill(answers == 0, BACKGROUND)
        pixels = columns_of(answers, labels[None], len(bank))
        losses += softmax_loss(
            patches[i : i + 1], bank[labels], pixels, scale.exp(),
            normalize_text=len(bank) > case["num_max_classes"],
        )  # fmt: skip
    losses = torch.stack(losses)
    torch.testing.assert_close(losses, tensors["loss_per_sample"], rtol=1e-5, atol=1e-7)
    loss = losses.mean()
    torch.testing.assert_close(loss, tensors["loss"], rtol=1e-5, atol=0)
    loss.backward()
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(tokens.grad, tensors["grad.last_hidden_state"], **close)
    torch.testing.assert_close(scale.grad, tensors["grad.logit_scale"], **close)
    value = head.attention.in_proj_weight.grad[64:]
    torch.testing.assert_close(value, tensors["grad.w_v.weight"], **close)
    assert not head.attention.in_proj_weight.grad[:64].any()


@pytest.mark.golden
def test_the_objective_builds_the_released_instance_loss_from_masks(spatial):
    """Samples of the small set, and one of the large set once its sample of classes is given."""
    tensors, head, scale, bias, case = spatial("spatial_vis")
    small = [f"s{i}" for i in range(9)]
    big = [f"b{i}" for i in range(130)]
    table = dict(zip(small, tensors["label_embeddings.small"], strict=True))
    table |= dict(zip(big, tensors["label_embeddings.big"], strict=True))

    class Given(InstanceSegmentation):
        """Takes the classes that the reference drew."""

        def labels(self, batch):
            rows = super().labels(batch)
            for i, entry in enumerate(batch.entries):
                if entry.label_set == "big":
                    rows[i, 2:] = tensors["negatives.4"]
            return rows

    objective = Given({"small": small, "big": big}, loss="softmax", renormalize=False)
    chosen = [0, 2, 4]
    masks = torch.stack([tensors[f"mask_target.{i}"] for i in chosen]).int()
    masks = torch.where(masks == 0, BACKGROUND, masks)
    batch = make_batch(masks, [Entry(Path("v"), case["datasets"][i]) for i in chosen])
    tokens = tensors["last_hidden_state"][chosen].requires_grad_()
    features = features_of(tokens, head)
    loss = objective(features, batch, Texts(table)).loss(scale.exp(), bias)
    expected = tensors["loss_per_sample"][chosen].mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    assert bias.grad == 0  # takes part, so that distributed training finds it
    expected = tensors["grad.last_hidden_state"][chosen] * 5 / 3  # a mean over three, not five
    torch.testing.assert_close(tokens.grad, expected, rtol=0, atol=1e-5)


def rectangles(rects):
    """Masks of the golden rectangles: 0 inside, BACKGROUND around, (B, T, 224, 224)."""
    masks = torch.full((*rects.shape[:2], 224, 224), BACKGROUND)
    for i, clip in enumerate(rects.tolist()):
        for t, (top, left, bottom, right) in enumerate(clip):
            masks[i, t, top:bottom, left:right] = 0
    return masks


def released_referring(tensors, head, prefix=""):
    masks = rectangles(tensors[f"{prefix}rects"])
    tokens = tensors[f"{prefix}last_hidden_state"].requires_grad_()
    captions = [f"{prefix}{i}" for i in range(len(masks))]
    texts = Texts(dict(zip(captions, tensors[f"{prefix}text_embeds"], strict=True)))
    batch = make_batch(masks, captions=captions)
    objective = ReferringSegmentation(mask_duplicates=False, loss="softmax")
    return objective(features_of(tokens, head), batch, texts), tokens


@pytest.mark.golden
def test_referring_softmax_equals_the_released_head(spatial):
    tensors, head, scale, bias, _ = spatial("spatial_refervos")
    aligned, tokens = released_referring(tensors, head)
    loss = aligned.loss(scale.exp(), bias)
    torch.testing.assert_close(loss, tensors["loss"], rtol=1e-5, atol=0)
    loss.backward()
    torch.testing.assert_close(
        tokens.grad, tensors["grad.last_hidden_state"], rtol=0, atol=1e-5
    )
    alone = {key: value.detach()[:1] if value.ndim > 1 else value
             for key, value in tensors.items() if not key.startswith("pool_head")}  # fmt: skip
    aligned, _ = released_referring(alone, head)
    assert aligned.loss(scale.exp(), bias) == tensors["loss_batch_of_one"] == 0


def run_rank(rank, folder, golden):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (folder / "port").read_text()}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        tensors = load_file(golden / "pretraining/spatial_refervos_world2.safetensors")
        pool = load_file(golden / "pretraining/spatial_refervos.safetensors")
        head = PoolingHead(StreamformerConfig(**SHAPE))
        head.load_state_dict({k.removeprefix("pool_head."): v for k, v in pool.items()
                              if k.startswith("pool_head.")})  # fmt: skip
        prefix = f"rank{rank}."
        aligned, tokens = released_referring(tensors, head, prefix)
        loss = aligned.loss(math.exp(2.302585092994046), -2.0)
        torch.testing.assert_close(loss, tensors[f"{prefix}loss"], rtol=1e-5, atol=0)
        loss.backward()
        torch.testing.assert_close(
            tokens.grad, tensors[f"{prefix}grad.last_hidden_state"], rtol=0, atol=1e-5
        )
        # The sigmoid loss too sees all captions, and each clip its own.
        batch = make_batch(torch.zeros(2, 1, 224, 224), captions=[f"{prefix}{i}" for i in (0, 1)],
                           entries=[Entry(Path(f"{prefix}{i}")) for i in (0, 1)])  # fmt: skip
        texts = Texts({f"{prefix}{i}": tensors[f"{prefix}text_embeds"][i] for i in (0, 1)})
        ours = ReferringSegmentation()(features_of(tokens.detach(), head), batch, texts)
        assert ours.text.shape == (4, 32)
        first = ours.targets[:, 0, 0, 0] > 0
        assert first.nonzero()[:, 1].tolist() == [2 * rank, 2 * rank + 1]
        (folder / f"passed{rank}").touch()
    finally:
        dist.destroy_process_group()


@pytest.mark.golden
def test_referring_softmax_equals_the_released_head_on_two_ranks(golden, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(probe.getsockname()[1]))
    torch.multiprocessing.start_processes(
        run_rank, (tmp_path, golden), nprocs=2, start_method="fork"
    )
    assert {path.name for path in tmp_path.glob("passed*")} == {"passed0", "passed1"}


# -- targets on patches ---------------------------------------------------------------------------


def test_a_patch_belongs_to_what_covers_half_of_the_best_patch():
    masks = torch.full((1, 3, 16, 16), BACKGROUND)
    masks[0, 0, :8, :12] = 0  # patches of 8 pixels: all of one, half of its neighbour
    masks[0, 0, 8:, :3] = 0  # and three eighths of another
    masks[0, 1, 6:10, 6:10] = 1  # a small thing in the middle: a sixteenth of every patch
    masks[0, 2, 0, 0] = 1  # a speck
    targets, counted = patch_targets(masks, torch.tensor([[0, 1, -1]]), 2, (2, 2))
    assert targets.shape == counted.shape == (1, 3, 2, 2, 3)
    assert (targets[0, 0, ..., 0] > 0).tolist() == [[True, True], [False, False]]
    assert counted[0, 0, ..., 0].tolist() == [[True, True], [False, True]]
    assert (targets[0, 1, ..., 1] > 0).all()
    assert (targets[0, 2, ..., 1] < 0).all()
    assert counted[0, 2, ..., 1].tolist() == [[False, True], [True, True]]
    assert (targets[..., 2] < 0).all()


def test_patches_of_which_little_is_known_do_not_count():
    masks = torch.full((1, 1, 16, 16), IGNORE)
    masks[0, 0, :8, :4] = 0  # half of the patch is known, and all of that is the thing
    masks[0, 0, 8:, :3] = BACKGROUND
    targets, counted = patch_targets(masks, torch.tensor([[0]]), 1, (2, 2))
    assert (targets[0, 0, ..., 0] > 0).tolist() == [[True, False], [False, False]]
    assert counted[0, 0, ..., 0].tolist() == [[True, False], [False, False]]


def test_masks_must_divide_into_patches():
    with pytest.raises(ValueError, match="masks of 16 x 15 pixels do not divide into 2 x 2"):
        patch_targets(torch.zeros(1, 1, 16, 15), torch.tensor([[0]]), 1, (2, 2))


def test_instance_targets_are_those_of_the_patches_and_of_the_clips_own_labels():
    objective = InstanceSegmentation({"A": ("cat", "dog"), "B": ("car", "cup", "cat")})
    masks = torch.full((3, 2, 16, 16), BACKGROUND)
    masks[0, 0, :8, :8] = 1
    masks[1, :, 8:] = 2
    batch = make_batch(masks, [Entry(Path("v"), name) for name in "ABB"], valid=[1, 2, 0])
    table = {name: torch.randn(8) for name in ("cat", "dog", "car", "cup")}
    aligned = objective(features_of(torch.randn(3, 2, 4, 8)), batch, Texts(table))
    assert aligned.features.shape == (3, 2, 2, 2, 8)
    assert aligned.text.shape == (3, 3, 8)
    assert torch.equal(aligned.text[0, 1], table["dog"])
    assert torch.equal(aligned.text[1, 2], table["cat"])
    positive = (aligned.targets > 0).nonzero().tolist()
    assert positive[0] == [0, 0, 0, 0, 1]
    assert [row[3:] for row in positive if row[:3] == [1, 1, 1]] == [[0, 2], [1, 2]]
    assert len(positive) == 5
    mask = aligned.mask.flatten(2, 3).all(2)
    assert mask.tolist() == [
        [[True, True, False], [False] * 3], [[True] * 3] * 2, [[False] * 3] * 2]  # fmt: skip
    loss = aligned.loss(10.0, -1.0)
    by_hand = alignment_loss(aligned.features[1], table["cat"][None], aligned.targets[1, ..., 2:],
                             10.0, -1.0, reduction="none")  # fmt: skip
    assert by_hand.shape == (2, 2, 2)
    assert torch.isfinite(loss)


def test_background_patches_push_all_labels_away():
    objective = InstanceSegmentation({"A": ("cat", "dog")})
    table = {"cat": torch.eye(4)[0], "dog": torch.eye(4)[1]}
    batch = make_batch(torch.full((1, 1, 16, 16), BACKGROUND))
    near = features_of(torch.eye(4)[0].expand(1, 1, 4, 4))
    far = features_of(-torch.eye(4)[:2].sum(0).expand(1, 1, 4, 4))
    losses = [objective(f, batch, Texts(table)).loss(10.0, 0.0) for f in (near, far)]
    assert losses[0] > 10 > 1 > losses[1]
    released = InstanceSegmentation({"A": ("cat", "dog")}, loss="softmax")
    assert released(near, batch, Texts(table)).loss(10.0, 0.0) == 0


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_large_label_sets_are_sampled_with_what_is_shown(loss):
    names = tuple(f"thing {i}" for i in range(30))
    objective = InstanceSegmentation({"A": names}, loss=loss, max_classes=8)
    masks = torch.full((2, 1, 16, 16), BACKGROUND)
    masks[:, 0, :8, :8], masks[:, 0, 8:] = 29, 17
    table = {name: torch.randn(32) for name in names}
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    batch = make_batch(masks, seeds=[1, 2])
    labels = objective.labels(batch)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert labels.shape == (2, 8)
    assert labels[:, :2].tolist() == [[17, 29]] * 2
    assert all(len(set(row)) == 8 for row in labels.tolist())
    assert labels[0].tolist() != labels[1].tolist()
    assert torch.equal(labels, objective.labels(batch))
    aligned = objective(features_of(torch.randn(2, 1, 4, 32)), batch, Texts(table))
    assert torch.equal(aligned.text[0], torch.stack([table[names[k]] for k in labels[0].tolist()]))
    if loss == "softmax":
        assert aligned.pixels.unique().tolist() == [-1, 0, 1]
    else:
        assert (aligned.targets > 0).flatten(0, 3).sum(0).tolist() == [4, 2] + [0] * 6


def test_clips_that_show_more_than_the_sample_keep_all_they_show():
    objective = InstanceSegmentation({"A": tuple("abcdef")}, max_classes=2)
    masks = torch.arange(4).repeat_interleave(64).view(1, 1, 16, 16)
    assert objective.labels(make_batch(masks)).tolist() == [[0, 1, 2, 3]]


def test_referring_counts_beside_the_thing_and_other_words_on_it():
    masks = torch.full((4, 1, 16, 16), BACKGROUND)
    masks[:3, 0, :8, :8] = 0
    entries = [Entry(Path(name)) for name in ("x", "y", "y", "z")]
    captions = ["one", "two", "three", "one"]
    batch = make_batch(masks, entries, captions, valid=[1, 1, 1, 0])
    texts = Texts({name: torch.eye(8)[i] for i, name in enumerate(("one", "two", "three"))})
    features = features_of(torch.randn(4, 1, 4, 8))
    aligned = ReferringSegmentation()(features, batch, texts)
    inside, outside = aligned.mask[:, 0, 0, 0].int(), aligned.mask[:, 0, 1, 1].int()
    assert inside.tolist() == [[1, 1, 1, 0], [1, 1, 0, 1], [1, 0, 1, 1], [0] * 4]
    assert outside.tolist() == torch.diag(torch.tensor([1, 1, 1, 0])).tolist()
    assert (aligned.targets > 0).nonzero().tolist() == [[i, 0, 0, 0, i] for i in range(3)]
    released = ReferringSegmentation(mask_duplicates=False)(features, batch, texts)
    assert released.mask[:, 0, 0, 0].int().tolist() == [[1] * 4] * 3 + [[0] * 4]
    softmax = ReferringSegmentation(loss="softmax")(features, batch, texts)
    assert softmax.decoded.tolist() == [True, True, True, False]
    assert softmax.mask.int().tolist()[0] == [1, 1, 1, 0]


# -- metrics --------------------------------------------------------------------------------------


def test_mean_iou_counts_pixels_of_things_over_the_data_set():
    objective = InstanceSegmentation({"A": ("cat", "dog", "cow"), "B": ("cat", "cup")})
    table = {name: torch.eye(8)[i] for i, name in enumerate(("cat", "dog", "cow", "cup"))}
    masks = torch.full((3, 1, 16, 16), BACKGROUND)
    masks[0, 0, :8], masks[0, 0, 8:, :8] = 0, 1  # cat, cat, dog, background
    masks[1, 0] = 1
    masks[2, 0] = 2
    patches = torch.zeros(3, 1, 4, 8)
    patches[0, 0, [0, 1, 2, 3], [0, 1, 1, 2]] = 1  # cat, dog, dog, cow
    patches[1, ..., 3] = 1  # cup, "cup" of set B
    batch = make_batch(masks, [Entry(Path("v"), name) for name in "ABA"], valid=[1, 1, 0])
    metric = objective.metric()
    metric.update(features_of(patches), batch, Texts(table))
    cat, dog = metric.confusion["A"].diagonal()[:2].tolist()
    counts = metric.confusion["A"]
    expected = [cat / 128, dog / (64 + counts[0, 1].item()), 1.0]
    assert metric.compute()["mIoU"] == pytest.approx(100 * np.mean(expected))
    assert 0.4 < expected[0] < 0.6
    assert 0.4 < expected[1] < 0.6
    with pytest.raises(ValueError, match="no pixel of the validation data"):
        objective.metric().compute()


def davis(found, right, tolerance=0.008):
    """J and F of one frame as DAVIS defines them, pixel by pixel."""
    height, width = right.shape
    either = (found | right).sum()
    region = (found & right).sum() / either if either else 1.0

    def border(mask):
        edge = np.zeros_like(mask)
        for y in range(height):
            for x in range(width):
                below, beside = min(y + 1, height - 1), min(x + 1, width - 1)
                near = mask[below, x], mask[y, beside], mask[below, beside]
                edge[y, x] = any(value != mask[y, x] for value in near)
        return np.argwhere(edge)

    def share(points, others):
        if not len(points):
            return 1.0
        if not len(others):
            return 0.0
        gaps = np.linalg.norm(points[:, None] - others[None], axis=-1).min(1)
        return (gaps <= math.ceil(tolerance * math.hypot(height, width))).mean()

    ours, theirs = border(found), border(right)
    precision, recall = share(ours, theirs), share(theirs, ours)
    total = precision + recall
    return region, 2 * precision * recall / total if total else 0.0


@pytest.mark.parametrize("tolerance", [0.008, 0.1])
def test_j_and_f_equal_their_definition(tolerance):
    rng = np.random.default_rng(0)
    found, right = np.zeros((2, 9, 20, 30), bool)
    for t in range(6):
        for masks in (found, right):
            y, x = rng.integers(0, 12, 2)
            masks[t, y : y + rng.integers(3, 12), x : x + rng.integers(3, 20)] = True
    right[6, 3:9, 3:9] = found[7, 3:9, 3:9] = True  # nothing found, nothing there; both empty
    expected = [davis(*pair, tolerance) for pair in zip(found, right, strict=True)]
    masks = torch.from_numpy(found), torch.from_numpy(right)
    np.testing.assert_allclose(region_similarity(*masks), [j for j, _ in expected], rtol=1e-6)
    np.testing.assert_allclose(
        contour_accuracy(*masks, tolerance), [f for _, f in expected], rtol=1e-6
    )
    assert not borders(torch.ones(1, 5, 5, dtype=torch.bool)).any()


def test_referring_metric_averages_frames_then_clips():
    masks = torch.full((3, 2, 16, 16), BACKGROUND)
    masks[:, :, :8, :8] = 0
    masks[1, 1] = 0  # everything
    patches = torch.zeros(3, 2, 4, 8)
    patches[..., 7] = 1
    patches[:, :, 0, 0] = 9  # the first patch is near the first text
    batch = make_batch(masks, captions=["one"] * 3, valid=[2, 2, 0])
    metric = ReferringSegmentation().metric()
    metric.update(features_of(patches), batch, Texts({"one": torch.eye(8)[0]}))
    numbers = metric.compute()
    score = F.interpolate(torch.tensor([[[[1.0, 0], [0, 0]]]]), (16, 16), mode="bilinear")[0, 0]
    means = [
        np.mean([davis(score.numpy() > threshold, masks[i, t].numpy() == 0)
                 for i, t in ((0, 0), (0, 1), (1, 0), (1, 1))], 0)
        for threshold in THRESHOLDS
    ]  # fmt: skip
    region, contour = 100 * max(means, key=np.mean)
    assert 10 < region < 90 and len({tuple(mean) for mean in means}) > 2
    assert numbers == pytest.approx(
        {"J": region, "F": contour, "J&F": (region + contour) / 2}, rel=1e-5
    )
    with pytest.raises(ValueError, match="no clip of the validation data has masks"):
        ReferringSegmentation().metric().compute()


# -- in the model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize("task", ["instances", "referring"])
@pytest.mark.parametrize("bf16", [False, True])
def test_every_parameter_takes_part_in_a_spatial_batch(task, loss, bf16):
    torch.manual_seed(0)
    objectives = {
        "instances": InstanceSegmentation({"A": ("cat", "dog")}, loss=loss),
        "referring": ReferringSegmentation(loss=loss),
    }
    table = {name: torch.randn(32) for name in ("cat", "dog", "caption 0", "caption 1")}
    model = MultitaskModel(
        StreamformerModel(StreamformerConfig(**SHAPE, num_frames=4)),
        objectives, Texts(table), bf16=bf16,
    )  # fmt: skip
    masks = torch.full((2, 3, 32, 32), BACKGROUND)
    masks[:, :, :16] = 0
    batch = make_batch(masks)
    batch.frames.random_(0, 255)
    (value,) = model([(task, batch)])
    assert value.dtype == torch.float32
    value.backward()
    assert all(weight.grad is not None for weight in model.parameters())
    assert model.backbone.head.attention.in_proj_weight.grad[64:].any()


def test_batches_encoded_together_give_the_gradients_of_each_alone():
    table = {name: torch.randn(32) for name in ("cat", "dog", "caption 0", "caption 1")}
    objectives = {
        "instances": InstanceSegmentation({"A": ("cat", "dog")}),
        "referring": ReferringSegmentation(),
    }
    backbone = StreamformerModel(StreamformerConfig(**SHAPE, num_frames=4))
    model = MultitaskModel(backbone, objectives, Texts(table))
    batches = []
    for task in objectives:
        masks = torch.full((2, 3, 32, 32), BACKGROUND)
        masks[:, :, :16] = 0
        batches.append((task, make_batch(masks)))
        batches[-1][1].frames.random_(0, 255)
    apart = torch.cat([model([batch]) for batch in batches])
    apart.sum().backward()
    wanted = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    together = model(batches)
    together.sum().backward()
    torch.testing.assert_close(together, apart)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


def test_what_makes_no_sense_is_named():
    with pytest.raises(ValueError, match="spatial_loss='hinge' is unknown; use 'sigmoid'"):
        ReferringSegmentation(loss="hinge")
    with pytest.raises(ValueError, match="max_classes=0 must be at least 1"):
        InstanceSegmentation({"A": ("cat",)}, max_classes=0)
    with pytest.raises(ValueError, match="spatial_loss='hinge' is unknown"):
        TaskConfig("recognition", "kinetics", {}, spatial_loss="hinge")
    batch = make_batch(torch.zeros(1, 1, 16, 16))
    batch.masks = None
    features = features_of(torch.randn(1, 1, 4, 8))
    with pytest.raises(ValueError, match="the batch has no masks"):
        ReferringSegmentation()(features, batch, Texts({"caption 0": torch.ones(8)}))
    with pytest.raises(ValueError, match="5 patches make no grid over frames of 16 x 16"):
        ReferringSegmentation().features(features_of(torch.randn(1, 1, 5, 8)), batch)
    with pytest.raises(ValueError, match=r"pixels have shape \(1, 2, 8, 8\)"):
        softmax_loss(torch.zeros(1, 1, 2, 2, 8), torch.ones(1, 8), torch.zeros(1, 2, 8, 8), 1.0)


def test_a_batch_without_a_single_clip_costs_nothing():
    batch = make_batch(torch.zeros(1, 1, 16, 16), valid=[0])
    batch.masks = None
    features = features_of(torch.randn(1, 1, 4, 8, requires_grad=True))
    for loss in ("sigmoid", "softmax"):
        objective = ReferringSegmentation(loss=loss)
        value = objective(features, batch, Texts({"caption 0": torch.ones(8)})).loss(10.0, 0.0)
        assert value == 0
        value.backward(retain_graph=True)
