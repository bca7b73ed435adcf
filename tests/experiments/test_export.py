"""The verb export: a file that was compared with PyTorch, or an answer that says why not."""

import argparse
import re

import pytest
import torch

from backbone import StreamformerConfig, StreamformerEncoder, StreamformerModel
from experiments import export
from experiments.config import UserError

SIZE = {
    "image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 32, "num_frames": 4,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    StreamformerModel(StreamformerConfig(**SIZE)).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def ask(*words):
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    return export.run(parser.parse_args(list(map(str, words))))


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_writes_a_file_that_agrees_with_pytorch_and_says_so(folder, tmp_path, capsys, suffix):
    for package in export.NEEDED[suffix]:
        pytest.importorskip(package, reason=f"{package} is not installed (extra: export)")
    path = tmp_path / f"cameras{suffix}"
    result = ask("--encoder", f"streamformer:{folder}", "--to", path, "--streams", 2)
    assert result["steps"] == 9 and result["difference"] < 1e-4
    assert path.stat().st_size == result["bytes"]
    text = capsys.readouterr().out
    assert re.search(r"cameras\S+: .* 2 x 3 x 16 x 16 pixels a step, 4 frames of memory", text)


def test_difference_sees_one_wrong_frame():
    encoder = StreamformerEncoder(StreamformerModel(StreamformerConfig(**SIZE)))
    other = encoder.stream(1)

    def push(frames):
        features = other.push(frames)
        wrong = 0.1 if other.positions == [5] else 0.0
        return features.patch_tokens[:, 0], features.frame_embeddings[:, 0] + wrong

    assert export.difference(encoder, push, streams=1, steps=4) == 0
    encoder.stream(1)
    other.reset()
    assert export.difference(encoder, push, streams=1, steps=5) > 1e-3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--encoder", "siglip:x", "--to", "a.onnx"], "only a streamformer:… has a step to export"),
        (["--encoder", "streamformer:./none", "--to", "a.onnx"], "there is no folder ./none"),
        (["--encoder", "streamformer:a/b", "--to", "a.bin"], "must end in .onnx or .pt2"),
    ],
)
def test_what_cannot_be_exported_is_said_before_anything_is_built(words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ask(*words)


def test_a_model_that_cannot_stream_is_a_users_slip(tmp_path):
    model = StreamformerModel(StreamformerConfig(**SIZE, causal=False))
    model.save_pretrained(tmp_path / "both")
    with pytest.raises(UserError, match="causal=False"):
        ask("--encoder", f"streamformer:{tmp_path / 'both'}", "--to", tmp_path / "a.pt2")
    assert not (tmp_path / "a.pt2").exists()


def test_packages_that_are_not_there_are_named_with_their_extra(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(export.NEEDED, ".onnx", ("onnx_of_no_one",))
    with pytest.raises(UserError, match=r"needs onnx_of_no_one: pip install -e \"\.\[export\]\""):
        ask("--encoder", f"streamformer:{folder}", "--to", tmp_path / "a.onnx")


def test_a_file_that_differs_is_refused(folder, tmp_path, monkeypatch):
    write = export._write

    def broken(*args):
        push = write(*args)
        return lambda frames: [part + torch.ones(()) for part in push(frames)]

    monkeypatch.setattr(export, "_write", broken)
    with pytest.raises(UserError, match=r"differs from PyTorch by .* within 9 frames, more than"):
        ask("--encoder", f"streamformer:{folder}", "--to", tmp_path / "a.pt2")
