"""Scores and selection on the GPU: twins of `scores.covariance`, of means, and of `stages.selection`.

Scores exist for a slab of query blocks at a time, so memory is the result's [I, K] and a bounded slab of [I, J], never
all of it. A kept list comes out ascending because it is cut from its row by a threshold and not sorted. Nothing waits
for the device, and neither rounding nor ties depend on the batch.
"""

import struct
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from baatt.kernels.launching import SIZES, cdiv, next_power_of_2
from baatt.kernels.triton_attention import head_and_place
from baatt.types import (
    BlockSelection,
    BlockStats,
    BlockSummary,
    ScoreOptions,
    Sight,
    kept_blocks,
    take_blocks,
)

SLAB_SCORES = 64 * 2**20  # 256 MiB in fp32
TILE = 64
# Three products of tf32 parts: 21 bits of mantissa, on the matrix units. ROCm has no such product, but fp32 ones.
_PRECISION = "tf32x3" if torch.version.hip is None else "ieee"
FEW = 64  # programs, when smaller tiles for more of them are faster


def choose_blocks(
    query_summary: BlockSummary,
    key_summary: BlockSummary,
    score: Callable[[BlockSummary, BlockSummary, Sight | None], Tensor],
    sparsity: float,
    keep_first: int = 0,
    sight: Sight | None = None,
) -> BlockSelection:
    """Score every block pair and keep the K best of every row (E7), ties to the lower id.

    Args:
        query_summary: of [B, H, I] blocks.
        key_summary: of [B, G, J] blocks.
        score: (query_summary, key_summary, sight) -> [B, H, i, J], called with slabs of query blocks.
        sparsity: share of key blocks skipped.
        keep_first: key blocks from the front that are kept whatever their score.
        sight: of all query blocks; scores of key blocks that a row does not see are not read.

    Returns:
        BlockSelection as `stages.selection.select_blocks`.
    """
    size = key_summary.size
    (batch, heads, query_blocks), key_blocks = query_summary[0].shape[:3], size.shape[1]
    usual = kept_blocks(sparsity, key_blocks)
    capacity = usual if sight is None else min(key_blocks, max(usual, 2))
    spans = None if sight is None else sight.spans.contiguous()
    index = torch.empty(batch, heads, query_blocks, capacity, dtype=torch.int32, device=size.device)
    count = torch.empty(index.shape[:3], dtype=torch.int32, device=index.device)
    selection = BlockSelection(index, count, uneven=sight is not None)
    rows = max(1, min(query_blocks, SLAB_SCORES // (batch * heads * key_blocks)))
    for start in range(0, query_blocks, rows):
        slab = slice(start, start + rows)
        scores = score(take_blocks(query_summary, slab), key_summary, sight and sight.take(slab))
        _select(scores.float().contiguous(), size, sparsity, selection, start, keep_first, spans)
    return selection


def compare(
    queries: BlockStats, keys: BlockStats, options: ScoreOptions, scale: float, sight: Sight | None = None
) -> Tensor:
    """See `scores.covariance.compare`."""
    return covariance_score(queries, keys, scale=scale, beta=options.beta)


def compare_means(
    queries: BlockStats, keys: BlockStats, options: ScoreOptions, scale: float, sight: Sight | None = None
) -> Tensor:
    """See `scores.simple.compare_means`."""
    return covariance_score(queries, keys, scale=scale, beta=0)


def covariance_score(queries: BlockStats, keys: BlockStats, *, scale: float, beta: float) -> Tensor:
    """E4 and E5 in one kernel that makes the features as it multiplies; see `scores.covariance.covariance_score`."""
    query_mean, query_variance = queries.mean, queries.variance
    key_mean, key_variance = (x.contiguous() for x in (keys.mean, keys.variance))
    if query_mean.stride() != query_variance.stride() or query_mean.stride(-1) != 1:
        query_mean, query_variance = query_mean.contiguous(), query_variance.contiguous()
    batch, heads, query_blocks, channels = query_mean.shape
    groups, key_blocks = key_mean.shape[1:3]
    scores = torch.empty(batch, heads, query_blocks, key_blocks, dtype=torch.float32, device=query_mean.device)
    tile = TILE if cdiv(query_blocks, TILE) * cdiv(key_blocks, TILE) * batch * heads > FEW else 16
    grid = (cdiv(query_blocks, tile) * cdiv(key_blocks, tile) * batch * heads,)
    _covariance_kernel[grid](
        query_mean, query_variance, key_mean, key_variance, keys.size.contiguous(), scores,
        *query_mean.stride()[:3], heads, groups, query_blocks, key_blocks, scale, beta * scale * scale,
        CHANNELS=channels, TILE=tile, DEPTH=32, COMPENSATE=beta != 0, PRECISION=_PRECISION, num_warps=4,
    )  # fmt: skip
    return scores


def double_bits(number: float) -> int:
    """For kernels: a float argument would be rounded to fp32."""
    bits: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return bits


def _select(
    scores: Tensor,
    key_size: Tensor,
    sparsity: float,
    selection: BlockSelection,
    start: int,
    keep_first: int = 0,
    spans: Tensor | None = None,
) -> None:
    """Fill rows `start` and following of `selection` from scores [B, H, i, J]."""
    batch, heads, rows, key_blocks = scores.shape
    width = max(16, next_power_of_2(key_blocks))
    _select_kernel[(rows * batch * heads,)](
        scores, key_size, spans, selection.count, selection.index, heads, rows, key_blocks,
        selection.index.shape[2], selection.index.shape[3], start, double_bits(1 - sparsity), keep_first,
        WIDTH=width, num_warps=min(16, max(1, width // 1024)),
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _covariance_kernel(
    query_mean_ptr, query_variance_ptr, key_mean_ptr, key_variance_ptr, size_ptr, scores_ptr,
    stride_batch, stride_head, stride_block, heads, groups, query_blocks, key_blocks, scale, weight,
    CHANNELS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, COMPENSATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(key_blocks, TILE)
    head_entry, place = head_and_place(tl.cdiv(query_blocks, TILE) * column_tiles)
    entry = head_entry // heads
    key_entry = entry * groups + (head_entry % heads) // (heads // groups)
    rows = place // column_tiles * TILE + tl.arange(0, TILE)
    columns = place % column_tiles * TILE + tl.arange(0, TILE)
    depth = tl.arange(0, DEPTH)
    start = entry * stride_batch + (head_entry % heads) * stride_head
    query_offsets = start + rows[:, None] * stride_block + depth[None, :]
    key_offsets = (key_entry * key_blocks + columns)[None, :] * CHANNELS + depth[:, None]
    accumulator = tl.zeros([TILE, TILE], tl.float32)
    for step in range(0, CHANNELS, DEPTH):
        inside = step + depth < CHANNELS
        query_mask = (rows < query_blocks)[:, None] & inside[None, :]
        key_mask = (columns < key_blocks)[None, :] & inside[:, None]
        query_mean = tl.load(query_mean_ptr + query_offsets + step, mask=query_mask, other=0.0)
        key_mean = tl.load(key_mean_ptr + key_offsets + step, mask=key_mask, other=0.0)
        accumulator = tl.dot(scale * query_mean, key_mean, accumulator, input_precision=PRECISION)
        if COMPENSATE:
            query_variance = tl.load(query_variance_ptr + query_offsets + step, mask=query_mask, other=0.0)
            key_variance = tl.load(key_variance_ptr + key_offsets + step, mask=key_mask, other=0.0)
            key_square = key_mean * key_mean + key_variance
            accumulator = tl.dot(weight * query_variance, key_square, accumulator, input_precision=PRECISION)
            query_square = weight * query_mean * query_mean
            accumulator = tl.dot(query_square, key_variance, accumulator, input_precision=PRECISION)
    filled = tl.load(size_ptr + entry * key_blocks + columns, mask=columns < key_blocks, other=0) > 0
    accumulator = tl.where(filled[None, :], accumulator, float("-inf"))
    offsets = (head_entry * query_blocks + rows)[:, None] * key_blocks + columns[None, :]
    tl.store(scores_ptr + offsets, accumulator, mask=(rows < query_blocks)[:, None] & (columns < key_blocks)[None, :])


@triton.jit
def ordered(scores):
    """Unsigned integers in the order of the floats, from 2 up; NaN, of either sign, is 1."""
    bits = (scores + 0.0).to(tl.uint32, bitcast=True)  # the sum turns -0 into 0
    ordered = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(scores == scores, ordered, 1)


@triton.jit
def row_budget(size_ptr, spans_ptr, columns, key_blocks, share, keep_first):
    """Of a row: which key blocks it sees that hold a token, K, which of them are kept whatever their score, and whether
    others have room; share: the bits of the double 1 - sparsity; spans_ptr: of the row, None where it sees all."""
    filled = tl.load(size_ptr + columns, mask=columns < key_blocks, other=0) > 0
    if spans_ptr is None:
        count = tl.max(kept_of(tl.sum(filled.to(tl.int32), axis=0) + tl.zeros([1], tl.int32), 1, share), axis=0)
        forced, room = columns < tl.minimum(keep_first, count), keep_first < count
    else:
        first, last = tl.load(spans_ptr), tl.load(spans_ptr + 1)
        filled = filled & (columns < tl.load(spans_ptr + 3))
        available = tl.sum(filled.to(tl.int32), axis=0) + tl.zeros([1], tl.int32)
        count = tl.max(kept_of(available, own_blocks(first, last), share), axis=0)
        forced, room = kept_anyway(first, last, count, columns, keep_first)
    return filled, count, forced, room


@triton.jit
def kept_of(available, least, share):
    """K of rows [n] that see so many key blocks: at least so many, 0 where they see none."""
    wanted = (share + tl.zeros_like(available).to(tl.int64)).to(tl.float64, bitcast=True) * available.to(tl.float64)
    return tl.minimum(tl.maximum(tl.ceil(wanted).to(tl.int32), least), available)


@triton.jit
def own_blocks(first, last):
    """How many key blocks hold the ends of a row of blocks."""
    return tl.where(first == last, 1, 2)


@triton.jit
def kept_anyway(first, last, count, columns, keep_first):
    """Which blocks a row keeps whatever their score: its own, then the first as far as its K goes; and whether others
    have room. `columns` has an axis of its own."""
    apart = first < last
    others = columns - (columns > first).to(tl.int32) - ((columns > last) & apart).to(tl.int32)
    room = count - own_blocks(first, last)
    forced = (columns == first) | (columns == last) | ((columns < keep_first) & (others < room))
    return forced, keep_first - (first < keep_first).to(tl.int32) - ((last < keep_first) & apart).to(tl.int32) < room


@triton.jit
def threshold(values, count):
    """The largest number that at least `count` values reach, bit by bit, and how many of its equals have room."""
    low = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        reached = tl.sum((values >= (low | bit)).to(tl.int32), axis=0) >= count
        low = tl.where(reached, low | bit, low)
        bit = bit >> 1
    return low, count - tl.sum((values > low).to(tl.int32), axis=0)


@triton.jit
def store_list(values, low, room, columns, filled, list_ptr, capacity, WIDTH: tl.constexpr):
    """Write the places of the values above `low` and of the first `room` that equal it; returns how many they are."""
    tied = filled & (values == low)
    kept = (filled & (values > low)) | (tied & (tl.cumsum(tied.to(tl.int32), axis=0) <= room))
    count = tl.sum(kept.to(tl.int32), axis=0)
    tl.store(list_ptr + tl.cumsum(kept.to(tl.int32), axis=0) - 1, columns, mask=kept)
    # What lies beyond `count` repeats the last kept block, 0 where none is.
    last = tl.max(tl.where(kept, columns, 0), axis=0)
    tl.store(list_ptr + columns, tl.broadcast_to(last, (WIDTH,)), mask=(columns >= count) & (columns < capacity))
    return count


@triton.jit(do_not_specialize=SIZES)
def _select_kernel(
    scores_ptr, size_ptr, spans_ptr, count_ptr, index_ptr, heads, rows, key_blocks, query_blocks, capacity, start,
    share, keep_first, WIDTH: tl.constexpr,
):  # fmt: skip
    head_entry, row = head_and_place(rows)
    columns = tl.arange(0, WIDTH)
    entry = head_entry // heads
    if spans_ptr is not None:
        spans_ptr += (entry * query_blocks + start + row) * 4
    filled, count, forced, _ = row_budget(
        size_ptr + entry * key_blocks, spans_ptr, columns, key_blocks, share, keep_first
    )
    scores_ptr += (head_entry * rows + row) * key_blocks
    if spans_ptr is None:
        scores = tl.load(scores_ptr + columns, mask=columns < key_blocks, other=float("-inf"))
    else:
        scores = tl.load(scores_ptr + columns, mask=filled, other=float("-inf"))
        scores = tl.where(scores == scores, scores, float("-inf"))
    values = tl.where(filled, ordered(scores), 0)  # an empty block is below all others
    values = tl.where(filled & forced, tl.full((), 0xFFFFFFFF, tl.uint32), values)
    low, room = threshold(values, count)
    list_start = head_entry * query_blocks + start + row
    store_list(values, low, room, columns, filled, index_ptr + list_start * capacity, capacity, WIDTH)
    tl.store(count_ptr + list_start, count)
