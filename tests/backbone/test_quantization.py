"""int8 linears: near to the exact ones, said so in the settings, rounded as promised."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from backbone import build_encoder
from backbone.fusion import FoldedLinear
from backbone.quantization import Int8Linear, quantize

CLIP = (2, 9, 3, 16, 16)


def test_a_linear_rounds_rows_by_themselves(difference):
    plain = FoldedLinear(nn.Linear(64, 48).requires_grad_(False), nn.GELU(), "gelu")
    with torch.no_grad():
        plain.weight[7] *= 1000  # a channel with a range of its own spoils no other
    tokens = torch.randn(3, 5, 64)
    tokens[1, 2] *= 1000  # nor does a token
    found, expected = Int8Linear(plain)(tokens), plain(tokens)
    assert found.shape == (3, 5, 48)
    for part in ((0, slice(None), slice(8, None)), (1, 2), (slice(None), slice(None), 7)):
        assert difference(found[part], expected[part]) < 0.02
    assert not torch.equal(found, expected)


def test_a_linear_without_bias_and_a_token_of_zeros():
    plain = FoldedLinear(nn.Linear(8, 8, bias=False))
    assert torch.equal(Int8Linear(plain)(torch.zeros(2, 8)), torch.zeros(2, 8))


def test_exact_where_values_are_whole():
    plain = FoldedLinear(nn.Linear(16, 16).requires_grad_(False))
    plain.weight.copy_(torch.randint(-126, 127, (16, 16)).float())
    plain.weight[:, 0] = 127
    tokens = torch.randint(-126, 127, (4, 16)).float()
    tokens[:, 3] = -127
    assert torch.equal(Int8Linear(plain)(tokens), plain(tokens))


@pytest.mark.parametrize("fields", [{}, {"lora_rank": 4}, {"qkv_bias": False}])
def test_a_model_stays_near(make_model, fields):
    model, clip = make_model(hidden_size=64, num_attention_heads=4, **fields), torch.randn(CLIP)
    quantized = quantize(model)
    with torch.no_grad():
        found, expected = quantized(clip), model(clip)
    for name in ("pooler_output", "last_hidden_state"):
        assert cosine_similarity(found[name], expected[name], dim=-1).mean() > 0.99
        assert not torch.equal(found[name], expected[name])
    kinds = {type(part) for part in quantized.layers.modules() if hasattr(part, "weight")}
    assert kinds == {Int8Linear, nn.LayerNorm}
    assert all(type(part) is not Int8Linear for part in model.modules())


def test_an_encoder_streams_and_tells(make_model, tmp_path):
    make_model(window=3, hidden_size=64).save_pretrained(tmp_path / "encoder")
    spec = f"streamformer:{tmp_path / 'encoder'}"
    encoder, exact = build_encoder(spec, int8=True), build_encoder(spec)
    assert encoder.settings() == exact.settings() | {"int8": True}
    clip = torch.randn(CLIP)
    stream = encoder.stream(2)
    found = torch.cat([stream.push(frame).frame_embeddings for frame in clip.unbind(1)], dim=1)
    assert cosine_similarity(found, exact.encode(clip).frame_embeddings, dim=-1).mean() > 0.99
    with pytest.raises(ValueError, match="saved by another encoder"):
        exact.stream(2).load_state_dict(stream.state_dict())


def test_refused_where_it_is_not_offered(make_siglip):
    with pytest.raises(ValueError, match="kind 'siglip' has no int8=; leave it out"):
        build_encoder(f"siglip:{make_siglip()}", int8=True)
