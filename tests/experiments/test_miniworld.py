"""Miniworld: same parameters, same bytes; balanced classes; formats; nothing left half done."""

import ast
import csv
import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import av
import numpy as np
import pytest
from PIL import Image

from experiments.miniworld import (
    ACTIONS,
    CLASS_NAMES,
    PRETRAINING_ACTIONS,
    WorldParams,
    render_world,
    world_key,
)
from experiments.miniworld import render as rendering
from experiments.miniworld.actions import ANGLE, RADIUS, SHOWN, X, Y, inside, progress
from experiments.miniworld.jobs import plan
from experiments.miniworld.language import captions, expressions, queries
from experiments.miniworld.params import seed_of
from experiments.miniworld.render import seconds, targets
from experiments.miniworld.scene import COLOURS, SHAPES, TEXTURES, Camera, Item, draw, texture
from experiments.miniworld.script import (
    Scene,
    Script,
    Segment,
    deal,
    write_ending,
    write_script,
    write_single,
)
from experiments.miniworld.sheet import contact_sheet
from experiments.miniworld.writers import run_lengths

NOTHING = dict.fromkeys(
    (name for name in WorldParams.__dataclass_fields__
     if name.endswith(("_train", "_val", "_test", "_train_long", "_val_long", "_test_long"))), 0
)
TINY = WorldParams(
    stills_train=6, stills_val=3, clips_train=8, clips_train_long=2, clips_val=4, clips_val_long=1,
    streams_train=2, streams_val=1, streams_val_long=1, streams_test=1, streams_test_long=1,
    stream_frames=60, long_stream_frames=100, scene_frames=(30, 50),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return render_world(tmp_path_factory.mktemp("worlds"), TINY, workers=1)


def scripts(params: WorldParams):
    """(job, script) of every video, without drawing any."""
    for job in plan(params):
        if job.kind != "still":
            seed = seed_of(params.seed, job.kind, job.split, job.index)
            yield job, rendering._write(job, params, Random(seed))


@pytest.fixture(scope="module")
def clip_scripts():
    return list(scripts(WorldParams(**{**NOTHING, "clips_train": 440})))


@pytest.fixture(scope="module")
def stream_scripts():
    return list(scripts(WorldParams(**{**NOTHING, "streams_train": 30, "streams_val_long": 2})))


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*")) if path.is_file()
    }


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------ repeatable, whole or absent


def test_same_bytes_whatever_the_number_of_workers(world, tmp_path):
    assert contents(render_world(tmp_path, TINY, workers=2)) == contents(world)


def test_another_seed_gives_another_world(world, tmp_path):
    small = replace(TINY, **{**NOTHING, "stills_train": 2, "seed": 1})
    other = contents(render_world(tmp_path, small, workers=1))
    here = contents(world)
    assert other["stills/train/00000.jpg"] != here["stills/train/00000.jpg"]


def test_a_present_world_is_reused(world):
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    assert render_world(world.parent, TINY, workers=1) == world
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*")} == before


def test_key_follows_every_parameter_and_the_version(monkeypatch):
    changed = {
        "seed": 1, "frame_size": 48, "scene_frames": (90, 160), "action_frames": (6, 12),
        "background": (0.3, 0.4), "stills_single": 0.4, "overlap": 0.2, "camouflaged": 0.2,
    }
    keys = {world_key(WorldParams())}
    for name, value in WorldParams().__dict__.items():
        keys.add(world_key(replace(WorldParams(), **{name: changed.get(name, value * 1.02
                 if isinstance(value, float) else value if name in changed else value + 2)})))
    assert len(keys) == 1 + len(WorldParams.__dataclass_fields__)
    monkeypatch.setattr("experiments.miniworld.params.RENDER_VERSION", -1)
    assert world_key(WorldParams()) not in keys


def test_parameters_survive_json(world):
    record = json.loads((world / "world.json").read_text())
    assert WorldParams(**record["parameters"]) == TINY
    assert record["digest"] == world_key(TINY) and world.name.endswith(record["digest"])
    assert record["counts"]["clips/train"] == 10


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_render_leaves_nothing(tmp_path, monkeypatch, error):
    real, calls = rendering.write_video, []

    def stop_at_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise error("stop")
        real(*arguments)

    monkeypatch.setattr(rendering, "write_video", stop_at_third)
    with pytest.raises(error, match="stop"):
        render_world(tmp_path, TINY, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_the_faster_of_two_renders_wins(tmp_path):
    world = tmp_path / "world"
    with rendering.appearing(world) as slower:
        (slower / "world.json").write_text("slower")
        world.mkdir()
        (world / "world.json").write_text("faster")
    assert (world / "world.json").read_text() == "faster"
    assert list(tmp_path.iterdir()) == [world]


# ------------------------------------------------------------------------------- formats


def test_videos_hold_the_frames_their_index_says(world):
    for home in ("clips", "streams"):
        records = lines(world / home / "index.jsonl")
        videos = sorted(path.stem for path in (world / home / "videos").iterdir())
        assert sorted(record["id"] for record in records) == videos
        for record in records:
            frames = decode(world / home / "videos" / f"{record['id']}.mp4")
            assert frames.shape == (record["frames"], 32, 32, 3), record["id"]


def test_video_is_h264_at_the_rate_asked(world):
    with av.open(str(world / "clips/videos/clip_train_00000.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.average_rate == TINY.fps
        assert stream.codec_context.pix_fmt == "yuv420p"


def test_recognition_lists_clips_that_end_in_their_only_action(world):
    index = {record["id"]: record for record in lines(world / "clips/index.jsonl")}
    labels = json.loads((world / "clips/recognition/label2id.json").read_text())
    assert list(labels.items()) == [(name, i) for i, name in enumerate(PRETRAINING_ACTIONS)]
    for split, count in (("train", 4), ("val", 2)):
        with (world / f"clips/recognition/{split}.csv").open() as file:
            rows = list(csv.reader(file))
        assert len(rows) == count
        for path, label in rows:
            assert (world / "clips/videos" / path).is_file()
            record = index[path.removesuffix(".mp4")]
            assert record["split"] == split and label in labels
            assert [action["action"] for action in record["actions"]] == [label]
            assert record["actions"][0]["end_frame"] == record["frames"]


@pytest.mark.parametrize("digits", [2, 6])
def test_localization_windows_find_exactly_the_labelled_frames(world, digits):
    index = {record["id"]: record for record in lines(world / "clips/index.jsonl")}
    rows = [row for split in ("train", "val")
            for row in table(world / f"clips/localization/{split}.csv")]
    assert Counter(row["video_id"] for row in rows) == Counter(
        {name: len(record["actions"]) for name, record in index.items()}
    )
    labels = json.loads((world / "clips/localization/label2id.json").read_text())
    for row in rows:
        record = index[row["video_id"]]
        ((start, end),) = ast.literal_eval(row["relevant_windows"])
        assert (start, end) == (float(row["start_second"]), float(row["end_second"]))
        assert row["text"] in labels[row["dataset"]]
        times = [round(frame / record["fps"], digits) for frame in range(record["frames"])]
        found = [frame for frame, time in enumerate(times) if start <= time <= end]
        spans = [range(a["start_frame"], a["end_frame"]) for a in record["actions"]
                 if a["action"] == row["text"]]
        assert found in [list(span) for span in spans]


def test_seconds_start_no_earlier_than_the_video():
    assert seconds(0, 4, 8) == (0.0, 3.5 / 8)


def test_targets_agree_with_the_index(world):
    info = json.loads((world / "streams/data_info.json").read_text())["MINIWORLD"]
    assert info["class_names"] == list(CLASS_NAMES) and info["class_names"][0] == "Background"
    assert info["num_classes"] == len(CLASS_NAMES) and info["fps"] == TINY.fps
    assert info["ignore_index"] == -100 and info["metrics"] == "AP"
    assert info["val_60_session_set"] == ["stream_val_60_0000"]
    assert info["test_session_set"] == ["stream_test_60_0000"]
    assert info["test_100_session_set"] == ["stream_test_100_0000"]
    assert info["train_session_set"] == ["stream_train_0000", "stream_train_0001"]
    for record in lines(world / "streams/index.jsonl"):
        target = np.load(world / "streams/target_perframe" / f"{record['id']}.npy")
        assert target.dtype == np.float32 and target.shape == (record["frames"], len(CLASS_NAMES))
        wanted = np.zeros_like(target)
        for action in record["actions"]:
            span = slice(action["start_frame"], action["end_frame"])
            wanted[span, CLASS_NAMES.index(action["action"])] = 1
        wanted[:, 0] = ~wanted[:, 1:].any(1)
        assert (target == wanted).all()


def test_stills_and_their_captions(world):
    for split, count in (("train", 6), ("val", 3)):
        rows = table(world / f"stills/{split}.csv")
        assert len(rows) == count
        for row in rows:
            assert Image.open(world / "stills" / row["image"]).size == (32, 32)
            assert f"{row['colour']} {row['shape']}" in row["caption"]
            assert not any(action.phrase in row["caption"] for action in ACTIONS.values())


def test_instances_are_youtube_vis_and_never_overlap(world):
    for path in (world / "clips/instances_train.json", world / "streams/instances_test_100.json"):
        document = json.loads(path.read_text())
        videos = {video["id"]: video for video in document["videos"]}
        categories = {category["id"]: category["name"] for category in document["categories"]}
        looks = [*COLOURS, "hidden"]
        assert sorted(categories.values()) == sorted(f"{look} shape" for look in looks)
        taken = {number: np.zeros((video["length"], 32, 32), int)
                 for number, video in videos.items()}
        assert len({a["id"] for a in document["annotations"]}) == len(document["annotations"])
        for annotation in document["annotations"]:
            video = videos[annotation["video_id"]]
            assert annotation["category_id"] in categories
            assert isinstance(annotation["camouflaged"], bool)
            assert len(annotation["segmentations"]) == video["length"] == len(video["file_names"])
            for frame, rle in enumerate(annotation["segmentations"]):
                assert (rle is None) == (annotation["bboxes"][frame] is None)
                if rle is None:
                    continue
                mask = unpack(rle)
                taken[video["id"]][frame] += mask
                assert mask.sum() == annotation["areas"][frame] > 0
                x, y, width, height = annotation["bboxes"][frame]
                assert mask[y : y + height, x : x + width].sum() == mask.sum()
                assert mask[:, x].any() and mask[y].any()
        assert all(count.max() == 1 for count in taken.values())


def unpack(rle: dict) -> np.ndarray:
    """COCO's rule, spelled out: alternating runs of 0 and 1 down the columns."""
    values = np.arange(len(rle["counts"])) % 2
    return np.repeat(values, rle["counts"]).reshape(rle["size"], order="F")


def test_run_lengths_of_awkward_masks():
    masks = np.zeros((4, 3, 4), bool)
    masks[1] = True
    masks[2, 0, 0] = True
    masks[3, 2, 3] = True
    counts = run_lengths(masks)
    assert counts == [None, [0, 12], [0, 1, 11], [11, 1]]
    noise = np.random.default_rng(0).random((5, 6, 7)) < 0.5
    for mask, count in zip(noise, run_lengths(noise), strict=True):
        assert (unpack({"size": [6, 7], "counts": count}) == mask).all()


def test_grounding_windows_hold_the_action_that_the_query_names(world):
    index = {record["id"]: record for record in lines(world / "clips/index.jsonl")}
    phrases = {action.phrase: name for name, action in ACTIONS.items()}
    asked = Counter()
    for split in ("train", "val"):
        for row in table(world / f"clips/grounding/{split}.csv"):
            record = index[row["video_id"]]
            assert record["split"] == split
            windows = ast.literal_eval(row["relevant_windows"])
            assert [float(row["start_second"]), float(row["end_second"])] == windows[0]
            (name,) = (n for phrase, n in phrases.items() if row["text"].endswith(phrase))
            spans = [[a["start_second"], a["end_second"]] for a in record["actions"]
                     if a["action"] == name]
            assert all(window in spans for window in windows)
            asked[row["video_id"]] += len(windows)
    assert all(asked[name] >= len(record["actions"]) for name, record in index.items())


def test_referring_masks_are_those_of_the_objects_meant(world):
    index = {record["id"]: record for record in lines(world / "clips/index.jsonl")}
    for split in ("train", "val"):
        document = json.loads((world / f"clips/instances_{split}.json").read_text())
        whole = {a["id"]: a["segmentations"] for a in document["annotations"]}
        masks = json.loads((world / f"clips/referring/masks_{split}.json").read_text())
        rows = table(world / f"clips/referring/{split}.csv")
        wanted = {
            (name, expression["text"]): expression["objects"]
            for name, record in index.items() if record["split"] == split
            for expression in record["expressions"]
        }
        assert {(row["video_id"], row["text"]) for row in rows} == set(wanted)
        used = set()
        for row in rows:
            frames = ast.literal_eval(row["frames"])
            assert len(frames) == int(row["length"]) == index[row["video_id"]]["frames"]
            assert ast.literal_eval(row["obj_id"]) == wanted[row["video_id"], row["text"]]
            used.update(map(str, ast.literal_eval(row["anno_id"])))
        assert set(masks) == used
        assert all(mask == whole[int(number)] for number, mask in masks.items())
        assert all(any(mask) for mask in masks.values())


def test_labels_of_instances_are_numbered_as_the_categories(world):
    labels = json.loads((world / "clips/instances_label2id.json").read_text())["MINIWORLD"]
    document = json.loads((world / "clips/instances_val.json").read_text())
    assert {c["name"]: c["id"] for c in document["categories"]} == labels
    # 0 is background, the last is hidden.
    assert sorted(labels.values()) == list(range(1, len(COLOURS) + 2))


def scene_of(items, poses, segments=()):
    """Poses ``(K, T, 5)`` or ``(K, 5)`` held for four frames."""
    tracks = np.array(poses, float)
    tracks = np.repeat(tracks[:, None], 4, axis=1) if tracks.ndim == 2 else tracks
    return Scene(0, tracks.shape[1], "grain", tuple(items), tracks, tuple(segments))


def all_expressions(scene: Scene) -> dict[str, tuple[int, ...]]:
    """What fifty draws say."""
    found: dict[str, tuple[int, ...]] = {}
    for seed in range(50):
        found.update(expressions(Random(seed), Script((scene,)), 32))
    return found


def test_expressions_by_look_and_place_fit_one_shape_only():
    items = [Item("circle", "red"), Item("bar", "red"), Item("circle", "blue", camouflaged=True)]
    poses = [(6, 6, 8, 0, 1), (24, 24, 5.8, 0, 1), (6, 24, 8, 0, 1)]
    assert all_expressions(scene_of(items, poses)) == {
        "the red circle": (0,), "the shape at the top left": (0,),
        "the red bar": (1,), "the bar": (1,), "the shape at the bottom right": (1,),
        "the hidden circle": (2,), "the hidden shape": (2,),
        "the shape at the bottom left": (2,),
    }


def test_expressions_hold_at_every_moment():
    items = [Item("circle", "red"), Item("bar", "blue")]
    tracks = np.array([[(6, 6, 8, 0, 1)] * 4, [(24, 24, 5, 0, 1)] * 4], float)
    fixed = all_expressions(scene_of(items, tracks))
    assert fixed["the large shape"] == (0,) and fixed["the small shape"] == (1,)
    tracks[0, 2, RADIUS] = 6  # not large for a moment
    tracks[1, 3, [X, Y]] = 6  # passes where the other stays
    moving = all_expressions(scene_of(items, tracks))
    assert not any("large" in text or " at the " in text for text in moving)
    assert moving["the small shape"] == (1,) and moving["the circle"] == (0,)


def test_expressions_by_motion_mean_all_who_do_it():
    items = [Item("circle", "red"), Item("bar", "blue"), Item("plus", "white")]
    poses = [(6, 6, 6, 0, 1), (24, 24, 6, 0, 1), (6, 24, 6, 0, 1)]
    segments = [Segment("grow", (0,), 1, 2), Segment("grow", (2,), 1, 3),
                Segment("move left", (1,), 1, 2), Segment("swap", (2, 0), 3, 4)]
    scene = scene_of(items, poses, segments)
    found = all_expressions(scene)
    assert found["the shapes that grow"] == (0, 2)
    assert found["the shape that moves left"] == (1,)
    assert found["the shapes that swap places"] == (0, 2)
    assert queries(Script((scene,))) == {
        "a red circle grows": [segments[0]], "a white plus grows": [segments[1]],
        "a blue bar moves left": [segments[2]],
        "a white plus and a red circle swap places": [segments[3]],
        "a shape grows": segments[:2],
    }
    assert captions(Script((scene,)), 32)[-1].startswith(
        "the shape that grows is a red circle, then the shape that grows is a white plus"
    )


def test_a_video_of_several_scenes_has_no_expressions():
    scene = scene_of([Item("circle", "red")], [(6, 6, 6, 0, 1)])
    assert expressions(Random(0), Script((scene, replace(scene, start=4, end=8))), 32) == {}


def test_captions_and_questions(world):
    for record in lines(world / "clips/index.jsonl"):
        assert record["captions"]
        for question in record["questions"]:
            assert len(set(question["options"])) == 4 and question["answer"] in question["options"]
            assert 0 <= question["time"] < record["frames"] / record["fps"]
        for thing in record["objects"]:
            assert (thing["colour"] is None) == thing["camouflaged"]
            assert ("hidden" in thing["name"]) == thing["camouflaged"]


def test_splits_share_no_frame(world):
    seen: dict[str, str] = {}
    for home in ("clips", "streams"):
        for record in lines(world / home / "index.jsonl"):
            split = f"{home}/{record['split']}"
            for frame in decode(world / home / "videos" / f"{record['id']}.mp4"):
                digest = hashlib.sha256(frame.tobytes()).hexdigest()
                assert seen.setdefault(digest, split) == split
    assert len(set(seen.values())) == 7


# ------------------------------------------------------------------------------- the scripts


def test_deal_is_balanced():
    hands = deal(Random(0), "abcde", [3, 0, 4, 6])
    assert [len(hand) for hand in hands] == [3, 0, 4, 6]
    assert max(Counter(sum(hands, [])).values()) - min(Counter(sum(hands, [])).values()) <= 1


def test_classes_are_balanced(clip_scripts, stream_scripts):
    for videos, names in ((clip_scripts, PRETRAINING_ACTIONS), (stream_scripts, ACTIONS)):
        played = Counter(s.action for job, script in videos for s in script.segments)
        assert set(played) == set(names)
        assert max(played.values()) - min(played.values()) <= 3  # one per deck
        for job, script in videos:
            assert Counter(job.actions) == Counter(s.action for s in script.segments)


def test_background_share_of_streams(stream_scripts):
    share = np.concatenate([targets(script)[:, 0] for _, script in stream_scripts]).mean()
    assert 0.35 < share < 0.48
    several = np.concatenate([targets(s)[:, 1:].sum(1) for _, s in stream_scripts])
    assert 0 < (several > 1).mean() < 0.08


def test_segments_move_their_actors_and_nobody_else(stream_scripts, clip_scripts):
    for _, script in [*stream_scripts, *clip_scripts]:
        assert [scene.start for scene in script.scenes[1:]] == [s.end for s in script.scenes[:-1]]
        for scene in script.scenes:
            still = np.ones((len(scene.items), scene.end - scene.start), bool)
            for segment in scene.segments:
                assert scene.start < segment.start < segment.end <= scene.end
                assert 6 <= segment.end - segment.start <= 14
                for actor in segment.actors:
                    span = slice(segment.start - scene.start, segment.end - scene.start)
                    assert still[actor, span].all(), "an actor does two things at once"
                    still[actor, span] = False
            change = (np.diff(scene.tracks, axis=1) != 0).any(-1)  # (K, T-1)
            assert not change[still[:, 1:]].any()
            assert all(inside(track, 32) for track in scene.tracks)


def test_layouts_of_short_clips():
    params = WorldParams()
    for seed in range(30):
        ending = write_ending(Random(seed), 16, "move left", params)
        assert [s.end for s in ending.segments] == [16]
        single = write_single(Random(seed), 16, "grow", params)
        assert single.segments[0].end < 16
        double = write_script(Random(seed), 16, ["grow", "swap"], params)
        assert len(double.segments) == 2


def test_a_frame_alone_does_not_tell_left_from_right_nor_growing_from_shrinking(clip_scripts):
    poses = {name: [] for name in ("move left", "move right", "grow", "shrink")}
    for _, script in clip_scripts:
        for scene in script.scenes:
            for segment in scene.segments:
                if segment.action in poses:
                    poses[segment.action].append(
                        scene.tracks[segment.actors[0], segment.start : segment.end]
                    )
    for one, other, column in (("move left", "move right", X), ("grow", "shrink", RADIUS)):
        first = np.concatenate([track[:, column] for track in poses[one]])
        second = np.concatenate([track[:, column] for track in poses[other]])
        grid = np.quantile(np.concatenate([first, second]), np.linspace(0, 1, 41))
        gap = abs((first[:, None] <= grid).mean(0) - (second[:, None] <= grid).mean(0)).max()
        assert gap < 0.2, f"{one} and {other} differ by {gap:.2f} in distribution"
        assert np.mean([t[-1, column] - t[0, column] for t in poses[one]]) * np.mean(
            [t[-1, column] - t[0, column] for t in poses[other]]) < 0


def test_every_action_does_what_its_name_says():
    pose = np.array([16.0, 16.0, 5.8, 0.3, 1.0])
    other = np.array([5.0, 16.0, 4.5, 0.0, 1.0])
    grows = {"grow": 1, "shrink": -1}
    ways = {"move left": (X, -1), "move right": (X, 1), "move up": (Y, -1), "move down": (Y, 1),
            "turn clockwise": (ANGLE, 1), "turn counterclockwise": (ANGLE, -1)}
    for name, action in ACTIONS.items():
        rng = Random(0)
        poses = [pose, other][: action.actors]
        tracks = next(t for t in (action.plan(rng, poses, 9, 32) for _ in range(500)) if t)
        track = tracks[0]
        assert track.shape == (9, 5) and len(tracks) == action.actors
        if name in grows:
            assert (np.diff(track[:, RADIUS]) * grows[name] > 0).all()
        elif name in ways:
            column, sign = ways[name]
            steps = np.diff(np.concatenate([[pose[column]], track[:, column]])) * sign
            assert (steps > 0.5 * (0.1 if column == ANGLE else 1)).all()
        elif name in ("swap", "cross"):
            np.testing.assert_allclose(track[-1, :2], other[:2], atol=1e-9)
            np.testing.assert_allclose(tracks[1][-1, :2], pose[:2], atol=1e-9)
        else:
            assert (abs(np.diff(track, axis=0)).max() > 0.5) and track[-1, SHOWN] == 1
            np.testing.assert_allclose(track[-1], pose, atol=1e-6)


def test_progress_moves_at_once_and_arrives():
    assert progress(4).tolist() == [0.25, 0.5, 0.75, 1.0]


# ------------------------------------------------------------------------------- the drawing


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_drawn_in_their_colour_where_their_mask_says(shape):
    track = np.array([[[16.0, 14.0, 7.0, 0.2, 1.0]]])
    for colour, value in COLOURS.items():
        frames, masks = draw([Item(shape, colour)], track, "smooth", Camera(32),
                             np.random.default_rng(0))
        mean = frames[0][masks[0, 0]].mean(0)
        assert 40 < masks.sum() < 170
        assert abs(mean - np.array(value)).max() < 45


def test_later_items_hide_earlier_ones():
    track = np.array([[[16.0, 16.0, 6.0, 0.0, 1.0]], [[16.0, 16.0, 8.0, 0.0, 1.0]]])
    _, masks = draw([Item("circle", "red"), Item("square", "blue")], track, "checks", Camera(32),
                    np.random.default_rng(0))
    assert masks[0].sum() == 0 and masks[1].sum() > 100


def test_a_camouflaged_shape_shows_only_when_it_moves():
    rest = np.repeat(np.array([[[16.0, 16.0, 7.0, 0.0, 1.0]]]), 2, axis=1)
    moving = rest.copy()
    moving[0, 1, X] += 3
    change = {}
    for name, tracks in (("rest", rest), ("moving", moving)):
        frames, masks = draw([Item("square", "red", camouflaged=True)], tracks, "grain",
                             Camera(32), np.random.default_rng(3))
        step = abs(np.diff(frames.astype(int), axis=0))[0].mean(-1)
        change[name] = step[masks[0, 0]].mean(), step[~masks[0].any(0)].mean()
        inside_, outside = frames[0][masks[0, 0]], frames[0][~masks[0, 0]]
        assert abs(inside_.mean() - outside.mean()) < 25
    assert change["rest"] == (0, 0)
    assert change["moving"][0] > 5 and change["moving"][1] < 0.5


def test_camera_shakes_flickers_and_adds_noise():
    track = np.repeat(np.array([[[16.0, 16.0, 7.0, 0.0, 1.0]]]), 3, axis=1)
    for camera in (Camera(32, jitter=0.5), Camera(32, flicker=0.05), Camera(32, noise=0.02)):
        frames, _ = draw([Item("bar", "green")], track, "stripes", camera,
                         np.random.default_rng(0))
        assert (frames[0] != frames[1]).any() and (frames[1] != frames[2]).any()


def test_textures_are_muted_and_vary():
    for kind in TEXTURES:
        rng = np.random.default_rng(0)
        one, two = (texture(kind, 40, 1.0, rng) for _ in range(2))
        assert one.shape == (40, 40, 3) and one.min() >= 0 and one.max() < 0.8
        assert one.std() > 0.01 and abs(one - two).max() > 0.05


def test_contact_sheet(world, tmp_path):
    assert Image.open(contact_sheet(world, tmp_path / "sheet.png", examples=1)).size[0] > 500
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} is not a rendered world"):
        contact_sheet(tmp_path, tmp_path / "sheet.png")


# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frame_size", 31), ("frame_size", 8), ("fps", 0), ("clips_train", -1),
        ("stills_single", 1.5), ("camouflaged", -0.1), ("jitter", -1), ("action_frames", (9, 6)),
        ("action_frames", (2, 6)), ("clip_frames", 10), ("long_clip_frames", 8),
        ("stream_frames", 20), ("long_stream_frames", 160), ("scene_frames", (10, 20)),
        ("background", (0.1, 0.4)), ("crf", 60), ("jpeg_quality", 0),
    ],
)
def test_impossible_parameters_are_refused_by_name_and_value(field, value):
    with pytest.raises(ValueError) as caught:
        WorldParams(**{field: value})
    assert f"{field}={value}" in str(caught.value)


def test_workers_below_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match="workers=0 must be at least 1"):
        render_world(tmp_path, TINY, workers=0)


def test_unknown_texture_is_refused():
    with pytest.raises(ValueError, match="'fur' is unknown; choose one of smooth"):
        texture("fur", 8, 1.0, np.random.default_rng(0))


def test_too_many_actions_are_refused():
    with pytest.raises(ValueError, match="5 actions of at least 6 frames do not fit 16 frames"):
        write_script(Random(0), 16, ["grow"] * 5, WorldParams())


def test_a_plan_without_room_names_what_it_wanted(monkeypatch):
    monkeypatch.setattr("experiments.miniworld.script.ATTEMPTS", 1)
    with pytest.raises(RuntimeError, match=r"no scene of 32 pixels has room for \['swap'"):
        for seed in range(200):
            write_script(Random(seed), 60, ["swap"] * 4, WorldParams())


def test_a_failing_video_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.miniworld.script.ATTEMPTS", 0)
    with pytest.raises(RuntimeError, match="cannot write stream_train_0000: no scene of 32"):
        render_world(tmp_path, TINY, workers=1)
