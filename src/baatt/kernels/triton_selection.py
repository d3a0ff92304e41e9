"""Scores and selection on the GPU: the product of block features, and the twin of `stages.selection`.

Scores exist for a slab of query blocks at a time, so memory is the result's [I, K] and a bounded slab of [I, J], never
all of it. A kept list comes out ascending because it is cut from its row by a threshold and not sorted. Nothing waits
for the device, and neither rounding nor ties depend on the batch.
"""

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from einops import repeat
from torch import Tensor

from baatt.types import BlockSelection, BlockStats

SLAB_SCORES = 64 * 2**20  # 256 MiB in fp32
# Three products of tf32 parts: 21 bits of mantissa, on the matrix units. ROCm has no such product, but fp32 ones.
_PRECISION = "tf32x3" if torch.version.hip is None else "ieee"


def choose_blocks(
    query_stats: BlockStats, key_stats: BlockStats, score: Callable[..., Tensor], sparsity: float
) -> BlockSelection:
    """Score every block pair and keep the K best of every row (E5, E7), ties to the lower id.

    Args:
        query_stats: of [B, H, I] blocks.
        key_stats: of [B, G, J] blocks.
        score: (query_stats, key_stats, *, product) -> [B, H, I, J].
        sparsity: share of key blocks skipped.

    Returns:
        BlockSelection as `stages.selection.select_blocks`.
    """
    batch, heads, query_blocks, _ = query_stats.mean.shape
    key_blocks = key_stats.mean.shape[2]
    capacity = max(1, math.ceil((1 - sparsity) * key_blocks))
    available = (key_stats.size > 0).sum(-1)
    count = ((1 - sparsity) * available.double()).ceil().long().clamp(min=1).minimum(available).int()
    index = torch.empty(batch, heads, query_blocks, capacity, dtype=torch.int32, device=count.device)
    rows = max(1, min(query_blocks, SLAB_SCORES // (batch * heads * key_blocks)))
    for start in range(0, query_blocks, rows):
        slab = slice(start, start + rows)
        part = BlockStats(query_stats.mean[:, :, slab], query_stats.variance[:, :, slab], query_stats.size)
        _select(score(part, key_stats, product=product), count, index, start)
    return BlockSelection(index, repeat(count, "b -> b h i", h=heads, i=query_blocks).contiguous())


def product(query_features: Tensor, key_features: Tensor) -> Tensor:
    """[B, H, I, F] times [B, G, J, F] -> [B, H, I, J] in fp32; twin of `stages.scoring.feature_product`."""
    batch, heads, query_blocks, features = query_features.shape
    groups, key_blocks = key_features.shape[1:3]
    query_features, key_features = query_features.contiguous(), key_features.contiguous()
    scores = torch.empty(batch, heads, query_blocks, key_blocks, dtype=torch.float32, device=query_features.device)
    tile = 64
    grid = (triton.cdiv(query_blocks, tile) * triton.cdiv(key_blocks, tile), batch * heads)
    _product_kernel[grid](
        query_features, key_features, scores, heads, groups, query_blocks, key_blocks,
        FEATURES=features, TILE=tile, DEPTH=32, PRECISION=_PRECISION, num_warps=4,
    )  # fmt: skip
    return scores


def _select(scores: Tensor, count: Tensor, index: Tensor, start: int) -> None:
    """Fill rows `start` and following of `index` from scores [B, H, i, J]."""
    batch, heads, rows, key_blocks = scores.shape
    width = max(16, triton.next_power_of_2(key_blocks))
    _select_kernel[(rows, batch * heads)](
        scores, count, index, heads, rows, key_blocks, index.shape[2], index.shape[3], start,
        WIDTH=width, num_warps=min(16, max(1, width // 1024)),
    )  # fmt: skip


@triton.jit
def _product_kernel(
    query_ptr, key_ptr, scores_ptr, heads, groups, query_blocks, key_blocks,
    FEATURES: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(key_blocks, TILE)
    head_entry = tl.program_id(1).to(tl.int64)
    key_entry = (head_entry // heads) * groups + (head_entry % heads) // (heads // groups)
    rows = (tl.program_id(0) // column_tiles) * TILE + tl.arange(0, TILE)
    columns = (tl.program_id(0) % column_tiles) * TILE + tl.arange(0, TILE)
    depth = tl.arange(0, DEPTH)
    query_offsets = (head_entry * query_blocks + rows)[:, None] * FEATURES + depth[None, :]
    key_offsets = (key_entry * key_blocks + columns)[None, :] * FEATURES + depth[:, None]
    accumulator = tl.zeros([TILE, TILE], tl.float32)
    for step in range(0, FEATURES, DEPTH):
        inside = step + depth < FEATURES
        left_mask = (rows < query_blocks)[:, None] & inside[None, :]
        right_mask = (columns < key_blocks)[None, :] & inside[:, None]
        left = tl.load(query_ptr + query_offsets + step, mask=left_mask, other=0.0)
        right = tl.load(key_ptr + key_offsets + step, mask=right_mask, other=0.0)
        accumulator = tl.dot(left, right, accumulator, input_precision=PRECISION)
    offsets = (head_entry * query_blocks + rows)[:, None] * key_blocks + columns[None, :]
    tl.store(scores_ptr + offsets, accumulator, mask=(rows < query_blocks)[:, None] & (columns < key_blocks)[None, :])


@triton.jit
def _ordered(scores):
    """Unsigned integers in the order of the floats, from 2 up; NaN, of either sign, is 1."""
    bits = (scores + 0.0).to(tl.uint32, bitcast=True)  # the sum turns -0 into 0
    ordered = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(scores == scores, ordered, 1)


@triton.jit
def _select_kernel(
    scores_ptr, count_ptr, index_ptr, heads, rows, key_blocks, query_blocks, capacity, start, WIDTH: tl.constexpr
):
    head_entry = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0)
    count = tl.load(count_ptr + head_entry // heads)
    columns = tl.arange(0, WIDTH)
    inside = columns < key_blocks
    scores = tl.load(scores_ptr + (head_entry * rows + row) * key_blocks + columns, mask=inside, other=float("-inf"))
    values = tl.where(inside, _ordered(scores), 0)
    # The largest threshold that at least `count` values reach, bit by bit.
    low = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        reached = tl.sum((values >= (low | bit)).to(tl.int32), axis=0) >= count
        low = tl.where(reached, low | bit, low)
        bit = bit >> 1
    above = values > low
    tied = values == low
    room = count - tl.sum(above.to(tl.int32), axis=0)
    kept = above | (tied & (tl.cumsum(tied.to(tl.int32), axis=0) <= room))
    place = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    list_ptr = index_ptr + (head_entry * query_blocks + start + row) * capacity
    tl.store(list_ptr + place, columns, mask=kept & inside)
    # What lies beyond `count` repeats the last kept block, 0 where none is.
    last = tl.max(tl.where(kept & inside, columns, 0), axis=0)
    tl.store(list_ptr + columns, tl.broadcast_to(last, (WIDTH,)), mask=(columns >= count) & (columns < capacity))
