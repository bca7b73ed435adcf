"""Where the time and the memory of a pretraining update go.

Time: the real training job on a config (miniworld unless told otherwise), a hundred updates of it,
validation left out. Reported is the share of an update that is spent in forward and backward: the
rest is waiting for clips, exchanging, clipping and applying gradients, and bookkeeping. The first
updates are not counted: the worker that reads ahead has no head start then.

Memory: peak of a process that makes one update of a base model (ViT-B/16, 16 frames of 224 pixels,
2 clips, LoRA 32, random weights) on the CPU, with and without gradient checkpointing. Both must
end in the same loss, or the comparison would not be one.

    python benchmarks/pretraining_update.py                     both
    python benchmarks/pretraining_update.py time --processes 1 --work-dir work_dirs/pretrain
    python benchmarks/pretraining_update.py memory --threads 2

The world and the mini SigLIP are made on first use and kept in --work-dir. The last line of stdout
is one JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

LEAST_SHARE = 0.85  # of an update's time in forward and backward
LARGEST_RATIO = 0.5  # of the peak memory without checkpointing
LOG_EVERY = 10
GIB = 2**30


# -- time ------------------------------------------------------------------------------------------


def measure_time(options: argparse.Namespace) -> dict:
    """Seconds and shares of the updates after the warm-up."""
    import torch

    from experiments import recipe

    torch.set_num_threads(options.threads)
    config = recipe.resolve(options.config, options.set)
    source = recipe.prepare(config, options.work_dir.resolve())
    processes = options.processes or config["launch"]["processes"]
    with tempfile.TemporaryDirectory() as folder:
        settings = recipe.training(
            config,
            source,
            Path(folder) / "run",
            device="cpu" if options.cpu else "auto",
            num_workers=options.workers,
            log_every=LOG_EVERY,
            eval_every=0,
            checkpoint_every=0,
        )
        updates = options.warmup + options.updates
        settings = dataclasses.replace(
            settings,
            tasks={k: dataclasses.replace(v, val=None) for k, v in settings.tasks.items()},
            optim=dataclasses.replace(
                settings.optim,
                updates=updates,
                warmup_updates=min(settings.optim.warmup_updates, updates),
            ),
        )
        output = recipe.train(settings, processes)
        lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["update"] > options.warmup]
    seconds = sum(line["seconds"] for line in lines)
    shares = {key: sum(line[key] for line in lines) / seconds for key in ("learned", "waited")}
    return {
        "processes": processes,
        "workers": options.workers,
        "updates": options.updates,
        "seconds": seconds / options.updates,
        "share": shares["learned"],
        "waiting_share": shares["waited"],
        "within_limit": shares["learned"] >= LEAST_SHARE,
    }


# -- memory ----------------------------------------------------------------------------------------


def measure_memory(options: argparse.Namespace) -> dict:
    """Peaks of two processes, one after the other, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name in ("plain", "checkpointed"):
            command = [sys.executable, __file__, "one-update", "--folder", folder]
            command += ["--name", name, "--threads", str(options.threads)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"the {name} update failed:\n{done.stderr[-3000:]}")
            found[name] = json.loads(done.stdout.splitlines()[-1])
    plain, checkpointed = found["plain"], found["checkpointed"]
    if abs(plain["loss"] - checkpointed["loss"]) > 1e-4 * abs(plain["loss"]):
        raise SystemExit(
            f"losses differ: {plain['loss']} plain, {checkpointed['loss']} with checkpointing"
        )
    ratio = checkpointed["peak"] / plain["peak"]
    return {
        "plain_bytes": plain["peak"],
        "checkpointed_bytes": checkpointed["peak"],
        "ratio": ratio,
        "within_limit": ratio <= LARGEST_RATIO,
    }


def one_update(options: argparse.Namespace) -> None:
    """One update of a base model in this process; prints its peak memory and its loss."""
    import torch

    from pretrain import PretrainConfig, train

    torch.set_num_threads(options.threads)
    data = options.folder / "data"
    if not data.is_dir():
        write_base(data)
    labelled = {
        "annotations": str(data / "train.csv"),
        "labels": str(data / "label2id.json"),
        "root": str(data),
    }
    task = {"objective": "recognition", "reader": "kinetics", "templates": "plain"}
    output = train(
        PretrainConfig.from_dict(
            {
                "output": str(options.folder / options.name),
                "tasks": {"actions": {**task, "train": labelled}},
                "model": {
                    "siglip": str(data),
                    "num_frames": 16,
                    "lora_rank": 32,
                    "gradient_checkpointing": options.name == "checkpointed",
                },
                "optim": {"updates": 1},
                "batch_size": 2,
                "checkpoint_every": 0,
                "device": "cpu",
            }
        ),
        progress=False,
    )
    unit = 1 if platform.system() == "Darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    loss = json.loads((output / "metrics.json").read_text())["loss"]["actions"]
    print(json.dumps({"peak": peak, "loss": loss}))


def write_base(folder: Path) -> None:
    """A SigLIP of base size with random weights, and two videos of noise in the Kinetics layout."""
    import numpy as np
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipModel

    from backbone.video import VideoWriter

    torch.manual_seed(0)
    words = {"<pad>": 0, "<unk>": 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    SiglipModel(SiglipConfig(text_config={**ends, "vocab_size": 64})).save_pretrained(folder)
    rng = np.random.default_rng(0)
    for name in ("first", "second"):
        with VideoWriter(folder / f"{name}.mp4", 8, (224, 224)) as writer:
            for image in rng.integers(0, 256, (16, 224, 224, 3), dtype=np.uint8):
                writer.write(image)
    (folder / "train.csv").write_text("first.mp4,noise\nsecond.mp4,snow\n")
    (folder / "label2id.json").write_text(json.dumps({"noise": 0, "snow": 1}))


# -- command ---------------------------------------------------------------------------------------


def main() -> None:
    """Measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", nargs="?", default="all", choices=PARTS)
    parser.add_argument("--config", default="miniworld", help="pretraining config (miniworld)")
    parser.add_argument("--set", action="append", default=[], help="change a key of the config")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/pretrain"))
    parser.add_argument("--processes", type=int, help="that share an update (the config's)")
    parser.add_argument("--workers", type=int, default=1, help="that read ahead (1)")
    parser.add_argument("--updates", type=int, default=100, help="that are counted (100)")
    parser.add_argument("--warmup", type=int, default=40, help="updates before them (40)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (1)")
    parser.add_argument("--cpu", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "one-update":
        one_update(options)
        return
    for option in ("updates", "warmup"):
        if getattr(options, option) % LOG_EVERY:
            raise SystemExit(f"--{option} must be a multiple of {LOG_EVERY}")
    results = {}
    if options.part in ("all", "time"):
        results["time"] = time = measure_time(options)
        print(f"update              {1e3 * time['seconds']:8.1f} ms")
        print(f"forward + backward  {time['share']:8.1%}    (at least {LEAST_SHARE:.0%})")
        print(f"waiting for clips   {time['waiting_share']:8.1%}")
    if options.part in ("all", "memory"):
        results["memory"] = memory = measure_memory(options)
        print(f"peak, plain         {memory['plain_bytes'] / GIB:8.2f} GiB")
        print(f"peak, checkpointed  {memory['checkpointed_bytes'] / GIB:8.2f} GiB")
        print(f"ratio               {memory['ratio']:8.2f}    (at most {LARGEST_RATIO})")
    import torch

    about = {"torch": torch.__version__, "machine": platform.machine()}
    about |= {"threads": options.threads, "config": options.config}
    print(json.dumps({"benchmark": "pretraining_update", **results, **about}))


PARTS = ("all", "time", "memory", "one-update")

if __name__ == "__main__":
    main()
