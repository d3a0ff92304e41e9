"""Blocks remembered by clusters of their tokens, compared by the peak of what one cluster of queries attends to.

One query of a block often needs one key of another, which a block mean averages away. Content, not place, makes the
representatives: centres farthest from one another (C1), Lloyd's rounds and means (C2). A block pair scores what the
keys of one block get of the softmax over all representatives (C3, C4), for the query cluster that wants it most (C5).
One representative is the block mean (E4, E6), as many as tokens are the exact mass (E1) by its mean or peak.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from baatt.stages.pooling import gather_blocks
from baatt.types import BlockClusters, ScoreOptions, Sight, TokenOrder

#: Logits of one head in memory at once: 256 MiB in float32.
SLAB_LOGITS = 2**26


def summarise(x: Tensor, order: TokenOrder, options: ScoreOptions) -> BlockClusters:
    """Means and sizes of `representatives` clusters of every block, after `refinements` rounds of Lloyd (C1, C2).

    Distances are L2; ties go to the lower token and the lower cluster. A block of fewer distinct tokens than clusters
    leaves some empty. Masked tokens join none.
    """
    members, size = gather_blocks(x, order, options.block_size)
    means, belongs = find_clusters(members, size, options)
    return BlockClusters(means, torch.stack([one.sum(-1) for one in belongs], dim=-1), size)


def compare(
    queries: BlockClusters, keys: BlockClusters, options: ScoreOptions, scale: float, sight: Sight | None = None
) -> Tensor:
    """Score of every block pair (C3-C5), [B, H, i, J]; without `peak` the mean over the queries, which estimates E1.

    With sight the softmax runs over the key blocks of which some query of the block sees a token.
    """
    return compare_by(mean_logits, queries, keys, options, scale, sight)


def find_clusters(members: Tensor, size: Tensor, options: ScoreOptions) -> tuple[Tensor, list[Tensor]]:
    """C1 and C2 of tokens [B, H, L, P, D]: means [B, H, L, R, D], 0 of empty clusters, and which tokens [B, H, L, P]
    belong to each."""
    clusters = min(options.representatives, options.block_size)
    present = torch.arange(options.block_size, device=members.device) < rearrange(size, "b l -> b 1 l 1")
    points = _farthest_points(members, present, size, clusters)
    for _ in range(options.refinements + 1):
        nearest = torch.stack([_squared_distance(members, points[..., r, :]) for r in range(clusters)]).argmin(0)
        belongs = [present & (nearest == r) for r in range(clusters)]
        tokens = torch.stack([one.sum(-1) for one in belongs], dim=-1)
        sums = torch.stack([torch.where(one[..., None], members, 0).sum(-2) for one in belongs], dim=-2)
        filled = rearrange(tokens, "b h l r -> b h l r 1")
        points = torch.where(filled > 0, sums / filled.clamp(min=1), points)
    return torch.where(filled > 0, points, 0), belongs


def compare_by(
    logits_of: Callable[[Tensor, Any, tuple[int, int], ScoreOptions, float], Tensor],
    queries: Any,
    keys: Any,
    options: ScoreOptions,
    scale: float,
    sight: Sight | None,
) -> Tensor:
    """As `compare`; logits_of: (means [n, D], keys, batch entry and key head, options, scale) -> [n, J * R] of C3
    without ln n."""
    batch, heads, rows, clusters, _ = queries.mean.shape
    groups, blocks = keys.mean.shape[1:3]
    step = max(1, SLAB_LOGITS // (clusters * blocks * keys.mean.shape[3]))
    block = torch.arange(blocks, device=keys.size.device).repeat_interleave(keys.mean.shape[3])
    scores: Tensor = queries.mean.new_zeros(batch, heads, rows, blocks)
    for entry in range(batch):
        for head in range(heads):
            place = entry, head * groups // heads
            weight = rearrange(keys.tokens[place].to(queries.mean.dtype).log(), "j r -> (j r)")  # -inf where empty
            for slab in (slice(first, first + step) for first in range(0, rows, step)):
                means = rearrange(queries.mean[entry, head, slab], "i a d -> (i a) d")
                logits = logits_of(means, keys, place, options, scale) + weight
                if sight is not None:
                    seen = sight.spans[entry, slab, 3].repeat_interleave(clusters)
                    logits = logits.masked_fill(block >= rearrange(seen, "n -> n 1"), -math.inf)
                shares = reduce(logits.softmax(-1), "n (j r) -> n j", "sum", j=blocks)
                shares = rearrange(shares, "(i a) j -> i a j", a=clusters)
                count = rearrange(queries.tokens[entry, head, slab], "i a -> i a 1")
                if options.peak:
                    scores[entry, head, slab] = shares.masked_fill(count == 0, 0).amax(1)
                else:
                    scores[entry, head, slab] = (shares * count).sum(1) / count.sum(1).clamp(min=1)
    # Where there is no key the softmax is 0 / 0.
    return scores.masked_fill(rearrange(keys.size == 0, "b j -> b 1 1 j"), -math.inf)


def mean_logits(
    means: Tensor, keys: BlockClusters, place: tuple[int, int], options: ScoreOptions, scale: float
) -> Tensor:
    """C3 without ln n: s q_a . k_b."""
    return scale * means @ rearrange(keys.mean[place], "j r d -> d (j r)")


def _farthest_points(members: Tensor, present: Tensor, size: Tensor, clusters: int) -> Tensor:
    """C1: centres [B, H, L, R, D]; the first is nearest to the block mean, each next one farthest from all so far."""
    mean = members.sum(-2) / rearrange(size.clamp(min=1), "b l -> b 1 l 1")
    chosen = _squared_distance(members, mean).masked_fill(~present, math.inf).argmin(-1)
    points, nearest = [_token(members, chosen)], None
    for _ in range(clusters - 1):
        distance = _squared_distance(members, points[-1])
        nearest = distance if nearest is None else torch.minimum(nearest, distance)
        points.append(_token(members, nearest.masked_fill(~present, -math.inf).argmax(-1)))
    return torch.stack(points, dim=-2)


def _squared_distance(members: Tensor, point: Tensor) -> Tensor:
    """[B, H, L, P] of tokens [B, H, L, P, D] to a point [B, H, L, D] of each block; no product, which cancels."""
    return (members - rearrange(point, "b h l d -> b h l 1 d")).square().sum(-1)


def _token(members: Tensor, place: Tensor) -> Tensor:
    return members.gather(-2, repeat(place, "b h l -> b h l 1 d", d=members.shape[-1])).squeeze(-2)
