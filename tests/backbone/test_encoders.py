"""The one interface of all encoders: two of the house, and any third party's."""

import json
import pickle
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import SiglipVisionModel

from backbone import (
    CheckpointError,
    FrameFeatures,
    SiglipEncoder,
    StreamformerEncoder,
    VideoEncoder,
    build_encoder,
    lift_siglip,
    register_encoder,
)
from backbone import encoders as module

KINDS = ["siglip", "streamformer"]


@pytest.fixture
def make_encoder(make_siglip, make_model, tmp_path):
    """An encoder of either kind, built from its spec."""

    def make(kind, **options):
        if kind == "siglip":
            return build_encoder(f"siglip:{make_siglip()}", **options)
        fields = {"lora_rank": 4, "window": 5}
        make_model(**fields).save_pretrained(tmp_path / "streamformer")
        return build_encoder(f"streamformer:{tmp_path / 'streamformer'}", **options)

    return make


@pytest.fixture
def foreign_kinds():
    """Forget encoders registered by a test."""
    known = dict(module._BUILDERS)
    yield
    module._BUILDERS.clear()
    module._BUILDERS.update(known)


def cat(features):
    """Join the features of successive chunks."""
    return FrameFeatures(
        torch.cat([f.patch_tokens for f in features], dim=1),
        torch.cat([f.frame_embeddings for f in features], dim=1),
        {n: torch.cat([f.layers[n] for f in features], dim=1) for n in features[0].layers},
    )


def parts(features):
    return [features.patch_tokens, features.frame_embeddings, *features.layers.values()]


# -- one contract ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_contract(make_encoder, kind):
    encoder = make_encoder(kind)
    assert isinstance(encoder, {"siglip": SiglipEncoder, "streamformer": StreamformerEncoder}[kind])
    assert encoder.kind == kind
    assert encoder.name.startswith(f"{kind}:/")
    assert (encoder.embed_dim, encoder.patch_size, encoder.image_size) == (16, 8, 16)
    assert encoder.num_layers == 2
    assert encoder.image_mean == encoder.image_std == (0.5, 0.5, 0.5)
    assert (encoder.device, encoder.dtype) == (torch.device("cpu"), torch.float32)
    for clip in (torch.randn(2, 7, 3, 16, 16), torch.randn(1, 3, 3, 24, 32)):
        features = encoder.encode(clip, layers=[1, -1, 0])
        batch, frames = clip.shape[:2]
        shape = (batch, frames, clip[0, 0, 0].numel() // 64, 16)
        assert features.patch_tokens.shape == shape
        assert features.frame_embeddings.shape == (batch, frames, 16)
        assert list(features.layers) == [1, -1, 0]
        assert all(tokens.shape == shape for tokens in features.layers.values())
        assert encoder.encode(clip).layers == {}


@pytest.mark.parametrize("kind", KINDS)
def test_stays_frozen(make_encoder, kind):
    encoder = make_encoder(kind)
    around = nn.Sequential(encoder).train()
    assert around.training
    assert not any(part.training for part in encoder.modules())
    assert not any(weight.requires_grad for weight in encoder.parameters())
    clip = torch.randn(1, 2, 3, 16, 16, requires_grad=True)
    features = encoder.encode(clip)
    assert not features.patch_tokens.requires_grad
    head = nn.Linear(16, 3)  # which trains on the features
    head(features.patch_tokens).sum().backward()
    head(encoder.stream().push(clip[:, 0]).frame_embeddings).sum().backward()
    assert head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_layers_count_alike(make_encoder, kind):
    """0 is the embeddings, -1 the last one before the final norm, which gives the patch tokens."""
    encoder = make_encoder(kind)
    features = encoder.encode(torch.randn(2, 4, 3, 16, 16), layers=[0, 1, 2, -1, -2, -3])
    layers = features.layers
    for positive, negative in ((0, -3), (1, -2), (2, -1)):
        assert torch.equal(layers[positive], layers[negative])
    assert not torch.equal(layers[0], layers[1])
    assert not torch.equal(layers[1], layers[2])
    normed = encoder.model.post_layernorm(layers[-1])
    torch.testing.assert_close(normed, features.patch_tokens)
    assert (layers[-1] - features.patch_tokens).abs().max() > 0.01
    for number in (3, -4):
        with pytest.raises(ValueError, match=f"layer {number} of .*layers 0 .* to 2, or -3 to -1"):
            encoder.encode(torch.randn(1, 1, 3, 16, 16), layers=[number])
        with pytest.raises(ValueError, match=f"layer {number} of"):
            encoder.stream(layers=[number])


def test_layers_are_those_of_transformers(make_siglip):
    folder = make_siglip()
    frames = torch.randn(2, 3, 3, 16, 16)
    out = SiglipVisionModel.from_pretrained(folder)(frames.flatten(0, 1), output_hidden_states=True)
    features = build_encoder(f"siglip:{folder}").encode(frames, layers=range(3))
    torch.testing.assert_close(features.patch_tokens.flatten(0, 1), out.last_hidden_state)
    torch.testing.assert_close(features.frame_embeddings.flatten(0, 1), out.pooler_output)
    assert len(out.hidden_states) == 3
    for number, tokens in features.layers.items():
        torch.testing.assert_close(tokens.flatten(0, 1), out.hidden_states[number])


@pytest.mark.parametrize("whole", [True, False])
def test_a_lifted_encoder_is_its_source(make_siglip, difference, whole, tmp_path):
    """With gates at zero the two encoders of a comparison start equal, in all that they give."""
    folder = make_siglip(whole)
    lift_siglip(folder, lora_rank=4, window=3).save_pretrained(tmp_path / "lifted")
    siglip = build_encoder(f"siglip:{folder}")
    lifted = build_encoder(f"streamformer:{tmp_path / 'lifted'}")
    clip = torch.randn(2, 9, 3, 16, 16)
    layers = [0, 1, 2]
    expected = siglip.encode(clip, layers)
    for found in (lifted.encode(clip, layers), lifted.stream(2, layers).push(clip)):
        assert max(map(difference, parts(found), parts(expected))) < 1e-5
    assert lifted.settings()["kind"] != siglip.settings()["kind"]


# -- streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_gives_what_encode_gives(make_encoder, difference, kind):
    encoder = make_encoder(kind)
    clip = torch.randn(2, 20, 3, 16, 24)
    stream = encoder.stream(batch_size=2, layers=[1, -1])
    assert (stream.memory_bytes, stream.positions) == (0, [0, 0])
    pieces = [stream.push(clip[:, 0])]  # one frame, (B, 3, H, W)
    pieces += [stream.push(chunk) for chunk in clip[:, 1:].split([1, 9, 2, 7], dim=1)]
    expected = encoder.encode(clip, layers=[1, -1])
    assert max(map(difference, parts(cat(pieces)), parts(expected))) < 1e-5
    assert stream.positions == [20, 20]
    # layers, keys and values, rows, patches, window, width, bytes
    assert stream.memory_bytes == (0 if kind == "siglip" else 2 * 2 * 2 * 6 * 5 * 16 * 4)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_and_go(make_encoder, difference, kind):
    encoder = make_encoder(kind)
    stream, clips = encoder.stream(batch_size=3), torch.randn(3, 12, 3, 16, 16)

    def check(found, row, frames):
        expected = encoder.encode(clips[row : row + 1, : frames.stop]).frame_embeddings[:, frames]
        assert difference(found, expected) < 1e-5

    stream.push(clips[:, :2])
    out = stream.push(clips[[2, 0], 2:5], rows=[2, 0])
    check(out.frame_embeddings[:1], 2, slice(2, 5))
    check(out.frame_embeddings[1:], 0, slice(2, 5))
    assert stream.positions == [5, 2, 5]
    stream.reset(rows=[0])
    assert stream.positions == [0, 2, 5]
    check(stream.push(clips[:1, 0], rows=[0]).frame_embeddings, 0, slice(0, 1))
    check(stream.push(clips[1:2, 2:9], rows=[1]).frame_embeddings, 1, slice(2, 9))
    assert stream.positions == [1, 9, 5]
    stream.reset()
    assert (stream.positions, stream.memory_bytes) == ([0, 0, 0], 0)
    stream.push(torch.randn(3, 1, 3, 24, 24))  # all began anew: another size may come


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_restore(make_encoder, tmp_path, kind):
    encoder = make_encoder(kind)
    clip = torch.randn(2, 20, 3, 16, 16)
    stream = encoder.stream(2)
    stream.push(clip[:, :11])
    path = tmp_path / "stream.safetensors"
    save_file(stream.state_dict(), path)
    expected = stream.push(clip[:, 11:])
    restored = encoder.stream(2)
    restored.load_state_dict(load_file(path))
    assert restored.positions == [11, 11]
    assert restored.memory_bytes == stream.memory_bytes
    assert all(map(torch.equal, parts(restored.push(clip[:, 11:])), parts(expected)))
    stream.load_state_dict(load_file(path))  # back to where it was
    assert stream.positions == [11, 11]
    assert all(map(torch.equal, parts(stream.push(clip[:, 11:])), parts(expected)))
    stream.load_state_dict(encoder.stream(2).state_dict())  # saved before the first frame
    assert (stream.positions, stream.memory_bytes) == ([0, 0], 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_moves_into_another_batch(make_encoder, difference, kind):
    encoder = make_encoder(kind)
    clips = torch.randn(2, 20, 3, 16, 16)
    first, second = encoder.stream(2), encoder.stream(3)
    first.push(clips[:, :9])
    second.load_state_dict(first.state_dict(rows=[1]), rows=[2])
    assert second.positions == [0, 0, 9]
    out = second.push(torch.stack([clips[0, 0], clips[1, 9]])[:, None], rows=[0, 2])
    expected = [encoder.encode(clips[:1, :1]), encoder.encode(clips[1:, :10])]
    for row in (0, 1):
        found = out.frame_embeddings[row, -1]
        assert difference(found, expected[row].frame_embeddings[0, -1]) < 1e-5
    second.load_state_dict(encoder.stream(1).state_dict(), rows=[2])
    assert second.positions == [1, 0, 0]


def test_a_stream_begun_in_inference_mode_goes_on_outside(make_encoder):
    encoder = make_encoder("streamformer")
    with torch.inference_mode():
        stream = encoder.stream(2)
        stream.push(torch.randn(2, 9, 3, 16, 16))
        state = stream.state_dict()
    stream.reset(rows=[1])
    stream.push(torch.randn(2, 9, 3, 16, 16))
    stream.load_state_dict(state)
    assert stream.positions == [9, 9]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_refuses_and_goes_on_unharmed(make_encoder, difference, kind):
    encoder = make_encoder(kind)
    clip = torch.randn(2, 4, 3, 16, 16)
    stream = encoder.stream(2)
    for frames, rows, message in (
        (torch.randn(2, 3, 16, 20), None, "16 x 20 pixels do not divide into patches of 8"),
        (torch.randn(3, 3, 16, 16), None, r"frames for 3 streams, expected 2; .*rows=\[...\]"),
        (torch.randn(2, 3, 16, 16), [0], "frames for 2 streams, expected 1"),
        (torch.randn(2, 3, 16, 16), [0, 2], r"rows=\[0, 2\]: name some of the streams 0 to 1"),
        (torch.randn(2, 3, 16, 16), [1, 1], r"rows=\[1, 1\]: name some of the streams 0 to 1"),
        (torch.randn(0, 3, 16, 16), [], r"rows=\[\]: name some"),
        (torch.randn(3, 16, 16), None, r"shape \(3, 16, 16\); expected \(B, T, 3, H, W\)"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.push(frames, rows)
    stream.push(clip[:, :3])  # what was refused before the first frame has fixed no size
    with pytest.raises(ValueError, match="frames of 24 x 16 pixels in a stream of 16 x 16; resize"):
        stream.push(torch.randn(2, 3, 24, 16))
    broken = clip[:, 3].clone()
    broken[1, 0, 5, 5] = torch.nan
    with pytest.raises(ValueError, match="frame 0 of clip 1 holds NaN or infinity"):
        stream.push(broken)
    with pytest.raises(ValueError, match=r"rows=\[5\]: name some"):
        stream.reset(rows=[5])
    assert stream.positions == [3, 3]
    found = stream.push(clip[:, 3]).frame_embeddings[:, 0]
    assert difference(found, encoder.encode(clip).frame_embeddings[:, 3]) < 1e-5


def test_a_state_of_something_else_is_refused(make_encoder, make_model, tmp_path):
    encoder = make_encoder("streamformer")
    stream = encoder.stream(2)
    stream.push(torch.randn(2, 7, 3, 16, 16))
    state = stream.state_dict()
    with pytest.raises(ValueError, match=r"not the state of a stream: it holds \['positions'\]"):
        stream.load_state_dict({"positions": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"holds 2 streams, asked for 1; .*batch_size=2"):
        encoder.stream(1).load_state_dict(state)
    with pytest.raises(ValueError, match="name some of the streams 0 to 1"):
        stream.load_state_dict(state, rows=[2])
    source = encoder.name.partition(":")[2]
    others = [
        build_encoder(encoder.name, window=6),
        build_encoder(encoder.name, temporal_positions="cycle"),
        StreamformerEncoder(make_model(lora_rank=4, window=5)),
        make_encoder("siglip"),
    ]
    for other in others:
        with pytest.raises(ValueError, match="saved by another encoder than"):
            other.stream(2).load_state_dict(state)
    begun = encoder.stream(2)
    begun.push(torch.randn(2, 3, 24, 24))
    with pytest.raises(ValueError, match="frames of 16 x 16 pixels in a stream of 24 x 24"):
        begun.load_state_dict(stream.state_dict(rows=[0]), rows=[0])
    build_encoder(f"streamformer:{source}").stream(2).load_state_dict(state)
    assert stream.positions == [7, 7]


def test_what_cannot_stream_says_so(make_model):
    frame = torch.randn(1, 3, 16, 16)
    with pytest.raises(ValueError, match='"nearest".*cannot stream; load the model with'):
        StreamformerEncoder(make_model(temporal_positions="nearest")).stream().push(frame)
    with pytest.raises(ValueError, match="causal=False.*cannot stream"):
        StreamformerEncoder(make_model(causal=False)).stream().push(frame)
    with pytest.raises(ValueError, match="batch_size=0: a stream needs at least one row"):
        StreamformerEncoder(make_model()).stream(0)


# -- edge -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (torch.zeros(2, 3, 16, 16), r"shape \(2, 3, 16, 16\); expected \(B, T, 3, H, W\)"),
        (torch.zeros(1, 2, 1, 16, 16), r"expected \(B, T, 3, H, W\)"),
        (torch.zeros(1, 0, 3, 16, 16), "not empty"),
        (torch.zeros(1, 2, 3, 16, 16).byte(), "type torch.uint8; expected normalised floats"),
        (torch.zeros(1, 2, 3, 12, 16), "12 x 16 pixels do not divide into patches of 8"),
        (torch.tensor([0.0, torch.inf])[None, :, None, None, None].expand(1, 2, 3, 16, 16),
         "frame 1 of clip 0 holds NaN or infinity; mend or drop it"),
    ],
)  # fmt: skip
def test_refuses_clips_that_do_not_fit(make_encoder, kind, clip, message):
    with pytest.raises(ValueError, match=message):
        make_encoder(kind).encode(clip)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(make_encoder, difference, kind):
    clip = torch.randn(1, 7, 3, 16, 16)
    single = make_encoder(kind)
    expected = single.encode(clip).frame_embeddings
    encoder = build_encoder(single.name, dtype=torch.bfloat16)
    assert encoder.dtype == torch.bfloat16
    features, stream = encoder.encode(clip), encoder.stream()
    assert features.patch_tokens.dtype == torch.bfloat16
    assert difference(features.frame_embeddings.float(), expected) < 0.15
    found = [stream.push(frame).frame_embeddings for frame in clip.unbind(1)]
    assert difference(torch.cat(found, dim=1).float(), expected) < 0.15
    assert encoder.settings()["dtype"] == "bfloat16"


# -- settings -------------------------------------------------------------------------------------


def test_settings_tell_what_decides_the_numbers(make_encoder, make_model, make_siglip):
    encoder = make_encoder("streamformer")
    settings = encoder.settings()
    assert json.loads(json.dumps(settings)) == settings
    assert {name: settings[name] for name in settings if name != "weights"} == {
        "kind": "streamformer", "fused": True, "causal": True, "window": 5, "num_frames": 6,
        "temporal_attention": True, "temporal_positions": "hold", "dtype": "float32",
    }  # fmt: skip
    assert build_encoder(encoder.name).settings() == settings
    assert build_encoder(encoder.name, window=9).settings() == settings | {"window": 9}
    changed = build_encoder(encoder.name, temporal_positions="reset").settings()
    assert changed == settings | {"temporal_positions": "reset"}
    half = build_encoder(encoder.name, dtype=torch.bfloat16).settings()
    assert half == settings | {"dtype": "bfloat16"}  # the digest is of the weights as stored
    siglip = make_encoder("siglip").settings()
    assert set(siglip) == {"kind", "weights", "dtype"}
    assert siglip["weights"] != settings["weights"]


def test_digest_sees_every_weight(make_model):
    model = make_model()
    seen = {StreamformerEncoder(model).weights_digest}
    for weight in model.parameters():
        with torch.no_grad():
            weight.flatten()[-1] += 1e-3
        digest = StreamformerEncoder(model).weights_digest
        assert digest not in seen
        seen.add(digest)
    assert StreamformerEncoder(model, fused=False).weights_digest == digest
    assert StreamformerEncoder(model.bfloat16()).weights_digest != digest


@pytest.mark.parametrize("fused", [True, False])
def test_fused_or_not(make_model, difference, fused):
    model = make_model(lora_rank=4)
    encoder = StreamformerEncoder(model, fused=fused)
    assert encoder.settings()["fused"] == fused
    assert (encoder.model is model) == (not fused)
    clip = torch.randn(1, 7, 3, 16, 16)
    expected = model(clip).pooler_output.detach()
    assert difference(encoder.encode(clip).frame_embeddings, expected) < 1e-5
    pickle.loads(pickle.dumps(encoder)).encode(clip)


# -- building by name -----------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["siglip", "siglip:", "/some/folder", ""])
def test_a_spec_names_kind_and_source(spec):
    with pytest.raises(ValueError, match=f"encoder '{spec}' names no kind; write siglip:<folder"):
        build_encoder(spec)


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="no encoder of kind 'clip'; known are siglip, streamfor"):
        build_encoder("clip:somewhere")


def test_a_window_without_effect_is_pointed_out(make_encoder, caplog):
    name = make_encoder("streamformer").name  # num_frames=6
    build_encoder(name, window=6, temporal_positions="reset")
    build_encoder(name, window=7, temporal_positions="cycle")
    assert "changes nothing" not in caplog.text
    build_encoder(name, window=7, temporal_positions="reset")
    assert "window=7 changes nothing" in caplog.text
    assert "starts anew every 6 frames" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_that_is_not_there(kind, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such file or folder"):
        build_encoder(f"{kind}:{tmp_path}/nowhere")


def test_sources_of_the_other_kind(make_encoder):
    siglip, streamformer = (make_encoder(kind).name.partition(":")[2] for kind in KINDS)
    with pytest.raises(CheckpointError, match="backbone.lift_siglip makes a video encoder of it"):
        build_encoder(f"streamformer:{siglip}")
    with pytest.raises(CheckpointError, match="needed is a SigLIP image tower"):
        build_encoder(f"siglip:{streamformer}")


def test_a_tower_without_a_pooling_head(make_siglip):
    folder = make_siglip(vision_use_head=False)
    with pytest.raises(ValueError, match="no pooling head: it gives no frame embeddings"):
        build_encoder(f"siglip:{folder}")


def test_released_and_training_checkpoints(released):
    folder = released("lora")
    encoder = build_encoder(f"streamformer:{folder}", window=3)
    assert encoder.settings()["window"] == 3
    assert encoder.encode(torch.randn(1, 9, 3, 32, 32)).frame_embeddings.shape == (1, 9, 32)


class MeanColour(VideoEncoder):
    """The smallest encoder: a patch is its mean colour."""

    kind, embed_dim, patch_size, image_size, num_layers = "colour", 3, 8, 16, 1

    def __init__(self, gain):
        super().__init__()
        self.name, self.gain = "colour", nn.Parameter(torch.tensor(float(gain)))

    def settings(self):
        return {"kind": self.kind, "gain": self.gain.item()}

    def _features(self, frames, memory, layers):
        patches = nn.functional.avg_pool2d(frames.flatten(0, 1), 8) * self.gain  # (B*t, 3, h, w)
        tokens = patches.flatten(2).transpose(1, 2).unflatten(0, frames.shape[:2])
        return FrameFeatures(tokens, tokens.mean(2), dict.fromkeys(layers, tokens))


def test_third_parties_register(foreign_kinds):
    asked = {}

    def build(source, window=None, temporal_positions=None):
        asked.update(source=source, window=window, temporal_positions=temporal_positions)
        return MeanColour(source)

    register_encoder("colour", build)
    with pytest.raises(ValueError, match="encoder kind 'colour' is registered already"):
        register_encoder("colour", build)
    encoder = build_encoder("colour:2", window=3)
    assert asked == {"source": "2", "window": 3, "temporal_positions": None}
    assert encoder.name == "colour:2"
    assert not encoder.gain.requires_grad
    clip = torch.randn(2, 3, 3, 16, 16)
    stream = encoder.stream(2, layers=[-1])
    found = cat([stream.push(clip[:, 0]), stream.push(clip[:, 1:])])
    assert all(map(torch.equal, parts(found), parts(encoder.encode(clip, [-1]))))
    restored = encoder.stream(2)
    restored.load_state_dict(stream.state_dict())
    assert restored.positions == [3, 3]
    register_encoder("nothing", lambda source, window, temporal_positions: object())
    with pytest.raises(TypeError, match="builder of 'nothing' made a object, not a backbone.Vid"):
        build_encoder("nothing:here")


def test_third_parties_join_by_entry_point(tmp_path, monkeypatch, foreign_kinds):
    """An installed package is enough: nothing in the suite has to be touched."""
    (tmp_path / "their_package.py").write_text(
        textwrap.dedent("""
            from backbone import SiglipEncoder
            from backbone.checkpoints import load_siglip

            def build(source, window=None, temporal_positions=None):
                encoder = SiglipEncoder(load_siglip(source))
                encoder.kind = "theirs"
                return encoder
        """)
    )
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[streamformer.encoders]\ntheirs = their_package:build\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="known are siglip, streamformer, theirs"):
        build_encoder("ours:somewhere")
    with pytest.raises(CheckpointError, match="nowhere: no such file or folder"):
        build_encoder(f"theirs:{tmp_path}/nowhere")
    sys.modules.pop("their_package")


def test_subclasses_must_keep_the_contract():
    class Half(VideoEncoder):
        def settings(self):
            return {}

    with pytest.raises(TypeError, match="_features"):
        Half()
