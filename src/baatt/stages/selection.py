"""Selection (E7): the key blocks every query block keeps.

In: scores [B, H, I, J]. Out: a `BlockSelection`. The number kept follows from the sparsity and the number of key blocks
that hold a token, per batch entry, so padding changes nothing. Never waits for the device.
"""

import math

import torch
from einops import rearrange, repeat
from torch import Tensor

from baatt.types import BlockSelection, kept_blocks


def select_blocks(scores: Tensor, key_block_size: Tensor, sparsity: float, keep_first: int = 0) -> BlockSelection:
    """Keep the K key blocks of the highest score, K = max(1, ceil((1 - sparsity) * J)) (E7).

    Of equal scores the lower block id wins. Per batch entry J counts the non-empty key blocks only; an entry without
    any keeps none.

    Args:
        scores: [B, H, I, J], -inf for empty key blocks.
        key_block_size: [B, J] int64, tokens in each key block (`BlockStats.size`).
        sparsity: share of key blocks skipped, in [0, 1).
        keep_first: key blocks from the front that are kept whatever their score, as far as K goes (C6).

    Returns:
        BlockSelection with index [B, H, I, K] and count [B, H, I] int32.
    """
    _, heads, query_blocks, key_blocks = scores.shape
    first = torch.arange(key_blocks, device=scores.device) < keep_first
    capacity = kept_blocks(sparsity, key_blocks)
    available = (key_block_size > 0).sum(-1)
    # The same float64 product as above, so that an entry without padding keeps exactly `capacity` blocks.
    count = ((1 - sparsity) * available.double()).ceil().long().clamp(min=1).minimum(available)

    scores = torch.where(first & (rearrange(key_block_size, "b j -> b 1 1 j") > 0), math.inf, scores)
    ranked = scores.argsort(dim=-1, descending=True, stable=True)[..., :capacity]
    surplus = torch.arange(capacity, device=scores.device) >= rearrange(count, "b -> b 1 1 1")
    ascending = ranked.masked_fill(surplus, key_blocks).sort(dim=-1).values
    last_slot = repeat((count - 1).clamp(min=0), "b -> b h i 1", h=heads, i=query_blocks)
    last_kept = ascending.gather(-1, last_slot)
    index = torch.where(surplus, last_kept, ascending)
    index = index.masked_fill(rearrange(count == 0, "b -> b 1 1 1"), 0)
    return BlockSelection(index.int(), repeat(count.int(), "b -> b h i", h=heads, i=query_blocks))
