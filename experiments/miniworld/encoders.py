"""The mini encoders: trained on first use, then found by what they were made of.

    siglip        the mini SigLIP, from stills and captions
    streamformer  lifted from it, trained on clips by what happens in them and when
    image         the same lift and training without temporal attention: what training alone gives

Each lies in a folder named after a digest of its world and recipe, so that nothing stale is used.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from backbone import VideoEncoder, build_encoder
from backbone.files import write_json
from experiments.config import digest
from pretrain import PretrainConfig, train
from pretrain.launch import run_processes

from .siglip import SiglipRecipe, Stills, normalize, read_stills, train_siglip

logger = logging.getLogger(__name__)

ARMS = ("siglip", "streamformer", "image")
RECIPE_VERSION = 1  # raise it when training changes in any way that no recipe field tells


@dataclass(frozen=True)
class VideoRecipe:
    """Training of the lifted mini encoders.

    Attributes:
        num_frames: rows of the time table and frames of a normal clip.
        window: frames that a frame may see, in training as in streams.
        temporal_positions: policy past the time table, in training as in streams.
        long_share, long_frames: share of batches with clips longer than the time table, for
            policies that look further back in streams than in clips; ``reset`` does not.
        gate, time_scale: the head start of time, see ``backbone.lift_siglip``.
        updates, lr, warmup: AdamW with a cosine schedule.
        localization, recognition, retrieval: clips of each task in an update.
        processes: that share an update, each with one thread; all these numbers divide by it.
        seed: of fresh weights and batches.
    """

    num_frames: int = 16
    window: int = 16
    temporal_positions: str = "reset"
    long_share: float = 0.0
    long_frames: int = 48
    gate: float = 1.0
    time_scale: float = 0.5
    updates: int = 2000
    lr: float = 1.2e-3
    warmup: int = 40
    localization: int = 8
    recognition: int = 2
    retrieval: int = 2
    processes: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        odd = {
            name: getattr(self, name)
            for name in ("localization", "recognition", "retrieval")
            if getattr(self, name) % self.processes
        }
        if odd:
            raise ValueError(
                f"{odd} clips do not divide among processes={self.processes}; change either"
            )


def mini_encoders(
    folder: Path,
    world: Path,
    arms: Sequence[str],
    siglip: SiglipRecipe,
    video: VideoRecipe,
) -> dict[str, str]:
    """Train what is not there yet below ``folder/encoders``; returns a spec per arm.

    Args:
        folder: the work folder.
        world: a rendered world.
        arms: some of :data:`ARMS`.
        siglip: how the mini SigLIP is made.
        video: how it is lifted and trained.

    Raises:
        ValueError: for an arm that does not exist.
    """
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise ValueError(f"no mini encoder named {unknown[0]!r}; there are {', '.join(ARMS)}")
    home = folder / "encoders"
    # What decides the world decides the encoders, wherever the world lies.
    origin = {"world": world.name, "version": RECIPE_VERSION}
    image = home / f"siglip-{digest({**origin, **asdict(siglip)})}"
    if not (image / "config.json").is_file():
        _appear(image, lambda out: train_siglip(world, out, siglip))
    specs = {"siglip": f"siglip:{image}"}
    for arm in ("streamformer", "image"):
        if arm in arms:
            made = home / f"{arm}-{digest({**origin, **asdict(video), 'from': image.name})}"
            _train_video(world, image, made, video, temporal=arm == "streamformer")
            specs[arm] = f"streamformer:{made}"
    return {arm: specs[arm] for arm in arms}


def _train_video(
    world: Path, siglip: Path, out: Path, recipe: VideoRecipe, *, temporal: bool
) -> None:
    """Lift and train; an unfinished run goes on where it stopped."""
    config = PretrainConfig.from_dict(
        {
            "output": str(out),
            "name": f"mini StreamFormer{'' if temporal else ' without temporal attention'}",
            "tasks": _tasks(world / "clips", recipe),
            "model": {
                "siglip": str(siglip),
                "num_frames": recipe.num_frames,
                "window": recipe.window,
                "temporal_positions": recipe.temporal_positions,
                "temporal_attention": temporal,
                "gate": recipe.gate,
                "time_scale": recipe.time_scale,
            },
            "optim": {
                "updates": recipe.updates,
                "lr": recipe.lr,
                "warmup_updates": recipe.warmup,
                "clip_norm": 1.0,
            },
            "long_share": recipe.long_share,
            "long_frames": recipe.long_frames if recipe.long_share else 0,
            "cache_in_memory": True,  # a few thousand clips of 32 pixels: some 200 MB
            "checkpoint_every": 300,
            "keep_checkpoints": 1,
            "device": "cpu",
            "seed": recipe.seed,
        }
    )
    run_processes(train, config, processes=recipe.processes)


def _tasks(clips: Path, recipe: VideoRecipe) -> dict[str, Any]:
    """Global and temporal tasks; captions keep the words of appearance in the lesson."""
    common = {"sampling": "consecutive", "templates": "plain"}

    def labelled(task: str, split: str) -> dict[str, str]:
        return {
            "annotations": str(clips / task / f"{split}.csv"),
            "labels": str(clips / task / "label2id.json"),
            "root": str(clips / "videos"),
        }

    def captioned(split: str) -> dict[str, str]:
        return {
            "index": str(clips / "index.jsonl"), "root": str(clips / "videos"), "split": split
        }  # fmt: skip

    tasks = {
        "localization": {
            "objective": "localization",
            "reader": "localization",
            "batch_size": recipe.localization // recipe.processes,
            "train": labelled("localization", "train"),
            "val": labelled("localization", "val"),
        },
        "recognition": {
            "objective": "recognition",
            "reader": "kinetics",
            "batch_size": recipe.recognition // recipe.processes,
            "weight": 0.25,
            "train": labelled("recognition", "train"),
            "val": labelled("recognition", "val"),
        },
        "retrieval": {
            "objective": "retrieval",
            "reader": "index",
            "batch_size": recipe.retrieval // recipe.processes,
            "weight": 0.25,
            "train": captioned("train"),
            "val": captioned("val"),
        },
    }
    return {name: {**task, **common} for name, task in tasks.items() if task["batch_size"]}


def _appear(folder: Path, make) -> None:
    """Let ``make`` fill a folder beside, and rename it when it is whole."""
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    beside.mkdir(parents=True)
    try:
        make(beside)
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


# -- what an encoder knows of looks ----------------------------------------------------------------


def probe_looks(world: Path, specs: Mapping[str, str], folder: Path) -> dict[str, dict[str, float]]:
    """Accuracy (0 to 1) of linear probes for shape and colour on frame embeddings, per encoder.

    Trained on the stills of one shape, read once on the validation stills; kept in ``folder``.
    """
    results = {}
    for label, spec in specs.items():
        encoder = build_encoder(spec)
        kept = folder / f"looks-{world.name}-{encoder.weights_digest}.json"
        if not kept.is_file():
            write_json(kept, linear_probe(encoder, world))
        results[label] = json.loads(kept.read_text(encoding="utf-8"))
    return results


def linear_probe(encoder: VideoEncoder, world: Path) -> dict[str, float]:
    """Validation accuracy of a linear layer on frozen frame embeddings: ``shape``, ``colour``."""
    train_set, val_set = (read_stills(world, split) for split in ("train", "val"))
    known, asked = _embed(encoder, train_set), _embed(encoder, val_set)
    mean, spread = known.mean(0), known.std(0) + 1e-6
    known, asked = (known - mean) / spread, (asked - mean) / spread
    return {
        "shape": _probe(known, _labels(train_set, train_set.shapes), asked,
                        _labels(val_set, val_set.shapes)),
        "colour": _probe(known, _labels(train_set, train_set.colours), asked,
                         _labels(val_set, val_set.colours)),
    }  # fmt: skip


def _embed(encoder: VideoEncoder, stills: Stills) -> torch.Tensor:
    images = stills.images[torch.from_numpy(stills.single)]  # (M, 3, H, W)
    parts = [
        encoder.encode(normalize(part)[:, None]).frame_embeddings[:, 0].clone()
        for part in images.split(512)
    ]
    return torch.cat(parts)  # (M, D)


def _labels(stills: Stills, names: list[str]) -> torch.Tensor:
    order = {name: number for number, name in enumerate(sorted(set(names)))}
    alone = zip(names, stills.single, strict=True)
    return torch.tensor([order[name] for name, single in alone if single])


def _probe(
    known: torch.Tensor, labels: torch.Tensor, asked: torch.Tensor, right: torch.Tensor
) -> float:
    """Multinomial logistic regression with a little weight decay, solved by L-BFGS."""
    weight = torch.zeros(known.shape[1] + 1, int(labels.max()) + 1, requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(known @ weight[:-1] + weight[-1], labels)
        loss = loss + 1e-3 * weight[:-1].square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    with torch.no_grad():
        guess = (asked @ weight[:-1] + weight[-1]).argmax(1)
    return (guess == right).float().mean().item()
