"""Configs: names and paths, overrides, and refusals that name the mend."""

import json
from dataclasses import dataclass, field

import pytest

from experiments import config as module
from experiments.config import UserError, digest, field_defaults, flatten, load_config

MINIWORLD = """
data = dict(name="MINIWORLD", root=None, world=dict())
train = dict(epochs=6, lr=2e-3, amsgrad=False, betas=(0.9, 0.99))
"""
THUMOS = """
_base_ = ["miniworld.py"]
data = dict(name="THUMOS", root="data/thumos", flow="flow_kinetics_bninception")
train = dict(epochs=25)
"""


@pytest.fixture(autouse=True)
def configs(tmp_path, monkeypatch):
    folder = tmp_path / "configs" / "oad"
    folder.mkdir(parents=True)
    (folder / "miniworld.py").write_text(MINIWORLD)
    (folder / "thumos.py").write_text(THUMOS)
    monkeypatch.setattr(module, "CONFIGS", tmp_path / "configs")
    return folder


def test_a_name_a_path_and_a_base():
    by_name = load_config("oad", "thumos")
    by_path = load_config("oad", str(module.CONFIGS / "oad" / "thumos.py"))
    assert by_name == by_path
    assert by_name["train"] == {"epochs": 25, "lr": 2e-3, "amsgrad": False, "betas": [0.9, 0.99]}
    assert by_name["data"]["root"] == "data/thumos"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.epochs=3", "train.epochs", 3),
        ("train.lr=1", "train.lr", 1),
        ("train.lr=5e-4", "train.lr", 5e-4),
        ("train.amsgrad=True", "train.amsgrad", True),
        ("train.betas=(0.8, 0.9)", "train.betas", [0.8, 0.9]),
        ("data.root=/some/where=odd", "data.root", "/some/where=odd"),
        ("data.root='quoted'", "data.root", "quoted"),
        ("data.root=None", "data.root", None),
        ("data.world.streams_train=4", "data.world.streams_train", 4),
        ("data.flow=other", "data.flow", "other"),  # known from the other packaged config
    ],
)
def test_overrides_are_python_literals(override, key, value):
    assert flatten(load_config("oad", "miniworld", [override]))[key] == value


def test_the_last_override_wins_and_the_file_stays_as_it_is(configs):
    before = (configs / "miniworld.py").read_text()
    assert load_config("oad", "miniworld", ["train.lr=1", "train.lr=2"])["train"]["lr"] == 2
    assert (configs / "miniworld.py").read_text() == before
    assert load_config("oad", "miniworld")["train"]["lr"] == 2e-3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", r"unknown key 'train.epoch' \(did you mean 'train.epochs'\?\)"),
        ("lr=3", r"unknown key 'lr' \(did you mean 'train.lr'\?\)"),
        ("train=3", "unknown key 'train'"),
        ("train={'lr': 1, 'epocs': 2}", r"unknown key 'train.epocs' \(did you mean 'train.epochs'"),
        ("train.lr.low=3", "unknown key 'train.lr.low'"),
        ("train.epochs", "expected key=value, such as --set train.epochs=3"),
        ("=3", "expected key=value"),
        ("train.amsgrad=true", "'true' is of type str, but this key holds bool values such as Fal"),
        ("train.epochs=2.5", "2.5 is of type float, but this key holds int values such as 6"),
        ("train.epochs=True", "True is of type bool, but this key holds int"),
        ("data.root=3", "3 is of type int, but this key holds str values such as 'data/thumos'"),
    ],
)
def test_overrides_that_cannot_be_meant_are_refused(override, message):
    with pytest.raises(UserError, match=message):
        load_config("oad", "miniworld", [override])


def test_an_unknown_name_lists_the_known_ones():
    message = r"no config 'minworld' for oad \(did you mean 'miniworld'\?\): known names are mini"
    with pytest.raises(UserError, match=message):
        load_config("oad", "minworld")


def test_a_file_with_unknown_or_missing_keys_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("data = dict(name='MINE', root='x', world=dict())\ntrain = dict(lr=1, decay=2)")
    with pytest.raises(UserError, match=r"mine.py: unknown key 'train.decay'"):
        load_config("oad", str(path))
    path.write_text("data = dict(name='MINE', root='x', world=dict())\ntrain = dict(lr=1)")
    with pytest.raises(UserError, match="no value for train.amsgrad, train.betas, train.epochs"):
        load_config("oad", str(path))
    base = module.CONFIGS / "oad" / "miniworld.py"  # the way out that the message advises
    path.write_text(f"_base_ = [{str(base)!r}]\ntrain = dict(lr=1)")
    assert load_config("oad", str(path))["train"]["lr"] == 1


def test_values_that_are_not_plain_are_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINIWORLD + "train['lr'] = float('nan')")
    with pytest.raises(UserError, match=r"mine.py: .*a config holds numbers, texts, lists"):
        load_config("oad", str(path))


def test_digest_depends_on_values_and_not_on_order():
    a, b = {"x": 1, "y": {"z": [1, 2]}}, {"y": {"z": (1, 2)}, "x": 1}
    assert digest(a) == digest(b) == digest(json.loads(json.dumps(a)))
    assert digest(a) != digest({**a, "x": 2})


def test_defaults_fill_the_sections_that_a_config_has_and_are_known():
    @dataclass
    class Train:
        lr: float = 1.0
        warmup: float = 10.0
        stages: tuple[float, ...] | None = None
        names: list = field(default_factory=lambda: ["a"])
        needed: int = field(kw_only=True)

    defaults = {"train": field_defaults(Train, leave_out=["names"]), "world": {"seed": 0}}
    assert defaults["train"] == {"lr": 1.0, "warmup": 10.0, "stages": None}
    config = load_config("oad", "miniworld", ["train.stages=(1, 2)"], defaults)
    assert config["train"]["lr"] == 2e-3 and config["train"]["warmup"] == 10.0
    assert config["train"]["stages"] == [1, 2]
    assert "world" not in config
    with pytest.raises(UserError, match="no section 'world'; it has 'data', 'train'"):
        load_config("oad", "miniworld", ["world.seed=1"], defaults)
    with pytest.raises(UserError, match=r"'train.warm' \(did you mean 'train.warmup'"):
        load_config("oad", "miniworld", ["train.warm=1"], defaults)


def test_names_of_a_free_section_are_the_configs_own(configs, tmp_path):
    free = ("train",)
    found = load_config("oad", "miniworld", ["train.anything=3"], free=free)
    assert found["train"]["anything"] == 3
    path = tmp_path / "mine.py"
    path.write_text("_own = 5\ndata = dict(name='MINE', root='x', world=dict())\n"
                    "train = dict(whatever=dict(size=_own))")  # fmt: skip
    found = load_config("oad", str(path), ["train.whatever.size=6"], free=free)
    assert found["train"] == {"whatever": {"size": 6}} and "_own" not in found
    with pytest.raises(UserError, match="unknown key 'data.nme'"):
        load_config("oad", str(path), ["data.nme=3"], free=free)
