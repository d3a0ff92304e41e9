"""Sorted copies and block moments on the GPU: the twin of `stages.pooling`, one pass over the tokens for both.

A program takes one block of sorted tokens, gathers its rows through the order, writes them out in sorted order and
keeps them in registers for mean and variance, which therefore take the two passes of the specification at no cost.
"""

import torch
import triton
import triton.language as tl
from einops import rearrange
from torch import Tensor

from baatt.types import BlockStats, PooledTokens, TokenOrder


def pool_tokens(x: Tensor, order: TokenOrder, block_size: int) -> PooledTokens:
    """Mean and population variance of each block of sorted tokens (E3), and the sorted tokens.

    Args:
        x: [B, H, N, D], any strides.
        order: of x; its first `length` tokens are pooled, the others are 0 in the copy.
        block_size: P.

    Returns:
        PooledTokens; stats as `stages.pooling.pool_blocks`, tokens [B, H, N, D] contiguous.
    """
    batch, heads, tokens, channels = x.shape
    blocks = -(-tokens // block_size)
    mean = torch.empty(batch, heads, blocks, channels, dtype=torch.float32, device=x.device)
    variance = torch.empty_like(mean)
    copy = _launch(x, order, block_size, mean, variance)
    first = torch.arange(0, blocks * block_size, block_size, device=x.device)
    size = (rearrange(order.length, "b -> b 1") - first).clamp(0, block_size)
    return PooledTokens(BlockStats(mean, variance, size), copy)


def permute(x: Tensor, order: TokenOrder) -> Tensor:
    """The sorted tokens alone: [B, H, N, D] contiguous, tokens from `order.length` on are 0."""
    return _launch(x, order, 64, None, None)


def _launch(x: Tensor, order: TokenOrder, block_size: int, mean: Tensor | None, variance: Tensor | None) -> Tensor:
    batch, heads, tokens, channels = x.shape
    copy = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    blocks = -(-tokens // block_size)
    columns = min(64, max(16, triton.next_power_of_2(channels)))
    _gather_kernel[(blocks, batch * heads, triton.cdiv(channels, columns))](
        x, order.index.contiguous(), order.length, copy, mean, variance,
        heads, tokens, blocks, *x.stride(),
        CHANNELS=channels, COLUMNS=columns, BLOCK=block_size, POOL=mean is not None,
        num_warps=4,
    )  # fmt: skip
    return copy


@triton.jit
def _gather_kernel(
    x_ptr, order_ptr, length_ptr, copy_ptr, mean_ptr, variance_ptr,
    heads, tokens, blocks, stride_batch, stride_head, stride_token, stride_channel,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    head_entry = tl.program_id(1).to(tl.int64)
    entry = head_entry // heads
    length = tl.load(length_ptr + entry)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    source = tl.load(order_ptr + head_entry * tokens + rows, mask=rows < tokens, other=0)
    offsets = source[:, None] * stride_token + columns[None, :].to(tl.int64) * stride_channel
    start = entry * stride_batch + (head_entry % heads) * stride_head
    present = (rows < length)[:, None] & (columns < CHANNELS)[None, :]
    members = tl.load(x_ptr + start + offsets, mask=present, other=0.0)
    targets = (head_entry * tokens + rows)[:, None] * CHANNELS + columns[None, :]
    tl.store(copy_ptr + targets, members, mask=(rows < tokens)[:, None] & (columns < CHANNELS)[None, :])
    if POOL:
        members = members.to(tl.float32)
        size = tl.minimum(tl.maximum(length - block * BLOCK, 1), BLOCK).to(tl.float32)
        mean = tl.sum(members, axis=0) / size
        centred = tl.where(present, members - mean[None, :], 0.0)
        variance = tl.sum(centred * centred, axis=0) / size
        place = (head_entry * blocks + block) * CHANNELS + columns
        tl.store(mean_ptr + place, mean, mask=columns < CHANNELS)
        tl.store(variance_ptr + place, variance, mask=columns < CHANNELS)
