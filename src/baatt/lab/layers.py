"""What an order does to the blocks of a layer, and the paper's error bound (E9) against the truth.

In: q and k of a layer and a `Plan`, or a `Capture` and configs. Out: the bound U and the true largest deviation of
every block pair and their correlation (the paper's Fig. 2); how norms vary, how wide blocks are, and over how many
blocks attention spreads; records ready for JSON. Sorting by norm makes the norms inside a block alike; it also parts
neighbours, so the attention of a block may spread over more blocks. Knows nothing of scores.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from baatt.attention import make_plan
from baatt.config import BAAttConfig
from baatt.lab.capture import Capture
from baatt.lab.recall import block_mass
from baatt.lab.statistics import pearson
from baatt.plan import Plan
from baatt.stages.pooling import gather_blocks, pool_blocks
from baatt.types import TokenOrder

#: Points of a scatter plot that are kept, of any number measured.
POINTS = 250
#: Share of a query block's attention mass that counts as all that matters.
MOST = 0.9


class Deviation(NamedTuple):
    """bound: U of E9, [B, H, I, J]; largest, mean: of |s q_i.k_j - s q_bar.k_bar| over the pair, the same shape.

    A pair with an empty key block is NaN in all three.
    """

    bound: Tensor
    largest: Tensor
    mean: Tensor


class _Blocks(NamedTuple):
    """tokens [B, H, L, P, D] by block, 0 where none is; there [B, L, P]: where one is; mean [B, H, L, D]; radius R and
    norm M [B, H, L]: largest distance of a token to the mean, and largest norm of a token.
    """

    tokens: Tensor
    there: Tensor
    mean: Tensor
    radius: Tensor
    norm: Tensor


def measure_bound(
    capture: Capture, configs: Sequence[BAAttConfig], progress: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """U of E9 and the true deviations for every layer and order, over all pairs of blocks (the paper's Fig. 2).

    Returns:
        Records: layer and order; pairs; Pearson's R of U with the largest and the mean deviation of a logit from its
        block logit; means of all three; points, [U, largest deviation] of some pairs, evenly spread over all of them.
    """
    records = []
    for about, q, k, plan in _planned(capture, configs, progress):
        bound, largest, mean = (x.flatten()[x.flatten().isfinite()] for x in deviation(q, k, plan))
        points = torch.stack([bound, largest], dim=1)[:: max(1, len(bound) // POINTS)]
        numbers = {
            "pairs": len(bound),
            "correlation_largest": pearson(bound, largest), "correlation_mean": pearson(bound, mean),
            "bound_mean": float(bound.mean()), "largest_mean": float(largest.mean()),
            "deviation_mean": float(mean.mean()),
            "points": [[round(float(value), 5) for value in point] for point in points],
        }  # fmt: skip
        records.append(about | numbers)
    return records


def measure_layers(
    capture: Capture, configs: Sequence[BAAttConfig], progress: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """All layers of a capture in all orders; means over heads.

    Returns:
        Records: layer and order; query_norm_variation, key_norm_variation: standard deviation of the tokens' norms over
        their mean, the same in every order; query_radius, key_radius: largest distance of a token to its block's mean
        over the mean norm, mean over blocks; blocks_for_most: share of the key blocks that hold 90 % of a query block's
        mass; on_diagonal: share of the mass in the key block at the query block's own place and its two neighbours.
    """
    records = []
    for about, q, k, plan in _planned(capture, configs, progress):
        mass, (queries, keys) = block_mass(q, k, plan), _sides(q, k, plan)
        query_norms, key_norms = q.norm(dim=-1), k.norm(dim=-1)
        # Blocks needed from the heaviest on, over the blocks there are.
        needed = (mass.sort(dim=-1, descending=True).values.cumsum(dim=-1) < MOST).sum(dim=-1) + 1
        there = rearrange((plan.key_summary.size > 0).sum(dim=-1), "b -> b 1 1")
        rows, columns = mass.shape[2:]
        own = (torch.arange(rows, device=mass.device) + 0.5) * columns / rows
        near = (rearrange(own, "i -> i 1") - torch.arange(columns, device=mass.device) - 0.5).abs() < 1.5
        numbers = {
            "query_norm_variation": float((query_norms.std(dim=-1) / query_norms.mean(dim=-1)).mean()),
            "key_norm_variation": float((key_norms.std(dim=-1) / key_norms.mean(dim=-1)).mean()),
            "query_radius": float(queries.radius.mean() / query_norms.mean()),
            "key_radius": float(keys.radius.mean() / key_norms.mean()),
            "blocks_for_most": float((torch.minimum(needed, there) / there).mean()),
            "on_diagonal": float((mass * near).sum(dim=-1).mean()),
        }
        records.append(about | numbers)
    return records


def deviation(q: Tensor, k: Tensor, plan: Plan) -> Deviation:
    """Bound and truth for every block pair (E9).

    U = s (R^Q M^K + M^Q R^K + R^Q R^K), R the largest distance of a token to its block mean, M the largest norm of a
    token of the block.

    Args:
        q: [B, H, N, D]; k: [B, G, M, D], in the original order.
        plan: gives orders, blocks and scale.
    """
    queries, keys = _sides(q, k, plan)
    repeats = q.shape[1] // k.shape[1]
    query_radius, query_norm = (rearrange(x, "b h i -> b h i 1") for x in (queries.radius, queries.norm))
    key_radius, key_norm = (repeat(x, "b g j -> b (g r) 1 j", r=repeats) for x in (keys.radius, keys.norm))
    bound = plan.scale * (query_radius * key_norm + query_norm * key_radius + query_radius * key_radius)
    largest, mean = torch.empty_like(bound), torch.empty_like(bound)
    for entry, head, block in itertools.product(*map(range, bound.shape[:3])):
        group, there = head // repeats, keys.there[entry]
        rows = queries.tokens[entry, head, block][queries.there[entry, block]]
        logits = torch.einsum("pd,jcd->jpc", rows, keys.tokens[entry, group])
        centre = rearrange(keys.mean[entry, group] @ queries.mean[entry, head, block], "j -> j 1 1")
        off = plan.scale * (logits - centre).abs().masked_fill(~rearrange(there, "j c -> j 1 c"), 0)
        largest[entry, head, block] = off.amax(dim=(1, 2))
        mean[entry, head, block] = off.sum(dim=(1, 2)) / (there.sum(-1) * len(rows))
    empty = rearrange(~keys.there.any(-1), "b j -> b 1 1 j")
    return Deviation(*(x.masked_fill(empty, math.nan) for x in (bound, largest, mean)))


def _planned(
    capture: Capture, configs: Sequence[BAAttConfig], progress: Callable[[], None]
) -> Iterator[tuple[dict[str, Any], Tensor, Tensor, Plan]]:
    for (layer, heads), config in itertools.product(capture.layers.items(), configs):
        q, k, _ = heads.widened()
        about = {"layer": layer, "sort": config.sort, "segment": config.segment, "block_size": config.block_size}
        yield about, q, k, make_plan(q, k, config, scale=capture.scale, impl="reference")
        progress()


def _sides(q: Tensor, k: Tensor, plan: Plan) -> tuple[_Blocks, _Blocks]:
    size = plan.config.block_size
    return _blocks(q, plan.query_order, size), _blocks(k, plan.key_order, size)


def _blocks(x: Tensor, order: TokenOrder, size: int) -> _Blocks:
    tokens, count = gather_blocks(x, order, size)
    there = torch.arange(size, device=x.device) < rearrange(count, "b l -> b l 1")
    mean = pool_blocks(x, order, size).mean
    apart = (tokens - rearrange(mean, "b h l d -> b h l 1 d")).norm(dim=-1)
    radius = apart.masked_fill(~rearrange(there, "b l p -> b 1 l p"), 0).amax(dim=-1)
    return _Blocks(tokens, there, mean, radius, reduce(tokens.norm(dim=-1), "b h l p -> b h l", "max"))
