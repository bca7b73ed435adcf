"""From the tower's patch tokens to tokens of the LLM: project, pool, lay out.

The order is LLaVA-NeXT's: first the projector, then pooling, in the width of the LLM.

    video   (T, N, D) -> project (T, N, H) -> pool (T, n, H) -> newlines -> (tokens, H)
    image   (1 + tiles, N, D) -> project -> whole picture, stitched tiles -> (tokens, H)

Letters as in the backbone; N patches of a frame before and n after pooling, H the LLM's width.
Grids are square and row-major.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

Size = tuple[int, int]  # width, height


def build_projector(kind: str, in_size: int, out_size: int) -> nn.Module:
    """Projector into the LLM: ``linear``, or ``mlp<N>x_gelu`` of N linears with exact GELU between.

    Raises:
        ValueError: another kind.
    """
    if kind == "linear":
        return nn.Linear(in_size, out_size)
    depth = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if depth is None:
        raise ValueError(f"projector_type={kind!r} is unknown; use 'linear' or 'mlp<N>x_gelu'")
    layers: list[nn.Module] = [nn.Linear(in_size, out_size)]
    for _ in range(1, int(depth[1])):
        layers += [nn.GELU(), nn.Linear(out_size, out_size)]
    return nn.Sequential(*layers)


def grid_side(count: int) -> int:
    """Side of a square grid of ``count`` patches.

    Raises:
        ValueError: no square.
    """
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"{count} patch tokens are no square grid; frames must be square")
    return side


def pool_patches(tokens: Tensor, mode: str, stride: int) -> Tensor:
    """Pool the patches of each frame, ``(T, N, H)`` to ``(T, n, H)``.

    ``average`` and ``max`` drop what is left over at the edge; ``bilinear`` resizes to
    ``ceil(side / stride)`` with half-pixel centres.

    Raises:
        ValueError: an unknown mode, or a stride larger than the grid.
    """
    side = grid_side(tokens.shape[1])
    if stride == 1:
        return tokens
    if stride > side:
        raise ValueError(f"pool_stride={stride} leaves nothing of a {side} x {side} grid")
    grid = tokens.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (T, H, side, side)
    if mode == "average":
        grid = F.avg_pool2d(grid, stride)
    elif mode == "max":
        grid = F.max_pool2d(grid, stride)
    elif mode == "bilinear":
        size = math.ceil(side / stride)
        grid = F.interpolate(grid, size=(size, size), mode="bilinear", align_corners=False)
    else:
        raise ValueError(f"pool_mode={mode!r} is unknown; use 'average', 'max' or 'bilinear'")
    return grid.flatten(2).transpose(1, 2)


# -- videos ---------------------------------------------------------------------------------------


def lay_out_frames(
    tokens: Tensor, newline: Tensor | None, merge_type: str, position: str
) -> Tensor:
    """Give each frame the newlines that are its own, ``(T, n, H)`` to ``(T, n', H)``."""
    if merge_type == "flat" or position not in ("grid", "frame"):
        return tokens
    frames, count, width = tokens.shape
    if position == "frame":
        return torch.cat([tokens, newline.expand(frames, 1, width)], dim=1)
    side = grid_side(count)
    rows = tokens.unflatten(1, (side, side))  # (T, side, side, H)
    rows = torch.cat([rows, newline.expand(frames, side, 1, width)], dim=2)
    return rows.flatten(1, 2)


def join_frames(frames: Tensor, newline: Tensor | None, merge_type: str, position: str) -> Tensor:
    """Frames that are laid out already, one after the other: ``(T, n', H)`` to ``(tokens, H)``."""
    tokens = frames.flatten(0, 1)
    if position == "one_token" and merge_type == "spatial_unpad":
        tokens = torch.cat([tokens, newline[None]])
    return tokens


# -- images ---------------------------------------------------------------------------------------


def best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The pinpoint that shows most of the picture's pixels; among equals, the least waste.

    Args:
        size: of the picture.
        pinpoints: sizes to choose from; the first one wins a tie.
    """
    width, height = size

    def worth(point: Size) -> tuple[int, int]:
        scale = min(point[0] / width, point[1] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - point[0] * point[1]

    return max((tuple(point) for point in pinpoints), key=worth)


def tile_image(image: Image.Image, pinpoints: Sequence[Size], tile: int) -> np.ndarray:
    """Cut an image into squares: first the whole, squashed; then its tiles, row by row.

    Args:
        image: any PIL image; taken as RGB.
        pinpoints: see `best_resolution`.
        tile: side of a square, in pixels; pinpoints are multiples of it.

    Returns:
        (1 + tiles, tile, tile, 3) uint8. Tiles keep the aspect; what they leave over is black.

    Raises:
        ValueError: a pinpoint that does not divide into tiles.
    """
    image = image.convert("RGB")
    target = best_resolution(image.size, pinpoints)
    if target[0] % tile or target[1] % tile:
        raise ValueError(f"pinpoint {target} does not divide into tiles of {tile} pixels")
    scale = min(target[0] / image.width, target[1] / image.height)
    inner = tuple(
        min(math.ceil(side * scale), bound) for side, bound in zip(image.size, target, strict=True)
    )
    canvas = Image.new("RGB", target)
    corner = ((target[0] - inner[0]) // 2, (target[1] - inner[1]) // 2)
    canvas.paste(image.resize(inner, Image.Resampling.BICUBIC), corner)
    whole = np.asarray(image.resize((tile, tile), Image.Resampling.BICUBIC))
    pixels = np.asarray(canvas)
    tiles = pixels.reshape(target[1] // tile, tile, target[0] // tile, tile, 3)
    tiles = tiles.swapaxes(1, 2).reshape(-1, tile, tile, 3)  # (tiles, tile, tile, 3)
    return np.concatenate([whole[None], tiles])


def lay_out_image(
    tokens: Tensor,
    grid: Size,
    size: Size | None,
    newline: Tensor | None,
    merge_type: str,
) -> Tensor:
    """Tokens of one image in their final order.

    Args:
        tokens: ``(1 + tiles, N, H)``, the whole picture first; or ``(1, N, H)``, it alone.
        grid: tiles along width and height.
        size: of the original picture, whose aspect tells which rows and columns are padding.
        newline: ``(H,)``, needed by ``spatial_unpad``.
        merge_type: ``flat`` keeps tile after tile; ``spatial`` stitches them row by row;
            ``spatial_unpad`` also cuts padding off and ends every row with the newline.

    Returns:
        ``(tokens, H)``.

    Raises:
        ValueError: another number of tiles than the grid has.
    """
    whole, tiles = tokens[0], tokens[1:]
    if not len(tiles):
        return torch.cat([whole, newline[None]]) if merge_type == "spatial_unpad" else whole
    if len(tiles) != grid[0] * grid[1]:
        raise ValueError(f"{len(tiles)} tiles for a grid of {grid[0]} x {grid[1]}")
    if merge_type == "flat":
        return tokens.flatten(0, 1)
    side = grid_side(tokens.shape[1])
    rows = tiles.unflatten(1, (side, side)).unflatten(0, (grid[1], grid[0]))
    rows = rows.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (rows, columns, H)
    if merge_type == "spatial_unpad":
        rows = _without_padding(rows, size)
        rows = torch.cat([rows, newline.expand(len(rows), 1, -1)], dim=1)
    return torch.cat([whole, rows.flatten(0, 1)])


def _without_padding(rows: Tensor, size: Size) -> Tensor:
    """Cut rows or columns that hold padding alone; an odd one stays."""
    height, width = rows.shape[:2]
    if size[0] / size[1] > width / height:
        kept = int(size[1] * (width / size[0]))
        margin = (height - kept) // 2
        return rows[margin : height - margin]
    kept = int(size[0] * (height / size[1]))
    margin = (width - kept) // 2
    return rows[:, margin : width - margin]
