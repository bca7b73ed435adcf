"""Texts against a clip, its frames and its patches: what the numbers are, and what is refused."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from backbone import build_encoder, lift_siglip, video
from backbone.video import VideoError
from pretrain import align
from pretrain.text import load_siglip_text

TEXTS = ["a square going left", "a square going up", "noise"]


@pytest.fixture(scope="module")
def tower(siglip):
    return load_siglip_text(siglip)[0]


@pytest.fixture(scope="module", params=["siglip", "streamformer"])
def encoder(request, siglip, tmp_path_factory):
    if request.param == "siglip":
        return build_encoder(f"siglip:{siglip}")
    folder = tmp_path_factory.mktemp("lifted")
    lift_siglip(siglip, num_frames=8, gate=1.0, time_scale=0.5).save_pretrained(folder)
    return build_encoder(f"streamformer:{folder}")


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)


def cosines(features, tower):
    return F.normalize(features, dim=-1) @ F.normalize(tower.embed(TEXTS), dim=-1).T


def test_every_level_is_the_cosine_with_the_features_of_that_level(encoder, tower, frames):
    found = align(encoder, tower, frames, TEXTS)
    clip = video.preprocess(frames, 32, (0.5,) * 3, (0.5,) * 3)
    features = encoder.encode(clip[None])
    assert found.texts == tuple(TEXTS)
    torch.testing.assert_close(found.frames, cosines(features.frame_embeddings[0], tower))
    patches = cosines(features.patch_embeddings()[0], tower)  # (T, N, C)
    assert found.patches.shape == (6, 4, 4, 3)
    for row, column in ((0, 0), (0, 3), (2, 1)):  # patches go along the rows
        torch.testing.assert_close(found.patches[:, row, column], patches[:, 4 * row + column])
    assert torch.equal(found.clip, found.frames[-1])
    assert found.frames.std() > 1e-3 and found.patches.std() > 1e-3


def test_later_frames_change_nothing_before(encoder, tower, frames):
    whole, part = align(encoder, tower, frames, TEXTS), align(encoder, tower, frames[:4], TEXTS)
    torch.testing.assert_close(whole.frames[:4], part.frames)
    torch.testing.assert_close(whole.patches[:4], part.patches)
    torch.testing.assert_close(part.clip, whole.frames[3])


def test_texts_are_apart_and_in_order(encoder, tower, frames):
    whole = align(encoder, tower, frames, TEXTS)
    turned = align(encoder, tower, frames, TEXTS[::-1])
    torch.testing.assert_close(turned.patches, whole.patches.flip(-1))
    one = align(encoder, tower, frames, TEXTS[1:2])
    torch.testing.assert_close(one.frames, whole.frames[:, 1:2])


def test_frames_are_cropped_to_the_encoders_square(encoder, tower, frames):
    wide = np.concatenate([frames * 0, frames, frames * 0], axis=2)  # black to both sides
    found, expected = (align(encoder, tower, images, TEXTS) for images in (wide, frames))
    torch.testing.assert_close(found.patches, expected.patches)


def test_probabilities_are_those_of_the_sigmoid_loss(encoder, tower, frames):
    found = align(encoder, tower, frames, TEXTS)
    probable = found.probabilities(scale=10.0, bias=-2.0)
    torch.testing.assert_close(probable.clip, torch.sigmoid(10 * found.clip - 2))
    torch.testing.assert_close(probable.patches, torch.sigmoid(10 * found.patches - 2))


def test_nothing_to_compare_is_refused(encoder, tower, frames):
    with pytest.raises(ValueError, match="6 frames and 0 texts: give at least one of each"):
        align(encoder, tower, frames, [])
    with pytest.raises(ValueError, match="0 frames and 3 texts"):
        align(encoder, tower, frames[:0], TEXTS)
    with pytest.raises(ValueError, match="text 1 of 2 is empty"):
        align(encoder, tower, frames, ["a square", " "])
    with pytest.raises(VideoError, match=r"frames of shape \(6, 3, 32, 32\)"):
        align(encoder, tower, frames.transpose(0, 3, 1, 2), TEXTS)


def test_a_tower_of_another_width_is_refused(encoder, tower, frames):
    class Wider:
        device = tower.device

        def embed(self, texts):
            return torch.ones(len(texts), 48)

    with pytest.raises(ValueError, match="features have width 32 and texts 48"):
        align(encoder, Wider(), frames, TEXTS)
