"""Blocks chosen by clusters, of which the first key block is remembered token by token.

An attention sink stands among the first tokens, and a cluster that holds it hides it: its key is short, so it is near
the block mean and far from no other, while every query has a large product with it. `clusters` needs the first block
kept therefore (C6), which takes a place from a model without sinks. Here all tokens of that block are key
representatives (C3 with n_b = 1), so it is kept where it is attended to, and the softmax of C4 knows of it. All else is
`clusters`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.functional import pad

from baatt.scores import clusters
from baatt.stages.pooling import gather_blocks
from baatt.types import BlockClusters, ScoreOptions, Sight, TokenOrder


class ClustersAndFirst(NamedTuple):
    """`BlockClusters`, and the tokens [B, H or G, 1, P, D] of the first block, 0 where none is or it is masked."""

    mean: Tensor
    tokens: Tensor
    size: Tensor
    first: Tensor


def summarise(
    x: Tensor,
    order: TokenOrder,
    options: ScoreOptions,
    find: Callable[[Tensor, TokenOrder, ScoreOptions], BlockClusters] = clusters.summarise,
) -> ClustersAndFirst:
    """Clusters of every block (C1, C2), and the first block itself. find: `clusters.summarise`, or its twin."""
    index = order.index[..., : options.block_size]
    own = x.gather(2, repeat(index, "b h n -> b h n d", d=x.shape[3]))
    places = torch.arange(index.shape[-1], device=x.device).expand(index.shape)
    first = TokenOrder(places, order.length.clamp(max=options.block_size), identity=True)
    return ClustersAndFirst(*find(x, order, options), gather_blocks(own, first, options.block_size).tokens)


def compare(
    queries: ClustersAndFirst, keys: ClustersAndFirst, options: ScoreOptions, scale: float, sight: Sight | None = None
) -> Tensor:
    """As `clusters.compare`, by all tokens of the first key block."""
    clusters_of = keys.mean.shape[3]
    parts = -(-options.block_size // clusters_of)
    first = pad(keys.first, (0, 0, 0, parts * clusters_of - options.block_size))
    first = rearrange(first, "b g 1 (j r) d -> b g j r d", j=parts)
    there = torch.arange(parts * clusters_of, device=first.device) < rearrange(keys.size[:, 0], "b -> b 1 1")
    there = rearrange(there.expand(-1, first.shape[1], -1), "b g (j r) -> b g j r", j=parts)
    mean = torch.cat((first, keys.mean[:, :, 1:]), dim=2)
    tokens = torch.cat((there.to(keys.tokens.dtype), keys.tokens[:, :, 1:]), dim=2)
    finer = BlockClusters(mean, tokens, keys.size)
    return clusters.compare_by(clusters.mean_logits, queries, finer, options, scale, sight, first_parts=parts)
