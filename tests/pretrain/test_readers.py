"""Public annotation formats: what each says is what comes in, and what lies is refused by name."""

import json
import pickle
from pathlib import Path

import pytest

from pretrain.config import TaskConfig
from pretrain.datasets import READERS, Draw, Entry, Segment, VideoDataset
from pretrain.datasets.decode import ClipReader
from pretrain.datasets.tables import AnnotationError

HEAD = "video_id,start_second,end_second,text,relevant_windows,dataset\n"
KINETICS = "label,youtube_id,time_start,time_end,split\n"
HACS = "classname,youtube_id,subset,start,end,label\n"
DATABASE = {
    "database": {
        "b1": {
            "subset": "training",
            "duration": "20.0",
            "filename": "b1.mkv",
            "annotations": [
                {"segment": [1.0, 4.5], "label": "Surfing"},
                {"segment": ["3", "25"], "label": "Dodgeball"},
            ],
        },
        "-a2": {
            "subset": "validation",
            "duration": 9,
            "annotations": [{"segment": [0, 2], "label": "Archery"}],
        },
    }
}
ACTIVITYNET = {
    "v_x": {
        "duration": 10.5,
        "timestamps": [[4, 9.0], [0.5, 3.0]],
        "sentences": [" Then he jumps. ", "A man runs."],
    }
}
DIDEMO = [
    {"video": "1@N02_a.mov", "description": "a cat ", "times": [[1, 1], [0, 1], [0, 1]]},
    {"video": "1@N02_a.mov", "description": "a dog", "times": [[0, 0]]},
    {"video": "2@N02_b.avi", "description": "rain", "times": [[5, 5]]},
]
TACOS = {
    "s13-d21.avi": {
        "fps": 20.0,
        "num_frames": 400,
        "timestamps": [[20, 60], [300, 500]],
        "sentences": ["He cuts.", "He eats."],
    }
}
MSRVTT = {
    "videos": [
        {"video_id": "video0", "split": "train"},
        {"video_id": "video7", "split": "validate"},
        {"video_id": "video8", "split": "train"},
    ],
    "sentences": [
        {"video_id": "video7", "caption": "seven", "sen_id": 0},
        {"video_id": "video0", "caption": "zero", "sen_id": 1},
        {"video_id": "video0", "caption": "null", "sen_id": 2},
        {"video_id": "video8", "caption": " ", "sen_id": 3},
    ],
}
QVHIGHLIGHTS = {
    "qid": 9,
    "query": "a walk",
    "duration": 150,
    "vid": "j7_360.0_510.0",
    "relevant_windows": [[96, 114], [0, 10]],
}


@pytest.fixture
def files(tmp_path):
    """Write files by name; what is no text is written as JSON. Returns their paths in order."""

    def write(**contents):
        paths = []
        for name, content in contents.items():
            path = tmp_path / name.replace("__", ".")
            path.write_text(content if isinstance(content, str) else json.dumps(content))
            paths.append(str(path))
        return paths

    return write


def read(reader, *paths, root="/v", **arguments):
    """Read with the reader of that name, arguments going through a config's section."""
    names = {"ssv2": ("annotations", "labels"), "queryd": ("annotations", "times")}
    keys = names.get(reader, ("annotations",))
    return READERS[reader](**dict(zip(keys, paths, strict=True)), root=root, **arguments)


def names_of(annotations):
    return [str(entry.video.relative_to("/v")) for entry in annotations.entries]


# -- recognition ----------------------------------------------------------------------------------


def test_kinetics_csv(files):
    rows = "jump,abc,10,20,train\nfly kite,-x_y,3,13,validate\n"
    table, labels = files(k__csv=KINETICS + rows, l__json={"jump": 0, "fly kite": 1, "sit": 2})
    found = read("kinetics_official", table)
    assert names_of(found) == ["abc_000010_000020.mp4", "-x_y_000003_000013.mp4"]
    assert found.label_sets == {"Kinetics": ("fly kite", "jump")}
    assert [entry.labels for entry in found.entries] == [(1,), (0,)]
    found = read(
        "kinetics_official", table, labels=labels, split="train", pattern="{split}/{label}/{id}.mp4"
    )
    assert names_of(found) == ["train/jump/abc.mp4"]
    assert found.label_sets == {"Kinetics": ("jump", "fly kite", "sit")}


def test_something_something_json(files):
    items = [{"id": "78687", "label": "putting a cup", "template": "Putting [something] [there]"}]
    annotations, labels = files(
        train__json=items, labels__json={"Closing something": "1", "Putting something there": "0"}
    )
    found = read("ssv2", annotations, labels)
    assert names_of(found) == ["78687.webm"]
    assert found.entries[0].labels == (0,)
    assert found.label_sets == {"SSV2": ("Putting something there", "Closing something")}


def test_hacs_clips_are_the_positive_stretches_of_a_split(files):
    (table,) = files(
        hacs__csv=HACS
        + "Archery,a2,training,15.5,17.5,1\nArchery,b,training,1,3,-1\n"
        + "Surfing,c,validation,2,4,1\nSurfing,d,training,4,4,1\n"
    )
    found = read("hacs_clips", table)
    assert found.entries == [
        Entry(Path("/v/v_a2.mp4"), label_set="HACS", labels=(0,), start=15.5, end=17.5)
    ]
    assert found.label_sets == {"HACS": ("Archery", "Surfing")}
    assert found.left_out == ("line 5: d from 4 to 4 s",)
    assert names_of(read("hacs_clips", table, split=None)) == ["v_a2.mp4", "v_c.mp4"]


# -- retrieval ------------------------------------------------------------------------------------


def test_msrvtt_gathers_the_captions_of_a_video(files):
    annotations, ids, test = files(
        msrvtt__json=MSRVTT, ids__txt="video0\n\n", t__csv="key,video_id,sentence\n1,video7,one\n"
    )
    found = read("msrvtt", annotations)
    assert names_of(found) == ["video0.mp4", "video7.mp4"]
    assert [entry.captions for entry in found.entries] == [("zero", "null"), ("seven",)]
    assert found.left_out == ("video8 has no caption",)
    assert names_of(read("msrvtt", annotations, split="validate")) == ["video7.mp4"]
    assert names_of(read("msrvtt", annotations, videos=ids)) == ["video0.mp4"]
    assert [e.captions for e in read("msrvtt", annotations, videos=test).entries] == [("one",)]


def test_msvd_text(files):
    text, ids = files(
        all__txt="# remarks\n\na_1_5 a bird is bathing\nb_0_9 rain\na_1_5 a bird sits\n",
        train__txt="a_1_5\n",
    )
    found = read("msvd", text)
    assert names_of(found) == ["a_1_5.avi", "b_0_9.avi"]
    assert found.entries[0].captions == ("a bird is bathing", "a bird sits")
    assert names_of(read("msvd", text, videos=ids)) == ["a_1_5.avi"]


def test_sentences_of_a_video_make_a_paragraph_in_time(files):
    captions, didemo = files(a__json=ACTIVITYNET, d__json=DIDEMO)
    (entry,) = read("activitynet_captions", captions).entries
    assert entry == Entry(Path("/v/v_x.mp4"), captions=("A man runs. Then he jumps.",))
    found = read("didemo", didemo)
    assert names_of(found) == ["1@N02_a.mov", "2@N02_b.avi"]
    assert [entry.captions for entry in found.entries] == [("a cat a dog",), ("rain",)]
    assert {entry.end for entry in found.entries} == {30.0}
    assert names_of(read("didemo", didemo, pattern="{stem}.mp4"))[0] == "1@N02_a.mp4"


def test_lsmdc_table(files):
    clip = "1004_Juno_00.00.32.165-00.00.32.736"
    times = "\t00.00.32.165\t00.00.32.736\t00.00.31\t00.00.33"
    (table,) = files(l__csv=f'{clip}{times}\tHe says "no".\n{clip}{times}\t\n')
    found = read("lsmdc", table)
    assert names_of(found) == [f"1004_Juno/{clip}.avi"]
    assert found.entries[0].captions == ('He says "no".',)
    assert found.left_out == (f"line 2: {clip} has no caption",)


def test_vatex_json(files):
    (table,) = files(v__json=[{"videoID": "P_000001_000011", "enCap": ["a", "b"], "chCap": []}])
    (entry,) = read("vatex", table).entries
    assert entry == Entry(Path("/v/P_000001_000011.mp4"), captions=("a", "b"))


# -- localization ---------------------------------------------------------------------------------


def test_activitynet_hacs_and_fineaction_json(files):
    database, labels = files(
        d__json=DATABASE, l__json={"HACS": {"Surfing": 0, "Dodgeball": 1, "Archery": 2}}
    )
    found = read("activitynet", database)
    assert found.label_sets == {"ActivityNet": ("Archery", "Dodgeball", "Surfing")}
    (entry,) = found.entries
    assert entry.video == Path("/v/v_b1.mp4")
    assert entry.segments == (Segment(2, 1.0, 4.5), Segment(1, 3.0, 20.0))  # up to the video's end
    found = read("hacs", database, labels=labels, split=None)
    assert names_of(found) == ["v_b1.mp4", "v_-a2.mp4"]
    assert found.entries[1].segments == (Segment(2, 0, 2),)
    assert names_of(read("fineaction", database)) == ["b1.mkv"]
    with pytest.raises(AnnotationError, match=r"'\{filename\}' does not name.*may use \{id\}"):
        read("fineaction", database, split="validation")


def test_stretches_past_the_end_and_without_length_are_left_out(files):
    videos = {
        "a": ([[21, 22], [5, 5], [19, 30]], 20),
        "b": ([[30, 31]], 20),
        "c": ([], 20),
    }
    (database,) = files(d__json={
        "database": {
            video: {
                "subset": "training",
                "duration": length,
                "annotations": [{"segment": pair, "label": "run"} for pair in pairs],
            }
            for video, (pairs, length) in videos.items()
        }
    })  # fmt: skip
    found = read("activitynet", database)
    assert [entry.segments for entry in found.entries] == [(Segment(0, 19, 20),)]
    assert found.left_out == (
        "a from 21 to 22 s (the video ends at 20 s)",
        "a from 5 to 5 s",
        "b from 30 to 31 s (the video ends at 20 s)",
        "b without any action",
        "c without any action",
    )


# -- grounding ------------------------------------------------------------------------------------


def moment(video, query, *windows, end=None):
    return Entry(
        Path(video),
        segments=tuple(Segment(0, *window) for window in windows),
        captions=(query,),
        end=end,
        focus=(min(w[0] for w in windows), max(w[1] for w in windows)),
    )


def test_the_released_table_of_sentences(files):
    (table,) = files(
        t__csv=HEAD
        + 'AO8RW,0.0,6.9,a person sits.,"[[0.0, 6.9]]",CharadesSTA\n'
        + 's13-d21,1,2,He cuts.,"[]",TaCoS\n'
        + 'q,2,20,rain,"[[2, 6], [14, 20]]",QVHighlights\n'
        + "z,3,3,none,[],QVHighlights\nz,3,4, ,[],QVHighlights\n"
    )
    found = READERS["grounding"](table, {"CharadesSTA": "/c", "TaCoS": "/t", "QVHighlights": "/q"})
    assert found.entries == [
        moment("/c/AO8RW.mp4", "a person sits.", (0.0, 6.9)),
        moment("/t/s13-d21-cam-002.avi", "He cuts.", (1, 2)),
        moment("/q/q.mp4", "rain", (2, 6), (14, 20)),
    ]
    assert found.left_out == ("line 5: z from 3 to 3 s", "line 6: z has no caption")


def test_charades_text(files):
    (text,) = files(c__txt="3MSZA 24.3 30.4##person turn a light on.\nAAAAA 5 4##x\nB 1 2##\n")
    found = read("charades_sta", text)
    assert found.entries == [moment("/v/3MSZA.mp4", "person turn a light on.", (24.3, 30.4))]
    assert found.left_out == ("line 2: AAAAA from 5 to 4 s", "line 3: B has no caption")


def test_qvhighlights_lines(files):
    (lines,) = files(q__jsonl=json.dumps(QVHIGHLIGHTS) + "\n")
    assert read("qvhighlights", lines).entries == [
        moment("/v/j7_360.0_510.0.mp4", "a walk", (96, 114), (0, 10))
    ]


def test_tacos_counts_in_frames(files):
    (table,) = files(t__json=TACOS)
    assert read("tacos", table).entries == [
        moment("/v/s13-d21-cam-002.avi", "He cuts.", (1, 3)),
        moment("/v/s13-d21-cam-002.avi", "He eats.", (15, 20)),  # up to the last frame
    ]


def test_captions_are_moments_too(files):
    captions, didemo = files(a__json=ACTIVITYNET, d__json=DIDEMO)
    assert read("activitynet_captions_grounding", captions).entries == [
        moment("/v/v_x.mp4", "Then he jumps.", (4, 9)),
        moment("/v/v_x.mp4", "A man runs.", (0.5, 3)),
    ]
    assert read("didemo_grounding", didemo).entries == [
        moment("/v/1@N02_a.mov", "a cat", (0, 10), end=30),
        moment("/v/1@N02_a.mov", "a dog", (0, 5), end=30),
        moment("/v/2@N02_b.avi", "rain", (25, 30), end=30),
    ]


@pytest.mark.parametrize("suffix", ["json", "pkl"])
def test_queryd_captions_and_times(tmp_path, suffix):
    said = {"video-a": [["a", "man", "walks"], "he sits"], "video-b": [["rain"]]}
    when = {"video-a": [[1.5, 4.0], [6.0, 6.0]], "video-b": [[0.0, 2.0]]}
    paths = []
    for name, content in (("captions", said), ("times", when)):
        paths.append(tmp_path / f"{name}.{suffix}")
        data = json.dumps(content).encode() if suffix == "json" else pickle.dumps(content)
        paths[-1].write_bytes(data)
    found = read("queryd", *paths)
    assert found.entries == [
        moment("/v/video-a.mp4", "a man walks", (1.5, 4.0)),
        moment("/v/video-b.mp4", "rain", (0.0, 2.0)),
    ]
    assert found.left_out == ("video-a from 6 to 6 s",)
    (tmp_path / "ids.txt").write_text("video-b\n")
    assert names_of(read("queryd", *paths, videos=tmp_path / "ids.txt")) == ["video-b.mp4"]


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Runs:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "captions.pkl").write_bytes(pickle.dumps({"a": Runs()}))
    with pytest.raises(AnnotationError, match="captions.pkl: is no pickle of lists.*pathlib"):
        read("queryd", tmp_path / "captions.pkl", tmp_path / "captions.pkl")
    assert not (tmp_path / "ran").exists()


# -- what lies ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reader", "content", "message"),
    [
        ("kinetics_official", "label,youtube_id\nx,y\n", "no column 'time_start', 'time_end', 's"),
        ("kinetics_official", KINETICS + "run,abc,1\n", "line 2: no cell for 'time_end', 'split'"),
        ("kinetics_official", KINETICS + "run,abc,1,x,train\n", "line 2: time_end='x' is no num"),
        ("hacs_clips", HACS + "run,abc,training,1,3,yes\n", "line 2: label='yes' must be 1 or -1"),
        ("hacs_clips", HACS + "run,abc,training,nan,3,1\n", "line 2: start='nan' is not finite"),
        ("msrvtt", {"videos": []}, "no field 'sentences'; there are 'videos'"),
        ("msrvtt", "{", "is not JSON"),
        ("vatex", {"videoID": "a"}, r"content=\{'videoID': 'a'\} is no list"),
        ("vatex", [{"videoID": "a", "enCap": "x"}], "item 0: enCap='x' is no list"),
        ("lsmdc", "clip\tcaption\n", "line 1: 2 cells; expected clip, start and end"),
        ("activitynet", {"videos": {}}, "no field 'database'; there are 'videos'"),
        ("activitynet", {"database": []}, r"database=\[\] is no object"),
        ("activitynet", {"database": {"a": []}}, "video 'a': expected an object with subset"),
        ("charades_sta", "ABC 1 2 a person runs\n", "line 1: 'ABC 1 2 a person runs' is not"),
        ("charades_sta", "ABC 1 two##x\n", "line 1: end='two' is no number"),
        ("qvhighlights", '{"qid": 1}\n', "line 1: no field 'vid', 'query', 'duration', 'relev"),
        ("qvhighlights", "[1\n", "line 1: is not JSON"),
        ("tacos", {"a": {"fps": 0, "num_frames": 1, "timestamps": [], "sentences": []}},
         "video 'a': fps=0 must be positive"),
        ("activitynet_captions", {"a": {"duration": 1, "timestamps": [[0, 1]], "sentences": []}},
         "video 'a': 1 timestamps but 0 sentences"),
        ("activitynet_captions_grounding", {"a": {"duration": 1, "timestamps": [[0]],
         "sentences": ["x"]}}, r"timestamps=\[\[0\]\] must hold pairs \[start, end\]"),
        ("didemo", [{"video": "a", "description": "x", "times": []}], "item 0: times is empty"),
        ("grounding", "video_id,text\nv,x\n", "no column 'start_second', 'end_second', 'relev"),
    ],
)  # fmt: skip
def test_files_that_lie_are_refused_with_their_place(files, reader, content, message):
    (path,) = files(lies__txt=content)
    with pytest.raises(AnnotationError, match=message):
        read(reader, path)


@pytest.mark.parametrize("reader", ["kinetics_official", "hacs_clips", "activitynet", "msrvtt"])
def test_a_split_that_the_file_lacks_is_refused(files, reader):
    content = {
        "kinetics_official": KINETICS + "run,abc,1,11,train\n",
        "hacs_clips": HACS + "run,abc,training,1,3,1\n",
        "activitynet": DATABASE,
        "msrvtt": MSRVTT,
    }
    (path,) = files(some__txt=content[reader])
    with pytest.raises(AnnotationError, match="nothing in split 'test'; splits are 't"):
        read(reader, path, split="test")


def test_labels_that_a_file_lacks_are_refused_by_name(files):
    table, database, items, labels, shifted, wrong = files(
        k__csv=KINETICS + "jump,abc,10,20,train\n",
        d__json=DATABASE,
        s__json=[{"id": "1", "template": "Flying [something]"}],
        l__json={"Surfing": 0},
        shifted__json={"Surfing": 1},
        wrong__json={"Surfing": [0]},
    )
    with pytest.raises(AnnotationError, match="k.csv, line 2: label 'jump' is not among the 1 of"):
        read("kinetics_official", table, labels=labels)
    with pytest.raises(AnnotationError, match="video 'b1': label 'Dodgeball' is not among the 1"):
        read("activitynet", database, labels=labels)
    with pytest.raises(AnnotationError, match="item 0: label 'Flying something' is not among"):
        read("ssv2", items, labels)
    with pytest.raises(AnnotationError, match="1 labels need the ids 0 to 0"):
        read("activitynet", database, labels=shifted)
    with pytest.raises(AnnotationError, match=r"expected \{label: id\}"):
        read("activitynet", database, labels=wrong)


def test_lists_of_videos_that_the_annotations_lack_are_refused(files):
    annotations, ids, captions = files(
        m__json=MSRVTT, i__txt="video0\nvideo99\n", q__json={"a": [["x"]]}
    )
    with pytest.raises(AnnotationError, match="1 videos are not in .*m.json, such as 'video99'"):
        read("msrvtt", annotations, videos=ids)
    with pytest.raises(AnnotationError, match="q.json: no field 'video0'"):
        read("queryd", captions, captions, videos=ids)


# -- several at once ------------------------------------------------------------------------------


def test_a_union_keeps_every_part_and_its_labels(files):
    database, table = files(d__json=DATABASE, r__csv=HEAD + "v,0,1,Archery,[],HACS\n")
    (labels,) = files(l__json={"HACS": {"Archery": 0}})
    parts = [
        {"reader": "activitynet", "annotations": database, "root": "/v"},
        {"reader": "localization", "annotations": table, "labels": labels, "root": "/v"},
    ]
    found = READERS["union"](parts)
    assert names_of(found) == ["v_b1.mp4", "v_v.mp4"]
    assert list(found.label_sets) == ["ActivityNet", "HACS"]
    parts[0] |= {"name": "HACS"}
    with pytest.raises(ValueError, match="part 1 of 2: its label set 'HACS' differs"):
        READERS["union"](parts)
    with pytest.raises(ValueError, match="part 0 of 1: reader='thumos' is unknown; use one of"):
        READERS["union"]([{"reader": "thumos"}])
    with pytest.raises(ValueError, match="part 0 of 1: reader 'vatex' takes annotations, root"):
        READERS["union"]([{"reader": "vatex", "annotation": "x"}])


# -- through decoding -----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["fixfps", "fixfps_released"])
def test_moments_are_looked_at_where_they_are(world, files, rule):
    (text,) = files(c__txt="clip_00 0.5 1.25##it moves\nclip_01 2.0 9.5##past the end\n")
    found = read("charades_sta", text, root=world / "videos")
    dataset = VideoDataset(found, ClipReader(32, rule))
    for seed in (*range(5), None):
        for index in range(2):
            sample = dataset[Draw(index, 4, seed)]
            assert not sample.error
            assert sample.frames.shape == (4, 3, 32, 32)
            assert 0 <= sample.times.min() <= sample.times.max() < 2.5
        assert sample.caption == "past the end"


def test_a_stretch_of_a_video_is_all_that_is_seen(world, files):
    (table,) = files(h__csv=HACS + "run,clip_00,training,1.0,2.0,1\nrun,clip_00,training,3,5,1\n")
    found = read("hacs_clips", table, root=world / "videos", pattern="{id}.mp4")
    dataset = VideoDataset(found, ClipReader(32, "segments"))
    times = [dataset[Draw(0, 4, seed)].times for seed in range(20)]
    assert {float(time) for row in times for time in row} <= {1 + k / 8 for k in range(8)}
    assert "the stretch from 3 s begins behind the end at 2.5 s" in dataset[Draw(1, 4, 0)].error
    lasting = VideoDataset(found, ClipReader(32, "consecutive")).lasting
    assert (lasting(8), lasting(9)) == ([0], [])


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_videos_that_cannot_be_read_are_named_and_not_replaced(world, tmp_path, files, damage):
    whole = (world / "videos/clip_00.mp4").read_bytes()
    path = tmp_path / "3MSZA.mp4"
    if damage != "missing":
        path.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"")
    (text,) = files(c__txt="3MSZA 0.5 1.25##it moves\n")
    found = read("charades_sta", text, root=tmp_path)
    sample = VideoDataset(found, ClipReader(32, "fixfps"))[Draw(0, 4, 0)]
    assert sample.frames is None
    assert "3MSZA.mp4" in sample.error


def test_readers_of_all_formats_can_be_named_in_a_config():
    for reader in READERS:
        TaskConfig(objective="retrieval", reader=reader, train={})
