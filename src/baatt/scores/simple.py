"""Scores to compare others with: block means (E4), a window with the first block, and chance.

Window and chance do not look at the tokens: a block is remembered by its place in the sequence.
"""

from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from baatt.scores.covariance import covariance_score
from baatt.types import BlockStats, ScoreOptions, TokenOrder

SEED = 20260519


class BlockPlaces(NamedTuple):
    """number: [B, H, L] int64, of the block among its L; blocks: L of the whole side; size: [B, L] int64."""

    number: Tensor
    blocks: int
    size: Tensor


def compare_means(queries: BlockStats, keys: BlockStats, options: ScoreOptions, scale: float) -> Tensor:
    """Logit of the block means (E4)."""
    return covariance_score(queries, keys, scale=scale, beta=0)


def summarise_places(x: Tensor, order: TokenOrder, options: ScoreOptions) -> BlockPlaces:
    """The place of every block, and how many tokens it has."""
    blocks = -(-x.shape[2] // options.block_size)
    number = torch.arange(blocks, device=x.device)
    size = (rearrange(order.length, "b -> b 1") - number * options.block_size).clamp(0, options.block_size)
    return BlockPlaces(repeat(number, "l -> b h l", b=x.shape[0], h=x.shape[1]), blocks, size)


def compare_window(queries: BlockPlaces, keys: BlockPlaces, options: ScoreOptions, scale: float) -> Tensor:
    """The first key block, then the key blocks nearest to the query block by place in the sequence."""
    rows, columns = ((side.number[:, :1] + 0.5) / side.blocks for side in (queries, keys))
    near = -(rearrange(rows, "b 1 i -> b 1 i 1") - rearrange(columns, "b 1 j -> b 1 1 j")).abs()
    near[..., 0] = 1
    return repeat(near, "b 1 i j -> b h i j", h=queries.number.shape[1])


def compare_random(queries: BlockPlaces, keys: BlockPlaces, options: ScoreOptions, scale: float) -> Tensor:
    """Anything: the floor. The same numbers at every call, however the query blocks are cut into slabs."""
    batch, heads = queries.number.shape[:2]
    generator = torch.Generator().manual_seed(SEED)
    numbers = torch.rand((batch, heads, queries.blocks, keys.blocks), generator=generator).to(queries.number.device)
    place = repeat(queries.number, "b h i -> b h i j", j=keys.blocks)
    return numbers.gather(2, place)
