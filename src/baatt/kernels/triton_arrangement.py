"""Sorts, pools and copies the tokens on the GPU: the twin of `stages.sorting` and `stages.pooling`.

Three launches, each for both sides: norms; orders, where a program sorts the 64-bit numbers of norm and position of one
segment, so that equal norms keep their order; blocks, where a program gathers a slab of channels of one block, takes
mean and variance of q and k and writes k and v out from the same registers. A single launch per segment for everything
was slower: there are too few segments to keep the memory busy. Only orders by norm are made here, others are given, and
tokens that stand where they were are read there and not copied.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from baatt.kernels.launching import SIZES, cdiv, next_power_of_2
from baatt.types import BlockStats, SortedBlocks, TokenOrder

LONGEST = 4096
#: Channels that one program copies: fewer registers each, more programs that wait for memory at once.
SLAB = 64
GATHER_WARPS = 2
MANY_SEGMENTS = 1024


class _Side(NamedTuple):
    """The order of one side, queries or keys, and what the launches that make it need; no norms if it is given."""

    x: Tensor
    order: TokenOrder
    positions: Tensor | None
    norms: Tensor | None
    segment: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Of the kernels that fill `order`."""
        return self.positions, self.norms, self.order.index, self.order.length, *self.x.shape[1:3]

    def programs(self, tokens: int) -> int:
        """Of a launch that takes so many tokens each."""
        return 0 if self.norms is None else _stretches(self.x, tokens)

    @property
    def width(self) -> int:
        """Of the sorting network."""
        return max(16, next_power_of_2(self.segment))


def order_tokens(
    q: Tensor,
    k: Tensor,
    query_order: TokenOrder | None,
    key_order: TokenOrder | None,
    *,
    segment: int | None,
    key_mask: Tensor | None,
) -> tuple[TokenOrder, TokenOrder]:
    """Order both sides by norm (E2).

    Args:
        q: [B, H, N, D], any strides; k: [B, G, M, D], any strides.
        query_order, key_order: an order that exists already and is followed; None = by norm.
        segment: tokens per sorting segment, at most `LONGEST` unless the sequence is shorter; None = all.
        key_mask: [B, M] bool, True = the key counts; without effect on a given order.
    """
    queries, keys = _prepare(q, query_order, None, segment), _prepare(k, key_order, key_mask, segment)
    if queries.norms is None and keys.norms is None:
        return queries.order, keys.order
    masked = key_mask is not None
    columns = max(16, next_power_of_2(q.shape[-1]))
    rows = max(16, min(64, 8192 // columns))
    programs = [side.programs(rows) for side in (queries, keys)]
    _norm_kernel[(sum(programs),)](
        q, *queries.arguments, *q.stride(), k, *keys.arguments, *k.stride(), programs[0],
        KEYS_MASKED=masked, CHANNELS=q.shape[-1], COLUMNS=columns, ROWS=rows, num_warps=4,
    )  # fmt: skip
    programs = [side.programs(side.segment) for side in (queries, keys)]
    _order_kernel[(sum(programs),)](
        *queries.arguments, queries.segment, *keys.arguments, keys.segment, programs[0],
        QUERY_WIDTH=queries.width, KEY_WIDTH=keys.width, KEYS_MASKED=masked,
        num_warps=sorting_warps(sum(programs), max(queries.width, keys.width)),
    )  # fmt: skip
    return queries.order, keys.order


def pool_blocks(
    q: Tensor, k: Tensor, v: Tensor | None, query_order: TokenOrder, key_order: TokenOrder, block_size: int
) -> SortedBlocks:
    """Take the moments of the sorted blocks of q and k (E3), and on the way copy k and v, if given, in their order.

    Where the order of keys is the identity nothing is copied.
    """
    query_stats, key_stats = (_room_for_stats(x, block_size) for x in (q, k))
    copies = (None, None) if key_order.identity else (_room_for_copy(k), None if v is None else _room_for_copy(v))
    slab = min(max(16, next_power_of_2(q.shape[-1])), SLAB)
    slabs = cdiv(q.shape[-1], slab)
    programs = [_stretches(x, block_size) * slabs for x in (q, k)]
    _gather_kernel[(programs[0] + programs[1] * (1 if copies[1] is None else 2),)](
        q, moved(query_order), query_order.length.contiguous(), *query_stats, *q.stride(), *q.shape[1:3],
        k, moved(key_order), key_order.length.contiguous(), copies[0], *key_stats, *k.stride(), *k.shape[1:3],
        v, copies[1], *(k if v is None else v).stride(), *programs,
        BLOCK=block_size, CHANNELS=q.shape[-1], COLUMNS=slab, num_warps=GATHER_WARPS,
    )  # fmt: skip
    return SortedBlocks(query_order, query_stats, key_order, key_stats, *((k, v) if key_order.identity else copies))


def sorted_copies(
    k: Tensor, v: Tensor, order: TokenOrder, sorted_k: Tensor | None, sorted_v: Tensor | None
) -> tuple[Tensor, Tensor]:
    """k and v [B, G, M, D] in sorted order: what is given; else themselves if they stand in it; else copies made now.

    Copies are contiguous, their masked tokens 0.
    """
    k = _permute(k, order) if sorted_k is None else sorted_k
    return k, _permute(v, order) if sorted_v is None else sorted_v


def moved(order: TokenOrder) -> Tensor | None:
    """The index as kernels take it: contiguous, or none where every token stands where it was."""
    return None if order.identity else order.index.contiguous()


def _permute(x: Tensor, order: TokenOrder) -> Tensor:
    if order.identity:
        return x
    copy, rows = _room_for_copy(x), 64
    _permute_kernel[(_stretches(x, rows),)](
        x, moved(order), order.length.contiguous(), copy, *x.stride(), *x.shape[1:3],
        BLOCK=rows, CHANNELS=x.shape[-1], COLUMNS=max(16, next_power_of_2(x.shape[-1])), num_warps=4,
    )  # fmt: skip
    return copy


def _stretches(x: Tensor, tokens: int) -> int:
    """How many stretches of so many tokens x has, over all heads."""
    return x.shape[0] * x.shape[1] * int(cdiv(x.shape[2], tokens))


def _room_for_copy(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _room_for_stats(x: Tensor, block_size: int) -> BlockStats:
    batch, heads, tokens, channels = x.shape
    blocks = cdiv(tokens, block_size)
    moments = torch.empty(2, batch, heads, blocks, channels, dtype=torch.float32, device=x.device)
    return BlockStats(*moments, torch.empty(batch, blocks, dtype=torch.int64, device=x.device))


def _prepare(x: Tensor, order: TokenOrder | None, mask: Tensor | None, segment: int | None) -> _Side:
    """One side's order, still to be filled unless it is given."""
    if order is not None:
        return _Side(x, order if order.identity else order._replace(index=order.index.contiguous()), None, None, 1)
    batch, heads, tokens, _ = x.shape
    index = torch.empty(batch, heads, tokens, dtype=torch.int64, device=x.device)
    if mask is None:
        length, positions = torch.empty(batch, dtype=torch.int64, device=x.device), None
    else:
        length, positions = mask.sum(-1), (~mask).byte().argsort(dim=-1, stable=True)
    norms = torch.empty_like(index, dtype=torch.int32)
    return _Side(x, TokenOrder(index, length), positions, norms, min(tokens, segment or tokens))


def sorting_warps(programs: int, width: int) -> int:
    """Warps per segment: a network inside one warp needs no barriers, but a few segments alone want more of them."""
    return max(width // 1024, 1 if programs > MANY_SEGMENTS else 8)


@triton.jit(do_not_specialize=SIZES)
def _norm_kernel(
    q_ptr, no_positions_ptr, q_norms_ptr, q_order_ptr, q_length_ptr, heads, queries,
    q_stride_batch, q_stride_head, q_stride_token, q_stride_channel,
    k_ptr, positions_ptr, k_norms_ptr, k_order_ptr, k_length_ptr, groups, keys,
    k_stride_batch, k_stride_head, k_stride_token, k_stride_channel, query_programs,
    KEYS_MASKED: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Programs of query rows first, then those of key rows."""
    program = tl.program_id(0)
    if program < query_programs:
        if q_norms_ptr is not None:
            _norm_rows(
                program, q_ptr, no_positions_ptr, q_norms_ptr, q_length_ptr, heads, queries,
                q_stride_batch, q_stride_head, q_stride_token, q_stride_channel, False, CHANNELS, COLUMNS, ROWS,
            )  # fmt: skip
    elif k_norms_ptr is not None:
        _norm_rows(
            program - query_programs, k_ptr, positions_ptr, k_norms_ptr, k_length_ptr, groups, keys,
            k_stride_batch, k_stride_head, k_stride_token, k_stride_channel, KEYS_MASKED, CHANNELS, COLUMNS, ROWS,
        )  # fmt: skip


@triton.jit
def _norm_rows(
    program, x_ptr, positions_ptr, norms_ptr, length_ptr, heads, tokens,
    stride_batch, stride_head, stride_token, stride_channel,
    MASKED: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Squared norms as integers in their order; masked tokens stand last and are infinite."""
    tiles = tl.cdiv(tokens, ROWS)
    head_entry = (program // tiles).to(tl.int64)
    entry = head_entry // heads
    rows = (program % tiles) * ROWS + tl.arange(0, ROWS)
    source = rows.to(tl.int64)
    counted = rows < tokens
    if MASKED:
        source = tl.load(positions_ptr + entry * tokens + rows, mask=rows < tokens, other=0)
        counted = rows < tl.load(length_ptr + entry)
    x_ptr += entry * stride_batch + (head_entry % heads) * stride_head
    members = _load_rows(x_ptr, source, counted, 0, stride_token, stride_channel, CHANNELS, COLUMNS).to(tl.float32)
    squares = tl.sum(members * members, axis=1)
    squares = tl.where(counted & (squares == squares), squares, float("inf"))  # NaN counts as infinite
    # Bits of a float that is not negative sort like the float.
    tl.store(norms_ptr + head_entry * tokens + rows, squares.to(tl.int32, bitcast=True), mask=rows < tokens)


@triton.jit(do_not_specialize=SIZES)
def _order_kernel(
    no_positions_ptr, q_norms_ptr, q_order_ptr, q_length_ptr, heads, queries, query_segment,
    positions_ptr, k_norms_ptr, k_order_ptr, k_length_ptr, groups, keys, key_segment, query_programs,
    QUERY_WIDTH: tl.constexpr, KEY_WIDTH: tl.constexpr, KEYS_MASKED: tl.constexpr,
):  # fmt: skip
    """Programs of query segments first, then those of key segments."""
    program = tl.program_id(0)
    if program < query_programs:
        if q_norms_ptr is not None:
            _order_segment(
                program, no_positions_ptr, q_norms_ptr, q_order_ptr, q_length_ptr, heads, queries, query_segment,
                QUERY_WIDTH, False,
            )  # fmt: skip
    elif k_norms_ptr is not None:
        _order_segment(
            program - query_programs, positions_ptr, k_norms_ptr, k_order_ptr, k_length_ptr, groups, keys, key_segment,
            KEY_WIDTH, KEYS_MASKED,
        )  # fmt: skip


@triton.jit
def _order_segment(
    program, positions_ptr, norms_ptr, order_ptr, length_ptr, heads, tokens, segment,
    WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    segments = tl.cdiv(tokens, segment)
    first = (program % segments) * segment
    head_entry = (program // segments).to(tl.int64)
    places = tl.arange(0, WIDTH)
    inside = (places < segment) & (first + places < tokens)
    # The padding stands behind infinity.
    norms = tl.load(norms_ptr + head_entry * tokens + first + places, mask=inside, other=0x7FFFFFFF)
    order = first + (tl.sort((norms.to(tl.int64) << 32) | places) & 0xFFFFFFFF)
    entry = head_entry // heads
    if MASKED:
        order = tl.load(positions_ptr + entry * tokens + order, mask=inside, other=0)
    else:
        tl.store(length_ptr + entry, tl.cast(tokens, tl.int64))  # every program the same
    tl.store(order_ptr + head_entry * tokens + first + places, order, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _gather_kernel(
    q_ptr, q_order_ptr, q_length_ptr, q_mean_ptr, q_variance_ptr, q_size_ptr,
    q_stride_batch, q_stride_head, q_stride_token, q_stride_channel, heads, queries,
    k_ptr, k_order_ptr, k_length_ptr, k_copy_ptr, k_mean_ptr, k_variance_ptr, k_size_ptr,
    k_stride_batch, k_stride_head, k_stride_token, k_stride_channel, groups, keys,
    v_ptr, v_copy_ptr, v_stride_batch, v_stride_head, v_stride_token, v_stride_channel,
    query_programs, key_programs,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Programs of query blocks first, then those of key blocks, then those of value blocks."""
    program = tl.program_id(0)
    if program < query_programs:
        members, length, block, slab = _gather_block(
            program, q_ptr, q_order_ptr, q_length_ptr, None,
            q_stride_batch, q_stride_head, q_stride_token, q_stride_channel, heads, queries, BLOCK, CHANNELS, COLUMNS,
        )  # fmt: skip
        _pool_block(
            block, slab, members, length, q_mean_ptr, q_variance_ptr, q_size_ptr, heads, queries,
            BLOCK, CHANNELS, COLUMNS,
        )  # fmt: skip
    elif program < query_programs + key_programs:
        program -= query_programs
        members, length, block, slab = _gather_block(
            program, k_ptr, k_order_ptr, k_length_ptr, k_copy_ptr,
            k_stride_batch, k_stride_head, k_stride_token, k_stride_channel, groups, keys, BLOCK, CHANNELS, COLUMNS,
        )  # fmt: skip
        _pool_block(
            block, slab, members, length, k_mean_ptr, k_variance_ptr, k_size_ptr, groups, keys,
            BLOCK, CHANNELS, COLUMNS,
        )  # fmt: skip
    elif v_copy_ptr is not None:
        _gather_block(
            program - query_programs - key_programs, v_ptr, k_order_ptr, k_length_ptr, v_copy_ptr,
            v_stride_batch, v_stride_head, v_stride_token, v_stride_channel, groups, keys, BLOCK, CHANNELS, COLUMNS,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _permute_kernel(
    x_ptr, order_ptr, length_ptr, copy_ptr, stride_batch, stride_head, stride_token, stride_channel, heads, tokens,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    _gather_block(
        tl.program_id(0), x_ptr, order_ptr, length_ptr, copy_ptr,
        stride_batch, stride_head, stride_token, stride_channel, heads, tokens, BLOCK, CHANNELS, COLUMNS,
    )  # fmt: skip


@triton.jit
def _gather_block(
    program, x_ptr, order_ptr, length_ptr, copy_ptr,
    stride_batch, stride_head, stride_token, stride_channel, heads, tokens,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A slab of channels of one block of sorted tokens, 0 from `length` on; copied where there is room for a copy.

    Without an order they stand where they were. Hands on the tokens, the length of their entry, and the numbers of the
    block, counted over all heads, and the slab.
    """
    slabs: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
    slab = program % slabs
    block = program // slabs
    blocks = tl.cdiv(tokens, BLOCK)
    head_entry = (block // blocks).to(tl.int64)
    entry = head_entry // heads
    rows = (block % blocks) * BLOCK + tl.arange(0, BLOCK)
    source = rows.to(tl.int64)
    if order_ptr is not None:
        source = tl.load(order_ptr + head_entry * tokens + rows, mask=rows < tokens, other=0)
    length = tl.load(length_ptr + entry).to(tl.int32)
    x_ptr += entry * stride_batch + (head_entry % heads) * stride_head
    members = _load_rows(x_ptr, source, rows < length, slab * COLUMNS, stride_token, stride_channel, CHANNELS, COLUMNS)
    if copy_ptr is not None:
        columns = slab * COLUMNS + tl.arange(0, COLUMNS)
        targets = (head_entry * tokens + rows)[:, None] * CHANNELS + columns[None, :]
        tl.store(copy_ptr + targets, members, mask=(rows < tokens)[:, None] & (columns < CHANNELS)[None, :])
    return members, length, block, slab


@triton.jit
def _pool_block(
    block, slab, members, length, mean_ptr, variance_ptr, size_ptr, heads, tokens,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Mean, then variance around it, of the block that stands in registers."""
    blocks = tl.cdiv(tokens, BLOCK)
    head_entry = (block // blocks).to(tl.int64)
    count = tl.minimum(tl.maximum(length - block % blocks * BLOCK, 0), BLOCK)
    # Every head and slab the same.
    tl.store(size_ptr + head_entry // heads * blocks + block % blocks, count.to(tl.int64))
    members = members.to(tl.float32)
    divisor = tl.maximum(count, 1).to(tl.float32)
    mean = tl.sum(members, axis=0) / divisor
    centred = tl.where((tl.arange(0, BLOCK) < count)[:, None], members - mean[None, :], 0.0)
    variance = tl.sum(centred * centred, axis=0) / divisor
    columns = slab * COLUMNS + tl.arange(0, COLUMNS)
    place = block.to(tl.int64) * CHANNELS + columns
    tl.store(mean_ptr + place, mean, mask=columns < CHANNELS)
    tl.store(variance_ptr + place, variance, mask=columns < CHANNELS)


@triton.jit
def _load_rows(
    x_ptr, rows, present, first_column, stride_token, stride_channel, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Columns of x from `first_column` on in the given rows, 0 where not `present`."""
    columns = first_column + tl.arange(0, COLUMNS)
    offsets = rows[:, None] * stride_token + columns[None, :].to(tl.int64) * stride_channel
    return tl.load(x_ptr + offsets, mask=present[:, None] & (columns < CHANNELS)[None, :], other=0.0)
