"""The oracle: the exact attention mass of every block pair (E1), which needs dense attention.

A block is remembered by all its tokens. What an ideal selector by mass would rank by, and what recall is measured
against; by its peak instead of its mean, as `clusters` estimates it (C5). Weights exist for a slab of query rows of one
head at a time, so memory is never N x M.
"""

import math
from collections.abc import Callable

import torch
from einops import rearrange, reduce
from torch import Tensor

from baatt.stages.pooling import gather_blocks
from baatt.types import BlockTokens, ScoreOptions, Sight, TokenOrder

#: Attention weights in memory at once: on a CPU, on a GPU.
SLAB_WEIGHTS = (2**23, 2**28)


def summarise(x: Tensor, order: TokenOrder, options: ScoreOptions) -> BlockTokens:
    """The tokens themselves, in x's dtype."""
    return gather_blocks(x, order, options.block_size, x.dtype)


def compare(
    queries: BlockTokens, keys: BlockTokens, options: ScoreOptions, scale: float, sight: Sight | None = None
) -> Tensor:
    """Attention mass of every block pair, averaged over the queries of a block (E1).

    Returns:
        [B, H, i, J] float32 (float64 for float64), each row sums to 1; 0 for query blocks and key blocks without a
        token, and for a batch entry without keys.
    """
    return _mass(queries, keys, scale, _mean, sight)


def compare_peak(
    queries: BlockTokens, keys: BlockTokens, options: ScoreOptions, scale: float, sight: Sight | None = None
) -> Tensor:
    """As `compare`, of the query of a block that attends to the key block most; rows sum to 1 or more."""
    return _mass(queries, keys, scale, _peak, sight)


def _mean(shares: Tensor, size: Tensor) -> Tensor:
    """Over the queries of [i, P, J], of which `size` [i] are there and the others 0."""
    return shares.sum(dim=1) / rearrange(size.clamp(min=1), "i -> i 1")


def _peak(shares: Tensor, size: Tensor) -> Tensor:
    return shares.amax(dim=1)


def _mass(
    queries: BlockTokens,
    keys: BlockTokens,
    scale: float,
    over_queries: Callable[[Tensor, Tensor], Tensor],
    sight: Sight | None,
) -> Tensor:
    batch, heads, rows, size, _ = queries.tokens.shape
    groups, blocks = keys.tokens.shape[1:3]
    dtype = torch.promote_types(queries.tokens.dtype, torch.float32)
    place = torch.arange(size, device=queries.size.device)
    absent_keys = rearrange(place >= rearrange(keys.size, "b j -> b j 1"), "b j c -> b 1 (j c)")
    present = rearrange(place < rearrange(queries.size, "b i -> b i 1"), "b i p -> b i p 1")
    if sight is not None:
        present = present & rearrange(sight.limit > 0, "b i p -> b i p 1")
        positions = torch.arange(blocks * size, device=place.device)
    mass = torch.empty(batch, heads, rows, blocks, dtype=dtype, device=queries.tokens.device)
    step = max(1, SLAB_WEIGHTS[queries.tokens.is_cuda] // (blocks * size * size))
    for entry in range(batch):
        for head in range(heads):
            columns = rearrange(keys.tokens[entry, head * groups // heads], "j c d -> d (j c)").to(dtype)
            for slab in (slice(first, first + step) for first in range(0, rows, step)):
                logits = scale * rearrange(queries.tokens[entry, head, slab], "i p d -> (i p) d").to(dtype) @ columns
                logits = logits.masked_fill(absent_keys[entry], -math.inf)
                if sight is not None:
                    limit = rearrange(sight.limit[entry, slab], "i p -> (i p) 1")
                    logits = logits.masked_fill(positions >= limit, -math.inf)
                weights = logits.softmax(-1)
                shares = reduce(weights, "(i p) (j c) -> i p j", "sum", p=size, c=size)
                counted = torch.where(present[entry, slab], shares, 0)
                mass[entry, head, slab] = over_queries(counted, queries.size[entry, slab])
    # Where there is no key the softmax is 0 / 0; a query that is not a number makes the blocks with keys so.
    return mass.masked_fill(rearrange(keys.size == 0, "b j -> b 1 1 j"), 0)
