"""BA-Att's own score: the logit of block means (E4) with covariance compensation (E5).

A block is remembered by mean and variance of its tokens. The compensation needs no pass of its own: with E[x^2] =
mean^2 + Var the score is one matrix product of concatenated features. The softmax over key blocks (E6) does not change
which are largest and is left out.
"""

import math

import torch
from einops import rearrange
from torch import Tensor

from baatt.stages.pooling import pool_blocks
from baatt.types import BlockStats, ScoreOptions, Sight, TokenOrder


def summarise(x: Tensor, order: TokenOrder, options: ScoreOptions) -> BlockStats:
    """Mean and variance of every block (E3); see `stages.pooling.pool_blocks`."""
    return pool_blocks(x, order, options.block_size)


def compare(
    queries: BlockStats, keys: BlockStats, options: ScoreOptions, scale: float, sight: Sight | None = None
) -> Tensor:
    """`covariance_score` with the config's beta."""
    return covariance_score(queries, keys, scale=scale, beta=options.beta)


def covariance_score(queries: BlockStats, keys: BlockStats, *, scale: float, beta: float) -> Tensor:
    """Logit of the block means plus beta times the logits' variance inside the block pair (E4, E5).

    l~ = s q_bar.k_bar + beta s^2 (Var q.(k_bar^2 + Var k) + q_bar^2.Var k), with s = `scale`. The paper's 1/D is s^2 at
    the usual s = 1/sqrt(D).

    Args:
        queries: of [B, H, I] query blocks.
        keys: of [B, G, J] key blocks, H % G == 0.
        scale: s, the factor on q.k.
        beta: weight of the compensation; 0 leaves E4.

    Returns:
        [B, H, I, J] float32 (float64 for float64 statistics), -inf for key blocks without a token.
    """
    if beta == 0:
        query_features, key_features = scale * queries.mean, keys.mean
    else:
        weight = beta * scale * scale
        query_features = torch.cat(
            [scale * queries.mean, weight * queries.variance, weight * queries.mean.square()], dim=-1
        )
        key_features = torch.cat([keys.mean, keys.mean.square() + keys.variance, keys.variance], dim=-1)
    scores = _product(query_features, key_features)
    return scores.masked_fill(rearrange(keys.size == 0, "b j -> b 1 1 j"), -math.inf)


def _product(query_features: Tensor, key_features: Tensor) -> Tensor:
    """[B, H, I, F] times [B, G, J, F] -> [B, H, I, J], a product per key head with its query heads as further rows.

    Not a batched product: its rounding depends on the batch size, and with it which of two close blocks is kept.
    """
    batch, groups = key_features.shape[:2]
    rows = rearrange(query_features, "b (g r) i f -> (b g) (r i) f", g=groups)
    columns = rearrange(key_features, "b g j f -> (b g) f j")
    scores = torch.stack([row @ column for row, column in zip(rows, columns, strict=True)])
    return rearrange(scores, "(b g) (r i) j -> b (g r) i j", b=batch, g=groups, i=query_features.shape[2])
