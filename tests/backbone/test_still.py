"""Still scenes: exact at threshold 0, cheaper where nothing moves, bounded where little does."""

import pytest
import torch

from backbone import build_encoder

FRAMES = 6  # of a segment


@pytest.fixture
def make_encoder(make_model, tmp_path):
    """A segment-wise encoder from a checkpoint, and how often its layers ran."""
    make_model(temporal_positions="reset", num_frames=FRAMES, lora_rank=4).save_pretrained(
        tmp_path / "encoder"
    )

    def make(**options):
        encoder = build_encoder(f"streamformer:{tmp_path / 'encoder'}", **options)
        encoder.patches_run = []
        encoder.model.layers[0].register_forward_hook(
            lambda layer, inputs, output: encoder.patches_run.append(inputs[0].shape[2])
        )
        return encoder

    return make


def clip_with_motion(length, moving):
    """A static clip ``(1, T, 3, 32, 32)`` whose patch 5 is new noise in the frames ``moving``."""
    clip = torch.randn(1, 1, 3, 32, 32).repeat(1, length, 1, 1, 1)
    for frame in moving:
        clip[:, frame, :, 8:16, 8:16] = torch.randn(3, 8, 8)
    return clip


def parts(features):
    return [features.patch_tokens, features.frame_embeddings, *features.layers.values()]


@pytest.mark.parametrize("moving", [[], [14], [0, 7, 8, 20], range(40)])
@pytest.mark.parametrize("chunks", [1, 4, 40])
def test_threshold_zero_is_exact(make_encoder, difference, moving, chunks):
    clip = clip_with_motion(40, moving)
    expected = make_encoder().encode(clip, layers=[0, 1])
    stream = make_encoder(still=0.0).stream(layers=[0, 1])
    found = [parts(stream.push(chunk)) for chunk in clip.split(chunks, dim=1)]
    for part, wanted in zip(zip(*found, strict=True), parts(expected), strict=True):
        assert difference(torch.cat(part, dim=1), wanted) < 1e-5
    assert stream.positions == [40]


def test_a_still_scene_runs_one_segment(make_encoder):
    encoder = make_encoder(still=0.0)
    stream = encoder.stream()
    for frame in clip_with_motion(40, []).unbind(1):
        stream.push(frame)
    assert encoder.patches_run == [16] * FRAMES


def test_a_patch_moves_until_its_segment_ends(make_encoder):
    encoder = make_encoder(still=0.1)
    stream = encoder.stream()
    for frame in clip_with_motion(24, [8]).unbind(1):
        stream.push(frame)
    # The first segment in full; then frames 8 to 11; then frame 14, whose place frame 8 changed,
    # and what follows it in its segment.
    assert encoder.patches_run == [16] * FRAMES + [1] * 4 + [1] * 4


def test_only_moving_patches_change(make_encoder, difference):
    clip = clip_with_motion(18, [13, 15])
    exact = make_encoder().encode(clip).patch_tokens
    found = torch.cat(
        [f.patch_tokens for f in map(make_encoder(still=0.1).stream().push, clip.unbind(1))], dim=1
    )
    assert difference(found[:, :13], exact[:, :13]) < 1e-5
    others = [patch for patch in range(16) if patch != 5]
    assert difference(found[:, 13:, others], exact[:, 7:12, others]) < 1e-5  # as they were
    # The moving patch meets stale neighbours, yet is far nearer to the truth than staying put.
    error = (found[:, 13:, 5] - exact[:, 13:, 5]).norm()
    assert 0 < error < 0.2 * (exact[:, 7:12, 5] - exact[:, 13:, 5]).norm()


def test_small_noise_is_still(make_encoder):
    encoder = make_encoder(still=0.1)
    stream = encoder.stream()
    clip = clip_with_motion(18, [])
    for frame in (clip + 0.04 * torch.rand_like(clip)).unbind(1):
        stream.push(frame)
    assert encoder.patches_run == [16] * FRAMES


def test_streams_of_a_batch_come_and_go(make_encoder, difference):
    encoder, plain = make_encoder(still=0.0), make_encoder()
    clips = torch.cat([clip_with_motion(30, [9]), clip_with_motion(30, [])])
    stream = encoder.stream(batch_size=2)
    stream.push(clips[:, :10])
    found = stream.push(clips[1:, 10:15], rows=[1])
    expected = plain.encode(clips).frame_embeddings
    assert difference(found.frame_embeddings, expected[1:, 10:15]) < 1e-5
    saved = stream.state_dict()
    stream.reset(rows=[0])
    stream.push(clips[:1, :7], rows=[0])
    other = encoder.stream(batch_size=2)
    other.load_state_dict(saved)
    for rows, begin in (([0], 10), ([1], 15)):
        found = other.push(clips[rows, begin : begin + 9], rows=rows).frame_embeddings
        assert difference(found, expected[rows, begin : begin + 9]) < 1e-5
    assert other.memory_bytes > plain.stream(2).memory_bytes


def test_settings_tell(make_encoder):
    assert "still" not in make_encoder().settings()
    assert make_encoder(still=0.1).settings()["still"] == 0.1


@pytest.mark.parametrize("options", [{"temporal_positions": "cycle", "window": 4}, {"window": 4}])
def test_refuses_what_never_repeats(make_encoder, options):
    with pytest.raises(ValueError, match=r'still=0.0 needs .*window=4: load it with "reset"'):
        make_encoder(still=0.0, **options)


def test_refuses_a_negative_threshold(make_encoder):
    with pytest.raises(ValueError, match="still=-1: a change that counts as none is 0 or more"):
        make_encoder(still=-1)
