"""The whole model: against the published code, and what training and answering promise."""

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch.testing import assert_close

from backbone.video import VideoError, VideoWriter
from integrations.videoqa.configuration import StreamformerLlavaConfig
from integrations.videoqa.frames import VideoClip
from integrations.videoqa.modeling import StreamformerLlavaForConditionalGeneration
from integrations.videoqa.prompts import render, tokenize, training_ids


@pytest.fixture
def film(tmp_path, video):
    path = tmp_path / "film.mp4"
    with VideoWriter(path, 8) as writer:
        for frame in video.numpy():
            writer.write(frame)
    return path


# -- the published code ---------------------------------------------------------------------------


@pytest.mark.golden
def test_end_to_end(tiny):
    _, model, description, tensors = tiny
    ids = tensors["input_ids"]
    text = render([description["question"], None], model.config.template)
    assert text == description["prompt"]
    assert tokenize(text, model.tokenizer) == ids[0].tolist()
    features = model.tower_features([tensors["pixel_values"]])[0]
    assert_close(features[None], tensors["tower_features_offline"], atol=1e-5, rtol=1e-4)
    for case in description["cases"]:
        stem, (first, last) = f"case{case['case']}.", case.get("window", case["frames"])
        seen = [features[first:last]]
        with torch.no_grad():
            batch = model.splice_batch(ids, model.visual_tokens(seen))
            logits = model(ids, visual_features=seen).logits
        assert batch.inputs_embeds.shape[1] == case["n_tokens"]
        wanted = tensors[stem + "inputs_embeds"]
        assert_close(batch.inputs_embeds, wanted, atol=1e-5, rtol=1e-4, msg=case["name"])
        assert_close(logits[:, -1], tensors[stem + "last_logits"], atol=1e-4, rtol=0)
        new = model.generate(ids, model.visual_tokens(seen), max_new_tokens=8)
        assert torch.equal(new, tensors[stem + "greedy_ids"]), case["name"]


@pytest.mark.golden
def test_cuts_of_the_clip_at_once(tiny):
    """Frames in one clip, encoded by forward itself, give what their features give."""
    _, model, description, tensors = tiny
    case = next(c for c in description["cases"] if not c["streaming"] and c["frames"][1] < 5)
    with torch.no_grad():
        out = model(
            tensors["input_ids"], pixel_values=[tensors["pixel_values"][: case["frames"][1]]]
        )
    wanted = tensors[f"case{case['case']}.last_logits"]
    assert_close(out.logits[:, -1], wanted, atol=1e-4, rtol=0)


# -- answering ------------------------------------------------------------------------------------

QUESTIONS = ["What happens?", "Where is the red square, and what is it doing there?", "Why"]


@pytest.mark.parametrize("llm_config", ["qwen2", "llama"], indirect=True)
def test_a_batch_answers_as_one_by_one(fresh, video):
    model, frames = fresh(), [video.numpy(), video.numpy()[3:5], video.numpy()[::-1].copy()]
    alone = [
        model.answer([q], [f], max_new_tokens=12)[0] for q, f in zip(QUESTIONS, frames, strict=True)
    ]
    assert model.answer(QUESTIONS, frames, max_new_tokens=12) == alone
    assert len(set(alone)) == 3


def test_answers_depend_on_the_frames_and_their_order(fresh, video):
    model, clips = fresh(), [video.numpy(), video.numpy()[::-1].copy(), video.numpy()[:4]]
    scores = model.score(QUESTIONS[:1] * 3, ["yes"] * 3, clips)
    assert len({round(score.loglikelihood, 3) for score in scores}) == 3


def test_texts_several_visuals_and_turns(fresh, video):
    model, clip, image = fresh(), video.numpy()[:2], Image.fromarray(video[0].numpy())
    answers = model.answer(
        [
            "No picture at all?",
            "<image>\nFirst this, then <image>\nthat?",
            ["What?", "A square.", "Sure?"],
            ["Hello.", "Hi.", "<image>\nAnd this?"],
        ],
        [None, [clip, image], clip, image],
        max_new_tokens=4,
    )
    assert len(answers) == 4
    with pytest.raises(ValueError, match="prompt 1 has 1 placeholders <image> and 2 visuals"):
        model.answer(["a", "<image> b"], [clip, [clip, clip]])
    with pytest.raises(ValueError, match="2 prompts and visuals for 1"):
        model.answer(["a", "b"], [clip])
    with pytest.raises(ValueError, match="2 texts does not end with the user"):
        model.answer([["a", "b"]], [clip])


def test_a_video_is_encoded_once(fresh, film):
    model = fresh(num_frames=6)
    first = model.answer(QUESTIONS, [film] * 3, max_new_tokens=4)
    assert model.encoded_frames == 6
    assert model.answer(QUESTIONS, [str(film)] * 3, max_new_tokens=4) == first
    assert model.encoded_frames == 6
    model.answer(QUESTIONS[:1], [VideoClip(film, 0.5, 1.0)], max_new_tokens=1)
    assert model.encoded_frames == 12
    tokens, sampling = model.encode_file(film)
    assert tokens.shape == (6 * 4, 32) and len(sampling.times) == 6
    model.visual_cache.capacity = 1
    model.encode_file(VideoClip(film, 0.0, 1.0))
    model.encode_file(film)
    assert model.encoded_frames == 24  # the first one was forgotten for the other


def test_a_broken_video_is_never_answered_for(fresh, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(VideoError, match="broken.mp4"):
        fresh().answer(["What?"], [tmp_path / "broken.mp4"])


def test_an_answer_ends_where_it_is_told(fresh, video):
    model, clip = fresh(), video.numpy()[:3]
    whole = model.answer(["What?"], [clip], max_new_tokens=12)[0]
    middle = whole[2:4]
    assert model.answer(["What?"], [clip], until=[middle], max_new_tokens=12) == [
        whole[: whole.index(middle)].strip()
    ]


def test_an_unknown_setting_is_refused(fresh, video):
    with pytest.raises(ValueError, match="max_newtokens"):
        fresh().answer(["What?"], [video.numpy()[:3]], max_newtokens=8)


def test_times_stand_in_the_prompt_if_wanted(fresh, film):
    model = fresh(num_frames=2, time_instruction=True)
    text = model._prompts(["What?"], [film])[0][0]
    assert "<image>\nThe video lasts 2.00 seconds" in text and "0.00s,1.88s" in text
    assert text.index("1.88s") < text.index("What?")


def test_scores_are_those_of_the_loss(fresh, video):
    model, clips = fresh(), [video.numpy()[:3], video.numpy()[4:6]]
    answers = ["A square.", "no"]
    scores = model.score(QUESTIONS[:2], answers, clips)
    for question, answer, clip, score in zip(QUESTIONS, answers, clips, scores, strict=False):
        ids, labels = training_ids([f"<image>\n{question}", answer], "qwen_1_5", model.tokenizer)
        with torch.no_grad():
            loss = model(ids[None], labels=labels[None], pixel_values=[model.preprocess(clip)]).loss
        assert score.tokens == (labels != -100).sum()
        assert score.loglikelihood == pytest.approx(-float(loss) * score.tokens, rel=1e-4)
        assert not score.greedy
    said = model.answer(QUESTIONS[:1], clips[:1], max_new_tokens=200)
    likely = model.score(QUESTIONS[:1], said, clips[:1])[0]
    assert likely.loglikelihood / likely.tokens > scores[0].loglikelihood / scores[0].tokens


def test_the_likeliest_choice_is_taken(fresh, video):
    model, clips = fresh(), [video.numpy()[:3], video.numpy()[4:6]]
    choices = ["no", "A square.", "yes"], ["two", "A circle moves.", "no", "yes"]
    chosen = model.choose(QUESTIONS[:2], choices, clips)
    for question, offered, clip, choice in zip(QUESTIONS, choices, clips, chosen, strict=False):
        scores = model.score([question] * len(offered), offered, [clip] * len(offered))
        assert choice == max(zip(scores, offered, strict=True), key=lambda x: x[0].loglikelihood)[1]
    # Prompts of unequal lengths, one without a video; visuals are encoded and prompts read once.
    asked, seen = [*QUESTIONS[:2], "A much longer question, of no video at all?"], [*clips, None]
    words = ["red", "no no no", "blue", "A square moves.", "yes"]
    offered = [words[n:] + words[:n] for n in range(3)]
    for question, own, clip, choice in zip(
        asked, offered, seen, model.choose(asked, offered, seen), strict=True
    ):
        scores = model.score([question] * 5, own, [clip] * 5)
        assert choice == max(zip(scores, own, strict=True), key=lambda x: x[0].loglikelihood)[1]
    assert model.choose(QUESTIONS[:1], [["yes"]], clips[:1]) == ["yes"]
    with pytest.raises(ValueError, match="prompt 1 has no choices"):
        model.choose(QUESTIONS[:2], [["yes"], []], clips)


# -- images ---------------------------------------------------------------------------------------


def test_images_are_tiled_and_their_tiles_alone(fresh):
    model = fresh()
    picture = torch.randint(0, 256, (40, 90, 3), dtype=torch.uint8).numpy()
    pixels, size = model.preprocess_image(Image.fromarray(picture))
    assert pixels.shape == (3, 3, 32, 32) and size == (90, 40)
    tokens = model.encode_image(Image.fromarray(picture))
    # 90 x 40 fills 3 rows of 8 patches and a part of the fourth; each ends with a newline.
    assert tokens.shape == (16 + 4 * 9, 32)
    features = model.tower_features([pixels], ["image"])[0]
    assert_close(features[1], model.tower_features([pixels[1:2]])[0][0])
    square = fresh(image_layout="square").encode_image(Image.fromarray(picture))
    assert square.shape == (16 + 1, 32)


def test_videos_and_images_in_one_batch(fresh, video):
    """Clips of one length run together, and come back in order."""
    model = fresh()
    image, size = model.preprocess_image(Image.fromarray(video[0].numpy()))
    clips = [model.preprocess(video[:3]), model.preprocess(video[5:8]), model.preprocess(video[:1])]
    together = model.tower_features(
        [clips[0], image, clips[1], clips[2]], ["video", "image"] + ["video"] * 2
    )
    alone = [model.tower_features([clips[0]]), model.tower_features([image], ["image"])]
    alone += [model.tower_features([clips[1]]), model.tower_features([clips[2]])]
    for found, wanted in zip(together, alone, strict=True):
        assert_close(found, wanted[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="modality 'sound'"):
        model.visual_tokens(together[:1], ["sound"])
    assert size == (48, 40)


def test_frame_tokens(fresh, video):
    model = fresh(frame_token=True, newline_position="frame")
    tokens = model.encode_video(video[:3].numpy())
    assert tokens.shape == (3 * (1 + 4 + 1), 32)
    features = model.tower_features([model.preprocess(video[:3])])[0]
    assert_close(tokens[0], model.projector(features[0, 0]))
    assert_close(tokens[5], model.image_newline.data)


# -- training -------------------------------------------------------------------------------------


def example(model, video, texts=("<image>\nWhat?", "A square.")):
    ids, labels = training_ids(texts, model.config.template, model.tokenizer)
    return {"input_ids": ids[None], "labels": labels[None]}, [model.preprocess(video[:4])]


@pytest.mark.parametrize(
    "parts", [("projector",), ("language_model",), ("projector", "language_model")]
)
def test_training_changes_what_it_shall(fresh, video, parts):
    model = fresh(newline_position="frame")
    model.train()
    model.train_only(*parts)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    batch, clips = example(model, video)
    optimiser = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.1)
    model(**batch, pixel_values=clips).loss.backward()
    optimiser.step()
    for name, weight in model.state_dict().items():
        part = "language_model" if name == "image_newline" else name.partition(".")[0]
        if part != "language_model" or "embed" not in name:
            assert torch.equal(weight, before[name]) == (part not in parts), name
    assert not model.tower.model.training


def test_every_part_takes_part(fresh, video):
    """In a row without visuals too, or processes that train together would wait forever."""
    model = fresh()
    model.train()
    model.train_only("projector", "language_model")
    batch, _ = example(model, video, ["No picture?", "None."])
    model(**batch).loss.backward()
    assert [n for n, w in model.named_parameters() if w.requires_grad and w.grad is None] == []
    assert float(model.projector[0].weight.grad.abs().sum()) == 0.0


def test_the_loss_is_that_of_the_targets(fresh, video):
    model = fresh()
    batch, clips = example(model, video)
    with torch.no_grad():
        out = model(**batch, pixel_values=clips)
        halved = model(**batch, pixel_values=clips, num_items_in_batch=2 * 10).loss
    targets = batch["labels"][batch["labels"] != -100]
    predicted = out.logits[0, -len(targets) - 2 : -2].log_softmax(-1)  # a newline ends the turn
    assert len(targets) == 10
    wanted = -predicted.gather(1, targets[:, None]).mean()
    assert_close(out.loss, wanted)
    assert_close(halved, wanted / 2)


def test_features_stand_for_frames(fresh, video):
    model = fresh()
    batch, clips = example(model, video)
    with torch.no_grad():
        features = model.tower_features(clips)
        assert_close(
            model(**batch, visual_features=features).loss, model(**batch, pixel_values=clips).loss
        )
    with pytest.raises(ValueError, match="not both"):
        model(**batch, visual_features=features, pixel_values=clips)


def test_a_few_steps_learn_an_answer(fresh, video):
    model = fresh()
    model.train()
    model.train_only("projector", "language_model")
    batch, clips = example(model, video, ["<image>\nWhat?", "cat"])
    optimiser = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=5e-3)
    for _ in range(30):
        optimiser.zero_grad()
        model(**batch, pixel_values=clips).loss.backward()
        optimiser.step()
    assert model.eval().answer(["What?"], [video[:4].numpy()], max_new_tokens=8) == ["cat"]


def test_gradient_checkpointing_changes_nothing(fresh, video):
    model = fresh()
    model.train()
    model.train_only("projector", "language_model")
    batch, clips = example(model, video)
    grads = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        model.zero_grad()
        model(**batch, pixel_values=clips).loss.backward()
        grads.append(model.projector[0].weight.grad.clone())
    assert_close(*grads)
    assert float(grads[0].abs().sum()) > 0


def test_lora_trains_alone_and_merges(fresh, video):
    model = fresh()
    batch, clips = example(model, video)
    with torch.no_grad():
        before = model(**batch, pixel_values=clips).logits
        model.add_lora(4, alpha=8)
        assert_close(model(**batch, pixel_values=clips).logits, before)
    model.train_only("language_model")
    trained = {n for n, w in model.named_parameters() if w.requires_grad}
    assert all(".lora_" in name or name == "image_newline" for name in trained)
    assert len(trained) == 2 * 7 * 2 + 1
    optimiser = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=1.0)
    for _ in range(2):
        optimiser.zero_grad()
        model.train()(**batch, pixel_values=clips).loss.backward()
        optimiser.step()
    with pytest.raises(ValueError, match="rank 4 already"):
        model.add_lora(2)
    with torch.no_grad():
        adapted = model.eval()(**batch, pixel_values=clips).logits
        assert not torch.allclose(adapted, before, atol=1e-3)
        model.merge_lora()
        assert_close(model(**batch, pixel_values=clips).logits, adapted, atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name in model.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types(fresh, video, dtype):
    model = fresh(dtype=dtype)
    assert {w.dtype for w in model.parameters()} == {dtype}
    model.tower.to(torch.float16)  # as the released code has it, whatever the LLM's type
    assert len(model.answer(QUESTIONS[:2], [video[:3].numpy()] * 2, max_new_tokens=3)) == 2


def test_fresh_weights_are_each_parts_own(llm_config):
    llm_config.hidden_size = 256
    model = StreamformerLlavaForConditionalGeneration(
        StreamformerLlavaConfig(text_config=llm_config, tower_size=64)
    )
    model.requires_grad_(False)
    llm = model.language_model.model.layers[0].mlp.up_proj.weight
    assert float(llm.std()) == pytest.approx(0.02, rel=0.1)  # the LLM's initializer_range
    assert float(model.projector[0].weight.std()) == pytest.approx((3 * 64) ** -0.5, rel=0.1)
    assert float(model.image_newline.norm()) == pytest.approx(1.0, rel=0.2)


# -- config ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "value"),
    [
        ({"pool_stride": 0}, "pool_stride=0"),
        ({"num_frames": 0}, "num_frames=0"),
        ({"video_fps": -1}, "video_fps=-1"),
        ({"lora_rank": -1}, "lora_rank=-1"),
        ({"grid_pinpoints": []}, "grid_pinpoints"),
        ({"pool_mode": "median"}, "pool_mode"),
    ],
)
def test_config_refuses(fields, value):
    # An error of their own, of no common base, for types.
    with pytest.raises((ValueError, StrictDataclassError), match=value):
        StreamformerLlavaConfig(**fields)


def test_refusals_name_the_mend(fresh):
    with pytest.raises(ValueError, match="checkpoints.build_model"):
        StreamformerLlavaForConditionalGeneration(StreamformerLlavaConfig())
    model = fresh()
    with pytest.raises(ValueError, match=r"\['tower'\]"):
        model.train_only("tower")
    model.tokenizer = None
    with pytest.raises(ValueError, match="checkpoints.load_model"):
        model.answer(["What?"], [np.zeros((1, 8, 8, 3), np.uint8)])
