"""Token orders: norm-based segment sorting (E2) and the order of position, for queries and for keys.

In: x [B, H, N, D] and, for keys, a mask. Out: a `TokenOrder`. Masked tokens are moved behind all others before the
sequence is cut into segments, so a masked key influences nothing: the order of the others is what it would be had the
masked ones been deleted. Knows nothing of blocks, scores or attention.
"""

import math
from collections.abc import Callable

import torch
from einops import rearrange, repeat
from torch import Tensor

from baatt.types import TokenOrder, norms

OrderFunction = Callable[[Tensor, int | None, Tensor | None], TokenOrder]


def by_position(x: Tensor, segment: int | None, mask: Tensor | None) -> TokenOrder:
    """Keep the tokens in their order; masked ones go to the end. Arguments as `by_norm`, `segment` without effect.

    The heads share the memory of the index, and without a mask the batch entries do.
    """
    compacted, length = _unmasked_first(x, mask)
    return TokenOrder(repeat(compacted, "b n -> b h n", h=x.shape[1]), length, identity=mask is None)


def by_norm(x: Tensor, segment: int | None, mask: Tensor | None) -> TokenOrder:
    """Sort the tokens of every segment by L2 norm, ascending; equal norms keep their order (E2).

    Args:
        x: [B, H, N, D].
        segment: consecutive unmasked tokens per segment; None = the whole sequence is one segment.
        mask: [B, N] bool, True = the token counts; None = all do.

    Returns:
        TokenOrder with index [B, H, N] and length [B].
    """
    heads, tokens = x.shape[1], x.shape[2]
    compacted, length = _unmasked_first(x, mask)
    compacted = repeat(compacted, "b n -> b h n", h=heads)
    norm = norms(x)
    # A NaN would sort behind the masked tokens and let one of them in; as +inf it stays in front of them.
    norm = norm.gather(-1, compacted).nan_to_num(nan=math.inf, posinf=math.inf)
    absent = torch.arange(tokens, device=x.device) >= rearrange(length, "b -> b 1 1")
    norm = norm.masked_fill(absent, math.inf)

    segment = tokens if segment is None else min(segment, tokens)
    segments = -(-tokens // segment)
    norm = torch.nn.functional.pad(norm, (0, segments * segment - tokens), value=math.inf)
    inside = rearrange(norm, "b h (s t) -> b h s t", t=segment).argsort(dim=-1, stable=True)
    first = torch.arange(segments, device=x.device) * segment
    # Padding ties with the last tokens at +inf and stands behind them, so the cut to N takes off padding only.
    rank = rearrange(inside + rearrange(first, "s -> s 1"), "b h s t -> b h (s t)")[..., :tokens]
    return TokenOrder(compacted.gather(-1, rank), length)


def _unmasked_first(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Original positions with the masked ones behind the others, [B, N], and the number of unmasked ones, [B]."""
    batch, tokens = x.shape[0], x.shape[2]
    if mask is None:
        positions = torch.arange(tokens, device=x.device)
        return repeat(positions, "n -> b n", b=batch), torch.full((batch,), tokens, device=x.device)
    return (~mask).byte().argsort(dim=-1, stable=True), mask.sum(-1)


#: sort -> (order of the queries, order of the keys)
ORDERS: dict[str, tuple[OrderFunction, OrderFunction]] = {
    "none": (by_position, by_position),
    "q": (by_norm, by_position),
    "k": (by_position, by_norm),
    "qk": (by_norm, by_norm),
}
