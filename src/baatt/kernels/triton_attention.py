"""Block-sparse attention for GPUs in plain Triton (sm_80 and newer, ROCm): the twin of `stages.sparse`.

One program attends from one block of sorted query rows, or a part of it, and walks over its list of kept key blocks, a
tile of keys at a time, with the online softmax in base 2. Nothing but loads and stores through pointers, so that it
runs wherever Triton does. Queries are gathered through their order, and the last step scatters the rows back; keys and
values are read with the strides they have.
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from baatt.kernels.launching import SIZES, cdiv, next_power_of_2
from baatt.kernels.triton_arrangement import moved, sorted_copies
from baatt.types import BlockSelection, Partial, Sight, TokenOrder

MAX_CHANNELS = 256
#: Bytes of shared memory per block: of sm_86 and sm_89, the smallest; and what 256 channels want for full tiles.
SMALL_MEMORY = 99 * 1024
LARGE_MEMORY = 160 * 1024

#: Strides of tokens and channels below this many elements leave the offsets inside of a tile in 32 bits.
FAR = 2**22

LN_2 = tl.constexpr(math.log(2))
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def refusal(device: torch.device, workload: Any | None) -> str | None:
    """Why the kernel cannot run this on `device`, or None."""
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"it needs a GPU of compute capability 8.0 or newer, got {capability[0]}.{capability[1]}"
    if workload is not None:
        if workload.dtype == torch.float64:
            return "float64 is for 'reference'"
        if workload.channels > MAX_CHANNELS:
            return f"head dim must be at most {MAX_CHANNELS}, got {workload.channels}"
    return None


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

    sorted_k, sorted_v: k and v in sorted order where they exist, any strides; what lies behind the keys is not read.
    With sight, lists have to be ascending.
    """
    k, v = sorted_copies(k, v, key_order, sorted_k, sorted_v)
    k, v = (x if max(x.stride()[2:]) < FAR else x.contiguous() for x in (k, v))
    batch, heads, tokens, channels = q.shape
    groups = k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    # Triton knows of an argument whether 16 divides it, but rows may be aligned to less; and where they are is in fewer
    # registers if the way from one to the next is known when the kernel is compiled.
    strides = *k.stride()[:2], *v.stride()[:2]
    unit = math.gcd(16, *strides)
    index = selection.index.contiguous()
    options = launch_options(q.dtype, channels, block_size, _shared_memory(q.device))
    limit, spans = (None, None) if sight is None else (x.contiguous() for x in sight)
    _attention_kernel[(cdiv(tokens, options["ROWS"]) * batch * heads,)](
        q, *q.stride(), k, *(stride // unit for stride in strides[:2]), k.stride(3),
        v, *(stride // unit for stride in strides[2:]), v.stride(3),
        index, selection.count.contiguous(), moved(query_order), key_order.length.contiguous(), limit, spans, out, lse,
        heads, heads // groups, tokens, index.shape[-1], scale * math.log2(math.e),
        UNIT=unit, K_STRIDE=k.stride(2), V_STRIDE=v.stride(2), CHANNELS=channels, BLOCK=block_size, **options,
    )  # fmt: skip
    return Partial(out, lse)


def launch_options(dtype: torch.dtype, channels: int, block_size: int, shared_memory: int) -> dict[str, Any]:
    """Tile sizes, warps and pipeline stages: what fits into registers and `shared_memory` bytes per block.

    Every GPU from sm_80 on has `SMALL_MEMORY`, and what is chosen for less than `LARGE_MEMORY` fits into it.
    """
    columns = max(16, next_power_of_2(channels))
    wide = columns > 128
    if dtype == torch.float32:
        rows, tile, depth, stages = (32 if wide else 64), 32, min(columns, 64), (1 if wide else 2)
    elif wide and shared_memory < LARGE_MEMORY:
        rows, tile, depth, stages = 64, 32, columns, 2
    else:
        rows, tile, depth, stages = 128, 64, columns, (2 if wide or shared_memory < SMALL_MEMORY else 3)
    return {
        "COLUMNS": columns,
        "DEPTH": depth,
        "ROWS": min(rows, block_size),
        "TILE": min(tile, block_size),
        "PRECISION": "ieee" if dtype == torch.float32 else None,
        "num_warps": 8 if wide else 4,
        "num_stages": stages,
    }


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a block of threads may have."""
    if device.type != "cuda":
        return SMALL_MEMORY
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin or properties.shared_memory_per_block)


@triton.jit
def head_and_place(places):
    """A program's row of [B * H], and its place among so many of the row: only the first axis of a grid is long."""
    program = tl.program_id(0)
    return (program // places).to(tl.int64), program % places


@triton.jit(do_not_specialize=SIZES)
def _attention_kernel(
    q_ptr, stride_batch, stride_head, stride_token, stride_channel,
    k_ptr, k_step_batch, k_step_head, k_stride_channel, v_ptr, v_step_batch, v_step_head, v_stride_channel,
    index_ptr, count_ptr, order_ptr, length_ptr, limit_ptr, spans_ptr, out_ptr, lse_ptr,
    heads, repeats, tokens, slots, scale,
    UNIT: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    places = tl.cdiv(tokens, ROWS)
    head_entry, place = head_and_place(places)
    if limit_ptr is not None:
        place = places - 1 - place  # the longest lists first
    list_start = head_entry * tl.cdiv(tokens, BLOCK) + place // (BLOCK // ROWS)
    count = tl.load(count_ptr + list_start)
    entry, head = head_entry // heads, head_entry % heads
    length = tl.load(length_ptr + entry)
    rows = place * ROWS + tl.arange(0, ROWS)
    order = rows.to(tl.int64)
    if order_ptr is not None:
        order = tl.load(order_ptr + head_entry * tokens + rows, mask=rows < tokens, other=0)
    q_ptr += entry * stride_batch + head * stride_head
    query_ptrs = q_ptr + order * stride_token
    k_ptr += (entry * k_step_batch + head // repeats * k_step_head) * UNIT
    v_ptr += (entry * v_step_batch + head // repeats * v_step_head) * UNIT
    queries = _gather_rows(query_ptrs, rows < tokens, 0, stride_channel, CHANNELS, DEPTH)

    # The lowest finite number and not -inf: a row whose scores are all -inf then gets weights 0, not exp2(inf - inf).
    running_max = tl.full([ROWS], LOWEST, tl.float32)
    running_sum = tl.zeros([ROWS], tl.float32)
    accumulator = tl.zeros([ROWS, COLUMNS], tl.float32)
    list_ptr = index_ptr + list_start * slots
    steps = count * (BLOCK // TILE)
    plain = steps
    if limit_ptr is not None:
        limits = tl.load(limit_ptr + entry * tl.cdiv(tokens, BLOCK) * BLOCK + rows)
        whole = tl.load(spans_ptr + (entry * tl.cdiv(tokens, BLOCK) + place // (BLOCK // ROWS)) * 4 + 2)
        while (count > 0) & (tl.load(list_ptr + tl.maximum(count - 1, 0)) >= whole):
            count -= 1
        plain = count * (BLOCK // TILE)
    # Blocks that all rows see wholly, and then, where there is a limit, the last ones, of which some rows do not.
    for masked in tl.static_range(1 if limit_ptr is None else 2):
        for step in range(plain if masked else 0, steps if masked else plain):
            first_key = _first_key(list_ptr, step, BLOCK, TILE)
            key_tile = _load_rows(k_ptr, first_key, length, 0, k_stride_channel, K_STRIDE, TILE, CHANNELS, DEPTH)
            value_tile = _load_rows(v_ptr, first_key, length, 0, v_stride_channel, V_STRIDE, TILE, CHANNELS, COLUMNS)
            scores = tl.dot(queries, tl.trans(key_tile), input_precision=PRECISION) * scale
            # Sums of DEPTH products and then their sum: one sum over all channels would round once per channel. An fma
            # and no addition, for the compiler would take an addition into the product again.
            for first_column in tl.static_range(DEPTH, COLUMNS, DEPTH):
                more_queries = _gather_rows(query_ptrs, rows < tokens, first_column, stride_channel, CHANNELS, DEPTH)
                more_keys = _load_rows(
                    k_ptr, first_key, length, first_column, k_stride_channel, K_STRIDE, TILE, CHANNELS, DEPTH
                )
                product = tl.dot(more_queries, tl.trans(more_keys), input_precision=PRECISION)
                scores = tl.fma(product, tl.full(product.shape, 1.0, tl.float32) * scale, scores)
            if masked:
                visible = tl.arange(0, TILE)[None, :] < (limits - first_key.to(tl.int32))[:, None]
            else:
                visible = (tl.arange(0, TILE) < length - first_key)[None, :]
            scores = tl.where(visible, scores, float("-inf"))
            new_max = tl.maximum(running_max, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_max[:, None])
            shrink = tl.exp2(running_max - new_max)
            running_max = new_max
            running_sum = running_sum * shrink + tl.sum(weights, axis=1)
            if PRECISION is None:
                accumulator = tl.dot(weights.to(value_tile.dtype), value_tile, accumulator * shrink[:, None])
            else:  # float32, added one by one: the sum of a tile by itself, or its error grows with all keys
                product = tl.dot(weights, value_tile, input_precision=PRECISION)
                accumulator = tl.fma(accumulator, shrink[:, None], product)  # a plain sum becomes one product again

    if limit_ptr is not None:  # rows that are not wanted went along
        running_sum = tl.where(limits > 0, running_sum, 0.0)
        accumulator = tl.where((limits > 0)[:, None], accumulator, 0.0)
    divisor = tl.where(running_sum == 0, 1.0, running_sum)
    lse = tl.where(running_sum == 0, float("-inf"), (running_max + tl.log2(divisor)) * LN_2)
    targets = head_entry * tokens + order
    columns = tl.arange(0, COLUMNS)
    inside = (rows < tokens)[:, None] & (columns < CHANNELS)[None, :]
    out = (accumulator / divisor[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + targets[:, None] * CHANNELS + columns[None, :], out, mask=inside)
    tl.store(lse_ptr + targets, lse, mask=rows < tokens)


@triton.jit
def _first_key(list_ptr, step, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Sorted position of the first key of the tile at `step`."""
    kept = tl.load(list_ptr + step // (BLOCK // TILE)).to(tl.int64)
    return kept * BLOCK + (step % (BLOCK // TILE)) * TILE


@triton.jit
def _load_rows(
    x_ptr, first, length, first_column, stride_channel,
    STRIDE: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Part [TILE, COLUMNS] of x from `first` and `first_column` on, 0 from row `length` and column CHANNELS on."""
    rows, columns = tl.arange(0, TILE), first_column + tl.arange(0, COLUMNS)
    inside = (rows < length - first)[:, None] & (columns < CHANNELS)[None, :]
    offsets = rows[:, None] * STRIDE + columns[None, :] * stride_channel
    return tl.load(x_ptr + first * STRIDE + offsets, mask=inside, other=0.0)


@triton.jit
def _gather_rows(
    row_ptrs, present, first_column, stride_channel, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Columns from `first_column` on of rows that start at `row_ptrs`, 0 where not `present` and from CHANNELS on."""
    columns = first_column + tl.arange(0, COLUMNS)
    inside = present[:, None] & (columns < CHANNELS)[None, :]
    return tl.load(row_ptrs[:, None] + columns[None, :].to(tl.int64) * stride_channel, mask=inside, other=0.0)
