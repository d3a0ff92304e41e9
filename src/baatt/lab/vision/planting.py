"""Signs on pixels: a shape in a colour with a white rim and a number, painted over a photo or the frames of a clip.

In: pixels [B, F, 3, rows, columns] in [0, 1] and the signs of each. Out: the same with the signs on them, all painted
at once. Numbers are of 5 x 7 dots, enlarged, so that no font is needed and every machine paints the same.
"""

import functools
from collections.abc import Sequence
from random import Random

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from baatt.lab.vision.scenes import CELLS, COLOURS, Sign

#: Rows of dots of each number, from the top, each as a binary number of five digits.
DOTS = (
    (14, 17, 19, 21, 25, 17, 14), (4, 12, 4, 4, 4, 4, 14), (14, 17, 1, 2, 4, 8, 31), (31, 2, 4, 2, 1, 17, 14),
    (2, 6, 10, 18, 31, 2, 2), (31, 16, 30, 1, 1, 17, 14), (6, 8, 16, 30, 17, 17, 14), (31, 1, 2, 4, 8, 8, 8),
    (14, 17, 17, 14, 17, 17, 14), (14, 17, 17, 15, 1, 2, 12),
)  # fmt: skip
#: Sizes of a sign, as shares of a cell of a photo, or of half the height of a frame.
SMALLEST, LARGEST = 0.5, 0.72
#: Of a sign, the height of its number and the width of its rim.
NUMBER, RIM = 0.55, 0.1
#: Numbers are black on colours that are lighter than this.
LIGHT = 0.55


@functools.cache
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


def paint(pixels: Tensor, scenes: Sequence[Sequence[Sign]], random: Random) -> Tensor:
    """The pixels, in place, with the signs of each scene; where in its cell or frame and how large each is, is drawn.

    Raises:
        ValueError: not a scene for each.
    """
    if len(scenes) != len(pixels):
        raise ValueError(f"scenes must be one for each of {len(pixels)}, got {len(scenes)}")
    frames, _, rows, columns = pixels.shape[1:]
    cell = (rows // CELLS[0], columns // CELLS[1]) if frames == 1 else (rows, columns)
    reach = min(cell) / (1 if frames == 1 else 2)
    canvas = max(1, round(LARGEST * reach))
    sprites, colours, first = [], [], []
    for number, signs in enumerate(scenes):
        for sign in signs:
            size = max(1, round(random.uniform(SMALLEST, LARGEST) * reach))
            top, left = (sign.cell[axis] * cell[axis] + random.randint(0, cell[axis] - size) for axis in (0, 1))
            sprites.append(F.pad(sprite(sign.shape, sign.number, size), (0, canvas - size, 0, canvas - size)))
            colours.append(COLOURS[sign.colour])
            first.append((3 * (number * frames + sign.frame) * rows + top) * columns + left)
    if not sprites:
        return pixels
    return _paint(pixels, torch.stack(sprites), *(torch.tensor(one, device="cpu") for one in (colours, first)))


def _paint(pixels: Tensor, sprites: Tensor, colours: Tensor, first: Tensor) -> Tensor:
    """Sprites [S, 3, n, n] in colours [S, 3], from the pixels whose red is at `first` [S] on."""
    device, (rows, columns) = pixels.device, pixels.shape[-2:]
    whole, inner, glyph = rearrange(sprites.to(device), "S part y x -> part S 1 y x")
    colour = rearrange(colours.to(device) / 255, "S c -> S c 1 1")
    dark = colour.mean(dim=1, keepdim=True) < LIGHT
    painted = torch.lerp(torch.lerp(torch.ones_like(colour), colour, inner), dark.float(), glyph)
    steps = torch.arange(sprites.shape[-1], device=device)
    offset = rows * columns * torch.arange(3, device=device)[:, None, None] + columns * steps[:, None] + steps
    flat = pixels.view(-1)
    # A canvas may end outside, or on another sign: nothing is added there.
    index = (first.to(device)[:, None, None, None] + offset).clamp(max=flat.numel() - 1)
    flat.index_add_(0, index.flatten(), (whole * (painted - flat[index])).flatten())
    return pixels
