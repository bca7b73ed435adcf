"""Questions about miniworld: true, balanced, not answered by words alone; and their files."""

import hashlib
import importlib.util
import json
import os
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from backbone import video
from experiments.miniworld import PRETRAINING_ACTIONS, WorldParams
from experiments.miniworld import qa as rendering
from experiments.miniworld.actions import SHOWN
from experiments.miniworld.qa import (
    QaParams,
    all_texts,
    caption_stills,
    plan_qa,
    qa_key,
    render_qa,
)
from experiments.miniworld.qa_language import (
    FORMS,
    KINDS,
    LETTERS,
    MOTION,
    PRESENT,
    Question,
    balance,
    is_right,
    prompt,
    right_answer,
    write_questions,
)
from experiments.miniworld.qa_model import MiniLlm, build_tokenizer, calm, llm_config
from experiments.miniworld.qa_offer import VARIABLE, offer, write_offer
from integrations.videoqa.checkpoints import build_model, load_model, save_model
from integrations.videoqa.data import Source
from integrations.videoqa.evaluate import evaluate
from integrations.videoqa.train import StageConfig, run_stage

ROOT = Path(__file__).resolve().parents[2]
TINY = QaParams(train=24, val=8, test=12)
LOOKS = replace(WorldParams(), camouflaged=0.0)
ALL_SEEN = (99, 99, 99, 99)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return render_qa(tmp_path_factory.mktemp("qa"), TINY, workers=1)


@pytest.fixture(scope="module")
def scripted() -> dict[str, list]:
    """Scenes and balanced questions of more videos than a test would draw."""
    params = QaParams(train=440, val=0, test=132)
    splits = defaultdict(list)
    for job in plan_qa(params):
        rng = Random(f"{job.split}{job.index}")
        scene = rendering._write(rng, job, params, LOOKS)
        asked = write_questions(rng, job.name, scene, ALL_SEEN[: len(scene.items)], 32)
        splits[job.split].append((job, scene, asked))
    for split in ("train", "test"):
        asked = [question for *_, questions in splits[split] for question in questions]
        splits[f"{split} questions"] = balance(Random(0), asked, 8, params.frames)
    return splits


def read(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text())


# -- what is asked ---------------------------------------------------------------------------------


def test_answers_are_true(scripted):
    asked = Counter()
    for job, scene, questions in scripted["train"]:
        first, last = job.actions
        for q in questions:
            asked[q.kind] += 1
            if q.kind in ("first", "before"):
                assert q.answer == first
            if q.kind in ("last", "now"):
                assert q.answer == last
            if q.kind == "order":
                assert q.answer == f"{first} then {last}"
            if q.kind == "direction":
                running = q.when == PRESENT
                segment = scene.segments[1 if running else -1]
                moves = [s for s in scene.segments if (s.end == scene.end) == running]
                assert f"move {q.answer}" in [s.action for s in moves], segment
            if q.kind == "count":
                assert ("one", "two", "three", "four").index(q.answer) + 1 == len(scene.items)
            if q.kind == "colour":
                colours = {item.colour for item in scene.items}
                assert q.answer in colours
                assert not colours & set(q.wrong)
            if q.kind == "place":
                colour = q.question.split()[3]
                (k,) = [k for k, item in enumerate(scene.items) if item.colour == colour]
                x, y, *_ = scene.tracks[k, -1 if q.when == PRESENT else 0]
                row, column = "top" if y < 16 else "bottom", "left" if x < 16 else "right"
                assert q.answer == f"{row} {column}"
    assert set(asked) == set(KINDS)


def test_half_of_the_videos_end_while_the_second_action_goes_on(scripted):
    for job, scene, questions in scripted["train"]:
        ends = [segment.end for segment in scene.segments]
        assert tuple(segment.action for segment in scene.segments) == job.actions
        assert (ends[1] == scene.end) == job.running
        assert ends[0] <= scene.segments[1].start
        kinds = {q.kind for q in questions}
        assert {"now", "before"} <= kinds if job.running else {"first", "last", "order"} <= kinds
    assert sum(job.running for job, *_ in scripted["train"]) == 220


def test_what_is_hidden_at_the_end_is_not_asked_for(scripted):
    _, scene, _ = next(row for row in scripted["train"] if len(row[1].items) == 2)
    kinds = {q.kind for q in write_questions(Random(0), "v", scene, (99, 3), 32)}
    assert not kinds & {"colour", "count"}
    hidden = replace(scene, tracks=scene.tracks.copy())
    hidden.tracks[0, -1, SHOWN] = 0
    kinds = {q.kind for q in write_questions(Random(0), "v", hidden, (99, 99), 32)}
    assert not kinds & {"colour", "count"}


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_balanced(scripted, split):
    records = scripted[f"{split} questions"]
    groups = defaultdict(Counter)
    letters = defaultdict(Counter)
    for record in records:
        groups[record["kind"], record["when"]][record["answer"]] += 1
        letters[record["kind"], record["when"]][record["letter"]] += 1
        assert record["options"][LETTERS.index(record["letter"])] == record["answer"]
        assert len(set(record["options"])) == 4
        assert record["group"] == KINDS[record["kind"]]
    for (kind, _), answers in groups.items():
        if kind != "order":
            assert len(set(answers.values())) == 1, (kind, answers)
    for counts in letters.values():
        assert max(counts.values()) - min(counts[letter] for letter in LETTERS) <= 1
    assert len({record["id"] for record in records}) == len(records)


def test_words_alone_do_not_tell_the_answer(scripted):
    """Learn from questions without videos how often each answer is right when it is offered.

    One in four is chance and 30 in a hundred the bound; ``1 / sqrt(n)`` is more than two standard
    errors of an accuracy over ``n`` questions.
    """
    offered, right = Counter(), Counter()
    for record in scripted["train questions"]:
        for place, option in enumerate(record["options"]):
            for clue in _clues(record, place, option):
                offered[clue] += 1
                right[clue] += option == record["answer"]

    def belief(record, place, option) -> float:
        rates = [(right[c] + 1) / (offered[c] + 4) for c in _clues(record, place, option)]
        return float(np.log(rates).sum())

    hits = defaultdict(list)
    for record in scripted["test questions"]:
        beliefs = [belief(record, place, o) for place, o in enumerate(record["options"])]
        guess = record["options"][int(np.argmax(beliefs))]
        hits[record["group"]].append(guess == record["answer"])
    for group, values in hits.items():
        assert np.mean(values) <= 0.30 + 1 / np.sqrt(len(values)), group


def _clues(record: dict, place: int, option: str) -> list[tuple]:
    """What a blind model may look at: words, the place, what the options share."""
    words = Counter(word for o in record["options"] for word in o.split(" then "))
    shared = tuple(words[word] for word in option.split(" then "))
    kind = record["kind"]
    return [(kind, option), (kind, place), (kind, "shared", shared), (record["question"], option)]


def test_order_cannot_be_told_from_what_the_options_share(scripted):
    for record in scripted["test questions"]:
        if record["kind"] == "order":
            pairs = [option.split(" then ") for option in record["options"]]
            assert sorted(pairs) == sorted(pair[::-1] for pair in pairs)
            counts = Counter(word for pair in pairs for word in pair)
            assert sorted(counts.values()) == [2, 2, 4]


def test_actions_are_equally_often_first_and_second():
    jobs = plan_qa(QaParams(train=440, val=0, test=0))
    for running in (False, True):
        for place in (0, 1):
            counts = Counter(job.actions[place] for job in jobs if job.running == running)
            assert set(counts.values()) == {20}
            assert set(counts) == set(PRETRAINING_ACTIONS)
    assert all(first != second for first, second in (job.actions for job in jobs))


def test_too_many_of_an_answer_are_left_out():
    asked = [Question(f"v{i}", "direction", "past", "?", way, ("a", "b", "c"))
             for i, way in enumerate(["left"] * 5 + ["right"] * 2)]  # fmt: skip
    kept = balance(Random(0), asked, 8, 16)
    assert Counter(record["answer"] for record in kept) == {"left": 2, "right": 2}
    assert {record["time"] for record in kept} == {2.0}


# -- forms -----------------------------------------------------------------------------------------

RECORD = {"question": "Which way?", "options": ["up", "down", "left", "right"], "answer": "left",
          "letter": "C"}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "text", "right", "wrong"),
    [
        ("word", "Which way? Choose: up; down; left; right.", "left", "C"),
        ("open", "Which way?", " Left.\n", "left right"),
        ("letter", "Which way?\nA. up\nB. down\nC. left\nD. right\nAnswer with the letter.",
         "The answer is C", "B"),
    ],
)  # fmt: skip
def test_forms_of_a_question(form, text, right, wrong):
    assert prompt(RECORD, form) == text
    assert is_right(RECORD, right_answer(RECORD, form), form)
    assert is_right(RECORD, right, form)
    assert not is_right(RECORD, wrong, form)
    assert not is_right(RECORD, "", form)


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form='letters' .* word, open, letter"):
        prompt(RECORD, "letters")


# -- files -----------------------------------------------------------------------------------------


def test_the_same_parameters_give_the_same_bytes(folder, tmp_path):
    again = render_qa(tmp_path, TINY, workers=2)
    assert again.name == folder.name

    def contents(root: Path) -> dict[str, str]:
        return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in root.rglob("*") if path.is_file()}  # fmt: skip

    assert contents(again) == contents(folder)
    assert render_qa(tmp_path, TINY) == again  # reused
    assert not list(tmp_path.glob(".*"))


def test_the_key_follows_looks_and_parameters_but_not_counts_of_the_world():
    key = qa_key(TINY, LOOKS)
    assert qa_key(TINY, replace(LOOKS, stills_train=1, clips_val=3, seed=9)) == key
    assert qa_key(TINY, replace(LOOKS, noise=0.5)) != key
    assert qa_key(replace(TINY, seed=1), LOOKS) != key


def test_videos_hold_what_the_parameters_say(folder):
    facts = json.loads((folder / "world.json").read_text())
    assert {split: facts["counts"][split]["videos"] for split in ("train", "val", "test")} == {
        "train": 24, "val": 8, "test": 12,
    }  # fmt: skip
    for split in ("train", "val", "test"):
        for record in read(folder, split):
            assert f"qa_{split}_" in record["video"]
    with video.open_video(folder / read(folder, "test")[0]["video"]) as reader:
        assert (reader.width, reader.height, reader.num_frames, reader.fps) == (32, 32, 16, 8)


@pytest.mark.parametrize("form", FORMS)
def test_training_data_are_conversations_in_llava_json(folder, form):
    questions, talks = read(folder, "train"), read(folder, f"questions_{form}_train")
    turns = [(talk["video"], human["value"].removeprefix("<image>\n"), reply["value"])
             for talk in talks
             for human, reply in zip(talk["conversations"][::2], talk["conversations"][1::2],
                                     strict=True)]  # fmt: skip
    assert Counter(turns) == Counter(
        (q["video"], prompt(q, form), right_answer(q, form)) for q in questions
    )
    assert len({talk["id"] for talk in talks}) == len(talks)
    for talk in [*talks, *read(folder, "captions_train")]:
        assert (folder / talk["video"]).is_file()
        values = [turn["value"] for turn in talk["conversations"]]
        assert values[0].startswith("<image>")
        assert sum(value.count("<image>") for value in values) == 1
        assert [turn["from"] for turn in talk["conversations"][:2]] == ["human", "gpt"]
    assert any("Choose" in text for text in all_texts(folder))


def test_stills_become_image_records(tmp_path):
    (tmp_path / "stills").mkdir()
    (tmp_path / "stills" / "val.csv").write_text(
        "image,caption,shape,colour\nval/0.jpg,a red bar,bar,red\n"
    )
    (record,) = caption_stills(tmp_path, "val")
    assert record["image"] == "val/0.jpg"
    assert record["conversations"] == [
        {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a red bar"},
    ]  # fmt: skip


def test_two_actions_must_fit(tmp_path):
    with pytest.raises(ValueError, match="QaParams.frames=12 must hold two actions"):
        render_qa(tmp_path, replace(TINY, frames=12))
    with pytest.raises(ValueError, match="QaParams.val=-1"):
        QaParams(val=-1)


# -- the task --------------------------------------------------------------------------------------


@pytest.fixture
def utils(folder):
    spec = importlib.util.spec_from_file_location("qa_utils", folder / "lmms" / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_task_lies_beside_its_data(folder, utils):
    doc = read(folder, "test")[0]
    (path,) = utils.doc_to_visual(doc)
    assert Path(path).is_file()
    assert utils.doc_to_text(doc, {"form": "open"}) == doc["question"]
    scores = utils.score_word(doc, [doc["answer"]])
    assert set(scores.values()) == {1.0}
    assert {"accuracy", doc["kind"], doc["group"], doc["when"]} < set(scores)
    assert set(utils.score_letter(doc, ["nothing"]).values()) == {0.0}
    assert utils.percent([1.0, 0.0, 1.0, 1.0]) == 75.0


def test_every_metric_is_declared(folder):
    declared = {
        line.split("metric: ")[1].split(",")[0]
        for line in (folder / "lmms" / "_miniworld_qa_yaml").read_text().splitlines()
        if "metric: " in line
    }
    names = {"accuracy"}
    for record in read(folder, "train"):
        names |= {record["kind"], record["group"], record["when"]}
        names.add(f"{record['group']}_{record['when']}")
    assert names <= declared
    assert MOTION in declared


def test_an_offer_is_what_the_job_recorded(folder, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    none = offer()
    assert none["pretrained"] is None
    assert "run.py videoqa" in none["advice"]
    assert str(tmp_path) in none["advice"]
    assert list(Path(none["tasks"][0]).glob("miniworld_qa.yaml"))
    model = tmp_path / "model"
    model.mkdir()
    write_offer(tmp_path, folder, model)
    made = offer()
    assert made["tasks"] == [str(tmp_path / Path(made["tasks"][0]).relative_to(tmp_path))]
    assert Path(made["tasks"][0]).resolve() == (folder / "lmms").resolve()
    assert Path(made["pretrained"]) == model.resolve()


# -- with a model ----------------------------------------------------------------------------------


@pytest.fixture
def mini(folder, tmp_path):
    """A mini LLaVA on a SigLIP that has never been trained."""
    torch.manual_seed(0)
    SiglipVisionModel(
        SiglipVisionConfig(image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1,
                           num_attention_heads=2, intermediate_size=32)
    ).save_pretrained(tmp_path / "siglip")  # fmt: skip
    size = MiniLlm(width=32, layers=2, heads=2, mlp=64)
    tokenizer = build_tokenizer(all_texts(folder))
    model, _ = build_model(
        llm_config(tokenizer, size), f"siglip:{tmp_path / 'siglip'}", tokenizer,
        template=size.template, num_frames=4, image_layout="square",
    )  # fmt: skip
    return model


def test_the_tokenizer_knows_every_word_and_gives_answers_back(folder):
    tokenizer = build_tokenizer(all_texts(folder))
    assert len(tokenizer) < 200
    for record in read(folder, "train"):
        for form in FORMS:
            told = right_answer(record, form)
            ids = tokenizer(f"USER: {prompt(record, form)} ASSISTANT: {told}</s>")
            assert tokenizer.unk_token_id not in ids.input_ids
            assert ids.input_ids[-1] == tokenizer.eos_token_id
        said = tokenizer.decode(tokenizer(f" {record['answer']}</s>").input_ids,
                                skip_special_tokens=True)  # fmt: skip
        assert is_right(record, said)


def test_a_calm_model_begins_close_to_its_embeddings(mini):
    llm, ids = mini.language_model, torch.arange(20)[None]
    embedded = llm.get_input_embeddings()(ids)

    def added():
        layers = llm(ids, output_hidden_states=True).hidden_states
        return (layers[1] - embedded).norm() / embedded.norm()

    with torch.no_grad():
        before, weights = added(), {n: p.clone() for n, p in llm.named_parameters()}
        calm(llm)
        assert added() < 0.6 * before
    changed = {n for n, p in llm.named_parameters() if not torch.equal(p, weights[n])}
    assert changed == {n for n in weights if n.endswith(("o_proj.weight", "down_proj.weight"))}


def test_captions_and_questions_train_a_model(folder, mini, tmp_path):
    stage = StageConfig(template="brief", lr=3e-3, batch_size=8, per_device=8, updates=6,
                        image_layout="square", num_frames=4, store_features=True,
                        gradient_checkpointing=False)  # fmt: skip
    losses = []
    for name in ("captions_train", "questions_word_train"):
        sources = [Source(folder / f"{name}.json")]
        trainer = {"use_cpu": True, "disable_tqdm": True}
        losses += [run_stage(mini, stage, sources, tmp_path / name, trainer=trainer)["loss"]]
    assert losses[1] < losses[0]
    model, tokenizer = load_model(tmp_path / "questions_word_train")
    text = "USER: Which way? Choose: top left; red. ASSISTANT: top left</s>"
    ids = tokenizer(text).input_ids
    assert ids == mini.tokenizer(text).input_ids, "a loaded tokenizer is the one that was trained"
    assert tokenizer.decode(ids[-3:], skip_special_tokens=True) == "top left"
    record = read(folder, "test")[0]
    (said,) = model.answer([prompt(record)], [str(folder / record["video"])], max_new_tokens=4)
    assert isinstance(said, str)


def test_after_the_job_the_task_needs_no_argument(folder, mini, tmp_path):
    """lmms-eval itself, on the task and model that the job's record names."""
    save_model(mini, tmp_path / "model")
    write_offer(tmp_path, folder, tmp_path / "model")
    facts = tmp_path / "site" / "offer-0.dist-info"  # as if installed, where it is not
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: offer\nVersion: 0\n")
    (facts / "entry_points.txt").write_text(
        "[streamformer.videoqa]\nminiworld = experiments.miniworld.qa_offer:offer\n"
    )
    found = evaluate(
        ["miniworld_qa", "miniworld_qa_letter"],
        {},
        tmp_path / "out",
        batch_size=8,
        environment={
            "HF_HOME": str(tmp_path / "hf"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(facts.parent)]),
            VARIABLE: str(tmp_path),
        },
        offline=True,
    )
    questions = read(folder, "test")
    metrics = found.metrics("miniworld_qa")
    rows = [json.loads(line) for line in found.samples["miniworld_qa"].open()]
    assert len(rows) == len(questions)
    by_id = {str(n): record for n, record in enumerate(questions)}
    hits = [is_right(by_id[str(row["doc_id"])], row["filtered_resps"]) for row in rows]
    assert 0 < metrics["accuracy"] == pytest.approx(100 * np.mean(hits))
    asked = {record["kind"] for record in questions} | {record["group"] for record in questions}
    assert asked <= set(metrics)
    assert "accuracy" in found.metrics("miniworld_qa_letter")
