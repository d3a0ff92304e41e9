"""XAttention's score on the GPU: the twin of `scores.antidiagonal.compare`.

Runs of queries and of keys are tokens of stride * D channels: a product of the library makes their logits, in slabs
that stay in the L2 cache, and the second launch of `triton_mass` turns those into sums of shares.
"""

import math
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor

from baatt.kernels.triton_mass import WIDTH, _share_kernel
from baatt.types import ScoreOptions, Sight

SLAB_LOGITS = 2**24  # 64 MiB


def compare(
    queries: Any, keys: Any, options: ScoreOptions, scale: float, sight: Sight | None = None, *, stride: int
) -> Tensor:
    """See `scores.antidiagonal.compare`; [B, H, i, J] float32.

    Args:
        queries, keys: `BlockTokens` of one dtype.
        stride: divides options.block_size, a power of two.
    """
    (batch, heads, query_blocks), (groups, key_blocks) = queries.tokens.shape[:3], keys.tokens.shape[1:3]
    runs = options.block_size // stride
    rows = rearrange(queries.tokens, "b h i (r s) d -> b h i r s d", s=stride)
    columns = rearrange(keys.tokens, "b g j (c s) d -> b g (j c) (s d)", s=stride)
    # Rows without a query count as in the eager function: all runs of keys have the same share of them.
    query_size = torch.full((batch, query_blocks), runs, dtype=torch.int64, device=rows.device)
    key_size = (keys.size + stride - 1) // stride
    limit = None
    if sight is not None:
        limit = (reduce(sight.limit, "b i (r s) -> b i r", "max", s=stride) + stride - 1) // stride
    scores = torch.empty(batch, heads, query_blocks, key_blocks, dtype=torch.float32, device=rows.device)
    blocks = max(1, min(query_blocks, SLAB_LOGITS // (columns.shape[2] * runs)))
    for entry in range(batch):
        for head in range(heads):
            own = columns[entry, head // (heads // groups)]
            for first in range(0, query_blocks, blocks):
                some = rows[entry, head, first : first + blocks].flip(2)
                logits = _product(own, rearrange(some, "i r s d -> (s d) (i r)")) * (scale / stride * math.log2(math.e))
                _share_kernel[(some.shape[0],)](
                    logits, query_size[entry], key_size[entry], None if limit is None else limit[entry],
                    scores[entry, head], 1, query_blocks, key_blocks, columns.shape[2], first, some.shape[0],
                    logits.shape[1], BLOCK=runs, RUN=1, WIDTH=max(WIDTH, runs), PEAK=False, num_warps=4,
                )  # fmt: skip
    return scores.mul_(runs)  # means of the rows, the score is their sum


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32: sums that were rounded to half precision would move the shares by per cents."""
    if a.is_cuda and a.dtype != torch.float32 and "dtype" in torch.ops.aten.mm.overloads():  # from PyTorch 2.8 on
        return torch.mm(a, b, out_dtype=torch.float32)  # type: ignore[call-overload,no-any-return]
    return a.float() @ b.float()
