"""Sorts, pools and copies the tokens on the GPU: the twin of `stages.sorting` and `stages.pooling`.

Three launches, each for both sides: norms; orders, where a program sorts the 64-bit numbers of norm and position of one
segment, so that equal norms keep their order; blocks, where a program gathers a slab of channels of one block, takes
mean and variance of q and k and writes k and v out from the same registers. A single launch per segment for everything
was slower: there are too few segments to keep the memory busy. An order that is not made here is given.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from baatt.types import BlockStats, SortedBlocks, TokenOrder

LONGEST = 4096
#: Tokens per program where nothing is sorted.
STRETCH = 1024
#: Channels that one program copies: fewer registers each, more programs that wait for memory at once.
SLAB = 64
GATHER_WARPS = 2
MANY_SEGMENTS = 1024
#: Orders the kernel makes itself, by the names of their stages.
ORDERS = ("by_norm", "by_position")


class _Side(NamedTuple):
    """The order of one side, queries or keys, and what the launches that make it need."""

    x: Tensor
    order: TokenOrder
    rule: str
    positions: Tensor | None
    norms: Tensor | None
    segment: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Of the kernels that fill `order`."""
        return self.positions, self.norms, *self.order, *self.x.shape[1:3]

    def programs(self, tokens: int) -> int:
        """How many stretches of so many tokens there are."""
        batch, heads, length, _ = self.x.shape
        return batch * heads * triton.cdiv(length, tokens)

    @property
    def width(self) -> int:
        """Of the sorting network."""
        return max(16, triton.next_power_of_2(self.segment))


def sort_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    query_order: TokenOrder | str,
    key_order: TokenOrder | str,
    *,
    segment: int | None,
    key_mask: Tensor | None,
    block_size: int,
) -> SortedBlocks:
    """Order both sides (E2), and on the way copy the tokens in that order and take their blocks' moments (E3).

    Args:
        q: [B, H, N, D], any strides.
        k: [B, G, M, D], any strides; v: the same shape, or None.
        query_order, key_order: a name in `ORDERS`, or an order that exists already and is followed.
        segment: tokens per sorting segment, at most `LONGEST` unless the sequence is shorter; None = all.
        key_mask: [B, M] bool, True = the key counts; without effect on a given order.
        block_size: P.

    Returns:
        SortedBlocks with sorted copies of k and, where given, v; attention gathers queries itself.
    """
    queries, keys = _prepare(q, query_order, None, segment), _prepare(k, key_order, key_mask, segment)
    columns = max(16, triton.next_power_of_2(q.shape[-1]))
    masked = key_mask is not None
    if queries.norms is not None or keys.norms is not None:
        rows = max(16, min(64, 8192 // columns))
        programs = [0 if side.norms is None else side.programs(rows) for side in (queries, keys)]
        _norm_kernel[(sum(programs),)](
            q, *queries.arguments, *q.stride(), k, *keys.arguments, *k.stride(), programs[0],
            KEYS_MASKED=masked, CHANNELS=q.shape[-1], COLUMNS=columns, ROWS=rows, num_warps=4,
        )  # fmt: skip
    if queries.rule != "given" or keys.rule != "given":
        programs = [side.programs(side.segment) for side in (queries, keys)]
        _order_kernel[(sum(programs),)](
            *queries.arguments, queries.segment, *keys.arguments, keys.segment, programs[0],
            QUERY_RULE=queries.rule, QUERY_WIDTH=queries.width, KEY_RULE=keys.rule, KEY_WIDTH=keys.width,
            KEYS_MASKED=masked, num_warps=sorting_warps(sum(programs), max(queries.width, keys.width)),
        )  # fmt: skip
    query_stats, key_stats = (_room_for_stats(x, block_size) for x in (q, k))
    sorted_k = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    sorted_v = None if v is None else torch.empty_like(sorted_k)
    slab = min(columns, SLAB)
    slabs = triton.cdiv(q.shape[-1], slab)
    programs = [side.programs(block_size) * slabs for side in (queries, keys)]
    _gather_kernel[(programs[0] + programs[1] * (1 if v is None else 2),)](
        q, *queries.order, *query_stats, *q.stride(), *q.shape[1:3],
        k, *keys.order, sorted_k, *key_stats, *k.stride(), *k.shape[1:3],
        v, sorted_v, *(k if v is None else v).stride(), *programs,
        BLOCK=block_size, CHANNELS=q.shape[-1], COLUMNS=slab, num_warps=GATHER_WARPS,
    )  # fmt: skip
    return SortedBlocks(queries.order, query_stats, keys.order, key_stats, sorted_k, sorted_v)


def sorted_copies(
    k: Tensor, v: Tensor, order: TokenOrder, sorted_k: Tensor | None, sorted_v: Tensor | None
) -> tuple[Tensor, Tensor]:
    """k and v [B, G, M, D] contiguous in sorted order, masked tokens 0: what is given, or copies made now."""
    k = _permute(k, order) if sorted_k is None else sorted_k
    return k, _permute(v, order) if sorted_v is None else sorted_v


def _permute(x: Tensor, order: TokenOrder) -> Tensor:
    batch, heads, tokens, channels = x.shape
    copy = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    columns, rows = max(16, triton.next_power_of_2(channels)), 64
    _permute_kernel[(triton.cdiv(tokens, rows) * batch * heads,)](
        x, order.index.contiguous(), order.length.contiguous(), copy, *x.stride(), heads, tokens,
        BLOCK=rows, CHANNELS=channels, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return copy


def _room_for_stats(x: Tensor, block_size: int) -> BlockStats:
    batch, heads, tokens, channels = x.shape
    blocks = triton.cdiv(tokens, block_size)
    moments = torch.empty(2, batch, heads, blocks, channels, dtype=torch.float32, device=x.device)
    return BlockStats(*moments, torch.empty(batch, blocks, dtype=torch.int64, device=x.device))


def _prepare(x: Tensor, order: TokenOrder | str, mask: Tensor | None, segment: int | None) -> _Side:
    """One side's order, still to be filled unless it is given."""
    batch, heads, tokens, _ = x.shape
    if isinstance(order, TokenOrder):
        order = TokenOrder(order.index.contiguous(), order.length.contiguous())
        return _Side(x, order, "given", None, None, min(tokens, STRETCH))
    index = torch.empty(batch, heads, tokens, dtype=torch.int64, device=x.device)
    if mask is None:
        length, positions = torch.empty(batch, dtype=torch.int64, device=x.device), None
    else:
        length, positions = mask.sum(-1), (~mask).byte().argsort(dim=-1, stable=True)
    if order != "by_norm":
        return _Side(x, TokenOrder(index, length), order, positions, None, min(tokens, STRETCH))
    norms = torch.empty_like(index, dtype=torch.int32)
    return _Side(x, TokenOrder(index, length), order, positions, norms, min(tokens, segment or tokens))


def sorting_warps(programs: int, width: int) -> int:
    """Warps per segment: a network inside one warp needs no barriers, but a few segments alone want more of them."""
    return max(width // 1024, 1 if programs > MANY_SEGMENTS else 8)


@triton.jit
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


@triton.jit
def _order_kernel(
    no_positions_ptr, q_norms_ptr, q_order_ptr, q_length_ptr, heads, queries, query_segment,
    positions_ptr, k_norms_ptr, k_order_ptr, k_length_ptr, groups, keys, key_segment, query_programs,
    QUERY_RULE: tl.constexpr, QUERY_WIDTH: tl.constexpr, KEY_RULE: tl.constexpr, KEY_WIDTH: tl.constexpr,
    KEYS_MASKED: tl.constexpr,
):  # fmt: skip
    """Programs of query segments first, then those of key segments."""
    program = tl.program_id(0)
    if program < query_programs:
        _order_segment(
            program, no_positions_ptr, q_norms_ptr, q_order_ptr, q_length_ptr, heads, queries, query_segment,
            QUERY_RULE, QUERY_WIDTH, False,
        )  # fmt: skip
    else:
        _order_segment(
            program - query_programs, positions_ptr, k_norms_ptr, k_order_ptr, k_length_ptr, groups, keys, key_segment,
            KEY_RULE, KEY_WIDTH, KEYS_MASKED,
        )  # fmt: skip


@triton.jit
def _order_segment(
    program, positions_ptr, norms_ptr, order_ptr, length_ptr, heads, tokens, segment,
    RULE: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    if RULE != "given":
        segments = tl.cdiv(tokens, segment)
        first = (program % segments) * segment
        head_entry = (program // segments).to(tl.int64)
        places = tl.arange(0, WIDTH)
        inside = (places < segment) & (first + places < tokens)
        order = first + places.to(tl.int64)
        if RULE == "by_norm":
            # The padding stands behind infinity.
            norms = tl.load(norms_ptr + head_entry * tokens + first + places, mask=inside, other=0x7FFFFFFF)
            order = first + (tl.sort((norms.to(tl.int64) << 32) | places) & 0xFFFFFFFF)
        entry = head_entry // heads
        if MASKED:
            order = tl.load(positions_ptr + entry * tokens + order, mask=inside, other=0)
        else:
            tl.store(length_ptr + entry, tl.cast(tokens, tl.int64))  # every program the same
        tl.store(order_ptr + head_entry * tokens + first + places, order, mask=inside)


@triton.jit
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
    elif v_ptr is not None:
        _gather_block(
            program - query_programs - key_programs, v_ptr, k_order_ptr, k_length_ptr, v_copy_ptr,
            v_stride_batch, v_stride_head, v_stride_token, v_stride_channel, groups, keys, BLOCK, CHANNELS, COLUMNS,
        )  # fmt: skip


@triton.jit
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

    Hands on the tokens, the length of their entry, and the numbers of the block, counted over all heads, and the slab.
    """
    slabs: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
    slab = program % slabs
    block = program // slabs
    blocks = tl.cdiv(tokens, BLOCK)
    head_entry = (block // blocks).to(tl.int64)
    entry = head_entry // heads
    rows = (block % blocks) * BLOCK + tl.arange(0, BLOCK)
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
