"""The training job: lift, align, save. StreamFormer section 3, on accelerate.

An update is one round: a mini-batch of every task, their gradients summed by weight, one optimiser
step. Runs on one process as on many (``torchrun`` or ``accelerate launch``): gradients are reduced
once per round. Everything follows from the config and its seed, so a run that was interrupted goes
on to the very same weights.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import json
import logging
import math
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from queue import Empty, Queue

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from backbone import StreamformerModel, lift_siglip
from backbone.files import write_json, write_text
from pretrain.alignment import gather_ranks
from pretrain.build import build_dataset, build_objective
from pretrain.card import CONFIG_FILE, model_card
from pretrain.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from pretrain.config import PretrainConfig
from pretrain.datasets import Batch, Sample, VideoDataset, collate
from pretrain.datasets.decode import FailureLedger, FrameStore
from pretrain.evaluation import evaluate
from pretrain.model import MultitaskModel, freeze
from pretrain.objectives import Objective
from pretrain.optim import learning_rate, parameter_groups
from pretrain.parallel import (
    load_whole,
    make_accelerator,
    whole_moments,
    whole_weights,
    widen_scalars,
)
from pretrain.released_sampling import ReleasedSampler
from pretrain.sampling import RoundSampler
from pretrain.text import load_siglip_text

logger = logging.getLogger(__name__)

_M_MMAP_THRESHOLD = -3  # of glibc's mallopt

METRICS_FILE, LOG_FILE = "metrics.json", "log.jsonl"


# Keys of the config that decide no weight: a run may go on with others.
_FREE = {
    "output",
    "name",
    "cache_in_memory",
    "num_workers",
    "max_failed_share",
    "text_cache_size",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "trackers",
}


class Interrupted(SystemExit):
    """The run was told to stop; its state is saved and running it again goes on from there."""


def train(config: PretrainConfig, *, progress: bool = True) -> Path:
    """Train as configured and return the folder of the finished model.

    A folder that holds an unfinished run of the same config is resumed at its last checkpoint; a
    finished one is returned at once, and may have been moved. SIGTERM saves a checkpoint and raises
    `Interrupted`.

    Raises ValueError if the folder belongs to another config, FloatingPointError at a loss that
    is not finite, ClipError when too many videos cannot be decoded.
    """
    output = Path(config.output)
    if _finished(config, output):
        logger.info("%s is trained already", output)
        return output
    accelerator = make_accelerator(
        cpu=config.device == "cpu",
        sharded=config.sharded,
        trackers=config.trackers,
        folder=output,
    )
    if config.trackers:
        accelerator.init_trackers("pretrain")
    run = _Run(config, accelerator)
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / CONFIG_FILE, config.to_dict())
    with _sigterm() as stopped:
        run.fit(progress and accelerator.is_main_process, stopped)
    run.finish()
    if config.trackers:
        accelerator.end_training()
    return output


class _Run:
    """A run's parts, put together once from the config."""

    def __init__(self, config: PretrainConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.output = Path(config.output)
        tower, log_scale, bias = load_siglip_text(
            config.model.siglip, device=accelerator.device, cache_size=config.text_cache_size
        )
        torch.manual_seed(config.seed)  # fresh temporal layers and adapters
        backbone = lift_siglip(
            config.model.siglip,
            num_frames=config.model.num_frames,
            lora_rank=config.model.lora_rank,
            window=config.model.window,
            temporal_positions=config.model.temporal_positions,
            temporal_attention=config.model.temporal_attention,
            gate=config.model.gate,
            time_scale=config.model.time_scale,
        )
        freeze(backbone, config.model.freeze)
        if config.model.gradient_checkpointing:
            _recompute_layers(backbone, accelerator.device)
        self._read_data(config.image_size or backbone.config.image_size)
        assemble = partial(
            MultitaskModel,
            objectives=self.objectives,
            tower=tower,
            log_scale=log_scale,
            bias=bias,
            shared_scale=config.model.shared_scale,
            bf16=config.precision == "bf16",
        )
        if accelerator.is_fsdp2:
            self.whole = assemble(copy.deepcopy(backbone))
            widen_scalars(backbone)
        model = assemble(backbone)
        optimizer = torch.optim.AdamW(
            parameter_groups(
                model.named_parameters(),
                config.optim.weight_decay,
                config.optim.decay,
                config.optim.temporal_lr_scale,
            ),
            lr=config.optim.lr,
            betas=config.optim.betas,
            eps=config.optim.eps,
            fused=True,
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        if not accelerator.is_fsdp2:
            self.whole = accelerator.unwrap_model(self.model)
        self.sampler = self._make_sampler()
        self.ledger = FailureLedger(config.max_failed_share)
        self.log: list[dict] = []

    def _make_sampler(self) -> RoundSampler | ReleasedSampler:
        config = self.config
        lengths = {name: len(dataset) for name, dataset in self.datasets.items()}
        common = {
            "num_frames": config.model.num_frames,
            "seed": config.seed,
            "rank": self.accelerator.process_index,
            "world_size": self.accelerator.num_processes,
        }
        if config.sampler != "rounds":
            return ReleasedSampler(lengths, config.batch_size, config.sampler, **common)
        return RoundSampler(
            lengths,
            {name: task.batch_size or config.batch_size for name, task in config.tasks.items()},
            long_frames=config.long_frames,
            long_share=config.long_share,
            long_entries={
                name: dataset.lasting(config.long_frames) if config.long_share else ()
                for name, dataset in self.datasets.items()
            },
            **common,
        )

    def _read_data(self, image_size: int) -> None:
        config = self.config
        store = FrameStore(image_size) if config.cache_in_memory else None
        self.datasets: dict[str, VideoDataset] = {}
        self.validation: dict[str, VideoDataset] = {}
        self.objectives: dict[str, Objective] = {}
        for name, task in config.tasks.items():
            build = partial(build_dataset, task, name=name, image_size=image_size, store=store)
            self.datasets[name] = build(task.train, share=config.data_share)
            if task.val is not None:
                self.validation[name] = build(task.val)
                known, asked = self.datasets[name].label_sets, self.validation[name].label_sets
                if any(known.get(label_set) != asked[label_set] for label_set in asked):
                    raise ValueError(
                        f"task {name!r}: label sets of train ({', '.join(known)}) and val "
                        f"({', '.join(asked)}) differ; give both the same labels file"
                    )
            self.objectives[name] = build_objective(
                task,
                self.datasets[name],
                renormalize_labels=config.model.renormalize_labels,
                mask_duplicates=config.model.mask_duplicates,
            )

    # -- training ---------------------------------------------------------------------------------

    def fit(self, show: bool, stopped: list[int]) -> None:
        """Run all updates from where the last checkpoint left off."""
        config, total = self.config, self.config.optim.updates
        self._resume()
        self.model.train()
        bar = tqdm(total=total, initial=self.sampler.round, disable=not show, unit="update")
        with bar, contextlib.closing(_received(self._loader())) as batches:
            window = _Window()
            while self.sampler.round < total:
                self._update(batches, window)
                done = self.sampler.round
                bar.update()
                bar.set_postfix(window.means(), refresh=False)
                if done % config.log_every == 0 or done == total:
                    self._record({"update": done, **window.close()})
                if config.eval_every and done % config.eval_every == 0 and done < total:
                    begun = time.perf_counter()
                    self._gather()
                    if self.accelerator.is_main_process:
                        self._record({"update": done, "zero_shot": self.zero_shot()})
                    self.accelerator.wait_for_everyone()
                    window.begun += time.perf_counter() - begun  # no training time
                stop = self._any(bool(stopped))
                if stop or done == total or (
                    config.checkpoint_every and done % config.checkpoint_every == 0
                ):
                    self._save()
                if stop and done < total:
                    logger.warning("told to stop: saved update %d of %d and leave", done, total)
                    raise Interrupted(128 + signal.SIGTERM)

    def _update(self, batches: Iterator[tuple[str, Batch]], window: _Window) -> None:
        """One round over all tasks and one step."""
        config, accelerator, update = self.config, self.accelerator, self.sampler.round
        torch.manual_seed(_mix(config.seed, update, accelerator.process_index))
        rate = learning_rate(config.optim, update, self.clips_per_update)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        turns, whole = len(config.tasks), sum(task.weight for task in config.tasks.values())
        losses, at_once = [], turns if config.joint_rounds else 1
        for first in range(0, turns, at_once):
            begun = time.perf_counter()
            found = [next(batches) for _ in range(at_once)]
            window.waited += time.perf_counter() - begun
            for _, batch in found:
                self.ledger.record(len(batch.entries), batch.errors)
            begun = time.perf_counter()
            names = [name for name, _ in found]
            shares = torch.tensor([config.tasks[name].weight / whole for name in names])
            # Processes exchange gradients once, with the round's last mini-batch.
            exchange = first + at_once == turns
            with contextlib.nullcontext() if exchange else accelerator.no_sync(self.model):
                each = self.model([(name, batch.to(accelerator.device)) for name, batch in found])
                accelerator.backward((each * shares.to(each.device)).sum())
            losses += zip(names, each.detach(), strict=True)
            window.learned += time.perf_counter() - begun
        begun = time.perf_counter()
        values = torch.stack([loss for _, loss in losses]).tolist()  # the one wait for the device
        window.learned += time.perf_counter() - begun
        losses = [(name, value) for (name, _), value in zip(losses, values, strict=True)]
        for name, value in losses:
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"loss of task {name!r} is {value} at update {update} (rate {rate:g}); "
                    f"checkpoints up to it are in {self.output / 'checkpoints'}. Lower optim.lr, "
                    "set optim.clip_norm or use precision='fp32'"
                )
        if config.optim.clip_norm is not None:
            accelerator.clip_grad_norm_(self.model.parameters(), config.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.sampler.round += 1
        window.add(losses, rate)

    @property
    def clips_per_update(self) -> int:
        """Clips of all tasks and processes in one update."""
        return sum(self.sampler.batch_size.values()) * self.sampler.world_size

    def _loader(self) -> DataLoader:
        workers = self.config.num_workers
        size = next(iter(self.datasets.values())).reader.size
        return DataLoader(
            _Mixture(self.datasets),
            batch_sampler=_Endless(self.sampler),
            collate_fn=partial(_collate_task, size=size),
            num_workers=workers,
            # Some tasks take longer to read than others: two rounds are under way at any time.
            prefetch_factor=math.ceil(2 * len(self.datasets) / workers) if workers else None,
            worker_init_fn=_obey_parent_alone,
            # Also where our own process was spawned: fresh workers would import everything anew.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _any(self, flag: bool) -> bool:
        """Whether any process says so; all processes must ask."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(gather_ranks(torch.tensor([flag], device=self.accelerator.device)).any())

    # -- state ------------------------------------------------------------------------------------

    def _save(self) -> None:
        weights = whole_weights(self.model)
        moments = whole_moments(self.model, self.optimizer)
        if self.accelerator.is_main_process:
            state = {
                "update": self.sampler.round,
                "sampler": self.sampler.state_dict(),
                "failures": self.ledger.state_dict(),
                "log": self.log,
            }
            folder, keep = self.output / "checkpoints", self.config.keep_checkpoints
            save_checkpoint(folder, weights, moments, state, keep)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        found = list_checkpoints(self.output / "checkpoints")
        if not found:
            return
        weights, moments, state = load_checkpoint(found[-1])
        load_whole(self.model, self.optimizer, weights, moments)
        self.sampler.load_state_dict(state["sampler"])
        self.ledger.load_state_dict(state["failures"])
        self.log = state["log"]
        logger.info("resumed %s at update %d", self.output, self.sampler.round)

    def _record(self, line: dict) -> None:
        self.log.append(line)
        if self.accelerator.is_main_process:
            text = "".join(json.dumps(item) + "\n" for item in self.log)
            write_text(self.output / LOG_FILE, text)
        if self.config.trackers:
            self.accelerator.log(_flat(line), step=line["update"])

    # -- results ----------------------------------------------------------------------------------

    def _gather(self) -> None:
        """Bring ``self.whole`` of the main process up to date; all processes take part."""
        if not self.accelerator.is_fsdp2:
            return  # every process trains a whole model
        weights = whole_weights(self.model)
        if self.accelerator.is_main_process:
            own = self.whole.state_dict()
            self.whole.load_state_dict({k: v.view_as(own[k]) for k, v in weights.items()})

    def zero_shot(self) -> dict[str, dict[str, float]]:
        """Metrics of all tasks with validation data; one process measures, the others wait."""
        self.whole.to(self.accelerator.device).eval()
        results = {}
        for name, dataset in self.validation.items():
            results[name] = evaluate(
                self.whole.encode,
                dataset,
                self.objectives[name],
                self.whole.tower,
                num_frames=self.config.model.num_frames,
                batch_size=self.config.tasks[name].batch_size or self.config.batch_size,
                # Videos kept in memory are kept here, for the next time.
                num_workers=0 if self.config.cache_in_memory else self.config.num_workers,
                device=self.accelerator.device,
            )
        self.whole.train()
        if self.accelerator.is_fsdp2:
            self.whole.cpu()  # it is of use here only
        return results

    def finish(self) -> None:
        """Write model, alignment, card and metrics; the metrics last, they mark a whole folder."""
        self._gather()
        if self.accelerator.is_main_process:
            self._write()
        self.accelerator.wait_for_everyone()

    def _write(self) -> None:
        part = self.output / ".model.part"
        shutil.rmtree(part, ignore_errors=True)
        self.whole.backbone.save_pretrained(part)
        for file in part.iterdir():
            os.replace(file, self.output / file.name)
        part.rmdir()
        write_json(
            self.output / "alignment.json",
            {
                "tasks": list(self.objectives),
                "log_scale": self.whole.log_scale.tolist(),
                "bias": self.whole.bias.tolist(),
            },
        )
        sizes = {name: len(dataset) for name, dataset in self.datasets.items()}
        zero_shot = self.zero_shot()
        write_text(self.output / "README.md", model_card(self.config, sizes, zero_shot))
        lines = [line for line in self.log if "loss" in line]
        seconds = max(sum(line["seconds"] for line in lines), 1e-9)
        write_json(
            self.output / METRICS_FILE,
            {
                "zero_shot": zero_shot,
                "loss": lines[-1]["loss"] if lines else {},
                "updates": self.sampler.round,
                "seconds": seconds,
                "data_share": sum(line["waited"] for line in lines) / seconds,
                "learning_share": sum(line["learned"] for line in lines) / seconds,
                "clips": sizes,
                "failures": self.ledger.state_dict(),
                "versions": {
                    package: version(package)
                    for package in ("torch", "torchvision", "transformers", "accelerate", "peft")
                },
            },
        )


def _recompute_layers(backbone: StreamformerModel, device: torch.device) -> None:
    """Keep no activations inside layers; the backward pass computes them again."""
    old = backbone.gradient_checkpointing_enable  # its name before transformers 5.23
    enable = getattr(backbone, "activation_checkpointing_enable", old)
    enable({"use_reentrant": False})
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        # glibc keeps freed blocks of up to 32 MB, and so nearly all that was saved; return them.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


class _Mixture(Dataset):
    """All tasks' data sets as one, addressed by (task, draw)."""

    def __init__(self, datasets: Mapping[str, VideoDataset]) -> None:
        self.datasets = datasets

    def __getitem__(self, key: tuple) -> tuple[str, Sample]:
        task, draw = key
        return task, self.datasets[task][draw]


class _Endless:
    """The sampler's batches as an iterable that can be started again."""

    def __init__(self, sampler: RoundSampler | ReleasedSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list]:
        return self.sampler.batches()


def _collate_task(items: list[tuple[str, Sample]], size: int) -> tuple[str, Batch]:
    return items[0][0], collate([sample for _, sample in items], size)


def _obey_parent_alone(worker: int) -> None:
    """Let a worker of the loader read on when all processes of a job are told to stop.

    The update that is under way must end before it can be saved. What its own process sends ends
    the worker as ever.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def listen() -> None:
        while True:
            if signal.sigwaitinfo({signal.SIGTERM}).si_pid == os.getppid():
                os._exit(0)

    threading.Thread(target=listen, name="listen for SIGTERM", daemon=True).start()


def _received(loader: DataLoader) -> Generator[tuple[str, Batch], None, None]:
    """What a loader gives; a thread takes it from the workers while the step runs.

    What goes wrong there is raised here. Closing the generator ends the thread and the workers.
    """
    source = iter(loader)  # here: it forks, and draws from torch's generator
    if not loader.num_workers:
        yield from source
        return
    ready: Queue[tuple | Exception] = Queue(maxsize=2)
    stopped = threading.Event()

    def receive() -> None:
        try:
            for batch in source:
                ready.put(batch)
                if stopped.is_set():
                    return
        except Exception as error:
            ready.put(error)

    thread = threading.Thread(target=receive, name="receive batches", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        stopped.set()
        while thread.is_alive():
            with contextlib.suppress(Empty):
                ready.get(timeout=0.05)  # it may wait for room


class _Window:
    """What happened since the last line of the log."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.begun, self.rate = time.perf_counter(), 0.0
        self.waited = self.learned = 0.0  # seconds for data; in forward and backward
        self.losses: dict[str, list[float]] = {}

    def add(self, losses: list[tuple[str, float]], rate: float) -> None:
        self.rate = rate
        for name, value in losses:
            self.losses.setdefault(name, []).append(value)

    def means(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in self.losses.items()}

    def close(self) -> dict:
        line = {
            "loss": self.means(),
            "lr": self.rate,
            "seconds": time.perf_counter() - self.begun,
            "waited": self.waited,
            "learned": self.learned,
        }
        self._clear()
        return line


@contextlib.contextmanager
def _sigterm() -> Iterator[list[int]]:
    """A list that gets an entry when SIGTERM arrives; only the main thread can listen."""
    received: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    except ValueError:
        yield received
        return
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def _finished(config: PretrainConfig, output: Path) -> bool:
    """Whether the folder holds a finished run of this config; refuses one of another config."""
    saved = output / CONFIG_FILE
    if not saved.is_file():
        return False
    before, now = json.loads(saved.read_text()), json.loads(json.dumps(config.to_dict()))
    with contextlib.suppress(ValueError):  # keys that are new since then had their defaults
        before = json.loads(json.dumps(PretrainConfig.from_dict(before).to_dict()))
    before, now = _flat(before), _flat(now)
    differing = sorted(
        key
        for key in (before.keys() | now.keys()) - _FREE
        if before.get(key) != now.get(key)
    )
    if differing:
        key = differing[0]
        raise ValueError(
            f"{output} holds a run of another config: {key} was {before.get(key)!r} and is now "
            f"{now.get(key)!r} ({len(differing)} keys differ). Choose another output, or delete it"
        )
    return (output / METRICS_FILE).is_file()


def _flat(value: Mapping, prefix: str = "") -> dict:
    """Nested dicts as one, keys joined by slashes."""
    flat = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{key}/")
        else:
            flat[prefix + key] = item
    return flat


def _mix(*numbers: int) -> int:
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
