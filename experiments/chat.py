"""Talk with a running video: frames as they come, questions at any time, answers at once.

Each frame goes through the tower once, when it comes; a question costs the language model alone
(``integrations.videoqa.session``). Memory does not grow with the video.
"""

from __future__ import annotations

import argparse
import logging
import queue
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import live
from experiments.config import UserError
from experiments.report import say

logger = logging.getLogger(__name__)

ABOUT = """\
Shows a video or a camera to a model and lets you ask. Without --ask the video runs at
its own speed: type a question at any time; after its end the talk goes on until an empty
line or Ctrl-D. With --ask the questions are put at these moments of the video, which runs
as fast as it can. The model is that of the last `run.py videoqa` unless given; it knows
miniworld's questions only, so on other videos it shows the machinery, not understanding."""
EXAMPLES = """\
  python experiments/run.py chat video.mp4
  python experiments/run.py chat video.mp4 --ask "2: What is happening now?" \\
      --ask "4.5: What happened before?"
  python experiments/run.py chat camera:0 --max-seconds 60
  python experiments/run.py chat video.mp4 --last-frames 4
  python experiments/run.py chat video.mp4 --model StreamFormer/streamformer-llava-vicuna-7b-v1.5 \\
      --tower streamformer:StreamFormer/streamformer-timesformer --window 64 --device cuda"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    live.add_arguments(parser, "videoqa")
    add = parser.add_argument
    add("--ask", action="append", default=[], metavar='"SECONDS: QUESTION"', help="repeatable")
    add("--model", metavar="FOLDER|ID", help="default: that of the job in --work-dir")
    add("--tower", metavar="KIND:SOURCE", help="default: the one that the model holds or names")
    add("--fps", type=float, help="frames read per second; default: as the model was trained with")
    add("--context-frames", type=int, metavar="N", help="most frames that the LLM sees at once")
    add("--last-frames", type=int, metavar="N", help="forget all but so many: the baseline")
    add(
        "--history",
        choices=["text", "frames", "none"],
        default="none",
        help="what later questions know of earlier ones; default: none",
    )
    add("--max-new-tokens", type=int, default=64, metavar="N", help="of an answer; default: 64")


class Planned:
    """Questions for given moments of the video."""

    def __init__(self, questions: Sequence[tuple[float, str]]) -> None:
        self.waiting = sorted(questions, key=lambda item: item[0])

    def due(self, moment: float) -> Iterator[str]:
        """Questions to be put before the frame of this moment is shown."""
        while self.waiting and self.waiting[0][0] < moment:
            yield self.waiting.pop(0)[1]

    def rest(self) -> Iterator[str]:
        """Questions for when the video has ended."""
        while self.waiting:
            yield self.waiting.pop(0)[1]


class Typed:
    """Questions from the keyboard, while the video runs at its own speed."""

    def __init__(self) -> None:
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.start: float | None = None
        self.ended = False
        threading.Thread(target=self._read, daemon=True).start()

    def due(self, moment: float) -> Iterator[str]:
        """Questions typed until the frame of this moment is due."""
        self.start = time.perf_counter() - moment if self.start is None else self.start
        while (left := self.start + moment - time.perf_counter()) > 0:
            if self.ended:
                time.sleep(left)
                return
            try:
                line = self.lines.get(timeout=left)
            except queue.Empty:
                return
            self.ended = line is None
            if line:
                yield line

    def rest(self) -> Iterator[str]:
        """Questions typed when the video has ended, up to an empty line."""
        while not self.ended and (line := self.lines.get()):
            yield line

    def _read(self) -> None:
        for line in sys.stdin:
            self.lines.put(line.strip())
        self.lines.put(None)


@dataclass
class Talk:
    """A session whose questions and answers are said aloud, with what everything took."""

    session: Any  # StreamingSession
    max_new_tokens: int
    clock: live.Stopwatch
    said: list[dict[str, Any]] = field(default_factory=list)

    def show(self, reader: Any, questions: Planned | Typed) -> None:
        """Watch frame by frame, and answer what is asked meanwhile and afterwards."""
        now = 0.0
        for frame in self.clock.frames(reader):
            for question in questions.due(frame.time):
                self.answer(question, now)
            with self.clock("encode"):
                self.session.push(frame.image)
            now = frame.time
        for question in questions.rest():
            self.answer(question, now)

    def answer(self, question: str, now: float) -> None:
        """Answer a question, word by word, as of ``now`` seconds of the video."""
        say(f"{now:9.2f} s  {question}")
        _write(" " * 13)
        pieces = []
        for piece in self.session.reply(question, max_new_tokens=self.max_new_tokens):
            pieces.append(piece)
            _write(piece)
        cost = self.session.cost
        wait = 1000 * cost.first_token_seconds
        say(
            f"   ({wait:.0f} ms to the first token; {cost.reused_tokens} of {cost.prompt_tokens} "
            "tokens of the prompt were known)"
        )
        self.said.append(
            {
                "time": now,
                "question": question,
                "answer": "".join(pieces).strip(),
                "milliseconds_to_first_token": wait,
                "prompt_tokens": cost.prompt_tokens,
                "reused_tokens": cost.reused_tokens,
                "encoded_frames": cost.encoded_frames,
            }
        )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load the model, watch, answer; returns answers, speed and memory."""
    from backbone.video import VideoError

    planned = [parse_question(text) for text in args.ask]
    folder = args.model or find_model(args.work_dir)
    session = begin(folder, args)
    clock = live.Stopwatch(["encode"], session.model.tower.encoder.device)
    talk = Talk(session, args.max_new_tokens, clock)
    try:
        return watch(args, folder, talk, Planned(planned) if planned else Typed())
    except VideoError as error:
        raise UserError(str(error)) from error


def watch(
    args: argparse.Namespace, folder: str, talk: Talk, questions: Planned | Typed
) -> dict[str, Any]:
    """Show the video to its end (or Ctrl-C, or ``--max-seconds``), and say what it took."""
    from backbone import video

    model = talk.session.model
    rate = args.fps or model.config.video_fps
    with video.open_video(args.video, rate, end=args.max_seconds, truncated="keep") as reader:
        fps = float(reader.fps)
        say(f"{reader.name}: {reader.width} x {reader.height}, read at {fps:g} fps")
        say(f"model {folder}, tower {model.tower.encoder.name}")
        try:
            talk.show(reader, questions)
        except KeyboardInterrupt:
            logger.info("interrupted")
    costs = live.speed(talk.clock.seconds)
    live.say_costs(costs, needed=fps)
    if waits := [row["milliseconds_to_first_token"] for row in talk.said]:
        say(f"to the first token: {statistics.median(waits):.0f} ms (median of {len(waits)})")
    say(f"memory of the session: {talk.session.memory_bytes / 1e6:.2f} MB")
    return {
        "video": args.video,
        "model": str(folder),
        "frames": talk.session.frames_seen,
        "answers": talk.said,
        "milliseconds_per_frame": costs,
        "memory_bytes": talk.session.memory_bytes,
    }


def parse_question(text: str) -> tuple[float, str]:
    """Moment and text of ``"SECONDS: QUESTION"``.

    Raises:
        UserError: it is none.
    """
    moment, _, question = text.partition(":")
    try:
        seconds = float(moment)
    except ValueError:
        seconds = -1.0
    if seconds < 0 or not question.strip():
        raise UserError(f'--ask {text!r}: write "SECONDS: QUESTION", such as "12.5: What moves?"')
    return seconds, question.strip()


def find_model(work_dir: Path) -> str:
    """The model that the job in ``work_dir`` trained.

    Raises:
        UserError: there is none.
    """
    from experiments.miniworld.qa_offer import COMMAND, read_offer

    made = read_offer(work_dir)
    if made is None:
        raise UserError(
            f"there is no trained model under {work_dir}; run this first:\n  {COMMAND}\nor name "
            "one with --model, or the job's folder with --work-dir"
        )
    return str(made["pretrained"])


def begin(folder: str, args: argparse.Namespace) -> Any:
    """A session with the model.

    Raises:
        UserError: a model or tower that is not there, or settings that do not go together.
    """
    from backbone import CheckpointError
    from experiments.environment import choose_device
    from experiments.preflight import encoder, weights
    from integrations.videoqa.checkpoints import load_model
    from integrations.videoqa.session import StreamingSession

    problems = weights(folder, f"--model {folder}") + (encoder(args.tower) if args.tower else [])
    if problems:
        raise UserError(problems[0])
    try:
        model, _ = load_model(
            folder, tower=args.tower, device=choose_device(args.device), window=args.window
        )
        return StreamingSession(
            model,
            context_frames=args.context_frames,
            last_frames=args.last_frames,
            history=args.history,
        )
    except (CheckpointError, ValueError) as error:
        raise UserError(str(error)) from error


def _write(text: str) -> None:
    """Part of a line, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
