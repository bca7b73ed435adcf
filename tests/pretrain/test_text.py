"""The text side: templates, label embeddings, and a tower that runs once per text."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import SiglipTextConfig, SiglipTextModel

from pretrain.text import TEMPLATES, TextTower, load_siglip_text, resolve_templates


class ToyTokenizer:
    """The goldens' tokenizer: id 2 + (7 * ord(c)) mod 38 per letter, then 1, padded with 0."""

    def __call__(self, texts, padding, truncation, max_length, return_tensors):
        rows = torch.zeros(len(texts), max_length, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            ids = [2 + (7 * ord(c)) % 38 for c in text[: max_length - 1]] + [1]
            row[: len(ids)] = torch.tensor(ids)
        return {"input_ids": rows}


@pytest.fixture
def golden_tower(golden):
    """The goldens' tiny text tower, its labels, and the stored numbers."""
    tensors = load_file(golden / "pretraining/label_embeddings.safetensors")
    case = json.loads((golden / "pretraining/index.json").read_text())["cases"]["label_embeddings"]
    model = SiglipTextModel(SiglipTextConfig(**case["text_config"]))
    weights = {
        key.removeprefix("text_model."): value
        for key, value in tensors.items()
        if key.startswith("text_model.")
    }
    model.load_state_dict(weights, strict=False)
    unset = set(model.state_dict()) - set(weights)
    assert not [key for key in unset if not key.endswith("position_ids")]
    return TextTower(model, ToyTokenizer(), max_length=64), case["labels"], tensors


@pytest.mark.golden
def test_prompts_equal_the_released_ones(golden):
    stored = json.loads((golden / "pretraining/templates.json").read_text())
    assert list(TEMPLATES["video"]) == stored["global"]
    assert list(TEMPLATES["plain"]) == stored["scene"]


@pytest.mark.golden
def test_label_embeddings_equal_the_released_ones(golden_tower):
    tower, labels, tensors = golden_tower
    prompts = [prompt.replace("{}", labels[0]) for prompt in TEMPLATES["video"]]
    expected = tensors["template_text_embeds"][0]
    torch.testing.assert_close(tower.embed(prompts), expected, rtol=0, atol=1e-5)
    released = tower.embed_labels(labels, "video", renormalize=False)
    torch.testing.assert_close(released, tensors["label_embeddings"], rtol=0, atol=1e-5)
    assert released.norm(dim=-1).max() < 0.99
    own = tower.embed_labels(labels, "video")
    torch.testing.assert_close(own, F.normalize(tensors["label_embeddings"], dim=-1))


def test_a_text_goes_through_the_tower_once(siglip):
    tower, _, _ = load_siglip_text(siglip)
    first = tower.embed(["move left", "move up", "move left"])
    assert tower.encoded == 2
    assert torch.equal(first[0], first[2])
    again = tower.embed(["move up", "turn"])
    assert tower.encoded == 3
    assert torch.equal(again[0], first[1])
    bank = tower.embed_labels(["a", "b"], "plain")
    assert tower.encoded == 5
    assert tower.embed_labels(["a", "b"], "plain") is bank
    assert tower.encoded == 5


def test_the_cache_forgets_the_longest_unused_text(siglip):
    tower, _, _ = load_siglip_text(siglip, cache_size=2)
    tower.embed(["a", "b"])
    tower.embed(["a", "c"])  # b goes
    tower.embed(["a", "c"])
    assert tower.encoded == 3
    tower.embed(["b"])
    assert tower.encoded == 4
    assert tower.embed(["a", "b", "c", "d"]).shape == (4, 32)  # more than fit at once


def test_a_text_has_the_same_embedding_in_any_company_to_the_bit(siglip):
    # Or a resumed run, which meets texts in another order, would drift away from the straight one.
    together, _, _ = load_siglip_text(siglip)
    alone, _, _ = load_siglip_text(siglip)
    texts = [f"move {'left ' * i}" for i in range(1, 21)]  # the last ones are cut to fit
    separately = torch.cat([alone.embed([text]) for text in texts])
    assert torch.equal(together.embed(texts), separately)


def test_text_has_no_gradient_and_may_be_used_in_one(siglip):
    tower, log_scale, bias = load_siglip_text(siglip)
    text = tower.embed(["move left"])
    assert not text.requires_grad
    weight = torch.ones(32, requires_grad=True)
    (text * weight).sum().backward()
    assert (log_scale, bias) == (pytest.approx(2.3), -2.0)


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ("videos", "no template set named 'videos'; known: video, plain"),
        (("a photo",), "template 'a photo' needs exactly one {}"),
        ((), "template set is empty"),
    ],
)
def test_templates_that_cannot_hold_a_label_are_refused(templates, message):
    with pytest.raises(ValueError, match=message):
        resolve_templates(templates)


def test_a_template_set_of_ones_own(siglip):
    tower, _, _ = load_siglip_text(siglip)
    bank = tower.embed_labels(["move left"], ("now {}", "{} again"))
    parts = F.normalize(tower.embed(["now move left", "move left again"]), dim=-1)
    torch.testing.assert_close(bank[0], F.normalize(parts.mean(0), dim=0))


def test_empty_texts_and_foreign_models_are_refused(siglip, tmp_path):
    tower, _, _ = load_siglip_text(siglip)
    with pytest.raises(ValueError, match="text 1 of 2 is empty"):
        tower.embed(["move", " "])
    SiglipTextConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a 'siglip_text_model' model"):
        load_siglip_text(tmp_path)
