"""Prompts, tokens and targets, against the published code and by properties."""

import pytest

from integrations.videoqa import prompts
from integrations.videoqa.prompts import TEMPLATES, read_conversation, render, training_ids


@pytest.mark.golden
def test_prompts(golden_file):
    for case in golden_file("prompts")[0]["prompts"]:
        assert render(case["messages"], case["template"]) == case["prompt"]
        assert TEMPLATES[case["template"]].stop == case["stop_string"]


@pytest.mark.golden
def test_tokens_around_placeholders(golden_file, golden_tokenizer):
    for case in golden_file("prompts")[0]["tokenize"]:
        tokenizer = golden_tokenizer(case["tokenizer"])
        assert prompts.tokenize(case["prompt"], tokenizer) == case["input_ids"], case["prompt"]


@pytest.mark.golden
def test_targets(golden_file, golden_tokenizer):
    for case in golden_file("labels")[0]:
        texts = read_conversation(case["conversation"])
        assert texts == [turn["value"] for turn in case["normalised"]]
        ids, labels = training_ids(
            texts, case["template"], golden_tokenizer(case["tokenizer"]), released_targets=True
        )
        assert ids.tolist() == case["input_ids"]
        assert labels.tolist() == case["labels"], (case["template"], texts)


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_targets_are_the_replies_alone(golden_tokenizer, template, tokenizer):
    form, coder = TEMPLATES[template], golden_tokenizer(tokenizer)
    texts = ["<image>\nWhat\nis it?", "A cat.", "And <now>?", "No."]
    ids, labels = training_ids(texts, template, coder)
    learnt = labels[labels != -100]
    said = [form.before_reply + text + form.stop for text in texts[1::2]]
    assert coder.decode(learnt).replace(" ", "") == "".join(said).replace(" ", "")
    assert ids[labels != -100].tolist() == learnt.tolist()
    assert ids.tolist() == prompts.tokenize(render(texts, template), coder)


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_a_prompt_is_the_beginning_of_its_conversation(template):
    texts = ["<image>\nFirst?", "one", "Second?", "two"]
    whole = render(texts, template)
    assert whole.startswith(render([*texts[:3], None], template))
    assert whole.startswith(render([texts[0], None], template))


def test_the_question_of_a_caption_is_not_said():
    assert render(["<image>\nDescribe.", "A cat."], "plain") == "<image>A cat.\n"


def test_braces_and_own_system():
    assert render(["{text} {0}", None], "qwen_1_5", system="Be {brief}.").startswith(
        "<|im_start|>system\nBe {brief}.<|im_end|>\n<|im_start|>user\n{text} {0}"
    )


def test_placeholders_of_a_question():
    assert prompts.question_text("Why?") == "<image>\nWhy?"
    assert prompts.question_text("Why?", 2) == "<image><image>\nWhy?"
    assert prompts.question_text("Why?", 0) == "Why?"
    assert prompts.question_text("First <image> then <image>", 2) == "First <image> then <image>"
    told = prompts.question_text("Why?", 1, prompts.time_sentence(2.5, "0.00s,1.25s", 2))
    assert told.startswith("<image>\n") and told.endswith("\nWhy?")
    assert "2.50 seconds" in told and "2 frames" in told and "0.00s,1.25s" in told


@pytest.mark.parametrize("messages", [[], [None], ["a", None, "b"], ["a", "b", None]])
def test_conversations_out_of_order(messages):
    with pytest.raises(ValueError, match="in turns"):
        render(messages, "v1")


def test_refusals_name_the_value():
    with pytest.raises(ValueError, match="'qwen'.*known are.*qwen_1_5"):
        render(["a", None], "qwen")
    with pytest.raises(ValueError, match=r"\['gpt', 'human'\]"):
        read_conversation([{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}])
