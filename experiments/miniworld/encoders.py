"""The mini encoders: trained on first use, then found by what they were made of.

    siglip        the mini SigLIP, from stills and captions
    streamformer  lifted from it, trained on clips by what happens in them and when
    image         the same lift and training without temporal attention: what training alone gives

Each lies in a folder named after a digest of its world and recipe, so that nothing stale is used.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from backbone import VideoEncoder, build_encoder
from backbone.files import write_json
from experiments import recipe
from experiments.config import digest, sections

from .params import WorldParams
from .render import appearing, render_world
from .siglip import SiglipRecipe, Stills, normalize, read_stills, train_siglip

logger = logging.getLogger(__name__)

ARMS = ("siglip", "streamformer", "image")
RECIPE_VERSION = 2  # raise it when training changes in any way that no recipe field tells
# Sections of a config that make a model, as far as it has them.
DECIDING = ("model", "optim", "tasks", "run", "launch", "instances")


def specs_of(labels: Mapping[str, str], folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Specs by label: bare ones mean mini encoders, trained on first use, or found trained.

    Args:
        labels: label -> spec, or the name of a mini encoder.
        folder: the work folder.
        config: of a downstream task, with the sections ``world`` and ``mini``.
    """
    bare = [spec for spec in labels.values() if ":" not in spec]
    if not bare:
        return dict(labels)
    world = render_world(folder / "miniworld", WorldParams(**config["world"]))
    trained = mini_encoders(folder, world, bare, config["mini"])
    return {label: trained.get(spec, spec) for label, spec in labels.items()}


def mini_encoders(
    folder: Path, world: Path, arms: Sequence[str], config: Mapping[str, Any]
) -> dict[str, str]:
    """Train what is not there yet below ``folder/encoders``; returns a spec per arm.

    Args:
        folder: the work folder.
        world: a rendered world.
        arms: some of :data:`ARMS`.
        config: of the pretraining, from ``recipe.resolve``; its batches are per process.

    Raises:
        ValueError: for an arm that does not exist.
    """
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise ValueError(f"no mini encoder named {unknown[0]!r}; there are {', '.join(ARMS)}")
    image = mini_siglip(folder, world, SiglipRecipe(**config["mini_siglip"]))
    source = recipe.Source("miniworld", recipe.videos(config, folder, world), str(image), world)
    specs = {"siglip": f"siglip:{image}"}
    for arm in [arm for arm in arms if arm != "siglip"]:
        own = sections(config, DECIDING)
        # Zero-shot numbers are what the verb pretrain is for; here they would only take time.
        own["tasks"] = {name: {**task, "val": None} for name, task in config["tasks"].items()}
        own["model"] = {**config["model"], "temporal_attention": arm == "streamformer"}
        made = folder / "encoders" / f"{arm}-{digest({**own, **_origin(world, image.name)})}"
        name = "mini StreamFormer" + (" without temporal attention" if arm == "image" else "")
        settings = recipe.training(own, source, made, device="cpu", eval_every=0, name=name)
        recipe.train(settings, config["launch"]["processes"])
        specs[arm] = f"streamformer:{made}"
    return {arm: specs[arm] for arm in arms}


def mini_siglip(folder: Path, world: Path, made_by: SiglipRecipe) -> Path:
    """The mini SigLIP of a rendered world, below ``folder/encoders``; trained if need be."""
    made = folder / "encoders" / f"siglip-{digest({**_origin(world), **asdict(made_by)})}"
    if not (made / "config.json").is_file():
        with appearing(made, whole="config.json") as out:
            train_siglip(world, out, made_by)
    return made


def _origin(world: Path, siglip: str = "") -> dict[str, Any]:
    """What decides an encoder beside its recipe: the world, and what is lifted."""
    return {"world": world.name, "version": RECIPE_VERSION, "from": siglip}


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
