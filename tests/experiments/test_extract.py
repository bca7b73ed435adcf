"""The verb extract: features of a folder, resumed, with failures that are counted."""

import numpy as np
import pytest
from transformers import SiglipVisionConfig, SiglipVisionModel

from backbone import video
from experiments.config import UserError
from experiments.run import main


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "image_size": 16, "patch_size": 8}
    SiglipVisionModel(SiglipVisionConfig(**sizes)).save_pretrained(folder)
    return f"siglip:{folder}"


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a", "b"):
        with video.VideoWriter(folder / f"{name}.mp4", 12, (32, 32)) as writer:
            for grey in range(12):
                writer.write(np.full((32, 32, 3), 20 * grey, np.uint8))
    return folder


def test_features_are_written_once(videos, tmp_path, encoder, capsys):
    arguments = ["extract", str(videos), str(tmp_path / "out"), "--encoder", encoder]
    arguments += ["--video-fps", "12", "--chunk-frames", "4"]
    assert main(arguments) == {"done": ["a", "b"], "reused": [], "failed": {}}
    assert np.load(tmp_path / "out" / "a.npy").shape == (3, 16)
    assert main(arguments)["reused"] == ["a", "b"]
    assert "out: 0 done, 2 reused, 0 failed" in capsys.readouterr().out


def test_failures_are_named_and_may_be_allowed(videos, tmp_path, encoder):
    (videos / "c.mp4").write_bytes(b"no video")
    arguments = ["extract", str(videos), str(tmp_path / "out"), "--encoder", encoder]
    with pytest.raises(UserError, match=r"1 of 3 videos have no features(.|\n)*c.mp4"):
        main(arguments)
    assert set(main([*arguments, "--max-failed-share", "0.5"])["failed"]) == {"c"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("siglip:/no/such/folder", "there is no folder /no/such/folder"),
        ("siglip:someone/no-such-model", "not in the hub's cache, and HF_HUB_OFFLINE is set"),
        ("sigclip:.", "no encoder of kind 'sigclip'"),
    ],
)
def test_encoders_that_are_not_there_are_refused(videos, tmp_path, spec, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message):
        main(["extract", str(videos), str(tmp_path / "out"), "--encoder", spec])
