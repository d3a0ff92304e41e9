"""Dense attention: what sparse attention is measured against, and what a call that stays dense computes.

In: q [B, H, N, D], k and v [B, G, M, D] and a mask of the keys. Out: [B, H, N, D]. PyTorch's own kernels do the work;
`AttentionFunction` is the shape that a model's layer calls, and dense and sparse attention have it in common.
"""

from typing import Protocol

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


class AttentionFunction(Protocol):
    """q [B, H, N, D], k and v [B, G, M, D], key_mask [B, M] bool (True = attend) or None -> [B, H, N, D].

    M > N in a pass over a part of a cached sequence; the queries may then lie anywhere among the keys.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, /, *, key_mask: Tensor | None) -> Tensor: ...


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, /, *, key_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Full attention softmax(scale q k^T) v; a batch row whose keys are all masked gives 0.

    Args:
        q: [B, H, N, D]. k, v: [B, G, M, D] with H a multiple of G. key_mask: [B, M] bool, True = attend.
        scale: None = 1 / sqrt(D).
    """
    if key_mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    # Fused kernels that take a mask take no grouped heads; without this the product of N x N scores is stored.
    if q.shape[1] != k.shape[1]:  # repeating once would copy too
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    empty = ~key_mask.any(dim=1, keepdim=True)
    visible = rearrange(key_mask | empty, "B M -> B 1 1 M")  # no kernel meets a row of -inf alone
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    return out.masked_fill(rearrange(empty, "B 1 -> B 1 1 1"), 0)
