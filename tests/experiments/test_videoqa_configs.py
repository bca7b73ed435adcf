"""The packaged configs of video question answering say what the papers say; slips are refused."""

import json

import pytest

from experiments.config import UserError, packaged_configs
from experiments.run import main
from experiments.videoqa import Source, resolve, stages_of
from integrations.videoqa.train import STAGES, StageConfig

CONFIGS = packaged_configs("videoqa")
REAL = ["llava_video", "released"]


def test_all_data_sets_have_one():
    assert set(CONFIGS) == {"miniworld", *REAL}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_complete_and_name_no_encoder(name):
    config = resolve(name, [])
    assert "encoder" not in config
    assert len(config["stages"]) == 3 and config["eval"]["tasks"]


@pytest.mark.parametrize("name", REAL)
def test_real_data_are_trained_on_as_published(name, tmp_path):
    config = resolve(name, [])
    for stage in ("align", "image", "video"):
        fields = {k: v for k, v in config["stages"][stage].items() if k != "data"}
        assert StageConfig.from_dict(fields) == STAGES[stage]
    shares = {item["share"] for item in config["stages"]["video"]["data"]}
    assert shares == {"first:10%"} and len(config["stages"]["video"]["data"]) == 4
    assert config["model"]["tower_features"] == ("released" if name == "released" else "last")


def test_patterns_name_all_files_of_a_stage(tmp_path):
    config = resolve("llava_video", [])
    folder = tmp_path / "LLaVA-Video-178K" / "0_30_s_youtube_v0_1"
    folder.mkdir(parents=True)
    for name in ("cap", "oe"):
        (folder / f"{name}.json").write_text("[]")
    source = Source("", tmp_path, {})
    *_, (name, stage, files) = stages_of(config, source)
    assert name == "video" and stage.num_frames == 16
    assert [file.json.rpartition("/")[2] for file in files] == ["cap.json", "oe.json"]
    assert {(str(file.root), file.share) for file in files} == {(str(folder), "first:10%")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages.questions.updatess=3", "no field 'updatess'; did you mean 'updates'"),
        ("stages.questions.data=[]", "stages.questions.data: a list of"),
        ("stages.questions.recipe=vdeo", "recipe='vdeo': choose one of align, image, video"),
        ("stages.questions.per_device=7", r"batch_size=\d+ does not divide by per_device=7"),
        ("qa.test=-1", "QaParams.test=-1 must not be negative"),
        ("mini_llm.withd=3", "did you mean 'mini_llm.width'"),
    ],
)
def test_slips_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        resolve("miniworld", [change])


def test_what_is_missing_is_said_at_once(tmp_path):
    with pytest.raises(UserError) as refused:
        changes = ["--set", "eval.tasks=['videomme_best_answr']", "--set", "model.llm=None"]
        where = ["--work-dir", str(tmp_path / "a,b")]
        main(["videoqa", "--config", "llava_video", *where, *changes])
    for text in (
        "say where they lie, --set data.root=FOLDER",
        "lmms-eval parts arguments at commas",
        "model.llm is None: name a language model",
        "no task 'videomme_best_answr'",
    ):
        assert text in str(refused.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="stages.align.data: there is no .*blip_laion") as refused:
        main(["videoqa", "--config", "llava_video", "--set", f"data.root={tmp_path}",
              "--work-dir", str(tmp_path / "out"), "--encoders", "siglip:/nowhere"])  # fmt: skip
    assert "there is no folder /nowhere" in str(refused.value)
    assert "model.llm=lmsys/vicuna-7b-v1.5: lmsys/vicuna-7b-v1.5 is no folder" in str(refused.value)


def test_other_records_of_a_job_are_not_taken(tmp_path):
    (tmp_path / "lmms.json").write_text(json.dumps({"questions": "q", "pretrained": "p"}))
    with pytest.raises(UserError, match="(?s)there is no trained model under .*run.py videoqa"):
        main(["chat", "video.mp4", "--work-dir", str(tmp_path)])
