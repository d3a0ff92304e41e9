"""An order of video tokens for `baatt.enable(..., order=VideoTiles())`: blocks become compact pieces of space and time.

Video models list their latent tokens frame by frame and row by row, so 128 tokens in a row are a thin line through one
frame. Cut into 4 x 8 x 4 tiles first, 128 tokens are neighbours in time and space that look alike, as a block mean
supposes. In: the length of a sequence. Out: a permutation. Does not know models; the diffusers adapter sets the grid at
every forward.
"""

import functools
import math
import threading

import torch
from torch import Tensor

Sizes = tuple[int, int, int]

TEXT_SIDES = ("after", "before")

#: Permutations that are remembered; prompts of another length need another one.
REMEMBERED = 8


class VideoTiles:
    """Order of tokens by tiles: all whole tiles, then the incomplete ones at the edges, then the text.

    Whole tiles come first so that with `math.prod(tile)` tokens per block each of them is exactly one block, and text
    last for the same reason, wherever the model has it. An axis shorter than the tile has tiles of its own length.
    `config.sort` sorts in segments of this order: it mixes the tiles of one segment.

    Args:
        tile: frames, rows and columns of a tile.
        grid: frames, rows and columns of latent tokens (after patching); None: set later, or by the adapter.
        text: where a joint sequence has the tokens that are not video, which keep their order: "after" or "before".

    Raises:
        TypeError: sizes that are not three ints.
        ValueError: sizes below 1, or another side.
    """

    def __init__(self, tile: Sizes = (4, 8, 4), grid: Sizes | None = None, *, text: str = "after") -> None:
        if text not in TEXT_SIDES:
            raise ValueError(f"text must be one of {list(TEXT_SIDES)}, got {text!r}")
        self.tile = _three_sizes("tile", tile)
        self.text = text
        self.grid = grid

    @property
    def grid(self) -> Sizes | None:
        """Frames, rows and columns of the video under way, or None; each thread may have its own."""
        return self._shown.get(threading.get_ident(), self._grid)

    @grid.setter
    def grid(self, grid: Sizes | None) -> None:
        self._grid = None if grid is None else _three_sizes("grid", grid)
        self._shown: dict[int, Sizes] = {}  # by thread

    def show(self, grid: Sizes) -> None:
        """Set the grid for the forward that runs in this thread."""
        self._shown[threading.get_ident()] = grid

    def __call__(self, length: int, device: torch.device) -> Tensor | None:
        """The permutation [length] int64 on the device, or None: no grid, or fewer tokens than it has."""
        if self.grid is None or length < math.prod(self.grid):
            return None
        return _permutation(self.tile, self.grid, self.text, length, device)


@functools.lru_cache(REMEMBERED)
def _permutation(sizes: Sizes, grid: Sizes, text: str, length: int, device: torch.device) -> Tensor:
    tile = [min(size, extent) for size, extent in zip(sizes, grid, strict=True)]
    tiles = [math.ceil(extent / size) for size, extent in zip(tile, grid, strict=True)]
    axes = torch.meshgrid(*(torch.arange(extent, device="cpu") for extent in grid), indexing="ij")
    number, place = (
        torch.zeros(grid, dtype=torch.int64, device="cpu"),
        torch.zeros(grid, dtype=torch.int64, device="cpu"),
    )
    incomplete = torch.zeros(grid, dtype=torch.bool, device="cpu")
    for axis, size, extent, count in zip(axes, tile, grid, tiles, strict=True):
        number = number * count + axis // size
        place = place * size + axis % size
        incomplete |= axis >= extent - extent % size
    rank = (incomplete * math.prod(tiles) + number) * math.prod(tile) + place
    order, others = rank.flatten().argsort(), torch.arange(length - math.prod(grid), device="cpu")
    parts = [order + len(others), others] if text == "before" else [order, others + math.prod(grid)]
    return torch.cat(parts).to(device)


def _three_sizes(name: str, sizes: Sizes) -> Sizes:
    values = tuple(sizes) if isinstance(sizes, tuple | list) else ()
    if len(values) != 3 or not all(isinstance(size, int) and not isinstance(size, bool) for size in values):
        raise TypeError(f"{name} must be three ints (frames, rows, columns), got {sizes!r}")
    if min(values) < 1:
        raise ValueError(f"{name} must be at least 1 on every axis, got {sizes!r}")
    return values[0], values[1], values[2]
