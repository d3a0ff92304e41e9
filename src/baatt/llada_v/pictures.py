"""Images and videos as pixels for a vision tower of fixed size, and its features as the tokens of a language model.

Pillow images of any size and mode, or the path of a video (which needs PyAV), become pixels [F, 3, S, S] in [-1, 1]: an
image one padded square, or the whole of it and its tiles, a video F frames spread evenly over it. Features
[F, n * n, D] of these parts and a newline [D] become tokens [N, D]: of an image the whole, then its tiles put together,
the margin cut off, a newline after every row; of a video every frame pooled. Knows nothing of models and of language.
"""

import ast
import bisect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

BLACK, GREY = (0, 0, 0), (127, 127, 127)
#: Above this ratio of sides too many features of tiles are interpolated down; below, a few too many are kept.
TOLERATED_EXCESS = 1.1


class TileGrid(NamedTuple):
    """How an image was cut: its size in pixels and the tiles that cover its canvas."""

    width: int
    height: int
    columns: int
    rows: int


def as_pixels(images: Iterable[Image.Image], size: int) -> Tensor:
    """Every image stretched to a square, [F, 3, size, size] float32 in [-1, 1]."""
    arrays = [np.asarray(image.convert("RGB").resize((size, size))) for image in images]
    return rearrange((torch.from_numpy(np.stack(arrays)).float() / 255 - 0.5) / 0.5, "F h w C -> F C h w")


def pad_to_square(image: Image.Image) -> Image.Image:
    """Centred on a grey square of its longer side."""
    return _centred(image, (max(image.size), max(image.size)), GREY)


def cut_into_tiles(
    image: Image.Image, canvases: list[tuple[int, int]], size: int
) -> tuple[list[Image.Image], TileGrid]:
    """The whole image, stretched to one tile of size x size, then its tiles row by row; and how they lie.

    Args:
        canvases: (width, height) it may be scaled to; the one that shows most of it and wastes least is taken.
    """
    # Takes (height, width) by its names; what it computes is the same with both exchanged.
    width, height = select_best_resolution(image.size, canvases)
    scale = min(width / image.width, height / image.height)
    inner = image.resize((min(math.ceil(image.width * scale), width), min(math.ceil(image.height * scale), height)))
    shown = _centred(inner, (width, height), BLACK)
    corners = [(left, top) for top in range(0, height, size) for left in range(0, width, size)]
    tiles = [shown.crop((left, top, left + size, top + size)) for left, top in corners]
    return [image.resize((size, size)), *tiles], TileGrid(*image.size, columns=width // size, rows=height // size)


def read_canvases(pinpoints: str | Sequence[Sequence[int]], size: int) -> list[tuple[int, int]]:
    """The canvases, (width, height), that `image_grid_pinpoints` of a config.json names.

    Args:
        pinpoints: "(1x1),...,(6x6)", from the smallest to the largest number of tiles, or pairs of pixels.
        size: pixels of a tile's side.

    Raises:
        ValueError: neither, or sizes that are not made of whole tiles.
    """
    ranges = re.findall(r"\((\d+)x(\d+)\)", pinpoints) if isinstance(pinpoints, str) else []
    if ranges:
        columns, rows = (range(int(first), int(last) + 1) for first, last in zip(ranges[0], ranges[-1], strict=True))
        canvases = [(column * size, row * size) for column in columns for row in rows]
    else:
        try:
            pairs = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
            canvases = [(int(width), int(height)) for width, height in pairs]
        except (ValueError, TypeError, SyntaxError):
            canvases = []
    if not canvases or any(side < size or side % size for canvas in canvases for side in canvas):
        raise ValueError(
            f"image_grid_pinpoints must be like '(1x1),...,(6x6)' or pairs of multiples of {size}, got {pinpoints!r}"
        )
    return canvases


def read_frames(path: str | Path, count: int) -> list[Image.Image]:
    """`count` frames of a video, evenly spread from its first to its last; a shorter video repeats some.

    Raises:
        ImportError: PyAV is not installed.
        FileNotFoundError: no such file.
        ValueError: not a video that can be decoded.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such video")
    try:
        import av
    except ModuleNotFoundError:
        raise ImportError("av is needed for videos: pip install 'baatt[multimodal]'") from None
    try:
        with av.open(str(path)) as container:
            return _decode(container, count)
    except (av.error.FFmpegError, LookupError) as error:
        raise ValueError(f"{path}: must be a video that can be decoded: {error}") from error


def _decode(container: Any, count: int) -> list[Image.Image]:
    """Decode no more than it takes: from the key frame before a wanted frame on."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    packets = [packet for packet in container.demux(stream) if packet.pts is not None]
    times = sorted(packet.pts for packet in packets)
    keys = sorted(packet.pts for packet in packets if packet.is_keyframe)
    if not times or not keys:
        raise LookupError("no frame with a time")
    wanted = [times[index] for index in np.linspace(0, len(times) - 1, count, dtype=int)]
    found: dict[int, Image.Image] = {}
    frames: Iterator[Any] = iter(())
    reached = -math.inf
    for time in sorted(set(wanted)):
        key = keys[max(0, bisect.bisect_right(keys, time) - 1)]
        if key > reached:
            container.seek(key, stream=stream)
            frames = container.decode(stream)
        frame = next((frame for frame in frames if frame.pts is not None and frame.pts >= time), None)
        if frame is None:
            raise LookupError(f"no frame at {float(time * stream.time_base):.3f} s")
        found[time], reached = frame.to_image(), time
    return [found[time] for time in wanted]


def _centred(image: Image.Image, size: tuple[int, int], colour: tuple[int, int, int]) -> Image.Image:
    canvas = Image.new("RGB", size, colour)
    canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return canvas


def image_tokens(features: Tensor, grid: TileGrid, newline: Tensor, max_tiles: int | None) -> Tensor:
    """Tokens [N, D] of one image that was cut into tiles.

    Args:
        features: [1 + rows * columns, n * n, D], the whole image first, then its tiles row by row.
        newline: [D], put after every row of the tiles' features.
        max_tiles: tiles' features are interpolated down to about the number of this many tiles; None keeps all.
    """
    patches = features.shape[1]
    pattern = "(rows columns) (h w) D -> (rows h) (columns w) D"
    tiles = rearrange(features[1:], pattern, rows=grid.rows, columns=grid.columns, h=math.isqrt(patches))
    height, width = tiles.shape[:2]
    # The margin of the canvas that the image leaves empty goes. In the published order of operations: another one
    # rounds differently for some sizes.
    if grid.width / grid.height > width / height:
        margin = (height - int(grid.height * (width / grid.width))) // 2
        tiles = tiles[margin : height - margin]
    else:
        margin = (width - int(grid.width * (height / grid.height))) // 2
        tiles = tiles[:, margin : width - margin]
    height, width = tiles.shape[:2]
    excess = 0.0 if max_tiles is None else math.sqrt(height * width / (max_tiles * patches))
    if excess > TOLERATED_EXCESS:
        size = int(height // excess), int(width // excess)
        channels = F.interpolate(rearrange(tiles, "h w D -> 1 D h w"), size=size, mode="bilinear")
        tiles = rearrange(channels, "1 D h w -> h w D")
    return torch.cat((features[0], _with_newlines(tiles[None], newline, NEWLINES["grid"])))


def video_tokens(features: Tensor, newline: Tensor, *, stride: int, mode: str, newlines: str) -> Tensor:
    """Tokens [N, D] of the frames of a video, in their order.

    Args:
        features: [F, n * n, D].
        stride: patches of a side that become one token. mode: how, a name in `POOLING`.
        newlines: where the newline [D] goes, a name in `NEWLINES`.
    """
    channels = rearrange(features, "F (h w) D -> F D h w", h=math.isqrt(features.shape[1]))
    frames = rearrange(POOLING[mode](channels, stride), "F D h w -> F h w D")
    return _with_newlines(frames, newline, NEWLINES[newlines])


def _with_newlines(frames: Tensor, newline: Tensor, groups: str | None) -> Tensor:
    """Tokens of frames [F, h, w, D] in their order, a newline behind every group of them."""
    if groups is None:
        return rearrange(frames, "F h w D -> (F h w) D")
    grouped = rearrange(frames, f"F h w D -> {groups} D")
    return rearrange(torch.cat((grouped, repeat(newline, "D -> G 1 D", G=len(grouped))), dim=1), "G N D -> (G N) D")


#: [F, D, h, w] and a stride -> [F, D, h / stride, w / stride]. The last two drop an incomplete row or column.
POOLING: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "bilinear": lambda x, stride: F.interpolate(x, [math.ceil(side / stride) for side in x.shape[2:]], mode="bilinear"),
    "average": F.avg_pool2d,
    "max": F.max_pool2d,
}

#: By the names that `mm_newline_position` has in config.json: the groups of tokens that a newline ends.
NEWLINES: Mapping[str, str | None] = {
    "grid": "(F h) w",
    "frame": "F (h w)",
    "one_token": "1 (F h w)",
    "no_token": None,
}
