"""XAttention's score on the GPU: the twin of `scores.antidiagonal.compare`.

Runs of queries and of keys are tokens of stride * D channels: a product of the library makes their logits, in slabs of
heads and query blocks, and the second launch of `triton_mass` turns those into sums of shares, a program for a query
block of a head.
"""

import math
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor

from baatt.kernels.launching import next_power_of_2
from baatt.kernels.triton_mass import WIDTH, _share_kernel
from baatt.types import ScoreOptions, Sight

#: Enough for two programs a multiprocessor at 128K tokens; 256 MiB.
SLAB_LOGITS = 2**26
#: Logits that a program has at a time. It waits for each such part, and there are as many as runs of keys.
PART = 8192


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
    group = torch.arange(heads, device=rows.device) // (heads // groups)
    width = max(WIDTH, runs, min(PART // runs, next_power_of_2(columns.shape[2])))
    blocks = max(1, min(query_blocks, SLAB_LOGITS // (columns.shape[2] * runs)))
    some_heads = max(1, SLAB_LOGITS // (blocks * columns.shape[2] * runs))
    for entry in range(batch):
        for head in range(0, heads, some_heads):
            own = columns[entry, group[head : head + some_heads]]
            for first in range(0, query_blocks, blocks):
                some = rows[entry, head : head + some_heads, first : first + blocks].flip(3)
                logits = _product(
                    own, rearrange(some, "h i r s d -> h (s d) (i r)"), scale / stride * math.log2(math.e)
                )
                _share_kernel[(some.shape[0] * some.shape[1],)](
                    logits, query_size[entry], key_size[entry], None if limit is None else limit[entry],
                    scores[entry, head], some.shape[0], query_blocks, key_blocks, columns.shape[2], first,
                    some.shape[1], logits.shape[2], BLOCK=runs, RUN=1, WIDTH=width, PEAK=False, num_warps=8,
                )  # fmt: skip
    return scores.mul_(runs)  # means of the rows, the score is their sum


def _product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """factor * a @ b in float32: sums that were rounded to half precision would move the shares by per cents."""
    if a.is_cuda and a.dtype != torch.float32 and "dtype" in torch.ops.aten.bmm.overloads():  # from PyTorch 2.8 on
        return torch.bmm(a, b, out_dtype=torch.float32).mul_(factor)  # type: ignore[call-overload,no-any-return]
    return (a.float() @ b.float()).mul_(factor)
