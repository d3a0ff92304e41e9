"""Block-sparse attention for Hopper GPUs (sm_90) in Gluon: the twin of `stages.sparse` for bf16 and fp16, D 64 and 128.

A persistent grid walks over tiles of 128 sorted query rows. One producer warp brings K and V blocks in by TMA, which
follows the strides of k and v; two consumer warpgroups of 64 rows each gather their queries and multiply, and the
product with the next key block runs while the softmax weights of this one meet V. Lists are walked from the back, so
that the one ragged key block, or the one on the diagonal, comes first and the steady loop needs no mask. Gluon is
experimental: `refusal` compiles a kernel once and reports whatever goes wrong.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from baatt.kernels.hopper_kernel import attention_kernel, gl, ring_stages
from baatt.kernels.launching import cdiv
from baatt.kernels.triton_arrangement import moved, sorted_copies
from baatt.kernels.triton_budget import longest_first
from baatt.types import BlockSelection, Partial, Sight, TokenOrder

BLOCK = 128
#: Tiles that are sorted together where their lists differ in length: of few heads, whose keys fit in the L2 cache, and
#: enough that two of a causal head, a long one and a short one, are about one share of a multiprocessor.
WINDOW = 256
#: Blocks that a multiprocessor walks through before all of them start together again.
IN_STEP = 800
CHANNELS = (64, 128)
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def refusal(device: torch.device, workload: Any | None) -> str | None:
    """Why the kernel cannot run this on `device`, or None."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] != 9:
        return "it needs a GPU of compute capability 9.0"
    if workload is not None:
        if workload.dtype not in DTYPES:
            return f"dtype must be bfloat16 or float16, got {workload.dtype}"
        if workload.channels not in CHANNELS:
            return f"head dim must be 64 or 128, got {workload.channels}"
        if workload.block_size != BLOCK:
            return f"block_size must be {BLOCK}, got {workload.block_size}"
        if not workload.scale > 0:
            return f"scale must be positive, got {workload.scale}"
    return _broken(torch.device(device.type, device.index or 0))


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
    sorted_k: Tensor | None = None,
    sorted_v: Tensor | None = None,
    sight: Sight | None = None,
) -> Partial:
    """Attend from every query block to its kept key blocks (E8); see `stages.sparse.sparse_attention`.

    block_size: 128; scale: positive; sorted_k, sorted_v: k and v in sorted order where they exist; selection: ascending
    lists without empty key blocks, or such as no query sees. What TMA cannot read is copied first: channels that are
    not side by side, rows that do not begin at multiples of 16 bytes, and heads or entries that share their memory.
    """
    if block_size != BLOCK:
        raise ValueError(f"block_size must be {BLOCK}, got {block_size}")
    k, v = map(_readable, sorted_copies(k, v, key_order, sorted_k, sorted_v))
    batch, heads, tokens, channels = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q = q if q.stride(-1) == 1 else q.contiguous()
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    query_blocks = -(-tokens // BLOCK)
    tiles, dtype = batch * heads * query_blocks, DTYPES[q.dtype]
    descriptors = [tile_descriptor(x, dtype) for x in (k, v)]
    index = selection.index.contiguous()
    properties = torch.cuda.get_device_properties(q.device)
    chunk, uneven = tiles, None
    if selection.uneven:
        uneven = longest_first(selection.count, together=cdiv(WINDOW, query_blocks))
    else:
        chunk = _tiles_per_launch(tiles, index.shape[-1], 2 * k[0, 0].nbytes, properties)
    limits = (None, None) if sight is None else (sight.limit.contiguous(), sight.spans.contiguous())
    for first_tile in range(0, tiles, chunk):
        last_tile = min(first_tile + chunk, tiles)
        attention_kernel[(min(last_tile - first_tile, properties.multi_processor_count),)](
            q, *q.stride()[:3], *descriptors,
            index, selection.count.contiguous(), uneven, moved(query_order), key_order.length.contiguous(), *limits,
            out, lse, first_tile, last_tile, query_blocks, index.shape[-1], heads, k.shape[1], tokens,
            scale * math.log2(math.e), BLOCK=BLOCK, CHANNELS=channels, STAGES=ring_stages(channels), DTYPE=dtype,
            num_warps=4,
        )  # fmt: skip
    return Partial(out, lse)


def _readable(x: Tensor) -> Tensor:
    """x [B, G, M, D], or a contiguous copy where its memory does not suit TMA."""
    strides = [stride * x.element_size() for stride, length in zip(x.stride(), x.shape, strict=True) if length > 1]
    suits = strides[-1] == x.element_size() and all(stride and stride % 16 == 0 for stride in strides[:-1])
    return x if suits and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def tile_descriptor(x: Tensor, dtype: Any) -> Any:
    """TMA descriptor of tiles [1, 1, BLOCK, D] of x [B, G, M, D]; what lies beyond the last token reads as 0."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    tile = [1, 1, BLOCK, x.shape[3]]
    layout = gl.NVMMASharedLayout.get_default_for(tile, dtype)
    # An axis of length 1 may have any stride; TMA wants a valid one of it too.
    strides = [stride if length > 1 else x.shape[3] for stride, length in zip(x.stride(), x.shape, strict=True)]
    return TensorDescriptor(x, list(x.shape), strides, tile, layout)


def _tiles_per_launch(tiles: int, kept: int, bytes_per_head: int, properties: Any) -> int:
    """All of them, unless K and V of one head are more than half of the L2 cache.

    Ascending lists make all multiprocessors sweep over the same keys at the same time, so that a block comes from
    memory once for all of them, as long as they keep in step. A new launch puts them back in step.

    Where lists differ in length no launch puts anyone back in step for long: one for all of them is 3 % faster there.
    """
    fits = 2 * bytes_per_head <= properties.L2_cache_size
    return tiles if fits else properties.multi_processor_count * max(1, round(IN_STEP / kept))


@functools.cache
def _broken(device: torch.device) -> str | None:
    """Runs the kernel once on a small input: None if it works, else what went wrong."""
    try:
        x = torch.ones(1, 1, BLOCK, 64, dtype=torch.bfloat16, device=device)
        order = TokenOrder(torch.arange(BLOCK, device=device)[None, None], torch.tensor([BLOCK], device=device))
        first = torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=device)
        kept = BlockSelection(first, first + 1)
        partial = sparse_attention(x, x, x, order, order, kept, block_size=BLOCK, scale=1.0, sorted_k=x, sorted_v=x)
        right = bool((partial.out == 1).all())
    except Exception as error:  # whatever another Triton version raises is the reason
        return f"the Gluon kernel does not work with this Triton: {type(error).__name__}: {error}"
    return None if right else "the Gluon kernel gives a wrong result on this machine"
