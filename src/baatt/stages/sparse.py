"""Block-sparse attention (E8): exact softmax attention of every query block over its kept key blocks.

In: q, k, v in the original token order, their orders and a `BlockSelection`. Out: a `Partial` in the original order.
Goes through the query blocks one by one and gathers what each keeps, so memory stays far below N x M. Does not know how
the blocks were chosen.
"""

import math

import torch
from einops import rearrange, repeat
from torch import Tensor

from baatt.types import BlockSelection, Partial, Sight, TokenOrder


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_order: TokenOrder,
    key_order: TokenOrder,
    selection: BlockSelection,
    *,
    block_size: int,
    scale: float,
    sight: Sight | None = None,
) -> Partial:
    """Attend from every query block to the tokens of its kept key blocks (E8).

    Args:
        q: [B, H, N, D].
        k: [B, G, M, D], H % G == 0.
        v: [B, G, M, D].
        query_order: of q.
        key_order: of k; keys from `length` on are masked, whatever their values.
        selection: kept key blocks, index [B, H, I, K] and count [B, H, I].
        block_size: P, tokens per block.
        scale: s, the factor on q.k.
        sight: which of its kept keys each query sees; None = all.

    Returns:
        Partial with out [B, H, N, D] in q's dtype and lse [B, H, N] in float32 (float64 for float64).
    """
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for block in range(selection.index.shape[2]):
        tokens = query_order.index[..., block * block_size : (block + 1) * block_size]
        index, count = selection.index[:, :, block], selection.count[:, :, block]
        keys, place, present = _kept_tokens(key_order, index, count, block_size)
        rows = _take(q, tokens)
        kept_k = torch.where(rearrange(present, "b h t -> b h t 1"), _take(k, keys), 0)
        kept_v = torch.where(rearrange(present, "b h t -> b h t 1"), _take(v, keys), 0)
        visible = rearrange(present, "b h t -> b h 1 t")
        if sight is not None:
            limit = rearrange(sight.limit[:, block, : tokens.shape[-1]], "b p -> b 1 p 1")
            visible = visible & (rearrange(place, "b h t -> b h 1 t") < limit)
        block_out, block_lse = _attend(rows, kept_k, kept_v, visible, scale)
        out.scatter_(2, repeat(tokens, "b h p -> b h p d", d=q.shape[3]), block_out.to(q.dtype))
        lse.scatter_(2, tokens, block_lse)
    return Partial(out, lse)


def _kept_tokens(key_order: TokenOrder, index: Tensor, count: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Original and sorted positions of the kept keys of one query block, [B, H, K * P], and which of them are real."""
    groups, keys = key_order.index.shape[1:]
    slots, offsets = torch.arange(index.shape[-1], device=index.device), torch.arange(block_size, device=index.device)
    place = rearrange(index.long() * block_size, "b h k -> b h k 1") + offsets
    kept = slots < rearrange(count, "b h -> b h 1")
    present = rearrange(kept, "b h k -> b h k 1") & (place < rearrange(key_order.length, "b -> b 1 1 1"))
    inside = rearrange(place.clamp(max=keys - 1), "b (g r) k p -> b g (r k p)", g=groups)
    tokens = key_order.index.gather(-1, inside)
    tokens = rearrange(tokens, "b g (r t) -> b (g r) t", r=index.shape[1] // groups)
    return tokens, rearrange(place, "b h k p -> b h (k p)"), rearrange(present, "b h k p -> b h (k p)")


def _take(x: Tensor, tokens: Tensor) -> Tensor:
    """Rows `tokens` [B, H, T] of x [B, G, M, D] as [B, H, T, D], in the accumulation dtype."""
    groups, channels = x.shape[1], x.shape[3]
    place = rearrange(tokens, "b (g r) t -> b g (r t)", g=groups)
    rows = x.gather(2, repeat(place, "b g t -> b g t d", d=channels))
    rows = rearrange(rows, "b g (r t) d -> b (g r) t d", t=tokens.shape[-1])
    return rows.to(torch.promote_types(x.dtype, torch.float32))


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention of q [B, H, P, D] over k, v [B, H, T, D] where `visible` [B, H, 1 or P, T]; out and lse."""
    scores = _product(q, rearrange(k, "b h t d -> b h d t")) * scale
    scores = scores.masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(dim=-1)
    # Over no key at all, softmax is 0 / 0.
    weights = scores.softmax(dim=-1).masked_fill(rearrange(lse == -math.inf, "b h p -> b h p 1"), 0)
    return _product(weights, v), lse


def _product(left: Tensor, right: Tensor) -> Tensor:
    """[B, H, X, Y] times [B, H, Y, Z], head by head: the rounding of a batched product depends on the batch size."""
    pairs = zip(rearrange(left, "b h x y -> (b h) x y"), rearrange(right, "b h y z -> (b h) y z"), strict=True)
    return rearrange(torch.stack([x @ y for x, y in pairs]), "(b h) x z -> b h x z", b=left.shape[0])
