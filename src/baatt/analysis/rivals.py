"""Other ways to score block pairs, for comparison at an equal budget: what BA-Att is measured against.

In: q, k and a `Plan` that gives orders, blocks and scale. Out: scores [B, H, I, J] for `stages.selection`. They may
look at every token, which a fast score must not. Knows neither models nor tasks.
"""

import functools
import math
from collections.abc import Callable

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from baatt.analysis.oracle import block_mass
from baatt.attention import attend, make_plan
from baatt.config import BAAttConfig
from baatt.plan import Plan
from baatt.stages.pooling import pool_blocks
from baatt.stages.scoring import covariance_score
from baatt.stages.selection import select_blocks
from baatt.types import BlockSelection, BlockStats, TokenOrder

Rival = Callable[[Tensor, Tensor, Plan], Tensor]
SEED = 20260519


def select_by(rival: str, q: Tensor, k: Tensor, plan: Plan) -> BlockSelection:
    """The selection of a rival at the plan's sparsity.

    Args:
        rival: a name in `RIVALS`.
        q: [B, H, N, D]; k: [B, G, M, D], in the original order.

    Raises:
        ValueError: an unknown name.
    """
    if rival not in RIVALS:
        raise ValueError(f"score must be one of {list(RIVALS)}, got {rival!r}")
    empty = rearrange(plan.key_stats.size == 0, "b j -> b 1 1 j")
    scores = RIVALS[rival](q, k, plan).masked_fill(empty, -math.inf)
    return select_blocks(scores, plan.key_stats.size, plan.config.sparsity)


def rival_attention(rival: str, config: BAAttConfig, impl: str) -> Callable[..., Tensor]:
    """Attention like `ba_attention`, (q, k, v, *, key_mask) -> out, with another score in place of its own.

    Args:
        rival: a name in `RIVALS`.
        config: orders, blocks and budget.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, /, *, key_mask: Tensor | None = None) -> Tensor:
        query_mask = key_mask if q.shape[2] == k.shape[2] else None  # as the sampler has it for the operator's own
        plan = make_plan(q, k, config, key_mask=key_mask, query_mask=query_mask, impl=impl)
        return attend(q, k, v, plan._replace(selection=select_by(rival, q, k, plan)), impl=impl)

    return attention


def covariance(q: Tensor, k: Tensor, plan: Plan) -> Tensor:
    """BA-Att itself with the plan's beta (E5)."""
    return covariance_score(plan.query_stats, plan.key_stats, scale=plan.scale, beta=plan.config.beta)


def block_means(q: Tensor, k: Tensor, plan: Plan) -> Tensor:
    """Logit of the block means (E4)."""
    return covariance_score(plan.query_stats, plan.key_stats, scale=plan.scale, beta=0)


def random_blocks(q: Tensor, k: Tensor, plan: Plan) -> Tensor:
    """Anything: the floor. The same numbers at every call."""
    shape = (*plan.query_stats.mean.shape[:3], plan.key_stats.mean.shape[2])
    generator = torch.Generator().manual_seed(SEED)
    return torch.rand(shape, generator=generator).to(q.device)


def window_and_sink(q: Tensor, k: Tensor, plan: Plan) -> Tensor:
    """The first key block, then the key blocks nearest to the query block by place in the sequence."""
    query_blocks, key_blocks = plan.query_stats.mean.shape[2], plan.key_stats.mean.shape[2]
    rows = (torch.arange(query_blocks, device=q.device) + 0.5) / query_blocks
    columns = (torch.arange(key_blocks, device=q.device) + 0.5) / key_blocks
    near = -(rearrange(rows, "i -> i 1") - columns).abs()
    near[:, 0] = 1
    return repeat(near, "i j -> b h i j", b=q.shape[0], h=q.shape[1])


def antidiagonal(q: Tensor, k: Tensor, plan: Plan, *, stride: int) -> Tensor:
    """XAttention: attention sampled along antidiagonals of stride x stride squares, summed per block pair.

    A run of `stride` queries meets a run of `stride` keys in reversed order; the sums of those products, divided by
    the stride, go through a softmax over all runs of keys.

    Raises:
        ValueError: a stride that does not divide the block size.
    """
    size, repeats = plan.config.block_size, q.shape[1] // k.shape[1]
    if size % stride:
        raise ValueError(f"stride must divide block_size={size}, got {stride}")
    queries = _runs(q, plan.query_order, size, stride).flip(3)
    keys = _runs(k, plan.key_order, size, stride)
    blocks = queries.shape[2] * stride // size, keys.shape[2] * stride // size
    queries, keys = (rearrange(x, "b h n s d -> b h n (s d)") for x in (queries, keys))
    present = torch.arange(keys.shape[2], device=q.device) * stride < rearrange(plan.key_order.length, "b -> b 1 1")
    scores = torch.empty(*q.shape[:2], *blocks, dtype=queries.dtype, device=q.device)
    for head in range(q.shape[1]):  # one head at a time bounds the memory
        logits = queries[:, head] @ keys[:, head // repeats].mT * (plan.scale / stride)
        weights = logits.masked_fill(~present, -math.inf).softmax(-1).nan_to_num(0.0)
        sums = reduce(weights, "b (i p) (j c) -> b i j", "sum", p=size // stride, c=size // stride)
        scores[:, head] = sums
    return scores


def pooled_mass(q: Tensor, k: Tensor, plan: Plan, *, run: int) -> Tensor:
    """BA-Att's score at a finer grain: attention mass between runs of `run` tokens, summed per block pair.

    The compensated logit of two runs (E4, E5), plus the log of how many keys the run has, goes through a softmax over
    all runs of keys; the shares count by the queries of a run. With a run of one token this is the oracle's mass (E1),
    with a run of a whole block it ranks the blocks of a query block as BA-Att does, where all are full.

    Raises:
        ValueError: a run that does not divide the block size.
    """
    size, repeats = plan.config.block_size, q.shape[1] // k.shape[1]
    if size % run:
        raise ValueError(f"run must divide block_size={size}, got {run}")
    query_stats, key_stats = pool_blocks(q, plan.query_order, run), pool_blocks(k, plan.key_order, run)
    query_blocks, key_blocks = plan.query_stats.mean.shape[2], plan.key_stats.mean.shape[2]
    dtype = query_stats.mean.dtype
    key_weight, query_weight = key_stats.size.to(dtype).log(), query_stats.size.to(dtype)
    runs = size // run
    missing = key_blocks * runs - key_weight.shape[1], query_blocks * runs - query_weight.shape[1]
    scores = torch.empty(*q.shape[:2], query_blocks, key_blocks, dtype=dtype, device=q.device)
    for head in range(q.shape[1]):  # one head at a time bounds the memory
        one, group = slice(head, head + 1), slice(head // repeats, head // repeats + 1)
        logits = covariance_score(
            BlockStats(query_stats.mean[:, one], query_stats.variance[:, one], query_stats.size),
            BlockStats(key_stats.mean[:, group], key_stats.variance[:, group], key_stats.size),
            scale=plan.scale,
            beta=plan.config.beta,
        )[:, 0]
        shares = (logits + rearrange(key_weight, "b m -> b 1 m")).softmax(-1).nan_to_num(0.0)
        shares = shares * rearrange(query_weight, "b n -> b n 1")
        shares = torch.nn.functional.pad(shares, (0, missing[0], 0, missing[1]))
        scores[:, head] = reduce(shares, "b (i p) (j c) -> b i j", "sum", p=runs, c=runs)
    return scores


def _runs(x: Tensor, order: TokenOrder, size: int, stride: int) -> Tensor:
    """Sorted tokens in runs [B, H, n, stride, D], filled up with 0 to whole blocks; tokens beyond the length are 0."""
    tokens, channels = x.shape[2:]
    sorted_x = x.gather(2, repeat(order.index, "b h n -> b h n d", d=channels))
    sorted_x = sorted_x.to(torch.promote_types(x.dtype, torch.float32))
    there = torch.arange(tokens, device=x.device) < rearrange(order.length, "b -> b 1")
    sorted_x = torch.where(rearrange(there, "b n -> b 1 n 1"), sorted_x, 0)
    sorted_x = torch.nn.functional.pad(sorted_x, (0, 0, 0, -tokens % size))
    return rearrange(sorted_x, "b h (n s) d -> b h n s d", s=stride)


#: name -> scores(q, k, plan)
RIVALS: dict[str, Rival] = {
    "covariance": covariance,
    "mean": block_means,
    "covariance-16": functools.partial(pooled_mass, run=16),
    "covariance-8": functools.partial(pooled_mass, run=8),
    "antidiagonal-8": functools.partial(antidiagonal, stride=8),
    "antidiagonal-16": functools.partial(antidiagonal, stride=16),
    "window": window_and_sink,
    "random": random_blocks,
    "oracle": block_mass,
}
