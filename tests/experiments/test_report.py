"""Reports: the statistics against SciPy and by hand, the files, and what they say."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from backbone.files import replacing, write_json
from experiments.environment import environment, to_markdown
from experiments.report import (
    build_report,
    paired_difference,
    summarise,
    to_text,
    write_report,
)


def outcomes(seeds=3, arms=("siglip", "streamformer"), classes=("grow", "swing")):
    rng = np.random.default_rng(0)

    def run(level):
        return {
            "metrics": {name: level + rng.normal() for name in ("online/mAP", "window/mAP")},
            "per_class": {name: level + 5 * rng.normal() for name in classes},
        }

    levels = {"siglip": 30, "image": 35, "streamformer": 50}
    return {arm: {seed: run(levels[arm]) for seed in range(seeds)} for arm in arms}


def report_of(found, **details):
    return build_report(
        task="oad",
        title="Online action detection on miniworld",
        data="MINIWORLD",
        outcomes=found,
        config={"train": {"epochs": 3}},
        config_difference=["encoder.spec"],
        environment={"python": "3.11", "gpu": None},
        wall_seconds=12.34,
        details=details,
    )


def test_difference_equals_scipys_paired_interval():
    a, b = [55.1, 53.2, 57.9, 50.0], [35.5, 36.1, 34.0, 33.3]
    found = paired_difference(a, b)
    reference = stats.ttest_rel(a, b)
    interval = reference.confidence_interval(0.95)
    assert found["mean"] == pytest.approx(np.mean(np.subtract(a, b)))
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))


def test_difference_of_three_seeds_by_hand():
    found = paired_difference([3.0, 5.0, 7.0], [1.0, 2.0, 3.0])  # differences 2, 3, 4: s = 1
    assert found["mean"] == 3
    assert found["high"] - 3 == pytest.approx(4.302653 / 3**0.5, rel=1e-6)  # t(0.975, 2)
    assert 3 - found["low"] == pytest.approx(4.302653 / 3**0.5, rel=1e-6)


def test_one_seed_has_no_spread_and_says_so():
    report = report_of(outcomes(seeds=1))
    assert report["metrics"]["siglip"]["online/mAP"]["std"] is None
    assert report["difference"]["online/mAP"]["low"] is None
    assert report["difference"]["online/mAP"]["high"] is None
    assert "±" not in to_text(report)


def test_summary_is_mean_and_sample_deviation_in_order_of_seed():
    runs = {"siglip": {7: {"metrics": {"m": 3.0}}, 2: {"metrics": {"m": 1.0}}}}
    assert summarise(runs)["siglip"]["m"] == {"mean": 2.0, "std": 2**0.5, "seeds": [1.0, 3.0]}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_refused(value):
    found = outcomes()
    found["siglip"][1]["metrics"]["online/mAP"] = value
    with pytest.raises(ValueError, match=f"siglip, seed 1: metrics online/mAP is {value}"):
        summarise(found)


def test_runs_with_different_metrics_are_refused():
    found = outcomes()
    del found["siglip"][2]["metrics"]["window/mAP"]
    with pytest.raises(ValueError, match="siglip: the runs report different metrics: .* seed 2"):
        summarise(found)


def test_the_keys_of_the_report():
    report = report_of(outcomes(arms=("siglip", "image", "streamformer")))
    required = {
        "task",
        "data",
        "metrics",
        "difference",
        "config",
        "config_difference",
        "environment",
        "wall_seconds",
    }
    assert required <= set(report)
    assert set(report["metrics"]["siglip"]["online/mAP"]) == {"mean", "std", "seeds"}
    assert {"mean", "low", "high"} <= set(report["difference"]["window/mAP"])
    assert report["difference_of"] == "streamformer - siglip"
    assert set(report["other_differences"]) == {"streamformer - image"}


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(
    "arms", [("siglip",), ("siglip", "streamformer"), ("siglip", "image", "streamformer")]
)
@pytest.mark.parametrize("classes", [(), ("grow", "swing", "bounce")])
def test_files_of_a_report(tmp_path, seeds, arms, classes):
    report = report_of(
        outcomes(seeds, arms, classes),
        chance={"online/mAP": 9.0, "window/mAP": 8.5},
        notes=["online: every frame once, from its past"],
        command="python experiments/run.py oad",
        probe={"siglip": {"shape": 90.0}},
        encoders={"siglip": {"weights": "1a"}},
    )
    write_report(report, tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "report.json",
        "report.md",
        "report.png",
    }
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == report
    with Image.open(tmp_path / "new" / "report.png") as image:
        assert image.width > 900 and image.height > 500
        assert len(np.unique(np.asarray(image.convert("L")))) > 20
    text = (tmp_path / "new" / "report.md").read_text()
    for expected in ("# Online action", "online: every frame", "| chance | 9.0 | 8.5 |", "weights"):
        assert expected in text
    assert ("## By class" in text) == bool(classes)


def test_the_terminal_table_is_aligned():
    lines = to_text(report_of(outcomes(), chance={"online/mAP": 9.0})).splitlines()[1:]
    assert len({len(line) for line in lines}) == 1
    assert any(line.startswith("streamformer - siglip") for line in lines)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="nan"):
        write_json(path, {"new": float("nan")})
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"old": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["report.json"]


def test_environment_names_versions_and_survives_a_failing_probe(monkeypatch):
    from experiments import environment as module

    def broken():
        raise OSError("no such thing")

    monkeypatch.setattr(module, "_cpu", broken)
    found = environment()
    assert found["cpu"] == "not known (OSError: no such thing)"
    for name in ("python", "torch", "transformers", "numpy", "av", "platform", "threads", "date"):
        assert found[name], name
    assert f"| torch | {found['torch']} |" in to_markdown(found)


def many_metrics(arms=("siglip", "streamformer")):
    values = {f"task/metric{number}": 10.0 + number for number in range(9)}
    return {
        arm: {0: {"metrics": {name: value + 5 * place for name, value in values.items()}}}
        for place, arm in enumerate(arms)
    }


def test_many_metrics_stand_below_each_other(tmp_path):
    report = report_of(
        many_metrics(), chance={"task/metric3": 1.5}, equal="on the same clips", spread="None."
    )
    lines = to_text(report).splitlines()
    assert lines[2].split("  ")[0] == "metric" and lines[2].endswith("  streamformer - siglip")
    assert lines[7].split() == ["task/metric3", "13.0", "18.0", "1.5", "+5.0"]
    write_report(report, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| task/metric3 | 13.0 | 18.0 | 1.5 | +5.0 |" in text
    assert "ahead of siglip**, on the same clips." in text and "\nNone.\n" in text
    with Image.open(tmp_path / "report.png") as image:
        assert image.height > 600


def test_chosen_pairs_are_compared_the_first_one_foremost():
    found = outcomes(arms=("siglip", "image", "streamformer"))
    report = build_report(
        task="x", title="x", data="x", outcomes=found, config={}, config_difference=[],
        environment={}, wall_seconds=1, details={},
        pairs=[("image", "siglip"), ("streamformer", "image")],
    )  # fmt: skip
    assert report["difference_of"] == "image - siglip"
    assert list(report["other_differences"]) == ["streamformer - image"]
    mean = {label: values["online/mAP"]["mean"] for label, values in report["metrics"].items()}
    expected = mean["image"] - mean["siglip"]
    assert report["difference"]["online/mAP"]["mean"] == pytest.approx(expected)


def test_more_tables_and_a_picture_of_ones_own(tmp_path):
    table = {"siglip": {"top1": 1.25, "top5": 2.0}, "streamformer": {"top1": 3.0}}
    report = report_of(outcomes(), tables={"Zero-shot": table})
    write_report(report, tmp_path, draw=lambda report, path: path.write_bytes(b"a picture"))
    text = (tmp_path / "report.md").read_text()
    assert "## Zero-shot\n\n|  | top1 | top5 |" in text
    assert "| streamformer | 3.0 | - |" in text
    assert (tmp_path / "report.png").read_bytes() == b"a picture"
