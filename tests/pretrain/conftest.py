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
from pretrain import PretrainConfig

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


@pytest.fixture
def config(siglip, tasks, tmp_path):
    """Config of a small run, changed by keyword: ``model__window=4`` is ``model.window``."""

    def make(updates=6, **changes):
        values = {
            "output": str(tmp_path / "run"),
            "tasks": tasks,
            "model": {"siglip": str(siglip), "num_frames": 8},
            "optim": {"updates": updates, "lr": 1e-3},
            "batch_size": 4,
            "cache_in_memory": True,
            "checkpoint_every": 2,
            "log_every": 1,
            "device": "cpu",
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            values[section] = values[section] | {name: value} if name else value
        return PretrainConfig.from_dict(values)

    return make


def run_lengths(mask: np.ndarray) -> dict:
    """COCO's uncompressed run lengths of a mask (H, W) bool: column by column, zeros first."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return {"size": list(mask.shape), "counts": ([0] if flat[0] else []) + counts}


@pytest.fixture(scope="session")
def six_tasks(tmp_path_factory) -> dict[str, dict]:
    """Task sections for all six objectives over eight videos, every other one of five frames only.

    Clips of eight frames then differ in how many frames, pairs and pixels count.
    """
    root = tmp_path_factory.mktemp("six")
    (root / "masks").mkdir()
    labels, moments = list(DIRECTIONS), []
    rows, queries, index, expressions, videos, things = [], [], [], [], [], []
    for i in range(8):
        label, name, frames = labels[i % 4], f"clip_{i}", 20 if i % 2 else 5
        images = square_moving(DIRECTIONS[label], frames, i)
        with VideoWriter(root / f"{name}.mp4", FPS, (SIZE, SIZE)) as writer:
            for image in images:
                writer.write(image)
        masks = [run_lengths(image) for image in (images == 220).all(-1)]
        (root / f"masks/{i}.json").write_text(json.dumps(masks))
        sentence, end = f"a square going {label}", frames / FPS / 2
        rows.append((f"{name}.mp4", label))
        moments.append((name, 0.0, end, label, f"[[0.0, {end}]]", "TINY"))
        queries.append((name, end / 2, end, sentence, f"[[{end / 2}, {end}]]", "QVHighlights"))
        index.append({"id": name, "split": "train", "captions": [sentence]})
        numbers = [f"{t:05d}" for t in range(frames)]
        expressions.append((name, f"square {name[-1]}", numbers, frames, [1], [i]))
        files = [f"{name}/{number}.jpg" for number in numbers]
        size = {"height": SIZE, "width": SIZE, "length": frames}
        videos.append({"id": i + 1, "file_names": files} | size)
        things.append({"id": i + 1, "video_id": i + 1, "category_id": i % 3 + 1} | size)
        things[-1]["segmentations"] = masks
    span = ["video_id", "start_second", "end_second", "text", "relevant_windows", "dataset"]
    for file, head, table in (
        ("recognition.csv", None, rows),
        ("localization.csv", span, moments),
        ("grounding.csv", span, queries),
        ("expressions.csv", ["video_id", "text", "frames", "length", "obj_id", "anno_id"],
         expressions),
    ):  # fmt: skip
        with open(root / file, "w", newline="") as handle:
            csv.writer(handle).writerows([head, *table] if head else table)
    (root / "index.jsonl").write_text("\n".join(map(json.dumps, index)))
    label2id = {label: i for i, label in enumerate(labels)}
    (root / "label2id.json").write_text(json.dumps(label2id))
    (root / "sets.json").write_text(json.dumps({"TINY": label2id}))
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(["box", "tile", "crate"])]
    content = {"videos": videos, "annotations": things, "categories": categories}
    (root / "train_TINY.json").write_text(json.dumps(content))
    table, common = (lambda name: str(root / name)), {"sampling": "consecutive"}
    parts = {
        "recognition": ("kinetics", {"annotations": table("recognition.csv"),
                                     "labels": table("label2id.json")}),
        "retrieval": ("index", {"index": table("index.jsonl"), "split": "train"}),
        "localization": ("localization", {"annotations": table("localization.csv"),
                                          "labels": table("sets.json")}),
        "grounding": ("grounding", {"annotations": table("grounding.csv")}),
        "instance_segmentation": ("youtube_vis", {"annotations": table("train_TINY.json"),
                                                  "pattern": "{id}.mp4"}),
        "referring_segmentation": ("mevis", {"annotations": table("expressions.csv"),
                                             "masks": table("masks")}),
    }  # fmt: skip
    return {
        name: common
        | {
            "objective": name,
            "reader": reader,
            "templates": "plain",
            "train": {"root": str(root)} | arguments,
        }
        for name, (reader, arguments) in parts.items()
    }
