"""The server's zip: complete, valid, the same bytes each time; or nothing at all."""

import json
import zipfile

import numpy as np
import pytest

from integrations.ovis import submission
from integrations.ovis.evaluation import read_predictions
from integrations.ovis.layout import LayoutError
from integrations.ovis.rle import MaskError, encode
from integrations.ovis.submission import write_submission

SIZE = (4, 5)
DOCUMENT = {
    "videos": [{"id": 3, "height": 4, "width": 5, "file_names": ["a.jpg", "b.jpg"]},
               {"id": 8, "height": 4, "width": 5, "file_names": ["c.jpg"]}],
    "categories": [{"id": 7, "name": "owl"}],
}  # fmt: skip


@pytest.fixture
def predictions():
    mask = np.zeros((1, *SIZE), bool)
    mask[0, 1:3, 1:4] = True
    plain = {"size": list(SIZE), "counts": [5, 2, 2, 2, 2, 2, 5]}
    return [
        {"video_id": 3, "category_id": 7, "score": 0.25, "segmentations": [None, plain]},
        {"video_id": 8, "category_id": 7, "score": 1, "segmentations": encode(mask)},
    ]


def test_holds_compressed_masks_under_the_documents_ids(predictions, tmp_path):
    path = write_submission(tmp_path / "out" / "s.zip", predictions, DOCUMENT)
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["results.json"]
        found = json.loads(archive.read("results.json"))
    assert found == read_predictions(path)
    assert [(p["video_id"], p["category_id"], p["score"]) for p in found] == [
        (3, 7, 0.25), (8, 7, 1.0)
    ]  # fmt: skip
    assert found[0]["segmentations"][0] is None
    assert found[0]["segmentations"][1] == found[1]["segmentations"][0]
    assert [p.name for p in path.parent.iterdir()] == ["s.zip"]


def test_the_same_predictions_give_the_same_bytes(predictions, tmp_path):
    first, second = (
        write_submission(tmp_path / name, predictions, DOCUMENT).read_bytes()
        for name in ("a.zip", "b.zip")
    )
    assert first == second


def test_the_command_writes_it(predictions, tmp_path, caplog):
    for name, content in (("p.json", predictions), ("d.json", DOCUMENT)):
        (tmp_path / name).write_text(json.dumps(content))
    written = submission.main([str(tmp_path / name) for name in ("p.json", "d.json", "s.zip")])
    assert len(read_predictions(written)) == 2


def test_videos_without_predictions_are_counted(predictions, tmp_path, caplog):
    write_submission(tmp_path / "s.zip", predictions[:1], DOCUMENT)
    assert "1 of 2 videos have no prediction" in caplog.text


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"video_id": 9}, LayoutError, "prediction 0 is of video 9"),
        ({"category_id": 1}, LayoutError, "prediction 0 is of category 1"),
        ({"score": float("inf")}, LayoutError, "prediction 0: score inf"),
        ({"segmentations": [None]}, LayoutError, "has 1 segmentations"),
        ({"segmentations": [None, {"size": [5, 4], "counts": [20]}]}, MaskError,
         "prediction 0, frame 1: the mask is 5 x 4"),
    ],
)  # fmt: skip
def test_nothing_is_written_of_what_does_not_fit(predictions, tmp_path, changes, kind, message):
    predictions[0] |= changes
    with pytest.raises(kind, match=message):
        write_submission(tmp_path / "s.zip", predictions, DOCUMENT)
    assert not list(tmp_path.iterdir())


def test_refuses_nothing_and_other_names(predictions, tmp_path):
    with pytest.raises(LayoutError, match="no predictions"):
        write_submission(tmp_path / "s.zip", [], DOCUMENT)
    with pytest.raises(LayoutError, match=r"s\.json must end in \.zip"):
        write_submission(tmp_path / "s.json", predictions, DOCUMENT)
