"""A tiny SigLIP and a handful of tiny videos, in the layouts that the readers expect."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipModel

from backbone.video import VideoWriter

SIZE, FPS = 32, 8
DIRECTIONS = {"move left": (0, -1), "move right": (0, 1), "move up": (-1, 0), "move down": (1, 0)}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models of this size lose more by waiting for a second thread than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def siglip(tmp_path_factory) -> Path:
    """Folder of a SigLIP model of width 32, with a tokenizer of one token per letter."""
    folder = tmp_path_factory.mktemp("siglip")
    letters = "abcdefghijklmnopqrstuvwxyz .,"
    vocabulary = {"<pad>": 0, "<unk>": 1} | {c: i for i, c in enumerate(letters, 2)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(0)
    model = SiglipModel(
        SiglipConfig(
            text_config=shape
            | ends
            | {"vocab_size": 40, "max_position_embeddings": 48, "projection_size": 32},
            vision_config=shape | {"image_size": SIZE, "patch_size": 8},
        )
    )
    with torch.no_grad():  # fresh towers give every text nearly the same embedding
        for name, weight in model.text_model.named_parameters():
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=1.0 if "embedding" in name else 0.3)
        model.logit_scale.fill_(2.3)
        model.logit_bias.fill_(-2.0)
    model.save_pretrained(folder)
    return folder


def square_moving(direction: tuple[int, int], frames: int, seed: int) -> np.ndarray:
    """(T, 32, 32, 3) uint8: a bright square that drifts over noise."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 90, (frames, SIZE, SIZE, 3), dtype=np.uint8)
    y, x = rng.integers(8, 16, 2)
    for t in range(frames):
        top, left = (y + direction[0] * t // 2) % 24, (x + direction[1] * t // 2) % 24
        images[t, top : top + 8, left : left + 8] = 220
    return images


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """Sixteen videos of 20 frames at 8 fps, annotated for recognition, localization, retrieval."""
    root = tmp_path_factory.mktemp("world")
    for folder in ("videos", "recognition", "localization"):
        (root / folder).mkdir()
    labels = list(DIRECTIONS)
    label2id = {label: i for i, label in enumerate(labels)}
    (root / "recognition/label2id.json").write_text(json.dumps(label2id))
    (root / "localization/label2id.json").write_text(json.dumps({"TINY": label2id}))
    recognition, localization, index = [], [], []
    for i in range(16):
        label, name = labels[i % 4], f"clip_{i:02d}"
        with VideoWriter(root / f"videos/{name}.mp4", FPS, (SIZE, SIZE)) as writer:
            for image in square_moving(DIRECTIONS[label], 20, i):
                writer.write(image)
        recognition.append((f"{name}.mp4", label))
        localization.append((name, 0.0, 1.25, label, "[[0.0, 1.25]]", "TINY"))
        index.append({"id": name, "split": "train", "captions": [f"a square going {label}"]})
    with open(root / "recognition/train.csv", "w", newline="") as file:
        csv.writer(file).writerows(recognition)
    with open(root / "localization/train.csv", "w", newline="") as file:
        head = ["video_id", "start_second", "end_second", "text", "relevant_windows", "dataset"]
        csv.writer(file).writerows([head, *localization])
    (root / "index.jsonl").write_text("\n".join(map(json.dumps, index)))
    return root


@pytest.fixture
def tasks(world) -> dict[str, dict]:
    """Task sections of a config over the three annotation files of `world`."""
    videos = str(world / "videos")
    recognition = {
        "annotations": str(world / "recognition/train.csv"),
        "labels": str(world / "recognition/label2id.json"),
        "root": videos,
    }
    localization = {
        "annotations": str(world / "localization/train.csv"),
        "labels": str(world / "localization/label2id.json"),
        "root": videos,
    }
    index = {"index": str(world / "index.jsonl"), "root": videos, "split": "train"}
    common = {"sampling": "consecutive", "templates": "plain"}
    return {
        "actions": common
        | {
            "objective": "recognition",
            "reader": "kinetics",
            "train": recognition,
            "val": recognition,
        },
        "moments": common
        | {
            "objective": "localization",
            "reader": "localization",
            "train": localization,
            "val": localization,
        },
        "captions": common
        | {"objective": "retrieval", "reader": "index", "train": index, "val": index},
    }
