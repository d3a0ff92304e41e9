"""Is an attention output right? Its error against dense float64 attention with the same mask, and what is allowed.

In: q, k, v, a plan and the output to judge. Out: a `Verification`. Query blocks are taken one by one, so memory stays
at one block of rows; of large inputs the first, middle and last block of every head are taken. Does not know who
computed the output.
"""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from baatt.plan import Plan

#: Up to this many query blocks over all heads, every one is verified.
ALL_BLOCKS = 128


class VerificationError(RuntimeError):
    """An output that is further from float64 than allowed."""


class Verification(NamedTuple):
    """error, limit: relative L2 norms; checked, blocks: query blocks that were compared and that there are."""

    error: float
    limit: float
    checked: int
    blocks: int


def verify(q: Tensor, k: Tensor, v: Tensor, plan: Plan, out: Tensor) -> Verification:
    """Relative L2 error of attention over a plan, and twice the error of eager PyTorch plus half a rounding.

    Args:
        q: [B, H, N, D]; k, v: [B, G, N, D] in float32, bfloat16 or float16.
        plan: which keys every query attends to.
        out: [B, H, N, D] to be judged, in q's dtype and in the original order; not finite, its error is infinite.
    """
    batch, heads, blocks = plan.selection.count.shape
    chosen = range(blocks) if batch * heads * blocks <= ALL_BLOCKS else sorted({0, blocks // 2, blocks - 1})
    eager_dtype = torch.promote_types(q.dtype, torch.float32)
    norm = error = eager_error = 0.0
    for entry, head, block in ((e, h, b) for e in range(batch) for h in range(heads) for b in chosen):
        size = plan.config.block_size
        rows = plan.query_order.index[entry, head, block * size : (block + 1) * size]
        key_head = head * k.shape[1] // heads
        places = kept_places(plan, entry, head, block)
        keys = plan.key_order.index[entry, key_head, places]
        sides = q[entry, head, rows], k[entry, key_head, keys], v[entry, key_head, keys]
        hidden = None
        if plan.sight is not None:
            hidden = places >= rearrange(plan.sight.limit[entry, block, : len(rows)], "p -> p 1")
        exact = _attention(*sides, hidden, plan.scale, torch.float64)
        eager = _attention(*sides, hidden, plan.scale, eager_dtype).to(q.dtype)
        norm += float(exact.square().sum())
        eager_error += float((eager.double() - exact).square().sum())
        error += float((out[entry, head, rows].double() - exact).square().sum())
    limit = 2 * math.sqrt(eager_error / norm) + torch.finfo(q.dtype).eps / 2
    found = math.sqrt(error / norm) if bool(torch.isfinite(out).all()) else math.inf
    return Verification(found, limit, batch * heads * len(chosen), batch * heads * blocks)


def require_verified(name: str, found: Verification, factor: float = 1.0) -> Verification:
    """The verification, or `VerificationError` with name, error and limit beyond `factor` times the limit."""
    limit = factor * found.limit
    if not found.error <= limit:
        raise VerificationError(
            f"{name} must be within a relative error of {limit:.2e} of float64 attention with the same mask, "
            f"got {found.error:.2e}: no speed-up is given"
        )
    return found


def kept_places(plan: Plan, entry: int, head: int, block: int) -> Tensor:
    """Places, in the order of the keys, of those that one query block attends to, [T]."""
    size = plan.config.block_size
    count = int(plan.selection.count[entry, head, block])
    kept = plan.selection.index[entry, head, block, :count].long()
    places = (rearrange(kept * size, "k -> k 1") + torch.arange(size, device=kept.device)).flatten()
    return places[places < plan.key_order.length[entry]]


def _attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    """hidden: [P, T] bool, what a query does not see; every query sees some key."""
    logits = q.to(dtype) @ k.to(dtype).T * scale
    return (logits if hidden is None else logits.masked_fill(hidden, -math.inf)).softmax(-1) @ v.to(dtype)
