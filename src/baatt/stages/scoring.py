"""Block scores: the logit of block means (E4) with covariance compensation (E5), and their distribution (E6).

In: `BlockStats` of queries and keys. Out: scores [B, H, I, J], larger = more attention mass expected. The compensation
needs no pass of its own: with E[x^2] = mean^2 + Var the score is one matrix product of concatenated features. Knows
nothing of tokens.
"""

import math
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from baatt.types import BlockStats

ScoreFunction = Callable[..., Tensor]


def covariance_score(query_stats: BlockStats, key_stats: BlockStats, *, scale: float, beta: float) -> Tensor:
    """Logit of the block means plus beta times the logits' variance inside the block pair (E4, E5).

    l~ = s q_bar.k_bar + beta s^2 (Var q.(k_bar^2 + Var k) + q_bar^2.Var k), with s = `scale`. The paper's 1/D is s^2 at
    the usual s = 1/sqrt(D).

    Args:
        query_stats: of [B, H, I] query blocks.
        key_stats: of [B, G, J] key blocks, H % G == 0.
        scale: s, the factor on q.k.
        beta: weight of the compensation; 0 leaves E4.

    Returns:
        [B, H, I, J] float32 (float64 for float64 statistics), -inf for key blocks without a token.
    """
    query_mean, query_variance = query_stats.mean, query_stats.variance
    key_mean, key_variance = key_stats.mean, key_stats.variance
    if beta == 0:
        query_features, key_features = scale * query_mean, key_mean
    else:
        weight = beta * scale * scale
        query_features = torch.cat([scale * query_mean, weight * query_variance, weight * query_mean.square()], dim=-1)
        key_features = torch.cat([key_mean, key_mean.square() + key_variance, key_variance], dim=-1)
    scores = _product(query_features, key_features)
    return scores.masked_fill(rearrange(key_stats.size == 0, "b j -> b 1 1 j"), -math.inf)


def block_distribution(scores: Tensor) -> Tensor:
    """Share of attention mass per key block, the softmax over key blocks (E6).

    Args:
        scores: [B, H, I, J].

    Returns:
        [B, H, I, J], rows sum to 1; a row of -inf only gives 0.
    """
    unreachable = (scores == -math.inf).all(dim=-1, keepdim=True)
    return scores.masked_fill(unreachable, 0).softmax(dim=-1).masked_fill(unreachable, 0)


def _product(query_features: Tensor, key_features: Tensor) -> Tensor:
    """[B, H, I, F] times [B, G, J, F] -> [B, H, I, J], a product per key head with its query heads as further rows.

    Not a batched product: its rounding depends on the batch size, and with it which of two close blocks is kept.
    """
    batch, groups = key_features.shape[:2]
    rows = rearrange(query_features, "b (g r) i f -> (b g) (r i) f", g=groups)
    columns = rearrange(key_features, "b g j f -> (b g) f j")
    scores = torch.stack([row @ column for row, column in zip(rows, columns, strict=True)])
    return rearrange(scores, "(b g) (r i) j -> b (g r) i j", b=batch, g=groups, i=query_features.shape[2])


#: score -> score(query_stats, key_stats, *, scale, beta)
SCORES: dict[str, ScoreFunction] = {"covariance": covariance_score}
