"""CPU twin of `stages.sparse`.

It goes through the heads one by one, so what it needs besides inputs and output is a fraction of one head, and what it
computes for a batch entry cannot depend on the others. It takes the C kernel of `cpu_native`, or `cpu_gather` where no
C compiler is present and for float64.
"""

import functools
import math

import torch
from torch import Tensor

from baatt.kernels import cpu_gather, cpu_native
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
    """Attend from every query block to its kept key blocks (E8); see `stages.sparse.sparse_attention`."""
    for name, order in (("query_order", query_order), ("key_order", key_order)):
        # Of a plan edited to point outside of the tensors the C kernel would read foreign memory.
        tokens = order.index.shape[-1]
        lowest, highest = (int(bound) for bound in torch.aminmax(order.index))
        if lowest < 0 or highest >= tokens:
            raise IndexError(f"plan.{name}.index must hold positions in [0, {tokens}), got {lowest} to {highest}")
    groups, repeats = k.shape[1], q.shape[1] // k.shape[1]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    kernel = None if q.dtype == torch.float64 else cpu_native.library()
    attend_group = cpu_gather.attend_group if kernel is None else functools.partial(cpu_native.attend_group, kernel)
    for entry, length in enumerate(key_order.length.tolist()):
        for key_head in range(groups):
            heads = slice(key_head * repeats, (key_head + 1) * repeats)
            if length == 0:
                out[entry, heads] = 0
                lse[entry, heads] = -math.inf
                continue
            sorted_k, sorted_v = k[entry, key_head], v[entry, key_head]
            if not key_order.identity:
                order = key_order.index[entry, key_head, :length]
                sorted_k, sorted_v = sorted_k.index_select(0, order), sorted_v.index_select(0, order)
            group = cpu_gather.Group(
                q=q[entry, heads],
                k=sorted_k,
                v=sorted_v,
                query_order=query_order.index[entry, heads],
                kept=selection.index[entry, heads],
                count=selection.count[entry, heads],
                out=out[entry, heads],
                lse=lse[entry, heads],
                limit=None if sight is None else sight.limit[entry],
            )
            attend_group(group, block_size=block_size, scale=scale)
    return Partial(out, lse)
