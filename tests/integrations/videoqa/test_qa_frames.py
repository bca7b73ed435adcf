"""Which frames of a video the model sees, and as which pixels."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from backbone.video import VideoError, VideoWriter
from integrations.videoqa import frames
from integrations.videoqa.frames import VideoClip, read_video, sample_indices


@pytest.mark.golden
def test_sampling(golden_file):
    for case in golden_file("frame_sampling")[0]:
        sampling = sample_indices(
            case["total_frames"],
            case["avg_fps"],
            case["frames_upbound"],
            case["video_fps"],
            case["force_sample"],
            released_times=True,
        )
        if "error" in case:  # the released code raises; every frame is the better answer
            assert len(sampling.indices) == case["frames_upbound"]
            continue
        assert list(sampling.indices) == case["indices"], case
        assert sampling.times_text == case["frame_time"]
        assert sampling.duration == case["video_time"]


@pytest.mark.golden
def test_preprocessing(golden_file):
    description, tensors = golden_file("preprocess")
    for case in description["cases"]:
        stem = f"case{case['case']}"
        pixels = frames.preprocess(
            tensors[f"{stem}.frames_uint8"],
            description["size"],
            description["mean"],
            description["std"],
        )
        assert_close(pixels, tensors[f"{stem}.pixel_values"], atol=1e-6, rtol=0)


def test_times_are_exact_unless_released():
    exact = sample_indices(481, 29.97, 0)
    assert exact.times[-1] == pytest.approx(480 / 29.97)
    assert sample_indices(481, 29.97, 0, released_times=True).times[-1] == 16.0


def test_slow_videos_give_every_frame():
    assert sample_indices(6, 0.4, 8).indices == tuple(range(6))


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ((0, 25.0, 8), "0 frames"),
        ((10, 0.0, 8), "0.0 per second"),
        ((10, 25.0, 0, 1.0, True), "num_frames=0"),
        ((10, 25.0, 8, 0.0), "video_fps=0.0"),
    ],
)
def test_nothing_to_sample(arguments, value):
    with pytest.raises(ValueError, match=value):
        sample_indices(*arguments)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """12 frames at 4 per second, the k-th of grey 20 k."""
    path = tmp_path_factory.mktemp("film") / "grey.mp4"
    with VideoWriter(path, 4, crf=0) as writer:
        for grey in range(12):
            writer.write(np.full((16, 16, 3), 20 * grey, np.uint8))
    return path


def greys(pictures):
    return [round(float(picture.mean()) / 20) for picture in pictures]


def test_reading_gives_the_sampled_frames(film):
    pictures, sampling = read_video(film, 5, force_sample=True)
    assert pictures.shape == (5, 16, 16, 3) and pictures.dtype == np.uint8
    assert greys(pictures) == list(sampling.indices) == [0, 2, 5, 8, 11]
    pictures, sampling = read_video(film, 16)
    assert greys(pictures) == list(sampling.indices) == [0, 4, 8]
    assert sampling.times == (0.0, 1.0, 2.0) and sampling.duration == 3.0
    pictures, _ = read_video(film, 24, force_sample=True)
    assert len(pictures) == 24 and greys(pictures[[0, -1]]) == [0, 11]


def test_reading_a_part(film):
    pictures, sampling = read_video(VideoClip(film, 1.0, 2.5), 3, force_sample=True)
    assert greys(pictures) == [4, 6, 9]
    assert sampling.duration == 1.5


def test_a_file_that_claims_too_much(film, monkeypatch, caplog):
    """What a container tells is not believed, and nothing stands in for what is missing."""
    opened = frames.open_video

    def boastful(*args, **kwargs):
        reader = opened(*args, **kwargs)
        reader.num_frames = 40
        return reader

    monkeypatch.setattr(frames, "open_video", boastful)
    with caplog.at_level(logging.WARNING):
        pictures, sampling = read_video(film, 3, force_sample=True)
    assert "claims 40 frames, but holds 12" in caplog.text
    assert greys(pictures) == list(sampling.indices) == [0, 5, 11]


def test_a_broken_video_is_named(film, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(film.read_bytes()[:300])
    for path in (broken, tmp_path / "missing.mp4"):
        with pytest.raises(VideoError, match=path.name):
            read_video(path, 4)


def test_clips_are_told_apart(film, tmp_path):
    keys = {VideoClip(film).key, VideoClip(film, 1.0).key, VideoClip(film, 1.0, 2.0).key}
    copied = tmp_path / "copy.mp4"
    copied.write_bytes(film.read_bytes())
    before = VideoClip(copied).key
    copied.write_bytes(film.read_bytes() + b"more")
    assert len(keys | {before, VideoClip(copied).key}) == 5


def test_pixels_of_images_and_of_wrong_things():
    image = Image.new("L", (9, 5), 255)
    assert torch.equal(
        frames.preprocess([image], 8, (0.5,) * 3, (0.5,) * 3), torch.ones(1, 3, 8, 8)
    )
    for wrong in (torch.zeros(1, 4, 4, 3), torch.zeros(4, 4, 3, dtype=torch.uint8), []):
        with pytest.raises(ValueError, match=r"\(T, H, W, 3\) uint8"):
            frames.preprocess(wrong, 8, (0.5,) * 3, (0.5,) * 3)
