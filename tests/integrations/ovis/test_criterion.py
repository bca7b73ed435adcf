"""Matching and losses: transformers' own as the oracle, and what it does not promise."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerHungarianMatcher,
    Mask2FormerLoss,
)

from integrations.ovis import criterion
from integrations.ovis.criterion import (
    UNMATCHED,
    ClipTargets,
    FrameTargets,
    LossConfig,
    match,
    supervise,
)
from integrations.ovis.head import HeadConfig, HeadOutput, Prediction

QUERIES, CLASSES, SIZE = 5, 3, (32, 64)
CONFIG = LossConfig(num_points=40)


def clip_targets(instances=3, frames=2, size=SIZE, hidden=((1, 0),)) -> ClipTargets:
    """Random rectangles; ``hidden`` names (instance, frame) pairs where one is absent."""
    masks = torch.zeros(instances, frames, *size, dtype=torch.bool)
    for instance, frame in itertools.product(range(instances), range(frames)):
        top, left = int(torch.randint(size[0] - 12, ())), int(torch.randint(size[1] - 16, ()))
        masks[instance, frame, top : top + 12, left : left + 16] = True
    for instance, frame in hidden:
        masks[instance, frame] = False
    return ClipTargets(torch.randint(CLASSES, (instances,)), masks)


def prediction(frames: int, size=SIZE) -> Prediction:
    return Prediction(
        torch.randn(frames, QUERIES, CLASSES + 1, requires_grad=True),
        (3 * torch.randn(frames, QUERIES, size[0] // 4, size[1] // 4)).requires_grad_(),
    )


def output(frames: int, layers=2, size=SIZE) -> HeadOutput:
    last = prediction(frames, size)
    return HeadOutput(
        last.class_logits,
        last.mask_logits,
        query_embeddings=torch.randn(frames, QUERIES, 4),
        queries=torch.randn(frames, QUERIES, 8),
        auxiliary=[prediction(frames, size) for _ in range(layers)],
    )


def by_frame(targets: FrameTargets) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Masks and labels in the form that transformers wants."""
    rows = [targets.frames == frame for frame in range(targets.num_frames)]
    return [targets.masks[row] for row in rows], [targets.labels[row] for row in rows]


def stock_loss() -> Mask2FormerLoss:
    sizes = HeadConfig(in_channels=1, num_classes=CLASSES, width=32, num_heads=4).mask2former()
    sizes.train_num_points = CONFIG.num_points
    return Mask2FormerLoss(sizes, {})


# -- against transformers -------------------------------------------------------------------------


def test_matches_are_those_of_transformers_on_the_same_points():
    targets = FrameTargets.of([clip_targets(), clip_targets(2, hidden=((0, 0), (1, 0)))])
    said = prediction(targets.num_frames)
    stock = Mask2FormerHungarianMatcher(2.0, 5.0, 5.0, CONFIG.num_points)
    masks, labels = by_frame(targets)
    torch.manual_seed(3)
    found = match(said, targets, CONFIG)
    torch.manual_seed(3)
    expected = []
    for mask_logits, class_logits, mask, label in zip(
        said.mask_logits, said.class_logits, masks, labels, strict=True
    ):
        queries = torch.full((len(label),), UNMATCHED)
        ((chosen, objects),) = stock(mask_logits[None], class_logits[None], [mask], [label])
        queries[objects] = chosen
        expected.append(queries)
    assert found.tolist() == torch.cat(expected).tolist()
    assert (found != UNMATCHED).all()


def test_losses_and_gradients_are_those_of_transformers_for_the_same_match():
    targets = FrameTargets.of([clip_targets(), clip_targets()])
    said = prediction(targets.num_frames)
    queries = match(said, targets, CONFIG)
    count = float(len(queries))
    torch.manual_seed(5)
    mask, dice = criterion.mask_losses(said.mask_logits, targets, queries, CONFIG, count)
    classes = criterion.class_loss(said.class_logits, targets, queries, CONFIG)
    leaves = (said.mask_logits, said.class_logits)
    gradients = torch.autograd.grad(2 * mask + 3 * dice + 4 * classes, leaves)

    masks, labels = by_frame(targets)
    rows = [targets.frames == frame for frame in range(targets.num_frames)]
    indices = [(queries[row], torch.arange(int(row.sum()))) for row in rows]
    stock = stock_loss()
    torch.manual_seed(5)
    expected = stock.loss_masks(said.mask_logits, masks, indices, count)
    expected |= stock.loss_labels(said.class_logits, labels, indices)
    torch.testing.assert_close(mask, expected["loss_mask"])
    torch.testing.assert_close(dice, expected["loss_dice"])
    torch.testing.assert_close(classes, expected["loss_cross_entropy"])
    total = 2 * expected["loss_mask"] + 3 * expected["loss_dice"]
    total = total + 4 * expected["loss_cross_entropy"]
    for ours, theirs in zip(gradients, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


# -- matching -------------------------------------------------------------------------------------


def test_no_other_assignment_is_cheaper():
    targets = FrameTargets.of([clip_targets(3, frames=1, hidden=())])
    said = prediction(1)
    torch.manual_seed(1)
    found = match(said, targets, CONFIG).tolist()
    torch.manual_seed(1)
    points = torch.rand(1, CONFIG.num_points, 2)
    rows, places = torch.ones(3, dtype=torch.bool), (torch.zeros(3).long(), torch.arange(3))
    with torch.no_grad():
        costs = criterion._costs(said, targets, CONFIG, slice(0, 1), rows, places, 3, points)[0]
    every = itertools.permutations(range(QUERIES), 3)
    best = min(every, key=lambda queries: sum(costs[q, i].item() for i, q in enumerate(queries)))
    assert found == list(best)


def test_a_query_that_shows_an_object_is_matched_to_it():
    targets = FrameTargets.of([clip_targets(3, frames=2)])
    said = Prediction(torch.zeros(2, QUERIES, CLASSES + 1), torch.full((2, QUERIES, 8, 16), -8.0))
    wanted = []
    for row, (frame, label) in enumerate(zip(targets.frames, targets.labels, strict=True)):
        query = (2 * row + 1) % QUERIES
        small = torch.nn.functional.max_pool2d(targets.masks[row][None], 4)[0]
        said.mask_logits[frame, query] = 16 * small - 8
        said.class_logits[frame, query, label] = 4.0
        wanted.append(query)
    assert match(said, targets, CONFIG).tolist() == wanted


def test_memory_bounds_change_no_match(monkeypatch):
    targets = FrameTargets.of([clip_targets(frames=3), clip_targets(frames=3)])
    said = prediction(6)
    torch.manual_seed(2)
    whole = match(said, targets, CONFIG)
    monkeypatch.setattr(criterion, "AT_ONCE", 1)  # a frame at a time
    torch.manual_seed(2)
    assert torch.equal(match(said, targets, CONFIG), whole)


def test_more_objects_than_queries_leave_some_without():
    targets = FrameTargets.of([clip_targets(QUERIES + 2, frames=1, hidden=())])
    queries = match(prediction(1), targets, CONFIG)
    assert (queries == UNMATCHED).sum() == 2
    assert sorted(queries[queries != UNMATCHED].tolist()) == list(range(QUERIES))
    losses = supervise(output(1), targets, CONFIG).losses
    assert all(loss.isfinite() for loss in losses.values())


def test_predictions_that_are_not_finite_are_matched_last():
    targets = FrameTargets.of([clip_targets(2, frames=1, hidden=())])
    said = prediction(1)
    with torch.no_grad():
        said.mask_logits[0, 1:4] = torch.nan
    assert sorted(match(said, targets, CONFIG).tolist()) == [0, 4]


def test_matches_come_back_per_clip_with_absent_instances_marked():
    first, second = clip_targets(3, hidden=((1, 0), (2, 1))), clip_targets(0, hidden=())
    third = clip_targets(1, hidden=())
    targets = FrameTargets.of([first, second, third])
    assert targets.frames.tolist() == [0, 0, 1, 1, 4, 5]
    clips = targets.by_clip(torch.tensor([4, 3, 2, 1, 0, 4]))
    assert clips[0].tolist() == [[4, UNMATCHED, 3], [2, 1, UNMATCHED]]
    assert clips[1].shape == (2, 0)
    assert clips[2].tolist() == [[0], [4]]


# -- losses ---------------------------------------------------------------------------------------


def test_all_layers_are_supervised_and_the_last_match_is_handed_on():
    targets = FrameTargets.of([clip_targets()])
    said = output(2)
    result = supervise(said, targets, CONFIG)
    kinds = ("class", "mask", "dice")
    assert set(result.losses) == {f"loss_{k}" for k in kinds} | {f"loss_aux_{k}" for k in kinds}
    sum(result.losses.values()).backward()
    for layer in (said, *said.auxiliary):
        assert layer.class_logits.grad.abs().sum() > 0
        assert layer.mask_logits.grad.abs().sum() > 0
    # Masks get gradients through matched queries alone, and these are the ones reported.
    touched = said.mask_logits.grad.flatten(2).abs().sum(-1).nonzero()
    rows = torch.stack((targets.frames, result.queries), 1)
    assert sorted(touched.tolist()) == sorted(rows.tolist())


@pytest.mark.parametrize("instances", [0, 2])
def test_a_batch_without_objects_trains(instances):
    """No instances at all, or some that all frames lack: classes learn, masks get zeros."""
    hidden = tuple(itertools.product(range(instances), range(2)))
    targets = FrameTargets.of([clip_targets(instances, hidden=hidden)])
    said = output(2)
    losses = supervise(said, targets, CONFIG).losses
    assert losses["loss_class"] > 0
    assert losses["loss_mask"] == losses["loss_dice"] == 0
    sum(losses.values()).backward()
    assert said.class_logits.grad.abs().sum() > 0
    assert said.mask_logits.grad is not None
    assert said.mask_logits.grad.abs().sum() == 0


def test_the_weights_of_the_config_are_those_of_the_losses():
    targets = FrameTargets.of([clip_targets()])
    said = output(2)
    torch.manual_seed(0)
    plain = supervise(said, targets, CONFIG).losses
    torch.manual_seed(0)
    # All costs doubled: the match stays.
    config = LossConfig(class_weight=4, mask_weight=10, dice_weight=10, num_points=40)
    doubled = supervise(said, targets, config).losses
    for name, loss in plain.items():
        torch.testing.assert_close(doubled[name], 2 * loss)


def _rank(rank: int, folder: str, instances: tuple[int, int]) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)
    targets = FrameTargets.of([clip_targets(instances[rank], frames=1, hidden=())])
    losses = supervise(output(1), targets, CONFIG).losses
    torch.save(losses["loss_mask"].detach(), f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("instances", [(1, 4), (0, 3), (0, 0)])
def test_objects_of_all_ranks_count_alike(tmp_path, instances):
    """Ranks whose gradients are averaged divide by the mean of their objects, at least 1."""
    mp.start_processes(_rank, (str(tmp_path), instances), nprocs=2, start_method="fork")
    for rank, count in enumerate(instances):
        torch.manual_seed(rank)
        targets = FrameTargets.of([clip_targets(count, frames=1, hidden=())])
        alone = supervise(output(1), targets, CONFIG).losses["loss_mask"].detach()
        found = torch.load(tmp_path / str(rank), weights_only=True)
        torch.testing.assert_close(found, alone * max(count, 1) / max(sum(instances) / 2, 1))


def test_refusals_name_what_does_not_fit():
    targets = FrameTargets.of([clip_targets()])
    with pytest.raises(
        ValueError, match=r"2 frames of \(32, 64\) .* of 2 frames of \(64, 64\); pad"
    ):
        supervise(output(2, size=(64, 64)), targets, CONFIG)
    with pytest.raises(ValueError, match="targets of 2 frames .* predictions of 3 frames"):
        supervise(output(3), targets, CONFIG)
    masks = torch.ones(1, 2, *SIZE, dtype=torch.bool)
    strange = FrameTargets.of([ClipTargets(torch.tensor([CLASSES]), masks)])
    with pytest.raises(ValueError, match="labels 3 to 3; the head knows classes 0 to 2"):
        supervise(output(2), strange, CONFIG)
    with pytest.raises(ValueError, match=r"labels of shape \(2,\) and masks of shape \(1, 2, 32"):
        ClipTargets(torch.zeros(2).long(), masks)
    with pytest.raises(ValueError, match="masks of type torch.uint8; expected bool"):
        ClipTargets(torch.zeros(1).long(), masks.byte())
    with pytest.raises(ValueError, match=r"clips of .*\(2, 32, 64\), \(3, 32, 64\).; needs one"):
        FrameTargets.of([clip_targets(), clip_targets(frames=3)])
    with pytest.raises(ValueError, match="no_object_weight=0: a batch without objects"):
        LossConfig(no_object_weight=0)
    with pytest.raises(ValueError, match="mask_weight=-1 is negative"):
        LossConfig(mask_weight=-1)
    with pytest.raises(ValueError, match="importance=1.5"):
        LossConfig(importance=1.5)
