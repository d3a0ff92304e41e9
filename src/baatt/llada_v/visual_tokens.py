"""From features of picture parts to the row of visual tokens that a language model reads.

An image: the features of the whole, then those of its tiles put together, the margin cut off, a newline after every
row. A video: the features of every frame pooled, newlines where the checkpoint wants them. In: features [F, n * n, D]
in the language model's width and a newline [D]. Out: tokens [N, D]. Knows nothing of pixels and of language.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

#: Above this ratio of sides too many features of tiles are interpolated down; below, a few too many are kept.
TOLERATED_EXCESS = 1.1


class TileGrid(NamedTuple):
    """How an image was cut: its size in pixels and the tiles that cover its canvas."""

    width: int
    height: int
    columns: int
    rows: int


def image_tokens(features: Tensor, grid: TileGrid, newline: Tensor, max_tiles: int | None) -> Tensor:
    """Tokens [N, D] of one image that was cut into tiles.

    Args:
        features: [1 + rows * columns, n * n, D], the whole image first, then its tiles row by row.
        newline: [D], put after every row of the tiles' features.
        max_tiles: tiles' features are interpolated down to about the number of this many tiles; None keeps all.

    Raises:
        ValueError: another number of parts than the grid has.
    """
    if features.shape[0] != 1 + grid.rows * grid.columns:
        raise ValueError(f"features must be of 1 + {grid.rows} * {grid.columns} parts, got {features.shape[0]}")
    side = _side(features)
    tiles = rearrange(
        features[1:], "(rows columns) (h w) D -> (rows h) (columns w) D", rows=grid.rows, columns=grid.columns, h=side
    )
    tiles = _without_margin(tiles, grid.width, grid.height)
    height, width = tiles.shape[:2]
    excess = 0.0 if max_tiles is None else math.sqrt(height * width / (max_tiles * side**2))
    if excess > TOLERATED_EXCESS:
        channels = rearrange(tiles, "h w D -> 1 D h w")
        tiles = rearrange(_resize(channels, int(height // excess), int(width // excess)), "1 D h w -> h w D")
    return torch.cat((features[0], _rows_with_newlines(tiles[None], newline)))


def video_tokens(features: Tensor, newline: Tensor, *, stride: int, mode: str, newlines: str) -> Tensor:
    """Tokens [N, D] of the frames of a video, in their order.

    Args:
        features: [F, n * n, D].
        stride: patches of a side that become one token. mode: how, a name in `POOLING`.
        newlines: where the newline [D] goes, a name in `NEWLINES`.
    """
    side = _side(features)
    channels = POOLING[mode](rearrange(features, "F (h w) D -> F D h w", h=side), stride)
    frames = rearrange(channels, "F D h w -> F h w D")
    return NEWLINES[newlines](frames, newline)


def _side(features: Tensor) -> int:
    side = math.isqrt(features.shape[1])
    if side * side != features.shape[1]:
        raise ValueError(f"features must be of n * n patches, got {features.shape[1]}")
    return side


def _without_margin(tiles: Tensor, width: int, height: int) -> Tensor:
    """Cut what an image of this size leaves empty of a canvas [h, w, D] that it was centred on."""
    rows, columns = tiles.shape[:2]
    # In the published order of operations: another one rounds differently for some sizes.
    if width / height > columns / rows:
        margin = (rows - int(height * (columns / width))) // 2
        return tiles[margin : rows - margin]
    margin = (columns - int(width * (rows / height))) // 2
    return tiles[:, margin : columns - margin]


def _resize(channels: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(channels, size=(height, width), mode="bilinear")


def pool_bilinear(channels: Tensor, stride: int) -> Tensor:
    """Interpolate [F, D, h, w] to ceil(h / stride) x ceil(w / stride)."""
    return _resize(channels, math.ceil(channels.shape[2] / stride), math.ceil(channels.shape[3] / stride))


def _rows_with_newlines(frames: Tensor, newline: Tensor) -> Tensor:
    """A newline after every row of every frame."""
    ends = repeat(newline, "D -> F h 1 D", F=frames.shape[0], h=frames.shape[1])
    return rearrange(torch.cat((frames, ends), dim=2), "F h w D -> (F h w) D")


def _frames_with_newlines(frames: Tensor, newline: Tensor) -> Tensor:
    """A newline after every frame."""
    flat = rearrange(frames, "F h w D -> F (h w) D")
    return rearrange(torch.cat((flat, repeat(newline, "D -> F 1 D", F=flat.shape[0])), dim=1), "F N D -> (F N) D")


def _one_newline(frames: Tensor, newline: Tensor) -> Tensor:
    """One newline behind all frames."""
    return torch.cat((rearrange(frames, "F h w D -> (F h w) D"), newline[None]))


def _no_newline(frames: Tensor, newline: Tensor) -> Tensor:
    return rearrange(frames, "F h w D -> (F h w) D")


#: [F, D, h, w] and a stride -> [F, D, h / stride, w / stride]. The last two drop an incomplete row or column.
POOLING: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "bilinear": pool_bilinear,
    "average": F.avg_pool2d,
    "max": F.max_pool2d,
}

#: By the names that `mm_newline_position` has in config.json.
NEWLINES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grid": _rows_with_newlines,
    "frame": _frames_with_newlines,
    "one_token": _one_newline,
    "no_token": _no_newline,
}
