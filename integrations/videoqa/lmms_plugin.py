"""Entry point of lmms-eval: registers the model ``streamformer_llava`` and offers its tasks.

lmms-eval calls :func:`manifests` while it is being imported, so nothing heavy is imported here, and
nothing is raised: a plug-in that fails would take others with it.

Models have an entry point, tasks have none: lmms-eval finds them in its own folder and in
``--include_path`` only. So that ``--tasks mlvu`` works from the bare command, the folders offered
here are added where lmms-eval 0.7 lists its tasks, for every model of that environment; a task of
lmms-eval or of ``--include_path`` keeps its name. In another version nothing is touched, and
``--include_path`` (or ``python -m integrations.videoqa.evaluate``, which adds it) is the way.

Other packages offer more by an entry point of the group ``streamformer.videoqa``: a function
without arguments that returns ``{"tasks": [folders], "pretrained": folder or None, "advice": what
to do where there is none}``.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Mapping
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MODEL = "streamformer_llava"
TASKS = Path(__file__).parent / "tasks"
OFFERS = "streamformer.videoqa"
KNOWN = "0.7."  # versions of lmms-eval whose task index is known
MARK = "_offers_streamformer_tasks"


def manifests() -> Any:
    """The model's manifest; offers the tasks on the way."""
    from lmms_eval.models.registry_v2 import ModelManifest

    offer_tasks()
    module = "integrations.videoqa.lmms"
    return ModelManifest(
        MODEL,
        simple_class_path=f"{module}.StreamformerLlava",
        chat_class_path=f"{module}.StreamformerLlavaChat",
    )


def task_folders() -> list[str]:
    """Folders to search for tasks: this package's, and those that others offer."""
    return [str(TASKS), *(folder for offer in offers() for folder in offer["tasks"])]


def offers() -> list[Mapping[str, Any]]:
    """What other packages offer; one that fails is left out with a warning."""
    found = []
    for point in entry_points(group=OFFERS):
        try:
            found.append(point.load()())
        except Exception as error:  # of any kind: it is another package's, and must not stop ours
            logger.warning("nothing is offered by %s: %s", point.value, error)
    return found


def offer_tasks() -> bool:
    """Add the folders to lmms-eval's index of tasks; whether that was possible."""
    found = version("lmms_eval")
    try:
        from lmms_eval.tasks import TaskManager

        index = TaskManager.initialize_tasks
        known = list(inspect.signature(index).parameters) == [
            "self", "include_path", "include_defaults",
        ]  # fmt: skip
    except (ImportError, AttributeError):
        known = False
    if not known or not found.startswith(KNOWN):
        logger.warning(
            "lmms-eval %s lists its tasks otherwise than %sx; add --include_path %s for the tasks "
            "mlvu, videomme_best_answer and others",
            found, KNOWN, TASKS,
        )  # fmt: skip
        return False
    if not getattr(index, MARK, False):
        TaskManager.initialize_tasks = _with_offers(index)
    return True


def _with_offers(index: Any) -> Any:
    """``TaskManager.initialize_tasks`` that searches the offered folders last."""

    @functools.wraps(index)
    def initialize_tasks(
        self: Any, include_path: str | list[str] | None = None, include_defaults: bool = True
    ) -> dict[str, Any]:
        paths = [include_path] if isinstance(include_path, str) else list(include_path or ())
        if include_defaults:
            paths += [folder for folder in task_folders() if folder not in paths]
        return index(self, paths or None, include_defaults)

    setattr(initialize_tasks, MARK, True)
    return initialize_tasks
