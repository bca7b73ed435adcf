"""What a frame costs when a stream grows: the paper's efficiency figure, on this machine.

Four ways to have features of the newest frame: encode all frames so far anew, with attention in
both directions or causally; or let a causal encoder remember, all frames or the last of a window.
The floor is SigLIP on the newest frame alone: what the image encoder costs without any time.
Then streams side by side, each with a full window, until the machine has no more to give. All
models have random weights, which no figure here depends on.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import preflight
from experiments.config import add_arguments as add_config_arguments
from experiments.config import load_config
from experiments.environment import choose_device, environment, to_markdown
from experiments.report import (
    COLOURS,
    FAINT,
    aligned,
    join_markdown,
    markdown_table,
    picture,
    say,
    write_files,
)

if TYPE_CHECKING:
    import torch

    from experiments.measuring import Row

ABOUT = """\
Latency of the newest frame and memory against the length of a stream, for
recomputing and for streaming, next to SigLIP on one frame; then throughput against
streams side by side. "tiny" takes two minutes on two cores; "base" is ViT-B/16 at
224 pixels, and on a GPU is held against the figures asked of it."""
EXAMPLES = """\
  python experiments/run.py efficiency
  python experiments/run.py efficiency --config base --device cuda
  python experiments/run.py efficiency --config base --set measure.lengths=[1,16,64]"""

REPORT_BYTES = 10 * 2**20
CHOICES = {
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "compile": ("auto", "always", "never"),
}
FLOOR = "SigLIP, one frame"
WAY_COLOURS = ("#d55e00", "#d9a441", "#56b4e9", "#0072b2")
ASKED = {  # of ViT-B/16 at 224 pixels with a window of 64 on a GPU of the H200's class, in bfloat16
    "milliseconds of a frame, one stream": 2.5,
    "share of the matrix rate, 64 streams": 0.5,
}
NOTES = (
    "milliseconds: median, from the call until the result is there; way and floor took turns",
    "memory: weights, what is kept between frames (keys and values, or the frames so far), and the "
    "most that a step takes beside them: {peak}",
    "keys and values of all frames are kept in a memory that doubles when it is full",
    "frames are random numbers, weights too; neither changes what a step costs",
)
PEAK = {
    "cuda": "peak of PyTorch's CUDA allocator",
    "cpu": "peak of the bytes that PyTorch's CPU allocator hands out, from its profiler",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add_config_arguments(parser, "work_dirs/efficiency", example="measure.window=16", config="tiny")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Resolve, preflight, measure, report; returns the report."""
    start = time.perf_counter()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler tells every start and stop
    folder = args.work_dir.resolve()
    config = load_config("efficiency", args.config, args.set)
    device = choose_device(args.device)
    preflight.refuse(_problems(config, device) + preflight.disk(folder, REPORT_BYTES))

    report = {
        "task": "efficiency",
        "title": "What the newest frame of a stream costs",
        "device": device,
        **measure(config, device),
        "config": config,
        "environment": environment(),
        "command": args.command,
    }
    report["asked"] = asked(report)
    report["wall_seconds"] = round(time.perf_counter() - start, 1)
    write_files(report, folder, to_page(report), plot)
    say(f"{to_text(report)}\n{folder / 'report.md'}, .json, .png")
    return report


def _problems(config: Mapping[str, Any], device: str) -> list[str]:
    """Values that cannot be measured."""
    measure, found = config["measure"], []
    if device.partition(":")[0] not in PEAK:
        found.append(f"--device {device}: this is measured on {' or '.join(PEAK)}")
    for key in ("lengths", "streams"):
        values = measure[key]
        if not values or values != sorted(set(values)) or not all(v > 0 for v in values):
            found.append(f"measure.{key}={values}: expected rising numbers from 1 on")
    if measure["window"] < 1:
        found.append(f"measure.window={measure['window']}: a frame sees at least itself")
    for key, known in CHOICES.items():
        if config["run"][key] not in known:
            choices = ", ".join(known)
            found.append(f"run.{key}={config['run'][key]!r}: choose one of {choices}")
    return found


# -- measuring ------------------------------------------------------------------------------------


def choose_dtype(name: str, device: str) -> torch.dtype:
    """Make ``auto`` bfloat16 on a GPU that computes in it, else float32: CPUs emulate it slowly."""
    import torch

    if name == "auto":
        has_it = device.startswith("cuda") and torch.cuda.is_bf16_supported(
            including_emulation=False
        )
        name = "bfloat16" if has_it else "float32"
    return getattr(torch, name)


def compiles(name: str, device: str) -> bool:
    """Whether streams side by side are compiled; ``auto`` does on a GPU, where launches bound."""
    return name == "always" or (name == "auto" and device.startswith("cuda"))


def measure(config: Mapping[str, Any], device: str) -> dict[str, Any]:
    """All numbers of the report."""
    import torch

    from experiments import measuring
    from experiments.measuring import Recompute, Streamed

    model, options = config["model"], config["measure"]
    dtype = choose_dtype(config["run"]["dtype"], device)
    limits = measuring.Limits(torch.device(device), options["seconds"], options["longest"])
    side = model["image_size"]
    frames = torch.randn(1, measuring.CHUNK, 3, side, side, device=device, dtype=dtype)
    image = measuring.image_encoder(model, device, dtype)
    make = partial(measuring.streaming_encoder, model, device, dtype)
    windowed = make(window=options["window"])
    ways = {
        "bidirectional, recomputed": lambda: Recompute(make(causal=False), frames),
        "causal, recomputed": lambda: Recompute(make(), frames),
        "causal, all frames kept": lambda: Streamed(make(), frames),
        f"causal, window of {options['window']}": lambda: Streamed(windowed, frames),
    }

    def floor() -> None:
        image.encode(frames[:, :1])

    along = {}
    for name, way in ways.items():
        along[name] = measuring.along(way(), floor, options["lengths"], limits, name)
    compiled = compiles(config["run"]["compile"], device)
    streams = measuring.side_by_side(windowed, image, options["streams"], frames, limits, compiled)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "compiled": compiled,
        "floor": {
            "milliseconds": measuring.spread(
                [1e3 * own for own, _ in measuring.in_turns(floor, floor, limits)]
            ),
            "weight_bytes": measuring.weight_bytes(image),
            "operations": measuring.operations(image, frames),
        },
        "weight_bytes": measuring.weight_bytes(windowed),
        "operations": measuring.operations(windowed, frames, before=options["window"]),
        "matrix_rate": measuring.matrix_rate(dtype, limits),
        "along": along,
        "streams": [_throughput(row) for row in streams],
    }


def _throughput(row: Row) -> Row:
    if "left_out" in row:
        return row
    return {**row, "frames_per_second": 1e3 * row["streams"] / row["milliseconds"]["median"]}


def asked(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is asked of ViT-B/16 on a GPU, and what was found; None where this run cannot tell."""
    base = load_config("efficiency", "base")
    same = report["config"]["model"] == base["model"]
    tells = same and report["device"].startswith("cuda") and report["dtype"] == "bfloat16"
    tells = tells and report["config"]["measure"]["window"] == base["measure"]["window"]
    rows = {row["streams"]: row for row in report["streams"] if "left_out" not in row}
    found: dict[str, float | None] = dict.fromkeys(ASKED)
    one, many = ASKED
    if tells and 1 in rows:
        found[one] = rows[1]["milliseconds"]["median"]
    if tells and 64 in rows:
        found[many] = matrix_share(report, rows[64])
    return [{"what": what, "limit": limit, "found": found[what]} for what, limit in ASKED.items()]


def matrix_share(report: Mapping[str, Any], row: Row) -> float:
    """Operations per second of streams side by side, as a share of the matrix rate."""
    return report["operations"] * row["frames_per_second"] / report["matrix_rate"]


# -- the report -----------------------------------------------------------------------------------


def latency_table(report: Mapping[str, Any]) -> list[list[str]]:
    """Milliseconds of the newest frame by length, a row per way."""
    return _by_length(report, lambda name, row: _number(row["milliseconds"]["median"]))


def ratio_table(report: Mapping[str, Any]) -> list[list[str]]:
    """The same, in times of the floor."""
    return _by_length(report, lambda name, row: f"{row['ratio']['median']:.2f}")


def memory_table(report: Mapping[str, Any]) -> list[list[str]]:
    """Megabytes in all by length, a row per way."""
    weights = report["weight_bytes"]
    return _by_length(report, lambda name, row: _megabytes(_total(row, weights)))


def streams_table(report: Mapping[str, Any]) -> list[list[str]]:
    """A row per number of streams side by side."""
    rows = [["streams", "ms a step", "ms a frame", "frames/s", "MB", "of matrix rate"]]
    for row in report["streams"]:
        if "left_out" in row:
            continue
        step = row["milliseconds"]["median"]
        rows.append(
            [
                str(row["streams"]),
                _number(step),
                _number(step / row["streams"]),
                _number(row["frames_per_second"]),
                _megabytes(_total(row, report["weight_bytes"])),
                f"{matrix_share(report, row):.0%}",
            ]
        )
    return rows


def _by_length(report: Mapping[str, Any], show: Callable[[str, Row], str]) -> list[list[str]]:
    lengths = report["config"]["measure"]["lengths"]
    return [["frames", *map(str, lengths)]] + [
        [name, *("-" if "left_out" in row else show(name, row) for row in rows)]
        for name, rows in report["along"].items()
    ]


def _total(row: Row, weights: int) -> int:
    return weights + row["kept_bytes"] + row["working_bytes"]


def _number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.3g}" if count < 1e8 else f"{count / 1e6:.0f}"


def _headline(report: Mapping[str, Any]) -> str:
    """What a window saves, at the greatest length of which it and recomputing were measured."""
    _, recomputed, _, windowed = (
        {row["frames"]: row["ratio"]["median"] for row in rows if "left_out" not in row}
        for rows in report["along"].values()
    )
    length = max(recomputed.keys() & windowed.keys())
    return (
        f"**At frame {length} of a stream the newest frame costs {windowed[length]:.1f} times what "
        f"SigLIP costs with a window of {report['config']['measure']['window']}, and "
        f"{recomputed[length]:.0f} times when all frames are encoded anew.**"
    )


def _left_out(report: Mapping[str, Any]) -> list[str]:
    """Why numbers are missing, a sentence for each way: where one is, all beyond it are."""
    found = []
    for name, rows in {**report["along"], "side by side": report["streams"]}.items():
        first = next((row for row in rows if "left_out" in row), None)
        if first is not None:
            unit = "streams" if "streams" in first else "frames"
            found.append(f"{name}, {first[unit]} {unit} and more: left out, {first['left_out']}")
    return found


def _facts(report: Mapping[str, Any]) -> list[str]:
    """What the tables do not say."""
    floor, device = report["floor"], report["device"].partition(":")[0]
    return [
        f"{FLOOR}: {_number(floor['milliseconds']['median'])} ms, "
        f"{floor['operations'] / 1e9:.3g} GFLOP; a step with a full window: "
        f"{report['operations'] / 1e9:.3g} GFLOP",
        f"matrix rate, measured in this run: {report['matrix_rate'] / 1e12:.3g} TFLOP/s in "
        f"{report['dtype']}",
        *(
            f"{one['what']}: {one['found']:.2f} (asked: {one['limit']:g})"
            if one["found"] is not None
            else f"{one['what']}: not measured here; {one['limit']:g} is asked of ViT-B/16, "
            "--config base, in bfloat16 on a GPU"
            for one in report["asked"]
        ),
        *(note.format(peak=PEAK[device]) for note in NOTES),
        *_left_out(report),
    ]


def to_text(report: Mapping[str, Any]) -> str:
    """The tables for a terminal."""
    parts = [report["title"]]
    for title, table in _tables(report).items():
        parts += ["", title, *aligned(table)]
    return "\n".join([*parts, "", *_left_out(report)]).rstrip()


def to_page(report: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    parts = [f"# {report['title']}", _headline(report), f"![{report['title']}](report.png)"]
    for title, (header, *rows) in _tables(report).items():
        parts += [f"## {title}", markdown_table(header, rows)]
    parts += [f"- {fact}" for fact in _facts(report)]
    parts += [
        "## How it was obtained",
        f"- command: `{report['command']}`, {report['wall_seconds']} s",
        f"- model: {report['config']['model']}",
        to_markdown(report["environment"]),
    ]
    return join_markdown(parts)


def _tables(report: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    window = report["config"]["measure"]["window"]
    compiled = ", compiled" if report["compiled"] else ""
    return {
        f"Milliseconds of the newest frame ({report['device']}, {report['dtype']})": latency_table(
            report
        ),
        f"The same in times of the floor: {FLOOR}": ratio_table(report),
        "Memory, MB": memory_table(report),
        f"Streams side by side, window of {window}{compiled}": streams_table(report),
    }


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Latency and memory over the length of the stream, throughput over streams side by side."""
    measured: set[int] = set()
    with picture(path, report["title"], (15, 5), columns=3) as (latency, memory, streams):
        for place, (name, rows) in enumerate(report["along"].items()):
            shown = [row for row in rows if "left_out" not in row]
            lengths = [row["frames"] for row in shown]
            measured.update(lengths)
            style = {"color": WAY_COLOURS[place], "zorder": 3}
            style |= {"linewidth": 6 if place == 0 else 2, "markersize": 9 if place == 0 else 6}
            times = [row["milliseconds"]["median"] for row in shown]
            latency.plot(lengths, times, "o-", label=name, **style)
            totals = [_total(row, report["weight_bytes"]) / 1e6 for row in shown]
            memory.plot(lengths, totals, "o-", **style)  # the same ways: one legend does
        floor = {"color": COLOURS["siglip"], "linewidth": 1.8, "linestyle": (0, (4, 3))}
        latency.axhline(report["floor"]["milliseconds"]["median"], label=FLOOR, **floor)
        memory.axhline(report["weight_bytes"] / 1e6, label="weights alone", **floor)
        _plot_streams(streams, report)
        for axes, quantity in ((latency, "milliseconds"), (memory, "megabytes")):
            _scale(axes, sorted(measured), "log")
            axes.set_xlabel("frames of the stream so far")
            axes.set_ylabel(quantity)
        latency.set_title("Latency of the newest frame", loc="left", fontsize=10.5)
        memory.set_title("Memory in all", loc="left", fontsize=10.5)


def _plot_streams(axes: Any, report: Mapping[str, Any]) -> None:
    """Frames per second over streams side by side, next to what the floor makes of them."""
    rows = [row for row in report["streams"] if "left_out" not in row]
    counts = [row["streams"] for row in rows]
    found = [row["frames_per_second"] for row in rows]
    *_, (name, _) = report["along"].items()
    axes.plot(counts, found, "o-", color=WAY_COLOURS[-1], linewidth=2, label=name, zorder=3)
    image = [row["frames_per_second"] * row["ratio"]["median"] for row in rows]
    axes.plot(counts, image, "o--", color=COLOURS["siglip"], linewidth=1.8, label="SigLIP, a batch")
    _scale(axes, counts, "linear")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("streams side by side")
    axes.set_ylabel("frames per second, all streams")
    axes.set_title("Streams on one device", loc="left", fontsize=10.5)


def _scale(axes: Any, ticks: Sequence[int], vertical: str) -> None:
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(n) if n % 1024 else f"{n // 1024}k" for n in ticks])
    axes.set_yscale(vertical)
    if vertical == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(color=FAINT, linewidth=0.6, zorder=0)
    axes.legend(frameon=False)
