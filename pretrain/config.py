"""What a training run can be told: frozen dataclasses, checked once, unknown keys refused.

Read from nested dicts (`PretrainConfig.from_dict`) at the edge and stored beside the results;
inner code takes values out of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from backbone.names import hint
from pretrain.datasets import READERS
from pretrain.datasets.augment import Augmentation
from pretrain.datasets.frames import RULES, VIEWS
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.dense import SpatialLoss
from pretrain.text import resolve_templates

Freeze = Literal["none", "spatial_attention", "image"]
Decay = Literal["matrices", "released"]


@dataclass(frozen=True)
class TaskConfig:
    """One task of the mix: an objective, and the data that it is trained and measured on.

    objective: a name of `objectives.OBJECTIVES`.
    reader: the annotation family, a name of `datasets.READERS`; ``train`` and ``val`` are the
        arguments of that reader (annotations, root, …). Without ``val`` the task is not measured.
    weight: of its loss in an update. Weights are divided by their sum.
    batch_size: clips per update and process; None takes the run's.
    sampling, stride: which frames make a clip (`datasets.frames`).
    augmentation: none, crop, strong or, with masks, things (`datasets.augment`).
    flip: mirror clips half of the time; never for directional labels.
    directional: labels tell left from right, so ``flip`` is refused.
    templates: prompts around labels: "video", "plain" or a list of one's own.
    views: of recognition's test: clips over time, and squares along the long side, whose class
        probabilities are averaged. (4, 3) with "segments" is the protocol of Kinetics, (2, 3) with
        "blocks" that of Something-Something; (1, 1) is a single clip as in validation.
    reduction: of grounding: "mean" over the frames of a clip, or their "sample_sum", as released,
        which makes the task weigh as many times more as its clips have frames.
    spatial_loss: of the two segmentation tasks: "sigmoid", on patches, or "softmax", on the pixels
        of things alone, as released.
    max_classes: labels that a clip of instance segmentation is scored against at a time.
    """

    objective: str
    reader: str
    train: Mapping[str, Any]
    val: Mapping[str, Any] | None = None
    weight: float = 1.0
    batch_size: int | None = None
    sampling: str = "segments"
    stride: int = 1
    augmentation: str = "none"
    flip: bool = False
    directional: bool = True
    templates: str | tuple[str, ...] = "video"
    views: tuple[int, int] = (1, 1)
    reduction: Literal["mean", "sample_sum"] = "mean"
    spatial_loss: SpatialLoss = "sigmoid"
    max_classes: int = 100

    def __post_init__(self) -> None:
        _one_of("objective", self.objective, OBJECTIVES)
        _one_of("reader", self.reader, tuple(READERS))
        _one_of("sampling", self.sampling, tuple(RULES))
        Augmentation(self.augmentation)
        resolve_templates(self.templates)
        if not isinstance(self.templates, str):
            object.__setattr__(self, "templates", tuple(self.templates))
        _at_least("stride", self.stride, 1)
        _at_least("max_classes", self.max_classes, 1)
        _one_of("spatial_loss", self.spatial_loss, get_args(SpatialLoss))
        if self.batch_size is not None:
            _at_least("batch_size", self.batch_size, 1)
        if not self.weight > 0:
            raise ValueError(f"weight={self.weight} must be positive; leave the task out instead")
        self._check_views()
        _one_of("reduction", self.reduction, ("mean", "sample_sum"))
        if self.reduction != "mean" and self.objective != "grounding":
            raise ValueError(
                f"reduction={self.reduction!r} is for grounding alone, not {self.objective}"
            )
        if self.flip and self.directional:
            raise ValueError(
                "flip=True mirrors clips whose labels may tell left from right; set "
                "directional=False if these do not"
            )

    def _check_views(self) -> None:
        object.__setattr__(self, "views", tuple(self.views))
        if len(self.views) != 2 or min(self.views) < 1:
            raise ValueError(f"views={self.views} must be two numbers from 1 on: times, places")
        if self.views == (1, 1):
            return
        if self.objective != "recognition":
            raise ValueError(
                f"views={self.views}: averages are for recognition, not {self.objective}"
            )
        if self.sampling not in VIEWS:
            raise ValueError(
                f"views={self.views}: sampling={self.sampling!r} has no test views; use one of "
                f"{', '.join(map(repr, VIEWS))}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """The encoder to train.

    siglip: folder or hub id of the SigLIP model that is lifted and whose text tower teaches.
    num_frames: rows of the time table and frames of a normal clip.
    window, temporal_positions: how the model streams (`StreamformerConfig`); training sees the
        same mask and positions.
    temporal_attention: False trains the image encoder frame by frame: what training alone gives.
    gate, time_scale: the head start of time (`backbone.lift_siglip`); at 0 the model starts as
        the image encoder.
    lora_rank: adapters on spatial attention, which is frozen then; 0 for none.
    freeze: "spatial_attention" as LoRA leaves it, "image" for all but the temporal parts.
    shared_scale: one scale and bias for all tasks; False gives each its own, as released.
    renormalize_labels: False keeps ensembled label embeddings shorter than 1, as released.
    mask_duplicates: False counts equal captions in a batch as negatives, as released.
    gradient_checkpointing: recompute layers in the backward pass, for memory.
    """

    siglip: str
    num_frames: int = 16
    window: int | None = None
    temporal_positions: str = "reset"
    temporal_attention: bool = True
    gate: float = 0.0
    time_scale: float = 0.0
    lora_rank: int = 0
    freeze: Freeze = "none"
    shared_scale: bool = True
    renormalize_labels: bool = True
    mask_duplicates: bool = True
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        _one_of("freeze", self.freeze, get_args(Freeze))
        if self.freeze == "image" and not self.temporal_attention:
            raise ValueError(
                "freeze='image' with temporal_attention=False leaves nothing to train"
            )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a cosine schedule, counted in updates.

    lr: peak rate. scale_lr: multiply all rates by clips per update / 256, the released rule.
    temporal_lr_scale: the rate of what the lift adds (temporal attention, its norm and gate, the
        time table) in units of that of all others, 1 as released. These weights start from nothing
        while the others know images already.
    warmup_updates: linear from ``warmup_lr`` to ``lr``; then cosine down to ``min_lr``.
    decay: weight decay on "matrices" only, or as "released": also on tables, gates and scales.
    clip_norm: bound of the gradient's norm; None for no bound, as released.
    """

    updates: int
    lr: float = 2e-5
    min_lr: float = 0.0
    warmup_lr: float = 0.0
    warmup_updates: int = 0
    scale_lr: bool = False
    temporal_lr_scale: float = 1.0
    weight_decay: float = 0.05
    decay: Decay = "matrices"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        _one_of("decay", self.decay, get_args(Decay))
        _at_least("updates", self.updates, 1)
        object.__setattr__(self, "betas", tuple(self.betas))
        if not self.temporal_lr_scale > 0:
            raise ValueError(
                f"temporal_lr_scale={self.temporal_lr_scale} must be positive; "
                "model.temporal_attention=False trains without time"
            )
        if not 0 <= self.warmup_updates <= self.updates:
            raise ValueError(
                f"warmup_updates={self.warmup_updates} must lie in 0 to updates={self.updates}"
            )


@dataclass(frozen=True)
class PretrainConfig:
    """A whole run. Its output folder is a model that `StreamformerModel.from_pretrained` loads.

    output: folder of the run. tasks: by name, in the order they take turns.
    image_size: pixels of a square frame; None takes the SigLIP model's.
    batch_size: clips per task, update and process.
    data_share: train on this share of the videos only, the same videos in every task that has them;
        a smaller share is part of every larger one. Validation is not cut.
    sampler: "rounds" takes a mini-batch of every task for each update (`RoundSampler`); "balanced"
        and "unique" are the released orders, of one batch size for all tasks (`ReleasedSampler`).
    joint_rounds: encode the clips of an update's mini-batches together: the same gradients for
        more memory, and quicker where the model is small.
    long_share: share of mini-batches with ``long_frames`` frames a clip: train as you stream.
    cache_in_memory: keep decoded videos as uint8, for sets of small videos.
    num_workers: processes that read ahead while the step runs; 0 reads in between. With
        ``cache_in_memory`` at most one, which then keeps the videos.
    max_failed_share: clips that may fail to decode before the run stops.
    text_cache_size: captions whose embeddings stay in memory.
    precision: fp32 or bf16 (autocast; the loss is always fp32).
    sharded: processes split the weights, gradients and moments (FSDP) instead of copying them.
    device: auto or cpu. seed: of everything.
    log_every, eval_every, checkpoint_every: in updates; 0 for only at the end.
    keep_checkpoints: how many of the latest stay.
    trackers: names that accelerate knows, such as tensorboard or wandb.
    name: what the model card calls the model.
    """

    output: str
    tasks: Mapping[str, TaskConfig]
    model: ModelConfig
    optim: OptimConfig
    image_size: int | None = None
    batch_size: int = 16
    data_share: float = 1.0
    sampler: Literal["rounds", "balanced", "unique"] = "rounds"
    joint_rounds: bool = False
    long_share: float = 0.0
    long_frames: int = 0
    cache_in_memory: bool = False
    num_workers: int = 0
    max_failed_share: float = 0.01
    text_cache_size: int = 100_000
    precision: Literal["fp32", "bf16"] = "fp32"
    sharded: bool = False
    device: Literal["auto", "cpu"] = "auto"
    seed: int = 42
    log_every: int = 50
    eval_every: int = 0
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    trackers: tuple[str, ...] = ()
    name: str = "StreamFormer"

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, ("fp32", "bf16"))
        _one_of("device", self.device, ("auto", "cpu"))
        _at_least("batch_size", self.batch_size, 1)
        if not 0 < self.data_share <= 1:
            raise ValueError(f"data_share={self.data_share} must lie in 0 to 1, 0 excluded")
        _at_least("keep_checkpoints", self.keep_checkpoints, 1)
        object.__setattr__(self, "trackers", tuple(self.trackers))
        if not self.tasks:
            raise ValueError("tasks is empty; give at least one")
        if self.cache_in_memory and self.num_workers > 1:
            raise ValueError(
                f"cache_in_memory with num_workers={self.num_workers}: every worker would keep "
                "its own copy of the videos; use one worker, or decode each time"
            )
        _one_of("sampler", self.sampler, ("rounds", "balanced", "unique"))
        if self.sampler != "rounds":
            own = [name for name, task in self.tasks.items() if task.batch_size is not None]
            if own or self.long_share:
                named = f"batch_size of task {own[0]!r}" if own else "long_share"
                raise ValueError(
                    f"sampler={self.sampler!r} is the released order, in which all mini-batches "
                    f"are of one size and length; leave out {named}, or use 'rounds'"
                )
        if self.long_share and self.long_frames <= self.model.num_frames:
            raise ValueError(
                f"long_share={self.long_share} needs long_frames={self.long_frames} above "
                f"num_frames={self.model.num_frames}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PretrainConfig:
        """Build from nested dicts; an unknown key is refused with the nearest known one."""
        return _build(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of plain values, ready for JSON."""
        return dataclasses.asdict(self)


_SECTIONS = {"model": ModelConfig, "optim": OptimConfig}


def _build(kind: type, values: Mapping[str, Any], where: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(kind)}
    for key in values:
        if key not in known:
            raise ValueError(f"unknown key {where + key!r}; {hint(key, known)}")
    missing = [
        name
        for name, f in known.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"missing key {where + missing[0]!r}")
    values = dict(values)
    if kind is PretrainConfig:
        for name, section in _SECTIONS.items():
            if isinstance(values[name], Mapping):
                values[name] = _build(section, values[name], f"{name}.")
        values["tasks"] = {
            name: _build(TaskConfig, task, f"tasks.{name}.") if isinstance(task, Mapping) else task
            for name, task in values["tasks"].items()
        }
    return kind(**values)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(map(repr, known))}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")
