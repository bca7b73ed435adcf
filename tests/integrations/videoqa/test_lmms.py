"""The lmms-eval model: requests of every kind, in order, batched, and never answered by mistake."""

import json

import av
import numpy as np
import pytest
import torch
from lmms_eval.api.instance import GenerationResult, Instance
from PIL import Image

from backbone.video import VideoError
from integrations.videoqa.checkpoints import save_model
from integrations.videoqa.frames import VideoClip, read_video
from integrations.videoqa.lmms import StreamformerLlava, StreamformerLlavaChat
from integrations.videoqa.session import StreamingSession
from integrations.videoqa.watching import Watcher

GREEDY = {"max_new_tokens": 6, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False,
          "until": ["\n\n"]}  # fmt: skip


def write_video(path, frames, fps: int = 4) -> str:
    """Lossless, so that a part of it holds the same pixels."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.options = "rgb24", {"crf": "0", "bf": "0"}
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return str(path)


@pytest.fixture
def pixels() -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (24, 4, 6, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)  # (24, 32, 48, 3)


@pytest.fixture
def videos(tmp_path, pixels) -> list[str]:
    return [write_video(tmp_path / f"{n}.mp4", np.roll(pixels, n, axis=1)) for n in range(3)]


@pytest.fixture
def checkpoint(fresh, tmp_path):
    folder = tmp_path / "model"
    save_model(fresh(), folder)
    return str(folder)


@pytest.fixture
def load(checkpoint):
    """Build the simple or chat model, with the documents of a task."""

    def build(kind=StreamformerLlava, docs=(), task="t", **arguments):
        lm = kind(pretrained=checkpoint, device="cpu", **arguments)
        lm.task_dict[task] = {"test": list(docs)}
        return lm

    return build


def simple(doc_id, text, visual, settings=GREEDY, task="t"):
    return _request("generate_until", (text, dict(settings), visual, doc_id, task, "test"))


def chat(doc_id, messages, settings=GREEDY, task="t"):
    return _request("generate_until", ("", messages, dict(settings), doc_id, task, "test"))


def _request(kind, arguments):
    task, doc_id = arguments[-2], arguments[-3]
    facts = {"task": task, "doc_id": doc_id, "repeats": 1}
    return Instance(request_type=kind, arguments=arguments, idx=0, metadata=facts)


def see(doc):
    return [doc["video"]]


# -- answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, "2", 4])
def test_answers_come_in_order_whatever_the_batches(load, videos, batch_size):
    docs = [{"video": videos[i]} for i in (0, 1, 0, 2, 1)]
    texts = ["What?", "Who is there?", "A much longer question than the others", "Now?", "What?"]
    settings = [{**GREEDY, "max_new_tokens": 4 + i % 2} for i in range(5)]
    lm = load(docs=docs, batch_size=batch_size)
    asked = [simple(i, texts[i], see, settings[i]) for i in range(5)]
    said = lm.generate_until(asked)
    alone = [
        lm.model.answer([text], [doc["video"]], max_new_tokens=s["max_new_tokens"],
                        until=["\n\n"])[0]
        for text, doc, s in zip(texts, docs, settings, strict=True)
    ]  # fmt: skip
    assert said == alone
    assert len(set(said)) > 1  # or the order would not show


@pytest.mark.parametrize("kind", [StreamformerLlava, StreamformerLlavaChat])
def test_a_task_may_say_what_can_be_answered(load, videos, kind):
    options = [["red", "green"], ["one", "two", "three"], ["left", "right"]]
    docs = [{"video": path, "options": o} for path, o in zip(videos, options, strict=True)]
    lm = load(kind, docs, batch_size=2)
    guided = {**GREEDY, "guided_choice": "options"}
    if kind is StreamformerLlava:
        requests = [simple(n, "Which?", see, guided) for n in range(3)]
    else:
        requests = [chat(n, ask_of_video, guided) for n in range(3)]
    chosen = lm.model.choose(["Which?"] * 3, options, videos)
    assert lm.generate_until(requests) == chosen
    free = [simple(n, "Which?", see) for n in range(3)]
    assert load(docs=docs).generate_until(free) != chosen


def ask_of_video(doc):
    content = {"type": "video", "url": doc["video"]}, {"type": "text", "text": "Which?"}
    return [{"role": "user", "content": list(content)}]


def test_choices_that_are_none_are_refused(load, videos):
    guided = {**GREEDY, "guided_choice": "options"}
    for wrong in ("red", [], None):
        lm = load(docs=[{"video": videos[0], "options": wrong}])
        with pytest.raises(ValueError, match="t, document 0: guided_choice='options' must name"):
            lm.generate_until([simple(0, "Which?", see, guided)])
    lm = load(docs=[{"video": videos[0], "options": ["red"]}], stream="always")
    with pytest.raises(ValueError, match="a stream is answered freely, .*use stream=never"):
        lm.generate_until([simple(0, "Which?", see, guided)])


def test_a_video_is_encoded_once_for_all_its_questions(load, videos):
    docs = [{"video": videos[i % 2]} for i in range(6)]
    lm = load(docs=docs, batch_size=2)
    lm.generate_until([simple(i, f"Question {i}?", see) for i in range(6)])
    assert lm.model.encoded_frames == 2 * lm.model.config.num_frames


def test_simple_and_chat_ask_the_same(load, videos):
    docs = [{"video": path} for path in videos]
    one = load(docs=docs)
    messages = [
        lambda doc, n=n: [{"role": "user", "content": [
            {"type": "video", "url": doc["video"]}, {"type": "text", "text": f"Which {n}?"},
        ]}]
        for n in range(3)
    ]  # fmt: skip
    other = load(StreamformerLlavaChat, docs)
    assert one.generate_until(
        [simple(n, f"Which {n}?", see) for n in range(3)]
    ) == other.generate_until([chat(n, messages[n]) for n in range(3)])


def test_a_chat_of_several_turns_images_and_parts_of_videos(load, videos, tmp_path, pixels):
    image = Image.fromarray(pixels[0])
    image.save(tmp_path / "a.png")
    part = {"url": videos[0], "video_start": 1.0, "video_end": 3.0}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "url": image},
                                     {"type": "image", "url": str(tmp_path / "a.png")},
                                     {"type": "text", "text": "Same?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
        {"role": "user", "content": [{"type": "video", "url": part},
                                     {"type": "text", "text": "And now?"}]},
    ]  # fmt: skip
    lm = load(StreamformerLlavaChat, [{}])
    said = lm.generate_until([chat(0, lambda doc: messages)])
    expected = lm.model.answer(
        [["Be brief.\n<image><image>\nSame?", "Yes.", "<image>\nAnd now?"]],
        [[image, image, VideoClip(videos[0], 1.0, 3.0)]],
        max_new_tokens=6,
    )
    assert said == expected


def test_questions_without_visuals(load):
    lm = load(docs=[{}])
    assert lm.generate_until([simple(0, "Why?", None)]) == lm.model.answer(
        ["Why?"], max_new_tokens=6
    )


def test_decoded_images_are_asked_in_portions(load, pixels, monkeypatch):
    monkeypatch.setattr("integrations.videoqa.lmms.PORTION", 2)
    docs = [{"image": Image.fromarray(frame)} for frame in pixels[:5]]
    lm = load(docs=docs, batch_size=2)
    said = lm.generate_until([simple(i, "What?", lambda doc: [doc["image"]]) for i in range(5)])
    assert said == [lm.model.answer(["What?"], [doc["image"]], max_new_tokens=6)[0] for doc in docs]


def test_an_answer_ends_where_the_task_says(load, videos):
    lm = load(docs=[{"video": videos[0]}])
    whole = lm.generate_until([simple(0, "What?", see, {**GREEDY, "max_new_tokens": 12})])[0]
    stop = whole[3]
    settings = {**GREEDY, "max_new_tokens": 12, "until": stop}
    said = lm.generate_until([simple(0, "What?", see, settings)])
    assert said[0] == whole[: whole.find(stop)].strip()


def test_settings_that_transformers_does_not_know_are_named(load, videos, caplog):
    lm = load(docs=[{"video": videos[0]}])
    odd = {**GREEDY, "image_aspect_ratio": "pad"}
    assert lm.generate_until([simple(0, "What?", see, odd)]) == lm.generate_until(
        [simple(0, "What?", see)]
    )
    assert "image_aspect_ratio" in caplog.text


def test_frames_blindness_and_the_end_of_a_video(load, videos):
    docs = [{"video": videos[0]}]
    asked = [simple(0, "What?", see, {**GREEDY, "max_new_tokens": 12})]
    few = load(docs=docs, max_frames_num=2)
    assert few.model.config.num_frames == 2
    few.generate_until(asked)
    assert few.model.encoded_frames == 2

    last = load(docs=docs, last_frames=1)
    frames, _ = read_video(videos[0], 4, force_sample=True)
    expected = last.model.answer(["What?"], [frames[-1:]], max_new_tokens=12)
    assert last.generate_until(asked) == expected

    blind = load(docs=[*docs, {"video": videos[1]}], blind=True)
    said = blind.generate_until([*asked, simple(1, "What?", see, {**GREEDY, "max_new_tokens": 12})])
    assert said[0] == said[1]
    tokens = torch.zeros_like(blind.model.encode_video(frames))
    assert said[:1] == blind.model.answer(["What?"], [tokens], max_new_tokens=12)


def test_times_of_frames_stand_behind_the_placeholder(load, videos):
    lm = load(docs=[{"video": videos[0]}], time_instruction=True, max_frames_num=2)
    asked = [simple(0, "What?", see), simple(0, "<image>\nWhat?", see)]
    expected = lm.model.answer(["What?"], [videos[0]], max_new_tokens=6)
    assert lm.generate_until(asked) == expected * 2


def test_layers_and_towers_are_arguments(load, siglip_folder):
    lm = load(tower=f"siglip:{siglip_folder}", tower_features="penultimate")
    assert lm.model.tower.encoder.kind == "siglip"
    assert (lm.model.tower.layer, lm.model.tower.post_norm) == (-2, False)


# -- likelihoods -----------------------------------------------------------------------------------


def test_likelihoods_are_losses_of_the_answers(load, videos):
    docs = [{"video": videos[i], "right": f"answer {i}"} for i in range(3)]
    lm = load(docs=docs, batch_size=2)
    targets = ["no", lambda doc: doc["right"], "a longer answer"]
    requests = [
        _request("loglikelihood", ("What?", targets[i], see, i, "t", "test")) for i in range(3)
    ]
    results = lm.loglikelihood(requests)
    words = ["no", "answer 1", "a longer answer"]
    for result, word, doc in zip(results, words, docs, strict=True):
        assert isinstance(result, GenerationResult)
        loss, greedy = result.text
        (score,) = lm.model.score(["What?"], [word], [doc["video"]])
        assert loss == pytest.approx(-score.loglikelihood / score.tokens, rel=1e-4)
        assert greedy is score.greedy


def test_chat_models_point_to_the_simple_one(load):
    with pytest.raises(NotImplementedError, match="--force_simple"):
        load(StreamformerLlavaChat).loglikelihood([])


# -- rounds and streams ----------------------------------------------------------------------------


QUESTIONS = ["Round 0?", "Round 1? [1]", "Round 2? [1, 2]"]


def rounds_of(paths, kind, settings=GREEDY):
    """A request that asks one of QUESTIONS a round, about one more part of the video each."""

    def doc_to_text(doc, previous_output=None, round_idx=None, previous_round_info=None):
        if round_idx == len(paths):
            return None, None, True, previous_output, None
        info = [*(previous_round_info or []), len(previous_output)]
        return [paths[round_idx]], f"Round {round_idx}? {info}", False, previous_output, info

    def messages(doc, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return _turn(paths[0], QUESTIONS[0])
        visuals, text, ended, before, info = doc_to_text(
            doc, previous_output, round_idx, previous_round_info
        )
        return (None if ended else _turn(visuals[0], text)), ended, before, info

    if kind.is_simple:
        arguments = (QUESTIONS[0], dict(settings), lambda doc: [paths[0]], doc_to_text)
    else:
        arguments = ("", messages, dict(settings))
    return _request("generate_until_multi_round", (*arguments, 0, "t", "test"))


@pytest.fixture
def parts(tmp_path, pixels) -> list[str]:
    return [write_video(tmp_path / f"part_{n}.mp4", pixels[:n]) for n in (8, 16, 24)]


@pytest.mark.parametrize("kind", [StreamformerLlava, StreamformerLlavaChat])
@pytest.mark.parametrize("stream", ["never", "always"])
def test_several_rounds(load, parts, kind, stream):
    lm = load(kind, [{}], stream=stream, stream_fps=4)
    (said,) = lm.generate_until_multi_round([rounds_of(parts, kind)])
    if stream == "never":
        assert said == [
            lm.model.answer([q], [p], max_new_tokens=6)[0]
            for q, p in zip(QUESTIONS, parts, strict=True)
        ]
        return
    assert lm.model.encoded_frames == 24  # each frame once, though the parts overlap
    for question, answer, count in zip(QUESTIONS, said, (8, 16, 24), strict=True):
        session = StreamingSession(lm.model, history="none")
        session.push(_pixels_of(parts[2])[:count])
        assert answer == session.ask(question, max_new_tokens=6)


@pytest.mark.parametrize("kind", [StreamformerLlava, StreamformerLlavaChat])
def test_choices_hold_in_every_round(load, parts, kind):
    options = ["red", "green", "one", "two", "left", "right"]
    lm = load(kind, [{"options": options}])
    request = rounds_of(parts, kind, {**GREEDY, "guided_choice": "options"})
    (said,) = lm.generate_until_multi_round([request])
    assert said == lm.model.choose(QUESTIONS, [options] * 3, parts)


def _turn(path, text):
    return [{"role": "user", "content": [{"type": "video", "url": path},
                                         {"type": "text", "text": text}]}]  # fmt: skip


def _pixels_of(path) -> np.ndarray:
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_tasks_of_ovo_bench_are_streams(load, videos):
    docs = [{"video": videos[0]}]
    lm = load(docs=docs, task="ovo_realtime", stream_fps=2)
    said = lm.generate_until([simple(0, "What?", see, task="ovo_realtime")])
    session = StreamingSession(lm.model, history="none")
    session.push(_pixels_of(videos[0])[::2])
    assert said == [session.ask("What?", max_new_tokens=6)]


def test_another_video_is_watched_from_its_start(load, parts, videos):
    model = load().model
    watcher = Watcher(model, fps=4)
    for path, seen in ((parts[1], 16), (parts[2], 24), (parts[0], 8), (videos[1], 24)):
        before = model.encoded_frames
        watcher.watch(VideoClip(path))
        assert watcher.session.frames_seen == seen
        assert model.encoded_frames - before == (8 if path == parts[2] else seen)


# -- what is refused -------------------------------------------------------------------------------


def test_missing_videos_are_named_before_any_answer(load, videos):
    docs = [{"video": videos[0]}, {"video": "gone.mp4"}, {"video": "lost.mp4"}]
    lm = load(docs=docs)
    with pytest.raises(VideoError, match=r"2 files are missing: gone.mp4 \(t, document 1\), lost"):
        lm.generate_until([simple(i, "What?", see) for i in range(3)])
    assert lm.model.encoded_frames == 0


def test_a_task_that_would_end_the_process_is_an_error(load):
    def leave(doc):
        raise SystemExit("video path:x.mp4 does not exist, please check")

    for kind in (StreamformerLlava, StreamformerLlavaChat):
        lm = load(kind, [{}])
        request = simple(0, "What?", leave) if kind.is_simple else chat(0, leave)
        with pytest.raises(VideoError, match="t, document 0: video path:x.mp4 does not exist"):
            lm.generate_until([request])


@pytest.mark.parametrize("stream", ["never", "always"])
def test_a_broken_video_is_an_error_and_no_answer(load, videos, tmp_path, stream):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    lm = load(docs=[{"video": videos[0]}, {"video": str(broken)}], stream=stream, stream_fps=4)
    with pytest.raises(VideoError, match=r"t, document 1: .*broken\.mp4"):
        lm.generate_until([simple(i, "What?", see) for i in range(2)])


def test_visuals_of_other_kinds_are_refused(load):
    lm = load(docs=[{}])
    with pytest.raises(ValueError, match="t, document 0: a visual of type int"):
        lm.generate_until([simple(0, "What?", lambda doc: [3])])
    chatty = load(StreamformerLlavaChat, [{}])
    sound = [{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}]
    with pytest.raises(ValueError, match="holds 'audio'"):
        chatty.generate_until([chat(0, lambda doc: sound)])
    twice = [{"role": "assistant", "content": "a"}]
    with pytest.raises(ValueError, match=r"turns by \['assistant'\]"):
        chatty.generate_until([chat(0, lambda doc: twice)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": "auto"}, "batch_size='auto' must be a whole number"),
        ({"max_batch_size": 8}, "max_batch_size=8 bounds automatic"),
        ({"stream": "yes"}, "stream='yes': choose"),
        ({"stream_fps": 0}, "stream_fps=0 must be positive"),
        ({"dtype": "int8"}, "dtype='int8': choose one of float32"),
        ({"blind": "no"}, "blind='no' must be True or False"),
        ({"template": "vicuna"}, "no prompt template 'vicuna'"),
        ({"last_frames": -1}, "last_frames=-1 must be"),
    ],
)
def test_impossible_arguments_are_refused(load, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(**arguments)


def test_unknown_arguments_are_refused_with_the_nearest(checkpoint):
    with pytest.raises(ValueError, match="no model argument 'max_frame_num'; did you mean 'max_fr"):
        StreamformerLlava.create_from_arg_string(f"pretrained={checkpoint},max_frame_num=4")
    lm = StreamformerLlava.create_from_arg_string(
        f"pretrained={checkpoint},max_frames_num=3,force_sample=False", {"device": "cpu"}
    )
    assert (lm.model.config.num_frames, lm.model.config.force_sample) == (3, False)


def test_without_a_checkpoint_it_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "integrations.videoqa.lmms.offers",
        lambda: [{"tasks": [], "pretrained": None, "advice": "run the job"}],
    )
    with pytest.raises(ValueError, match="pretrained=<folder or hub id>. run the job"):
        StreamformerLlava(device="cpu")


def test_beams_do_not_go_with_streams(load, videos):
    lm = load(docs=[{"video": videos[0]}], stream="always", stream_fps=4)
    with pytest.raises(ValueError, match="num_beams=2, and a stream"):
        lm.generate_until([simple(0, "What?", see, {**GREEDY, "num_beams": 2})])


# -- parsing of lmms-eval itself -------------------------------------------------------------------


@pytest.fixture
def parsing(qa_golden):
    return json.loads((qa_golden / "lmms_eval.json").read_text())


@pytest.mark.golden
def test_letters_are_found_as_stored(parsing):
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer

    for row in parsing["extract"]:
        found = extract_mcq_answer(row["text"], choices=parsing["choices"])
        assert found == row["letter"], row


@pytest.mark.golden
def test_video_mme_is_scored_as_stored(parsing, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    from lmms_eval.tasks.videomme import utils

    stored = parsing["videomme"]
    rows = [
        utils.videomme_process_results(doc, [said])["videomme_perception_score"]
        for doc, said in zip(stored["docs"], stored["predictions"], strict=True)
    ]
    assert [row["pred_answer"] for row in rows] == stored["parsed"]
    assert [row["score"] for row in rows] == stored["score"]
    assert utils.videomme_aggregate_results(rows) == pytest.approx(stored["overall_percent"])


@pytest.mark.golden
@pytest.mark.parametrize("split", ["dev", "test"])
def test_mlvu_is_scored_as_stored(parsing, monkeypatch, tmp_path, split):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    from lmms_eval.tasks.mlvu import utils

    stored = parsing[f"mlvu_{split}"]
    rows = [
        utils.mlvu_process_results({"question": "?", "task_type": kind, "answer": answer}, [said])[
            "mlvu_percetion_score"
        ]
        for kind, answer, said in zip(
            stored["task_types"], stored["answers"], stored["predictions"], strict=True
        )
    ]
    assert [row["pred_answer"] for row in rows] == stored["parsed"]
    mean = getattr(utils, f"mlvu_aggregate_results_{split}")(rows)
    assert mean == pytest.approx(stored["macro_average_percent"])


@pytest.mark.golden
def test_prompts_of_both_tails_are_as_stored(parsing):
    from lmms_eval import utils

    from integrations.videoqa.lmms_plugin import TASKS

    stored = {row["variant"]: row for row in parsing["videomme_prompts"]}
    task = utils.load_yaml_config(str(TASKS / "videomme_best_answer.yaml"))
    tails = task["lmms_eval_specific_kwargs"]["default"]
    row = stored["llava_vid"]
    assert task["doc_to_text"](row["doc"], tails) == row["text"]
    builtin = utils.load_yaml_config(_builtin("videomme/videomme.yaml"))
    row = stored["default"]
    tails = builtin["lmms_eval_specific_kwargs"]["default"]
    assert builtin["doc_to_text"](row["doc"], tails) == row["text"]

    default, none = parsing["mlvu_prompts"]
    builtin = utils.load_yaml_config(_builtin("mlvu/mlvu_dev.yaml"))
    text = builtin["doc_to_text"]
    kwargs = builtin["lmms_eval_specific_kwargs"]["default"]
    assert text({"question": default["question"]}, kwargs) == default["text"]
    assert text({"question": none["question"]}, None) == none["text"]
    plain = utils.load_yaml_config(str(TASKS / "mlvu_dev_plain_tail.yaml"))
    kwargs = plain["lmms_eval_specific_kwargs"]["default"]
    assert plain["doc_to_text"]({"question": "Q"}, kwargs) == "Q\nOnly give the best option."


def _builtin(name: str) -> str:
    import lmms_eval.tasks

    return f"{lmms_eval.tasks.__path__[0]}/{name}"


@pytest.mark.golden
def test_our_copies_differ_from_the_tasks_in_name_and_tail_alone():
    from lmms_eval import utils

    from integrations.videoqa.lmms_plugin import TASKS

    for ours, theirs in (
        ("videomme_best_answer", "videomme/videomme"),
        ("mlvu_dev_plain_tail", "mlvu/mlvu_dev"),
    ):
        mine = utils.load_yaml_config(str(TASKS / f"{ours}.yaml"))
        its = utils.load_yaml_config(_builtin(f"{theirs}.yaml"))
        for key in ("task", "lmms_eval_specific_kwargs"):
            mine.pop(key), its.pop(key)
        assert _named(mine) == _named(its)


def _named(value):
    """Functions by name: each YAML loads them anew."""
    if isinstance(value, dict):
        return {key: _named(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_named(item) for item in value]
    return value.__name__ if callable(value) else value
