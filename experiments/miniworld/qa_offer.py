"""What this package offers to the model ``streamformer_llava`` of lmms-eval: a task and a model.

Found through the entry point group ``streamformer.videoqa`` (see
``integrations.videoqa.lmms_plugin``). After ``python experiments/run.py videoqa`` the task
``miniworld_qa`` and the model trained for it need no argument; before it, asking for them says so.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from backbone.files import read_json, write_json

VARIABLE = "STREAMFORMER_VIDEOQA"  # a folder of the job, where it is not the usual one
FOLDER = Path("work_dirs/videoqa")
RECORD = "lmms.json"
ABSENT = Path(__file__).parent / "qa_absent"
COMMAND = "python experiments/run.py videoqa"


def write_offer(folder: Path | str, questions: Path | str, pretrained: Path | str) -> None:
    """Record in a job's folder what it made: a folder of `qa.render_qa` and a trained model."""
    folder = Path(folder)
    made = {"questions": questions, "pretrained": pretrained}
    paths = {name: os.path.relpath(path, folder) for name, path in made.items()}
    write_json(folder / RECORD, paths)


def read_offer(folder: Path | str) -> dict[str, Path] | None:
    """What a job's folder records, ``questions`` and ``pretrained``; None if that is not there.

    Raises:
        ValueError: a record that is no JSON.
    """
    record = Path(folder) / RECORD
    if not record.is_file():
        return None
    made = {name: record.parent / path for name, path in read_json(record).items()}
    whole = (made["questions"] / "lmms").is_dir() and made["pretrained"].is_dir()
    return made if whole else None


def offer() -> dict[str, Any]:
    """Folders of ``tasks``, the model that is ``pretrained`` (or None), and ``advice`` without it.

    Looks where the environment variable ``STREAMFORMER_VIDEOQA`` points, else in
    ``work_dirs/videoqa`` of the working directory and of the clone.

    Raises:
        ValueError: a record that is no JSON.
    """
    for folder in _places():
        if (made := read_offer(folder)) is not None:
            return {
                "tasks": [str(made["questions"] / "lmms")],
                "pretrained": str(made["pretrained"].resolve()),
                "advice": advice(),
            }
    return {"tasks": [str(ABSENT)], "pretrained": None, "advice": advice()}


def advice() -> str:
    """What to do where nothing has been made yet."""
    looked = " or ".join(str(place) for place in _places())
    return (
        f"`{COMMAND}` renders the questions of miniworld_qa and trains a model for them; none was "
        f"found in {looked} (set {VARIABLE} to the folder of a job elsewhere)"
    )


def _places() -> list[Path]:
    if os.environ.get(VARIABLE):
        return [Path(os.environ[VARIABLE])]
    clone = Path(__file__).resolve().parents[2]
    places = [Path.cwd() / FOLDER, clone / FOLDER]
    return list(dict.fromkeys(places))
