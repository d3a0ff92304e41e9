"""BA-Att's score at a finer grain: attention mass between runs of a few tokens, summed per block pair.

A block is remembered by mean and variance of its runs. The compensated logit of two runs (E4, E5), plus the log of how
many keys the run has, goes through a softmax over all runs of keys; the shares count by the queries of a run. Runs of
one token give the exact mass (E1); runs of a whole block rank as BA-Att does.
"""

import math
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor

from baatt.scores.covariance import covariance_score
from baatt.stages.pooling import pool_blocks
from baatt.types import BlockStats, ScoreOptions, Sight, TokenOrder


class RunStats(NamedTuple):
    """mean, variance: [B, H, L, R, D] of the R runs of each block; tokens: [B, 1, L, R] int64, how many each has;
    size: [B, L] int64."""

    mean: Tensor
    variance: Tensor
    tokens: Tensor
    size: Tensor


def summarise(x: Tensor, order: TokenOrder, options: ScoreOptions, *, run: int) -> RunStats:
    """Mean and variance of every run of `run` tokens; ValueError if that does not divide the block size."""
    if options.block_size % run:
        raise ValueError(f"run must divide block_size={options.block_size}, got {run}")
    runs = options.block_size // run
    stats = pool_blocks(x, order, run)
    missing = -stats.size.shape[1] % runs
    mean, variance = (torch.nn.functional.pad(part, (0, 0, 0, missing)) for part in (stats.mean, stats.variance))
    tokens = rearrange(torch.nn.functional.pad(stats.size, (0, missing)), "b (l r) -> b l r", r=runs)
    mean, variance = (rearrange(part, "b h (l r) d -> b h l r d", r=runs) for part in (mean, variance))
    return RunStats(mean, variance, rearrange(tokens, "b l r -> b 1 l r"), tokens.sum(-1))


def compare(
    queries: RunStats, keys: RunStats, options: ScoreOptions, scale: float, sight: Sight | None = None
) -> Tensor:
    """Mass of every block pair [B, H, i, J], counted in queries; head by head, which bounds the memory.

    With sight a run of queries meets the runs of keys of which one of its queries sees a token.
    """
    heads, groups = queries.mean.shape[1], keys.mean.shape[1]
    query_tokens, key_tokens = (rearrange(side.tokens, "b 1 l r -> b (l r)") for side in (queries, keys))
    key_weight = rearrange(key_tokens.to(keys.mean.dtype).log(), "b m -> b 1 m")
    if sight is not None:
        runs = queries.tokens.shape[-1]
        limit = reduce(sight.limit, "b i (r p) -> b (i r) 1", "max", r=runs)
        first = torch.arange(key_tokens.shape[1], device=limit.device) * (options.block_size // runs)
        key_weight = key_weight.masked_fill(first >= limit, -math.inf)
    scores = []
    for head in range(heads):
        one, group = slice(head, head + 1), slice(head * groups // heads, head * groups // heads + 1)
        logits = covariance_score(
            _flat(queries, one, query_tokens), _flat(keys, group, key_tokens), scale=scale, beta=options.beta
        )[:, 0]
        shares = (logits + key_weight).softmax(-1).nan_to_num(0.0) * rearrange(query_tokens, "b n -> b n 1")
        rows, columns = queries.tokens.shape[-1], keys.tokens.shape[-1]
        scores.append(reduce(shares, "b (i r) (j c) -> b i j", "sum", r=rows, c=columns))
    return torch.stack(scores, dim=1)


def _flat(summary: RunStats, head: slice, tokens: Tensor) -> BlockStats:
    mean, variance = (rearrange(part[:, head], "b h l r d -> b h (l r) d") for part in (summary.mean, summary.variance))
    return BlockStats(mean, variance, tokens)
