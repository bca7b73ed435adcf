"""The MAT head: stored numbers of the original, and the rules it must keep."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from integrations.oad.losses import (
    EqualisedLoss,
    cross_entropy,
    mat_loss,
    probabilities,
    released_stage_weights,
    row_cross_entropy,
)
from integrations.oad.mat import MatHead
from integrations.oad.mat_config import MatConfig
from integrations.oad.mat_layers import TopKAttention, sinusoid_table

MODELS = ("visual_gelu", "twostream_relu", "nogroup_cls31", "ek100_heads")
TRAINED = MODELS[:3]
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def inputs(model, case="full"):
    rows = model.info["cases"][case]["samples"]
    mask = "heavy_padding_mask" if case == "heavy" else "memory_key_padding_mask"
    motion = model.tensors.get("in/motion")
    return (
        model.tensors["in/visual"][rows],
        None if motion is None else motion[rows],
        model.tensors[f"in/{mask}"][rows],
    )


def padding(*masked, length):
    """Masks (B, L) that hide the first ``masked[b]`` entries of sample b."""
    mask = torch.zeros(len(masked), length)
    for row, count in enumerate(masked):
        mask[row, :count] = -math.inf
    return mask


# ----- parity


@pytest.mark.golden
@pytest.mark.parametrize("grouping", ["sample", "batch"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_all_stages_equal_the_original(golden_model, name, grouping):
    model = golden_model(name)
    head = model.head(long_grouping=grouping)
    for case in model.info["cases"]:
        with torch.no_grad():
            output = head(*inputs(model, case))
        for kind, stages in (("work", output.work), ("fut", output.future)):
            assert len(stages) == sum(k.startswith(f"{case}/{kind}_scores.") for k in model.tensors)
            for i, logits in enumerate(stages):
                stored = model.tensors[f"{case}/{kind}_scores.{i}"]
                torch.testing.assert_close(logits, stored, **TOLERANCE, msg=f"{case} {kind} {i}")


@pytest.mark.golden
def test_verb_and_noun_logits_equal_the_original(golden_model):
    model = golden_model("ek100_heads")
    output = model.head()(*inputs(model))
    stored = {name: model.tensors[f"full/{name}_scores"] for name in ("verb", "noun")}
    stored["future_verb"] = model.tensors["full/fut_verb_scores"]
    stored["future_noun"] = model.tensors["full/fut_noun_scores"]
    for name, scores in stored.items():
        torch.testing.assert_close(getattr(output, name), scores, **TOLERANCE)


@pytest.mark.golden
@pytest.mark.parametrize("name", TRAINED)
def test_loss_gradients_and_three_adam_steps_equal_the_original(golden_model, name):
    model = golden_model(name)
    train, stored = model.info["train"], model.info["loss"]
    head = model.head(long_grouping="batch").train()
    targets = model.tensors["in/det_target"], model.tensors["in/fut_target"]
    optimiser = torch.optim.Adam(
        head.parameters(), lr=train["lr"], weight_decay=train["weight_decay"]
    )
    for step in range(train["steps"]):
        total, parts = mat_loss(head(*inputs(model)), *targets, model.ignore_index)
        assert total.item() == pytest.approx(train["losses"][step], abs=1e-5)
        optimiser.zero_grad()
        total.backward()
        if step == 0:
            assert released_stage_weights(len(stored["det_losses"])) == pytest.approx(
                stored["det_weights"]
            )
            found = [parts[f"work_{i}"].item() for i in range(len(stored["det_losses"]))]
            found += [parts[f"future_{i}"].item() for i in range(len(stored["fut_losses"]))]
            wanted = stored["det_losses"] + stored["fut_losses"]
            assert found == pytest.approx(wanted, abs=1e-5)
            assert model.info["params_without_grad"] == []
            for parameter, value in head.named_parameters():
                norm = model.info["grad_norms"][parameter]
                assert value.grad.norm().item() == pytest.approx(norm, abs=1e-5), parameter
            for parameter in train["watched"]:
                grad = head.get_parameter(parameter).grad
                golden_grad = model.tensors[f"train/grad/{parameter}"]
                torch.testing.assert_close(grad, golden_grad, **TOLERANCE)
        optimiser.step()
    for parameter in train["watched"]:
        after = model.tensors[f"train/after3/{parameter}"]
        torch.testing.assert_close(head.get_parameter(parameter), after, rtol=0, atol=1e-6)


@pytest.mark.golden
@pytest.mark.parametrize("name", MODELS)
def test_parameters_have_the_released_names_and_shapes(golden_model, name):
    model = golden_model(name)
    stored = {k: tuple(v) for k, v in model.info["state_dict_keys"].items()}
    del stored["pos_encoding.pe"]  # derived, not stored
    head = MatHead(model.config())
    assert {k: tuple(v.shape) for k, v in head.state_dict().items()} == stored
    pe = model.tensors["pe_first64"][: len(head.positions)]
    torch.testing.assert_close(head.positions, pe, rtol=0, atol=1e-6)


@pytest.mark.golden
def test_attention_equals_the_original(golden):
    units = load_file(golden / "oad" / "units.safetensors")
    info = json.loads((golden / "oad" / "units.json").read_text())["attn"]
    attention = TopKAttention(info["embed_dim"], info["num_heads"]).eval()
    prefix = "attn/param/"
    parameters = {k.removeprefix(prefix): v for k, v in units.items() if k.startswith(prefix)}
    attention.load_state_dict(parameters)
    q, kv = units["attn/q"].transpose(0, 1), units["attn/kv"].transpose(0, 1)
    mask, pad = units["attn/attn_mask"], units["attn/key_padding_mask"][:, None, None]
    for name, masks in (("topk", None), ("mask_topk", mask), ("pad_topk", pad)):
        out = attention(q, kv, masks)
        stored = units[f"attn/out_{name}"].transpose(0, 1)
        torch.testing.assert_close(out, stored, **TOLERANCE, msg=name)
    both = attention(q, kv, mask + pad)
    torch.testing.assert_close(both, units["attn/out_mask_pad_topk"].transpose(0, 1), **TOLERANCE)


@pytest.mark.golden
@pytest.mark.parametrize("dim", [16, 30])
def test_positions_equal_the_original(golden, dim):
    stored = load_file(golden / "oad" / "units.safetensors")[f"pe/{dim}"]
    torch.testing.assert_close(sinusoid_table(len(stored), dim), stored, rtol=0, atol=1e-6)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["thumos", "tvseries", "bgignored"])
def test_cross_entropy_equals_the_original(golden, case):
    units = load_file(golden / "oad" / "units.safetensors")
    info = json.loads((golden / "oad" / "units.json").read_text())["mce"][case]
    logits = units[f"mce/{case}/logits"].requires_grad_()
    target, ignore_index = units[f"mce/{case}/target"], info["ignore_index"]
    losses, kept = row_cross_entropy(logits, target, ignore_index)
    torch.testing.assert_close(losses[kept], units[f"mce/{case}/none"], **TOLERANCE)
    assert losses[kept].sum().item() == pytest.approx(info["sum"], rel=1e-6)
    loss = cross_entropy(logits, target, ignore_index)
    assert loss.item() == pytest.approx(info["mean"], abs=1e-5)
    loss.backward()
    torch.testing.assert_close(logits.grad, units[f"mce/{case}/grad"], **TOLERANCE)


@pytest.mark.golden
@pytest.mark.parametrize("gamma", [0, 1])
def test_equalised_loss_equals_the_original(golden, gamma):
    units = load_file(golden / "oad" / "units.safetensors")
    info = json.loads((golden / "oad" / "units.json").read_text())["mce_eql"]
    logits, target = units["mce_eql/logits"], units["mce_eql/target"]
    rare = torch.zeros(logits.shape[-1], dtype=torch.bool)
    # the golden counts its classes without the background column
    rare[[index + 1 for index in info["rare_classes"]]] = True
    loss = EqualisedLoss(rare, gamma)(logits, target, info["ignore_index"])
    assert loss.item() == pytest.approx(info[f"gamma{gamma}"], abs=1e-5)


# ----- attention


def test_attention_over_a_single_key_keeps_it():
    attention = TopKAttention(8, 2)
    out = attention(torch.randn(1, 3, 8), torch.randn(1, 1, 8))
    assert out.isfinite().all()


def test_attention_drops_the_worst_quarter_of_the_keys():
    attention = TopKAttention(8, 1).eval()
    source = torch.randn(1, 8, 8)
    x = torch.randn(1, 1, 8)
    scores = attention.queries(x)[0, 0, 0] @ attention.keys_values(source)[0, :, :8].T
    worst, best = scores.argsort()[:2], scores.argmax()
    changed = source.clone()
    changed[:, best] += 1.0
    assert not torch.allclose(attention(x, changed), attention(x, source))
    kept = source[:, [i for i in range(8) if i not in worst.tolist()]]
    # six of eight survive; appended to those six, two keys that lose again change nothing
    again = torch.cat([kept, source[:, worst]], dim=1)
    torch.testing.assert_close(attention(x, again), attention(x, source))


# ----- long memory paths


@pytest.fixture
def small_inputs(small_config):
    steps = small_config.long_tokens + small_config.work_tokens
    return torch.randn(4, steps, small_config.visual_size)


MIXED = (0, 2, 3, 11)  # of 12 entries in 3 groups: two samples grouped, two plain


def test_a_sample_does_not_depend_on_its_neighbours(make_head, small_config, small_inputs):
    head = make_head(small_config)
    mask = padding(*MIXED, length=12)
    together = head(small_inputs, padding_mask=mask)
    for i in range(4):
        alone = head(small_inputs[i : i + 1], padding_mask=mask[i : i + 1])
        for a, b in zip(alone.work + alone.future, together.work + together.future, strict=True):
            torch.testing.assert_close(a[0], b[i], rtol=0, atol=1e-5)


def test_batch_grouping_lets_a_neighbour_decide_as_the_release_did(
    make_head, small_config, small_inputs
):
    head = make_head(replace(small_config, long_grouping="batch"))
    mask = padding(*MIXED, length=12)
    assert head.grouped_rows(mask, 4, "batch").tolist() == [False] * 4
    assert head.grouped_rows(mask, 4, "sample").tolist() == [True, True, False, False]
    alone = head(small_inputs[:1], padding_mask=mask[:1]).work[-1][0]
    together = head(small_inputs, padding_mask=mask).work[-1][0]
    assert (alone - together).abs().max() > 1e-3


def test_mixed_paths_pass_gradients_to_the_right_samples(make_head, small_config, small_inputs):
    head = make_head(small_config)
    x = small_inputs.requires_grad_()
    head(x, padding_mask=padding(*MIXED, length=12)).work[-1][2].sum().backward()
    assert x.grad[2].abs().sum() > 0
    assert x.grad[[0, 1, 3]].abs().sum() == 0


def test_masked_long_memory_is_not_read(make_head, small_config, small_inputs):
    head = make_head(small_config)
    for masked in (2, 9):  # grouped and plain
        mask = padding(*[masked] * 4, length=12)
        changed = small_inputs.clone()
        changed[:, :masked] += 5.0
        before = head(small_inputs, padding_mask=mask).work[-1]
        assert torch.equal(head(changed, padding_mask=mask).work[-1], before)


def test_a_group_without_an_open_entry_takes_the_plain_path(make_head, small_config):
    # 4 groups of 2 entries, and 3 masked entries are still fewer than 4 groups
    config = replace(small_config, groups=4, long_steps=16, long_rate=2)
    head = make_head(config)
    mask = padding(3, 1, length=8)
    assert head.grouped_rows(mask, 2, "sample").tolist() == [False, True]
    steps = config.long_tokens + config.work_tokens
    output = head(torch.randn(2, steps, config.visual_size), padding_mask=mask)
    assert all(logits.isfinite().all() for logits in output.work)


def test_no_mask_means_a_full_memory(make_head, small_config, small_inputs):
    head = make_head(small_config)
    full = head(small_inputs, padding_mask=torch.zeros(4, 12)).work[-1]
    assert torch.equal(head(small_inputs).work[-1], full)


# ----- causality inside a window


def test_only_stage_zero_and_the_newest_tokens_are_causal(make_head, small_config, small_inputs):
    head = make_head(small_config)
    changed = small_inputs.clone()
    changed[:, -1] += 1.0  # the newest work step
    before, after = head(small_inputs), head(changed)
    newest = small_config.work_tokens - 1
    moved = [
        (b - a)[:, :newest].abs().max().item() for a, b in zip(before.work, after.work, strict=True)
    ]
    assert moved[0] == 0
    assert min(moved[1:]) > 0


def test_detect_returns_the_last_rows_of_decode(make_head, small_config, small_inputs):
    for config in (small_config, replace(small_config, future_stack=(6, 2, True))):
        head = make_head(config)
        mask = padding(*MIXED, length=12)
        steps = head.embed(small_inputs)
        work, long = steps.work[:, 12:], [kv[:, :12] for kv in steps.long]
        whole = head.decode(work, long, mask).work[-1]
        for last in (None, 1, 9):
            rows = 4 if last is None else last
            part = head.detect(work, long, mask, last=last, questions=head.questions())
            torch.testing.assert_close(part, whole[:, -rows:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("masked", [1, 9])
def test_a_shorter_work_memory_is_that_of_a_smaller_head(
    make_head, small_config, small_inputs, masked
):
    head = make_head(small_config)
    mask = padding(*[masked] * 4, length=12)
    for tokens in (1, 4):
        small = MatHead(replace(small_config, work_steps=tokens)).eval()
        small.load_state_dict(head.state_dict())
        expected = small(small_inputs[:, : 12 + tokens], padding_mask=mask)
        steps = head.embed(small_inputs)
        long = [kv[:, :12] for kv in steps.long]
        found = head.decode(steps.work[:, 12 : 12 + tokens], long, mask)
        for a, b in zip(found.work, expected.work, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="18 work tokens, expected 1..6"):
        head.decode(steps.work, long, mask)


# ----- variants


def test_one_refinement_is_the_first_of_two(make_head, small_config, small_inputs):
    two = make_head(small_config)
    one = MatHead(replace(small_config, refinements=1)).eval()
    one.load_state_dict({k: two.state_dict()[k] for k in one.state_dict()})
    a, b = one(small_inputs), two(small_inputs)
    assert (len(a.work), len(a.future)) == (2, 1)
    for found, expected in zip(a.work + a.future, b.work[:2] + b.future[:1], strict=True):
        torch.testing.assert_close(found, expected)


def test_without_long_memory_the_work_stack_is_an_encoder(make_head, small_config):
    config = replace(small_config, long_steps=0)
    head = make_head(config)
    names = set(head.state_dict())
    assert not any(name.startswith(("feature_head_long", "enc_")) for name in names)
    assert not any("multihead_attn" in name for name in names if name.startswith("dec_modules"))
    x = torch.randn(2, config.work_tokens, config.visual_size)
    output = head(x)
    assert [tuple(o.shape) for o in output.work] == [(2, 9, 5)] * 3
    changed = x.clone()
    changed[:, -1] += 1.0
    assert torch.equal(head(changed).work[0][:, :5], output.work[0][:, :5])


def test_without_future_only_the_first_work_stage_is_returned(make_head, small_config):
    config = replace(small_config, future_tokens=0, anticipation_steps=0)
    head = make_head(config)
    output = head(torch.randn(2, 18, config.visual_size))
    assert [tuple(o.shape) for o in output.work] == [(2, 6, 5)]
    assert output.future == []
    total, parts = mat_loss(output, torch.rand(2, 6, 5), torch.rand(2, 0, 5), ignore_index=-1)
    assert set(parts) == {"work_0"}
    assert total.item() == pytest.approx(0.2 * parts["work_0"].item())


def test_dropout_acts_in_training_only(make_head, small_config, small_inputs):
    head = make_head(replace(small_config, dropout=0.3, classifier_dropout=0.5))
    assert torch.equal(head(small_inputs).work[-1], head(small_inputs).work[-1])
    head.train()
    assert not torch.equal(head(small_inputs).work[-1], head(small_inputs).work[-1])


def test_autocast_and_half_weights_run(make_head, small_config, small_inputs):
    mask = padding(*MIXED, length=12)
    head = make_head(small_config)
    with torch.autocast("cpu", torch.bfloat16):
        output = head(small_inputs, padding_mask=mask)
        loss, _ = mat_loss(output, torch.rand(4, 9, 5), torch.rand(4, 6, 5), ignore_index=4)
    loss.backward()
    assert loss.isfinite()
    half = head.to(torch.bfloat16)(small_inputs.bfloat16(), padding_mask=mask)
    assert half.work[-1].isfinite().all()


def test_released_sizes():
    with torch.device("meta"):
        visual = MatHead(MatConfig(visual_size=768, num_classes=22))
        both = MatHead(MatConfig(visual_size=768, motion_size=1024, num_classes=22))
    count = [sum(p.numel() for p in head.parameters()) / 1e6 for head in (visual, both)]
    assert count == pytest.approx([98.3, 104.6], abs=0.05)
    assert len(visual.state_dict()) == 196 - 1  # the release stores its position table


def test_initialisation_is_that_of_the_release():
    head = MatHead(MatConfig(visual_size=8, num_classes=5, dim=64, num_heads=2, feedforward=32))
    attention = head.dec_modules.layers[0].self_attn
    assert attention.in_proj_bias.abs().max() == 0
    assert attention.out_proj.bias.abs().max() == 0
    assert attention.in_proj_weight.abs().max() <= math.sqrt(6 / (4 * 64))  # Xavier, fused
    assert head.final_query.weight.std().item() == pytest.approx(1, abs=0.1)


# ----- losses


def test_a_row_with_two_actions_counts_both():
    target = torch.zeros(1, 22)
    target[0, [5, 8]] = 1
    assert cross_entropy(torch.zeros(1, 22), target, 21).item() == pytest.approx(2 * math.log(21))


@pytest.mark.parametrize("equalised", [False, True])
def test_a_batch_of_ignored_rows_has_loss_zero_and_zero_gradients(
    make_head, small_config, small_inputs, equalised
):
    head = make_head(small_config).train()
    ignored = torch.zeros(4, 9, 5)
    ignored[..., 4] = 1
    rare = torch.tensor([False, True, False, False, False])
    total, parts = mat_loss(
        head(small_inputs),
        ignored,
        ignored[:, :6],
        4,
        equalised=EqualisedLoss(rare) if equalised else None,
    )
    total.backward()
    assert total.item() == 0
    assert all(part == 0 for part in parts.values())
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in head.parameters())


def test_ignored_rows_do_not_move_the_mean():
    logits, target = torch.randn(6, 5), torch.zeros(6, 5)
    target[torch.arange(6), torch.tensor([0, 1, 2, 4, 4, 4])] = 1
    whole = cross_entropy(logits, target, 4)
    torch.testing.assert_close(whole, cross_entropy(logits[:3], target[:3], 4))


def test_a_middle_ignore_column_takes_no_part():
    logits, target = torch.randn(3, 5), torch.zeros(3, 5)
    target[:, 0] = 1
    moved = logits.clone()
    moved[:, 2] += 7
    torch.testing.assert_close(cross_entropy(moved, target, 2), cross_entropy(logits, target, 2))


def test_equalised_loss_draws_between_its_ends():
    logits, target = torch.randn(400, 6), torch.zeros(400, 6)
    target[:, 1] = 1
    rare = torch.tensor([False, False, True, True, True, False])
    low, mid, high = (EqualisedLoss(rare, g)(logits, target, 0) for g in (1.0, 0.5, 0.0))
    assert low < mid < high
    torch.testing.assert_close(high, cross_entropy(logits, target, 0))


def test_stage_weights_can_be_set(make_head, small_config, small_inputs):
    output = make_head(small_config)(small_inputs)
    targets = torch.rand(4, 9, 5), torch.rand(4, 6, 5)
    total, parts = mat_loss(output, *targets, -1, stage_weights=(0, 0, 2), future_weight=0)
    torch.testing.assert_close(total, 2 * parts["work_2"])
    with pytest.raises(ValueError, match=r"stage_weights=\(1, 1\) for 3 work stages"):
        mat_loss(output, *targets, -1, stage_weights=(1, 1))


def test_verb_and_noun_losses_are_added(golden_model):
    model = golden_model("ek100_heads")
    output = model.head()(*inputs(model))
    targets = model.tensors["in/det_target"], model.tensors["in/fut_target"]
    pairs = {}
    for name, classes in (("verb", 98), ("noun", 301)):
        pairs[name] = tuple(torch.rand(2, n, classes) for n in (10, 12))
    bare, _ = mat_loss(output, *targets, 0)
    total, parts = mat_loss(
        output, *targets, 0, verb_targets=pairs["verb"], noun_targets=pairs["noun"]
    )
    added = parts["verb"] + parts["noun"] + 0.1 * (parts["future_verb"] + parts["future_noun"])
    torch.testing.assert_close(total, bare + added)
    output.verb = None
    with pytest.raises(ValueError, match="verb: logits are None"):
        mat_loss(output, *targets, 0, verb_targets=pairs["verb"])


def test_a_target_that_does_not_fit_is_named(make_head, small_config, small_inputs):
    output = make_head(small_config)(small_inputs)
    with pytest.raises(ValueError, match=r"work_0: logits are \(4, 9, 5\), target is \(4, 6, 5\)"):
        mat_loss(output, torch.rand(4, 6, 5), torch.rand(4, 6, 5), -1)


@pytest.mark.parametrize("ignore_index", [0, 2, 4, -100])
def test_probabilities_leave_the_untrained_column_out(ignore_index):
    logits = torch.randn(3, 5)
    scores = probabilities(logits, ignore_index)
    torch.testing.assert_close(scores.sum(-1), torch.ones(3))
    if ignore_index >= 0:
        assert (scores[:, ignore_index] == 0).all()
        kept = [i for i in range(5) if i != ignore_index]
        torch.testing.assert_close(scores[:, kept], logits[:, kept].softmax(-1))
    torch.testing.assert_close(probabilities(logits, ignore_index, "released"), logits.softmax(-1))
    with pytest.raises(ValueError, match="softmax='sigmoid'"):
        probabilities(logits, ignore_index, "sigmoid")


# ----- errors


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("visual_size", 0, "visual_size=0 is below 1"),
        ("long_rate", 0, "long_rate=0 is below 1"),
        ("dim", 7, "dim=7 is odd"),
        ("num_heads", 3, "dim=8 does not divide into num_heads=3"),
        ("dropout", 1.0, r"dropout=1.0 is not in \[0, 1\)"),
        ("activation", "silu", "activation='silu' is not one of"),
        ("long_grouping", "row", "long_grouping='row' is not one of"),
        ("long_rate", 5, "long_steps=24 is no multiple of long_rate=5"),
        ("work_rate", 4, "work_steps=6 is no multiple of work_rate=4"),
        ("groups", 5, "groups=5 does not divide the 12 long tokens"),
        ("anticipation_steps", 7, "anticipation_steps=7 exceeds future_tokens=6"),
        ("refinements", 0, "refinements=0 is below 1"),
        ("memory_stages", (), "memory_stages=.* must begin with learned queries"),
        ("memory_stages", ((-1, 1, True),), "memory_stages=.* must begin with learned queries"),
        ("memory_stages", ((4, 0, True),), r"memory_stages: \(4, 0, True\) has no layers"),
        ("memory_stages", ((4, 1),), r"memory_stages holds \(4, 1\)"),
        ("work_stack", (3, 1, True), r"work_stack=\(3, 1, True\) must have -1 queries"),
        ("generator", (-1, 1, True), r"generator=\(-1, 1, True\) needs learned queries"),
        ("future_stack", (5, 1, True), "must have future_tokens=6 queries"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_field_and_value(
    small_config, field, value, message
):
    with pytest.raises(ValueError, match=message):
        replace(small_config, **{field: value})


def test_a_config_names_all_its_problems_at_once(small_config):
    with pytest.raises(ValueError, match="dropout=2.*groups=5"):
        replace(small_config, dropout=2, groups=5)


def test_a_config_survives_json(small_config):
    assert MatConfig.from_dict(json.loads(json.dumps(small_config.to_dict()))) == small_config
    with pytest.raises(ValueError, match="no key 'num_head'.*did you mean 'num_heads'"):
        MatConfig.from_dict(small_config.to_dict() | {"num_head": 2})


def test_features_that_do_not_fit_are_refused(make_head, small_config, small_inputs):
    head = make_head(small_config)
    with pytest.raises(ValueError, match=r"\(4, 17, 6\), expected \(B, 18, 6\)"):
        head(small_inputs[:, 1:])
    with pytest.raises(ValueError, match="motion features given to a head with motion_size=0"):
        head(small_inputs, small_inputs)
    with pytest.raises(ValueError, match=r"padding_mask is \(4, 18\), expected \(4, 12\)"):
        head(small_inputs, padding_mask=torch.zeros(4, 18))
    with pytest.raises(ValueError, match=r"hides all entries of samples \[1\]"):
        head(small_inputs, padding_mask=padding(0, 12, 3, 0, length=12))
    two = make_head(replace(small_config, motion_size=3))
    with pytest.raises(ValueError, match="no motion features given to a head with motion_size=3"):
        two(small_inputs)
    with pytest.raises(
        ValueError, match=r"motion features are \(4, 18, 6\), expected \(4, 18, 3\)"
    ):
        two(small_inputs, small_inputs)


def test_an_equalised_loss_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="gamma=1.5"):
        EqualisedLoss(torch.tensor([True]), 1.5)
    with pytest.raises(ValueError, match="expected torch.bool"):
        EqualisedLoss(torch.ones(3))
    with pytest.raises(ValueError, match="5 action columns, but rare has 3"):
        EqualisedLoss(torch.ones(3, dtype=torch.bool))(torch.rand(2, 5), torch.rand(2, 5), 0)
