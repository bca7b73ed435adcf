"""Deformable attention: parity with the original, its start, and its refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
)

from integrations.ovis.deformable import DeformableAttention, cell_centres, deformable_attention


@pytest.fixture(scope="module")
def stored(golden):
    config = json.loads((golden / "ovis/msda.json").read_text())
    return config, load_file(golden / "ovis/msda.safetensors")


@pytest.mark.golden
def test_core_and_its_gradients_equal_the_original(stored):
    config, tensors = stored
    for case in config["cases"]:
        value, places, weights = (
            tensors[f"{case}.{name}"].requires_grad_()
            for name in ("value", "sampling_locations", "attention_weights")
        )
        shapes = tensors[f"{case}.spatial_shapes"].tolist()
        output = deformable_attention(value, shapes, places, weights)
        torch.testing.assert_close(
            output, tensors[f"{case}.output"], rtol=0, atol=config["tolerance"]["forward_abs"]
        )
        (output * tensors[f"{case}.grad_output"]).sum().backward()
        for name, tensor in (
            ("value", value),
            ("sampling_locations", places),
            ("attention_weights", weights),
        ):
            torch.testing.assert_close(
                tensor.grad,
                tensors[f"{case}.grad_{name}"],
                rtol=0,
                atol=config["tolerance"]["grad_abs"],
                msg=lambda text, case=case, name=name: f"{case}, gradient of {name}: {text}",
            )


@pytest.mark.golden
def test_module_equals_the_original_with_and_without_padding(stored):
    config, tensors = stored
    sizes = config["module_config"]
    module = DeformableAttention(
        sizes["d_model"], sizes["n_heads"], sizes["n_levels"], sizes["n_points"]
    )
    torch.testing.assert_close(
        module.sampling_offsets.bias.detach(), tensors["module_init.sampling_offsets.bias"]
    )
    prefix = "module.state."
    module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if prefix in k})
    arguments = (
        tensors["module.query"],
        tensors["module.reference_points"],
        tensors["module.input_flatten"],
        tensors["module.spatial_shapes"].tolist(),
    )
    for name, padding in (("output", None), ("output_padded", tensors["module.padding_mask"])):
        torch.testing.assert_close(
            module(*arguments, padding), tensors[f"module.{name}"], rtol=0, atol=1e-5
        )


def test_a_fresh_module_starts_as_transformers_does_in_mask2former():
    """The start that a generic initialisation must not erase: directions, zero weights."""
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerPreTrainedModel

    stock = Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention(32, 8, 3, 4)
    Mask2FormerPreTrainedModel(Mask2FormerConfig())._init_weights(stock)
    ours = DeformableAttention(32, 8, 3, 4)
    for key in ("sampling_offsets.bias", "sampling_offsets.weight", "attention_weights.weight"):
        torch.testing.assert_close(ours.state_dict()[key], stock.state_dict()[key])
    assert ours.sampling_offsets.bias.abs().max() == 4


def test_cells_have_their_centres_row_by_row():
    centres = cell_centres([(1, 2), (2, 1)], torch.empty(0))
    assert centres.tolist() == [[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]]


def test_refusals_name_the_numbers():
    with pytest.raises(ValueError, match="width=10 is not a multiple of num_heads=4"):
        DeformableAttention(10, 4, 1, 1)
    module = DeformableAttention(8, 2, 1, 1)
    tokens = torch.zeros(1, 5, 8)
    with pytest.raises(ValueError, match="5 cells of features for levels .*which hold 6"):
        module(tokens, torch.zeros(1, 5, 1, 2), tokens, [(2, 3)])
