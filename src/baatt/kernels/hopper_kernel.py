"""The Gluon kernel behind `hopper`: producer, two consumers, and the order in which they hand blocks to one another.

Queries are gathered through their order straight into registers, the next tile's while the last product of this one
runs; whatever else a tile needs from memory is asked for a tile ahead, for its latency would idle the matrix units.

Tiles of equal work are dealt round and round. Uneven ones stand in a list, and whoever is free claims the next: the
producer, a tile ahead, and tells its consumers through a ring. With a slot more than `STAGES` that ring needs no empty
barriers: where the producer comes to a slot again, blocks of the tiles since have gone through all stages.

The consumers multiply in turn: both products of one are issued before those of the other, whose softmax runs meanwhile.
Left alone they may fall into step, and then the matrix units wait for both at once: a tenth slower where tiles are
claimed, for that starts both together.

Where rows see only the keys in front of a limit, the blocks that hold keys beyond it for some rows stand at the back of
a list: the first one has a mask, and so have, seldom, a few more.

Ring entry number e of a program, counted over all its tiles, uses stage e % STAGES in phase e // STAGES; K and V have
rings of their own. Full barriers count the producer's expected bytes, empty barriers one arrival per consumer.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from baatt.kernels.gluon_names import load_tile
from baatt.kernels.launching import SIZES

NO_TILE = gl.constexpr(0x7FFFFFFF)
LOWEST = gl.constexpr(-3.4028234663852886e38)
LN_2 = gl.constexpr(0.6931471805599453)


def ring_stages(channels: int) -> int:
    """Blocks of K and of V in shared memory at once."""
    return 3 if channels == 128 else 4


@gluon.constexpr_function
def row_layout(channels, step):
    """From the layout of a product (step 0) to 16 bytes of a row per thread (step 2).

    A product gives a thread 4 bytes here and there, which makes loads and stores of rows slow. Each step swaps one bit
    of the register number with one of the thread number: an exchange inside a quad of threads. Both swaps at once would
    go through shared memory and its barriers.
    """
    inner, outer = [[0, 8], [0, 16]], [[0, 32 << bit] for bit in range((channels // 64).bit_length())]
    threads = [[0, 2], [0, 4]]
    for swap in range(step):
        inner[swap], threads[swap] = threads[swap], inner[swap]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], *inner, [8, 0], *outer],
        lane_bases=[*threads, [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, channels],
    )


@gluon.constexpr_function
def turn_code(action, half):
    """For a consumer's turn, of a barrier of the hardware; Triton numbers its own from 0 up, a few to a kernel."""
    return f"bar.{action} {9 + half}, 256; mov.u32 $0, 0;"


@gluon.jit
def alternate(ACTION: gl.constexpr, HALF: gl.constexpr):
    """Wait for the turn of a consumer ("sync"), or give it the turn ("arrive")."""
    code: gl.constexpr = turn_code(ACTION, HALF)
    gl.inline_asm_elementwise(code, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def first_tile_of(tiles_ptr, first_tile, last_tile):
    """The tile that this program begins with, and the number from which on there is none."""
    tile, end = first_tile + gl.program_id(0), last_tile
    if tiles_ptr is not None:
        tile, end = gl.load(tiles_ptr + 1 + tile), NO_TILE
    return tile, end


@gluon.jit
def claim_tile(tiles_ptr, tile, last_tile, ring, full, turn, SLOTS: gl.constexpr):
    """The tile after this one: without a list a round further, else the next that nobody has, told to the consumers.

    What counts those that somebody has stands before the list.
    """
    if tiles_ptr is None:
        tile += gl.num_programs(0)
    else:
        alone: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        position = gl.atomic_add(tiles_ptr, 1, sem="relaxed") + gl.num_programs(0)
        tile = gl.load(tiles_ptr + 1 + position, mask=position < last_tile, other=NO_TILE)
        ring.index(turn % SLOTS).store(gl.full([1], tile, gl.int32, layout=alone))
        mbarrier.arrive(full.index(turn % SLOTS), count=1)
    return tile


@gluon.jit
def claimed_tile(tiles_ptr, tile, ring, full, turn, SLOTS: gl.constexpr):
    """What `claim_tile` gave the producer in the same turn."""
    if tiles_ptr is None:
        tile += gl.num_programs(0)
    else:
        same: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        mbarrier.wait(full.index(turn % SLOTS), (turn // SLOTS) & 1)
        tile = gl.max(ring.index(turn % SLOTS).load(same), 0)
    return tile


@gluon.jit
def load_order(order_ptr, head_entry, tokens, rows):
    """Where the sorted rows of a row of [B * H] came from; where they are, without an order."""
    if order_ptr is None:
        order = gl.cast(rows, gl.int64)
    else:
        order = gl.load(order_ptr + gl.cast(head_entry, gl.int64) * tokens + rows, mask=rows < tokens, other=0)
    return order


@gluon.jit
def load_queries(
    q_ptr, stride_batch, stride_head, stride_token, order, tile, present, heads, query_blocks, channels,
):  # fmt: skip
    """Rows `order` of the head that a tile belongs to, 16 bytes per thread; 0 where not `present`."""
    head_entry = tile // query_blocks
    head_start = gl.cast(head_entry // heads, gl.int64) * stride_batch
    head_start += gl.cast(head_entry % heads, gl.int64) * stride_head
    offsets = order[:, None] * stride_token + channels[None, :]
    return gl.load(q_ptr + head_start + offsets, mask=present[:, None], other=0.0)


@gluon.jit
def load_limits(limit_ptr, spans_ptr, list_ptr, tile, count, heads, query_blocks, rows, BLOCK: gl.constexpr):
    """Of a tile: the keys that each row sees, the first block that hides some, and the last but one of its list."""
    place = tile // query_blocks // heads * query_blocks + tile % query_blocks
    limit = gl.load(limit_ptr + place * BLOCK + rows)
    whole = gl.load(spans_ptr + place * 4 + 2)
    second = gl.load(list_ptr - 1, mask=count > 1, other=-1)
    return limit, whole, second


@gluon.jit
def load_block(
    descriptor, batch_entry, group, block, full, empty, ring, entry, BLOCK: gl.constexpr, STAGES: gl.constexpr
):
    """Bring one block of K or V into the ring as soon as both consumers are done with what stood there."""
    stage = entry % STAGES
    phase = (entry // STAGES) & 1
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(full.index(stage), descriptor.block_type.nbytes)
    load_tile(descriptor, [batch_entry, group, block * BLOCK, 0], full.index(stage), ring.index(stage))


@gluon.jit
def produce(
    k_descriptor, v_descriptor, k_ring, v_ring, k_full, k_empty, v_full, v_empty, tile_ring, tile_full,
    index_ptr, count_ptr, tiles_ptr, first_tile, last_tile, query_blocks, capacity, heads, groups,
    BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer warp: K one entry ahead of V, from the back of the list."""
    entry, turn = 0, 0
    tile, end = first_tile_of(tiles_ptr, first_tile, last_tile)
    while tile < end:
        head_entry = tile // query_blocks
        batch_entry = head_entry // heads
        group = head_entry % heads // (heads // groups)
        count = gl.maximum(gl.load(count_ptr + tile), 1)
        list_ptr = index_ptr + gl.cast(tile, gl.int64) * capacity + count - 1
        block = gl.load(list_ptr)
        load_block(k_descriptor, batch_entry, group, block, k_full, k_empty, k_ring, entry, BLOCK, STAGES)
        tile = claim_tile(tiles_ptr, tile, last_tile, tile_ring, tile_full, turn, STAGES + 1)
        turn += 1
        for slot in range(1, count):
            following = gl.load(list_ptr - slot)
            load_block(k_descriptor, batch_entry, group, following, k_full, k_empty, k_ring, entry + 1, BLOCK, STAGES)
            load_block(v_descriptor, batch_entry, group, block, v_full, v_empty, v_ring, entry, BLOCK, STAGES)
            block = following
            entry += 1
        load_block(v_descriptor, batch_entry, group, block, v_full, v_empty, v_ring, entry, BLOCK, STAGES)
        entry += 1


@gluon.jit
def hide(scores, visible, columns):
    """-inf from column `visible` of a row on.

    The bits of a column that differ between threads change sides, which leaves constants on theirs: the columns of a
    thread would need a register each.
    """
    own = columns & 6
    return gl.where((columns & ~6)[None, :] < visible[:, None] - own[None, :], scores, float("-inf"))


@gluon.jit
def consume(
    q_ptr, stride_batch, stride_head, stride_token, k_ring, v_ring, k_full, k_empty, v_full, v_empty, tile_ring,
    tile_full, index_ptr, count_ptr, tiles_ptr, order_ptr, length_ptr, limit_ptr, spans_ptr, out_ptr, lse_ptr,
    first_tile, last_tile, query_blocks, capacity, heads, tokens, scale_log2,
    HALF: gl.constexpr, BLOCK: gl.constexpr, CHANNELS: gl.constexpr, STAGES: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    """One warpgroup: rows HALF * 64 to HALF * 64 + 63 of every tile."""
    ROWS: gl.constexpr = BLOCK // 2
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHANNELS, 16])
    swapped_layout: gl.constexpr = row_layout(CHANNELS, 1)
    wide_layout: gl.constexpr = row_layout(CHANNELS, 2)
    wide_rows: gl.constexpr = gl.SliceLayout(1, wide_layout)
    query_layout: gl.constexpr = gl.DotOperandLayout(0, score_layout, 2)
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    out_rows: gl.constexpr = gl.SliceLayout(1, out_layout)
    columns = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, score_layout))
    channels = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, wide_layout))
    half_rows = HALF * ROWS + gl.arange(0, ROWS, layout=wide_rows)
    limit_rows = HALF * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, score_layout))
    no_scores = gl.zeros([ROWS, BLOCK], gl.float32, layout=score_layout)
    entry, turn = 0, 0
    if HALF == 1:
        alternate("arrive", 0)

    tile, end = first_tile_of(tiles_ptr, first_tile, last_tile)
    count = gl.maximum(gl.load(count_ptr + tile), 1)
    list_ptr = index_ptr + gl.cast(tile, gl.int64) * capacity + count - 1
    last_block = gl.load(list_ptr)
    if limit_ptr is None:
        length = gl.cast(gl.load(length_ptr + tile // query_blocks // heads), gl.int32)
    else:
        limit, whole, second = load_limits(
            limit_ptr, spans_ptr, list_ptr, tile, count, heads, query_blocks, limit_rows, BLOCK
        )
    rows = (tile % query_blocks) * BLOCK + half_rows
    order = load_order(order_ptr, tile // query_blocks, tokens, rows)
    queries = load_queries(
        q_ptr, stride_batch, stride_head, stride_token, order, tile, rows < tokens, heads, query_blocks, channels
    )
    while tile < end:
        following = claimed_tile(tiles_ptr, tile, tile_ring, tile_full, turn, STAGES + 1)
        turn += 1
        target = gl.cast(tile // query_blocks, gl.int64) * tokens + order
        stored = rows < tokens
        if limit_ptr is None:
            present = length - last_block * BLOCK
        # The last tile has itself for the next one.
        next_tile = gl.where(following < end, following, tile)
        next_count = gl.maximum(gl.load(count_ptr + next_tile), 1)
        rows = (next_tile % query_blocks) * BLOCK + half_rows
        order = load_order(order_ptr, next_tile // query_blocks, tokens, rows)

        query_operand = gl.convert_layout(
            gl.convert_layout(gl.convert_layout(queries, swapped_layout), out_layout), query_layout
        )
        stage = entry % STAGES
        mbarrier.wait(k_full.index(stage), (entry // STAGES) & 1)
        k_block = k_ring.index(stage).reshape([BLOCK, CHANNELS]).permute((1, 0))
        scores = warpgroup_mma(query_operand, k_block, no_scores, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        if limit_ptr is None:
            scores = gl.where(columns[None, :] < present, scores, float("-inf"))
            running_max = gl.max(scores, 1) * scale_log2
            running_max = gl.where(running_max == float("-inf"), 0.0, running_max)  # an entry whose keys are all masked
        else:  # a limit is never beyond the length, and a row may see none of this block, but of the next ones
            scores = hide(scores, limit - last_block * BLOCK, columns)
            running_max = gl.maximum(gl.max(scores, 1) * scale_log2, LOWEST)
        weights = gl.exp2(scores * scale_log2 - running_max[:, None])
        running_sum = gl.sum(weights, 1)
        operand = gl.convert_layout(weights.to(DTYPE), weight_layout)
        accumulator = gl.zeros([ROWS, CHANNELS], gl.float32, layout=out_layout)

        for slot in range(1, count):
            stage = (entry + 1) % STAGES
            mbarrier.wait(k_full.index(stage), ((entry + 1) // STAGES) & 1)
            k_block = k_ring.index(stage).reshape([BLOCK, CHANNELS]).permute((1, 0))
            alternate("sync", HALF)
            scores = warpgroup_mma(query_operand, k_block, no_scores, use_acc=False, is_async=True)
            v_stage = entry % STAGES
            mbarrier.wait(v_full.index(v_stage), (entry // STAGES) & 1)
            v_block = v_ring.index(v_stage).reshape([BLOCK, CHANNELS])
            accumulator = warpgroup_mma(operand, v_block, accumulator, is_async=True)
            alternate("arrive", 1 - HALF)
            scores = warpgroup_mma_wait(1, deps=(scores,))
            mbarrier.arrive(k_empty.index(stage), count=1)
            if limit_ptr is None:
                peak = gl.max(scores, 1)
            elif second >= whole:
                scores = hide(scores, limit - second * BLOCK, columns)
                second = gl.load(list_ptr - slot - 1, mask=slot + 1 < count, other=-1)
                peak = gl.max(scores, 1)
            else:  # behind the branch the maximum would wait for the product with V
                peak = gl.max(scores, 1)
            new_max = gl.maximum(running_max, peak * scale_log2)
            weights = gl.exp2(scores * scale_log2 - new_max[:, None])
            shrink = gl.exp2(running_max - new_max)
            running_sum = running_sum * shrink + gl.sum(weights, 1)
            running_max = new_max
            accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
            mbarrier.arrive(v_empty.index(v_stage), count=1)
            operand = gl.convert_layout(weights.to(DTYPE), weight_layout)
            accumulator = accumulator * gl.convert_layout(shrink, out_rows)[:, None]
            entry += 1

        list_ptr = index_ptr + gl.cast(next_tile, gl.int64) * capacity + next_count - 1
        last_block = gl.load(list_ptr)
        if limit_ptr is None:
            length = gl.cast(gl.load(length_ptr + next_tile // query_blocks // heads), gl.int32)
        else:
            limit, whole, second = load_limits(
                limit_ptr, spans_ptr, list_ptr, next_tile, next_count, heads, query_blocks, limit_rows, BLOCK
            )
        count = next_count
        queries = load_queries(
            q_ptr, stride_batch, stride_head, stride_token, order, next_tile, rows < tokens, heads, query_blocks,
            channels,
        )  # fmt: skip
        v_stage = entry % STAGES
        mbarrier.wait(v_full.index(v_stage), (entry // STAGES) & 1)
        v_block = v_ring.index(v_stage).reshape([BLOCK, CHANNELS])
        alternate("sync", HALF)
        accumulator = warpgroup_mma(operand, v_block, accumulator, is_async=True)
        alternate("arrive", 1 - HALF)
        lse = gl.convert_layout((running_max + gl.log2(running_sum)) * LN_2, out_rows)
        divisor = gl.convert_layout(gl.where(running_sum == 0.0, 1.0, running_sum), out_rows)
        gl.store(lse_ptr + target, gl.convert_layout(lse, wide_rows), mask=stored)
        accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
        mbarrier.arrive(v_empty.index(v_stage), count=1)
        accumulator = accumulator / divisor[:, None]
        out = gl.convert_layout(gl.convert_layout(accumulator.to(DTYPE), swapped_layout), wide_layout)
        gl.store(
            out_ptr + target[:, None] * CHANNELS + channels[None, :],
            out,
            mask=stored[:, None],
        )
        entry += 1
        tile = following


@gluon.jit(do_not_specialize=SIZES)
def attention_kernel(
    q_ptr, stride_batch, stride_head, stride_token, k_descriptor, v_descriptor,
    index_ptr, count_ptr, tiles_ptr, order_ptr, length_ptr, limit_ptr, spans_ptr, out_ptr, lse_ptr,
    first_tile, last_tile, query_blocks, capacity, heads, groups, tokens, scale_log2,
    BLOCK: gl.constexpr, CHANNELS: gl.constexpr, STAGES: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    """Persistent block-sparse attention; see `baatt.kernels.hopper.sparse_attention`."""
    k_ring = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK, CHANNELS], k_descriptor.layout)
    v_ring = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK, CHANNELS], v_descriptor.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    tile_ring = gl.allocate_shared_memory(gl.int32, [STAGES + 1, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    tile_full = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES + 1):
        mbarrier.init(tile_full.index(slot), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    gl.warp_specialize(
        [
            (
                consume,
                (
                    q_ptr, stride_batch, stride_head, stride_token, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
                    tile_ring, tile_full, index_ptr, count_ptr, tiles_ptr, order_ptr, length_ptr, limit_ptr, spans_ptr,
                    out_ptr, lse_ptr, first_tile, last_tile, query_blocks, capacity, heads, tokens, scale_log2,
                    0, BLOCK, CHANNELS, STAGES, DTYPE,
                ),
            ),
            (
                consume,
                (
                    q_ptr, stride_batch, stride_head, stride_token, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
                    tile_ring, tile_full, index_ptr, count_ptr, tiles_ptr, order_ptr, length_ptr, limit_ptr, spans_ptr,
                    out_ptr, lse_ptr, first_tile, last_tile, query_blocks, capacity, heads, tokens, scale_log2,
                    1, BLOCK, CHANNELS, STAGES, DTYPE,
                ),
            ),
            (
                produce,
                (
                    k_descriptor, v_descriptor, k_ring, v_ring, k_full, k_empty, v_full, v_empty, tile_ring, tile_full,
                    index_ptr, count_ptr, tiles_ptr, first_tile, last_tile, query_blocks, capacity, heads, groups,
                    BLOCK, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
