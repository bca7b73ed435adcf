"""Render a world to disk: jobs, worker processes, and the folder that appears only when whole.

    WORLD/world.json                         parameters, counts, digest
    WORLD/stills/{train,val}/*.jpg, {train,val}.csv    image (relative to stills/), caption, ...
    WORLD/clips/videos/<id>.mp4              pre-training clips
    WORLD/clips/recognition/, localization/, grounding/, referring/
                                             lists; videos are named relative to clips/videos/
    WORLD/streams/videos/<name>.mp4          untrimmed videos, with target_perframe/<name>.npy
    WORLD/{clips,streams}/index.jsonl        everything known of a video
    WORLD/{clips,streams}/instances_*.json   masks, YouTube-VIS

Every picture depends on its seed alone (world's seed, kind, split, index), so neither the number
of processes nor the order of work changes a byte, and splits share nothing.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from tqdm import tqdm

from experiments.environment import cores

from .actions import ANGLE, CLASS_NAMES, RADIUS
from .jobs import Job, plan
from .language import (
    captions,
    describe,
    expressions,
    queries,
    questions,
    sentence,
    still_caption,
)
from .lists import category, list_clips, list_stills, list_streams
from .params import RENDER_VERSION, WorldParams, seed_of, world_key
from .scene import TEXTURES, Camera, draw
from .script import Scene, Script, cast, place, write_ending, write_script, write_single
from .writers import instance, write_json, write_still, write_video

logger = logging.getLogger(__name__)

STILL_RADIUS = 6 / 32  # least radius of a shape in a still, as share of the frame's side
STILL_TILT = 0.3  # largest tilt of a shape in a still, radians


def render_world(root: Path | str, params: WorldParams, workers: int | None = None) -> Path:
    """The folder of the world of these parameters, rendered below ``root`` unless it is there.

    ``workers`` processes share the work (None: one per core; 1: this process alone); a script
    that uses several needs the ``if __name__ == "__main__"`` guard. An interrupted render leaves
    nothing behind. Raises ValueError for ``workers`` below 1.
    """
    render = partial(_render, params=params)
    return rendered(Path(root) / f"world-{world_key(params)}", render, workers)


def rendered(folder: Path, render: Callable[..., None], workers: int | None = None) -> Path:
    """The folder, filled by ``render(folder, workers=…)`` unless it is whole already."""
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} must be at least 1, or None for one per core")
    if (folder / "world.json").is_file():
        logger.info("miniworld: reusing %s", folder)
        return folder
    with appearing(folder) as beside:
        render(beside, workers=workers or cores())
    return folder


@contextmanager
def appearing(folder: Path, whole: str = "world.json") -> Iterator[Path]:
    """A folder beside the wanted one, renamed to it at the end, removed if anything fails.

    The file ``whole``, once written, tells that the folder is.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial_folder = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial_folder
        partial_folder.chmod(0o755)  # mkdtemp keeps it to its owner
        try:
            os.replace(partial_folder, folder)
        except OSError:
            if not (folder / whole).is_file():
                raise
            logger.info("miniworld: another process finished %s first; using that", folder)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def _render(root: Path, params: WorldParams, workers: int) -> None:
    jobs = plan(params)
    for folder in ("stills/train", "stills/val", "clips/videos", "clips/recognition",
                   "clips/localization", "clips/grounding", "clips/referring",
                   "streams/videos", "streams/target_perframe"):
        (root / folder).mkdir(parents=True)
    work = partial(_perform, params=params, root=root)
    records = []
    with mapper(workers) as run, tqdm(
        total=sum(job.frames for job in jobs), desc="miniworld", unit="frame", mininterval=1
    ) as bar:
        for job, record in zip(jobs, run(work, jobs), strict=True):
            records.append(record)
            bar.update(job.frames)
    kinds = {kind: [(j, r) for j, r in zip(jobs, records, strict=True) if j.kind == kind]
             for kind in ("still", "clip", "stream")}
    list_stills(root / "stills", kinds["still"])
    list_clips(root / "clips", kinds["clip"])
    list_streams(root / "streams", kinds["stream"], params)
    counts = Counter(f"{job.kind}s/{job.split}" for job in jobs)
    write_json(
        root / "world.json",
        {
            "version": RENDER_VERSION,
            "digest": world_key(params),
            "parameters": asdict(params),
            "counts": dict(counts),
            "frames": sum(job.frames for job in jobs),
        },
        indent=2,
    )


@contextmanager
def mapper(workers: int):
    """An ordered map over this process or over a pool of spawned ones."""
    if workers == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context)
    try:
        yield partial(pool.map, chunksize=8)
    finally:
        pool.shutdown(cancel_futures=True)


def _perform(job: Job, params: WorldParams, root: Path) -> dict:
    """Write the files of one job and return its rows of the lists."""
    seed = seed_of(params.seed, job.kind, job.split, job.index)
    rng, pixels = Random(seed), np.random.default_rng(seed)
    if job.kind == "still":
        return _perform_still(job, params, root / "stills", rng, pixels)
    try:
        script = _write(job, params, rng)
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(f"miniworld cannot write {job.name}: {error}") from error
    frames, masks = _draw(script, params, pixels)
    home = root / f"{job.kind}s"
    write_video(home / "videos" / f"{job.name}.mp4", frames, params.fps, params.crf)
    if job.kind == "stream":
        np.save(home / "target_perframe" / f"{job.name}.npy", targets(script))
    record = _describe(job, script, params, rng, masks.any((1, 2, 3)))
    return {
        "index": json.dumps(record),
        "actions": record["actions"],
        "queries": record["queries"],
        "expressions": record["expressions"],
        **_annotate(job, script, masks),
    }


def _perform_still(
    job: Job, params: WorldParams, home: Path, rng: Random, pixels: np.random.Generator
) -> dict:
    count = 1 if rng.random() < params.stills_single else rng.choice((2, 3))
    while (poses := place(rng, count, params.frame_size)) is None:
        pass
    for pose in poses:  # large and upright: at 32 pixels a small tilted shape is a blob
        pose[RADIUS] = max(pose[RADIUS], STILL_RADIUS * params.frame_size)
        pose[:2] = pose[:2].clip(pose[RADIUS], params.frame_size - pose[RADIUS])
        pose[ANGLE] = rng.uniform(-STILL_TILT, STILL_TILT)
    items = cast(rng, count, camouflaged=0.0)
    poses.sort(key=lambda pose: -pose[RADIUS])  # the largest is named first and lies behind
    tracks = np.stack(poses)[:, None]  # (K, 1, 5)
    scene = Scene(0, 1, rng.choice(list(TEXTURES)), tuple(items), tracks, ())
    frames, _ = _draw(Script((scene,)), params, pixels)
    write_still(home / job.name, frames[0], params.jpeg_quality)
    caption = still_caption(rng, scene, params.frame_size)
    return {"row": (job.name, caption, items[0].shape, items[0].colour)}


def _write(job: Job, params: WorldParams, rng: Random) -> Script:
    if job.layout == "ending":
        return write_ending(rng, job.frames, job.actions[0], params)
    if job.layout == "single":
        return write_single(rng, job.frames, job.actions[0], params)
    overlap = params.overlap if job.kind == "stream" else 0.0
    return write_script(rng, job.frames, job.actions, params, overlap)


def _draw(
    script: Script, params: WorldParams, pixels: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Frames ``(L, S, S, 3)`` and visible masks of all items of all scenes ``(K, L, S, S)``."""
    camera = Camera(params.frame_size, params.jitter, params.flicker, params.noise)
    size = params.frame_size
    frames = np.empty((script.frames, size, size, 3), np.uint8)
    masks = np.zeros((sum(len(s.items) for s in script.scenes), script.frames, size, size), bool)
    first = 0
    for scene in script.scenes:
        last = first + len(scene.items)
        frames[scene.start : scene.end], masks[first:last, scene.start : scene.end] = draw(
            scene.items, scene.tracks, scene.background, camera, pixels
        )
        first = last
    return frames, masks


def targets(script: Script) -> np.ndarray:
    """``(L, 1 + C)`` float32 multi-hot, classes as in CLASS_NAMES; column 0 where nothing acts."""
    out = np.zeros((script.frames, len(CLASS_NAMES)), np.float32)
    for segment in script.segments:
        out[segment.start : segment.end, CLASS_NAMES.index(segment.action)] = 1
    out[:, 0] = out[:, 1:].sum(1) == 0
    return out


def seconds(start: int, end: int, fps: int) -> tuple[float, float]:
    """The time of frames ``start`` to ``end`` (exclusive), bounds halfway between frames.

    So the test ``start <= timestamp <= end`` finds exactly these frames, however a reader rounds
    its timestamps.
    """
    return max(0.0, (start - 0.5) / fps), (end - 0.5) / fps


def _describe(
    job: Job, script: Script, params: WorldParams, rng: Random, seen: np.ndarray
) -> dict:
    """The line of a video in index.jsonl; ``seen`` tells which objects show at all, ``(K,)``."""
    objects, actions, scenes = [], [], []
    for scene in script.scenes:
        first = len(objects)
        scenes.append({"start_frame": scene.start, "end_frame": scene.end,
                       "background": scene.background})
        for item, track in zip(scene.items, scene.tracks, strict=True):
            objects.append({
                "id": len(objects), "scene": len(scenes) - 1, "shape": item.shape,
                "colour": None if item.camouflaged else item.colour,
                "camouflaged": item.camouflaged,
                "name": describe(item, track[0, RADIUS], params.frame_size),
            })
        for segment in scene.segments:
            begin, end = seconds(segment.start, segment.end, params.fps)
            actions.append({
                "action": segment.action, "objects": [first + k for k in segment.actors],
                "start_frame": segment.start, "end_frame": segment.end,
                "start_second": begin, "end_second": end,
                "caption": sentence(scene, segment, params.frame_size),
            })
    return {
        "id": job.name, "split": job.split, "frames": script.frames, "fps": params.fps,
        "captions": captions(script, params.frame_size),
        "questions": questions(rng, script, params.fps, params.frame_size),
        "queries": [
            {"text": text, "windows": [seconds(s.start, s.end, params.fps) for s in segments]}
            for text, segments in queries(script).items()
        ],
        "expressions": [
            {"text": text, "objects": meant}
            for text, meant in expressions(rng, script, params.frame_size).items()
            if seen[list(meant)].all()
        ],
        "scenes": scenes, "objects": objects, "actions": actions,
    }


def _annotate(job: Job, script: Script, masks: np.ndarray) -> dict:
    """The video and its annotations for the instances file, as JSON text."""
    size = masks.shape[-1]
    video = {
        "id": job.video_id, "file_name": f"{job.name}.mp4", "width": size, "height": size,
        "length": script.frames,
        "file_names": [f"{job.name}/{frame:05d}.jpg" for frame in range(script.frames)],
    }
    items = [item for scene in script.scenes for item in scene.items]
    annotations = [
        instance(mask, id=job.video_id * 100 + number, video_id=job.video_id,
                 category_id=category(item), camouflaged=item.camouflaged)
        for number, (item, mask) in enumerate(zip(items, masks, strict=True))
    ]
    return {
        "video": json.dumps(video),
        "annotations": [json.dumps(a) for a in annotations],
        "annotation_ids": [a["id"] for a in annotations],
        "segmentations": [json.dumps(a["segmentations"]) for a in annotations],
    }
