"""Block moments (E3): mean and per-channel variance of every run of P sorted tokens.

In: x [B, H, N, D] and its `TokenOrder`. Out: `BlockStats`. The variance takes a second pass over the centred tokens,
because E[x^2] - E[x]^2 loses all digits where the mean is large. Masked tokens count for nothing, even if NaN.
"""

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from baatt.types import BlockStats, BlockTokens, TokenOrder


def pool_blocks(x: Tensor, order: TokenOrder, block_size: int) -> BlockStats:
    """Mean and population variance of each block of sorted tokens (E3).

    Args:
        x: [B, H, N, D] in the original token order.
        order: of x; its first `length` tokens are pooled.
        block_size: P, tokens per block. The last block of an entry may hold fewer.

    Returns:
        BlockStats with mean and variance [B, H, L, D] in float32 (float64 for float64), size [B, L]; L = ceil(N / P).
    """
    members, size = gather_blocks(x, order, block_size)
    present = torch.arange(block_size, device=x.device) < rearrange(size, "b l -> b l 1")
    divisor = rearrange(size.clamp(min=1), "b l -> b 1 l 1")
    mean = members.sum(dim=-2) / divisor
    centred = members - rearrange(mean, "b h l d -> b h l 1 d")
    variance = torch.where(rearrange(present, "b l p -> b 1 l p 1"), centred, 0).square().sum(dim=-2) / divisor
    return BlockStats(mean, variance, size)


def gather_blocks(x: Tensor, order: TokenOrder, block_size: int, dtype: torch.dtype | None = None) -> BlockTokens:
    """The sorted tokens cut into blocks.

    Args:
        x: [B, H, N, D] in the original token order.
        order: of x; tokens from its `length` on are masked.
        block_size: P.
        dtype: of the result; None = float32 (float64 for float64).

    Returns:
        BlockTokens with tokens [B, H, L, P, D] and size [B, L].
    """
    tokens, channels = x.shape[2], x.shape[3]
    blocks = -(-tokens // block_size)
    sorted_x = x.gather(2, repeat(order.index, "b h n -> b h n d", d=channels))
    sorted_x = sorted_x.to(torch.promote_types(x.dtype, torch.float32) if dtype is None else dtype)
    sorted_x = torch.nn.functional.pad(sorted_x, (0, 0, 0, blocks * block_size - tokens))
    present = torch.arange(blocks * block_size, device=x.device) < rearrange(order.length, "b -> b 1")
    # where, not a product: 0 * NaN would let a masked token in.
    sorted_x = torch.where(rearrange(present, "b n -> b 1 n 1"), sorted_x, 0)
    size = reduce(present.long(), "b (l p) -> b l", "sum", p=block_size)
    return BlockTokens(rearrange(sorted_x, "b h (l p) d -> b h l p d", p=block_size), size)
