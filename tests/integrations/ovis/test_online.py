"""The online segmenter: frames as they come equal whole clips, and what was said stays said."""

import numpy as np
import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from backbone import SiglipEncoder, StreamformerConfig, StreamformerEncoder, StreamformerModel
from integrations.ovis.adapter import AdapterConfig, ViTAdapter, adapt_clip
from integrations.ovis.head import HeadConfig, SegmentationHead
from integrations.ovis.online import OnlineSegmenter, prepare_frame, segment_video
from integrations.ovis.postprocess import FrameSizes, VideoConfig
from integrations.ovis.tracker import TrackerConfig

TINY = {
    "image_size": 32,
    "patch_size": 16,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
CLOSE = {"rtol": 0, "atol": 1e-4}
# Random heads say nothing clearly: keep masks apart from overlapping ones, match by cosine.
TRACKER = TrackerConfig(similarity="cosine", match_score=0.5, mask_overlap=0.8)


def randomise(model):
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.5 if "gate" in name or "embedding" in name else 0.25)
            if name.endswith("gate"):
                weight.copy_(weight.sign() * (0.5 + weight.abs()))  # never shut
    return model.eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def make_parts():
    """Encoder, adapter and head, tiny and random."""

    def make(kind="streamformer", window=None):
        torch.manual_seed(1)
        if kind == "siglip":
            encoder = SiglipEncoder(randomise(SiglipVisionModel(SiglipVisionConfig(**TINY))))
        else:
            fields = {"num_frames": 4, "temporal_positions": "hold", "window": window}
            model = randomise(StreamformerModel(StreamformerConfig(**TINY, **fields)))
            encoder = StreamformerEncoder(model)
        adapter = ViTAdapter(AdapterConfig.for_encoder(encoder, num_heads=2, stem_width=8))
        head = HeadConfig(
            in_channels=16, num_classes=3, num_queries=6, width=32, mask_size=32, num_heads=2,
            pixel_layers=1, pixel_feedforward=32, decoder_layers=2, decoder_feedforward=32,
            embedding_size=8,
        )  # fmt: skip
        return encoder, adapter.eval(), SegmentationHead(head).eval()

    return make


@pytest.fixture(scope="module")
def parts(make_parts):
    return make_parts()


def images(count, height=40, width=56, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def segmenter_of(parts, **options):
    return OnlineSegmenter(*parts, **{"short_side": 32, "tracker": TRACKER, **options})


def assert_same(one, other):
    assert torch.equal(one.ids, other.ids)
    assert torch.equal(one.labels, other.labels)
    torch.testing.assert_close(one.scores, other.scores, **CLOSE)
    torch.testing.assert_close(one.mask_logits, other.mask_logits, **CLOSE)


@pytest.mark.parametrize("kind", ["streamformer", "siglip"])
@pytest.mark.parametrize("mode", ["stream", "chunk"])
def test_frames_as_they_come_equal_whole_clips(make_parts, mode, kind):
    parts = encoder, adapter, head = make_parts(kind)
    frames = images(7)
    segmenter = segmenter_of(parts, mode=mode, chunk_frames=3)
    results = [segmenter.push(frame) for frame in frames]
    assert [result.frame for result in results] == list(range(7))
    found = segmenter.finish()

    sizes = FrameSizes(original=(40, 56), resized=(32, 45), padded=(32, 64))
    assert results[0].sizes == sizes
    prepared = [prepare_frame(f, sizes, encoder.image_mean, encoder.image_std) for f in frames]
    clip = torch.stack(prepared)[None]  # (1, T, 3, H, W)
    with torch.no_grad():
        chunks = clip.split(3, dim=1) if mode == "chunk" else [clip]
        said = [head(adapt_clip(encoder, adapter, chunk)) for chunk in chunks]
        for name in ("class_logits", "mask_logits", "query_embeddings"):
            setattr(said[0], name, torch.cat([getattr(part, name) for part in said]))
    expected = segment_video(said[0], sizes, TRACKER)
    assert (found.num_frames, found.size) == (7, (40, 56))
    assert len(found.instances) == len(expected.instances) > 0
    for one, other in zip(found.instances, expected.instances, strict=True):
        assert (one.track, one.label) == (other.track, other.label)
        assert one.score == pytest.approx(other.score, abs=1e-4)
        assert (one.masks(found.size) != other.masks(found.size)).mean() < 1e-3


def test_stream_and_chunks_differ_once_the_first_chunk_is_over(parts):
    frames = images(5)
    stream, chunk = (segmenter_of(parts, mode=m, chunk_frames=3) for m in ("stream", "chunk"))
    for number, frame in enumerate(frames):
        one, other = stream.push(frame), chunk.push(frame)
        if number < 3:
            assert_same(one, other)
    assert not torch.equal(one.scores, other.scores)


@pytest.mark.parametrize("mode", ["stream", "chunk"])
def test_what_was_said_does_not_change_with_later_frames(parts, mode):
    frames, others = images(8), images(8, seed=5)
    said = []
    for later in (frames, others):
        segmenter = segmenter_of(parts, mode=mode, chunk_frames=3)
        results = [segmenter.push(f) for f in [*frames[:5], *later[5:]]]
        kept = [result.masks.copy() for result in results]
        segmenter.finish()
        for result, masks in zip(results, kept, strict=True):  # finish looks back, and only looks
            assert np.array_equal(result.masks, masks)
        said.append(results)
    for one, other in zip(*said, strict=True):
        same = all(
            torch.equal(getattr(one, name), getattr(other, name))
            for name in ("ids", "labels", "scores", "mask_logits")
        )
        assert same == (one.frame < 5)


def test_results_of_a_frame(parts):
    result = segmenter_of(parts).push(images(1)[0])
    assert len(set(result.ids.tolist())) == len(result.ids) > 0
    assert result.masks.shape == (len(result.ids), 40, 56)
    assert result.masks.dtype == bool
    assert result.scores.tolist() == sorted(result.scores.tolist(), reverse=True)
    cut = result.scores[0].item() - 1e-6
    best = result.above(cut)
    assert best.ids.tolist() == result.ids[result.scores > cut].tolist()
    assert np.array_equal(best.masks, result.masks[: len(best.ids)])
    assert result.above(1.0).masks.shape == (0, 40, 56)


def test_memory_is_bounded_without_a_record(make_parts):
    segmenter = segmenter_of(make_parts(window=3), keep_video=False)
    sizes = []
    for frame in images(40):
        segmenter.push(frame)
        sizes.append(segmenter.memory_bytes)
    per_track = segmenter.tracker.memory_bytes / len(segmenter.tracker.memory)
    assert max(sizes[10:]) - min(sizes[10:]) <= 6 * 21 * per_track
    assert segmenter._stream.memory_bytes < 1e6
    with pytest.raises(ValueError, match="keep_video=False keeps no record"):
        segmenter.finish()


def test_finish_and_reset_begin_another_video(parts):
    segmenter = segmenter_of(parts)
    frames = images(3)
    first = [segmenter.push(frame) for frame in frames]
    segmenter.finish()
    assert segmenter.frame == 0
    segmenter.push(images(1, height=64, width=32)[0])  # of another size
    segmenter.reset()
    for one, frame in zip(first, frames, strict=True):
        assert_same(one, segmenter.push(frame))


def test_a_video_of_one_frame(parts):
    segmenter = segmenter_of(parts)
    segmenter.push(images(1)[0])
    result = segmenter.finish()
    assert result.num_frames == 1
    assert len(result.predictions(1, [1, 2, 3])) == len(result.instances) > 0


def test_the_rules_of_the_video_are_used(parts):
    segmenter = segmenter_of(parts, video=VideoConfig(top_pairs=2))
    segmenter.push(images(1)[0])
    assert len(segmenter.finish().instances) == 2


@pytest.mark.parametrize(
    "original, resized, padded",
    [
        ((720, 1280), (224, 398), (224, 416)),
        ((1280, 720), (398, 224), (416, 224)),
        ((224, 224), (224, 224), (224, 224)),
        ((100, 1000), (133, 1333), (160, 1344)),  # the long side decides
        ((64, 64), (224, 224), (224, 224)),  # small frames grow
    ],
)
def test_sizes_of_frames(original, resized, padded):
    assert FrameSizes.fit(original, 224, 1333, 32) == FrameSizes(original, resized, padded)


def test_frames_are_normalised_and_then_padded_with_zeros():
    image = np.full((4, 6, 3), 255, np.uint8)
    sizes = FrameSizes(original=(4, 6), resized=(2, 3), padded=(4, 4))
    pixels = prepare_frame(image, sizes, (0.5,) * 3, (0.25,) * 3)
    assert pixels.shape == (3, 4, 4)
    assert (pixels[:, :2, :3] == 2).all()
    assert pixels.abs().sum() == 2 * 18


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((8, 8), np.uint8), r"frame 1: shape \(8, 8\), type uint8; expected \(H, W, 3\)"),
        (np.zeros((40, 56, 3), np.float32), "frame 1: .*type float32; expected"),
        (np.zeros((56, 40, 3), np.uint8), "frame 1 is 56 x 40 pixels .*, the video 40 x 56"),
    ],
)
def test_wrong_frames_are_refused_and_the_video_goes_on(parts, image, message):
    frames = images(2)
    segmenter, other = segmenter_of(parts), segmenter_of(parts)
    segmenter.push(frames[0])
    other.push(frames[0])
    with pytest.raises(ValueError, match=message):
        segmenter.push(image)
    assert_same(segmenter.push(frames[1]), other.push(frames[1]))


def test_an_empty_video_is_refused(parts):
    with pytest.raises(ValueError, match=r"no frame since the video began; push\(\)"):
        segmenter_of(parts).finish()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "clip"}, "mode='clip' is not one of"),
        ({"chunk_frames": 0}, "chunk_frames=0 must be at least 1"),
    ],
)
def test_unknown_options_are_refused(parts, options, message):
    with pytest.raises(ValueError, match=message):
        segmenter_of(parts, **options)


def test_parts_in_training_mode_are_refused(make_parts):
    encoder, adapter, head = make_parts()
    adapter.train()
    with pytest.raises(ValueError, match=r"the adapter is in training mode; call adapter.eval\(\)"):
        segmenter_of((encoder, adapter, head))
