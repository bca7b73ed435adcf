"""What the front page promises: its commands exist and parse, its links and versions hold."""

import ast
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from experiments.run import VERBS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HEAVY = {"mmengine", "mmaction", "mmcv", "lmms_eval", "detectron2", "llava", "cv2", "decord"}


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands():
    """Every call of run.py on any page, comments removed, one pytest case each."""
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                _, found, rest = line.partition(" experiments/run.py")
                if found:
                    yield pytest.param(shlex.split(rest, comments=True), id=f"{page.stem}:{rest}")


@pytest.mark.parametrize("words", list(commands()))
def test_commands_parse(words):
    import argparse

    verb, *rest = words
    parser = argparse.ArgumentParser()
    import_module(VERBS[verb][0]).add_arguments(parser)
    parser.parse_args(rest)


def test_every_page_and_every_verb_can_be_found():
    front, *pages = PAGES
    linked = re.findall(r"\]\(([^)#]+)", front.read_text())
    assert [page.name for page in pages if f"docs/{page.name}" not in linked] == []
    shown = {param.values[0][0] for param in commands()}
    assert set(VERBS) - shown == set()


def modules():
    """Every module that a page runs by ``python -m``, with the options that stand behind it."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for module, rest in re.findall(r"python -m ([\w.]+)([^`\n]*)", text):
            yield pytest.param(module, re.findall(r"--[\w-]+", rest), id=f"{page.stem}:{module}")


@pytest.mark.parametrize(("module", "options"), list(modules()))
def test_modules_that_pages_run_know_their_options(module, options):
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
    assert "__main__" in source
    if "add_argument" in source:  # or it hands all of them on
        assert [option for option in options if f'"{option}"' not in source] == []


def test_the_two_set_up_commands_stand_as_they_are():
    text = (ROOT / "README.md").read_text()
    assert 'pip install -c constraints.txt -e ".[all]" && python experiments/run.py oad\n' in text
    assert 'pip install -c constraints.txt -e ".[all,dev]" && pytest\n' in text
    script = (ROOT / ".ci" / "run").read_text()
    assert 'pip install --quiet -c constraints.txt -e ".[all,dev]"' in script


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_compile_and_import_what_exists(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name), f"{node.module}.{name.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_conda_and_pip_agree_on_versions():
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().replace("_", "-").splitlines()
        if "==" in line
    )
    listed = re.findall(r"- ([\w-]+)==([\w.]+)", (ROOT / "environment.yml").read_text())
    assert len(listed) > 5
    for name, version in listed:
        assert pins[name] == version, name


def test_the_backbone_loads_no_framework_of_a_task():
    code = f"import sys, backbone\nfound = {HEAVY!r} & set(sys.modules)\nassert not found, found"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
