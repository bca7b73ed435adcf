"""Pretraining configs: what resolves, what is refused, and what becomes of it."""

from pathlib import Path

import pytest

from experiments import pretrain, recipe
from experiments.config import CONFIGS, UserError, packaged_configs
from experiments.miniworld.instances import InstanceParams
from pretrain.build import build_dataset
from pretrain.datasets.base import Draw
from pretrain.objectives import OBJECTIVES

HERE = recipe.Source("here", Path("/data"), "/siglip")


OF_ONE_TASK = {"miniworld_instances": {"instance_segmentation"}}


@pytest.mark.parametrize("name", packaged_configs("pretrain"))
def test_packaged_configs_resolve_to_runs_over_all_six_objectives(name):
    settings = recipe.training(recipe.resolve(name), HERE, Path("/out"))
    wanted = OF_ONE_TASK.get(name, set(OBJECTIVES))
    assert {task.objective for task in settings.tasks.values()} == wanted
    assert all(task.val is not None for task in settings.tasks.values())
    assert settings.output == "/out"


def test_videos_of_instances_take_the_place_of_clips(tmp_path):
    changes = [f"instances.{split}=1" for split in ("train", "val")]
    config = recipe.resolve("miniworld_instances", changes)
    world = tmp_path / "world"
    root = recipe.videos(config, tmp_path, world)
    task = recipe.training(config, recipe.Source("here", root, "/siglip"), tmp_path).tasks
    dataset = build_dataset(
        task["instances"], task["instances"].train, name="instances", image_size=64
    )
    sample = dataset[Draw(0, 8, seed=0)]
    assert sample.frames.shape == (8, 3, 64, 64) and sample.masks.shape == (8, 64, 64)
    assert dataset.label_sets["MINIWORLD"][-1] == "hidden"
    assert recipe.videos(recipe.resolve("miniworld"), tmp_path, world) == world / "clips"


def test_a_downstream_config_names_the_recipe_of_its_mini_encoders():
    world = recipe.resolve("miniworld")["world"]
    common = recipe.mini({}, world)
    assert common["model"]["num_frames"] == 16 and "instances" not in common
    own = recipe.mini({"config": "miniworld_instances", "optim": {"updates": 77}}, world)
    assert (own["model"]["num_frames"], own["optim"]["updates"]) == (8, 77)
    assert own["instances"]["camouflaged"] == 0.8 and "world" not in own
    patches = [mini["mini_siglip"]["patch_size"] for mini in (common, own)]
    assert patches == [8, 4], "masks of what is hidden end where tokens do"
    assert own["instances"]["seed"] != InstanceParams().seed, "nothing of ovis is trained on"
    with pytest.raises(UserError, match="no config 'miniwrld' for pretrain"):
        recipe.mini({"config": "miniwrld"}, world)


def test_the_papers_recipe_says_what_the_paper_says():
    from pretrain.optim import learning_rate

    settings = recipe.training(recipe.resolve("multitask_1m"), HERE, Path("/out"))
    clips = 8 * settings.batch_size * len(settings.tasks)
    assert clips == 896
    assert learning_rate(settings.optim, 0, clips) == pytest.approx(7e-5)
    assert (settings.optim.weight_decay, settings.optim.betas) == (0.05, (0.9, 0.999))
    assert (settings.model.num_frames, settings.model.lora_rank) == (16, 32)
    assert settings.model.siglip == "google/siglip-base-patch16-224"
    rules = {name: task.sampling for name, task in settings.tasks.items()}
    assert rules["kinetics"] == "segments" and rules["ssv2"] == "blocks"
    assert (rules["retrieval"], rules["grounding"]) == ("intervals", "fixfps")
    mirrored = {name for name, task in settings.tasks.items() if task.flip}
    assert mirrored == {"kinetics", "instances"}  # all others may tell left from right


def test_the_root_is_put_into_every_argument_however_deep():
    config = recipe.resolve("multitask_1m")
    tasks = recipe.training(config, HERE, Path("/out")).tasks
    assert tasks["retrieval"].train["root"]["LSMDC"] == "/data/videos/LSMDC"
    parts = tasks["instances"].train["parts"]
    assert [part["root"].startswith("/data/videos/") for part in parts] == [True] * 3
    assert "{root}" not in str(recipe.training(config, HERE, Path("/out")).to_dict())
    assert "{root}" in str(config["tasks"]), "the config itself stays as it was"


def test_tasks_are_left_out_and_changed_by_overrides():
    config = recipe.resolve("miniworld", ["tasks.retrieval=None", "tasks.grounding.weight=3"])
    settings = recipe.training(config, HERE, Path("/out"), device="cpu", data_share=0.5)
    assert "retrieval" not in settings.tasks and settings.tasks["grounding"].weight == 3
    assert (settings.device, settings.data_share) == ("cpu", 0.5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks.grounding.wight=3", "unknown key 'tasks.grounding.wight'; did you mean 'weight'"),
        ("tasks.grounding.sampling='fixfp'", "sampling='fixfp' is unknown"),
        ("tasks.new.weight=3", "missing key 'tasks.new.objective'"),
        ("run.log_evry=3", r"unknown key 'run.log_evry' \(did you mean 'run.log_every'"),
        ("optim.updates=3", "warmup_updates=40 must lie in 0 to updates=3"),
        ("instances.train=3", "this config has no section 'instances'"),
        ("world.frame_size=33", "config miniworld: .*frame_size=33"),
        ("launch.processes=two", "'two' is of type str, but this key holds int"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_read(override, message):
    with pytest.raises(UserError, match=message):
        recipe.resolve("miniworld", [override])


def test_a_file_of_ones_own_replaces_the_tasks(tmp_path):
    file = tmp_path / "mine.py"
    base = str(CONFIGS / "pretrain" / "multitask_1m.py")
    file.write_text(
        f"_base_ = [{base!r}]\n"
        "_videos = '{root}/videos'\n"
        "tasks = dict(_delete_=True, mine=dict(objective='retrieval', reader='msvd', "
        "train=dict(annotations='{root}/captions.txt', root=_videos)))\n"
    )
    config = recipe.resolve(str(file))
    assert list(config["tasks"]) == ["mine"] and "_videos" not in config
    assert recipe.training(config, HERE, Path("o")).tasks["mine"].train["root"] == "/data/videos"


def test_files_that_are_not_there_are_named_by_their_key(tmp_path):
    config = recipe.resolve("multitask_1m", [f"data.root={tmp_path}"])
    (tmp_path / "videos" / "MSVD").mkdir(parents=True)
    found = recipe.problems(config)
    labels = tmp_path / "annotations" / "Kinetics" / "label2id.json"
    assert f"tasks.kinetics.train.labels: there is no {labels}" in found
    assert any(text.startswith("tasks.referring.train.parts.masks: there is no") for text in found)
    assert not any("videos/MSVD" in text for text in found)
    with pytest.raises(UserError, match="cannot start:\n  - tasks.kinetics.train.annotations: the"):
        pretrain.preflight_run(config, tmp_path / "work")


def test_real_data_need_a_root_and_a_siglip(tmp_path):
    config = recipe.resolve("multitask_1m")
    assert "data.root is None, and the data of this config are not rendered" in (
        recipe.problems(config)[0]
    )
    config["data"]["root"], config["model"]["siglip"] = str(tmp_path), None
    assert any(text.startswith("model.siglip is None: name") for text in recipe.problems(config))
    config["model"]["siglip"] = "/no/such/model"
    with pytest.raises(UserError, match="model.siglip /no/such/model: there is no folder /no/su"):
        pretrain.preflight_run(config, tmp_path)


def test_processes_of_our_own_run_on_the_cpu(monkeypatch):
    two, one = {"launch": {"processes": 2}}, {"launch": {"processes": 1}}
    monkeypatch.delenv("RANK", raising=False)
    assert pretrain.training_device("auto", two) == "cpu"
    assert pretrain.training_device("auto", one) == "auto"
    assert pretrain.training_device("cpu", one) == "cpu"
    with pytest.raises(UserError, match="--device cuda:1: training takes auto, cpu or cuda"):
        pretrain.training_device("cuda:1", one)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: torch sees no GPU here"):
        pretrain.training_device("cuda", one)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert pretrain.training_device("cuda", one) == "auto"
    with pytest.raises(UserError, match="launch.processes=2 on the CPU; set launch.processes=1"):
        pretrain.training_device("cuda", two)
    monkeypatch.setenv("RANK", "0")  # started by torchrun, which counts the processes itself
    assert pretrain.training_device("cuda", two) == "auto"
