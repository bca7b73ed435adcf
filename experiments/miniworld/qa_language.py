"""Questions about a short video with four answers each, balanced so that words alone tell nothing.

Two groups. *Motion* asks what only several frames tell: direction, order, first and last, now and
before. *Appearance* asks what one frame tells: colour, count, place. A question is about the
``present`` if the video's last frames hold the answer, else about the ``past``.

The answers: every question offers four, one of them right. A model that sees no video must not do
better than one in four, so in every split each answer of a kind is as often right as any other
(where they are words; orders are pairs of words), the right one stands equally often in each place,
and the wrong ones are drawn so that the text looks the same whichever of the four is right. Of two
actions in a video, both are always offered: to have seen them is not enough.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from .actions import PRETRAINING_ACTIONS, SHOWN, X, Y
from .language import PLACES, WAYS
from .scene import COLOURS, Item
from .script import Scene, Segment

MOTION, APPEARANCE = "motion", "appearance"
PRESENT, PAST = "present", "past"
KINDS = {
    "direction": MOTION,
    "order": MOTION,
    "first": MOTION,
    "last": MOTION,
    "now": MOTION,
    "before": MOTION,
    "colour": APPEARANCE,
    "count": APPEARANCE,
    "place": APPEARANCE,
}
NUMBERS = ("one", "two", "three", "four")
LETTERS = "ABCD"
FORMS = ("word", "open", "letter")
VISIBLE = 12  # pixels of a shape in the last frame, for it to count as seen there
CLEAR = 0.1  # of the frame's side: how far from the middle lines a place is clear


@dataclass(frozen=True)
class Question:
    """A question before its answers are put in order; ``wrong`` has three answers."""

    video: str
    kind: str
    when: str
    question: str
    answer: str
    wrong: tuple[str, str, str]


def write_questions(
    rng: Random, video: str, scene: Scene, seen: Sequence[int], size: int
) -> list[Question]:
    """All questions that a video of one scene answers.

    Args:
        rng: draws the wrong answers.
        video: its name.
        scene: two actions at most; the last one may still go on when the video ends.
        seen: visible pixels of each shape in the last frame.
        size: of the frame, pixels.
    """
    ask = _Asker(rng, video)
    segments = sorted(scene.segments, key=lambda segment: segment.end)
    running = segments[-1].end >= scene.end
    _about_actions(ask, segments, running)
    for segment in segments:
        _about_direction(ask, scene, segment, segment.end >= scene.end)
    _about_looks(ask, scene, seen)
    _about_places(ask, scene, seen, size)
    return ask.asked


class _Asker:
    """Collects questions about one video."""

    def __init__(self, rng: Random, video: str) -> None:
        self.rng, self.video = rng, video
        self.asked: list[Question] = []

    def add(self, kind: str, when: str, text: str, answer: str, wrong: Iterable[str]) -> None:
        self.asked.append(Question(self.video, kind, when, text, answer, tuple(wrong)))

    def others(self, words: Iterable[str], known: Iterable[str], count: int) -> list[str]:
        """So many of the words, none of the known ones."""
        known = set(known)
        return self.rng.sample([word for word in words if word not in known], count)


def _about_actions(ask: _Asker, segments: Sequence[Segment], running: bool) -> None:
    """What happens when; nothing where one action happens twice."""
    if len(segments) != 2 or segments[0].action == segments[1].action:
        return
    first, last = (segment.action for segment in segments)
    if running:
        asked = (("now", PRESENT, "What is happening now?", last, first),
                 ("before", PAST, "What happened before?", first, last))  # fmt: skip
    else:
        asked = (("first", PAST, "What happened first?", first, last),
                 ("last", PAST, "What happened last?", last, first))  # fmt: skip
    for kind, when, text, answer, other in asked:
        strangers = ask.others(PRETRAINING_ACTIONS, (first, last), 2)
        ask.add(kind, when, text, answer, (other, *strangers))
    if not running:
        # Two pairs that share one action, each in both orders: every one may be the right one.
        shared = ask.rng.choice((first, last))
        (stranger,) = ask.others(PRETRAINING_ACTIONS, (first, last), 1)
        wrong = _order(last, first), _order(shared, stranger), _order(stranger, shared)
        ask.add("order", PAST, "What happened in which order?", _order(first, last), wrong)


def _order(first: str, second: str) -> str:
    return f"{first} then {second}"


def _about_direction(ask: _Asker, scene: Scene, segment: Segment, running: bool) -> None:
    (actor, *_), moves = segment.actors, segment.action.startswith("move ")
    name = _name(scene, actor)
    others = [s for s in scene.segments if s is not segment and s.action.startswith("move ")]
    if not moves or name is None or any(actor in other.actors for other in others):
        return
    way = segment.action.removeprefix("move ")
    text = f"Which way is {name} moving?" if running else f"Which way did {name} move?"
    wrong = ask.others(WAYS, (way,), 3)
    ask.add("direction", PRESENT if running else PAST, text, way, wrong)


def _about_looks(ask: _Asker, scene: Scene, seen: Sequence[int]) -> None:
    """Which colour is there, and how many shapes; only of videos that end with all in sight."""
    if min(seen) < VISIBLE or not (scene.tracks[:, -1, SHOWN] == 1).all():
        return
    colours = {item.colour for item in scene.items}
    if len(COLOURS) - len(colours) >= 3:
        wrong = ask.others(COLOURS, colours, 3)
        colour = ask.rng.choice(sorted(colours))
        ask.add("colour", PRESENT, "Which colour can be seen?", colour, wrong)
    if len(scene.items) <= len(NUMBERS):
        number = NUMBERS[len(scene.items) - 1]
        wrong = ask.others(NUMBERS, (number,), 3)
        ask.add("count", PRESENT, "How many shapes are there?", number, wrong)


def _about_places(ask: _Asker, scene: Scene, seen: Sequence[int], size: int) -> None:
    """Where one shape is, and where one was that is elsewhere now."""
    order = ask.rng.sample(range(len(scene.items)), len(scene.items))
    ends = {k: _place(scene.tracks[k, -1], size) for k in order}
    starts = {k: _place(scene.tracks[k, 0], size) for k in order}
    named = [(k, name) for k in order if (name := _name(scene, k)) is not None]
    for k, name in named:
        if ends[k] and seen[k] >= VISIBLE:
            wrong = ask.others(PLACES, (ends[k],), 3)
            ask.add("place", PRESENT, f"Where is {name} now?", ends[k], wrong)
            break
    for k, name in named:
        if starts[k] and ends[k] and starts[k] != ends[k]:
            wrong = ask.others(PLACES, (starts[k],), 3)
            ask.add("place", PAST, f"Where was {name} at the start?", starts[k], wrong)
            break


def _name(scene: Scene, index: int) -> str | None:
    """What to call a shape, "the red shape"; None if it is not the only red one."""
    colours = [item.colour for item in scene.items]
    item: Item = scene.items[index]
    unique = not item.camouflaged and colours.count(item.colour) == 1
    return f"the {item.colour} shape" if unique else None


def _place(pose: np.ndarray, size: int) -> str | None:
    """The quarter of the frame, where it is clear."""
    right, down = (pose[[X, Y]] - size / 2) / size
    if min(abs(right), abs(down)) < CLEAR:
        return None
    return f"{'top' if down < 0 else 'bottom'} {'left' if right < 0 else 'right'}"


def balance(rng: Random, questions: Sequence[Question], fps: int, frames: int) -> list[dict]:
    """As many questions of each answer within a kind and time; four answers in order, each.

    Questions that are too many of their answer are left out, drawn by ``rng``. Returns one record
    per question, by video, as they are written to disk.
    """
    groups: dict[tuple[str, str], dict[str, list[Question]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for question in questions:
        # Orders are pairs: too many to be equally frequent, and alike by how they are made.
        key = "" if question.kind == "order" else question.answer
        groups[question.kind, question.when][key].append(question)
    records = []
    for (kind, when), answers in sorted(groups.items()):
        fewest = min(map(len, answers.values()))
        kept = [q for _, asked in sorted(answers.items()) for q in rng.sample(asked, fewest)]
        for number, question in enumerate(rng.sample(kept, len(kept))):
            options = rng.sample(question.wrong, 3)
            options.insert(number % 4, question.answer)
            records.append(
                {
                    "video": question.video,
                    "kind": kind,
                    "group": KINDS[kind],
                    "when": when,
                    "time": frames / fps,  # asked when the video ends
                    "question": question.question,
                    "options": options,
                    "answer": question.answer,
                    "letter": LETTERS[number % 4],
                }
            )
    records.sort(key=lambda record: (record["video"], record["kind"], record["question"]))
    return [{"id": str(number), **record} for number, record in enumerate(records)]


def prompt(record: dict, form: str = "word") -> str:
    """The text that a model is asked.

    ``word`` lists the answers, of which one is to be repeated; ``open`` lists none; ``letter``
    lists them by letter, as public benchmarks do.

    Raises:
        ValueError: another form.
    """
    question, options = record["question"], record["options"]
    if form == "open":
        return question
    if form == "word":
        return f"{question} Choose: {'; '.join(options)}."
    if form == "letter":
        listed = "\n".join(
            f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)
        )
        return f"{question}\n{listed}\nAnswer with the letter."
    raise ValueError(f"form={form!r} of a question is unknown; choose one of {', '.join(FORMS)}")


def right_answer(record: dict, form: str = "word") -> str:
    """What the model should say."""
    return record["letter"] if form == "letter" else record["answer"]


def is_right(record: dict, said: str, form: str = "word") -> bool:
    """Whether it said that: the very words, but for case, spaces and a full stop at the end.

    Letters are found in the answer as lmms-eval finds them.
    """
    if form == "letter":
        from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer

        return extract_mcq_answer(said, choices=list(LETTERS)) == record["letter"]
    words = " ".join(said.casefold().split())
    return words.removesuffix(".").strip() == record["answer"].casefold()
