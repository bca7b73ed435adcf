"""Schedule and parameter groups: equal to the released ones, or better by name."""

import json

import pytest

from backbone import StreamformerConfig, StreamformerModel
from pretrain.config import OptimConfig
from pretrain.model import MultitaskModel, freeze
from pretrain.optim import learning_rate, parameter_groups

# Released names of one layer, and ours.
RENAMES = {
    "timesformer.": "backbone.",
    "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
    "position_embeddings": "position_embedding",
    "time_embeddings": "time_embedding",
    "encoder.layer.0.": "layers.0.",
    "temporal_attention_gating": "temporal_gate",
    "temporal_attention.attention.qkv": "temporal_attention.qkv",
    "temporal_attention.output.dense": "temporal_attention.out",
    "temporal_layernorm": "temporal_norm",
    "layernorm_before": "spatial_norm",
    "layernorm_after": "mlp_norm",
    ".attention.attention.qkv_lora_a": ".spatial_attention.qkv.lora_A.default",
    ".attention.attention.qkv_lora_b": ".spatial_attention.qkv.lora_B.default",
    ".attention.output.dense_lora_a": ".spatial_attention.out.lora_A.default",
    ".attention.output.dense_lora_b": ".spatial_attention.out.lora_B.default",
    ".attention.attention.qkv": ".spatial_attention.qkv.base_layer",
    ".attention.output.dense": ".spatial_attention.out.base_layer",
    "intermediate.dense": "mlp.fc1",
    "layers.0.output.dense": "layers.0.mlp.fc2",
}


def own_name(name):
    for released, ours in RENAMES.items():
        name = name.replace(released, ours)
    return name


@pytest.fixture
def model():
    shape = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    config = StreamformerConfig(
        image_size=32, patch_size=8, num_hidden_layers=1, lora_rank=4, **shape
    )
    return MultitaskModel(StreamformerModel(config), {}, None)


def names_of(model, decay):
    groups = parameter_groups(model.named_parameters(), 0.05, decay)
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    return [{names[id(weight)] for weight in group["params"]} for group in groups]


@pytest.mark.golden
def test_released_groups_and_frozen_weights(golden, model):
    stored = json.loads((golden / "pretraining/parameters.json").read_text())
    expected = {
        group: {own_name(name) for name in stored[group] if name.startswith("timesformer.")}
        for group in ("decay", "no_decay", "frozen")
    }
    decay, no_decay = names_of(model, "released")
    assert decay == expected["decay"] | {"log_scale", "bias"}
    assert no_decay == expected["no_decay"]
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == expected["frozen"]


def test_only_matrices_decay_by_default(model):
    decay, no_decay = names_of(model, "matrices")
    weights = dict(model.named_parameters())
    assert all(weights[name].ndim >= 2 for name in decay)
    spared = {name.rpartition(".")[2] for name in no_decay if weights[name].ndim >= 2}
    assert spared == {"position_embedding", "time_embedding", "probe"}
    assert decay | no_decay == {name for name, weight in weights.items() if weight.requires_grad}


def test_what_the_lift_adds_learns_at_a_rate_of_its_own(model):
    parameters = dict(model.named_parameters())
    names = {id(weight): name for name, weight in parameters.items()}

    def scales(temporal_lr_scale):
        groups = parameter_groups(parameters.items(), 0.05, "matrices", temporal_lr_scale)
        return {
            names[id(weight)]: (group["lr_scale"], group["weight_decay"])
            for group in groups
            for weight in group["params"]
        }

    alike, faster = scales(1.0), scales(3.0)
    assert alike.keys() == faster.keys(), "each weight is in one group"
    assert {scale for scale, _ in alike.values()} == {1.0}
    changed = {name for name in alike if faster[name] != alike[name]}
    assert {faster[name][0] for name in changed} == {3.0}
    assert changed == {
        "backbone.embeddings.time_embedding",
        "backbone.layers.0.temporal_gate",
        *(
            f"backbone.layers.0.temporal_{part}.{kind}"
            for part in ("norm", "attention.qkv", "attention.out", "dense")
            for kind in ("weight", "bias")
        ),
    }
    assert all(alike[name][1] == faster[name][1] for name in alike), "decay does not change"
    with pytest.raises(ValueError, match="temporal_lr_scale=0 must be positive"):
        OptimConfig(updates=1, temporal_lr_scale=0)


def test_freezing_by_rule(model):
    freeze(model.backbone, "image")
    training = {name for name, w in model.backbone.named_parameters() if w.requires_grad}
    assert all("temporal" in name or "time_" in name or "lora_" in name for name in training)
    assert len([name for name in training if "lora_" in name]) == 4
    plain = StreamformerModel(
        StreamformerConfig(
            hidden_size=32, num_attention_heads=4, intermediate_size=64, num_hidden_layers=1
        )
    )
    freeze(plain, "none")
    assert all(w.requires_grad for w in plain.parameters())
    freeze(plain, "spatial_attention")
    frozen = {name for name, w in plain.named_parameters() if not w.requires_grad}
    assert frozen == {
        f"layers.0.spatial_attention.{part}.{kind}"
        for part in ("qkv", "out")
        for kind in ("weight", "bias")
    }


@pytest.mark.golden
@pytest.mark.parametrize(
    ("curve", "warmup", "lowest"),
    [
        ("cosine_no_warmup", 0, 0.0),
        ("cosine_warmup_1_epoch_min_1e-6", 6, 1e-6),
        ("cosine_warmup_4_steps", 4, 0.0),
    ],
)
def test_rates_equal_the_released_schedule(golden, curve, warmup, lowest):
    stored = json.loads((golden / "pretraining/schedule.json").read_text())
    clips = stored["batch_size"] * stored["update_freq"] * stored["world_size"]
    optim = OptimConfig(
        updates=stored["epochs"] * stored["updates_per_epoch"],
        lr=stored["base_lr"],
        min_lr=lowest * 256 / clips,  # named after scaling
        warmup_updates=warmup,
        scale_lr=True,
    )
    rates = [learning_rate(optim, update, clips) for update in range(optim.updates)]
    assert rates == pytest.approx(stored[curve], rel=1e-6, abs=1e-12)
    assert learning_rate(OptimConfig(updates=10, lr=3e-4), 0, clips) == 3e-4
