"""Train and evaluate a MAT head on extracted features, by mmengine's ``Runner``.

``run_oad`` does one run: it trains, goes on where an earlier call was interrupted, evaluates the
averaged weights of the last epoch and leaves the result in a file, which the next call returns.
Nothing is chosen by what evaluation says: the number of epochs is the config's.

    <work dir>/resolved.json        the whole config, seed, encoder and origin of the features
    <work dir>/test_results.json    the result; its presence means that the run is finished
    <work dir>/head.safetensors     the evaluated head, see ``checkpoints.load_head``
    <work dir>/training/            mmengine's checkpoints and logs
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dataset import default_collate, pseudo_collate
from torch.utils.data import DataLoader

from backbone.files import read_json, write_json
from integrations.claims import claim
from integrations.oad.checkpoints import save_head
from integrations.oad.config import DataConfig, EvalConfig, OadConfig
from integrations.oad.data import (
    EpochSampler,
    OadVideos,
    OadWindows,
    feature_size,
    read_data_info,
    read_session,
)
from integrations.oad.features import read_facts
from integrations.oad.hooks import (
    AverageWeights,
    DecayMatrices,
    EpochSeed,
    ProgressBar,
    WarmupCosineLR,
)
from integrations.oad.mat import MatHead
from integrations.oad.mat_config import MatConfig
from integrations.oad.metrics import PerFrameAP, metric_name
from integrations.oad.model import MatDetector
from integrations.runs import (
    FiniteLoss,
    PlainMessageHub,
    QuietRunner,
    device_of,
    instances,
    last_checkpoint,
    threads,
)

logger = logging.getLogger(__name__)

RESULTS = "test_results.json"
ENCODERS_OWN = ("encoder", "dim", "image_size", "image_mean", "image_std")  # of features.json


def run_oad(
    config: Mapping[str, Any],
    features_root: str | Path,
    data_root: str | Path,
    work_dir: str | Path,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Train one head and evaluate it, or return the result of an earlier call.

    Args:
        config: sections ``data``, ``head``, ``train``, ``eval``, see ``config.OadConfig``.
        features_root: folder of the encoder's features.
        data_root: folder of ``target_perframe`` and ``data_info.json``.
        work_dir: where all files of the run go. A folder that holds a run of another config,
            seed or encoder is refused.
        seed: of weights, windows and order. The same seed gives the same bits on a CPU.
        device: "cpu", "cuda", "cuda:1", ..., or "auto".

    Returns:
        JSON values: ``val`` and ``test``, each by set name the metrics of each protocol
        as ``metrics.PerFrameAP`` names them (``online/mAP``, ...), ``epochs``, ``iterations``,
        ``parameters``.

    Raises:
        ValueError: the config, the data or the work dir are not usable; the message says why.
    """
    settings = OadConfig.from_dict(config.to_dict() if isinstance(config, Config) else config)
    work_dir, data_root, features_root = Path(work_dir), Path(data_root), Path(features_root)
    work_dir.mkdir(parents=True, exist_ok=True)
    folder, finished = work_dir / "training", work_dir / RESULTS
    trained = finished.is_file() or last_checkpoint(folder)[0] is not None
    claim(work_dir, _resolved(settings, features_root, seed), trained)
    if finished.is_file():
        logger.info("%s: finished earlier", finished)
        return read_json(finished)
    videos = _video_arguments(settings.data, features_root, data_root)
    windows = OadWindows(
        _head_config(settings, features_root, data_root),
        seed,
        session=settings.data.train_set,
        **videos,
    )
    named = {*settings.data.val_sets, *settings.data.test_sets}
    loaders = {name: _videos_loader(videos, name, settings.eval) for name in sorted(named)}
    with (
        threads(settings.train.threads),
        instances("oad") as name,
        closing(_build_runner(settings, windows, loaders, folder, seed, device, name)) as runner,
    ):
        runner.train()
        scores = {
            kind: {name: runner.test_on(loaders[name], _evaluator(settings.eval)) for name in names}
            for kind, names in (("val", settings.data.val_sets), ("test", settings.data.test_sets))
        }
        head = runner.evaluated_head()
        save_head(head, work_dir / "head.safetensors", _notes(windows, features_root))
        results = {
            **scores,
            "epochs": runner.epoch,
            "iterations": runner.iter,
            "parameters": sum(p.numel() for p in head.parameters()),
        }
    write_json(finished, results)
    return results


class OadRunner(QuietRunner):
    """The runner of a MAT head; evaluation uses the averaged weights."""

    def evaluated_head(self) -> MatHead:
        """The head with the weights that evaluation uses."""
        averages = [hook.ema_model for hook in self.hooks if isinstance(hook, AverageWeights)]
        return (averages[0].module if averages else self.model).head


def _build_runner(
    settings: OadConfig,
    windows: OadWindows,
    loaders: Mapping[str, DataLoader],
    folder: Path,
    seed: int,
    device: str,
    name: str,
) -> OadRunner:
    """A runner ready to train, or to go on from the newest checkpoint in its folder."""
    train, meta = settings.train, windows.metainfo
    last, _ = last_checkpoint(folder)
    batches = DataLoader(
        windows,
        batch_size=train.batch_size,
        sampler=EpochSampler(windows, seed),
        num_workers=train.num_workers,  # forked anew each epoch, after its windows are drawn
        collate_fn=default_collate,
    )
    per_epoch = len(batches)
    validates = bool(settings.data.val_sets) and train.validate_every > 0
    return OadRunner(
        device=device_of(device),
        model={
            "type": MatDetector,
            "head": windows.head.to_dict(),
            "ignore_index": meta["ignore_index"],
            "protocols": settings.eval.protocols,
            "softmax": settings.eval.softmax,
            "opening": settings.eval.opening,
            "batch_windows": settings.eval.batch_windows,
            "stage_weights": train.stage_weights,
            "future_weight": train.future_weight,
        },
        work_dir=str(folder),
        train_dataloader=batches,
        train_cfg={
            "by_epoch": True,
            "max_epochs": train.epochs,
            "val_interval": train.validate_every,
        }
        if validates
        else {"by_epoch": True, "max_epochs": train.epochs},
        val_dataloader=loaders[settings.data.val_sets[0]] if validates else None,
        val_cfg={} if validates else None,
        val_evaluator=_evaluator(settings.eval) if validates else None,
        optim_wrapper={
            **({} if train.decay_all else {"constructor": DecayMatrices}),
            "optimizer": {
                "type": "Adam",
                "lr": train.lr,
                "weight_decay": train.weight_decay,
                "fused": True,
            },
        },
        param_scheduler={
            "type": WarmupCosineLR,
            "end": windows.count_iterations(train.epochs, train.batch_size),
            "warmup": train.warmup_epochs * per_epoch,
            "factor": train.warmup_factor,
            "ahead": train.schedule_ahead,
        },
        default_hooks={
            "logger": {"type": "LoggerHook", "interval": sys.maxsize},  # once per epoch
            "checkpoint": {
                "type": "CheckpointHook",
                "interval": train.checkpoint_every,
                "max_keep_ckpts": 2,  # the older one goes before the newer one is written
            },
        },
        custom_hooks=[
            {"type": EpochSeed},
            {"type": PlainMessageHub},
            {
                "type": ProgressBar,
                "metric": f"{settings.eval.protocols[0]}/{metric_name(meta['calibrated'])}",
            },
            {"type": FiniteLoss},
            *(
                [{"type": AverageWeights, "momentum": train.ema_momentum}]
                if train.ema_momentum
                else []
            ),
        ],
        log_processor={"window_size": per_epoch},
        resume=last is not None,
        load_from=last and str(last),
        randomness={"seed": seed},
        # Types are given as classes: a search for names through mmaction2's registries would
        # import all of it, and what its visualisers import.
        default_scope="mmengine",
        experiment_name=name,
    )


def _notes(windows: OadWindows, features_root: Path) -> dict[str, Any]:
    """What a live detector must know beside the weights."""
    meta = windows.metainfo
    names = ("dataset", "classes", "ignore_index", "fps")
    return {name: meta[name] for name in names} | {"features": _facts(features_root)}


def _facts(features_root: Path) -> dict[str, Any] | None:
    """How the features were made; None for foreign ones."""
    path = features_root / "features.json"
    return read_facts(path) if path.is_file() else None


def _resolved(settings: OadConfig, features_root: Path, seed: int) -> dict[str, Any]:
    """All that decides a run; what the encoder brings stands apart from how features were made."""
    facts = _facts(features_root) or {}
    return {
        **settings.to_dict(),
        "seed": seed,
        "encoder": {key: facts[key] for key in ENCODERS_OWN if key in facts},
        "features": {key: value for key, value in facts.items() if key not in ENCODERS_OWN},
    }


def _head_config(settings: OadConfig, features_root: Path, data_root: Path) -> MatConfig:
    """The head's config; its sizes come from the first training video and the class list."""
    data = settings.data
    first = read_session(data_root, data.dataset, data.train_set)[0]
    motion = feature_size(data_root / data.motion, first) if data.motion else 0
    visual = feature_size(features_root, first)
    classes = len(read_data_info(data_root, data.dataset)["class_names"])
    return settings.mat(visual, motion, classes)


def _video_arguments(data: DataConfig, features_root: Path, data_root: Path) -> dict[str, Any]:
    """What all data sets of the run share."""
    return {
        "data_root": str(data_root),
        "features": str(features_root),
        "dataset": data.dataset,
        "motion": str(data_root / data.motion) if data.motion else None,
        "fps": data.fps,
        "protocol": data.protocol,
        "foreign": data.foreign,
        "slack": data.slack,
        "preload": data.preload,
    }


def _videos_loader(videos: Mapping[str, Any], session: str, evaluation: EvalConfig) -> DataLoader:
    """Whole videos of one set, in order."""
    dataset = OadVideos(session=session, test_mode=True, **videos)
    return DataLoader(dataset, batch_size=evaluation.batch_videos, collate_fn=pseudo_collate)


def _evaluator(evaluation: EvalConfig) -> list[dict]:
    options = {"smooth": evaluation.smooth, "switch": evaluation.switch}
    return [{"type": PerFrameAP, "protocol": p, **options} for p in evaluation.protocols]
