"""A running video and questions about it: as the clip at once, bounded, nothing done twice."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from integrations.videoqa.checkpoints import load_model
from integrations.videoqa.prompts import render, tokenize
from integrations.videoqa.session import StreamingSession


def ids_of(session, text):
    return session.model.tokenizer(text, add_special_tokens=False).input_ids


def told_at_once(session, messages, visuals, tokens=8):
    """What the model says to a whole prompt, without any session."""
    model = session.model
    ids = tokenize(render([*messages, None], model.config.template), model.tokenizer)
    new = model.generate([torch.tensor(ids)], visuals, max_new_tokens=tokens)
    text = model.tokenizer.decode(new[0], skip_special_tokens=True)
    return text.partition("<|im_end|>")[0].strip()


# -- the published code ---------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize("name", ["tiny_qwen", "tiny_vicuna"])
def test_streaming_cases(qa_golden, name):
    folder = qa_golden / name
    model, _ = load_model(folder)
    cases = json.loads((folder / "e2e.json").read_text())["cases"]
    tensors = load_file(folder / "e2e.safetensors")
    session = None
    for case in (case for case in cases if case["streaming"]):
        if case["call"] == 0:
            session = StreamingSession(model, context_frames=case["context_length"], history="none")
        first, last = case["frames"]
        session.push(tensors["pixel_values"][first:last])
        shown = session._shown(session.frames_seen - len(session._frames), last)
        window = tensors["tower_features_offline"][0, slice(*case["window"])]
        assert_close(shown, model.visual_tokens([window])[0], atol=1e-5, rtol=1e-4)
        new = model.generate(tensors["input_ids"], [shown], max_new_tokens=8)
        assert torch.equal(new, tensors[f"case{case['case']}.greedy_ids"]), case["name"]
        said = session.ask("w1 w2?\nA. x\nB. y", max_new_tokens=8)
        assert said == model.tokenizer.decode(new[0], skip_special_tokens=True).strip()
        assert session.cost.prompt_tokens == case["n_tokens"]


# -- equality -------------------------------------------------------------------------------------


@pytest.fixture
def model(fresh):
    return fresh(num_frames=6)


@pytest.mark.parametrize("chunks", [(1,) * 10, (10,), (3, 1, 6)])
def test_frames_one_by_one_answer_as_the_clip(model, video, chunks):
    session, start = StreamingSession(model, context_frames=10), 0
    for size in chunks:
        session.push(video[start : start + size].numpy())
        start += size
    at_once = model.answer(["What?"], [video[:10].numpy()], max_new_tokens=12)[0]
    assert session.ask("What?", max_new_tokens=12) == at_once


@pytest.mark.parametrize("history", ["text", "frames", "none"])
def test_turns_answer_as_their_whole_prompt(model, video, history):
    """Whatever the LLM's cache held before, an answer is that of its prompt."""
    session = StreamingSession(model, context_frames=6, history=history)
    frames = model.tower(model.preprocess(video)[None])[0]

    def tokens(first, last):
        return model.visual_tokens([frames[first:last]])[0]

    session.push(video[:4].numpy())
    first = session.ask("One?", max_new_tokens=8)
    assert first == told_at_once(session, ["<image>\nOne?"], [tokens(0, 4)])
    session.push(video[4:5].numpy())
    second = session.ask("Two?", max_new_tokens=8)
    session.push(video[5:9].numpy())
    third = session.ask("Three?", max_new_tokens=8)
    if history == "none":
        wanted = [(["<image>\nTwo?"], [(0, 5)]), (["<image>\nThree?"], [(3, 9)])]
    elif history == "text":
        wanted = [
            (["One?", first, "<image>\nTwo?"], [(0, 5)]),
            (["One?", first, "Two?", second, "<image>\nThree?"], [(3, 9)]),
        ]
    else:  # the first three frames have fallen out
        wanted = [
            (["<image>\nOne?", first, "<image>\nTwo?"], [(0, 4), (4, 5)]),
            (
                ["<image>\nOne?", first, "<image>\nTwo?", second, "<image>\nThree?"],
                [(3, 4), (4, 5), (5, 9)],
            ),
        ]
    for said, (messages, spans) in zip((second, third), wanted, strict=True):
        visuals = [tokens(*span) for span in spans]
        assert said == told_at_once(session, messages, visuals)


def test_a_question_before_its_frames(model, video):
    session = StreamingSession(model, context_frames=6)
    frames = model.tower(model.preprocess(video)[None])[0]
    session.push(video[:2].numpy())
    session.pose("When?")
    now = session.ask(keep=False, max_new_tokens=8)
    assert now == told_at_once(session, ["<image>\nWhen?"], [model.visual_tokens([frames[:2]])[0]])
    session.push(video[2:5].numpy())
    with pytest.raises(ValueError, match="'When\\?' is still open"):
        session.pose("Where?")
    visuals = model.visual_tokens([frames[:2], frames[2:5]])
    wanted = told_at_once(session, ["<image>\nWhen?\n<image>"], visuals)
    assert session.ask(keep=False, max_new_tokens=8) == wanted
    assert session.turns == []
    assert session.ask(max_new_tokens=8) == wanted
    assert [turn.question for turn in session.turns] == ["When?"]
    with pytest.raises(ValueError, match="there is no question"):
        session.ask()
    session.pose("Where?")
    session.withdraw()
    session.pose("Which?")


def test_before_any_frame(model):
    session = StreamingSession(model)
    assert session.ask("Hello?", max_new_tokens=8) == model.answer(["Hello?"], max_new_tokens=8)[0]


def test_the_last_frames_alone(model, video):
    """The baseline has no memory: its answer is that of a short clip."""
    session = StreamingSession(model, last_frames=3)
    session.push(video[:9].numpy())
    wanted = model.answer(["What?"], [video[6:9].numpy()], max_new_tokens=8)[0]
    assert session.ask("What?", max_new_tokens=8) == wanted
    assert session.cost.encoded_frames == 3
    session.ask("And?", max_new_tokens=8)
    assert session.cost.encoded_frames == 0
    session.push(video[9].numpy())
    wanted = model.answer(
        [["What?", session.turns[0].answer, "And?", session.turns[1].answer, "<image>\nNow?"]],
        [video[7:10].numpy()],
        max_new_tokens=8,
    )[0]
    assert session.ask("Now?", max_new_tokens=8) == wanted
    remembering = StreamingSession(model, context_frames=3)
    remembering.push(video[:9].numpy())
    assert not torch.allclose(remembering._shown(6, 9), session._clip[1].flatten(0, 1))


def test_a_session_begins_anew(model, video):
    session = StreamingSession(model, context_frames=4)
    first = [session.push(video[:3].numpy()), session.ask("What?", max_new_tokens=8)]
    session.push(video[5:].numpy())
    session.reset()
    assert session.memory_bytes == 0
    assert [session.push(video[:3].numpy()), session.ask("What?", max_new_tokens=8)] == first


def test_sessions_share_a_model(model, video):
    one, two = StreamingSession(model), StreamingSession(model)
    for frame, other in zip(video[:4].numpy(), video[4:8].numpy(), strict=True):
        one.push(frame)
        two.push(other)
    wanted = model.answer(["What?"] * 2, [video[:4].numpy(), video[4:8].numpy()], max_new_tokens=8)
    assert [one.ask("What?", max_new_tokens=8), two.ask("What?", max_new_tokens=8)] == wanted


# -- cost -----------------------------------------------------------------------------------------


def test_asking_encodes_nothing(model, video):
    session = StreamingSession(model)
    session.push(video.numpy())
    assert model.encoded_frames == 16
    for question in ("One?", "Two?", "Three?"):
        session.ask(question, max_new_tokens=4)
    assert model.encoded_frames == 16 and session.cost.encoded_frames == 0


def test_past_turns_are_not_computed_again(model, video):
    session = StreamingSession(model, context_frames=4)
    for number in range(4):
        settled = [text for turn in session.turns[:-1] for text in (turn.question, turn.answer)]
        fixed = render([*settled, "#", None], "qwen_1_5").partition("#")[0]
        session.push(video[number : number + 4].numpy())  # the window moves on
        session.ask("Next?", max_new_tokens=4)
        assert session.cost.reused_tokens == (len(ids_of(session, fixed)) if number else 0)


def test_frames_that_have_not_moved_are_not_computed_again(model, video):
    session = StreamingSession(model, context_frames=16, history="frames")
    for number in range(4):
        session.push(video[4 * number : 4 * number + 4].numpy())
        before = session.cost.prompt_tokens if number else 0
        session.ask("Now?", max_new_tokens=4)
        assert session.cost.reused_tokens >= before


def test_an_open_question_feeds_new_frames_only(model, video):
    session = StreamingSession(model, context_frames=16)
    session.pose("When?")
    session.push(video[:8].numpy())
    session.ask(keep=False, max_new_tokens=2)
    session.push(video[8].numpy())
    session.ask(keep=False, max_new_tokens=2)
    tail = len(ids_of(session, "<|im_end|>\n<|im_start|>assistant\n"))
    assert session.cost.prompt_tokens - session.cost.reused_tokens == 4 + tail + 1


def test_memory_is_flat(model):
    session = StreamingSession(model, context_frames=6)
    frames = torch.randint(0, 256, (50, 32, 32, 3), dtype=torch.uint8)
    sizes = []
    for _ in range(40):
        session.push(frames)
        sizes.append(session.memory_bytes)
    assert session.frames_seen == 2000
    assert len(set(sizes)) == 1
    asked = []
    for _ in range(3):
        session.push(frames)
        session.ask("What?", max_new_tokens=4, keep=False)
        asked.append(session.memory_bytes)
    assert max(asked) < asked[0] * 1.1


def test_the_oldest_turns_are_forgotten(model, video):
    session = StreamingSession(model, context_frames=2, max_length=150)
    session.push(video[:2].numpy())
    for number in range(6):
        session.ask(f"Question {number}?", max_new_tokens=4)
        assert session.cost.prompt_tokens <= 146
    assert 0 < len(session.turns) < 6
    assert session.turns[-1].question == "Question 5?"
    with pytest.raises(ValueError, match="exceed 150.*context_frames=2"):
        session.ask("Why? " * 40)


# -- edges ----------------------------------------------------------------------------------------


def test_pieces_make_the_answer(model, video):
    session = StreamingSession(model)
    session.push(video.numpy())
    whole = session.ask("What?", keep=False, max_new_tokens=12)
    pieces = list(session.reply("What?", max_new_tokens=12))
    assert "".join(pieces).strip() == whole and len(pieces) > 1
    assert session.turns[0].answer == whole
    assert session.cost.first_token_seconds > 0 and session.cost.new_tokens == 12


def test_drawn_answers_differ(model, video):
    session = StreamingSession(model)
    session.push(video.numpy())
    said = {session.ask("What?", keep=False, temperature=3.0, max_new_tokens=8) for _ in range(5)}
    assert len(said) > 1


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"context_frames": 2, "last_frames": 2}, "last_frames=2"),
        ({"history": "all"}, "history='all'"),
        ({"context_frames": 0}, "0 frames|at least 1"),
    ],
)
def test_refusals_name_the_value(model, settings, value):
    with pytest.raises(ValueError, match=value):
        StreamingSession(model, **settings)


def test_a_tower_without_bound_is_refused_and_the_mend_works(model, tmp_path):
    from integrations.videoqa.checkpoints import save_model

    save_model(model, tmp_path)
    model.tower.model.config.window = None
    with pytest.raises(ValueError, match="window=None.*window=64"):
        StreamingSession(model)
    StreamingSession(load_model(tmp_path, window=64)[0])
