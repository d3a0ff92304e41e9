"""Blocks chosen by clusters whose keys also spread: C3 with what E5 says of the tokens inside a key cluster.

A query cluster stands for one query, so its variance is 0 in E5, and of the three terms one is left: the logit of a
pair gets beta s^2 sum_t Var[k_t] q_bar_t^2. At beta = 1/2 that is half the variance of the logits of the cluster's
tokens, channels taken as independent: what their log-mean-exp has beyond their mean. It stops at `CAP`, because the
second order is no estimate where it is large, and a wide cluster would win every query. All else is `clusters`.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from baatt.scores import clusters
from baatt.stages.pooling import gather_blocks
from baatt.types import ScoreOptions, Sight, TokenOrder

#: Most that a logit gets.
CAP = 4.0


class ClusterMoments(NamedTuple):
    """`BlockClusters`, and the variance [B, H or G, L, R, D] of the tokens of each cluster, 0 of an empty one."""

    mean: Tensor
    tokens: Tensor
    size: Tensor
    variance: Tensor


def summarise(x: Tensor, order: TokenOrder, options: ScoreOptions) -> ClusterMoments:
    """Means, sizes and variances of the clusters of every block (C1, C2, E3)."""
    members, size = gather_blocks(x, order, options.block_size)
    means, belongs = clusters.find_clusters(members, size, options)
    tokens = torch.stack([one.sum(-1) for one in belongs], dim=-1)
    squares = [
        torch.where(one[..., None], members - means[..., r, None, :], 0).square().sum(-2)
        for r, one in enumerate(belongs)
    ]
    variance = torch.stack(squares, dim=-2) / rearrange(tokens.clamp(min=1), "b h l r -> b h l r 1")
    return ClusterMoments(means, tokens, size, variance)


def compare(
    queries: ClusterMoments, keys: ClusterMoments, options: ScoreOptions, scale: float, sight: Sight | None = None
) -> Tensor:
    """As `clusters.compare`, by the logits above."""
    return clusters.compare_by(spread_logits, queries, keys, options, scale, sight)


def spread_logits(
    means: Tensor, keys: ClusterMoments, place: tuple[int, int], options: ScoreOptions, scale: float
) -> Tensor:
    """s q_a . k_b + min(beta s^2 Var[k_b] . q_a^2, CAP)."""
    spread = scale**2 * means.square() @ rearrange(keys.variance[place], "j r d -> d (j r)")
    logits = clusters.mean_logits(means, keys, place, options, scale)  # type: ignore[arg-type]  # it reads the means
    return logits + (options.beta * spread).clamp(max=CAP)
