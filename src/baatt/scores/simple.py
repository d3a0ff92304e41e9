"""Scores to compare others with: block means (E4), a window with the first block, and chance.

Window and chance do not look at the tokens: a block is remembered by its place in the sequence.
"""

from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from baatt.scores.covariance import covariance_score
from baatt.types import BlockStats, ScoreOptions, Sight, TokenOrder

SEED = 20260519


class BlockPlaces(NamedTuple):
    """number: [B, H, L] int64, of the block among the H * L of its entry; heads, blocks: H and L of the whole side;
    size: [B, L] int64."""

    number: Tensor
    heads: int
    blocks: int
    size: Tensor


def compare_means(
    queries: BlockStats, keys: BlockStats, options: ScoreOptions, scale: float, sight: Sight | None = None
) -> Tensor:
    """Logit of the block means (E4)."""
    return covariance_score(queries, keys, scale=scale, beta=0)


def summarise_places(x: Tensor, order: TokenOrder, options: ScoreOptions) -> BlockPlaces:
    """The place of every block, and how many tokens it has."""
    batch, heads, blocks = *x.shape[:2], -(-x.shape[2] // options.block_size)
    number = torch.arange(heads * blocks, device=x.device)
    size = (rearrange(order.length, "b -> b 1") - number[:blocks] * options.block_size).clamp(0, options.block_size)
    return BlockPlaces(repeat(number, "(h l) -> b h l", b=batch, h=heads), heads, blocks, size)


def compare_window(
    queries: BlockPlaces, keys: BlockPlaces, options: ScoreOptions, scale: float, sight: Sight | None = None
) -> Tensor:
    """The first key block, then the key blocks nearest to the query block by place in the sequence."""
    rows, columns = ((side.number[:, :1] % side.blocks + 0.5) / side.blocks for side in (queries, keys))
    if sight is not None:
        rows = rearrange((sight.spans[..., 1] + 0.5) / keys.blocks, "b i -> b 1 i")
    near = -(rearrange(rows, "b 1 i -> b 1 i 1") - rearrange(columns, "b 1 j -> b 1 1 j")).abs()
    near[..., 0] = 1
    return repeat(near, "b 1 i j -> b h i j", h=queries.number.shape[1])


def compare_random(
    queries: BlockPlaces, keys: BlockPlaces, options: ScoreOptions, scale: float, sight: Sight | None = None
) -> Tensor:
    """Anything: the floor. The same numbers at every call, however query blocks and heads are cut into slabs."""
    batch, heads, rows = queries.number.shape
    generator = torch.Generator("cpu").manual_seed(SEED)
    shape = batch, queries.heads * queries.blocks, keys.blocks
    numbers = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
    place = repeat(queries.number, "b h i -> b (h i) j", j=keys.blocks)
    return rearrange(numbers.to(place.device).gather(1, place), "b (h i) j -> b h i j", h=heads, i=rows)
