"""Training in stages, on transformers' ``Trainer``.

LLaVA's recipe for video has three stages, which differ in what trains and on what: captions of
images teach the projector, conversations about images and then about videos teach projector and
LLM. :data:`STAGES` has them with the published numbers. The tower is frozen throughout.

``run_stage`` does one stage: it trains, goes on where an earlier call was interrupted, and leaves

    <output>/                     the model, as ``checkpoints.load_model`` reads it
    <output>/training.json        the report; its presence means that the stage is finished
    <output>/resolved.json        stage, data and seed: a folder of another stage is refused
    <output>/checkpoints/         transformers' own, removed at the end

Several processes, FSDP and DeepSpeed come with ``Trainer``: start with ``torchrun`` or
``accelerate launch``, and give their settings as ``trainer`` arguments. From a shell:

    torchrun --nproc_per_node 4 -m integrations.videoqa.train
        --stage video --model STAGE2 --output STAGE3
        --data llava_video.json --root videos/ --share first:10%
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from backbone.files import read_json, write_json
from backbone.names import hint
from integrations.claims import claim
from integrations.videoqa import prompts
from integrations.videoqa.checkpoints import build_model, load_model, load_projector
from integrations.videoqa.data import (
    Conversations,
    DataError,
    Encoded,
    Record,
    Source,
    Unreadable,
    Vision,
    collate,
    pack_turns,
    read_records,
)
from integrations.videoqa.modeling import StreamformerLlavaForConditionalGeneration
from integrations.videoqa.tokens import encode_visuals, read_tokens

logger = logging.getLogger(__name__)

REPORT = "training.json"
CHECKPOINTS = "checkpoints"
LOST = "unreadable.json"  # beside each checkpoint
GRACE = 2  # unreadable files that never end a training
OURS = frozenset({
    "output_dir", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "max_steps", "warmup_steps", "lr_scheduler_type", "weight_decay", "seed",
    "remove_unused_columns", "label_names", "do_train",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What decides a stage, apart from model and data.

    Attributes:
        trains: of ``projector`` and ``language_model``.
        template: of prompts.
        lr, weight_decay: of AdamW.
        schedule: transformers' name of it, after a linear warm-up.
        warmup: share of all updates.
        batch_size: samples of an update, over all processes and accumulated batches.
        per_device: samples that one process computes at once; divides ``batch_size``.
        epochs: over the data; or
        updates: so many updates, if not 0.
        max_length: tokens at which a sequence is cut, visual ones included.
        image_layout: ``square`` or ``anyres``.
        num_frames, video_fps, force_sample: frames of a video.
        pool_mode: how patches of a video frame are pooled.
        newline_position: of the learned newline in videos.
        questions: most questions that are packed into one conversation about one video; 1: none.
        released_targets: see ``prompts.training_ids``; parity with the released Qwen model only.
        lora_rank: of adapters on the LLM, if it has none yet; 0: the LLM itself trains.
        gradient_checkpointing: recompute instead of keeping, in the LLM.
        bf16: mixed precision.
        store_features: run the tower once over all visuals and keep its tokens in memory: for data
            that are few and epochs that are many.
        max_unreadable: share of all records that may name unreadable files; more end the training.
    """

    trains: tuple[str, ...] = ("projector", "language_model")
    template: str = "vicuna_v1"
    lr: float = 2e-5
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.03
    batch_size: int = 128
    per_device: int = 4
    epochs: float = 1.0
    updates: int = 0
    max_length: int | None = 4096
    image_layout: str = "anyres"
    num_frames: int = 16
    video_fps: float = 1.0
    force_sample: bool = True
    pool_mode: str = "average"
    newline_position: str = "no_token"
    questions: int = 1
    released_targets: bool = False
    lora_rank: int = 0
    gradient_checkpointing: bool = True
    bf16: bool = True
    store_features: bool = False
    max_unreadable: float = 0.01

    def __post_init__(self) -> None:
        object.__setattr__(self, "trains", tuple(self.trains))
        prompts.get_template(self.template)
        problems = [
            f"{name}={getattr(self, name)} must be at least 1"
            for name in ("batch_size", "per_device", "questions")
            if getattr(self, name) < 1
        ]
        if self.batch_size % self.per_device:
            problems.append(
                f"batch_size={self.batch_size} does not divide by per_device={self.per_device}"
            )
        if self.updates < 0 or (not self.updates and self.epochs <= 0):
            problems.append(f"epochs={self.epochs}, updates={self.updates}: give one of them")
        if not 0 <= self.max_unreadable <= 1:
            problems.append(f"max_unreadable={self.max_unreadable} is a share, 0 to 1")
        if problems:
            raise ValueError("StageConfig: " + "; ".join(problems))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], base: StageConfig | None = None) -> StageConfig:
        """Read fields, on top of ``base``; an unknown one is refused with the nearest.

        Raises:
            ValueError: it, or a value that cannot be.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"a stage has no field {name!r}; {hint(name, known)}")
        return replace(base or cls(), **values)


# The published recipe (4 GPUs: 64 or 4 samples at once on each).
STAGES: dict[str, StageConfig] = {
    "align": StageConfig(
        trains=("projector",),
        template="plain",
        lr=1e-3,
        batch_size=256,
        per_device=64,
        image_layout="square",
    ),
    "image": StageConfig(image_layout="anyres"),
    "video": StageConfig(image_layout="anyres", pool_mode="bilinear"),
}


def run_stage(
    model: StreamformerLlavaForConditionalGeneration,
    stage: StageConfig,
    sources: Iterable[Source],
    output: Path | str,
    *,
    seed: int = 0,
    trainer: Mapping[str, Any] | None = None,
    tokens: Path | str | None = None,
) -> dict[str, Any]:
    """Train one stage in place and save the model, or load the result of an earlier call.

    Args:
        model: with its tokenizer; the earlier stage's, or of ``checkpoints.build_model``.
        stage: what trains, and how.
        sources: files of records.
        output: folder of the stage.
        seed: of shares, order and dropout. The same seed gives the same bits on a CPU.
        trainer: further ``transformers.TrainingArguments``: ``save_steps``, ``fsdp``,
            ``deepspeed``, ``dataloader_num_workers``, ``report_to``, ….
        tokens: folder of ``tokens.write_tokens`` that a stage which stores features reads; None
            to run the tower now.

    Returns:
        JSON values: ``updates``, ``loss`` (mean over the training), ``records``, ``unreadable``
        (reason by file), ``trained_parameters``.

    Raises:
        ValueError: a folder of another stage, arguments that the stage itself decides, processes
            that do not divide the batch.
        DataError: data that cannot be used, or too many files that cannot be read.
    """
    output, sources, extra = Path(output), list(sources), dict(trainer or {})
    if model.tokenizer is None:
        raise ValueError("model.tokenizer is not set; load the model with checkpoints.load_model")
    taken = sorted(OURS & extra.keys())
    if taken:
        raise ValueError(f"trainer arguments {', '.join(taken)}: the stage decides them itself")
    prepare(model, stage)
    arguments = _arguments(stage, output, seed, extra)
    _claim(output, stage, sources, seed, model)
    if (output / REPORT).is_file():
        logger.info("%s: finished earlier", output)
        _reload(model, output)
        return read_json(output / REPORT)
    records = read_records(sources, seed)
    records = pack_turns(records, stage.questions) if stage.questions > 1 else records
    features = _features(model, records, tokens) if stage.store_features else None
    data = Conversations(
        records,
        Vision.of(model),
        model.tokenizer,
        stage.template,
        stage.released_targets,
        features,
    )
    set_seed(seed)
    run = StageTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=partial(
            collate,
            pad_id=model.pad_id,
            side=model.config.padding_side,
            stored=stage.store_features,
        ),
        limit=max(GRACE, int(stage.max_unreadable * len(records))),
    )
    checkpoints = output / CHECKPOINTS
    last = get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None
    if last is not None:
        logger.info("%s: goes on from %s", output, last)
        run.lost.update(read_json(Path(last) / LOST))
    trained = run.train(resume_from_checkpoint=last)
    report = {
        "updates": trained.global_step,
        "loss": trained.training_loss,
        "records": len(records),
        "unreadable": dict(sorted(run.gather_lost().items())),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    if report["unreadable"]:
        logger.warning(
            "%s: %d files could not be read and were left out: %s",
            output, len(report["unreadable"]), ", ".join(list(report["unreadable"])[:5]),
        )  # fmt: skip
    run.save(output)
    if run.is_world_process_zero():
        write_json(output / REPORT, report)
        shutil.rmtree(arguments.output_dir, ignore_errors=True)
    run.accelerator.wait_for_everyone()
    model.eval()
    return report


def prepare(model: StreamformerLlavaForConditionalGeneration, stage: StageConfig) -> None:
    """Let the model be as the stage wants it: its config, and what of it trains."""
    names = ("template", "max_length", "image_layout", "num_frames", "video_fps", "force_sample",
             "pool_mode", "newline_position")  # fmt: skip
    for name in names:
        setattr(model.config, name, getattr(stage, name))
    model.config.validate_architecture()
    model.visual_cache.clear()
    if stage.lora_rank and not model.config.lora_rank:
        model.add_lora(stage.lora_rank)
    model.train_only(*stage.trains)


def _features(
    model: StreamformerLlavaForConditionalGeneration,
    records: Sequence[Record],
    tokens: Path | str | None,
) -> dict[Path, Encoded | Unreadable]:
    """Tower tokens of all visuals: those that are kept, or computed now."""
    if tokens is None:
        return encode_visuals(model, records)
    return read_tokens(model, records, tokens)


class StageTrainer(Trainer):
    """Transformers' trainer that keeps account of what could not be read.

    Attributes:
        lost: reason by file, of this process.
    """

    def __init__(self, *, limit: int, **arguments: Any) -> None:
        self.lost: dict[str, str] = {}
        self.limit = limit
        super().__init__(**arguments)
        for own in (PrinterCallback, ProgressCallback):  # they write to stdout
            self.remove_callback(own)
        if not self.args.disable_tqdm:
            self.add_callback(_Bar())
        self.add_callback(_KeepLost(self))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's loss; files that are missing from the batch are noted.

        Raises:
            DataError: by now they are too many.
        """
        for source, reason in inputs.pop("unreadable"):
            if source not in self.lost:
                logger.warning("left out, it cannot be read: %s", reason)
            self.lost[source] = reason
        if len(self.lost) > self.limit:
            listed = "; ".join(list(self.lost.values())[:3])
            raise DataError(
                f"{len(self.lost)} files cannot be read, {self.limit} may be (max_unreadable): "
                f"{listed}; mend them, take them from the list, or allow more"
            )
        # An update of nothing but unreadable files has no token to divide its loss by.
        if num_items_in_batch is not None:
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def gather_lost(self) -> dict[str, str]:
        """What any process could not read."""
        gathered = gather_object(list(self.lost.items()))
        return dict(tuple(item) for item in gathered)

    def save(self, folder: Path) -> None:
        """Write the whole model, also where processes hold parts of it."""
        self.save_model(str(folder))
        if self.is_world_process_zero():
            for name in ("training_args.bin",):  # a pickle of this run's arguments
                (folder / name).unlink(missing_ok=True)
            self.accelerator.unwrap_model(self.model).tokenizer.save_pretrained(folder)


class _Bar(ProgressCallback):
    """transformers' progress bar, with the loss in it instead of in lines on stdout."""

    def on_log(
        self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **_: Any
    ) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}", refresh=False)


class _KeepLost(TrainerCallback):
    """Writes what could not be read beside each checkpoint."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        lost = self.trainer.gather_lost()
        if state.is_world_process_zero:
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / LOST, lost)


# -- arguments -------------------------------------------------------------------------------------


def _arguments(
    stage: StageConfig, output: Path, seed: int, extra: Mapping[str, Any]
) -> TrainingArguments:
    known = {field.name for field in fields(TrainingArguments)}
    recompute = "activation_checkpointing"  # what transformers calls it since some release of 5
    defaults = {
        "bf16": stage.bf16 and torch.cuda.is_available(),
        recompute if recompute in known else "gradient_checkpointing": stage.gradient_checkpointing,
        "logging_steps": 10,
        "save_steps": 500,
        "save_total_limit": 1,
        "report_to": "none",
    }
    unknown = sorted(extra.keys() - known)
    if unknown:
        raise ValueError(
            f"transformers.TrainingArguments has no {unknown[0]!r}; {hint(unknown[0], known)}"
        )
    arguments = TrainingArguments(
        output_dir=str(output / CHECKPOINTS),
        learning_rate=stage.lr,
        weight_decay=stage.weight_decay,
        lr_scheduler_type=stage.schedule,
        warmup_steps=stage.warmup,  # below 1 it is a share of all updates
        per_device_train_batch_size=stage.per_device,
        num_train_epochs=stage.epochs,
        max_steps=stage.updates or -1,
        seed=seed,
        remove_unused_columns=False,
        label_names=["labels"],
        **{**defaults, **extra},
    )
    processes = arguments.world_size * max(1, arguments.n_gpu)
    if stage.batch_size % (stage.per_device * processes):
        raise ValueError(
            f"batch_size={stage.batch_size} does not divide among {processes} devices with "
            f"per_device={stage.per_device} samples at once; change one of them"
        )
    arguments.gradient_accumulation_steps = stage.batch_size // (stage.per_device * processes)
    return arguments


def _claim(
    output: Path,
    stage: StageConfig,
    sources: Sequence[Source],
    seed: int,
    model: StreamformerLlavaForConditionalGeneration,
) -> None:
    """Make sure that what was trained in the folder belongs to this very stage."""
    listed = [{**asdict(source), "json": str(source.json)} for source in sources]
    resolved = {
        "stage": asdict(stage),
        "sources": [{**entry, "root": entry["root"] and str(entry["root"])} for entry in listed],
        "seed": seed,
        "tower": model.tower.encoder.settings(),
    }
    trained = (output / REPORT).is_file() or (output / CHECKPOINTS).is_dir()
    claim(output, resolved, trained)


def _reload(model: StreamformerLlavaForConditionalGeneration, folder: Path) -> None:
    """Give the model the weights of a finished stage, in place."""
    done, _ = load_model(folder, dtype=model.dtype)
    model.load_state_dict(done.state_dict())
    model.visual_cache.clear()
    model.eval()


# -- the command -----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run one stage from a shell; the options are those of `run_stage`."""
    parser = argparse.ArgumentParser(
        prog="python -m integrations.videoqa.train",
        description="Train one stage of a video question answering model.",
    )
    add = parser.add_argument
    add("--stage", required=True, choices=sorted(STAGES), help="where the numbers come from")
    add("--model", required=True, help="the earlier stage, or an LLM with --tower")
    add("--tower", help="kind:source; makes a new model of the LLM and this encoder")
    add("--projector", help="a first stage's projector, for a new model")
    add("--data", required=True, action="append", help="JSON; may be repeated")
    add("--root", action="append", help="folder of its videos or images, in the same order")
    add("--share", action="append", help="all, first:10%%, …, in the same order")
    add("--output", required=True, type=Path)
    add("--seed", type=int, default=0)
    add("--dtype", default="auto", help="of the weights: auto, float32, bfloat16")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="of the stage")
    add("--trainer", action="append", default=[], metavar="NAME=VALUE", help="TrainingArguments")
    options = parser.parse_args(argv)
    sources = _sources(options.data, options.root or [], options.share or [], parser)
    stage = StageConfig.from_dict(_pairs(options.set, parser), STAGES[options.stage])
    if options.tower:
        model, _ = build_model(options.model, options.tower, dtype=options.dtype)
        if options.projector:
            load_projector(model, options.projector)
    elif options.projector:
        parser.error("--projector goes into a new model; give --tower, too")
    else:
        model, _ = load_model(options.model, dtype=options.dtype)
    extra = _pairs(options.trainer, parser)
    return run_stage(model, stage, sources, options.output, seed=options.seed, trainer=extra)


def _sources(
    data: Sequence[str],
    roots: Sequence[str],
    shares: Sequence[str],
    parser: argparse.ArgumentParser,
) -> list[Source]:
    for name, values in (("--root", roots), ("--share", shares)):
        if len(values) not in (0, 1, len(data)):
            parser.error(f"{len(data)} --data with {len(values)} {name}; give one, or one for each")
    many = len(data)
    all_roots = list(roots) * many if len(roots) == 1 else list(roots) or [None] * many
    all_shares = list(shares) * many if len(shares) == 1 else list(shares) or ["all"] * many
    return [Source(*row) for row in zip(data, all_roots[:many], all_shares[:many], strict=True)]


def _pairs(items: Sequence[str], parser: argparse.ArgumentParser) -> dict[str, Any]:
    """``name=value``; values are JSON where they can be, else text."""
    pairs = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals:
            parser.error(f"{item!r} is no NAME=VALUE")
        try:
            pairs[name] = json.loads(text)
        except ValueError:
            pairs[name] = text
    return pairs


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    main()


__all__ = [
    "STAGES",
    "StageConfig",
    "StageTrainer",
    "main",
    "prepare",
    "run_stage",
]
