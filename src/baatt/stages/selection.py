"""Selection (E7): the key blocks every query block keeps, K a row or I * K a head.

In: scores [B, H, I, J]. Out: a `BlockSelection`. The number kept follows from the sparsity and the number of key blocks
that hold a token, per batch entry, so padding changes nothing. Never waits for the device, if it has float64.
"""

import math
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from baatt.types import BlockSelection, Sight, kept_blocks, widest


def select_blocks(
    scores: Tensor,
    key_block_size: Tensor,
    sparsity: float,
    keep_first: int = 0,
    *,
    budget: str = "row",
    query_block_size: Tensor | None = None,
    sight: Sight | None = None,
) -> BlockSelection:
    """Keep the key blocks of the highest score, K = max(1, ceil((1 - sparsity) * J)) of a row or on average (E7).

    Of equal scores the lower row and then the lower block id wins. Per batch entry J counts the non-empty key blocks
    only; an entry without any keeps none.

    Args:
        scores: [B, H, I, J], -inf for empty key blocks.
        key_block_size: [B, J] int64, tokens in each key block (`BlockStats.size`).
        sparsity: share of key blocks skipped, in [0, 1).
        keep_first: key blocks from the front that are kept whatever their score, as far as K goes (C6).
        budget: of `BUDGETS`: "row" keeps K of every row; "head" keeps as many block pairs of a head as all its rows
            would, those of the highest score over all rows, the first and, where K has room, the best block of each
            row among them. That needs all rows of a head, in scores that mean the same in every row.
        query_block_size: [B, I] int64, for "head": rows without a token take no part and keep K. None: all have some.
        sight: of the I query blocks. J of a row then counts the key blocks that it sees, and those at the place of its
            first and last query are kept before all others, even where K is less.

    Returns:
        BlockSelection with index [B, H, I, K] ("head": [B, H, I, J]; with sight at least 2) and count [B, H, I] int32.
    """
    query_blocks, key_blocks = scores.shape[2:]
    present, columns = rearrange(key_block_size > 0, "b j -> b 1 1 j"), torch.arange(key_blocks, device=scores.device)
    # +inf is left to what is kept whatever its score, and what is not a number loses to any.
    scores = scores.nan_to_num(nan=-math.inf, posinf=torch.finfo(scores.dtype).max, neginf=-math.inf)
    if sight is not None:
        present = present & (columns < rearrange(sight.spans[..., 3], "b i -> b 1 i 1"))
        scores = scores.masked_fill(~present, -math.inf)
    available = present.sum(-1, keepdim=True)
    count = _share(available, sparsity, key_blocks).clamp(min=1).minimum(available)
    first = present & (columns < count.clamp(max=keep_first))
    if sight is not None:
        own = present & (columns == rearrange(sight.spans[..., :2], "b i s -> s b 1 i 1")).any(0)
        number = own.sum(-1, keepdim=True)
        count = torch.maximum(count, number)
        others = present & ~own & (columns < keep_first)
        first = own | (others & (others.cumsum(-1) <= count - number))
    sizes = scores.new_ones(1, query_blocks) if query_block_size is None else query_block_size
    kept = BUDGETS[budget](scores, present & rearrange(sizes > 0, "b i -> b 1 i 1"), first, count)
    usual = kept_blocks(sparsity, key_blocks)
    capacity = key_blocks if budget == "head" else usual if sight is None else min(key_blocks, max(usual, 2))
    return _lists(kept, capacity)._replace(uneven=budget == "head" or sight is not None)


def _share(available: Tensor, sparsity: float, most: int) -> Tensor:
    """The float64 product of `kept_blocks`, so that an entry without padding keeps exactly as many."""
    if widest(available.device) == torch.float64:
        return ((1 - sparsity) * available.double()).ceil().long()
    products = [math.ceil((1 - sparsity) * number) for number in range(most + 1)]
    return torch.tensor(products, device=available.device)[available]


def log_distribution(scores: Tensor, sight: Sight | None = None) -> Tensor:
    """Logarithm of the distribution of a row's attention over the key blocks it sees, of logits [B, H, I, J] (E6).

    It ranks as the distribution itself, whose small shares would all be 0.
    """
    if sight is not None:
        unseen = torch.arange(scores.shape[-1], device=scores.device) >= sight.spans[..., 3, None]
        scores = scores.masked_fill(rearrange(unseen, "b i j -> b 1 i j"), -math.inf)
    return scores.log_softmax(dim=-1)


def _best_of_rows(scores: Tensor, pairs: Tensor, first: Tensor, count: Tensor) -> Tensor:
    """Which block pairs are kept, [B, H, I, J]: `count` [B, 1, 1, 1] of every row, the `first` [B, 1, 1, J] before all.

    pairs: [B, 1, I, J], where both blocks have a token. With sight `count` and `first` have an axis of rows.
    """
    ranked = torch.where(first, math.inf, scores).argsort(dim=-1, descending=True, stable=True)
    best = torch.arange(scores.shape[-1], device=scores.device) < count
    return torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, ranked, best.expand_as(ranked))


def _best_of_heads(scores: Tensor, pairs: Tensor, first: Tensor, count: Tensor) -> Tensor:
    """As `_best_of_rows`, `count` of a row on average over the rows of a head that have tokens."""
    best = torch.arange(scores.shape[-1], device=scores.device) == scores.argmax(-1, keepdim=True)
    forced = first | (best & (first.sum(-1, keepdim=True) < count))
    flat = rearrange(torch.where(forced, math.inf, scores), "b h i j -> b h (i j)")
    ranked = flat.argsort(dim=-1, descending=True, stable=True)
    eligible = rearrange(pairs.expand_as(scores), "b h i j -> b h (i j)").gather(-1, ranked)
    rows = pairs.any(-1, keepdim=True)
    total = rearrange((count * rows).sum(2, keepdim=True), "b 1 1 1 -> b 1 1")
    kept = torch.zeros_like(eligible).scatter(-1, ranked, eligible & (eligible.cumsum(-1) <= total))
    kept = rearrange(kept, "b h (i j) -> b h i j", j=scores.shape[-1])
    return torch.where(rows, kept, _best_of_rows(scores, pairs, first, count))


def _lists(kept: Tensor, capacity: int) -> BlockSelection:
    """Ascending lists of the kept blocks [B, H, I, J], of `capacity` slots."""
    columns = torch.arange(kept.shape[-1], device=kept.device)
    count = kept.sum(-1, keepdim=True)
    ascending = torch.where(kept, columns, kept.shape[-1]).sort(dim=-1).values[..., :capacity]
    last_kept = ascending.gather(-1, (count - 1).clamp(min=0)).masked_fill(count == 0, 0)
    index = torch.where(columns[:capacity] < count, ascending, last_kept)
    return BlockSelection(index.int(), count.squeeze(-1).int())


#: `BAAttConfig.budget` -> which block pairs it keeps.
BUDGETS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "row": _best_of_rows,
    "head": _best_of_heads,
}
