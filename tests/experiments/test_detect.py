"""The verb detect: the path of training, frame by frame, on files; and its refusals."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipConfig, SiglipModel

from backbone import build_encoder, lift_siglip, video
from backbone.files import write_json
from experiments.config import UserError
from experiments.detect import Seen, Switch, Watcher, find_head
from experiments.drawing import canvas_size, draw_scores
from experiments.live import speed
from experiments.run import main
from integrations.oad.checkpoints import save_head
from integrations.oad.features import FrameRule, extract_video
from integrations.oad.mat import MatHead
from integrations.oad.mat_config import MatConfig
from integrations.oad.protocols import online_scores

CLASSES = ["Background", "grow", "swing", "Ambiguous"]


def head_of(visual_size=16, **changes):
    sizes = {"num_classes": 4, "dim": 16, "num_heads": 2, "feedforward": 16, "long_steps": 8}
    sizes |= {"long_rate": 2, "work_steps": 4, "anticipation_steps": 2, "future_tokens": 4}
    sizes |= {"memory_stages": ((4, 1, True),), "work_stack": (-1, 1, True), "groups": 2}
    sizes |= {"generator": (4, 1, True), "future_stack": (4, 1, True)}
    return MatHead(MatConfig(visual_size=visual_size, **sizes, **changes)).eval()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A lifted encoder with weights that matter, and a short moving video."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "intermediate_size": 16, "vocab_size": 8, "bos_token_id": 0, "eos_token_id": 1}
    image = {**sizes, "intermediate_size": 16, "image_size": 16, "patch_size": 8}
    SiglipModel(SiglipConfig(vision_config=image, text_config=text)).save_pretrained(
        folder / "siglip"
    )
    lifted = lift_siglip(folder / "siglip", num_frames=4, window=3)
    with torch.no_grad():
        for parameter in lifted.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    lifted.save_pretrained(folder / "lifted")
    rng = np.random.default_rng(0)
    with video.VideoWriter(folder / "moving.mp4", 10, (48, 32)) as writer:
        for shift in range(30):
            picture = rng.integers(0, 60, (32, 48, 3), dtype=np.uint8)
            picture[8:24, shift : shift + 12] += 120
            writer.write(picture)
    return folder


def trained_folder(tiny, folder, protocol="stream", **changes):
    """What a run of the verb oad leaves: head and config."""
    encoder = build_encoder(f"streamformer:{tiny / 'lifted'}")
    facts = FrameRule(protocol, 10, 2).describe(encoder)
    notes = {"dataset": "TINY", "classes": CLASSES, "ignore_index": 3, "fps": 5.0}
    folder.mkdir(parents=True)
    save_head(head_of(**changes), folder / "head.safetensors", {**notes, "features": facts})
    write_json(folder / "config.json", {"encoder": {"spec": encoder.name}})
    return folder


@pytest.mark.parametrize("protocol", ["stream", "clip"])
def test_frame_by_frame_equals_features_and_the_online_protocol(tiny, tmp_path, protocol):
    trained = find_head(trained_folder(tiny, tmp_path / "run", protocol), tmp_path)
    encoder = build_encoder(trained.encoder)
    features, _ = extract_video(tiny / "moving.mp4", encoder, FrameRule(protocol, 10, 2))
    scores = online_scores(
        trained.head, torch.from_numpy(features), ignore_index=3, opening="short"
    )
    watcher = Watcher(encoder, trained)
    with video.open_video(tiny / "moving.mp4", 10) as reader:
        rows = [watcher.push(frame.image) for frame in watcher.clock.frames(reader)]
    assert [row is None for row in rows[:4]] == [True, False, True, False]  # a step has two frames
    found = np.stack([row for row in rows if row is not None])
    np.testing.assert_allclose(found, scores.detection[:, trained.actions], atol=1e-5)
    assert np.ptp(found) > 0.01  # scores that move, or the comparison proves nothing


def test_the_verb_writes_video_timeline_and_detections(tiny, tmp_path, capsys):
    run = trained_folder(tiny, tmp_path / "oad" / "streamformer" / "seed0")
    out = tmp_path / "out"
    arguments = ["detect", str(tiny / "moving.mp4"), "--work-dir", str(tmp_path / "oad")]
    result = main([*arguments, "--out", str(out), "--threshold", "0.05"])
    printed = capsys.readouterr().out
    assert str(run) in printed and "2 actions of TINY" in printed
    assert "begins (" in printed
    assert "per frame: decode " in printed and "10 are needed live" in printed
    assert json.loads((out / "detections.json").read_text()) == result
    assert (result["frames"], result["steps"]) == (30, 15)
    assert set(result["milliseconds_per_frame"]) == {"decode", "encode", "head"}
    assert all(cost > 0 for cost in result["milliseconds_per_frame"].values())
    for segment in result["segments"]:
        assert 0 <= segment["start"] < segment["end"] <= 3.2
    with video.open_video(out / "annotated.mp4") as reader:
        frames = [frame.image for frame in reader]
    assert len(frames) == 30 and frames[0].shape == (384, 576, 3)
    with Image.open(out / "timeline.png") as image:
        assert image.width > 1000


def test_the_first_seconds_alone(tiny, tmp_path):
    run = trained_folder(tiny, tmp_path / "run")
    arguments = ["detect", str(tiny / "moving.mp4"), "--head", str(run), "--out", str(tmp_path)]
    assert main([*arguments, "--max-seconds", "1"])["frames"] == 10


def test_a_video_shorter_than_a_step_has_no_timeline(tiny, tmp_path, caplog):
    run = trained_folder(tiny, tmp_path / "run")
    arguments = ["detect", str(tiny / "moving.mp4"), "--head", str(run), "--out", str(tmp_path)]
    assert main([*arguments, "--max-seconds", "0.1"])["steps"] == 0
    assert "ended before its first step: no timeline" in caplog.text


def test_ctrl_c_ends_the_watching_and_keeps_what_was_seen(tiny, tmp_path, monkeypatch):
    run = trained_folder(tiny, tmp_path / "run")
    push = Watcher.push

    def interrupted(self, image):
        if self.clock.count == 9:
            raise KeyboardInterrupt
        return push(self, image)

    monkeypatch.setattr(Watcher, "push", interrupted)
    arguments = ["detect", str(tiny / "moving.mp4"), "--head", str(run), "--out", str(tmp_path)]
    assert main(arguments)["steps"] == 4
    assert (tmp_path / "timeline.png").is_file() and (tmp_path / "annotated.mp4").is_file()


def test_without_a_trained_head_it_says_what_to_run(tmp_path):
    message = (
        r"no head.safetensors of a run under .*nothing; run this (.|\n)*experiments/run.py oad"
    )
    with pytest.raises(UserError, match=message):
        main(["detect", "video.mp4", "--work-dir", str(tmp_path / "nothing")])
    with pytest.raises(UserError, match="--head: there is no .*missing.pt"):
        main(["detect", "video.mp4", "--head", str(tmp_path / "missing.pt")])


def test_the_default_head_is_streamformers_of_the_lowest_seed(tiny, tmp_path):
    for name in ("siglip/seed0", "streamformer/seed10", "streamformer/seed2"):
        trained_folder(tiny, tmp_path / name)
    trained_folder(tiny, tmp_path / "streamformer" / "seed0.0123456789abcdef")  # set aside
    assert find_head(None, tmp_path).path.parent == tmp_path / "streamformer" / "seed2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual_size": 24}, "its features are 16 wide, but .*head.safetensors reads 24"),
        ({"motion_size": 8}, "head.safetensors reads optical flow"),
    ],
)
def test_heads_that_do_not_fit_are_refused(tiny, tmp_path, changes, message):
    run = trained_folder(tiny, tmp_path / "run", **changes)
    with pytest.raises(UserError, match=message):
        main(["detect", str(tiny / "moving.mp4"), "--head", str(run), "--out", str(tmp_path)])


def test_other_windows_are_mentioned_and_missing_videos_named(tiny, tmp_path, caplog):
    run = trained_folder(tiny, tmp_path / "run")
    arguments = ["--head", str(run), "--window", "2", "--out", str(tmp_path)]
    with pytest.raises(UserError, match=r"gone.mp4: no such file"):
        main(["detect", "gone.mp4", *arguments])
    assert "head.safetensors was trained with window=3, this encoder has 2" in caplog.text


def test_a_head_that_names_no_encoder_asks_for_it(tiny, tmp_path):
    run = trained_folder(tiny, tmp_path / "run")
    (run / "config.json").unlink()
    with pytest.raises(UserError, match="does not say which encoder .*--encoder streamformer:FOLD"):
        main(["detect", "video.mp4", "--head", str(run)])
    with pytest.raises(
        UserError, match="--encoder siglip:/no/such: .*there is no folder|no folder"
    ):
        main(["detect", "video.mp4", "--head", str(run), "--encoder", "siglip:/no/such"])


def test_actions_begin_and_end_at_different_levels():
    switch = Switch(threshold=0.5)
    lines = [
        line
        for now, score in enumerate([0.1, 0.5, 0.35, 0.9, 0.31, 0.2, 0.45])
        for line in switch.step(["grow"], np.array([score]), float(now))
    ]
    assert [line.split("grow ")[1] for line in lines] == ["begins (0.50)", "ends (after 4.00 s)"]
    assert switch.segments == [{"action": "grow", "start": 1.0, "end": 5.0, "score": 0.9}]


def test_pictures_for_the_timeline_stay_few_and_even():
    seen = Seen(["grow"], Switch(0.5))
    for index in range(1000):
        seen.add(video.Frame(index, index / 10, np.zeros((20, 40, 3), np.uint8)), None)
    times = [time for time, _ in seen.pictures]
    assert 32 <= len(times) < 64
    assert np.unique(np.round(np.diff(times), 6)).size == 1


def test_speed_is_per_frame_and_leaves_out_the_first_ones():
    cost = speed({"decode": [1.0] * 6 + [0.002] * 30, "encode": [0.01] * 36, "head": [0.06] * 6})
    assert cost["encode"] == pytest.approx(10) and cost["head"] == pytest.approx(10)
    assert cost["decode"] == pytest.approx(1000 * (1 + 30 * 0.002) / 31)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((32, 32), (384, 384)), ((340, 256), (680, 512)), ((960, 540), (960, 540))],
)
def test_drawn_frames_are_large_enough_to_read(shape, expected):
    assert canvas_size(*shape) == expected
    image = np.full((shape[1], shape[0], 3), 128, np.uint8)
    drawn = draw_scores(image, expected, 1.5, [("grow", 0.9, True), ("swing", 0.1, False)])
    assert drawn.shape == (expected[1], expected[0], 3) and drawn.dtype == np.uint8
    assert (drawn[drawn.shape[0] // 2, drawn.shape[1] // 2] == 128).all()  # the middle stays free
    assert len(np.unique(drawn)) > 10


def test_very_large_frames_are_reduced():
    assert canvas_size(3840, 2160) == (1280, 720)
    assert canvas_size(2160, 3840) == (720, 1280)
