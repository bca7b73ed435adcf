"""Visual tokens in prompts, against the published code."""

import pytest
import torch
from torch.testing import assert_close

from integrations.videoqa import visual
from integrations.videoqa.splice import splice, unpad


@pytest.mark.golden
def test_splice(golden_file):
    description, tensors = golden_file("splice")
    embed = torch.nn.Embedding.from_pretrained(tensors["embed_tokens.weight"])
    project = visual.build_projector("mlp2x_gelu", description["d_in"], description["d_out"])
    prefix = "projector."
    project.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if prefix in k})
    newline = tensors["image_newline"]
    for case in description["cases"]:
        stem, config = f"case{case['case']}.", case["config"]
        merge, position = config["mm_patch_merge_type"], config["mm_newline_position"]
        tokens = []
        for number, modality in enumerate(case["modalities"]):
            projected = project(tensors[f"{stem}features.{number}"])
            if modality == "video":
                pooled = visual.pool_patches(projected, config["mm_spatial_pool_mode"], 2)
                frames = visual.lay_out_frames(pooled, newline, merge, position)
                tokens.append(visual.join_frames(frames, newline, merge, position))
            elif modality == "image":
                tokens.append(visual.lay_out_image(projected, (1, 1), None, newline, merge))
        ids, mask = tensors[f"{stem}input_ids"], tensors.get(f"{stem}attention_mask_in")
        labels = tensors.get(f"{stem}labels_in")
        found = splice(
            unpad(ids, mask),
            tokens,
            embed,
            None if labels is None else unpad(labels, mask),
            max_length=config["tokenizer_model_max_length"],
            padding_side=config.get("tokenizer_padding_side", "right"),
            missing="repeat" if "reused" in case["name"] else "refuse",
        )
        wanted = tensors[f"{stem}inputs_embeds"]
        assert_close(found.inputs_embeds, wanted, atol=1e-5, rtol=1e-4, msg=case["name"])
        for name in case["returned"]:
            assert torch.equal(getattr(found, name), tensors[stem + name]), (case["name"], name)


@pytest.mark.parametrize(("placeholders", "visuals"), [(2, 1), (1, 2), (1, 0), (0, 1)])
def test_a_placeholder_for_each_visual(placeholders, visuals):
    rows = [torch.tensor([1, *[-200] * placeholders])]
    tokens = [torch.zeros(3, 4)] * visuals
    with pytest.raises(ValueError, match=f"hold {placeholders} placeholders.*{visuals} visuals"):
        splice(rows, tokens, torch.nn.Embedding(5, 4))


def test_gradients_reach_words_and_visuals():
    embed, tokens = torch.nn.Embedding(5, 4), torch.randn(3, 4, requires_grad=True)
    splice([torch.tensor([1, -200, 2])], [tokens], embed).inputs_embeds.sum().backward()
    assert torch.equal(tokens.grad, torch.ones(3, 4))
    assert embed.weight.grad.sum(1).tolist() == [0, 4, 4, 0, 0]


def test_a_batch_is_its_rows_padded():
    embed = torch.nn.Embedding(9, 4)
    rows = [torch.tensor([1, -200, 2]), torch.tensor([3, 4]), torch.tensor([-200, -200])]
    tokens = [torch.randn(count, 4) for count in (5, 1, 2)]
    batch = splice(rows, tokens, embed, padding_side="left")
    alone = [splice(rows[:1], tokens[:1], embed), splice(rows[1:2], [], embed)]
    alone.append(splice(rows[2:], tokens[1:], embed))
    for row, single in enumerate(alone):
        length = single.inputs_embeds.shape[1]
        assert torch.equal(batch.inputs_embeds[row, -length:], single.inputs_embeds[0])
        assert batch.attention_mask[row].sum() == length
        assert torch.equal(batch.position_ids[row, -length:], torch.arange(length))
