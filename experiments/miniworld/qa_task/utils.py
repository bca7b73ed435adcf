"""Functions of the tasks ``miniworld_qa*``; they lie beside the data that they read."""

from collections.abc import Sequence
from pathlib import Path

from experiments.miniworld.qa_language import is_right, prompt

ROOT = Path(__file__).resolve().parents[1]


def doc_to_visual(doc: dict) -> list[str]:
    """The video's path."""
    return [str(ROOT / doc["video"])]


def doc_to_text(doc: dict, lmms_eval_specific_kwargs: dict) -> str:
    """The question, in the task's form."""
    return prompt(doc, lmms_eval_specific_kwargs["form"])


def score_word(doc: dict, results: Sequence[str]) -> dict[str, float]:
    """1 or 0 for every metric that the question belongs to; the answer's own words count."""
    return _score(doc, is_right(doc, results[0]))


def score_letter(doc: dict, results: Sequence[str]) -> dict[str, float]:
    """As `score_word`, for answers by letter."""
    return _score(doc, is_right(doc, results[0], "letter"))


def _score(doc: dict, right: bool) -> dict[str, float]:
    groups = doc["group"], doc["when"], f"{doc['group']}_{doc['when']}", doc["kind"]
    return {name: float(right) for name in ("accuracy", *groups)}


def percent(values: Sequence[float]) -> float:
    """Percent correct."""
    return 100 * sum(values) / len(values)
