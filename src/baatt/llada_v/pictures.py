"""Images and video files as pixels for a vision tower of fixed size.

In: Pillow images of any size and mode, or the path of a video. Out: pixels [F, 3, S, S] in [-1, 1], where an image is
one padded square or the whole of it and its tiles, and F frames of a video are spread evenly over it. Needs Pillow, for
videos PyAV: `pip install 'baatt[multimodal]'`. Knows nothing of models.
"""

import ast
import bisect
import importlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from baatt.llada_v.visual_tokens import TileGrid

if TYPE_CHECKING:
    from PIL.Image import Image

EXTRA = "pip install 'baatt[multimodal]'"
BLACK, GREY = (0, 0, 0), (127, 127, 127)


class Size(NamedTuple):
    """Pixels."""

    width: int
    height: int


def as_pixels(images: Iterable["Image"], size: int) -> Tensor:
    """Every image stretched to a square, [F, 3, size, size] float32 in [-1, 1]."""
    resampling = _import("PIL.Image").Resampling.BICUBIC
    arrays = [np.asarray(image.convert("RGB").resize((size, size), resampling)) for image in images]
    scaled = torch.from_numpy(np.stack(arrays)).float() / 255
    return rearrange((scaled - 0.5) / 0.5, "F h w C -> F C h w")


def pad_to_square(image: "Image") -> "Image":
    """Centred on a grey square of its longer side."""
    longer = max(image.size)
    return _centred(image, Size(longer, longer), GREY)


def cut_into_tiles(image: "Image", canvases: Sequence[Size], size: int) -> tuple[list["Image"], TileGrid]:
    """The whole image and its tiles of size x size.

    Args:
        canvases: sizes it may be scaled to; the one that shows most of it and wastes least is taken.

    Returns:
        The image stretched to one tile, then the tiles row by row; and how they lie.
    """
    width, height = image.size
    canvas = best_canvas(Size(width, height), canvases)
    shown = _fitted(image, canvas)
    corners = [(left, top) for top in range(0, canvas.height, size) for left in range(0, canvas.width, size)]
    tiles = [shown.crop((left, top, left + size, top + size)) for left, top in corners]
    grid = TileGrid(width, height, columns=canvas.width // size, rows=canvas.height // size)
    return [image.resize((size, size)), *tiles], grid


def best_canvas(image: Size, canvases: Sequence[Size]) -> Size:
    """The canvas on which an image keeps most of its pixels; of those the one with the least area left over."""

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas.width / image.width, canvas.height / image.height)
        kept = min(int(image.width * scale) * int(image.height * scale), image.width * image.height)
        return kept, kept - canvas.width * canvas.height

    return max(canvases, key=merit)


def read_canvases(pinpoints: str | Sequence[Sequence[int]], size: int) -> list[Size]:
    """The canvases that `image_grid_pinpoints` of a config.json names.

    Args:
        pinpoints: "(1x1),...,(6x6)", from the smallest to the largest number of tiles, or pairs of pixels.
        size: pixels of a tile's side.

    Raises:
        ValueError: neither, or sizes that are not made of whole tiles.
    """
    ranges = re.findall(r"\((\d+)x(\d+)\)", pinpoints) if isinstance(pinpoints, str) else []
    if ranges:
        (first_width, first_height), (last_width, last_height) = (map(int, ranges[end]) for end in (0, -1))
        columns, rows = range(first_width, last_width + 1), range(first_height, last_height + 1)
        canvases = [Size(column * size, row * size) for column in columns for row in rows]
    else:
        try:
            pairs = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
            canvases = [Size(int(width), int(height)) for width, height in pairs]
        except (ValueError, TypeError, SyntaxError):
            canvases = []
    if not canvases or any(side < size or side % size for canvas in canvases for side in canvas):
        raise ValueError(
            f"image_grid_pinpoints must be like '(1x1),...,(6x6)' or pairs of multiples of {size}, got {pinpoints!r}"
        )
    return canvases


def read_frames(path: str | Path, count: int) -> list["Image"]:
    """`count` frames of a video, evenly spread from its first to its last; a shorter video repeats some.

    Raises:
        ImportError: PyAV is not installed.
        FileNotFoundError: no such file.
        ValueError: not a video that can be decoded.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no such video")
    av = _import("av")
    try:
        with av.open(str(file)) as container:
            return _decode(container, count)
    except (av.error.FFmpegError, LookupError) as error:
        raise ValueError(f"{path}: must be a video that can be decoded: {error}") from error


def _decode(container: Any, count: int) -> list["Image"]:
    """Decode no more than it takes: from the key frame before a wanted frame on."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    packets = [packet for packet in container.demux(stream) if packet.pts is not None]
    times = sorted(packet.pts for packet in packets)
    keys = sorted(packet.pts for packet in packets if packet.is_keyframe)
    if not times or not keys:
        raise LookupError("no frame with a time")
    wanted = [times[index] for index in np.linspace(0, len(times) - 1, count, dtype=int)]
    found: dict[int, Image] = {}
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


def _fitted(image: "Image", canvas: Size) -> "Image":
    """Scaled to fill the canvas in one direction, centred on black."""
    by_width, by_height = canvas.width / image.width, canvas.height / image.height
    if by_width < by_height:
        size = Size(canvas.width, min(math.ceil(image.height * by_width), canvas.height))
    else:
        size = Size(min(math.ceil(image.width * by_height), canvas.width), canvas.height)
    return _centred(image.resize(size), canvas, BLACK)


def _centred(image: "Image", canvas: Size, colour: tuple[int, int, int]) -> "Image":
    pillow = _import("PIL.Image")
    result: Image = pillow.new("RGB", canvas, colour)
    result.paste(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
    return result


def _import(name: str) -> Any:
    """An optional package.

    Raises:
        ImportError: not installed, with the extra that brings it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise ImportError(f"{name.split('.')[0]} is needed for images and videos: {EXTRA}") from None
