"""Every extra brings what the code imports that it is for, wherever in a file the import stands."""

import ast
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as plain_name

tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")

ROOT = Path(__file__).parents[2]
OWN = ("backbone", "pretrain", "integrations", "experiments")
READS = {  # extra (None: no extra at all) -> files that work with it
    None: ("backbone/*.py", "pretrain/**/*.py"),
    "jobs": ("experiments/**/*.py",),
    "export": ("backbone/export.py", "experiments/export.py"),
    "oad": ("integrations/*.py", "integrations/oad/*.py"),
    "ovis": ("integrations/*.py", "integrations/ovis/*.py"),
    "videoqa": (
        "integrations/videoqa/*.py",
        "experiments/miniworld/qa*.py",
        "experiments/videoqa.py",
        "experiments/chat.py",
    ),
}
SPECIAL = ("export", "videoqa")  # what others match of their files is theirs alone
ELSEWHERE = {  # files for frameworks that no extra installs -> these
    "integrations/ovis/detectron2_backbone.py": {"detectron2"},
    "integrations/videoqa/llava_tower.py": {"llava"},
}


def declared(extra):
    """Names of the distributions that ``pip install streamformer[extra]`` brings."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    wanted += project["optional-dependencies"][extra] if extra else []
    found = set()
    while wanted:
        one = Requirement(wanted.pop())
        name = plain_name(one.name)
        if name == "streamformer":
            wanted += [text for own in one.extras for text in project["optional-dependencies"][own]]
        elif name not in found and (one.marker is None or one.marker.evaluate({"extra": ""})):
            found.add(name)
            wanted += metadata.requires(name) or []
    return found


def imported(path):
    """Top-level modules that a file imports, at its head or anywhere else."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def files_of(extra):
    matching = {name: {p for glob in READS[name] for p in ROOT.glob(glob)} for name in READS}
    return matching[extra].difference(*(matching[name] for name in SPECIAL if name != extra))


@pytest.mark.parametrize("extra", READS, ids=str)
def test_an_extra_brings_what_its_files_import(extra):
    brought = declared(extra)
    of_module = metadata.packages_distributions()
    for path in sorted(files_of(extra)):
        known = {*sys.stdlib_module_names, *OWN, *ELSEWHERE.get(str(path.relative_to(ROOT)), ())}
        for module in set(imported(path)) - known:
            sources = {plain_name(name) for name in of_module.get(module, ())}
            assert sources & brought, f"{path.name} imports {module}, which {extra} does not bring"


def test_every_file_is_looked_at():
    looked_at = {path for extra in READS for path in files_of(extra)}
    there = {path for room in OWN for path in (ROOT / room).rglob("*.py")}
    assert looked_at == there
