"""The Gluon kernel that compares clusters, behind `hopper_clusters`: C3 to C5.

Its parts are those of the attention kernel: a producer brings in tiles of key clusters, consumers multiply each 64 rows
of query clusters with them, one after the other, so that the product of one runs while others sum up theirs. Sums of
exponentials stay in scratch memory until a row is through.

With sight a tile ends with the last key block that one of its query blocks sees, and only the steps since the first
that one of them does not see have a mask. Later query blocks take longer, so tiles go out by descending length: those
of all heads, then the next shorter ones, every other round the other way about, so that whoever had the longest of a
round has the shortest of the next. Some tiles of a head are always under way together and share its keys in L2.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from baatt.kernels.gluon_names import barrier
from baatt.kernels.hopper_kernel import load_block
from baatt.kernels.launching import SIZES

TILE = gl.constexpr(128)
#: Warpgroups that multiply; 64 rows of query clusters each. While one waits for its product others sum up theirs.
CONSUMERS = gl.constexpr(3)
LOWEST = gl.constexpr(-3.4028234663852886e38)


@gluon.constexpr_function
def sums_layout(key_clusters, steps=1):
    """Of the sums [64, steps * 128 / key_clusters] of rows and key blocks, as the threads of a product have them.

    Columns 8 n + 2 t and 8 n + 2 t + 1 of a product are with thread t of 4, for every n; the clusters of a tile of keys
    stand so that those of thread t are its 32 / key_clusters blocks.
    """
    alone = 32 // key_clusters
    own = [[0, 1 << bit] for bit in range(alone.bit_length() - 1)]
    later = [[0, 4 * alone << bit] for bit in range(steps.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[*own, [8, 0], *later],
        lane_bases=[[0, alone], [0, 2 * alone], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, steps * 4 * alone],
    )


@gluon.constexpr_function
def scores_layout(query_clusters, key_clusters, steps):
    """Of scores [64 / query_clusters, ...] where a maximum over the rows of a query block leaves them."""
    alone = 32 // key_clusters

    def row(place):
        return [place // query_clusters, 0]

    own = [[0, 1 << bit] for bit in range(alone.bit_length() - 1)]
    later = [[0, 4 * alone << bit] for bit in range(steps.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[*own, *([row(8)] if query_clusters <= 8 else []), *later],
        lane_bases=[[0, alone], [0, 2 * alone], row(1), row(2), row(4)],
        warp_bases=[row(16), row(32)],
        block_bases=[],
        shape=[64 // query_clusters, steps * 4 * alone],
    )


@gluon.jit
def place_of(tile, programs, tiles, head_tiles, spans_ptr):
    """Which row of [B * H], and which of its tiles, a program takes: each has every number of a round of `programs`."""
    head_entry, part = tile // head_tiles, tile % head_tiles
    if spans_ptr is not None:
        turn = tile // programs
        if (turn % 2 == 1) & ((turn + 1) * programs <= tiles):
            tile = (2 * turn + 1) * programs - 1 - tile
        all_heads = tiles // head_tiles
        head_entry, part = tile % all_heads, head_tiles - 1 - tile // all_heads
    return head_entry, part


@gluon.jit
def steps_of(
    spans_ptr, stride_spans, batch_entry, part, query_blocks, key_blocks, steps, WARPS: gl.constexpr,
    QUERY_CLUSTERS: gl.constexpr, KEY_CLUSTERS: gl.constexpr,
):  # fmt: skip
    """Steps of a tile that need no mask, and all: up to what its query blocks see."""
    plain, last = steps, steps
    if spans_ptr is not None:
        TILE_BLOCKS: gl.constexpr = CONSUMERS * 64 // QUERY_CLUSTERS
        KEY_BLOCKS: gl.constexpr = TILE // KEY_CLUSTERS
        every_warp: gl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0]))
        own = gl.arange(0, 64, layout=every_warp)
        blocks = part * TILE_BLOCKS + own
        inside = (own < TILE_BLOCKS) & (blocks < query_blocks)
        spans_ptr += gl.cast(batch_entry, gl.int64) * stride_spans
        seen = gl.load(spans_ptr + blocks * 4 + 3, mask=inside, other=0)
        last = (gl.max(seen, 0) + KEY_BLOCKS - 1) // KEY_BLOCKS
        # What a query block that sees nothing scores does not matter; where none sees anything there are no steps.
        plain = gl.minimum(gl.min(gl.where(seen > 0, seen, key_blocks), 0) // KEY_BLOCKS, last)
    return plain, last


@gluon.jit
def produce(
    descriptor, ring, full, empty, spans_ptr, stride_spans, tiles, head_tiles, heads, groups, query_blocks, key_blocks,
    steps, QUERY_CLUSTERS: gl.constexpr, KEY_CLUSTERS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """The producer warp: the tiles of key clusters of a head, again for every tile of rows."""
    entry = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        head_entry, part = place_of(tile, gl.num_programs(0), tiles, head_tiles, spans_ptr)
        batch_entry, group = head_entry // heads, head_entry % heads // (heads // groups)
        _, last = steps_of(
            spans_ptr, stride_spans, batch_entry, part, query_blocks, key_blocks, steps, 1, QUERY_CLUSTERS, KEY_CLUSTERS
        )
        for step in range(0, last):
            load_block(descriptor, batch_entry, group, step, full, empty, ring, entry, TILE, STAGES)
            entry += 1


@gluon.jit
def consume(
    sides, PART: gl.constexpr, CHANNELS: gl.constexpr, QUERY_CLUSTERS: gl.constexpr, KEY_CLUSTERS: gl.constexpr,
    PEAK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 rows of query clusters of every tile, of whole query blocks."""
    (
        q_ptr, stride_batch, stride_head, stride_block, q_tokens_ptr, q_rows, ring, full, empty, turn, number_ptr,
        spans_ptr, stride_spans, scores_ptr, scratch_ptr, tiles, head_tiles, heads, groups, query_blocks, key_blocks,
        steps, clusters, scale_log2,
    ) = sides  # fmt: skip
    ROWS: gl.constexpr = 64
    BLOCKS: gl.constexpr = ROWS // QUERY_CLUSTERS
    KEY_BLOCKS: gl.constexpr = TILE // KEY_CLUSTERS
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // CHANNELS, CHANNELS // 8], [4, 1], [1, 0])
    summed: gl.constexpr = sums_layout(KEY_CLUSTERS)
    rows_products: gl.constexpr = gl.SliceLayout(1, products)
    rows_summed: gl.constexpr = gl.SliceLayout(1, summed)
    rows_wide = gl.arange(0, ROWS, layout=gl.SliceLayout(1, wide))
    channels = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, wide))
    rows = gl.arange(0, ROWS, layout=rows_summed)
    columns = gl.arange(0, TILE, layout=gl.SliceLayout(0, products))
    key_places = gl.arange(0, KEY_BLOCKS, layout=gl.SliceLayout(0, summed))
    rows_masked = gl.arange(0, ROWS, layout=rows_products)
    # Which of the key blocks of a tile a column belongs to, see `hopper_clusters._tile_kernel`.
    column_blocks = (columns % 8 // 2 * (TILE // 4) + columns // 8 * 2 + columns % 2) // KEY_CLUSTERS
    nothing = gl.zeros([ROWS, TILE], gl.float32, layout=products)
    # Of each step the sums of its rows and key blocks, then, of all steps, what those sums are relative to.
    scratch_ptr += (gl.cast(gl.program_id(0), gl.int64) * CONSUMERS + PART) * ROWS * steps * (KEY_BLOCKS + 1)
    maxima_ptr = scratch_ptr + ROWS * steps * KEY_BLOCKS
    sums_ptrs = scratch_ptr + rows[:, None] * KEY_BLOCKS + key_places[None, :]
    # A product takes its rows from shared memory: from registers it would be issued in pieces between other work.
    own = q_rows.index(PART)
    entry = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        head_entry, part = place_of(tile, gl.num_programs(0), tiles, head_tiles, spans_ptr)
        head_entry = gl.cast(head_entry, gl.int64)
        first_block = (part * CONSUMERS + PART) * BLOCKS
        blocks, cluster = first_block + rows_wide // QUERY_CLUSTERS, rows_wide % QUERY_CLUSTERS
        present = (blocks < query_blocks) & (cluster < clusters)
        q_offset = (head_entry // heads) * stride_batch + (head_entry % heads) * stride_head
        offsets = blocks.to(gl.int64) * stride_block + cluster * CHANNELS
        queries = gl.load(q_ptr + q_offset + offsets[:, None] + channels[None, :], mask=present[:, None], other=0.0)
        barrier()  # the products with the rows before are done in all warps
        own.store(queries)
        fence_async_shared()
        barrier()
        key_entry = head_entry // heads * groups + head_entry % heads // (heads // groups)
        number_ptrs = number_ptr + key_entry * steps * TILE + columns
        if spans_ptr is not None:
            row_blocks = first_block + rows_masked // QUERY_CLUSTERS
            seen_ptrs = spans_ptr + head_entry // heads * stride_spans + row_blocks * 4 + 3
            seen = gl.load(seen_ptrs, mask=row_blocks < query_blocks, other=0)
        running_max = gl.full([ROWS], LOWEST, gl.float32, layout=rows_products)
        running_sum = gl.zeros([ROWS], gl.float32, layout=rows_products)
        plain, last = steps_of(
            spans_ptr, stride_spans, head_entry // heads, part, query_blocks, key_blocks, steps, 4, QUERY_CLUSTERS,
            KEY_CLUSTERS,
        )  # fmt: skip
        for masked in gl.static_range(1 if spans_ptr is None else 2):
            for step in range(plain if masked else 0, last if masked else plain):
                number = gl.load(number_ptrs + step * TILE)
                mbarrier.wait(full.index(entry % STAGES), (entry // STAGES) & 1)
                keys = ring.index(entry % STAGES).reshape([TILE, CHANNELS]).permute((1, 0))
                # In turn, so that the products of one warpgroup run beside the exponentials of the others.
                mbarrier.wait(turn.index(PART), (entry & 1) ^ (1 if PART == 0 else 0))
                scores = warpgroup_mma(own, keys, nothing, use_acc=False, is_async=True)
                mbarrier.arrive(turn.index((PART + 1) % CONSUMERS), count=1)
                scores = warpgroup_mma_wait(0, deps=(scores,))
                mbarrier.arrive(empty.index(entry % STAGES), count=1)
                entry += 1
                if masked:
                    visible = (seen - step * KEY_BLOCKS)[:, None]
                    scores = gl.where(column_blocks[None, :] < visible, scores, float("-inf"))
                running_max, running_sum, sums = add_up(
                    scores, number, running_max, running_sum, scale_log2, ROWS, KEY_BLOCKS, KEY_CLUSTERS, summed
                )
                gl.store(sums_ptrs + step * (ROWS * KEY_BLOCKS), sums)
                gl.store(maxima_ptr + step * ROWS + rows, gl.convert_layout(running_max, rows_summed))
        barrier()  # other threads read the maxima
        write_scores(
            scratch_ptr, maxima_ptr, running_max, running_sum, q_tokens_ptr + head_entry * query_blocks * clusters,
            scores_ptr + head_entry * query_blocks * key_blocks, first_block, query_blocks, key_blocks, steps, last,
            clusters, PEAK, ROWS, QUERY_CLUSTERS, KEY_CLUSTERS,
        )  # fmt: skip
        barrier()


@gluon.jit
def add_up(
    scores, number, running_max, running_sum, scale_log2,
    ROWS: gl.constexpr, KEY_BLOCKS: gl.constexpr, KEY_CLUSTERS: gl.constexpr, summed: gl.constexpr,
):  # fmt: skip
    """C3 and the sums of exponentials [ROWS, KEY_BLOCKS] of a tile, relative to the row's maximum so far."""
    new_max = gl.maximum(running_max, gl.max(scores, 1) * scale_log2)
    shares = gl.exp2(scores * scale_log2 - new_max[:, None]) * number[None, :]
    shares = shares.reshape([ROWS, 16, 4, 2]).permute((0, 2, 1, 3)).reshape([ROWS, KEY_BLOCKS, KEY_CLUSTERS])
    sums = gl.convert_layout(gl.sum(shares, 2), summed)
    total = gl.convert_layout(gl.sum(sums, 1), running_sum.type.layout)
    return new_max, running_sum * gl.exp2(running_max - new_max) + total, sums


@gluon.jit
def write_scores(
    sums_ptr, maxima_ptr, maximum, total, q_tokens_ptr, scores_ptr, first_block, query_blocks, key_blocks, steps, last,
    clusters,
    PEAK: gl.constexpr, ROWS: gl.constexpr, QUERY_CLUSTERS: gl.constexpr, KEY_CLUSTERS: gl.constexpr,
):  # fmt: skip
    """C4 and C5: shares from the sums, their peak, or mean, over the rows of a query block; many tiles at a time."""
    STEPS: gl.constexpr = 8
    BLOCKS: gl.constexpr = ROWS // QUERY_CLUSTERS
    KEY_BLOCKS: gl.constexpr = TILE // KEY_CLUSTERS
    summed: gl.constexpr = sums_layout(KEY_CLUSTERS, STEPS)
    scored: gl.constexpr = scores_layout(QUERY_CLUSTERS, KEY_CLUSTERS, STEPS)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, summed))
    row_blocks, cluster = first_block + rows // QUERY_CLUSTERS, rows % QUERY_CLUSTERS
    inside = (row_blocks < query_blocks) & (cluster < clusters)
    number = gl.load(q_tokens_ptr + row_blocks * clusters + cluster, mask=inside, other=0).to(gl.float32)
    maximum = gl.convert_layout(maximum, gl.SliceLayout(1, summed))
    total = gl.convert_layout(total, gl.SliceLayout(1, summed))
    factor = 1.0 / gl.where(total == 0.0, 1.0, total)
    blocks = first_block + gl.arange(0, BLOCKS, layout=gl.SliceLayout(1, scored))
    if PEAK:
        factor = gl.where(number > 0.0, factor, 0.0)
    else:
        of_block = gl.convert_layout(gl.sum(number.reshape([BLOCKS, QUERY_CLUSTERS]), 1), gl.SliceLayout(1, scored))
        of_block = gl.maximum(of_block, 1.0)
        factor = factor * number
    sources = gl.arange(0, STEPS * KEY_BLOCKS, layout=gl.SliceLayout(0, summed))
    targets = gl.arange(0, STEPS * KEY_BLOCKS, layout=gl.SliceLayout(0, scored))
    end = last * KEY_BLOCKS
    for first in range(0, end, STEPS * KEY_BLOCKS):
        places = first + sources
        written = (places < end)[None, :]
        own = places // KEY_BLOCKS * (ROWS * KEY_BLOCKS) + places % KEY_BLOCKS
        sums = gl.load(sums_ptr + rows[:, None] * KEY_BLOCKS + own[None, :], mask=written, other=0.0)
        maxima = gl.load(
            maxima_ptr + (places // KEY_BLOCKS)[None, :] * ROWS + rows[:, None], mask=written, other=LOWEST
        )
        shares = sums * gl.exp2(maxima - maximum[:, None]) * factor[:, None]
        shares = shares.reshape([BLOCKS, QUERY_CLUSTERS, STEPS * KEY_BLOCKS])
        if PEAK:
            scores = gl.convert_layout(gl.max(shares, 1), scored)
        else:
            scores = gl.convert_layout(gl.sum(shares, 1), scored) / of_block[:, None]
        columns = first + targets
        wanted = (blocks < query_blocks)[:, None] & (columns < key_blocks)[None, :]
        gl.store(scores_ptr + blocks.to(gl.int64)[:, None] * key_blocks + columns[None, :], scores, mask=wanted)


@gluon.jit(do_not_specialize=SIZES)
def share_kernel(
    q_ptr, stride_batch, stride_head, stride_block, q_tokens_ptr, descriptor, number_ptr, spans_ptr, stride_spans,
    scores_ptr, scratch_ptr, tiles, head_tiles, heads, groups, query_blocks, key_blocks, steps, clusters, scale_log2,
    CHANNELS: gl.constexpr, QUERY_CLUSTERS: gl.constexpr, KEY_CLUSTERS: gl.constexpr, PEAK: gl.constexpr,
    STAGES: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Persistent: C3 to C5 for tiles of 64 * CONSUMERS rows of query clusters."""
    ring = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, TILE, CHANNELS], descriptor.layout)
    rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, CHANNELS], DTYPE)
    q_rows = gl.allocate_shared_memory(DTYPE, [CONSUMERS, 64, CHANNELS], rows)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for part in gl.static_range(CONSUMERS):
        mbarrier.init(turn.index(part), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    sides = (
        q_ptr, stride_batch, stride_head, stride_block, q_tokens_ptr, q_rows, ring, full, empty, turn, number_ptr,
        spans_ptr, stride_spans, scores_ptr, scratch_ptr, tiles, head_tiles, heads, groups, query_blocks, key_blocks,
        steps, clusters, scale_log2,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (consume, (sides, 0, CHANNELS, QUERY_CLUSTERS, KEY_CLUSTERS, PEAK, STAGES)),
            (consume, (sides, 1, CHANNELS, QUERY_CLUSTERS, KEY_CLUSTERS, PEAK, STAGES)),
            (consume, (sides, 2, CHANNELS, QUERY_CLUSTERS, KEY_CLUSTERS, PEAK, STAGES)),
            (
                produce,
                (
                    descriptor, ring, full, empty, spans_ptr, stride_spans, tiles, head_tiles, heads, groups,
                    query_blocks, key_blocks, steps, QUERY_CLUSTERS, KEY_CLUSTERS, STAGES,
                ),
            ),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )  # fmt: skip
