"""Contrastive losses of the tracking embedding: parity, an item-by-item reading, promises."""

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity

from integrations.ovis.contrastive import (
    ContrastiveConfig,
    auxiliary_loss,
    build_items,
    contrastive_loss,
    contrastive_losses,
    fuse_by_similarity,
    pad_instances,
)

RELEASED = ContrastiveConfig.released()
ALWAYS = {"previous": 0.0, "memory": 1.0}  # probability that the positive is the fused memory


@pytest.fixture(scope="module")
def stored(golden):
    return load_file(golden / "ovis" / "contrastive.safetensors")


@pytest.fixture(scope="module")
def described(golden):
    return json.loads((golden / "ovis" / "contrastive.json").read_text())["plugin"]


def clip(seed=0, clips=2, frames=6, queries=7, width=5, instances=3, share=0.6):
    """Random embeddings and matches, some absent; no two instances share a query in a frame."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(clips, frames, queries, width, generator=generator)
    order = torch.rand(clips, frames, queries, generator=generator).argsort(-1)
    present = torch.rand(clips, frames, instances, generator=generator) < share
    return embeddings, order[..., :instances].where(present, -1)


@pytest.mark.golden
def test_losses_of_given_candidates_match(stored):
    found = []
    numbers = [key.split(".")[1] for key in stored if key.endswith(".label")]
    for name in (f"items.{number}." for number in sorted(numbers)):
        label = stored[name + "label"][None].bool()
        loss = contrastive_loss(stored[name + "dot_product"][None], label, ~label)[0]
        auxiliary = auxiliary_loss(stored[name + "cosine"][None], label, ~label)[0]
        torch.testing.assert_close(loss, stored[name + "loss_reid"], rtol=1e-5, atol=0)
        torch.testing.assert_close(auxiliary, stored[name + "loss_aux_reid"], rtol=1e-5, atol=0)
        found.append(torch.stack([loss, auxiliary]))
    means = torch.stack([stored["items.mean.loss_reid"], stored["items.mean.loss_aux_reid"]])
    torch.testing.assert_close(torch.stack(found).mean(0), means, rtol=1e-5, atol=0)


@pytest.mark.golden
@pytest.mark.parametrize("variant", ALWAYS)
def test_losses_and_gradients_of_clips_match(stored, described, variant):
    queries = stored["plugin.matched_query"].where(stored["plugin.valid"], -1)
    flat = stored["plugin.pred_embeds"].clone().requires_grad_()
    config = replace(RELEASED, memory_probability=ALWAYS[variant])
    embeddings = flat.unflatten(0, queries.shape[:2])  # (B, T, Q, E)
    losses = contrastive_losses(embeddings, queries, config)
    items = build_items(embeddings, queries, config)
    expected = described["results"][variant]
    sizes = (1 + items.negative.sum(1)).tolist()
    assert sizes == expected["item_sizes_positive_plus_negatives"]
    assert losses.items == expected["items"]
    prefix = f"plugin.{variant}."
    for name, loss in (("loss_reid", losses.contrastive), ("loss_aux_reid", losses.auxiliary)):
        torch.testing.assert_close(loss, stored[prefix + name], rtol=1e-5, atol=0)
    sum(losses.weighted(config).values()).backward()
    gradient = stored[prefix + "grad_of_weighted_sum"]
    torch.testing.assert_close(flat.grad, gradient, rtol=0, atol=1e-5)


@pytest.mark.golden
def test_fused_memories_match(stored):
    embeddings = stored["fusion.embeds"]
    fused = fuse_by_similarity(embeddings, stored["fusion.present"])
    torch.testing.assert_close(fused, stored["fusion.fused"], rtol=0, atol=1e-5)
    everywhere = torch.ones(len(embeddings), dtype=torch.bool)
    fused = fuse_by_similarity(embeddings, everywhere, recent=3)
    torch.testing.assert_close(fused, stored["fusion.inference_cache3_fused"], rtol=0, atol=1e-5)


def item_by_item(embeddings, queries, config):
    """The rules of the docstrings, one item at a time; positives never random."""
    present = queries >= 0
    contrastive, auxiliary = [], []
    clips, frames, _ = present.shape
    for b, t, n in ((b, t, n) for b in range(clips) for t in range(1, frames) for n in range(3)):
        shown = [f for f in range(frames) if present[b, f, n]]
        earlier, later = [f for f in shown if f < t], [f for f in shown if f > t]
        if t not in shown or not earlier + later:
            continue
        source = earlier[-1] if earlier else later[0]
        positive = embeddings[b, source, queries[b, source, n]]
        if earlier and config.memory_probability:
            past = torch.stack([embeddings[b, f, queries[b, f, n]] for f in earlier])
            positive = past[0]
            for i in range(1, len(past)):
                share = cosine_similarity(past[i][None], past[:i]).mean().clamp(min=0)
                positive = (1 - share) * positive + share * past[i]
        frame = source if config.negatives == "positive_frame" else t - 1
        own = queries[b, frame, n].item() if present[b, frame, n] else None
        others = [q for q in range(embeddings.shape[2]) if q != own]
        anchor, negatives = embeddings[b, t, queries[b, t, n]], embeddings[b, frame, others]
        gaps = negatives @ anchor - positive @ anchor
        contrastive.append(gaps.exp().sum().log1p())
        cosines = cosine_similarity(anchor[None], torch.cat([positive[None], negatives]))
        wanted = torch.zeros(len(cosines))
        wanted[0] = 1
        auxiliary.append((cosines - wanted).square().mean())
    return torch.stack(contrastive).mean(), torch.stack(auxiliary).mean()


@pytest.mark.parametrize("negatives", ["positive_frame", "previous_frame"])
@pytest.mark.parametrize("variant", ALWAYS)
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_batched_losses_equal_an_item_by_item_reading(negatives, variant, share):
    config = ContrastiveConfig(negatives=negatives, memory_probability=ALWAYS[variant])
    embeddings, queries = clip(seed=3, share=share)
    losses = contrastive_losses(embeddings, queries, config)
    expected = item_by_item(embeddings, queries, config)
    torch.testing.assert_close((losses.contrastive, losses.auxiliary), expected)


def test_padding_of_instances_changes_nothing():
    embeddings, queries = clip()
    config = ContrastiveConfig(memory_probability=0.0)
    fewer = queries[1][:, :1]
    padded = pad_instances([queries[0], fewer])
    assert padded.shape == queries.shape
    apart = [
        contrastive_losses(embeddings[b : b + 1], matches[None], config)
        for b, matches in enumerate((queries[0], fewer))
    ]
    together = contrastive_losses(embeddings, padded, config)
    assert together.items == sum(losses.items for losses in apart)
    mean = sum(losses.contrastive * losses.items for losses in apart) / together.items
    torch.testing.assert_close(together.contrastive, mean)


@pytest.mark.parametrize("frames, instances", [(4, 0), (1, 3), (4, 3)])
def test_clips_without_items_give_zero_and_gradients(frames, instances):
    embeddings, queries = clip(frames=frames, instances=instances)
    if frames > 1:
        queries = torch.full_like(queries, -1)
    embeddings.requires_grad_()
    losses = contrastive_losses(embeddings, queries)
    assert losses.items == 0
    sum(losses.weighted(ContrastiveConfig()).values()).backward()
    assert losses.contrastive == losses.auxiliary == 0
    assert embeddings.grad.abs().max() == 0


def test_an_item_without_negatives_has_finite_gradients():
    embeddings = torch.randn(1, 2, 1, 4, requires_grad=True)
    losses = contrastive_losses(embeddings, torch.zeros(1, 2, 1, dtype=torch.long))
    (losses.contrastive + losses.auxiliary).backward()
    assert losses.contrastive == 0
    assert embeddings.grad.isfinite().all()


def test_large_embeddings_stay_finite():
    embeddings, queries = clip()
    embeddings = (embeddings * 1e3).requires_grad_()
    losses = contrastive_losses(embeddings, queries)
    losses.contrastive.backward()
    assert losses.contrastive.isfinite()
    assert embeddings.grad.isfinite().all()


def test_memory_and_last_embedding_are_drawn_half_and_half():
    embeddings, queries = clip(clips=40, frames=12, share=0.9)
    drawn = [
        build_items(embeddings, queries, ContrastiveConfig(memory_probability=p), g)
        for p, g in ((0.0, None), (1.0, None), (0.5, torch.Generator().manual_seed(1)))
    ]
    last, memory, mixed = (items.candidates[:, 0] for items in drawn)
    differ = (last != memory).any(1)
    from_memory = (mixed == memory).all(1)[differ]
    assert ((mixed == memory).all(1) | (mixed == last).all(1)).all()
    assert 0.45 < from_memory.float().mean() < 0.55


def test_the_generator_repeats_the_draw():
    inputs = clip(frames=12)
    config = ContrastiveConfig(noise_probability=0.5)
    first, second, other = (
        contrastive_losses(*inputs, config, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert first == second
    assert first.contrastive != other.contrastive


def test_noise_disturbs_memories_of_hidden_instances_by_queries_that_nothing_matched():
    embeddings, queries = clip(clips=1, frames=3, instances=2, share=1.0)
    queries[0, 1, 0] = -1
    config = ContrastiveConfig(noise_probability=1.0, memory_probability=0.0)
    items = build_items(embeddings, queries, config)
    # Items: instance 1 in frame 1, then instances 0 and 1 in frame 2.
    free = [q for q in range(embeddings.shape[2]) if q != queries[0, 1, 1]]
    drawn = (items.candidates[1, 0] == embeddings[0, 1]).all(-1).nonzero().flatten().tolist()
    assert len(drawn) == 1
    assert set(drawn) <= set(free)
    assert items.negative[1].nonzero().flatten().tolist() == [
        1 + q for q in range(embeddings.shape[2]) if q != drawn[0]
    ]
    assert torch.equal(items.candidates[2, 0], embeddings[0, 1, queries[0, 1, 1]])


def test_noise_spares_instances_not_seen_before():
    embeddings, queries = clip(clips=1, frames=3, instances=1, share=1.0)
    queries[0, 0, 0] = -1
    config = ContrastiveConfig(memory_probability=0.0)
    quiet = build_items(embeddings, queries, config)
    noisy = build_items(embeddings, queries, replace(config, noise_probability=1.0))
    torch.testing.assert_close(tuple(quiet), tuple(noisy), rtol=0, atol=0)


def test_mixed_precision_computes_the_losses_in_full():
    inputs = clip()
    config = ContrastiveConfig(memory_probability=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = contrastive_losses(*inputs, config)
    assert mixed == contrastive_losses(*inputs, config)


def _rank(rank, folder, share):
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    embeddings, queries = clip(seed=rank, frames=3 + 4 * rank, share=share)
    if not rank and share < 0.5:  # the first rank has nothing at all
        queries.fill_(-1)
    config = ContrastiveConfig(memory_probability=0.0)
    losses = contrastive_losses(embeddings, queries, config)
    torch.save([losses.contrastive, losses.items], f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("share", [0.4, 0.8])
def test_items_of_all_ranks_count_alike(tmp_path, share):
    mp.start_processes(_rank, (str(tmp_path), share), nprocs=2, start_method="fork")
    found = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2)]
    total, items = 0.0, 0
    for rank in range(2):
        embeddings, queries = clip(seed=rank, frames=3 + 4 * rank, share=share)
        if not rank and share < 0.5:
            queries.fill_(-1)
        alone = contrastive_losses(embeddings, queries, ContrastiveConfig(memory_probability=0.0))
        assert alone.items == found[rank][1]
        total, items = total + alone.contrastive * alone.items, items + alone.items
    torch.testing.assert_close((found[0][0] + found[1][0]) / 2, total / items)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda e, q: (e[0], q), r"embeddings of shape \(6, 7, 5\); expected \(B, T, Q, E\)"),
        (lambda e, q: (e, q[:, :5]), r"queries of shape \(2, 5, 3\); embeddings .*\(2, 6, 7, 5\)"),
        (lambda e, q: (e, q + 7), "matches name queries 6 to 1[0-9]; there are 0 to 6"),
        (lambda e, q: (e, q - 1), "matches name queries -2 to [0-9]; there are 0 to 6, and -1"),
    ],
)
def test_wrong_matches_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        contrastive_losses(*change(*clip()))


def test_clips_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"of shapes \[\(3, 1\), \(2, 1\)\]; expected \(T, n\)"):
        pad_instances([torch.zeros(3, 1), torch.zeros(2, 1)])


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("negatives", "next_frame", "negatives='next_frame' is not one of"),
        ("average", "world", "average='world' is not one of"),
        ("noise_probability", 1.5, r"noise_probability=1.5 is not in \[0, 1\]"),
        ("memory_probability", -0.5, r"memory_probability=-0.5 is not in \[0, 1\]"),
    ],
)
def test_unknown_rules_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveConfig(**{field: value})
