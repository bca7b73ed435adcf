"""What decides a training run of the MAT head: four sections, checked once, at the edge.

    data    which videos, and how their features were made
    head    fields of ``mat_config.MatConfig``, but for the sizes, which the data give
    train   epochs, optimiser, schedule, average
    eval    protocols and their options

No section names an encoder: that is the folder of features that ``train.run_oad`` is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from integrations.oad.mat_config import MatConfig
from integrations.sections import read_section, refuse_other_sections, refuse_unknown

FROM_DATA = ("visual_size", "motion_size", "num_classes")  # of MatConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Videos and features. The extraction reads ``root`` and all fields after it."""

    dataset: str  # entry of data_info.json
    train_set: str = "train_session_set"
    val_sets: tuple[str, ...] = ()  # evaluated for the log and at the end; nothing is chosen by it
    test_sets: tuple[str, ...] = ("test_session_set",)  # evaluated once, with the last weights
    fps: float  # steps per second
    motion: str | None = None  # folder of flow features, below the data root unless absolute
    foreign: bool = False  # accept features without features.json, made elsewhere
    slack: int = 0  # steps by which features and targets of a video may differ in length
    preload: bool = True  # hold everything in memory; False reads windows from disk
    root: str | None = None  # data root; None: rendered (miniworld)
    videos: str | None = None  # folder of videos, below the root unless absolute
    protocol: str  # "clip" or "stream": how features are extracted
    video_fps: float  # rate at which videos are read
    chunk_frames: int  # frames per step
    chunk_starts: str = "exact"  # "released": where the release cut its chunks, ahead of the step
    resize: str = "crop"  # or "stretch"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation. Defaults are those of MAT and StreamFormer on THUMOS'14."""

    epochs: int = 25
    batch_size: int = 16
    lr: float = 7e-5
    weight_decay: float = 5e-5  # coupled L2 (Adam), as released
    decay_all: bool = True  # released: also norms, biases and queries; False: matrices only
    warmup_epochs: float = 10.0
    warmup_factor: float = 0.3  # share of the rate at which the warm-up starts
    schedule_ahead: int = 1  # released: the curve is one step early; 0: it starts at its beginning
    ema_momentum: float = 0.001  # of the averaged weights, which are evaluated; 0: no average
    stage_weights: tuple[float, ...] | None = None  # of the losses; None: released
    future_weight: float = 0.1
    num_workers: int = 0  # processes that cut windows
    threads: int | None = None  # of torch on the CPU; small heads are fastest with 1; None: its own
    validate_every: int = 5  # epochs; 0: only at the end
    checkpoint_every: int = 1  # epochs


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation: see ``protocols`` and ``metrics``."""

    protocols: tuple[str, ...] = ("online", "window")
    softmax: str = "trained"  # "released": over the column that was never trained, too
    opening: str = "window"  # who scores the first steps; "short": nobody who has seen later ones
    smooth: bool = False
    switch: bool = False
    batch_windows: int = 64  # windows computed at once: speed and memory only
    batch_videos: int = 1  # videos evaluated together; pays off if "short" and of equal length

    def __post_init__(self) -> None:
        if not self.protocols:
            raise ValueError("eval.protocols is empty; name 'online', 'window' or both")


@dataclass(frozen=True, kw_only=True)
class OadConfig:
    """All four sections; ``head`` stays a mapping until the data have told the sizes."""

    data: DataConfig
    head: Mapping[str, Any]
    train: TrainConfig
    eval: EvalConfig

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OadConfig:
        """Read nested mappings; a key that does not exist is refused with the nearest that does."""
        refuse_other_sections(values, cls)
        refuse_unknown(values["head"], MatConfig, "head", given=FROM_DATA)
        return cls(
            data=read_section(DataConfig, values["data"], "data"),
            head=dict(values["head"]),
            train=read_section(TrainConfig, values["train"], "train"),
            eval=read_section(EvalConfig, values["eval"], "eval"),
        )

    def mat(self, visual_size: int, motion_size: int, num_classes: int) -> MatConfig:
        """The head's config, with the sizes that the data give."""
        sizes = dict(zip(FROM_DATA, (visual_size, motion_size, num_classes), strict=True))
        return MatConfig.from_dict({**self.head, **sizes})

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, defaults included."""
        return asdict(self)
