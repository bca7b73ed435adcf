"""Features of videos: which frames are read and kept, by either protocol; files; failures."""

from __future__ import annotations

import json
import logging
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from backbone import (
    FrameFeatures,
    SiglipEncoder,
    StreamformerConfig,
    StreamformerEncoder,
    StreamformerModel,
    VideoEncoder,
)
from backbone.video import VideoWriter, open_video, preprocess
from integrations.oad.features import (
    ExtractionError,
    FeatureError,
    FrameRule,
    extract_folder,
    extract_video,
    read_facts,
    released_indices,
)

SIDE = 32
TINY = {
    "image_size": SIDE,
    "patch_size": 16,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


class BarReader(VideoEncoder):
    """Its embedding of a frame is the brightness of sixteen bars: the frame's number, in bits.

    ``broken`` is a number whose frame it cannot cope with.
    """

    kind = "bars"
    name = "bars:"
    embed_dim, patch_size, image_size, num_layers = 16, 16, SIDE, 0

    def __init__(self, broken: int | None = None) -> None:
        super().__init__()
        self.broken = broken
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[tuple[int, ...]] = []

    def settings(self) -> dict:
        return {"kind": self.kind, "version": 1}

    def _features(self, frames, memory, layers) -> FrameFeatures:
        self.batches.append(tuple(frames.shape[:2]))
        bars = frames.mean(dim=(2, 3)).unflatten(-1, (16, 2)).mean(-1)  # (B, t, 16)
        if self.broken is not None:
            bars[torch.from_numpy(numbers(bars.numpy()) == self.broken)] = torch.nan
        return FrameFeatures(bars[:, :, None], bars)


def numbers(features: np.ndarray) -> np.ndarray:
    """Frame numbers that `BarReader` has seen, (...,) int."""
    return ((features > 0) * 2 ** np.arange(16)).sum(-1)


def picture(number: int) -> np.ndarray:
    bits = np.array([(number >> k) & 1 for k in range(16)], dtype=np.uint8)
    row = np.repeat(bits * 215 + 20, SIDE // 16)
    return np.broadcast_to(row[None, :, None], (SIDE, SIDE, 3)).copy()


def film(path: Path, count: int, fps: Fraction | int = 30) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, fps, (SIDE, SIDE), crf=4) as writer:
        for i in range(count):
            writer.write(picture(i))
    return path


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Three videos of 30, 45 and 61 frames at 30 per second."""
    for name, count in [("a", 30), ("b", 45), ("c.1", 61)]:
        film(tmp_path / "videos" / f"{name}.mp4", count)
    (tmp_path / "videos" / "readme.txt").write_text("not a video")
    return tmp_path / "videos"


@pytest.fixture
def streamformer() -> StreamformerEncoder:
    """A tiny StreamFormer whose memory matters: no gate, scale or bias is neutral."""
    model = StreamformerModel(StreamformerConfig(**TINY, num_frames=4, window=9))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return StreamformerEncoder(model)


@pytest.fixture
def siglip() -> SiglipEncoder:
    return SiglipEncoder(SiglipVisionModel(SiglipVisionConfig(**TINY)))


# -- which frames


@pytest.mark.parametrize("protocol", ["clip", "stream"])
@pytest.mark.parametrize("batch_chunks", [1, 3, 50])
def test_the_last_frame_of_each_chunk_is_kept(tmp_path, protocol, batch_chunks) -> None:
    video = film(tmp_path / "a.mp4", 70)
    rule = FrameRule(protocol, None, 6)
    features, facts = extract_video(video, BarReader(), rule, batch_chunks)
    assert features.dtype == np.float32
    assert numbers(features).tolist() == list(range(5, 66, 6))
    assert (facts["frames"], facts["steps"]) == (70, 11)
    source = facts["source"]
    assert (source["file"], source["fps"], source["width"], source["height"]) == (
        "a.mp4",
        30,
        32,
        32,
    )


@pytest.mark.parametrize("protocol", ["clip", "stream"])
def test_resampling_comes_first(tmp_path, protocol) -> None:
    features, facts = extract_video(film(tmp_path / "a.mp4", 61), BarReader(), FrameRule(protocol))
    # 61 frames at 30 fps last 48.8 frames at 24 fps: 48 whole ones, 8 steps.
    assert (facts["frames"], facts["steps"]) == (48, 8)
    assert numbers(features).tolist() == [int(k * 30 / 24) for k in range(5, 48, 6)]


@pytest.mark.parametrize("count", range(40, 52))
def test_steps_are_those_of_the_labels(tmp_path, count) -> None:
    _, facts = extract_video(film(tmp_path / "a.mp4", count), BarReader(), FrameRule("clip"))
    assert facts["frames"] == int(count / 30 * 24)
    assert facts["steps"] == int(count / 30 * 24) // 6


def test_one_frame_per_step(tmp_path) -> None:
    video = film(tmp_path / "a.mp4", 20, fps=8)
    features, _ = extract_video(video, BarReader(), FrameRule("stream", 8, 1))
    assert numbers(features).tolist() == list(range(20))


def test_chunks_go_through_together(tmp_path) -> None:
    video = film(tmp_path / "a.mp4", 30)
    for protocol, shapes in [
        ("clip", [(2, 6), (2, 6), (1, 6)]),
        ("stream", [(1, 12), (1, 12), (1, 6)]),
    ]:
        encoder = BarReader()
        extract_video(video, encoder, FrameRule(protocol, None), batch_chunks=2)
        assert encoder.batches == shapes


@pytest.mark.parametrize("count", [6, 37, 61, 125])
def test_the_released_chunk_starts(tmp_path, count) -> None:
    video = film(tmp_path / "a.mp4", count, fps=25)
    features, facts = extract_video(video, BarReader(), FrameRule("clip", 24, 2, "released"))
    n = int(count / 25 * 24)
    frames = [int(x) for x in np.linspace(0, count - 1, n)]
    expected = []
    for start in (int(x) for x in np.linspace(0, n, n // 2)):
        chunk = frames[start : start + 2]
        expected.append((chunk if len(chunk) == 2 else frames[-2:])[-1])
    assert numbers(features).tolist() == expected
    assert facts["frames"] == n
    assert expected[-1] == count - 1


def test_released_chunks_run_ahead_and_may_overlap() -> None:
    rule = FrameRule("clip", None, 6, "released")
    for count in range(6, 200):
        chunks = released_indices(count, Fraction(24), rule)
        assert chunks.shape == (count // 6, 6)
        ahead = chunks[:, -1] - (np.arange(count // 6) * 6 + 5)
        assert ahead.min() >= 0
        assert ahead.max() <= 11
        assert all((later >= earlier).all() for earlier, later in pairwise(chunks))


# -- what the encoder may see


def test_clip_is_each_chunk_alone(tmp_path, streamformer) -> None:
    video = film(tmp_path / "a.mp4", 33)
    with open_video(video) as reader:
        images = np.stack([frame.image for frame in reader])
    frames = preprocess(images, SIDE, streamformer.image_mean, streamformer.image_std)
    features, _ = extract_video(video, streamformer, FrameRule("clip", None), batch_chunks=2)
    expected = [
        streamformer.encode(frames[None, 6 * i : 6 * i + 6]).frame_embeddings[0, -1]
        for i in range(5)
    ]
    torch.testing.assert_close(torch.from_numpy(features), torch.stack(expected))


@pytest.mark.parametrize("batch_chunks", [1, 2, 8])
def test_stream_is_one_pass_over_the_video(tmp_path, streamformer, batch_chunks) -> None:
    video = film(tmp_path / "a.mp4", 33)
    with open_video(video) as reader:
        images = np.stack([frame.image for frame in reader])
    frames = preprocess(images, SIDE, streamformer.image_mean, streamformer.image_std)
    whole = streamformer.encode(frames[None]).frame_embeddings[0]
    features, _ = extract_video(video, streamformer, FrameRule("stream", None), batch_chunks)
    torch.testing.assert_close(torch.from_numpy(features), whole[5:30:6])

    alone, _ = extract_video(video, streamformer, FrameRule("clip", None))
    np.testing.assert_allclose(alone[0], features[0], rtol=1e-4, atol=1e-5)
    assert np.abs(alone[1:] - features[1:]).max() > 1e-3  # memory makes a difference


def test_memory_makes_none_for_an_image_encoder(tmp_path, siglip) -> None:
    video = film(tmp_path / "a.mp4", 33)
    clip, _ = extract_video(video, siglip, FrameRule("clip"))
    stream, _ = extract_video(video, siglip, FrameRule("stream"))
    np.testing.assert_allclose(clip, stream, rtol=1e-4, atol=1e-5)


# -- folders


def test_a_folder_becomes_files_that_tell_how(tmp_path, videos, streamformer) -> None:
    out = tmp_path / "features"
    report = extract_folder(videos, streamformer, out, "stream")
    assert (report.done, report.reused, report.failed) == (["a", "b", "c.1"], [], {})
    names = sorted(path.name for path in out.iterdir())
    assert names == ["a.json", "a.npy", "b.json", "b.npy", "c.1.json", "c.1.npy", "features.json"]
    folder = read_facts(out / "features.json")
    assert folder["encoder"] == streamformer.settings()
    assert (folder["protocol"], folder["fps"], folder["dim"]) == ("stream", 4.0, 16)
    for name, frames in [("a", 24), ("b", 36), ("c.1", 48)]:
        facts = read_facts(out / f"{name}.json")
        assert {key: facts[key] for key in folder} == folder
        assert (facts["frames"], facts["steps"]) == (frames, frames // 6)
        assert facts["kept_frame_rule"] == "last frame of the chunk"
        array = np.load(out / f"{name}.npy")
        assert array.dtype == np.float32
        assert array.shape == (frames // 6, 16)
    assert str(tmp_path) not in (out / "a.json").read_text()


def test_going_on_where_it_stopped(tmp_path, videos) -> None:
    out = tmp_path / "features"
    extract_folder([videos / "b.mp4"], BarReader(), out, "clip")
    first = (out / "b.npy").stat().st_mtime_ns
    (out / "a.json").write_text("{}")  # killed after the facts, before the array
    encoder = BarReader()
    report = extract_folder(videos, encoder, out, "clip")
    assert (report.done, report.reused) == (["a", "c.1"], ["b"])
    assert (out / "b.npy").stat().st_mtime_ns == first
    report = extract_folder(videos, encoder, out, "clip")
    assert (report.done, report.reused) == ([], ["a", "b", "c.1"])
    report = extract_folder(videos, encoder, out, "clip", overwrite=True)
    assert report.done == ["a", "b", "c.1"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"protocol": "stream"}, "protocol: 'clip' there, 'stream' here"),
        ({"video_fps": 12}, "fps: 4.0 there, 2.0 here"),
        ({"chunk_frames": 3}, "chunk_frames: 6 there, 3 here"),
        ({"resize": "stretch"}, "resize: 'crop' there, 'stretch' here"),
        ({"chunk_starts": "released"}, "chunk_starts: 'exact' there, 'released' here"),
        ({"encoder": "siglip"}, "encoder: .*'bars'.* there, .*'siglip'.* here"),
    ],
)
def test_features_made_otherwise_are_not_mixed(tmp_path, videos, siglip, change, text) -> None:
    out = tmp_path / "features"
    arguments = {
        "videos": [videos / "a.mp4"],
        "encoder": BarReader(),
        "out": out,
        "protocol": "clip",
    }
    extract_folder(**arguments)
    if "encoder" in change:
        change = {"encoder": siglip}
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(FeatureError, match=text) as caught:
        extract_folder(**{**arguments, **change})
    assert str(out) in str(caught.value)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    extract_folder(**{**arguments, **change}, overwrite=True)  # the way out that it names


def test_files_that_do_not_belong_here(tmp_path, videos) -> None:
    out = tmp_path / "features"
    extract_folder(videos, BarReader(), out, "clip")
    film(videos / "a.mp4", 40)
    with pytest.raises(FeatureError, match=r"a\.npy was made otherwise than .*a\.mp4.*bytes"):
        extract_folder(videos, BarReader(), out, "clip")
    extract_folder(videos, BarReader(), out, "clip", overwrite=True)

    np.save(out / "a.npy", np.zeros((3, 16), np.float32))
    with pytest.raises(FeatureError, match=r"a\.npy is \(3, 16\), but a\.json tells of \(5, 16\)"):
        extract_folder(videos, BarReader(), out, "clip")
    (out / "a.json").unlink()
    with pytest.raises(FeatureError, match=r"a\.npy has no a\.json"):
        extract_folder(videos, BarReader(), out, "clip")
    (out / "features.json").write_text("{")
    with pytest.raises(FeatureError, match=r"features\.json cannot be read"):
        extract_folder(videos, BarReader(), out, "clip")


def test_processes_share_the_videos(tmp_path, videos, monkeypatch) -> None:
    out = tmp_path / "features"
    done = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        done.append(extract_folder(videos, BarReader(), out, "clip").done)
    assert done == [["a", "c.1"], ["b"]]
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert extract_folder(videos, BarReader(), out, "clip").reused == ["a", "b", "c.1"]


# -- failures


def test_failures_are_listed_and_raised_at_the_end(tmp_path, videos, caplog) -> None:
    (videos / "b.mp4").write_bytes(b"no video")
    film(videos / "d.mp4", 4)
    out = tmp_path / "features"
    with pytest.raises(ExtractionError, match="2 of 4 videos have no features") as caught:
        extract_folder(videos, BarReader(), out, "clip")
    report = caught.value.report
    assert report.done == ["a", "c.1"]
    assert list(report.failed) == ["b", "d"]
    assert "cannot be opened as a video" in report.failed["b"]
    assert "has 3 frames at 24 fps, fewer than a step of 6" in report.failed["d"]
    for text in (*report.failed.values(), "max_failed_share"):
        assert text in str(caught.value)
    assert not (out / "b.npy").exists()

    with caplog.at_level(logging.WARNING):
        report = extract_folder(videos, BarReader(), out, "clip", max_failed_share=0.5)
    assert (report.reused, list(report.failed)) == (["a", "c.1"], ["b", "d"])
    assert "b has no features" in caplog.text

    film(videos / "b.mp4", 45)
    (videos / "d.mp4").unlink()
    assert extract_folder(videos, BarReader(), out, "clip").done == ["b"]


@pytest.mark.parametrize("protocol", ["clip", "stream"])
def test_features_that_are_not_finite_are_refused(tmp_path, protocol) -> None:
    video = film(tmp_path / "a.mp4", 30)
    with pytest.raises(FeatureError, match=r"a\.mp4: .* 1 of 5 steps .* the first is step 3"):
        extract_video(video, BarReader(broken=23), FrameRule(protocol, None))


def test_videos_that_break_off_are_kept_if_asked(tmp_path) -> None:
    video = film(tmp_path / "videos" / "a.mp4", 90)
    data = video.read_bytes()
    video.write_bytes(data[: len(data) * 7 // 10])
    with pytest.raises(ExtractionError, match="damaged or cut off"):
        extract_folder(video.parent, BarReader(), tmp_path / "out", "clip")
    extract_folder(video.parent, BarReader(), tmp_path / "out", "clip", truncated="keep")
    facts = json.loads((tmp_path / "out" / "a.json").read_text())
    assert facts["source"]["damaged"] >= 1
    assert 0 < facts["steps"] < 12


def test_an_error_of_the_encoder_stops_the_run(tmp_path, videos) -> None:
    model = StreamformerModel(StreamformerConfig(**TINY, temporal_positions="nearest"))
    with pytest.raises(ValueError, match="nearest"):
        extract_folder(videos, StreamformerEncoder(model), tmp_path / "out", "stream")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"protocol": "chunk"}, "protocol='chunk'"),
        ({"resize": "pad"}, "resize='pad'"),
        ({"chunk_starts": "random"}, "chunk_starts='random'"),
        ({"protocol": "stream", "chunk_starts": "released"}, "protocol='clip'"),
        ({"chunk_frames": 0}, "chunk_frames=0"),
        ({"batch_chunks": 0}, "batch_chunks=0"),
    ],
)
def test_impossible_wishes_are_refused(tmp_path, videos, arguments, text) -> None:
    with pytest.raises(FeatureError, match=text):
        extract_folder(
            **{
                "videos": videos,
                "encoder": BarReader(),
                "out": tmp_path / "out",
                "protocol": "clip",
                **arguments,
            }
        )


def test_lists_that_cannot_be_extracted(tmp_path, videos) -> None:
    out = tmp_path / "out"
    with pytest.raises(FeatureError, match="gone is no folder"):
        extract_folder(tmp_path / "gone", BarReader(), out, "clip")
    with pytest.raises(FeatureError, match="no video in the list"):
        extract_folder([], BarReader(), out, "clip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FeatureError, match="no video in .*empty"):
        extract_folder(tmp_path / "empty", BarReader(), out, "clip")
    twin = film(tmp_path / "twin" / "a.mp4", 30)
    with pytest.raises(FeatureError, match=r"would both be written as a\.npy"):
        extract_folder([videos / "a.mp4", twin], BarReader(), out, "clip")
