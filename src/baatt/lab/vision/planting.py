"""Signs on pixels: a shape in a colour with a white rim and a number, painted over a photo or the frames of a clip.

In: pixels [B, F, 3, rows, columns] in [0, 1] and the signs of each. Out: where each sign is, and the same pixels with
the signs on them, all painted at once. Numbers are of 5 x 7 dots, enlarged, so that no font is needed and every machine
paints the same.
"""

import functools
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from baatt.lab.vision.scenes import COLOURS, SHAPES, Sign, Window

#: Rows of dots of each number, from the top, each as a binary number of five digits.
DOTS = (
    (14, 17, 19, 21, 25, 17, 14), (4, 12, 4, 4, 4, 4, 14), (14, 17, 1, 2, 4, 8, 31), (31, 2, 4, 2, 1, 17, 14),
    (2, 6, 10, 18, 31, 2, 2), (31, 16, 30, 1, 1, 17, 14), (6, 8, 16, 30, 17, 17, 14), (31, 1, 2, 4, 8, 8, 8),
    (14, 17, 17, 14, 17, 17, 14), (14, 17, 17, 15, 1, 2, 12),
)  # fmt: skip
#: Sizes of a sign, as shares of a cell.
SMALLEST, LARGEST = 0.5, 0.72
#: Of a sign, the height of its number and the width of its rim.
NUMBER, RIM = 0.55, 0.1
#: Numbers are black on colours that are lighter than this.
LIGHT = 0.55


def sprite(shape: str, number: int, size: int) -> Tensor:
    """Of each pixel [3, size, size] in [0, 1]: how much of it is sign, sign without the rim, and number."""
    place = ((torch.arange(size, device="cpu") + 0.5) * 2 / size - 1).abs()
    y, x = place[:, None], place[None]
    box = torch.maximum(x, y)
    distance = {"disc": (x**2 + y**2).sqrt(), "square": box, "octagon": torch.maximum(box, (x + y) / 2**0.5)}[shape]
    whole, inner = (((edge - distance) * size / 2 + 0.5).clamp(0, 1) for edge in (1, 1 - 2 * RIM))
    dots = torch.tensor(
        [[row >> bit & 1 for bit in range(4, -1, -1)] for row in DOTS[number]], dtype=torch.float32, device="cpu"
    )
    high = round(size * NUMBER)
    wide = round(high * 5 / 7)
    glyph = F.interpolate(dots[None, None], (high, wide), mode="bilinear", align_corners=False)[0, 0]
    top, left = (size - high) // 2, (size - wide) // 2
    return torch.stack((whole, inner, F.pad(glyph, (left, size - wide - left, top, size - high - top))))


class Placed(NamedTuple):
    """Signs on pixels [B, F, 3, rows, columns].

    table: int64 [S, 8]: of each sign its picture, its frame, its first row and column, the pixels of its side, and the
    numbers of its shape, its number and its colour. side: pixels of the shorter side of a cell.
    """

    table: Tensor
    side: int

    @property
    def middles(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Picture, frame, row and column [S] of the pixel in the middle of each."""
        picture, frame, top, left, size = self.table.unbind(1)[:5]
        return picture, frame, top + size // 2, left + size // 2

    def to(self, device: torch.device) -> "Placed":
        """The same on a device."""
        return self._replace(table=self.table.to(device))


def place(
    scenes: Sequence[Sequence[Sign]], windows: Sequence[Window], pixels: tuple[int, int], random: Random
) -> Placed:
    """Where in its cell each sign of each scene is, and how large: drawn.

    Args:
        windows: of each scene, all of one size. pixels: rows and columns of a window.

    Raises:
        ValueError: not a window for each scene.
    """
    cell = (pixels[0] // windows[0].size[0], pixels[1] // windows[0].size[1])
    table, colours = [], [*COLOURS]
    for picture, (signs, window) in enumerate(zip(scenes, windows, strict=True)):
        for sign in signs:
            size = max(1, round(random.uniform(SMALLEST, LARGEST) * min(cell)))
            top, left = (
                (at - first) * side + random.randint(0, side - size)
                for at, first, side in zip(sign.cell, window.cell, cell, strict=True)
            )
            kind = (SHAPES.index(sign.shape), sign.number, colours.index(sign.colour))
            table.append((picture, sign.frame - window.frame, top, left, size, *kind))
    return Placed(torch.tensor(table, dtype=torch.long, device="cpu").view(-1, 8), min(cell))


def paint(pixels: Tensor, placed: Placed) -> Tensor:
    """The pixels [B, F, 3, rows, columns], in place, with signs on them."""
    device, (frames, _, rows, columns) = pixels.device, pixels.shape[1:]
    picture, frame, top, left, size, shape, number, kind = placed.table.to(device).unbind(1)
    sizes, sprites = _sprites(placed.side, device)
    whole, inner, glyph = rearrange(sprites[shape, number, size - sizes.start], "S part y x -> part S 1 y x")
    colour = rearrange(_colours(device)[kind], "S c -> S c 1 1")
    dark = colour.mean(dim=1, keepdim=True) < LIGHT
    painted = torch.lerp(torch.lerp(torch.ones_like(colour), colour, inner), dark.float(), glyph)
    steps = torch.arange(sprites.shape[-1], device=device)
    offset = rows * columns * torch.arange(3, device=device)[:, None, None] + columns * steps[:, None] + steps
    first = (3 * (picture * frames + frame) * rows + top) * columns + left
    flat = pixels.view(-1)
    # A canvas may end outside, or on another sign: nothing is added there.
    index = (rearrange(first, "S -> S 1 1 1") + offset).clamp(max=len(flat) - 1)
    flat.index_add_(0, index.flatten(), (whole * (painted - flat[index])).flatten())
    return pixels


@functools.cache
def _sprites(side: int, device: torch.device) -> tuple[range, Tensor]:
    """Sizes of signs in cells of so many pixels, and every sign [shape, number, size, part, y, x] in the corner of a
    canvas. Kept: thousands are painted a second."""
    sizes = range(max(1, round(SMALLEST * side)), max(1, round(LARGEST * side)) + 1)

    def on_canvas(shape: str, number: int, size: int) -> Tensor:
        return F.pad(sprite(shape, number, size), (0, sizes[-1] - size, 0, sizes[-1] - size))

    found = [
        torch.stack([on_canvas(shape, number, size) for size in sizes])
        for shape in SHAPES
        for number in range(len(DOTS))
    ]
    return sizes, rearrange(torch.stack(found), "(shape number) ... -> shape number ...", shape=len(SHAPES)).to(device)


@functools.cache
def _colours(device: torch.device) -> Tensor:
    """Red, green and blue [colours, 3] in [0, 1] of what signs are painted in."""
    return torch.tensor([*COLOURS.values()], device="cpu").to(device) / 255
