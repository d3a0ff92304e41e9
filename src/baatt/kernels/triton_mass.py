"""Attention mass of every block pair on the GPU: the twin of `scores.exact`, `compare` (E1) and `compare_peak`.

Two launches a slab of query rows. The first multiplies once and keeps, of every row and run of keys, the log of the
sum of exponentials; the second turns those into shares of the row, adds the runs of a block and takes the mean or the
peak of its rows.
Between them stands one number for the up to 64 keys of a run, in slabs of bounded size. Walking over the keys twice,
first for the sum of the row and then for the shares, would need none of it but twice the matrix products.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from baatt.kernels.launching import SIZES, cdiv, next_power_of_2
from baatt.kernels.triton_attention import (
    LARGE_MEMORY,
    LOWEST,
    _gather_rows,
    _load_rows,
    _shared_memory,
    head_and_place,
)
from baatt.types import ScoreOptions, Sight

SLAB_SUMS = 128 * 2**20  # 512 MiB
#: Runs of keys that the second launch reads at once.
WIDTH = 32


def compare(queries: Any, keys: Any, options: ScoreOptions, scale: float, sight: Sight | None = None) -> Tensor:
    """Attention mass of every block pair, averaged over the queries of a block; see `scores.exact.compare`.

    Args:
        queries, keys: `BlockTokens`, any strides for queries, of one dtype that is not float64.
        options: block_size, a power of two from 16 to 128.
        scale: s, the factor on q.k, of any sign.

    Returns:
        [B, H, i, J] float32, each row sums to 1; 0 without queries or keys.
    """
    return _mass(queries, keys, scale, sight, peak=False)


def compare_peak(queries: Any, keys: Any, options: ScoreOptions, scale: float, sight: Sight | None = None) -> Tensor:
    """As `compare`, of the query of a block that attends to the key block most; see `scores.exact.compare_peak`."""
    return _mass(queries, keys, scale, sight, peak=True)


def _mass(queries: Any, keys: Any, scale: float, sight: Sight | None, *, peak: bool) -> Tensor:
    q, k = queries.tokens, keys.tokens.contiguous()
    batch, heads, query_blocks, block_size, channels = q.shape
    groups, key_blocks = k.shape[1:3]
    launch = launch_options(q.dtype, channels, _shared_memory(q.device))
    run = min(launch["TILE"], block_size)
    runs = key_blocks * (block_size // run)
    query_size, key_size = queries.size.contiguous(), keys.size.contiguous()
    limit = None if sight is None else sight.limit.contiguous()
    mass = torch.empty(batch, heads, query_blocks, key_blocks, dtype=torch.float32, device=q.device)
    blocks = max(1, min(query_blocks, SLAB_SUMS // (batch * heads * runs * block_size)))
    sums = torch.empty(batch, heads, runs, blocks * block_size, dtype=torch.float32, device=q.device)
    for first in range(0, query_blocks, blocks):
        count = min(query_blocks - first, blocks)
        _sum_kernel[(cdiv(count * block_size, launch["ROWS"]) * batch * heads,)](
            q, *q.stride(), k, key_size, limit, sums, heads, heads // groups, query_blocks, key_blocks, runs, first,
            count * block_size, blocks * block_size, scale * math.log2(math.e),
            CHANNELS=channels, BLOCK=block_size, RUN=run, **launch,
        )  # fmt: skip
        _share_kernel[(count * batch * heads,)](
            sums, query_size, key_size, limit, mass, heads, query_blocks, key_blocks, runs, first, count,
            blocks * block_size, BLOCK=block_size, RUN=run, WIDTH=WIDTH, PEAK=peak, num_warps=4,
        )  # fmt: skip
    return mass


def launch_options(dtype: torch.dtype, channels: int, shared_memory: int) -> dict[str, Any]:
    """Tile sizes, warps and pipeline stages of the first launch that fit into registers and `shared_memory` bytes."""
    columns = max(16, next_power_of_2(channels))
    wide = columns > 128
    if dtype == torch.float32:
        # Without matrix units every operand is a register: larger tiles of either kind spill by the kilobyte.
        rows, tile, depth = (32, 32, 64) if wide else (64, 32, min(columns, 32))
    else:
        rows, tile, depth = (64 if shared_memory < LARGE_MEMORY else 128), 64, min(columns, 128)
    return {
        "COLUMNS": columns,
        "DEPTH": depth,
        "ROWS": rows,
        "TILE": tile,
        "PRECISION": "ieee" if dtype == torch.float32 else None,
        "num_warps": 8 if rows == 128 else 4,
        "num_stages": 1 if wide and rows < 128 else 2,
    }


@triton.jit(do_not_specialize=SIZES)
def _sum_kernel(
    q_ptr, stride_batch, stride_head, stride_block, stride_token, stride_channel, k_ptr, key_size_ptr, limit_ptr,
    sums_ptr, heads, repeats, query_blocks, key_blocks, runs, first_block, slab_rows, stride_sums, scale,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """log2 of the sum of 2^(scale * q.k) over every run of RUN keys, for ROWS rows; up to the last run one sees."""
    head_entry, place = head_and_place(tl.cdiv(slab_rows, ROWS))
    length = _count_keys(key_size_ptr + head_entry // heads * key_blocks, key_blocks, BLOCK)
    k_ptr += (head_entry // repeats) * key_blocks * BLOCK * CHANNELS
    q_ptr += head_entry // heads * stride_batch + head_entry % heads * stride_head
    rows = place * ROWS + tl.arange(0, ROWS)
    present = rows < slab_rows
    query_ptrs = q_ptr + (first_block + rows // BLOCK).to(tl.int64) * stride_block
    query_ptrs += (rows % BLOCK).to(tl.int64) * stride_token
    queries = _gather_rows(query_ptrs, present, 0, stride_channel, CHANNELS, DEPTH)
    # Rows side by side in memory: a step has one number of each to write.
    sums_ptrs = sums_ptr + head_entry * runs * stride_sums + rows[:, None]
    end = length
    if limit_ptr is not None:
        limit_ptr += (head_entry // heads * query_blocks + first_block) * BLOCK
        limits = tl.load(limit_ptr + rows, mask=present, other=0)
        end = tl.max(limits, axis=0)
    for step in range(0, tl.cdiv(end, TILE).to(tl.int32)):
        first_key = tl.cast(step, tl.int64) * TILE
        key_tile = _load_rows(k_ptr, first_key, length, 0, 1, CHANNELS, TILE, CHANNELS, DEPTH)
        scores = tl.dot(queries, tl.trans(key_tile), input_precision=PRECISION) * scale
        # Sums of DEPTH products and then their sum, by an fma, as in the attention kernel: fewer roundings.
        for first_column in tl.static_range(DEPTH, COLUMNS, DEPTH):
            more_queries = _gather_rows(query_ptrs, present, first_column, stride_channel, CHANNELS, DEPTH)
            more_keys = _load_rows(k_ptr, first_key, length, first_column, 1, CHANNELS, TILE, CHANNELS, DEPTH)
            product = tl.dot(more_queries, tl.trans(more_keys), input_precision=PRECISION)
            scores = tl.fma(product, tl.full(product.shape, 1.0, tl.float32) * scale, scores)
        if limit_ptr is None:
            visible = (tl.arange(0, TILE) < length - first_key)[None, :]
        else:
            visible = tl.arange(0, TILE)[None, :] < (limits - first_key.to(tl.int32))[:, None]
        scores = tl.where(visible, scores, float("-inf"))
        scores = tl.reshape(scores, (ROWS, TILE // RUN, RUN))
        # At least the lowest finite number: a run without keys then sums to 0, not to exp2(inf - inf).
        largest = tl.maximum(tl.max(scores, axis=2), LOWEST)
        total = tl.sum(tl.exp2(scores - largest[:, :, None]), axis=2)
        total = tl.where(total == 0, float("-inf"), largest + tl.log2(tl.where(total == 0, 1.0, total)))
        columns = first_key // RUN + tl.arange(0, TILE // RUN)
        inside = present[:, None] & (columns < runs)[None, :]
        tl.store(sums_ptrs + columns[None, :] * stride_sums, total, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _share_kernel(
    sums_ptr, query_size_ptr, key_size_ptr, limit_ptr, mass_ptr, heads, query_blocks, key_blocks, runs, first_block,
    slab_blocks, stride_sums, BLOCK: tl.constexpr, RUN: tl.constexpr, WIDTH: tl.constexpr, PEAK: tl.constexpr,
):  # fmt: skip
    """Softmax over the runs of keys in the rows of one query block, added up by key block, the rows' mean or peak."""
    head_entry, place = head_and_place(slab_blocks)
    block = first_block + place
    length = _count_keys(key_size_ptr + head_entry // heads * key_blocks, key_blocks, BLOCK).to(tl.int32)
    count = tl.load(query_size_ptr + head_entry // heads * query_blocks + block).to(tl.int32)
    rows = tl.arange(0, BLOCK)
    limits = tl.where(rows < count, length, 0)
    if limit_ptr is not None:
        limits = tl.load(limit_ptr + (head_entry // heads * query_blocks + block) * BLOCK + rows)
    seen = tl.cdiv(limits, RUN)
    filled = tl.max(seen, axis=0)
    sums_ptr += head_entry * runs * stride_sums + place * BLOCK
    running_max = tl.full([BLOCK], LOWEST, tl.float32)
    running_sum = tl.zeros([BLOCK], tl.float32)
    for first in range(0, filled, WIDTH):
        sums = _load_sums(sums_ptr, first, rows, seen, stride_sums, WIDTH)
        new_max = tl.maximum(running_max, tl.max(sums, axis=0))
        running_sum = running_sum * tl.exp2(running_max - new_max) + tl.sum(tl.exp2(sums - new_max[None, :]), axis=0)
        running_max = new_max
    divisor = tl.where(running_sum == 0, 1.0, running_sum)
    mass_ptr += (head_entry * query_blocks + block) * key_blocks
    for first in range(0, key_blocks * (BLOCK // RUN), WIDTH):
        sums = _load_sums(sums_ptr, first, rows, seen, stride_sums, WIDTH)
        shares = tl.exp2(sums - running_max[None, :]) / divisor[None, :]
        if PEAK:
            of_blocks = tl.sum(tl.reshape(shares, (WIDTH // (BLOCK // RUN), BLOCK // RUN, BLOCK)), axis=1)
            # A maximum passes over what is not a number, a sum does not.
            mass = tl.max(of_blocks, axis=1) + 0.0 * tl.sum(of_blocks, axis=1)
        else:
            share = tl.sum(shares, axis=1)
            mass = tl.sum(tl.reshape(share, (WIDTH // (BLOCK // RUN), BLOCK // RUN)), axis=1) / tl.maximum(count, 1)
        columns = first // (BLOCK // RUN) + tl.arange(0, WIDTH // (BLOCK // RUN))
        # A row that is not a number makes the blocks with keys so, not the others.
        mass = tl.where(columns < tl.cdiv(length, BLOCK), mass, 0.0)
        tl.store(mass_ptr + columns, mass, mask=columns < key_blocks)


@triton.jit
def _count_keys(size_ptr, key_blocks, BLOCK: tl.constexpr):
    """Tokens of a batch entry, which stand in front: whole blocks and the one that is not."""
    total = tl.zeros([BLOCK], tl.int64)
    for first in range(0, key_blocks, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        total += tl.load(size_ptr + columns, mask=columns < key_blocks, other=0)
    return tl.sum(total, axis=0)


@triton.jit
def _load_sums(sums_ptr, first, rows, seen, stride_sums, WIDTH: tl.constexpr):
    """Part [WIDTH, BLOCK] of the sums from run `first` on, -inf behind the runs that a row sees."""
    columns = first + tl.arange(0, WIDTH)
    inside = columns[:, None] < seen[None, :]
    offsets = columns[:, None].to(tl.int64) * stride_sums + rows[None, :]
    return tl.load(sums_ptr + offsets, mask=inside, other=float("-inf"))
