"""A contact sheet: what a rendered world looks like, for eyes.

python -m experiments.miniworld.sheet WORLD sheet.png
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from .actions import ACTIONS

MARGIN = 150  # pixels for labels
GAP = 2


def contact_sheet(root: Path | str, path: Path | str, zoom: int = 2, examples: int = 2) -> Path:
    """Write a PNG: a few stills, then for every action some of its segments, a frame a column.

    Raises FileNotFoundError where ``root`` is not a rendered world.
    """
    root, path = Path(root), Path(path)
    if not (root / "world.json").is_file():
        raise FileNotFoundError(f"{root} is not a rendered world: it holds no world.json")
    rows = [_stills(root, "train")]
    for name in ACTIONS:
        rows += _segments(root, name, examples)
    height = max(len(images) for _, images in rows)
    side = rows[0][1][0].shape[0] * zoom + GAP
    sheet = Image.new("RGB", (MARGIN + height * side, len(rows) * side), (20, 20, 20))
    pen = ImageDraw.Draw(sheet)
    for line, (label, images) in enumerate(rows):
        pen.multiline_text((4, line * side + 4), label, fill=(230, 230, 230), font_size=11)
        for column, image in enumerate(images):
            big = Image.fromarray(image).resize((side - GAP, side - GAP), Image.Resampling.NEAREST)
            sheet.paste(big, (MARGIN + column * side, line * side))
    sheet.save(path)
    return path


def _stills(root: Path, split: str, count: int = 18) -> tuple[str, list[np.ndarray]]:
    with (root / "stills" / f"{split}.csv").open() as file:
        rows = list(csv.DictReader(file))[:count]
    return "stills", [np.asarray(Image.open(root / "stills" / row["image"])) for row in rows]


def _segments(root: Path, name: str, examples: int) -> list[tuple[str, list[np.ndarray]]]:
    """The first segments of an action, two frames of rest before and after where there are any."""
    rows = []
    for home in (root / "clips", root / "streams"):
        for line in (home / "index.jsonl").open():
            video = json.loads(line)
            for action in video["actions"]:
                if action["action"] != name:
                    continue
                start, end = max(0, action["start_frame"] - 2), action["end_frame"] + 2
                images = _frames(home / "videos" / f"{video['id']}.mp4", start, end)
                rows.append((f"{video['id']}\n{action['caption'].replace(' and ', chr(10))}",
                             images))
                break
            if len(rows) == examples:
                return rows
    return rows


def _frames(path: Path, start: int, end: int) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        frames = (frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))
        return [image for index, image in enumerate(frames) if start <= index < end]


def main(argv: list[str] | None = None) -> Path:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("world", type=Path, help="folder that holds world.json")
    parser.add_argument("png", type=Path, help="file to write")
    parser.add_argument("--examples", type=int, default=2, help="segments per action")
    options = parser.parse_args(argv)
    return contact_sheet(options.world, options.png, examples=options.examples)


if __name__ == "__main__":
    main()
