"""The paper's error bound (E9): how far a logit can be from the logit of its block means, and how far it is.

In: q and k of a layer and a `Plan`, or a `Capture`. Out: the bound U and the true largest deviation of every block
pair, and their correlation (the paper's Fig. 2). Walks over pairs of blocks slab by slab. Knows nothing of scores.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from baatt.attention import make_plan
from baatt.config import BAAttConfig
from baatt.lab.capture import Capture
from baatt.lab.statistics import pearson
from baatt.plan import Plan
from baatt.stages.pooling import gather_blocks, pool_blocks
from baatt.types import TokenOrder

#: Points of a scatter plot that are kept, of any number measured.
POINTS = 250


class BoundRecord(NamedTuple):
    """The bound U against the truth in one layer and order, over all pairs of blocks.

    correlation_largest, correlation_mean: Pearson's R of U with the largest and the mean deviation of a logit from its
    block logit; bound_mean, largest_mean, deviation_mean: of all three; points: [U, largest deviation] of some pairs,
    evenly spread over the list of all.
    """

    layer: int
    sort: str
    segment: int | None
    block_size: int
    pairs: int
    correlation_largest: float
    correlation_mean: float
    bound_mean: float
    largest_mean: float
    deviation_mean: float
    points: list[list[float]]


class Deviation(NamedTuple):
    """bound: U of E9, [B, H, I, J]; largest, mean: of |s q_i.k_j - s q_bar.k_bar| over the pair, the same shape.

    A pair with an empty key block is NaN in all three.
    """

    bound: Tensor
    largest: Tensor
    mean: Tensor


class Extent(NamedTuple):
    """radius R: largest distance of a token to its block's mean; norm M: largest norm of a token; [B, H or G, L]."""

    radius: Tensor
    norm: Tensor


def measure_bound(
    capture: Capture, configs: Sequence[BAAttConfig], progress: Callable[[], None] | None = None
) -> list[BoundRecord]:
    """U of E9 and the true deviations for every layer and order (the paper's Fig. 2)."""
    records = []
    for (layer, heads), config in itertools.product(capture.layers.items(), configs):
        q, k, _ = heads.widened()
        found = deviation(q, k, make_plan(q, k, config, scale=capture.scale, impl="reference"))
        flat = [x.flatten()[x.flatten().isfinite()] for x in found]
        points = torch.stack([flat[0], flat[1]], dim=1)[:: max(1, len(flat[0]) // POINTS)]
        bound_mean, largest_mean, deviation_mean = (float(x.mean()) for x in flat)
        records.append(
            BoundRecord(
                layer, config.sort, config.segment, config.block_size, len(flat[0]),
                pearson(flat[0], flat[1]), pearson(flat[0], flat[2]), bound_mean, largest_mean, deviation_mean,
                [[round(float(value), 5) for value in point] for point in points],
            )
        )  # fmt: skip
        if progress is not None:
            progress()
    return records


def deviation(q: Tensor, k: Tensor, plan: Plan) -> Deviation:
    """Bound and truth for every block pair (E9).

    U = s (R^Q M^K + M^Q R^K + R^Q R^K), R the largest distance of a token to its block mean, M the largest norm of a
    token of the block.

    Args:
        q: [B, H, N, D]; k: [B, G, M, D], in the original order.
        plan: gives orders, blocks and scale.
    """
    size, scale = plan.config.block_size, plan.scale
    repeats = q.shape[1] // k.shape[1]
    queries, query_there, query_mean = _members(q, plan.query_order, size)
    keys, key_there, key_mean = _members(k, plan.key_order, size)
    query_radius, query_norm = _extent(queries, query_there, query_mean)
    key_extent = _extent(keys, key_there, key_mean)
    key_radius, key_norm = (repeat(x, "b g j -> b (g r) j", r=repeats) for x in key_extent)
    bound = scale * (_outer(query_radius, key_norm) + _outer(query_norm, key_radius) + _outer(query_radius, key_radius))
    largest, mean = torch.empty_like(bound), torch.empty_like(bound)
    for entry in range(q.shape[0]):
        for head in range(q.shape[1]):
            group = head // repeats
            sides = keys[entry, group], key_there[entry, 0], key_mean[entry, group]
            for block in range(bound.shape[2]):
                present = query_there[entry, 0, block]
                logits = scale * torch.einsum("pd,jcd->jpc", queries[entry, head, block][present], sides[0])
                centre = scale * (sides[2] @ query_mean[entry, head, block])
                off = (logits - rearrange(centre, "j -> j 1 1")).abs()
                there = rearrange(sides[1], "j c -> j 1 c")
                largest[entry, head, block] = off.masked_fill(~there, 0).amax(dim=(1, 2))
                counted = sides[1].sum(-1) * int(present.sum())
                mean[entry, head, block] = off.masked_fill(~there, 0).sum(dim=(1, 2)) / counted
    empty = rearrange(~key_there.any(-1), "b 1 j -> b 1 1 j")
    return Deviation(*(x.masked_fill(empty, math.nan) for x in (bound, largest, mean)))


def extents(q: Tensor, k: Tensor, plan: Plan) -> tuple[Extent, Extent]:
    """R and M of every query block and every key block (E9). Args as `deviation`."""
    sides = (q, plan.query_order), (k, plan.key_order)
    queries, keys = (_extent(*_members(x, order, plan.config.block_size)) for x, order in sides)
    return queries, keys


def _members(x: Tensor, order: TokenOrder, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted tokens by block [B, H, L, P, D], 0 where none is; where one is [B, 1, L, P]; block means [B, H, L, D]."""
    members, tokens = gather_blocks(x, order, size)
    there = torch.arange(size, device=x.device) < rearrange(tokens, "b l -> b 1 l 1")
    return members, there, pool_blocks(x, order, size).mean


def _extent(members: Tensor, there: Tensor, mean: Tensor) -> Extent:
    centred = members - rearrange(mean, "b h l d -> b h l 1 d")
    radius = centred.norm(dim=-1).masked_fill(~there, 0)
    return Extent(reduce(radius, "b h l p -> b h l", "max"), reduce(members.norm(dim=-1), "b h l p -> b h l", "max"))


def _outer(x: Tensor, y: Tensor) -> Tensor:
    return rearrange(x, "b h i -> b h i 1") * rearrange(y, "b h j -> b h 1 j")
