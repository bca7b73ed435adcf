"""What decides a training run of the segmenter: sections, checked once, at the edge.

    data          which videos, how clips are drawn from them, and what happens to them
    adapter       fields of ``adapter.AdapterConfig``, but for what the encoder gives
    head          fields of ``head.HeadConfig``, but for what encoder and data give
    loss          of detection, ``criterion.LossConfig``
    contrastive   of tracking, ``contrastive.ContrastiveConfig``
    tracker       online identities, ``tracker.TrackerConfig``
    video         what is said of a whole video, ``postprocess.VideoConfig``
    train         iterations, optimiser, schedule
    eval          the encoder's memory over a video, and groups of objects that are looked at apart

No section names an encoder: that is what ``train.run_ovis`` is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from integrations.ovis.adapter import AdapterConfig
from integrations.ovis.augment import ClipAugmentation
from integrations.ovis.contrastive import ContrastiveConfig
from integrations.ovis.criterion import LossConfig
from integrations.ovis.data import SPACINGS
from integrations.ovis.head import HeadConfig
from integrations.ovis.layout import RELEASES
from integrations.ovis.online import MODES
from integrations.ovis.postprocess import VideoConfig
from integrations.ovis.tracker import TrackerConfig
from integrations.sections import read_section, refuse_other_sections, refuse_unknown

FROM_ENCODER = ("embed_dim", "patch_size", "taps")  # of AdapterConfig
FROM_DATA = ("in_channels", "num_classes")  # of HeadConfig
PRECISIONS = ("float32", "bfloat16", "float16")
SCHEDULES = ("step", "cosine")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Videos, and clips of them.

    Servers keep the annotations of the published validation splits. Where ``test_split`` is None, a
    fixed share of the training videos is evaluated instead; such numbers are comparable with each
    other and with no published one.
    """

    dataset: str  # one of layout.RELEASES
    root: str | None = None  # data root; None: rendered (miniworld)
    train_split: str = "train"
    val_split: str | None = None  # evaluated for the log and at the end; nothing is chosen by it
    test_split: str | None = None  # evaluated once, with the last weights; None: a hold-out
    hold_out: float = 0.1  # share of the training videos
    submit_split: str | None = None  # predicted at the end, as a zip for its server
    coco: str | None = None  # COCO's instances JSON: pictures that become clips
    coco_root: str | None = None  # folder of its pictures
    video_weight: float = 1.5  # share of clips from videos, relative
    coco_weight: float = 1.0  # and from pictures
    num_frames: int = 16  # of a clip
    reach: int = 20  # frames on either side of a random one
    spacing: str = "distinct"  # or "even"; "released": with replacement, see data.choose_frames
    short: int = 224  # short side in evaluation
    longest: int = 1333  # long side at most
    augmentation: Mapping[str, Any] = field(default_factory=dict)  # of augment.ClipAugmentation
    # Train on the encoder's tokens of whole, unchanged videos, computed once and kept: the frozen
    # encoder gives what it gives online. No augmentation then, and videos of one size.
    stored: bool = False

    def __post_init__(self) -> None:
        if self.dataset not in RELEASES:
            raise ValueError(
                f"data.dataset={self.dataset!r} is not known; there are {', '.join(RELEASES)}"
            )
        if self.spacing not in SPACINGS:
            raise ValueError(f"data.spacing={self.spacing!r} is not one of {', '.join(SPACINGS)}")
        if (self.coco is None) != (self.coco_root is None):
            raise ValueError(
                f"data.coco={self.coco!r}, data.coco_root={self.coco_root!r}: pictures need both"
            )
        if self.stored and (self.coco or self.changes()):
            raise ValueError(
                f"data.stored=True with data.coco={self.coco!r} and data.augmentation="
                f"{dict(self.augmentation)}: tokens that are kept are those of unchanged videos; "
                "leave out pictures and augmentation, or set data.stored=False"
            )

    def clips(self, pictures: bool = False) -> ClipAugmentation:
        """What happens to clips of videos, or of pictures."""
        if self.stored:
            sizes = {"sizes": (self.short,), "max_size": self.longest}
            return ClipAugmentation(crop=0, flip=0, **sizes)
        make = ClipAugmentation.for_pictures if pictures else ClipAugmentation
        own = {"sizes": (self.short,), "max_size": self.longest, **self.augmentation}
        return make(**{k: tuple(v) if isinstance(v, list) else v for k, v in own.items()})

    def changes(self) -> bool:
        """Whether the config asks for any augmentation."""
        return any(self.augmentation.get(key) for key in ("crop", "flip", "rotation"))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation. Defaults are those of CTVIS and StreamFormer on YouTube-VIS 2019.

    AdamW; norms and embeddings do not decay.
    """

    iterations: int = 32_000
    batch_size: int = 8  # clips
    lr: float = 1e-4
    weight_decay: float = 0.05
    rates: Mapping[str, float] = field(default_factory=dict)  # start of a weight's name -> times lr
    schedule: str = "step"  # or "cosine", to zero
    milestones: tuple[int, ...] = (12_000, 24_000)  # of "step": the rate falls to a tenth
    warmup: int = 0  # iterations of a linear warm-up from nearly zero
    clip_norm: float = 0.01  # of all gradients together
    precision: str = "float32"  # "bfloat16", "float16": autocast, on a GPU; the head stays float32
    num_workers: int = 0  # processes that read clips
    threads: int | None = None  # of torch on the CPU; None: its own number
    validate_every: int = 0  # iterations; 0: only at the end
    checkpoint_every: int = 1_000  # iterations

    def __post_init__(self) -> None:
        for name, known in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"train.{name}={getattr(self, name)!r} is not one of {', '.join(known)}"
                )
        for name in ("iterations", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must be at least 1")
        if not self.lr > 0 or not self.clip_norm > 0:
            raise ValueError(f"train.lr={self.lr}, clip_norm={self.clip_norm} must be above 0")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation; ``mode`` and ``chunk_frames`` as of ``model.OvisModel``."""

    mode: str = "stream"  # the encoder's memory runs on; "chunk": it restarts, as published
    chunk_frames: int = 16
    # Name -> field of an annotation: objects that have it are looked at apart.
    groups: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode not in MODES or self.chunk_frames < 1:
            raise ValueError(
                f"eval.mode={self.mode!r}, eval.chunk_frames={self.chunk_frames}: needs one of "
                f"{', '.join(MODES)} and at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class OvisConfig:
    """All sections; ``adapter`` and ``head`` stay mappings until encoder and data are known."""

    data: DataConfig
    adapter: Mapping[str, Any]
    head: Mapping[str, Any]
    loss: LossConfig
    contrastive: ContrastiveConfig
    tracker: TrackerConfig
    video: VideoConfig
    train: TrainConfig
    eval: EvalConfig

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OvisConfig:
        """Read nested mappings; a key that does not exist is refused with the nearest that does."""
        refuse_other_sections(values, cls)
        refuse_unknown(values["adapter"], AdapterConfig, "adapter", given=FROM_ENCODER)
        refuse_unknown(values["head"], HeadConfig, "head", given=FROM_DATA)
        augmentation = values["data"].get("augmentation", {})
        refuse_unknown(augmentation, ClipAugmentation, "data.augmentation")
        read = cls(
            adapter=dict(values["adapter"]),
            head=dict(values["head"]),
            **{name: read_section(record, values[name], name) for name, record in RECORDS.items()},
        )
        read.data.clips()  # a wrong value is refused here
        return read

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, defaults included."""
        return asdict(self)


RECORDS = {  # sections whose values the config gives in full
    "data": DataConfig,
    "loss": LossConfig,
    "contrastive": ContrastiveConfig,
    "tracker": TrackerConfig,
    "video": VideoConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
}
