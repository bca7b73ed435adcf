"""The loss: parity with the released heads, and what it promises beyond them."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from pretrain.alignment import alignment_loss, contrastive_pairs, gather_ranks, similarity


@pytest.fixture
def case(golden):
    """Tensors of a golden case, with the pooled output and the two scalars ready for gradients."""

    def load(name, features="pooler_output"):
        tensors = load_file(golden / "pretraining" / f"{name}.safetensors")
        index = json.loads((golden / "pretraining/index.json").read_text())
        scale = torch.tensor(index["logit_scale"], requires_grad=True)
        bias = torch.tensor(index["logit_bias"], requires_grad=True)
        return tensors, tensors[features].requires_grad_(), scale, bias

    return load


def check(loss, tensors, features, scale, bias, prefix="", name="pooler_output"):
    """Loss within 1e-5 relative and all gradients within 1e-5 absolute, the goldens' own bounds."""
    torch.testing.assert_close(loss, tensors[f"{prefix}loss"], rtol=1e-5, atol=0)
    loss.backward()
    for value, key in ((features, name), (scale, "logit_scale"), (bias, "logit_bias")):
        expected = tensors[f"{prefix}grad.{key}"]
        torch.testing.assert_close(value.grad, expected, rtol=0, atol=1e-5)


@pytest.mark.golden
def test_recognition_equals_the_released_head(case):
    tensors, pooled, scale, bias = case("global_recognition")
    text = tensors["label_embeddings"]
    targets = F.one_hot(tensors["label"], len(text)) * 2.0 - 1
    logits = scale.exp() * similarity(pooled[:, -1], text, normalize_text=False) + bias
    torch.testing.assert_close(logits, tensors["logits"], rtol=1e-5, atol=1e-5)
    loss = alignment_loss(pooled[:, -1], text, targets, scale.exp(), bias, normalize_text=False)
    check(loss, tensors, pooled, scale, bias)


@pytest.mark.golden
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_retrieval_equals_the_released_head_on_every_rank(case, ranks):
    name = "global_retrieval" + (f"_world{ranks}" if ranks > 1 else "")
    prefixes = [f"rank{rank}." for rank in range(ranks)] if ranks > 1 else [""]
    for rank, prefix in enumerate(prefixes):
        tensors, pooled, scale, bias = case(name, f"{prefix}pooler_output")
        texts = torch.cat([tensors[f"{other}text_embeds"] for other in prefixes])
        everyone = torch.arange(len(texts))
        targets, mask = contrastive_pairs(everyone, everyone, len(pooled), rank)
        loss = alignment_loss(pooled[:, -1], texts, targets, scale.exp(), bias, mask)
        check(loss, tensors, pooled, scale, bias, prefix)


@pytest.mark.golden
def test_localization_equals_the_released_head_with_two_label_sets_in_a_batch(case, golden):
    tensors, pooled, scale, bias = case("temporal_localization")
    index = json.loads((golden / "pretraining/index.json").read_text())
    datasets = index["cases"]["temporal_localization"]["datasets"]
    text = torch.cat([tensors["label_embeddings.dsA"], tensors["label_embeddings.dsB"]])
    columns = {"dsA": range(5), "dsB": range(5, 8)}
    targets = torch.full((*pooled.shape[:2], 8), -1.0)
    mask = torch.zeros(3, 1, 8, dtype=torch.bool)
    for i, dataset in enumerate(datasets):
        mask[i, :, list(columns[dataset])] = True
        for t, label in enumerate(tensors["label"][i].int().tolist()):
            if label >= 0:
                targets[i, t, columns[dataset][label]] = 1.0
    arguments = (pooled, text, targets, scale.exp(), bias, mask)
    check(alignment_loss(*arguments, normalize_text=False), tensors, pooled, scale, bias)


@pytest.mark.golden
def test_grounding_equals_the_released_head_with_its_sum_over_frames(case):
    tensors, pooled, scale, bias = case("temporal_grounding")
    text = tensors["text_embeds"][:, None]  # (B, 1, D): a caption of its own for every clip
    targets = tensors["label"][..., None] * 2 - 1  # (B, T, 1)
    loss = alignment_loss(pooled, text, targets, scale.exp(), bias, reduction="sample_sum")
    check(loss, tensors, pooled, scale, bias)


SHAPES = {"global": (3,), "temporal": (3, 4), "spatial": (3, 4, 2, 5)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("own_texts", [False, True])
def test_every_granularity_is_the_same_formula(shape, own_texts):
    features, text = torch.randn(*shape, 8), torch.randn(*([3] if own_texts else []), 6, 8)
    targets = torch.randint(0, 2, (*shape, 6)) * 2.0 - 1
    mask = torch.rand(*shape, 6) < 0.6
    total, positions = 0.0, 0
    for place in torch.cartesian_prod(*map(torch.arange, shape)).view(-1, len(shape)).tolist():
        place = tuple(place)
        texts = text[place[0]] if own_texts else text
        kept = [c for c in range(6) if mask[place][c]]
        positions += bool(kept)
        for c in kept:
            cosine = F.cosine_similarity(features[place], texts[c], dim=0)
            total += math.log1p(math.exp(-(targets[place][c] * (5 * cosine - 1)).item()))
    loss = alignment_loss(features, text, targets, 5.0, -1.0, mask)
    assert loss.item() == pytest.approx(total / positions, rel=1e-4)
    summed = alignment_loss(features, text, targets, 5.0, -1.0, mask, "sum")
    assert summed.item() == pytest.approx(total, rel=1e-4)
    each = alignment_loss(features, text, targets, 5.0, -1.0, mask, "none")
    assert each.shape == shape
    assert each.sum().item() == pytest.approx(total, rel=1e-4)


def test_bfloat16_features_lose_only_their_own_rounding():
    # The scale of SigLIP: logits computed in bfloat16 would be off by up to 0.5.
    features, text = torch.randn(16, 64), torch.randn(10, 64)
    targets = torch.eye(16, 10) * 2 - 1
    exact = alignment_loss(features.bfloat16().float(), text, targets, 117.0, -12.0)
    with torch.autocast("cpu", torch.bfloat16):
        half = alignment_loss(features.bfloat16(), text, targets, 117.0, -12.0)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact)
    full = alignment_loss(features, text, targets, 117.0, -12.0)
    assert half.item() == pytest.approx(full.item(), rel=0.01)


def test_nothing_to_count_gives_zero_and_still_a_gradient():
    features = torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.zeros(2, 3, 1, dtype=torch.bool)
    for reduction in ("mean", "sample_sum", "sum"):
        targets = torch.ones(2, 3, 5)
        loss = alignment_loss(features, torch.randn(5, 4), targets, 1.0, 0.0, mask, reduction)
        loss.backward()
        assert loss.item() == 0
        assert not features.grad.any()


def test_ranks_together_see_what_one_process_would():
    features, texts = torch.randn(6, 8), torch.randn(6, 8)
    captions, videos = torch.tensor([0, 1, 2, 1, 4, 5]), torch.tensor([0, 1, 2, 3, 4, 0])
    targets, mask = contrastive_pairs(captions, videos, 6)
    whole = alignment_loss(features, texts, targets, 3.0, -1.0, mask)
    parts = []
    for rank in range(3):
        targets, mask = contrastive_pairs(captions, videos, 2, rank)
        rows = features[2 * rank : 2 * rank + 2]
        parts.append(alignment_loss(rows, texts, targets, 3.0, -1.0, mask))
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_the_same_caption_or_video_is_no_negative():
    targets, mask = contrastive_pairs(torch.tensor([7, 8, 7]), torch.tensor([1, 2, 2]), 3)
    assert (targets == torch.eye(3) * 2 - 1).all()
    assert mask.tolist() == [[True, True, False], [True, True, False], [False, False, True]]


def test_without_a_process_group_gathering_changes_nothing():
    tensor = torch.randn(2, 3)
    assert gather_ranks(tensor) is tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": torch.zeros(5, 9)}, "features have width 4 and texts 9"),
        ({"text": torch.zeros(4)}, r"text must be \(C, D\) or \(B, C, D\), not \(4,\)"),
        ({"targets": torch.zeros(2, 6)}, r"targets have shape \(2, 6\).*need \(2, 3, 5\)"),
        ({"reduction": "average"}, "reduction='average' is unknown"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = {
        "features": torch.zeros(2, 3, 4),
        "text": torch.zeros(5, 4),
        "targets": torch.zeros(2, 3, 5),
        "scale": 1.0,
        "bias": 0.0,
    }
    with pytest.raises(ValueError, match=message):
        alignment_loss(**arguments | change)


def test_ranks_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="5 captions and 5 videos do not make whole ranks of 2"):
        contrastive_pairs(torch.arange(5), torch.arange(5), 2)
