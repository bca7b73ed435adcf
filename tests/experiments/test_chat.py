"""Talking with a running video: when questions are put, from where they come, what is refused."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from backbone.video import VideoWriter
from experiments.chat import Planned, Typed, parse_question
from experiments.config import UserError
from experiments.miniworld.qa_model import MiniLlm, build_tokenizer, llm_config
from experiments.run import main
from integrations.videoqa.checkpoints import build_model, save_model

ROOT = Path(__file__).parents[2]
FRAMES, FPS = 12, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A video, and a model on a tower that has never been trained."""
    folder = tmp_path_factory.mktemp("chat")
    with VideoWriter(folder / "video.mp4", fps=FPS) as writer:
        for image in np.random.default_rng(0).integers(0, 256, (FRAMES, 32, 32, 3), np.uint8):
            writer.write(image)
    torch.manual_seed(0)
    SiglipVisionModel(
        SiglipVisionConfig(image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1,
                           num_attention_heads=2, intermediate_size=32)
    ).save_pretrained(folder / "siglip")  # fmt: skip
    size = MiniLlm(width=32, layers=1, heads=2, mlp=32)
    tokenizer = build_tokenizer(["What moves? red left right."])
    model, _ = build_model(
        llm_config(tokenizer, size), f"siglip:{folder / 'siglip'}", tokenizer,
        template=size.template, num_frames=4, video_fps=FPS, image_layout="square",
    )  # fmt: skip
    save_model(model, folder / "model")
    return folder


def test_questions_are_put_at_their_moments(folder, capsys):
    words = ["--ask", "0.5: What moves?", "--ask", "0: red?", "--ask", "99: left?"]
    result = main(["chat", str(folder / "video.mp4"), "--model", str(folder / "model"), *words])
    assert result["frames"] == FRAMES and result["memory_bytes"] > 0
    asked = [(row["question"], row["time"]) for row in result["answers"]]
    assert asked == [("red?", 0.0), ("What moves?", 0.5), ("left?", (FRAMES - 1) / FPS)]
    for row in result["answers"]:
        assert row["encoded_frames"] == 0 and row["milliseconds_to_first_token"] > 0
    out = capsys.readouterr().out
    assert "     0.50 s  What moves?" in out
    assert "frames per second are possible, 8 are needed live" in out


def test_the_baseline_sees_the_last_frames_alone(folder):
    words = ["chat", str(folder / "video.mp4"), "--model", str(folder / "model"),
             "--ask", "1: What moves?"]  # fmt: skip
    whole, last = (main([*words, *more])["answers"][0] for more in ([], ["--last-frames", "1"]))
    assert last["encoded_frames"] == 1
    assert last["prompt_tokens"] < whole["prompt_tokens"]


def test_lines_that_are_typed_are_questions(folder):
    """A process of its own, its keyboard a pipe; the video runs at its own speed."""
    command = [sys.executable, str(ROOT / "experiments/run.py"), "chat", str(folder / "video.mp4"),
               "--model", str(folder / "model")]  # fmt: skip
    done = subprocess.run(
        command, input="What moves?\nred?\n", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("s  What moves?") < done.stdout.index("s  red?")
    assert "(median of 2)" in done.stdout


def test_a_video_runs_at_its_own_speed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", iter(["one\n", "two\n"]))
    typed = Typed()
    assert list(typed.due(0.0)) == []
    start = time.perf_counter()
    assert list(typed.due(0.2)) == ["one", "two"]
    assert time.perf_counter() - start >= 0.19
    assert list(typed.rest()) == []


def test_planned_questions_wait_for_the_frame_after():
    planned = Planned([(2.0, "b"), (1.0, "a"), (9.0, "c")])
    assert [list(planned.due(moment)) for moment in (1.0, 1.5, 2.5)] == [[], ["a"], ["b"]]
    assert list(planned.rest()) == ["c"]


@pytest.mark.parametrize("text", ["What?", "soon: what?", "-1: what?", "3:", "3: "])
def test_questions_without_a_moment_are_refused(text):
    with pytest.raises(UserError, match='write "SECONDS: QUESTION"'):
        parse_question(text)


def test_what_cannot_be_had_is_refused(folder):
    words = ["chat", str(folder / "video.mp4"), "--ask", "1: What?"]
    with pytest.raises(UserError, match="--model /nowhere: there is no folder"):
        main([*words, "--model", "/nowhere"])
    with pytest.raises(UserError, match="--encoders siglip:/nowhere: there is no folder"):
        main([*words, "--model", str(folder / "model"), "--tower", "siglip:/nowhere"])
    with pytest.raises(UserError, match="context_frames=2 and last_frames=3"):
        main([*words, "--model", str(folder / "model"), "--context-frames", "2",
              "--last-frames", "3"])  # fmt: skip
    with pytest.raises(UserError, match="nowhere.mp4"):
        main(["chat", "nowhere.mp4", "--model", str(folder / "model"), "--ask", "1: What?"])
