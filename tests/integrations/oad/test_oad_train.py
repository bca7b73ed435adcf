"""Training and evaluation by mmengine: stored numbers, resume, one test, and a quiet process."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmaction.registry import METRICS, MODELS
from mmaction.structures import ActionDataSample
from mmengine.hooks import Hook
from mmengine.logging import MessageHub, MMLogger
from mmengine.optim import OptimWrapper
from mmengine.registry import DefaultScope
from safetensors.torch import load_file

from integrations.oad import train
from integrations.oad.checkpoints import load_head, read_notes
from integrations.oad.hooks import AverageWeights, DecayMatrices, WarmupCosineLR
from integrations.oad.metrics import perframe_ap
from integrations.oad.model import MatDetector
from integrations.oad.protocols import online_scores
from integrations.oad.train import OadRunner, run_oad

CLASSES = ["Background", "Run", "Jump", "Swim", "Ambiguous"]
FACTS = {"encoder": {"kind": "toy"}, "protocol": "stream", "fps": 8.0, "dim": 6}
HEAD = {"dim": 8, "num_heads": 2, "feedforward": 12, "long_steps": 24, "long_rate": 2}
HEAD |= {"work_steps": 6, "anticipation_steps": 3, "future_tokens": 6, "groups": 3}
HEAD |= {"memory_stages": [[4, 1, True]], "work_stack": [-1, 1, True], "refinements": 1}
HEAD |= {"generator": [4, 1, True], "future_stack": [6, 1, True]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Features that give the action away: 12 short videos, one of them too short for a window."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(5, 6)).astype(np.float32)
    sets = {
        "train_session_set": [50, 44, 61, 38, 52, 47],
        "val_session_set": [40, 33],
        "test_session_set": [45, 36, 8],
        "long_session_set": [90],
    }
    (root / "data" / "target_perframe").mkdir(parents=True)
    (root / "features").mkdir()
    names = {}
    for key, lengths in sets.items():
        names[key] = [f"{key}_{i}" for i in range(len(lengths))]
        for name, length in zip(names[key], lengths, strict=True):
            label = np.repeat(rng.integers(0, 5, length), 5)[:length]
            target = np.eye(5, dtype=np.float32)[label]
            noise = 0.3 * rng.normal(size=(length, 6)).astype(np.float32)
            np.save(root / "features" / f"{name}.npy", target @ directions + noise)
            (root / "features" / f"{name}.json").write_text(json.dumps(FACTS))
            np.save(root / "data" / "target_perframe" / f"{name}.npy", target)
    (root / "features" / "features.json").write_text(json.dumps(FACTS))
    info = {"class_names": CLASSES, "num_classes": 5, "ignore_index": 4, "metrics": "AP", "fps": 8}
    (root / "data" / "data_info.json").write_text(json.dumps({"TOY": {**info, **names}}))
    return root


def make_config(**changes):
    config = {
        "data": {"dataset": "TOY", "fps": 8, "protocol": "stream", "video_fps": 8}
        | {"chunk_frames": 1, "val_sets": ["val_session_set"]}
        | {"test_sets": ["test_session_set", "long_session_set"]},
        "head": dict(HEAD),
        "train": {"epochs": 4, "batch_size": 4, "lr": 3e-3, "warmup_epochs": 1, "threads": 1}
        | {"ema_momentum": 0.1, "validate_every": 2},
        "eval": {"opening": "short", "batch_videos": 2},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


def run(world, work_dir, seed=0, **changes):
    return run_oad(
        make_config(**changes), world / "features", world / "data", work_dir, seed, "cpu"
    )


def tensors(path):
    """Everything in a checkpoint that a resumed run must share, by name."""
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["optimizer"]["state"]
    return {
        **{f"average.{k}": v for k, v in checkpoint["state_dict"].items()},
        **{f"weights.{k}": v for k, v in checkpoint["ema_state_dict"].items()},
        **{f"adam.{i}.{k}": v for i, s in state.items() for k, v in s.items()},
        "rate": torch.tensor(checkpoint["optimizer"]["param_groups"][0]["lr"]),
    }


class Stop(Exception):
    pass


class StopAfter(Hook):
    """End the process, as far as the run can tell, in the middle of an epoch."""

    priority = "HIGHEST"

    def __init__(self, epoch):
        self.epoch = epoch

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.epoch == self.epoch and batch_idx == 1:
            raise Stop


def interrupt(monkeypatch, epoch):
    """Let every runner stop in ``epoch``."""
    register = OadRunner.register_custom_hooks
    monkeypatch.setattr(
        OadRunner,
        "register_custom_hooks",
        lambda self, hooks: register(self, [*hooks, StopAfter(epoch)]),
    )


# ----- parity


@pytest.mark.golden
def test_learning_rate_equals_the_original(golden):
    facts = json.loads((golden / "oad" / "units.json").read_text())["lr"]
    per_epoch = facts["iters_per_epoch"]
    optimiser = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=facts["base_lr"])
    wrapper = OptimWrapper(optimiser)
    schedule = WarmupCosineLR(
        wrapper,
        end=facts["epochs"] * per_epoch,
        warmup=facts["warmup_epochs"] * per_epoch,
        factor=facts["warmup_factor"],
    )
    rates = []
    for _ in facts["values"]:
        rates.append(optimiser.param_groups[0]["lr"])
        wrapper.step()
        schedule.step()
    assert rates == pytest.approx(facts["values"], rel=1e-12, abs=1e-20)


def test_learning_rate_may_start_at_the_curves_beginning():
    optimiser = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    WarmupCosineLR(OptimWrapper(optimiser), end=10, warmup=5, ahead=0)
    assert optimiser.param_groups[0]["lr"] == pytest.approx(0.3)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["visual_gelu", "twostream_relu", "nogroup_cls31"])
def test_three_steps_of_model_optimiser_and_average_equal_the_original(golden_model, name):
    model = golden_model(name)
    stored, settings = model.tensors, model.info["train"]
    detector = MatDetector(model.config(long_grouping="batch"), model.ignore_index)
    detector.head.load_state_dict(model.parameters)
    optimiser = torch.optim.Adam(
        detector.parameters(),
        lr=settings["lr"],
        weight_decay=settings["weight_decay"],
        fused=True,
    )
    wrapper, hook = OptimWrapper(optimiser), AverageWeights(1 - settings["ema_decay"])
    inputs = {
        "visual": stored["in/visual"],
        "padding_mask": stored["in/memory_key_padding_mask"],
    }
    if "in/motion" in stored:
        inputs["motion"] = stored["in/motion"]
    targets = {key: stored[f"in/{key}"] for key in ("det_target", "fut_target")}

    class Runner:  # what the hook reads of a runner
        model, iter, max_iters = detector, 0, 3

    hook.before_run(Runner)
    hook.before_train(Runner)
    losses = []
    for _ in range(settings["steps"]):
        batch = {"inputs": inputs, "data_samples": targets}
        losses.append(detector.train_step(batch, wrapper)["loss"].item())
        hook.after_train_iter(Runner, 0)
    assert losses == pytest.approx(settings["losses"], abs=1e-5)
    for prefix, head in [("after3", detector.head), ("ema_after3", hook.ema_model.module.head)]:
        for key in settings["watched"]:
            wanted = stored[f"train/{prefix}/{key}"]
            torch.testing.assert_close(head.get_parameter(key).data, wanted, rtol=0, atol=1e-6)


@pytest.mark.golden
def test_both_protocols_and_their_metrics_equal_the_original(golden, golden_model):
    facts = json.loads((golden / "oad" / "online_inference.json").read_text())
    stored = load_file(golden / "oad" / "online_inference.safetensors")
    model = golden_model(facts["model"].removeprefix("mat_"))
    detector = MODELS.build(
        {
            "type": "MatDetector",
            "head": model.config().to_dict(),
            "ignore_index": model.ignore_index,
            "softmax": "released",
        }
    ).eval()
    detector.head.load_state_dict(model.parameters)
    samples, videos = [], list(facts["videos"])
    for video in videos:
        sample = ActionDataSample()
        sample.set_field(stored[f"{video}/target"].numpy(), "target")
        samples.append(sample)
    inputs = {"visual": [stored[f"{video}/features"] for video in videos]}
    predicted = detector.test_step({"inputs": inputs, "data_samples": samples})
    for video, sample in zip(videos, predicted, strict=True):
        for name, key in [("online_scores", "det_scores"), ("anticipation_scores", "ant_scores")]:
            found = torch.from_numpy(sample.get(name))
            torch.testing.assert_close(found, stored[f"{video}/{key}"], rtol=0, atol=1e-5)
    names = json.loads((golden / "oad" / "metrics.json").read_text())["thumos_map"]["class_names"]
    meta = {"classes": names, "ignore_index": model.ignore_index, "calibrated": False}
    results = {}
    for protocol in ("online", "window"):
        metric = METRICS.build({"type": "PerFrameAP", "protocol": protocol})
        metric.dataset_meta = meta
        metric.process(None, [sample.to_dict() for sample in predicted])
        results |= metric.evaluate(len(videos))
    assert results["online/mAP"] == pytest.approx(facts["detection"]["mean_AP"], abs=1e-5)
    assert results["window/mAP"] == pytest.approx(facts["window"]["mean_AP"], abs=1e-5)
    per_class = facts["detection"]["per_class_AP"]
    assert results["online/classes"] == pytest.approx(per_class, abs=1e-5)


# ----- evaluation


def test_videos_side_by_side_score_as_alone(small_config, make_head):
    detector = MatDetector(small_config, 4, opening="short", batch_windows=16).eval()
    detector.head.load_state_dict(make_head(small_config).state_dict())
    visuals = [torch.randn(length, 6) for length in (40, 3, 23)]
    samples = []
    for visual in visuals:
        sample = ActionDataSample()
        sample.set_field(np.eye(5, dtype=np.float32)[np.zeros(len(visual), int)], "target")
        samples.append(sample)
    detector({"visual": visuals}, samples, mode="predict")
    for visual, sample in zip(visuals, samples, strict=True):
        alone = online_scores(detector.head, visual, ignore_index=4, opening="short")
        for found, wanted in [
            (sample.online_scores, alone.detection),
            (sample.anticipation_scores, alone.anticipation),
        ]:
            torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-5)
    assert [len(sample.window_scores) for sample in samples] == [4 * 9, 0, 2 * 9]


# ----- runs


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """One uninterrupted run."""
    work_dir = tmp_path_factory.mktemp("run")
    return work_dir, run(world, work_dir)


def test_a_run_learns_and_reports(world, finished):
    work_dir, results = finished
    assert set(results["val"]) == {"val_session_set"}
    assert set(results["test"]) == {"test_session_set", "long_session_set"}
    scores = results["test"]["test_session_set"]
    assert set(scores["online/classes"]) == {"Run", "Jump", "Swim"}
    assert scores["online/mAP"] == pytest.approx(np.mean(list(scores["online/classes"].values())))
    assert scores["online/mAP"] > scores["online/prior"] + 0.1
    assert "window/mAP" in scores
    assert results["epochs"] == 4
    assert json.loads((work_dir / "test_results.json").read_text()) == results


def test_the_saved_head_scores_what_was_reported(world, finished):
    work_dir, results = finished
    head, notes = (
        load_head(work_dir / "head.safetensors"),
        read_notes(work_dir / "head.safetensors"),
    )
    assert notes["classes"] == CLASSES and notes["features"] == FACTS
    scores, targets = [], []
    for video in [f"test_session_set_{i}" for i in range(3)]:
        features = np.load(world / "features" / f"{video}.npy")
        online = online_scores(head, features, ignore_index=4, opening="short")
        scores.append(online.detection.numpy())
        targets.append(np.load(world / "data" / "target_perframe" / f"{video}.npy"))
    mean, _ = perframe_ap(np.concatenate(scores), np.concatenate(targets), notes["classes"], 4)
    assert results["test"]["test_session_set"]["online/mAP"] == pytest.approx(mean, abs=1e-6)


def test_same_seed_same_bits_other_seed_other_run(world, finished, tmp_path):
    work_dir, results = finished
    assert run(world, tmp_path / "again") == results
    assert run(world, tmp_path / "other", seed=1) != results
    first = tensors(work_dir / "training" / "epoch_4.pth")
    again = tensors(tmp_path / "again" / "training" / "epoch_4.pth")
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(world, tmp_path, monkeypatch, dropout):
    changes = {"head__dropout": dropout, "train__validate_every": 3}
    whole = run(world, tmp_path / "whole", **changes)
    with monkeypatch.context() as patch:
        for epoch in (1, 3):
            interrupt(patch, epoch)
            with pytest.raises(Stop):
                run(world, tmp_path / "parts", **changes)
    assert not (tmp_path / "parts" / "test_results.json").exists()
    parts = tmp_path / "moved"
    (tmp_path / "parts").rename(parts)
    assert run(world, parts, **changes) == whole
    one = tensors(tmp_path / "whole" / "training" / "epoch_4.pth")
    two = tensors(parts / "training" / "epoch_4.pth")
    assert one.keys() == two.keys()
    assert [key for key in one if not torch.equal(one[key], two[key])] == []
    assert any(key.startswith("adam") for key in one)
    assert not torch.equal(
        one["average.head.classifier.weight"], one["weights.module.head.classifier.weight"]
    )


def test_worker_processes_change_nothing(world, finished, tmp_path):
    assert run(world, tmp_path, train__num_workers=2) == finished[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_run_on_a_gpu_scores_as_on_the_cpu(world, finished, tmp_path):
    results = run_oad(make_config(), world / "features", world / "data", tmp_path, 0, "cuda")
    for name, scores in finished[1]["test"].items():
        found = results["test"][name]["online/mAP"]
        assert found == pytest.approx(scores["online/mAP"], abs=0.05)


def test_a_finished_run_is_returned_and_test_videos_are_not_read_again(world, finished):
    work_dir, results = finished
    before = {path: path.stat().st_mtime_ns for path in work_dir.rglob("*")}
    nowhere = Path("/nonexistent")
    again = run_oad(make_config(), world / "features", nowhere, work_dir, 0, "cpu")
    assert again == results
    assert {path: path.stat().st_mtime_ns for path in work_dir.rglob("*")} == before


def test_a_run_interrupted_before_its_test_only_tests(world, finished, tmp_path):
    work_dir, results = finished
    checkpoints = tmp_path / "run" / "training"
    checkpoints.mkdir(parents=True)
    (checkpoints / "epoch_4.pth").write_bytes((work_dir / "training" / "epoch_4.pth").read_bytes())
    assert run(world, tmp_path / "run") == results


def test_a_folder_of_another_run_is_refused(world, finished):
    work_dir, _ = finished
    with pytest.raises(ValueError, match=r"another run: train.epochs is 4 there and 5 now"):
        run(world, work_dir, train__epochs=5)
    with pytest.raises(ValueError, match="seed is 0 there and 7 now"):
        run(world, work_dir, seed=7)


def test_a_failed_start_leaves_no_claim(world, tmp_path):
    with pytest.raises(ValueError, match="no set 'tests'"):
        run(world, tmp_path, data__train_set="tests")
    run(world, tmp_path, train__epochs=1)


def test_nothing_is_left_behind(world, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    tables = (MMLogger, MessageHub, DefaultScope)
    before = [set(table._instance_dict) for table in tables]
    run(world, "work", train__epochs=1)
    with pytest.raises(ValueError, match="protocols"):  # fails while the runner is built
        run(world, "work/failed", eval__protocols=["windows"])
    assert [set(table._instance_dict) for table in tables] == before
    assert torch.get_num_threads() == threads
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    assert capfd.readouterr().out == ""


def test_checkpoints_hold_plain_values_and_are_few(finished):
    work_dir, _ = finished
    training = work_dir / "training"
    assert {path.name for path in training.glob("*.pth*")} == {"epoch_3.pth", "epoch_4.pth"}
    assert not list(training.glob(".*"))
    checkpoint = torch.load(training / "epoch_4.pth", weights_only=True)
    assert checkpoint["message_hub"]["runtime_info"]["epoch"] == 3


def test_a_loss_that_diverges_stops_the_run(world, tmp_path):
    with pytest.raises(FloatingPointError, match=r"loss is nan in epoch \d, iteration \d+.*lower"):
        run(world, tmp_path, train__lr=1e30)
    assert not (tmp_path / "test_results.json").exists()


def test_weight_decay_may_spare_norms_biases_and_queries(small_config):
    detector = MatDetector(small_config, 4)
    built = DecayMatrices({"optimizer": {"type": "Adam", "lr": 1e-3, "weight_decay": 0.1}})
    decayed, spared = built(detector).optimizer.param_groups
    names = {id(parameter): name for name, parameter in detector.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0
    found = {names[id(p)] for p in spared["params"]}
    assert "head.gen_query.weight" in found and "head.classifier.bias" in found
    assert "head.enc_queries.0.weight" in found and "head.dec_modules.norm.weight" in found
    found = {names[id(p)] for p in decayed["params"]}
    assert "head.classifier.weight" in found
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_without_average_the_weights_themselves_are_evaluated(world, tmp_path):
    run(world, tmp_path, train__ema_momentum=0, train__epochs=1, data__val_sets=[])
    checkpoint = torch.load(tmp_path / "training" / "epoch_1.pth", weights_only=True)
    head = load_head(tmp_path / "head.safetensors").state_dict()
    assert all(
        torch.equal(head[k.removeprefix("head.")], v) for k, v in checkpoint["state_dict"].items()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train__epoch": 3}, "train has no key 'epoch'; did you mean 'epochs'"),
        ({"head__visual_size": 6}, "head has no key 'visual_size'"),
        ({"eval__protocols": ["online", "windows"]}, r"'windows'\]: choose from online, window"),
        ({"eval__protocols": []}, "eval.protocols is empty"),
        ({"head__dim": 7}, "dim=7 is odd"),
    ],
)
def test_wrong_configs_are_refused(world, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(world, tmp_path, **change)


def test_a_missing_section_is_named(world, tmp_path):
    config = make_config()
    del config["eval"]
    with pytest.raises(ValueError, match="config lacks the section 'eval'"):
        run_oad(config, world / "features", world / "data", tmp_path)
    assert train.RESULTS == "test_results.json"
