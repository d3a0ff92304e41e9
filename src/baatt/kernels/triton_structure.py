"""What every query may see, on the GPU: the twin of `stages.structure` for calls without masks.

One launch instead of a dozen, which take longer than the work. Without masks what a query sees never shrinks from one
to the next, so that the ends of a block speak for all of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from baatt.kernels.launching import SIZES, cdiv
from baatt.kernels.triton_attention import head_and_place
from baatt.types import Sight


def look_back(q: Tensor, k: Tensor, causal: int, query_start: int, block_size: int) -> Sight:
    """See `stages.structure.look_back`."""
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    blocks = cdiv(queries, block_size)
    limit = torch.empty(batch, blocks, block_size, dtype=torch.int32, device=q.device)
    spans = torch.empty(batch, blocks, 4, dtype=torch.int32, device=q.device)
    _sight_kernel[(blocks * batch,)](limit, spans, causal, query_start, queries, keys, BLOCK=block_size, num_warps=1)
    return Sight(limit, spans)


@triton.jit(do_not_specialize=SIZES)
def _sight_kernel(limit_ptr, spans_ptr, causal, query_start, queries, keys, BLOCK: tl.constexpr):
    blocks = tl.cdiv(queries, BLOCK)
    entry, block = head_and_place(blocks)
    target = entry * blocks + block
    rows = block * BLOCK + tl.arange(0, BLOCK)
    limits = _limit(rows, causal, query_start, keys)
    tl.store(limit_ptr + target * BLOCK + tl.arange(0, BLOCK), tl.where(rows < queries, limits, 0).to(tl.int32))
    first = block * BLOCK
    last = tl.minimum(first + BLOCK, queries) - 1
    fewest, most = _limit(first, causal, query_start, keys), _limit(last, causal, query_start, keys)
    spans_ptr += target * 4
    tl.store(spans_ptr, (tl.minimum(query_start + first, fewest - 1) // BLOCK).to(tl.int32))
    tl.store(spans_ptr + 1, (tl.minimum(query_start + last, most - 1) // BLOCK).to(tl.int32))
    tl.store(spans_ptr + 2, (fewest // BLOCK).to(tl.int32))
    tl.store(spans_ptr + 3, tl.cdiv(most, BLOCK).to(tl.int32))


@triton.jit
def _limit(row, causal, query_start, keys):
    """How many keys a query sees."""
    place = row.to(tl.int64) + query_start
    return tl.minimum((place // causal + 1) * causal, keys)
