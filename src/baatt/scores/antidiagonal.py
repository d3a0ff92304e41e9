"""XAttention's score: attention sampled along antidiagonals of stride x stride squares, summed per block pair.

A block is remembered by all its tokens, in runs of `stride`. A run of queries meets a run of keys in reversed order;
the sums of those products, divided by the stride, go through a softmax over all runs of keys.
"""

import math

import torch
from einops import rearrange, reduce
from torch import Tensor

from baatt.stages.pooling import gather_blocks
from baatt.types import BlockTokens, ScoreOptions, Sight, TokenOrder


def summarise(x: Tensor, order: TokenOrder, options: ScoreOptions, *, stride: int) -> BlockTokens:
    """The tokens themselves; ValueError if `stride` does not divide the block size."""
    if options.block_size % stride:
        raise ValueError(f"stride must divide block_size={options.block_size}, got {stride}")
    return gather_blocks(x, order, options.block_size, x.dtype)


def compare(
    queries: BlockTokens,
    keys: BlockTokens,
    options: ScoreOptions,
    scale: float,
    sight: Sight | None = None,
    *,
    stride: int,
) -> Tensor:
    """Sums of the sampled weights, [B, H, i, J] float32 (float64 for float64); head by head, which bounds the memory.

    With sight a run of queries meets the runs of keys of which one of its queries sees a token.
    """
    heads, runs = queries.tokens.shape[1], options.block_size // stride
    repeats = heads // keys.tokens.shape[1]
    rows = rearrange(queries.tokens, "b h i (r s) d -> b h (i r) s d", s=stride).flip(3)
    columns = rearrange(keys.tokens, "b g j (c s) d -> b g (j c) (s d)", s=stride)
    first = torch.arange(runs, device=columns.device) * stride
    absent = rearrange(first >= rearrange(keys.size, "b j -> b j 1"), "b j c -> b 1 (j c)")
    if sight is not None:
        limit = reduce(sight.limit, "b i (r s) -> b (i r) 1", "max", s=stride)
        absent = absent | (torch.arange(absent.shape[-1], device=columns.device) * stride >= limit)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    scores = []
    for head in range(heads):
        own = rearrange(rows[:, head], "b n s d -> b n (s d)").to(dtype)
        logits = own @ columns[:, head // repeats].to(dtype).mT * (scale / stride)
        weights = logits.masked_fill(absent, -math.inf).softmax(-1).nan_to_num(0.0)
        scores.append(reduce(weights, "b (i r) (j c) -> b i j", "sum", r=runs, c=runs))
    return torch.stack(scores, dim=1)
