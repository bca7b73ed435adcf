"""The command line: what can be asked, and what a slip of the pen is answered."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.run import VERBS, main

ROOT = Path(__file__).parents[2]


def script(*arguments, cwd=None):
    """Run the script as a user does, in a process of its own."""
    command = [sys.executable, str(ROOT / "experiments" / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def test_help_lists_every_verb_and_copyable_commands(capsys):
    main(["--help"])
    text = capsys.readouterr().out
    for verb, (_, summary) in VERBS.items():
        assert f"  {verb}" in text and summary in text
    assert "python experiments/run.py oad " in text
    main([])
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_explains_itself_with_examples(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"examples:\n  python experiments/run.py {verb}" in text
    assert VERBS[verb][1][1:] in " ".join(text.split())


def test_an_unknown_verb_names_the_nearest():
    with pytest.raises(SystemExit, match="no verb 'detct' .did you mean 'detect'.*verbs are oad"):
        main(["detct"])


@pytest.mark.parametrize("verb", ["oad", "pretrain", "ablation", "check-data", "align"])
def test_help_imports_no_framework(verb):
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['run.py', {verb!r}, '--help']; sys.path[0] = {str(ROOT / 'experiments')!r}\n"
        "try: runpy.run_path(sys.path[0] + '/run.py', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'mmengine', 'mmaction', 'mmcv', 'cv2', 'transformers', 'matplotlib'}\n"
        "loaded = heavy & set(sys.modules); assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_script_runs_from_anywhere_and_ends_with_2_on_a_users_slip(tmp_path):
    done = script("oad", "--set", "train.epoch=3", "--work-dir", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    assert "error: --set train.epoch=3: unknown key 'train.epoch' (did you mean" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_env_prints_markdown():
    done = script("env")
    assert done.returncode == 0
    assert done.stdout.startswith("| what | value |")
    assert f"| python | {sys.version.split()[0]} |" in done.stdout
