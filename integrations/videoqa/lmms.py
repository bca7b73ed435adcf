"""The model ``streamformer_llava`` of lmms-eval 0.7, as a simple and as a chat model.

Both turn a request into the same thing, an :class:`Ask` (a conversation and what it is about), and
answer it in the same way: every video of a call is decoded and encoded once, the next ones are
decoded while the model answers, and questions with equal generation settings share batches. Answers
come back in the order of the requests.

A video that is missing or cannot be read ends the evaluation with an error that names it. It is
never answered for. Missing files are looked for before the first question is answered.

Where a task's generation settings name a field of its documents as ``guided_choice``, the answer is
one of the texts that this field lists: the one that the model holds for the likeliest.

Arguments (``--model_args a=1,b=x``) are those of :class:`StreamformerLlava`; an unknown one is
refused. Everything that changes an answer is an argument, so ``--use_cache`` keeps runs apart.
"""

from __future__ import annotations

import inspect
import itertools
import json
import logging
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from backbone.names import hint
from backbone.video import VideoError, prefetched
from integrations.videoqa import prompts
from integrations.videoqa.checkpoints import load_model
from integrations.videoqa.configuration import tower_preset
from integrations.videoqa.data import with_times
from integrations.videoqa.frames import Sampling, VideoClip, read_video
from integrations.videoqa.lmms_plugin import offers
from integrations.videoqa.modeling import IMAGE_SUFFIXES, IMAGE_TOKEN
from integrations.videoqa.watching import Watcher

logger = logging.getLogger(__name__)

STREAM_TASKS = "ovo_"  # tasks of which the name begins so are watched as streams, by default
SAMPLING_ONLY = ("temperature", "top_p", "top_k", "min_p", "typical_p")  # of generation settings
CHOICES = "guided_choice"  # generation setting: the field of a document that lists what may be said
MOST_TOKENS = 128  # of an answer, where the task does not say
PORTION = 64  # requests whose images are held at once
SHOWN = 5  # missing files that an error lists


@dataclass(frozen=True)
class Ask:
    """A request in the model's own terms.

    Attributes:
        turns: texts of user and assistant in turns, ending with the user; placeholders where the
            visuals stand, or none.
        visuals: clips, images, or paths of images, in the order of the placeholders.
        settings: of generation.
        task: whose question it is.
        where: task and document, for messages.
        choices: what may be answered; () for anything.
    """

    turns: tuple[str, ...]
    visuals: tuple[VideoClip | Image.Image | str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    task: str = ""
    where: str = ""
    choices: tuple[str, ...] = ()

    @property
    def key(self) -> Hashable:
        """What tells its visuals from those of other requests."""
        return tuple(_key(item) for item in self.visuals)


@dataclass
class _Seen:
    """Visuals of one or several requests: tokens ``(n, H)`` of each, and the frames' times."""

    tokens: list[Tensor]
    times: str | None


class StreamformerLlava(lmms):
    """A ``StreamformerLlavaForConditionalGeneration`` as lmms-eval's simple model.

    Args:
        pretrained: checkpoint, folder or hub id; the default is the model of the last
            ``python experiments/run.py videoqa``.
        device: default: the first GPU if there is one, else the CPU.
        batch_size: questions answered together.
        max_batch_size: of automatic batch sizes, which this model has not.
        dtype: ``float32``, ``bfloat16`` or ``float16``; default: the checkpoint's.
        tower: other encoder than the checkpoint's, ``kind:<folder or hub id>``.
        tower_features: which of its tokens are used, ``last``, ``penultimate`` or ``released``.
        window: frames that a frame may see, in clips as in streams; default: the checkpoint's.
        max_frames_num: frames of a video, at most.
        video_fps: frames sampled per second, where they are fewer.
        force_sample: always ``max_frames_num`` frames, spread over the video.
        time_instruction: whether a sentence tells when the frames were taken.
        template: of prompts.
        stream: watch videos frame by frame and answer from the stream: ``auto`` for the tasks of
            OVO-Bench, ``always`` or ``never``.
        stream_fps: frames per second that a stream shows.
        last_frames: let the model see only so many frames at the end of what was sampled or
            watched: the baseline of every claim about memory; 0 for all.
        blind: zero all visual tokens: what words alone tell.
        decode_ahead: videos decoded while others are answered.

    Raises:
        ValueError: a checkpoint that is not there, or a value that is none of those above.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        dtype: str | None = None,
        tower: str | None = None,
        tower_features: str | None = None,
        window: int | None = None,
        max_frames_num: int | None = None,
        video_fps: float | None = None,
        force_sample: bool | None = None,
        time_instruction: bool | None = None,
        template: str | None = None,
        stream: str = "auto",
        stream_fps: float = 1.0,
        last_frames: int = 0,
        blind: bool = False,
        decode_ahead: int = 2,
    ) -> None:
        super().__init__()
        self.batch_size = _whole("batch_size", batch_size, least=1)
        if max_batch_size is not None:
            raise ValueError(
                f"max_batch_size={max_batch_size} bounds automatic batch sizes, which this model "
                "does not have; give batch_size alone"
            )
        if stream not in ("auto", "always", "never"):
            raise ValueError(f"stream={stream!r}: choose 'auto', 'always' or 'never'")
        if not stream_fps > 0:
            raise ValueError(f"stream_fps={stream_fps} must be positive")
        self.stream, self.stream_fps = stream, stream_fps
        self.last_frames = _whole("last_frames", last_frames, least=0)
        self.blind = _flag("blind", blind)
        self.decode_ahead = _whole("decode_ahead", decode_ahead, least=1)
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self._device = torch.device(_own_device(device, self.accelerator))
        if template is not None:
            prompts.get_template(template)
        fields = {
            "num_frames": max_frames_num,
            "video_fps": video_fps,
            "force_sample": force_sample,
            "time_instruction": time_instruction,
            "template": template,
        }
        self.model, self.tokenizer = load_model(
            pretrained or default_checkpoint(),
            tower=tower,
            dtype=_dtype(dtype),
            device=self._device,
            window=window,
            **{name: value for name, value in fields.items() if value is not None},
        )
        if tower_features is not None:
            self._choose_layer(tower_features)
        self._ignored: set[str] = set()

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> StreamformerLlava:
        """Make the model of ``--model_args``; an argument that does not exist is refused.

        Raises:
            ValueError: it, with the nearest that does.
        """
        known = list(inspect.signature(cls).parameters)
        for name in simple_parse_args_string(arg_string):
            if name not in known:
                raise ValueError(
                    f"streamformer_llava has no model argument {name!r}; {hint(name, known)}"
                )
        return super().create_from_arg_string(arg_string, additional_config)

    @property
    def device(self) -> torch.device:
        """Where lmms-eval puts what it gathers."""
        return self._device

    # -- what lmms-eval calls ---------------------------------------------------------------------

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer questions, in the order of the requests."""
        answers: dict[int, str] = {}
        with self._bar(len(requests)) as bar:
            for asks in self._portions(requests):
                watched = {place for place, ask in asks.items() if self._is_stream(ask)}
                for place in sorted(watched):
                    answers[place] = self._watch(self._watcher(), asks[place])
                    bar.update()
                at_once = [place for place in asks if place not in watched]
                for number, text in self._answer([asks[place] for place in at_once]):
                    answers[at_once[number]] = text
                    bar.update()
        return [answers[place] for place in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Answer questions of several rounds; a list of answers to each request.

        What a round shows may depend on the answers before, so documents are asked one by one. As a
        stream, each round goes on where the last one stopped, if its video begins with what has
        been watched.
        """
        results = []
        _refuse_missing(self._round(request, 0, [], None)[0] for request in requests)
        with self._bar(len(requests)) as bar:
            for request in requests:
                watcher, said, info = None, [], None
                for number in itertools.count():
                    ask, said, info = self._round(request, number, said, info)
                    if ask is None:
                        break
                    if self._is_stream(ask):
                        watcher = watcher or self._watcher()
                        said = [*said, self._watch(watcher, ask)]
                    else:
                        said = [*said, next(text for _, text in self._answer([ask]))]
                results.append(said)
                bar.update()
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Loss of given answers, per token, and whether greedy decoding would give them.

        lmms-eval 0.7.3 turns bare pairs into text on their way; inside a result they survive.
        """
        results: dict[int, GenerationResult] = {}
        asks, targets = [], []
        for request in requests:
            context, target, doc_to_visual, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            where = f"{task}, document {doc_id}"
            asks.append(Ask((context,), _visuals(doc_to_visual, doc, where), {}, task, where))
            targets.append(target(doc) if callable(target) else target)
        _refuse_missing(asks)
        with self._bar(len(asks)) as bar:
            for batch in self._batches(asks):
                turns = [self._turns(ask, seen) for _, ask, seen in batch]
                visuals = [seen.tokens or None for *_, seen in batch]
                wanted = [targets[place] for place, *_ in batch]
                for (place, *_), score in zip(
                    batch, self.model.score(turns, wanted, visuals), strict=True
                ):
                    loss = -score.loglikelihood / max(score.tokens, 1)
                    results[place] = GenerationResult(text=(loss, score.greedy))
                bar.update(len(batch))
        return [results[place] for place in range(len(asks))]

    # -- from requests to asks --------------------------------------------------------------------

    def _ask(self, request: Instance) -> Ask:
        context, settings, doc_to_visual, doc_id, task, split = request.args
        where = f"{task}, document {doc_id}"
        doc = self.task_dict[task][split][doc_id]
        visuals = _visuals(doc_to_visual, doc, where)
        return Ask((context,), visuals, settings, task, where, _choices(settings, doc, where))

    def _round(
        self, request: Instance, number: int, said: list[str], info: Any
    ) -> tuple[Ask | None, list[str], Any]:
        """What is asked in a round, or None at the end; answers so far; the task's own notes."""
        context, settings, doc_to_visual, doc_to_text, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        where = f"{task}, document {doc_id}, round {number}"
        choices = _choices(settings, doc, where)
        if number == 0:
            visuals = _visuals(doc_to_visual, doc, where)
            return Ask((context,), visuals, settings, task, where, choices), said, info
        visuals, text, ended, before, info = doc_to_text(
            doc, previous_output=list(said), round_idx=number, previous_round_info=info
        )
        said = said if before is None else list(before)
        if ended:
            return None, said, info
        taken = tuple(_as_visual(item, where) for item in visuals or ())
        return Ask((text,), taken, settings, task, where, choices), said, info

    def _portions(self, requests: Sequence[Instance]) -> Iterator[dict[int, Ask]]:
        """Requests by their place, as asks: first all that name files, then those of images.

        Files are looked for before anything is answered, and all questions on one of them come
        together. Decoded images, which a document brings itself, are held a few at a time.
        """
        decoded: dict[str, bool] = {}
        named: dict[int, Ask] = {}
        for place, request in enumerate(requests):
            if not decoded.get(request.task_name, False):
                ask = self._ask(request)
                decoded.setdefault(
                    request.task_name, any(isinstance(v, Image.Image) for v in ask.visuals)
                )
            if not decoded[request.task_name]:
                named[place] = ask
        _refuse_missing(named.values())
        if named:
            yield named
        places = [place for place in range(len(requests)) if place not in named]
        for first in range(0, len(places), PORTION):
            yield {place: self._ask(requests[place]) for place in places[first : first + PORTION]}

    # -- answering --------------------------------------------------------------------------------

    def _answer(self, asks: Sequence[Ask]) -> Iterator[tuple[int, str]]:
        """Place and answer of each question, as they come."""
        for batch in self._batches(asks):
            turns = [self._turns(ask, seen) for _, ask, seen in batch]
            visuals = [seen.tokens or None for *_, seen in batch]
            if batch[0][1].choices:
                texts = self.model.choose(turns, [ask.choices for _, ask, _ in batch], visuals)
            else:
                until, generation = self._settings(batch[0][1].settings)
                texts = self.model.answer(turns, visuals, until, **generation)
            for (place, *_), text in zip(batch, texts, strict=True):
                yield place, text

    def _batches(self, asks: Sequence[Ask]) -> Iterator[list[tuple[int, Ask, _Seen]]]:
        """Questions with equal settings, up to ``batch_size``; questions on one video together."""
        places: dict[Hashable, list[int]] = {}
        for place, ask in enumerate(asks):
            places.setdefault(ask.key, []).append(place)
        waiting: dict[str, list[tuple[int, Ask, _Seen]]] = {}
        decoded = ((here, self._decode(asks[here[0]])) for here in places.values())
        for here, visuals in prefetched(decoded, self.decode_ahead):
            seen = self._encode(visuals)
            for place in here:
                settings = json.dumps(asks[place].settings, sort_keys=True, default=str)
                batch = waiting.setdefault(settings, [])
                batch.append((place, asks[place], seen))
                if len(batch) == self.batch_size:
                    yield waiting.pop(settings)
        yield from waiting.values()

    def _decode(self, ask: Ask) -> list[tuple[np.ndarray | Image.Image, Sampling | None]]:
        """Frames of the videos, and images; in the background."""
        config, decoded = self.model.config, []
        for item in ask.visuals:
            if isinstance(item, Image.Image):
                decoded.append((item, None))
                continue
            try:
                if isinstance(item, VideoClip):
                    decoded.append(
                        read_video(item, config.num_frames, config.video_fps, config.force_sample)
                    )
                else:
                    with Image.open(item) as image:
                        decoded.append((image.convert("RGB"), None))
            except (OSError, VideoError) as error:
                raise VideoError(f"{ask.where}: {error}") from error
        return decoded

    def _encode(self, visuals: Sequence[tuple[np.ndarray | Image.Image, Sampling | None]]) -> _Seen:
        tokens, times = [], None
        for item, sampling in visuals:
            if isinstance(item, Image.Image):
                tokens.append(self.model.encode_image(item))
                continue
            tokens.append(self.model.encode_video(item[-self.last_frames :]))
            if self.model.config.time_instruction and times is None:
                shown = sampling.times[-self.last_frames :]
                listed = ",".join(f"{time:.2f}s" for time in shown)
                times = prompts.time_sentence(sampling.duration, listed, len(shown))
        if self.blind:
            tokens = [torch.zeros_like(part) for part in tokens]
        return _Seen(tokens, times)

    def _turns(self, ask: Ask, seen: _Seen) -> list[str]:
        """Texts in turns, with the frames' times in the first one."""
        first, *others = ask.turns
        return [with_times(first, seen.times), *others]

    def _is_stream(self, ask: Ask) -> bool:
        """Whether it is one question on one video, that is to be watched as it runs."""
        wanted = self.stream == "always" or (
            self.stream == "auto" and ask.task.startswith(STREAM_TASKS)
        )
        single = len(ask.turns) == len(ask.visuals) == 1
        return wanted and not self.blind and single and isinstance(ask.visuals[0], VideoClip)

    def _watcher(self) -> Watcher:
        return Watcher(self.model, self.stream_fps, self.last_frames)

    def _watch(self, watcher: Watcher, ask: Ask) -> str:
        """Watch the video, or what of it is new, and answer."""
        if ask.choices:
            raise ValueError(
                f"{ask.where}: a stream is answered freely, not by {CHOICES}; use stream=never"
            )
        try:
            watcher.watch(ask.visuals[0])
        except VideoError as error:
            raise VideoError(f"{ask.where}: {error}") from error
        until, generation = self._settings(ask.settings)
        if generation.get("num_beams", 1) > 1:
            raise ValueError(
                f"{ask.where}: num_beams={generation['num_beams']}, and a stream is answered token "
                "by token; use num_beams=1, or stream=never"
            )
        question = ask.turns[0].replace(IMAGE_TOKEN, "").lstrip("\n")
        heat = generation.get("temperature", 1.0) if generation["do_sample"] else 0.0
        text = watcher.ask(question, generation.get("max_new_tokens", MOST_TOKENS), heat)
        places = [text.find(stop) for stop in until if stop in text]
        return text[: min(places, default=len(text))].strip()

    def _settings(self, given: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """Texts that end an answer, and the fields of transformers' ``GenerationConfig``."""
        until = given.get("until") or []
        known = GenerationConfig().to_dict()
        settings = {k: v for k, v in given.items() if k in known and v is not None}
        unknown = set(given) - set(known) - {"until", CHOICES} - self._ignored
        if unknown:
            self._ignored |= unknown
            logger.warning("generation settings that do not exist here: %s", sorted(unknown))
        heat = settings.get("temperature")
        settings.setdefault("do_sample", bool(heat))
        if not settings["do_sample"] or heat == 0:
            settings["do_sample"] = False
            settings = {k: v for k, v in settings.items() if k not in SAMPLING_ONLY}
        return [until] if isinstance(until, str) else list(until), settings

    def _choose_layer(self, name: str) -> None:
        """Use the tokens that a preset names."""
        tower, config = self.model.tower, self.model.config
        fields = tower_preset(name, tower.encoder.kind)
        for key, value in fields.items():
            setattr(config, key, value)
        tower.layer, tower.post_norm = config.tower_layer, config.tower_post_norm

    def _bar(self, total: int) -> tqdm:
        return tqdm(total=total, desc="streamformer_llava", disable=self._rank != 0)


class StreamformerLlavaChat(StreamformerLlava):
    """The same as lmms-eval's chat model: requests come as messages, also of several turns."""

    is_simple = False

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Not for chat models: lmms-eval makes no such request of messages.

        Raises:
            NotImplementedError: always, with the option that helps.
        """
        raise NotImplementedError(
            "tasks that compare likelihoods ask the simple model; add --force_simple"
        )

    def _ask(self, request: Instance) -> Ask:
        _, doc_to_messages, settings, doc_id, task, split = request.args
        where = f"{task}, document {doc_id}"
        doc = self.task_dict[task][split][doc_id]
        turns, visuals = _read_messages(_guarded(doc_to_messages, doc, where), where)
        return Ask(turns, visuals, settings, task, where, _choices(settings, doc, where))

    def _round(
        self, request: Instance, number: int, said: list[str], info: Any
    ) -> tuple[Ask | None, list[str], Any]:
        _, doc_to_messages, settings, doc_id, task, split = request.args
        where = f"{task}, document {doc_id}, round {number}"
        doc = self.task_dict[task][split][doc_id]
        if number == 0:
            return self._ask(request), said, info
        messages, ended, before, info = doc_to_messages(
            doc, round_idx=number, previous_output=list(said), previous_round_info=info
        )
        said = said if before is None else list(before)
        if ended:
            return None, said, info
        turns, visuals = _read_messages(messages, where)
        choices = _choices(settings, doc, where)
        return Ask(turns, visuals, settings, task, where, choices), said, info


def default_checkpoint() -> str:
    """The checkpoint that an installed package offers.

    Raises:
        ValueError: none does; with what to do.
    """
    advice = []
    for offer in offers():
        if offer["pretrained"]:
            return offer["pretrained"]
        advice.append(offer["advice"])
    raise ValueError(
        "streamformer_llava needs a checkpoint: --model_args pretrained=<folder or hub id>. "
        + "; or: ".join(advice)
    )


# -- visuals ---------------------------------------------------------------------------------------


def _visuals(
    doc_to_visual: Callable[[Any], Any] | None, doc: Any, where: str
) -> tuple[VideoClip | Image.Image | str, ...]:
    if doc_to_visual is None:
        return ()
    return tuple(_as_visual(item, where) for item in _guarded(doc_to_visual, doc, where) or ())


def _choices(settings: Mapping[str, Any], doc: Any, where: str) -> tuple[str, ...]:
    """What the task lets be answered; () for anything."""
    name = settings.get(CHOICES)
    if name is None:
        return ()
    listed = doc.get(name)
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
        raise ValueError(
            f"{where}: {CHOICES}={name!r} must name a field that lists answers, not {listed!r}"
        )
    return tuple(listed)


def _guarded(function: Callable[[Any], Any], doc: Any, where: str) -> Any:
    """A task's function; tasks end the process where a video is missing, here that is an error."""
    try:
        return function(doc)
    except SystemExit as error:
        raise VideoError(f"{where}: {error.code}") from error


def _as_visual(item: Any, where: str) -> VideoClip | Image.Image | str:
    """A video, an image, or the path of an image."""
    if isinstance(item, Mapping):
        source = next((item[k] for k in ("url", "path", "video") if item.get(k)), None)
        if source is not None and item.get("type", "video") in ("video", "image"):
            if isinstance(source, Image.Image) or item.get("type") == "image":
                return _as_visual(source, where)
            return VideoClip(source, float(item.get("video_start") or 0), item.get("video_end"))
    if isinstance(item, Image.Image):
        return item
    if isinstance(item, str | os.PathLike):
        path = os.fspath(item)
        is_image = Path(path).suffix.lower() in IMAGE_SUFFIXES and not Path(path).is_dir()
        return path if is_image else VideoClip(path)
    raise ValueError(
        f"{where}: a visual of type {type(item).__name__} ({str(item)[:60]!r}); this model sees "
        "videos (paths, or mappings with url, video_start, video_end) and images"
    )


def _key(item: VideoClip | Image.Image | str) -> Hashable:
    if isinstance(item, VideoClip):
        return item.key
    return id(item) if isinstance(item, Image.Image) else item


def _refuse_missing(asks: Iterable[Ask]) -> None:
    """Raise VideoError if a file of theirs is not there."""
    missing: dict[str, str] = {}
    for ask in asks:
        for item in ask.visuals:
            source = item.source if isinstance(item, VideoClip) else item
            is_file = isinstance(source, str | Path) and "://" not in str(source)
            if is_file and not Path(source).exists():
                missing.setdefault(str(source), ask.where)
    if missing:
        listed = [f"{source} ({where})" for source, where in list(missing.items())[:SHOWN]]
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise VideoError(
            f"{len(missing)} files are missing: {', '.join(listed)}{more}; nothing was answered. "
            "Put them there, or leave their documents out"
        )


def _read_messages(
    messages: Sequence[Mapping[str, Any]], where: str
) -> tuple[tuple[str, ...], tuple[VideoClip | Image.Image | str, ...]]:
    """Texts in turns with placeholders, and the visuals; a system's words open the first turn."""
    texts: list[str] = []
    visuals: list[VideoClip | Image.Image | str] = []
    roles: list[str] = []
    for message in messages:
        content = message["content"]
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = ""
        for part in content:
            if part["type"] == "text":
                follows = text.endswith(IMAGE_TOKEN)
                text += ("\n" if follows else "") + part["text"]
            elif part["type"] in ("video", "image"):
                visuals.append(_as_visual(part.get("url", part), where))
                text += IMAGE_TOKEN
            else:
                raise ValueError(
                    f"{where}: a message holds {part['type']!r}, and this model sees videos and "
                    "images only"
                )
        if roles and roles[-1] in ("system", message["role"]):  # one turn
            texts[-1] = f"{texts[-1]}\n{text}"
            roles[-1] = message["role"]
        else:
            texts.append(text)
            roles.append(message["role"])
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)):
        raise ValueError(f"{where}: turns by {roles}; user and assistant must alternate")
    return tuple(texts), tuple(visuals)


# -- arguments -------------------------------------------------------------------------------------


def _whole(name: str, value: Any, least: int) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = least - 1
    if number < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
    return number


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False")
    return value


def _dtype(name: str | None) -> torch.dtype | None:
    known = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16,
                                                        torch.float16)}  # fmt: skip
    if name is not None and name not in known:
        raise ValueError(f"dtype={name!r}: choose one of {', '.join(known)}")
    return None if name is None else known[name]


def _own_device(name: str | None, accelerator: Accelerator) -> str:
    """The device named; of several processes on GPUs, each has its own."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        return f"cuda:{accelerator.local_process_index}"
    return name
