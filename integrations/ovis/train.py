"""Train and evaluate a segmenter over a frozen encoder, by mmengine's ``Runner``.

``run_ovis`` does one run: it trains, goes on where an earlier call was interrupted, evaluates the
last weights online and leaves the result in a file, which the next call returns. Nothing is chosen
by what evaluation says: the number of iterations is the config's.

    <work dir>/resolved.json            the whole config, seed and encoder
    <work dir>/results.json             the result; its presence means that the run is finished
    <work dir>/segmenter.safetensors    adapter and head, see ``weights.load_segmenter``
    <work dir>/predictions_test.json    what was found in the test videos; evaluation reads it
    <work dir>/training/                mmengine's checkpoints (of what trains) and logs
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch.utils.data import DataLoader

from backbone import VideoEncoder
from backbone.files import read_json, write_json
from integrations.claims import claim
from integrations.ovis.config import DataConfig, OvisConfig
from integrations.ovis.data import (
    ClipBatches,
    ClipSource,
    VideoClips,
    WholeVideos,
    collate_clips,
    collate_videos,
)
from integrations.ovis.hooks import (
    ClipLoop,
    IterationBar,
    IterationSeed,
    SegmenterOptimizer,
    learning_rate_curve,
)
from integrations.ovis.layout import (
    COCO_TO_YTVIS2019,
    VideoSet,
    hold_out,
    match_categories,
    read_coco,
    read_release,
)
from integrations.ovis.metrics import TrackAP
from integrations.ovis.model import OvisModel
from integrations.ovis.submission import write_submission
from integrations.ovis.tokens import TokenClips, check, collate_tokens, describe
from integrations.ovis.weights import save_segmenter
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

RESULTS = "results.json"
SEGMENTER = "segmenter.safetensors"
SUBMISSION = "submission.zip"


@dataclass(frozen=True)
class Splits:
    """The videos of a run.

    Attributes:
        sources: to train on.
        val: evaluated for the log, or None.
        test: evaluated once.
        submit: predicted for a server, or None.
    """

    sources: list[ClipSource]
    val: VideoSet | None
    test: VideoSet
    submit: VideoSet | None

    @property
    def train(self) -> VideoSet:
        """The videos among the sources."""
        return self.sources[0].videos


def read_splits(data: DataConfig, root: str | Path) -> Splits:
    """Read the videos that a config names, below ``root``.

    Raises:
        layout.LayoutError: documents or folders that are not there, or contradict themselves.
    """
    train = read_release(data.dataset, root, data.train_split)
    if data.test_split is None:
        train, test = hold_out(train, data.hold_out)
    else:
        test = read_release(data.dataset, root, data.test_split)
    clips = {"num_frames": data.num_frames, "reach": data.reach, "spacing": data.spacing}
    sources = [
        ClipSource(videos=train, augmentation=data.clips(), weight=data.video_weight, **clips)
    ]
    if data.coco:
        pictures = _pictures(data, train)
        how = data.clips(pictures=True)
        sources.append(
            ClipSource(videos=pictures, augmentation=how, weight=data.coco_weight, **clips)
        )
    others = [
        read_release(data.dataset, root, split) if split else None
        for split in (data.val_split, data.submit_split)
    ]
    return Splits(sources, others[0], test, others[1])


def run_ovis(
    config: Mapping[str, Any],
    encoder: VideoEncoder,
    data_root: str | Path,
    work_dir: str | Path,
    seed: int = 0,
    device: str = "auto",
    tokens_root: str | Path | None = None,
) -> dict[str, Any]:
    """Train one segmenter and evaluate it, or return the result of an earlier call.

    Args:
        config: sections as of ``config.OvisConfig``.
        encoder: frozen; moved to the device.
        data_root: folder of the data set.
        work_dir: where all files of the run go. A folder that holds a run of another config,
            seed or encoder is refused.
        seed: of weights, clips and points. The same seed gives the same bits on a CPU.
        device: "cpu", "cuda", "cuda:1", ..., or "auto".
        tokens_root: folder of ``tokens.write_tokens``; needed for ``data.stored``.

    Returns:
        JSON values: ``test`` and, if there is a split for it, ``val``, each the metrics of
        ``metrics.TrackAP`` without its prefix, in points; ``iterations``, ``parameters``.

    Raises:
        ValueError: the config, the data or the work dir are not usable; the message says why.
    """
    settings = OvisConfig.from_dict(config.to_dict() if isinstance(config, Config) else config)
    work_dir = Path(work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    folder = work_dir / "training"
    finished = work_dir / RESULTS
    resolved = {**settings.to_dict(), "seed": seed, "encoder": encoder.settings()}
    trained = finished.is_file() or last_checkpoint(folder)[0] is not None
    claim(work_dir, resolved, trained)
    if finished.is_file():
        logger.info("%s: finished earlier", finished)
        return read_json(finished)
    place = device_of(device)
    if settings.train.precision != "float32" and place.type == "cpu":
        raise ValueError(
            f"train.precision={settings.train.precision!r} needs a GPU, and the device is {place}; "
            'set train.precision="float32"'
        )
    splits = read_splits(settings.data, data_root)
    with threads(settings.train.threads), instances("ovis") as name:
        torch.manual_seed(seed)
        model = _build_model(settings, encoder.to(place), splits)
        batches = _batches(settings, splits, model, folder, seed, tokens_root)
        runner = _build_runner(settings, model, batches, splits, folder, seed, place, name)
        with closing(runner):
            runner.train()
            results = _evaluate(runner, settings, splits, work_dir)
        notes = {
            "dataset": settings.data.dataset,
            "classes": list(splits.train.class_names),
            "encoder": encoder.settings(),
            "short": settings.data.short,
            "longest": settings.data.longest,
            "tracker": settings.tracker.to_dict(),
            "mode": settings.eval.mode,
            "chunk_frames": settings.eval.chunk_frames,
        }
        save_segmenter(model.adapter, model.head, work_dir / SEGMENTER, notes)
    write_json(finished, results)
    return results


def _build_model(settings: OvisConfig, encoder: VideoEncoder, splits: Splits) -> OvisModel:
    return OvisModel(
        encoder,
        settings.adapter,
        {**settings.head, "num_classes": len(splits.train.categories)},
        loss=settings.loss,
        contrastive=settings.contrastive,
        tracker=settings.tracker,
        video=settings.video,
        mode=settings.eval.mode,
        chunk_frames=settings.eval.chunk_frames,
    )


def _batches(
    settings: OvisConfig,
    splits: Splits,
    model: OvisModel,
    folder: Path,
    seed: int,
    tokens_root: str | Path | None,
) -> DataLoader:
    """Batches of clips, from the one after those of the newest checkpoint."""
    train, data = settings.train, settings.data
    if data.stored:
        if tokens_root is None:
            raise ValueError("data.stored=True needs tokens_root, see tokens.write_tokens")
        facts = describe(model.encoder, model.adapter.taps, data.short, data.longest)
        check(Path(tokens_root), facts)
        clips: VideoClips = TokenClips(splits.sources, tokens_root, seed)
    else:
        clips = VideoClips(splits.sources, seed)
    start = min(last_checkpoint(folder)[1], train.iterations)
    return DataLoader(
        clips,
        batch_sampler=ClipBatches(
            splits.sources, train.batch_size, train.iterations, seed, start=start
        ),
        num_workers=train.num_workers,
        collate_fn=collate_tokens if data.stored else collate_clips,
        pin_memory=model.encoder.device.type == "cuda",
    )


def _build_runner(
    settings: OvisConfig,
    model: OvisModel,
    batches: DataLoader,
    splits: Splits,
    folder: Path,
    seed: int,
    device: torch.device,
    name: str,
) -> QuietRunner:
    """A runner ready to train, or to go on from the newest checkpoint in its folder."""
    train = settings.train
    last, _ = last_checkpoint(folder)
    validates = splits.val is not None and train.validate_every > 0
    return QuietRunner(
        device=device,
        model=model,
        work_dir=str(folder),
        train_dataloader=batches,
        train_cfg={
            "type": ClipLoop,
            "max_iters": train.iterations,
            "val_interval": train.validate_every or train.iterations,
        },
        val_dataloader=_videos(splits.val, settings.data) if validates else None,
        val_cfg={} if validates else None,
        val_evaluator=_evaluator(settings) if validates else None,
        optim_wrapper={
            "constructor": SegmenterOptimizer,
            "type": "OptimWrapper",
            "lr": train.lr,
            "weight_decay": train.weight_decay,
            "rates": dict(train.rates),
            "clip_norm": train.clip_norm,
            "precision": train.precision,
        },
        param_scheduler=learning_rate_curve(
            train.schedule, train.iterations, train.milestones, train.warmup
        ),
        default_hooks={
            "sampler_seed": None,  # every clip has its own
            "logger": {"type": "LoggerHook", "interval": min(50, train.iterations)},
            "checkpoint": {
                "type": "CheckpointHook",
                "by_epoch": False,
                "interval": train.checkpoint_every,
                "max_keep_ckpts": 2,  # the older one goes before the newer one is written
            },
        },
        custom_hooks=[
            {"type": IterationSeed},
            {"type": PlainMessageHub},
            {"type": IterationBar},
            {"type": FiniteLoss},
        ],
        log_processor={"by_epoch": False, "window_size": 50},
        resume=last is not None,
        load_from=last and str(last),
        randomness={"seed": seed},
        default_scope="mmengine",
        experiment_name=name,
    )


def _evaluate(
    runner: QuietRunner, settings: OvisConfig, splits: Splits, work_dir: Path
) -> dict[str, Any]:
    """All numbers of the last weights, and a submission where one is wanted."""
    results: dict[str, Any] = {}
    for kind, videos in (("val", splits.val), ("test", splits.test)):
        if videos is None:
            continue
        out = str(work_dir / f"predictions_{kind}.json")
        found = runner.test_on(_videos(videos, settings.data), _evaluator(settings, out))
        results[kind] = {key.removeprefix("ytvis/"): value for key, value in found.items()}
    if splits.submit is not None:
        _submit(runner, settings, splits.submit, work_dir)
    model = runner.model
    trained = (weight for weight in model.parameters() if weight.requires_grad)
    return {
        **results,
        "iterations": runner.iter,
        "parameters": sum(weight.numel() for weight in trained),
    }


@torch.no_grad()
def _submit(runner: QuietRunner, settings: OvisConfig, videos: VideoSet, work_dir: Path) -> None:
    """Predict a split and pack it for its server."""
    model = runner.model.eval()
    predictions = [
        item
        for batch in _videos(videos, settings.data)
        for sample in model.test_step(batch)
        for item in sample.result.predictions(sample.video_id, videos.category_ids)
    ]
    document = {
        "videos": [
            {"id": v.id, "height": v.height, "width": v.width, "length": len(v.files),
             "file_names": list(v.files)}
            for v in videos.videos
        ],
        "categories": [{"id": n, "name": name} for n, name in videos.categories.items()],
    }  # fmt: skip
    write_submission(work_dir / SUBMISSION, predictions, document)


def _videos(videos: VideoSet, data: DataConfig) -> DataLoader:
    """Whole videos in order, one at a time."""
    return DataLoader(WholeVideos(videos, data.short, data.longest), collate_fn=collate_videos)


def _evaluator(settings: OvisConfig, out: str | None = None) -> list[dict]:
    return [{"type": TrackAP, "groups": dict(settings.eval.groups), "out": out}]


def _pictures(data: DataConfig, videos: VideoSet) -> VideoSet:
    """COCO's pictures in the categories of the videos."""
    if data.dataset == "ytvis2019":
        mapping: Mapping[int, int] = COCO_TO_YTVIS2019
    else:
        known = {item["id"]: item["name"] for item in read_json(data.coco)["categories"]}
        mapping = match_categories(known, videos.categories)
    return read_coco(data.coco, data.coco_root, videos.categories, mapping, name="COCO")
