"""LLaVA's JSON: shares, conversations, packing; what cannot be read, and what is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backbone.video import VideoWriter
from integrations.videoqa.data import (
    Conversations,
    DataError,
    Encoded,
    Record,
    Source,
    Unreadable,
    Vision,
    collate,
    pack_turns,
    read_records,
    with_times,
)
from integrations.videoqa.frames import read_video
from integrations.videoqa.prompts import training_ids


def talk(*texts: str, **media) -> dict:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": f"r{abs(hash(texts)) % 1000}", "conversations": turns, **media}


def write(path: Path, rows: list[dict], lines: bool = False) -> Path:
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    path.write_text(text)
    return path


@pytest.fixture
def media(tmp_path) -> Path:
    """A folder with a video of eight frames, an image, and a file that is neither."""
    rng = np.random.default_rng(0)
    with VideoWriter(tmp_path / "a.mp4", fps=4) as writer:
        for image in rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8):
            writer.write(image)
    Image.fromarray(rng.integers(0, 256, (40, 90, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "broken.mp4").write_bytes(b"nothing of the kind")
    (tmp_path / "broken.png").write_bytes(b"nothing of the kind")
    return tmp_path


@pytest.fixture
def vision(fresh) -> Vision:
    return Vision.of(fresh())


# -- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("lines", [False, True])
def test_records_of_all_kinds(tmp_path, lines):
    file = write(tmp_path / "mix.json", [
        talk("<image>\nWhat?", "A cat.", "Where?", "There.", video="v/a.mp4"),
        talk("What is it? <image>", "A dog.", image="b.png"),
        talk("Compare.", "Same.", image=["b.png", "c.png"]),
        talk("Why?", "So."),
    ], lines)  # fmt: skip
    video, image, two, text = read_records([Source(file)])
    assert video.media == (("video", tmp_path / "v/a.mp4"),)
    assert video.texts == ("<image>\nWhat?", "A cat.", "Where?", "There.")
    assert image.texts[0] == "<image>\nWhat is it?"
    assert two.media == (("image", tmp_path / "b.png"), ("image", tmp_path / "c.png"))
    assert two.texts[0] == "<image><image>\nCompare."
    assert (text.media, text.texts) == ((), ("Why?", "So."))
    elsewhere = read_records([Source(file, root="/data")])
    assert elsewhere[0].media[0][1] == Path("/data/v/a.mp4")


@pytest.mark.parametrize(
    ("share", "kept"),
    [("all", [0, 1, 2, 3, 4, 5, 6]), ("first:10%", [0]), ("first:30%", [0, 1, 2]),
     ("end:2", [5, 6]), ("first:100", [0, 1, 2, 3, 4, 5, 6]), ("end:50.0%", [3, 4, 5, 6])],
)  # fmt: skip
def test_shares(tmp_path, share, kept):
    """A percentage is rounded up, as in the released mixes."""
    file = write(tmp_path / "d.json", [talk(f"Q{i}", "A") for i in range(7)])
    assert [r.texts[0] for r in read_records([Source(file, share=share)])] == [
        f"Q{i}" for i in kept
    ]


def test_random_shares_follow_the_seed(tmp_path):
    file = write(tmp_path / "d.json", [talk(f"Q{i}", "A") for i in range(50)])
    shares = [[r.texts[0] for r in read_records([Source(file, share="random:20%")], seed)]
              for seed in (0, 0, 1)]  # fmt: skip
    assert len(shares[0]) == 10
    assert shares[0] == shares[1] != shares[2]
    assert shares[0] == sorted(shares[0], key=lambda text: int(text[1:]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (talk("Q", "A", video="a.mp4", image="b.png"), "both a video and an image"),
        (talk("Q", "A", "Q2"), "ends with a question"),
        (talk("<image><image>", "A", video="a.mp4"), "2 placeholders <image> for 1 visuals"),
        (talk("<image>", "A"), "1 placeholders <image> for 0 visuals"),
        ({"id": 3}, r"d.json\[0\] \(3\): 'conversations'"),
        ({"id": 3, "conversations": [{"from": "gpt", "value": "A"}]}, "turns by"),
    ],
)
def test_wrong_records_are_named(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_records([Source(write(tmp_path / "d.json", [row]))])


def test_wrong_files_are_named(tmp_path):
    file = write(tmp_path / "d.json", [talk("Q", "A")])
    with pytest.raises(DataError, match="share='some' means nothing; write all, first:10%"):
        read_records([Source(file, share="some")])
    with pytest.raises(DataError, match="no record to train on"):
        read_records([Source(file, share="first:0")])
    file.write_text('[{"id": 1')
    with pytest.raises(DataError, match=r"d\.json cannot be read as JSON"):
        read_records([Source(file)])
    with pytest.raises(DataError, match=r"gone\.json cannot be read"):
        read_records([Source(tmp_path / "gone.json")])


def test_questions_on_one_video_are_packed():
    one, two = Path("1.mp4"), Path("2.mp4")

    def record(path, *texts):
        return Record("r", (("video", path),), ("<image>\n" + texts[0], *texts[1:]))

    records = [record(one, "a", "A"), record(two, "b", "B"), record(one, "c", "C", "d", "D"),
               record(one, "e", "E"), Record("t", (), ("x", "X")),
               Record("t", (), ("y", "Y"))]  # fmt: skip
    packed = pack_turns(records, 3)
    assert [r.texts for r in packed] == [
        ("<image>\na", "A", "c", "C", "d", "D"), ("<image>\ne", "E"), ("<image>\nb", "B"),
        ("x", "X"), ("y", "Y"),
    ]  # fmt: skip
    assert pack_turns(records, 1) == [records[i] for i in (0, 2, 3, 1, 4, 5)]
    with pytest.raises(DataError, match="at most 0 questions"):
        pack_turns(records, 0)


# -- samples ---------------------------------------------------------------------------------------


def samples(media, vision, fresh_model, rows, **options):
    records = read_records([Source(write(media / "d.json", rows))])
    return Conversations(records, vision, fresh_model.tokenizer, "qwen_1_5", **options)


def test_a_sample_is_what_the_model_takes(media, fresh):
    model = fresh()
    data = samples(media, Vision.of(model), model, [
        talk("<image>\nWhat?", "Noise.", video="a.mp4"),
        talk("<image>\nWhat?", "Noise.", image="a.png"),
        talk("Why?", "So."),
    ])  # fmt: skip
    video, image, text = (data[i] for i in range(3))
    ids, labels = training_ids(["<image>\nWhat?", "Noise."], "qwen_1_5", model.tokenizer)
    assert torch.equal(video["input_ids"], ids)
    assert torch.equal(video["labels"], labels)
    frames, _ = read_video(media / "a.mp4", 4, force_sample=True)
    assert torch.equal(video["visuals"][0], model.preprocess(frames))
    pixels, size = model.preprocess_image(Image.open(media / "a.png"))
    assert torch.equal(image["visuals"][0], pixels)
    assert image["image_sizes"] == [size] == [(90, 40)]
    assert len(pixels) > 1  # tiles
    assert (text["visuals"], text["modalities"]) == ([], [])

    batch = collate([video, image, text], pad_id=256, side="right", stored=False)
    lost = batch.pop("unreadable")
    assert lost == []
    together = model(**batch).loss
    parts = [model(**{k: v for k, v in collate([s], pad_id=256, side="right", stored=False).items()
                      if k != "unreadable"}) for s in (video, image, text)]  # fmt: skip
    counts = [int((s["labels"] != -100).sum()) for s in (video, image, text)]
    mean = sum(p.loss.item() * n for p, n in zip(parts, counts, strict=True)) / sum(counts)
    assert together.item() == pytest.approx(mean, rel=1e-4)


def test_stored_features_stand_for_pixels(media, fresh):
    model = fresh()
    rows = [talk("<image>\nWhat?", "Noise.", video="a.mp4"),
            talk("<image>\nWhat?", "Noise.", image="a.png")]  # fmt: skip
    vision = Vision.of(model)
    plain = samples(media, vision, model, rows)
    known = {}
    for kind, name in (("video", "a.mp4"), ("image", "a.png")):
        pixels, size, _ = vision.read(kind, media / name)
        known[media / name] = Encoded(model.tower_features([pixels], [kind])[0], size)
    stored = samples(media, vision, model, rows, features=known)

    def loss(data, kept):
        batch = collate([data[0], data[1]], pad_id=256, side="right", stored=kept)
        batch.pop("unreadable")
        return model(**batch).loss

    torch.testing.assert_close(loss(plain, False), loss(stored, True))


def test_unreadable_files_leave_the_batch_and_are_named(media, fresh):
    model = fresh()
    data = samples(media, Vision.of(model), model, [
        talk("<image>\nWhat?", "Noise.", video="broken.mp4"),
        talk("<image>\nWhat?", "Noise.", image="broken.png"),
        talk("<image>\nWhat?", "Noise.", video="gone.mp4"),
        talk("<image>\nWhat?", "Noise.", video="a.mp4"),
    ])  # fmt: skip
    rows = [data[i] for i in range(4)]
    assert [isinstance(row, Unreadable) for row in rows] == [True, True, True, False]
    batch = collate(rows, pad_id=256, side="right", stored=False)
    assert [Path(source).name for source, _ in batch["unreadable"]] == [
        "broken.mp4", "broken.png", "gone.mp4",
    ]  # fmt: skip
    assert all(Path(source).name in reason for source, reason in batch["unreadable"])
    assert torch.equal(batch["input_ids"], rows[3]["input_ids"][None])

    empty = collate(rows[:3], pad_id=256, side="right", stored=False)
    assert empty["input_ids"].tolist() == [[256]]
    assert empty["labels"].tolist() == [[-100]]
    empty.pop("unreadable")
    model.train()
    loss = model(**empty, num_items_in_batch=1).loss
    loss.backward()
    assert float(loss) == 0
    grads = [p.grad for p in model.projector.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)


def test_times_stand_behind_the_placeholders(media, fresh):
    model = fresh(time_instruction=True)
    vision = Vision.of(model)
    data = samples(media, vision, model, [talk("<image>\nWhat?", "Noise.", video="a.mp4")])
    _, sampling = read_video(media / "a.mp4", 4, force_sample=True)
    told = f"The video lasts {sampling.duration:.2f} seconds. Of it you see 4 frames"
    text = model.tokenizer.decode([i for i in data[0]["input_ids"].tolist() if i >= 0])
    assert told in text
    assert with_times("<image><image>\nWhat?", "T.") == "<image><image>\nT.\nWhat?"
    assert with_times("What?", "T.") == "T.\nWhat?"
    assert with_times("What?", None) == "What?"
    with pytest.raises(DataError, match="time_instruction needs the frames' times"):
        Conversations(data.records, vision, model.tokenizer, "qwen_1_5", features={})


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_padded_on_the_side_asked_for(side):
    rows = [{"input_ids": torch.arange(n) + 5, "labels": torch.arange(n), "visuals": [],
             "modalities": [], "image_sizes": []} for n in (2, 3)]  # fmt: skip
    batch = collate(rows, pad_id=9, side=side, stored=False)
    short = [9, 5, 6] if side == "left" else [5, 6, 9]
    assert batch["input_ids"].tolist() == [short, [5, 6, 7]]
    assert batch["attention_mask"].tolist()[0] == [int(i != 9) for i in short]
    assert batch["labels"].tolist()[0] == [-100 if i == 9 else i - 5 for i in short]
