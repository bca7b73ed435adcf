"""Golden MAT models, and a head small enough to watch a stream outgrow its long memory."""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from integrations.oad.mat import MatHead
from integrations.oad.mat_config import MatConfig


@dataclass
class GoldenModel:
    info: dict
    tensors: dict[str, torch.Tensor]

    @property
    def ignore_index(self) -> int:
        return self.info["config"]["ignore_index"]

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        prefix = "param/"
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def config(self, **changes) -> MatConfig:
        heads = {}
        for name in ("verb", "noun"):
            weight = self.parameters.get(f"classifier_{name}.weight")
            heads[f"num_{name}s"] = 0 if weight is None else len(weight)
        return golden_config(self.info["config"], **heads, **changes)

    def head(self, **changes) -> MatHead:
        head = MatHead(self.config(**changes))
        head.load_state_dict(self.parameters, strict=True)
        return head.eval()


def golden_config(c: dict, **changes) -> MatConfig:
    return MatConfig(
        visual_size=c["visual_dim"],
        motion_size=c["motion_dim"] or 0,
        num_classes=c["num_classes"],
        dim=c["d_model"],
        num_heads=c["num_heads"],
        feedforward=c["dim_feedforward"],
        dropout=c["dropout"],
        activation=c["activation"],
        long_steps=c["long_memory_length"],
        long_rate=c["long_memory_sample_rate"],
        work_steps=c["work_memory_length"],
        work_rate=c["work_memory_sample_rate"],
        anticipation_steps=c["anticipation_length"],
        anticipation_rate=c["anticipation_sample_rate"],
        future_tokens=c["future_num_samples"],
        groups=c["groups"],
        refinements=c["cci_times"],
        memory_stages=c["enc_module"],
        work_stack=c["dec_module"],
        generator=c["gen_module"],
        future_stack=c["fut_module"][0],
        **changes,
    )


@pytest.fixture
def golden_model(golden):
    """``golden_model("visual_gelu")``: config, weights, inputs and outputs of one stored model."""

    def load(name: str) -> GoldenModel:
        path = golden / "oad" / f"mat_{name}"
        return GoldenModel(
            json.loads(path.with_suffix(".json").read_text()),
            load_file(path.with_suffix(".safetensors")),
        )

    return load


@pytest.fixture
def sampling(golden):
    """Stored windows and indices, with the config and video lengths they belong to."""
    stored = json.loads((golden / "oad" / "sampling.json").read_text())
    return golden_config(stored["config"]), stored


SMALL = MatConfig(
    visual_size=6,
    num_classes=5,
    dim=8,
    num_heads=2,
    feedforward=12,
    long_steps=24,
    long_rate=2,
    work_steps=6,
    anticipation_steps=3,
    future_tokens=6,
    groups=3,
    memory_stages=((4, 1, True), (-1, 1, True)),
    work_stack=(-1, 2, True),
    generator=(4, 1, True),
    future_stack=(6, 1, True),
)


@pytest.fixture
def small_config() -> MatConfig:
    """Long memory of 24 steps in 12 tokens, work memory of 6, so 40 steps see every regime."""
    return SMALL


@pytest.fixture
def make_head():
    """``make_head(config)``: a head in which no bias and no norm is neutral."""

    def make(config: MatConfig) -> MatHead:
        torch.manual_seed(1)
        head = MatHead(config)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return head.eval()

    return make
