"""Feature and target files as mmengine data sets: training windows and whole videos.

    <data root>/data_info.json               class names, ignore column, metric, sets of video names
    <data root>/target_perframe/<video>.npy  (T, C) multi-hot, column 0 background
    <features>/features.json                 encoder, protocol, fps, width, ... of the whole folder
    <features>/<video>.npy, <video>.json     (T, D) float; the same facts again, and the video's own

Row i of features and targets describes the same step. Both are compared when they are loaded, as
are the facts in the JSON files, and whatever does not fit is refused by the name of its video.
Where the data root has no ``data_info.json``, the packaged one serves: THUMOS'14, TVSeries, HDD
and EPIC-Kitchens-100 as in MAT (see ``targets.PACKAGED_INFO``).

Index rules of the windows: ``protocols``.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path

import numpy as np
import torch
from mmaction.registry import DATA_SAMPLERS, DATASETS
from mmaction.structures import ActionDataSample
from mmengine.dataset import BaseDataset
from mmengine.dist import get_dist_info
from torch.utils.data import Sampler

from integrations.oad import protocols
from integrations.oad.features import read_facts
from integrations.oad.mat_config import MatConfig
from integrations.oad.targets import PACKAGED_INFO

logger = logging.getLogger(__name__)


class DataError(ValueError):
    """Files that are missing, broken, or do not belong together."""


class _Videos(BaseDataset):
    """Features and targets of the videos of one session set, all loaded or all memory-mapped.

    Args:
        data_root: folder of ``target_perframe`` and, mostly, ``data_info.json``.
        features: folder of the encoder's features.
        dataset: entry of ``data_info.json``, such as "THUMOS".
        session: its list of videos, such as "train_session_set".
        motion: folder of optical-flow features, if the head reads them.
        fps: steps per second that the config was written for.
        protocol: how the features must have been extracted, "clip" or "stream".
        foreign: accept a feature folder without ``features.json``, made elsewhere.
        slack: steps by which lengths of one video's files may differ; the shortest counts.
        preload: hold all files in memory; otherwise read windows from disk.
        pipeline: mmengine transforms of an item.
        test_mode: as in ``BaseDataset``.
    """

    def __init__(
        self,
        data_root: str,
        features: str,
        dataset: str,
        session: str,
        motion: str | None = None,
        fps: float | None = None,
        protocol: str | None = None,
        foreign: bool = False,
        slack: int = 0,
        preload: bool = True,
        pipeline: Sequence = (),
        test_mode: bool = False,
    ) -> None:
        self.dataset, self.session = dataset, session
        self.feature_root = Path(features)
        self.motion_root = None if motion is None else Path(motion)
        self.fps, self.protocol, self.foreign = fps, protocol, foreign
        self.slack, self.preload = slack, preload
        self.visual: list[np.ndarray] = []  # (T, Dv) each
        self.motion: list[np.ndarray] = []  # (T, Dm) each, or none
        self.targets: list[np.ndarray] = []  # (T, C) each
        super().__init__(
            data_root=str(data_root),
            data_prefix={},
            serialize_data=False,
            pipeline=list(pipeline),
            test_mode=test_mode,
        )

    def load_data_list(self) -> list[dict]:
        """Load every video of the set; one entry ``{"video", "steps"}`` each."""
        entry = read_data_info(self.data_root, self.dataset)
        self._metainfo.update(
            dataset=self.dataset,
            classes=list(entry["class_names"]),
            ignore_index=int(entry["ignore_index"]),
            calibrated=entry["metrics"] == "cAP",
            fps=float(entry["fps"]),
        )
        if self.fps is not None and self.fps != entry["fps"]:
            raise DataError(
                f"the config is written for {self.fps} steps per second, but {self.dataset} has "
                f"{entry['fps']}"
            )
        visual = _Folder(self.feature_root, self.protocol, self.fps, required=not self.foreign)
        motion = self.motion_root and _Folder(self.motion_root, None, self.fps, required=False)
        videos = read_session(self.data_root, self.dataset, self.session)
        return [self._load_video(video, visual, motion) for video in videos]

    def _load_video(self, video: str, visual: _Folder, motion: _Folder | None) -> dict:
        classes = len(self._metainfo["classes"])
        target = _load_array(
            Path(self.data_root) / "target_perframe" / f"{video}.npy", video, self.preload
        )
        if target.shape[1] != classes:
            raise DataError(
                f"{video}: targets have {target.shape[1]} columns, but {self.dataset} has "
                f"{classes} classes"
            )
        arrays = {"targets": target, "features": visual.load(video, self.preload)}
        if motion:
            arrays["motion features"] = motion.load(video, self.preload)
        lengths = {name: len(array) for name, array in arrays.items()}
        steps = min(lengths.values())
        if max(lengths.values()) - steps > self.slack:
            found = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise DataError(
                f"{video}: numbers of steps differ: {found} (allowed difference: {self.slack}); "
                f"features are from {visual.root}. Extract them at the same rate as the targets, "
                "or allow small differences by data.slack"
            )
        self.targets.append(target[:steps])
        self.visual.append(arrays["features"][:steps])
        if motion:
            self.motion.append(arrays["motion features"][:steps])
        return {"video": video, "steps": steps}


@DATASETS.register_module()
class OadWindows(_Videos):
    """Training windows; one item is one window.

    Each epoch draws an offset per video, from (seed, epoch, name) alone, so that neither a resumed
    run nor the number of workers changes what is seen. Call ``set_epoch`` before an epoch's
    workers start; ``EpochSampler`` does.

    An item is ``{"inputs": {"visual" (L + W, Dv), "padding_mask" (L,), "motion" if any},
    "data_samples": {"det_target" (W + A, C), "fut_target" (F, C)}}``, float32 arrays that
    mmengine's ``default_collate`` stacks.

    Args:
        head: the head's ``MatConfig``, or its fields; decides the windows.
        seed: of the offsets.
        videos: arguments of the common base, see ``_Videos``.
    """

    def __init__(self, head: MatConfig | Mapping, seed: int = 0, **videos: object) -> None:
        self.head = head if isinstance(head, MatConfig) else MatConfig.from_dict(dict(head))
        self.seed = seed
        super().__init__(**videos)

    def full_init(self) -> None:
        """Load everything and draw the windows of epoch 0."""
        if self._fully_initialized:
            return
        super().full_init()
        least = self.head.work_steps + self.head.anticipation_steps + 1
        short = [info["video"] for info in self.data_list if info["steps"] < least]
        if len(short) == len(self.data_list):
            raise DataError(
                f"no video of {self.session!r} has the {least} steps that a training window "
                "needs; shorten head.work_steps or head.anticipation_steps"
            )
        if short:
            logger.warning(
                "%d of %d videos are shorter than a window of %d steps and not trained on: %s",
                *(len(short), len(self.data_list), least, ", ".join(short)),
            )
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the windows of an epoch."""
        self.windows = self.draw_windows(epoch)

    def draw_windows(self, epoch: int) -> list[tuple[int, int]]:
        """(video, first step of work memory) of every window of an epoch, in order."""
        windows = []
        for index, info in enumerate(self.data_list):
            name = zlib.crc32(info["video"].encode())
            offset = np.random.default_rng([self.seed, epoch, name]).integers(self.head.work_steps)
            starts = protocols.train_windows(info["steps"], self.head, int(offset))
            windows += [(index, start) for start in starts]
        return windows

    def count_iterations(self, epochs: int, batch: int) -> int:
        """Batches in the first ``epochs`` epochs; offsets make their number vary a little."""
        return sum(ceil(len(self.draw_windows(epoch)) / batch) for epoch in range(epochs))

    def __len__(self) -> int:
        return len(self.windows)

    def prepare_data(self, idx: int) -> dict:
        """Cut one window."""
        video, start = self.windows[idx]
        target = self.targets[video]
        long = protocols.long_indices_train(start, self.head)
        steps = np.concatenate([long, protocols.work_indices(start, self.head)])
        inputs = {
            "visual": _float32(self.visual[video][steps]),
            "padding_mask": protocols.padding_mask(long),
        }
        if self.motion:
            inputs["motion"] = _float32(self.motion[video][steps])
        future = protocols.future_indices(start, self.head, len(target))
        targets = {
            "det_target": _float32(target[protocols.detection_indices(start, self.head)]),
            "fut_target": _float32(target[future]),
        }
        return self.pipeline({"inputs": inputs, "data_samples": targets})


@DATASETS.register_module()
class OadVideos(_Videos):
    """Whole videos, for evaluation; one item is one video.

    An item is ``{"inputs": {"visual" (T, Dv), "motion" (T, Dm) if any}, "data_samples": an
    ActionDataSample with "video" and "target" (T, C)}``.
    """

    @property
    def title(self) -> str:
        """For progress bars."""
        return self.session

    def prepare_data(self, idx: int) -> dict:
        """Give one video with its targets."""
        inputs = {"visual": torch.from_numpy(_float32(self.visual[idx]))}
        if self.motion:
            inputs["motion"] = torch.from_numpy(_float32(self.motion[idx]))
        sample = ActionDataSample()
        sample.set_field(self.data_list[idx]["video"], "video")
        sample.set_field(_float32(self.targets[idx]), "target")
        return self.pipeline({"inputs": inputs, "data_samples": sample})


@DATA_SAMPLERS.register_module()
class EpochSampler(Sampler[int]):
    """All windows of the epoch, in an order drawn from (seed, epoch).

    mmengine's ``DistSamplerSeedHook`` calls ``set_epoch`` before each epoch, which also lets the
    data set draw its windows anew; their number may change. With several ranks each takes every
    n-th window, and the last ones start over so that all have equally many.
    """

    def __init__(self, dataset: OadWindows, seed: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed
        self.epoch = 0
        self.rank, self.world_size = get_dist_info()

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch."""
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return ceil(len(self.dataset) / self.world_size)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.dataset))
        order = np.resize(order, len(self) * self.world_size)
        return iter(order[self.rank :: self.world_size].tolist())


def read_data_info(data_root: str | Path, dataset: str) -> dict:
    """The entry of a data set in ``data_info.json``: the folder's own, or the packaged one."""
    path = Path(data_root) / "data_info.json"
    if not path.is_file():
        path = PACKAGED_INFO
    entries = json.loads(path.read_text())
    if dataset not in entries:
        raise DataError(f"{path} has no data set {dataset!r}; it has {', '.join(entries)}")
    return entries[dataset]


def read_session(data_root: str | Path, dataset: str, session: str) -> list[str]:
    """Names of the videos in one set of a data set, such as "train_session_set"."""
    entry = read_data_info(data_root, dataset)
    if session not in entry:
        sets = ", ".join(key for key in entry if key.endswith("session_set"))
        raise DataError(f"{dataset} has no set {session!r}; it has {sets}")
    if not entry[session]:
        raise DataError(f"set {session!r} of {dataset} lists no video")
    return list(entry[session])


def feature_size(folder: Path, video: str) -> int:
    """Width of the features in a folder, read off one video's file."""
    return _load_array(folder / f"{video}.npy", video, preload=False).shape[1]


class _Folder:
    """A feature folder: what its ``features.json`` promises, and files that keep the promise."""

    def __init__(self, root: Path, protocol: str | None, fps: float | None, required: bool) -> None:
        self.root = root
        path = root / "features.json"
        if not path.is_file() and required:
            raise DataError(
                f"{root} has no features.json, so nothing tells how its features were made; "
                "extract them with integrations.oad.features, or set data.foreign for features "
                "made elsewhere"
            )
        self.facts = read_facts(path) if path.is_file() else None
        self.dim: int | None = self.facts and self.facts["dim"]
        for name, wanted in (("protocol", protocol), ("fps", fps)):
            found = self.facts and self.facts[name]
            if None not in (wanted, found) and found != wanted:
                raise DataError(f"{path}: {name} is {found!r}, but the config asks for {wanted!r}")

    def load(self, video: str, preload: bool) -> np.ndarray:
        """Features of one video (T, D), after comparing its facts with those of the folder."""
        if self.facts is not None:
            path = self.root / f"{video}.json"
            if not path.is_file():
                raise DataError(f"{video}: {path} is missing; run the extraction again")
            facts = read_facts(path)
            for name, shared in self.facts.items():
                if facts.get(name) != shared:
                    raise DataError(
                        f"{video}: {name} is {facts.get(name)!r}, but {self.root} holds features "
                        f"with {shared!r}; extract this video again"
                    )
        array = _load_array(self.root / f"{video}.npy", video, preload)
        self.dim = self.dim or array.shape[1]
        if array.shape[1] != self.dim:
            raise DataError(
                f"{video}: features are {array.shape[1]} wide, those of {self.root} {self.dim}"
            )
        return array


def _load_array(path: Path, video: str, preload: bool) -> np.ndarray:
    """A (T, width) array of finite numbers; float32 in memory, or as stored if memory-mapped."""
    if not path.is_file():
        raise DataError(f"{video}: {path} does not exist")
    try:
        array = np.load(path, mmap_mode=None if preload else "r")
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{video}: {path} cannot be read ({error}); make it again") from error
    if array.ndim != 2 or not len(array):
        raise DataError(f"{video}: {path} is {array.shape}, expected (steps, width)")
    bad = ~np.isfinite(array).all(axis=1)
    if bad.any():
        raise DataError(
            f"{video}: {path} has {int(bad.sum())} steps that are not finite, the first is "
            f"{int(bad.argmax())}; make it again"
        )
    return _float32(array) if preload else array


def _float32(array: np.ndarray) -> np.ndarray:
    """In memory, writable, float32; no copy if it is already."""
    if isinstance(array, np.memmap):
        return np.array(array, np.float32)
    return array.astype(np.float32, copy=False)
