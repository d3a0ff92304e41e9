"""CPU twins of `scores.covariance.summarise` and `stages.sparse`.

Both go through the heads one by one, so what they need besides inputs and output is a fraction of one head, and what
they compute for a batch entry cannot depend on the others. Attention takes the C kernel of `cpu_native`, or
`cpu_gather` where no C compiler is present and for float64.
"""

import functools
import math

import torch
from einops import rearrange
from torch import Tensor

from baatt.kernels import cpu_gather, cpu_native
from baatt.types import BlockSelection, BlockStats, Partial, ScoreOptions, TokenOrder


def summarise(x: Tensor, order: TokenOrder, options: ScoreOptions) -> BlockStats:
    """Mean and population variance of each block of sorted tokens (E3); see `stages.pooling.pool_blocks`."""
    (batch, heads, tokens, channels), block_size = x.shape, options.block_size
    blocks = -(-tokens // block_size)
    size = (rearrange(order.length, "b -> b 1") - torch.arange(blocks) * block_size).clamp(0, block_size)
    mean = x.new_zeros(batch, heads, blocks, channels, dtype=torch.promote_types(x.dtype, torch.float32))
    variance = torch.zeros_like(mean)
    for entry, length in enumerate(order.length.tolist()):
        full = length // block_size
        for head in range(heads):
            rows = x[entry, head].index_select(0, order.index[entry, head, :length]).to(mean.dtype)
            whole = rearrange(rows[: full * block_size], "(l p) d -> l p d", p=block_size)
            if full:
                _moments(whole, mean[entry, head, :full], variance[entry, head, :full])
            if length % block_size:
                rest = rearrange(rows[full * block_size :], "p d -> 1 p d")
                _moments(rest, mean[entry, head, full : full + 1], variance[entry, head, full : full + 1])
    return BlockStats(mean, variance, size)


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
            group = cpu_gather.Group(
                q=q[entry, heads],
                k=k[entry, key_head],
                v=v[entry, key_head],
                query_order=query_order.index[entry, heads],
                key_order=key_order.index[entry, key_head, :length],
                kept=selection.index[entry, heads],
                count=selection.count[entry, heads],
                out=out[entry, heads],
                lse=lse[entry, heads],
            )
            attend_group(group, block_size=block_size, scale=scale)
    return Partial(out, lse)


def _moments(blocks: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Mean and variance of blocks [L, P, D] over P, written to [L, D] each; `blocks` is used up.

    Two sums and not torch.var_mean, which takes six times as long over an axis that is not the last.
    """
    mean.copy_(blocks.mean(dim=1))
    blocks -= rearrange(mean, "l d -> l 1 d")
    variance.copy_(blocks.square_().mean(dim=1))
