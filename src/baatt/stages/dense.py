"""Dense attention: what sparse attention is measured against, and what a call that stays dense computes.

In: q [B, H, N, D], k and v [B, G, M, D], a mask of the keys and a causal structure. Out: [B, H, N, D]. PyTorch's own
kernels do the work; `AttentionFunction` is the shape that a model's layer calls, and dense and sparse attention have it
in common.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


class AttentionFunction(Protocol):
    """q [B, H, N, D], k and v [B, G, M, D], key_mask [B, M] bool (True = attend) or None -> [B, H, N, D].

    M > N in a pass over a part of a cached sequence; the queries may then lie anywhere among the keys.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, /, *, key_mask: Tensor | None) -> Tensor: ...


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /,
    *,
    key_mask: Tensor | None = None,
    causal: int | None = None,
    query_start: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Full attention softmax(scale q k^T) v over what a query sees; a query that sees nothing gets 0.

    Args:
        q: [B, H, N, D]. k, v: [B, G, M, D] with H a multiple of G. key_mask: [B, M] bool, True = attend.
        causal, query_start: as `baatt.ba_attention`; None is bidirectional, and queries at the last keys.
        scale: None = 1 / sqrt(D).
    """
    queries, keys = q.shape[2], k.shape[2]
    start = keys - queries if query_start is None else query_start
    if key_mask is None and (causal is None or (causal == 1 and start == 0)):
        is_causal = causal is not None
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    # Fused kernels that take a mask take no grouped heads; without this the product of N x N scores is stored.
    if q.shape[1] != k.shape[1]:  # repeating once would copy too
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    visible = q.new_ones(1, 1, 1, keys, dtype=torch.bool)
    if key_mask is not None:
        visible = rearrange(key_mask, "B M -> B 1 1 M")
    if causal is not None:
        places = start + torch.arange(queries, device=q.device)
        visible = visible & (torch.arange(keys, device=q.device) // causal <= rearrange(places // causal, "N -> N 1"))
    empty = ~visible.any(dim=-1, keepdim=True)  # no kernel meets a row of -inf alone
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible | empty, scale=scale)
    return out.masked_fill(empty, 0)
