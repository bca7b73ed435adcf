"""From the outcomes of a comparison to its report: JSON, Markdown, a picture, a terminal table.

Statistics. Each metric is summarised per encoder by the mean and the sample standard deviation
(n - 1) over seeds. Encoders are compared by the differences of runs with equal seeds; their mean
has the 95 % interval ``mean ± t(0.975, n - 1) * s / sqrt(n)`` of Student's t for paired samples. It
covers what seeds change (initial weights of the head, order of the data) and nothing else: encoders
and data are the same in all runs. With one seed there is no spread: ``std``, ``low``, ``high`` are
null.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Okabe-Ito colours: told apart on paper and by the colour-blind. Others take what is left.
COLOURS = {
    "siglip": "#7a8ca0",
    "none": "#7a8ca0",  # of an ablation
    "image": "#d9a441",
    "streamformer": "#0072b2",
    "G+T+S": "#0072b2",
}
SPARE_COLOURS = ("#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c6bb1", "#a6761d")
INK, FAINT = "#22272e", "#c9ced6"
MOST_BARS = 6  # metrics side by side, in the table and in the picture; more stand below each other
SAME_HEAD = "with the same head, the same data and the same training"

Outcomes = Mapping[str, Mapping[int, Mapping[str, Any]]]  # label -> seed -> outcome of one run


def summarise(outcomes: Outcomes, field: str = "metrics") -> dict[str, dict[str, Any]]:
    """Per label and metric ``{"mean", "std", "seeds"}``; ``seeds`` lists values by seed.

    Raises:
        ValueError: runs report different metrics, or one is not a finite number.
    """
    return {
        label: {
            metric: _summary([float(run[field][metric]) for _, run in sorted(by_seed.items())])
            for metric in _common_metrics(label, by_seed, field)
        }
        for label, by_seed in outcomes.items()
    }


def paired_difference(
    better: Sequence[float], base: Sequence[float]
) -> dict[str, float | list[float] | None]:
    """Mean of ``better - base`` over runs of equal seed with its 95 % interval (Student's t)."""
    differences = [a - b for a, b in zip(better, base, strict=True)]
    mean = statistics.fmean(differences)
    low = high = None
    if len(differences) > 1:
        from scipy.stats import t

        error = statistics.stdev(differences) / math.sqrt(len(differences))
        reach = float(t.ppf(0.975, len(differences) - 1)) * error
        low, high = mean - reach, mean + reach
    return {"mean": mean, "low": low, "high": high, "seeds": differences}


def build_report(
    *,
    task: str,
    title: str,
    data: str,
    outcomes: Outcomes,
    config: Mapping[str, Any],
    config_difference: Sequence[str],
    environment: Mapping[str, Any],
    wall_seconds: float,
    details: Mapping[str, Any],
    pairs: Sequence[tuple[str, str]] | None = None,
) -> dict[str, Any]:
    """The whole report as JSON values.

    Args:
        task: the verb, such as ``"oad"``.
        title: one line for people.
        data: name of the data set.
        outcomes: label -> seed -> ``{"metrics": {name: points}, "per_class": {name: points}}``.
        config: the config that all runs share.
        config_difference: keys in which the encoders' resolved configs differ.
        environment: from ``experiments.environment``.
        wall_seconds: how long this call took, caches included.
        details: what else belongs into the report of this task. The Markdown shows ``notes``
            (texts), ``chance`` (metric -> level of a guess), ``command``, ``encoders``
            (label -> settings), ``pictures`` (file -> title), ``probe`` (label -> what -> number),
            ``tables`` (heading -> label -> column -> number), ``equal`` (what the labels had in
            common), ``spread`` (what the spread stands for), ``classes`` (what classes are called)
            and ``class_metric`` (what is measured of one), where the usual words do not fit.
        pairs: which labels are compared, the most important pair first: ``(better, base)`` each.
            None compares the last label with the first, and then with all in between.
    """
    metrics, per_class = summarise(outcomes), summarise(outcomes, "per_class")
    seeds = sorted({seed for by_seed in outcomes.values() for seed in by_seed})
    first, *between = outcomes
    if pairs is None:
        last = between.pop() if between else first
        pairs = [(last, base) for base in (first, *between)]
    (better, base), *others = pairs
    return {
        "task": task,
        "title": title,
        "data": data,
        "seeds": seeds,
        "metrics": metrics,
        "difference_of": f"{better} - {base}",
        "difference": _differences(metrics, better, base) if better != base else {},
        "other_differences": {f"{a} - {b}": _differences(metrics, a, b) for a, b in others},
        "per_class": per_class if all(per_class.values()) else {},
        **details,
        "config": dict(config),
        "config_difference": list(config_difference),
        "environment": dict(environment),
        "wall_seconds": round(wall_seconds, 1),
    }


def publish(
    report: Mapping[str, Any],
    folder: Path,
    draw: Callable[[Mapping[str, Any], Path], None] | None = None,
) -> None:
    """Write the report's files and print its table, and where they lie, to stdout."""
    write_report(report, folder, draw)
    say(f"{to_text(report)}\n{folder / 'report.md'}, .json, .png")


def say(result: str) -> None:
    """Print what a verb was asked for, as it comes: to stdout, where nothing else goes."""
    print(result, flush=True)  # noqa: T201 (results go here)


def write_report(
    report: Mapping[str, Any],
    folder: Path,
    draw: Callable[[Mapping[str, Any], Path], None] | None = None,
) -> None:
    """Write ``report.json``, ``report.md`` and ``report.png`` into ``folder``, each atomically.

    ``draw(report, path)`` makes the picture, ``plot`` unless given.
    """
    write_files(report, folder, to_markdown(report), draw or plot)


def write_files(
    report: Mapping[str, Any],
    folder: Path,
    page: str,
    draw: Callable[[Mapping[str, Any], Path], None],
) -> None:
    """The same for a report that is told in other words: ``page`` is its Markdown."""
    from backbone.files import replacing, write_json, write_text

    with replacing(folder / "report.png") as temporary:
        draw(report, temporary)
    write_text(folder / "report.md", page)
    write_json(folder / "report.json", report)


def to_text(report: Mapping[str, Any]) -> str:
    """The main table for a terminal, columns aligned."""
    header, *rows = aligned(_table(report))
    rule = "-" * len(header)
    return "\n".join([report["title"], rule, header, rule, *rows, rule])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line per row, the first column to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def to_markdown(report: Mapping[str, Any]) -> str:
    """The report for people: what was compared, the table, classes, how it was obtained."""
    header, *rows = _table(report)
    parts = [
        f"# {report['title']}",
        _sentence(report),
        markdown_table(header, rows),
        report.get("spread")
        or "Mean ± standard deviation over seeds, in points. " + _interval_note(report),
        f"![{report['title']}](report.png)",
        *(f"![{title}]({name})" for name, title in report.get("pictures", {}).items()),
        *(f"- {note}" for note in report.get("notes", [])),
    ]
    if report["per_class"]:
        parts += [f"## By {_class_word(report)}", markdown_table(*_class_table(report))]
    if report.get("probe"):
        table = _plain_table("linear probe", report["probe"])
        parts += ["## What the frozen encoders know", markdown_table(*table)]
    for heading, table in report.get("tables", {}).items():
        parts += [f"## {heading}", markdown_table(*_plain_table("", table))]
    parts += [
        "## How it was obtained",
        f"- data: {report['data']}; seeds: {', '.join(map(str, report['seeds']))}; "
        f"wall time of the last call: {report['wall_seconds']} s",
        f"- command: `{report['command']}`" if report.get("command") else "",
        "- the resolved configs differ in: "
        + (", ".join(f"`{key}`" for key in report["config_difference"]) or "nothing"),
        *(
            f"- {label}: " + ", ".join(f"{key} `{value}`" for key, value in settings.items())
            for label, settings in report.get("encoders", {}).items()
        ),
        "",
        markdown_table(
            ["environment", ""],
            [[key, "-" if v is None else str(v)] for key, v in report["environment"].items()],
        ),
    ]
    return join_markdown(parts)


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Bars with one dot per seed for each metric, and average precision by class.

    Many metrics are drawn like classes: one line each, with a dot per encoder.
    """
    means = {label: _means(values) for label, values in report["metrics"].items()}
    classes = {label: _means(values) for label, values in report["per_class"].items()}
    many = len(next(iter(means.values()))) > MOST_BARS
    drawn = means if many else classes
    rows = list(means[next(iter(means))]) if many else [n for n, _ in _classes_by_gain(report)]
    wide = 1 if many or not classes else 2
    height = max(4.6, 1.6 + 0.3 * len(rows))
    size = (12.5 if wide == 2 else 9 if many else max(6.5, 1.6 * len(means)), height)
    with picture(path, report["title"], size, columns=wide, widths=[1, 1.1][:wide]) as axes:
        if not many:
            _plot_metrics(axes[0], report)
        if rows:
            pair = report["difference_of"].split(" - ")
            _plot_rows(axes[-1], drawn, rows, pair)
            if many:
                axes[-1].set_xlabel("points")
                axes[-1].set_title(_subtitle(report), loc="left", fontsize=10.5)
                _legend(axes[-1])
            else:
                better, base = pair
                axes[-1].set_xlabel(report.get("class_metric", "average precision, points"))
                gain = f", largest gain of {better} first" if better != base else ""
                title = f"By {_class_word(report)}{gain}"
                axes[-1].set_title(title, loc="left", fontsize=10.5)


@contextmanager
def picture(
    path: Path,
    title: str,
    size: tuple[float, float],
    *,
    rows: int = 1,
    columns: int = 1,
    widths: Sequence[float] | None = None,
) -> Iterator[list[Any]]:
    """Yield the axes, row by row, of a figure of ``size`` inches that becomes the PNG ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(
            rows, columns, figsize=size, width_ratios=widths, squeeze=False, layout="constrained"
        )
        try:
            figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold", color=INK)
            yield list(axes.flat)
            figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12, wspace=0.03)
            figure.savefig(path, dpi=150, facecolor="white")
        finally:
            pyplot.close(figure)


def _common_metrics(label: str, by_seed: Mapping[int, Mapping[str, Any]], field: str) -> list[str]:
    found = {seed: run.get(field, {}) for seed, run in by_seed.items()}
    names = list(next(iter(found.values())))
    for seed, values in found.items():
        if list(values) != names:
            raise ValueError(
                f"{label}: the runs report different {field}: {list(values)} with seed {seed}, "
                f"{names} with the first; delete that run's folder and run again"
            )
        for name, value in values.items():
            if not math.isfinite(value):
                raise ValueError(f"{label}, seed {seed}: {field} {name} is {value}, not a number")
    return names


def _summary(values: list[float]) -> dict[str, Any]:
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "seeds": values}


def _differences(metrics: Mapping[str, Any], better: str, base: str) -> dict[str, Any]:
    return {
        metric: paired_difference(value["seeds"], metrics[base][metric]["seeds"])
        for metric, value in metrics[better].items()
        if metric in metrics[base]
    }


def _table(report: Mapping[str, Any]) -> list[list[str]]:
    """Header and one row per encoder, then chance and the difference, as texts.

    With many metrics the table is turned: one row per metric.
    """
    metrics = report["metrics"]
    names = list(next(iter(metrics.values())))
    rows = [["encoder", *names]]
    rows += [
        [label, *(_spread(values[name]) for name in names)] for label, values in metrics.items()
    ]
    chance = report.get("chance", {})
    if chance:
        rows.append(["chance", *(_number(chance.get(name)) for name in names)])
    for title, difference in _all_differences(report).items():
        rows.append([title, *(_interval(difference.get(name)) for name in names)])
    if len(names) <= MOST_BARS:
        return rows
    header, *turned = _turned(rows)
    return [["metric", *header[1:]], *turned]


def _all_differences(report: Mapping[str, Any]) -> dict[str, Any]:
    main = {report["difference_of"]: report["difference"]} if report["difference"] else {}
    return {**main, **report["other_differences"]}


def _class_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    labels = list(report["per_class"])
    rows = [
        [name, *(_spread(report["per_class"][label][name]) for label in labels), f"{gain:+.1f}"]
        for name, gain in _classes_by_gain(report)
    ]
    header = [_class_word(report), *labels, report["difference_of"]]
    return (header, rows) if report["difference"] else (header[:-1], [row[:-1] for row in rows])


def _class_word(report: Mapping[str, Any]) -> str:
    return report.get("classes", "class")


def _plain_table(
    corner: str, values: Mapping[str, Mapping[str, float]]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of label -> column -> number, turned where it is wider than long."""
    columns = list(dict.fromkeys(name for row in values.values() for name in row))
    rows = [[label, *(_number(row.get(c)) for c in columns)] for label, row in values.items()]
    table = [[corner, *columns], *rows]
    header, *rows = _turned(table) if len(columns) > max(MOST_BARS, len(rows)) else table
    return header, rows


def _turned(table: Sequence[Sequence[str]]) -> list[list[str]]:
    return [list(column) for column in zip(*table, strict=True)]


def _classes_by_gain(report: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Classes with the gain of the last encoder over the first, largest gain on top."""
    better, base = report["difference_of"].split(" - ")
    per_class = report["per_class"]
    gains = {
        name: value["mean"] - per_class[base][name]["mean"]
        for name, value in per_class.get(better, {}).items()
        if name in per_class.get(base, {})
    }
    return sorted(gains.items(), key=lambda item: -item[1])


def _sentence(report: Mapping[str, Any]) -> str:
    if not report["difference"]:
        return "One encoder was run, so nothing is compared."
    better, base = report["difference_of"].split(" - ")
    metric, value = next(iter(report["difference"].items()))
    verb = "ahead of" if value["mean"] >= 0 else "behind"
    return (
        f"**{better} is {abs(value['mean']):.1f} points of {metric} {verb} {base}**"
        + (f" (95 % interval {value['low']:+.1f} to {value['high']:+.1f})" if _has(value) else "")
        + f", {report.get('equal', SAME_HEAD)}."
    )


def _interval_note(report: Mapping[str, Any]) -> str:
    if len(report["seeds"]) == 1:
        return "One seed was run, so there is neither spread nor interval."
    return (
        "Differences are of runs with equal seed, with the 95 % interval of Student's t; it covers "
        "what the seed of the head changes, as encoders and data are the same in all runs."
    )


def _spread(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:.1f}" + ("" if value["std"] is None else f" ± {value['std']:.1f}")


def _interval(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "-"
    interval = f" [{value['low']:+.1f}, {value['high']:+.1f}]" if _has(value) else ""
    return f"{value['mean']:+.1f}{interval}"


def _has(value: Mapping[str, Any]) -> bool:
    return value["low"] is not None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def join_markdown(parts: Sequence[str]) -> str:
    """A page of Markdown: blank lines between blocks, none between the items of a list."""
    text = ""
    previous = ""
    for part in filter(None, parts):
        tight = part.startswith("- ") and previous.startswith("- ")
        text += ("\n" if tight else "\n\n" if text else "") + part
        previous = part
    return text + "\n"


def colours_of(labels: Iterable[str]) -> dict[str, str]:
    """Label -> colour: known labels their own, others what is left, in order."""
    labels = list(labels)
    spare = iter(SPARE_COLOURS * (1 + len(labels)))
    return {label: COLOURS.get(label) or next(spare) for label in labels}


def _plot_metrics(axes: Any, report: Mapping[str, Any]) -> None:
    metrics = report["metrics"]
    names = list(next(iter(metrics.values())))
    colours = colours_of(list(metrics))
    width = 0.8 / len(metrics)
    narrow = len(metrics) > 4 or len(metrics) * len(names) > 15  # for a number above each
    for place, (label, values) in enumerate(metrics.items()):
        for group, name in enumerate(names):
            x = group + (place - (len(metrics) - 1) / 2) * width
            mean, seeds = values[name]["mean"], values[name]["seeds"]
            axes.bar(
                x,
                mean,
                width * 0.92,
                color=colours[label],
                label=label if group == 0 else None,
                zorder=2,
            )
            step = width * 0.36 / max(len(seeds) - 1, 1)
            spread = [x + (k - (len(seeds) - 1) / 2) * step for k in range(len(seeds))]
            axes.scatter(
                spread, seeds, s=22, color="white", edgecolors=INK, linewidths=0.9, zorder=4
            )
            axes.annotate(
                f"{mean:.1f}",
                (x, max(mean, *seeds)),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                rotation=90 if narrow else 0,
                fontweight="bold",
            )
    for group, name in enumerate(names):
        level = report.get("chance", {}).get(name)
        if level is not None:
            axes.plot(
                [group - 0.46, group + 0.46],
                [level, level],
                color=INK,
                linestyle=(0, (4, 3)),
                linewidth=1.2,
                label="chance" if group == 0 else None,
                zorder=3,
            )
    axes.set_xticks(range(len(names)), [report.get("titles", {}).get(n, n) for n in names])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("points")
    axes.margins(y=0.2 if narrow else 0.12)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=FAINT, linewidth=0.6, zorder=0)
    axes.set_title(_subtitle(report), loc="left", fontsize=10.5)
    _legend(axes)


def _subtitle(report: Mapping[str, Any]) -> str:
    runs = f"{len(report['seeds'])} seeds" if len(report["seeds"]) > 1 else "1 seed"
    if not report["difference"]:
        return runs
    metric, value = next(iter(report["difference"].items()))
    return f"{report['difference_of']}: {_interval(value)} {metric} ({runs})"


def _plot_rows(
    axes: Any,
    values: Mapping[str, Mapping[str, float]],
    rows: Sequence[str],
    pair: Sequence[str],
) -> None:
    """One line per row of ``values`` (label -> row -> number): a dot per label, the pair joined."""
    colours = colours_of(list(values))
    better, base = pair
    reach = 0.0
    for place, name in zip(range(len(rows))[::-1], rows, strict=True):
        ends = [values[base][name], values[better][name]]
        gain = ends[1] - ends[0]
        axes.plot(
            ends,
            [place, place],
            color=colours[better if gain >= 0 else base],
            alpha=0.35,
            linewidth=5,
            solid_capstyle="round",
            zorder=2,
        )
        for label, row in values.items():
            axes.scatter(
                row[name],
                place,
                s=52,
                color=colours[label],
                edgecolors="white",
                linewidths=0.8,
                label=label if place == 0 else None,
                zorder=4 if label in pair else 3,
            )
        furthest = max(row[name] for row in values.values())
        reach = max(reach, furthest)
        axes.annotate(
            f"{round(gain):+d}" if better != base else f"{ends[0]:.0f}",
            (furthest, place),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(rows))[::-1], rows)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    reach = max(reach, 1e-6)
    axes.set_xlim(-0.01 * reach, 1.09 * reach)  # room for a dot at 0 and for the gain
    axes.grid(axis="x", color=FAINT, linewidth=0.6, zorder=0)


def _legend(axes: Any) -> None:
    """Below the plot, chance last."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda place: labels[place] == "chance")
    axes.legend(
        [handles[place] for place in order],
        [labels[place] for place in order],
        frameon=False,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.1),
        ncols=4,
    )


def _means(values: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {name: value["mean"] for name, value in values.items()}
