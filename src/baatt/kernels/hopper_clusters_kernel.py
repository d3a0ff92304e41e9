"""The Gluon kernels that cluster blocks of 128 tokens, behind `hopper_clusters`: one finds the centres, one refines.

The first keeps the products of a block's tokens in shared memory, where a farthest-point step reads one row of them and
needs no arithmetic over channels; the second needs little of it, so that many blocks are under way at once. A program
takes a block of queries or, behind those, of keys.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from baatt.kernels.gluon_names import barrier, load_rows, view_as
from baatt.kernels.launching import SIZES

TILE = gl.constexpr(128)


@gluon.jit
def find_tokens(
    x_ptr, stride_batch, stride_head, stride_token, order_ptr, order_batch, order_head, order_token, length_ptr, heads,
    tokens, program, places,
):  # fmt: skip
    """Of a program's block: its head, where the tokens are in it, how many, and the block's place among the sizes."""
    blocks = gl.cdiv(tokens, TILE)
    block, row = program % blocks, program // blocks
    entry, head = gl.cast(row // heads, gl.int64), gl.cast(row % heads, gl.int64)
    count = gl.minimum(gl.maximum(gl.load(length_ptr + entry) - block * TILE, 0), TILE).to(gl.int32)
    source = (block * TILE + places).to(gl.int64)
    if order_ptr is not None:
        order_ptr += entry * order_batch + head * order_head
        source = gl.load(order_ptr + source * order_token, mask=places < count, other=0)
    return x_ptr + entry * stride_batch + head * stride_head, source * stride_token, count, entry * blocks + block


@gluon.jit
def load_tokens(
    q_ptr, q_batch, q_head, q_token, query_order_ptr, query_order_batch, query_order_head, query_order_token,
    query_length_ptr, heads, query_tokens, k_ptr, k_batch, k_head, k_token, key_order_ptr, key_order_batch,
    key_order_head, key_order_token, key_length_ptr, groups, key_tokens, query_programs, x,
    CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Begin to copy the tokens of this program's block, of q or after those of k, to `x`, 0 where there is none.

    Returns how many there are and the place that `find_tokens` says.
    """
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // CHANNELS, CHANNELS // 8], [WARPS, 1], [1, 0])
    places = gl.arange(0, TILE, layout=gl.SliceLayout(1, wide))
    channels = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, wide))
    program = gl.program_id(0)
    if program < query_programs:
        x_ptr, source, count, size_place = find_tokens(
            q_ptr, q_batch, q_head, q_token, query_order_ptr, query_order_batch, query_order_head, query_order_token,
            query_length_ptr, heads, query_tokens, program, places,
        )  # fmt: skip
    else:
        x_ptr, source, count, size_place = find_tokens(
            k_ptr, k_batch, k_head, k_token, key_order_ptr, key_order_batch, key_order_head, key_order_token,
            key_length_ptr, groups, key_tokens, program - query_programs, places,
        )  # fmt: skip
    present = (places < count)[:, None]
    load_rows(x, x_ptr + source[:, None] + channels[None, :], mask=present)
    async_copy.commit_group()
    return count, size_place


@gluon.jit(do_not_specialize=SIZES)
def centre_kernel(
    q_ptr, q_batch, q_head, q_token, query_order_ptr, query_order_batch, query_order_head, query_order_token,
    query_length_ptr, heads, query_tokens, k_ptr, k_batch, k_head, k_token, key_order_ptr, key_order_batch,
    key_order_head, key_order_token, key_length_ptr, groups, key_tokens, query_programs,
    centre_ptr, nearest_ptr, clusters,
    CHANNELS: gl.constexpr, DTYPE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """C1 for one block of 128 tokens: the places of the centres, and for every token the centre nearest to it."""
    BLOCK: gl.constexpr = TILE
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK, 16])
    # Every warp has all 128 tokens: a step needs no barrier.
    line: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    # Rows eight numbers longer: what the threads of a product store at a time then meets all banks.
    padded: gl.constexpr = gl.PaddedSharedLayout.with_identity_for([[128, 8]], [128, 128], [1, 0])
    padded_row: gl.constexpr = gl.PaddedSharedLayout.with_identity_for([[128, 8]], [1, 128], [1, 0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    diagonal = gl.allocate_shared_memory(gl.float32, [BLOCK], plain)
    row_sums = gl.allocate_shared_memory(gl.float32, [BLOCK], plain)
    x = gl.allocate_shared_memory(
        DTYPE, [BLOCK, CHANNELS], gl.NVMMASharedLayout.get_default_for([BLOCK, CHANNELS], DTYPE)
    )
    count, _ = load_tokens(
        q_ptr, q_batch, q_head, q_token, query_order_ptr, query_order_batch, query_order_head, query_order_token,
        query_length_ptr, heads, query_tokens, k_ptr, k_batch, k_head, k_token, key_order_ptr, key_order_batch,
        key_order_head, key_order_token, key_length_ptr, groups, key_tokens, query_programs, x,
        CHANNELS, WARPS,
    )  # fmt: skip
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()
    gram = warpgroup_mma(
        x, x.permute((1, 0)), gl.zeros([BLOCK, BLOCK], gl.float32, layout=square), use_acc=False, is_async=True
    )
    gram = warpgroup_mma_wait(0, deps=(gram,))
    lower = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, square))
    upper = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, square))
    diagonal.store(gl.sum(gl.where(lower[:, None] == upper[None, :], gram, 0.0), 1))
    row_sums.store(gl.sum(gram, 1))
    barrier()
    # Where the tokens were, whose last use is over: one after the other they fit three times on a multiprocessor.
    whole = gl.allocate_shared_memory(gl.float32, [BLOCK, BLOCK], padded)
    whole.store(gram)
    rows = view_as(whole, gl.float32, [BLOCK, 1, BLOCK], padded_row)
    norm_rows = view_as(diagonal, gl.float32, [BLOCK, 1], plain)
    barrier()

    places = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, line))
    norms = diagonal.load(gl.SliceLayout(0, line))
    # Nearest to the mean: its distance to all tokens together is the least.
    away = norms - row_sums.load(gl.SliceLayout(0, line)) * (2.0 / gl.maximum(count, 1).to(gl.float32))
    away = gl.where(places < count, away, float("inf"))
    chosen = gl.min(gl.where(away == gl.min(away, 0), places, BLOCK - 1), 0)
    nearest = gl.where(places < count, float("inf"), -1.0)
    belongs = gl.zeros([BLOCK], gl.int32, layout=gl.SliceLayout(0, line))
    program = gl.cast(gl.program_id(0), gl.int64)
    for cluster in range(0, clusters):
        gl.store(centre_ptr + program * clusters + cluster, chosen)
        norm = gl.sum(norm_rows.index(chosen).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)
        distance = gl.maximum(norms + norm - 2.0 * gl.sum(rows.index(chosen).load(line), 0), 0.0)
        belongs = gl.where(distance < nearest, cluster, belongs)
        nearest = gl.minimum(nearest, distance)
        # The bits of floats that are not negative are in their order, and integers have an instruction for a warp.
        bits = nearest.to(gl.int32, bitcast=True)
        chosen = gl.min(gl.where(bits == gl.max(bits, 0), places, BLOCK - 1), 0)
    gl.store(nearest_ptr + program * BLOCK + places, belongs.to(gl.int8))


@gluon.jit(do_not_specialize=SIZES)
def refine_kernel(
    q_ptr, q_batch, q_head, q_token, query_order_ptr, query_order_batch, query_order_head, query_order_token,
    query_length_ptr, heads, query_tokens, k_ptr, k_batch, k_head, k_token, key_order_ptr, key_order_batch,
    key_order_head, key_order_token, key_length_ptr, groups, key_tokens, query_programs,
    centre_ptr, nearest_ptr, mean_ptr, number_ptr, query_size_ptr, key_size_ptr, clusters, refinements,
    CHANNELS: gl.constexpr, CLUSTERS: gl.constexpr, DTYPE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """C2 for one block of 128 tokens: means of the clusters, moved by Lloyd's rounds."""
    BLOCK: gl.constexpr = TILE
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, CLUSTERS, 16])
    twice: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 2 * CLUSTERS, 16])
    places = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, narrow))
    slots = gl.arange(0, CLUSTERS, layout=gl.SliceLayout(0, narrow))
    program = gl.cast(gl.program_id(0), gl.int64)
    slot = gl.load(nearest_ptr + program * BLOCK + places).to(gl.int32)
    centres = gl.load(centre_ptr + program * clusters + slots, mask=slots < clusters, other=BLOCK)
    x = gl.allocate_shared_memory(
        DTYPE, [BLOCK, CHANNELS], gl.NVMMASharedLayout.get_default_for([BLOCK, CHANNELS], DTYPE)
    )
    count, size_place = load_tokens(
        q_ptr, q_batch, q_head, q_token, query_order_ptr, query_order_batch, query_order_head, query_order_token,
        query_length_ptr, heads, query_tokens, k_ptr, k_batch, k_head, k_token, key_order_ptr, key_order_batch,
        key_order_head, key_order_token, key_length_ptr, groups, key_tokens, query_programs, x,
        CHANNELS, WARPS,
    )  # fmt: skip
    some = gl.allocate_shared_memory(
        DTYPE, [BLOCK, CLUSTERS], gl.NVMMASharedLayout.get_default_for([BLOCK, CLUSTERS], DTYPE)
    )
    parts = gl.allocate_shared_memory(
        DTYPE, [CHANNELS, 2 * CLUSTERS], gl.NVMMASharedLayout.get_default_for([CHANNELS, 2 * CLUSTERS], DTYPE)
    )
    # What the warps have of a sum over all of them, read after a barrier that is there anyway.
    numbers = gl.allocate_shared_memory(gl.int32, [WARPS, CLUSTERS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    lengths = gl.allocate_shared_memory(gl.float32, [WARPS, CLUSTERS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    async_copy.wait_group(0)
    taken = (slot[:, None] == slots[None, :]) & (places < count)[:, None]
    sums, number = add_members(x, some, numbers, taken, CHANNELS, CLUSTERS, DTYPE, WARPS, narrow)
    points = sums / gl.maximum(number, 1).to(gl.float32)[None, :]
    if gl.min(gl.where(slots < clusters, number, 1), 0) == 0:  # a cluster without tokens stays at its centre
        barrier()  # the sums above are done in all warps
        taken = (places[:, None] == centres[None, :]) & (places < count)[:, None]
        at_centre, _ = add_members(x, some, numbers, taken, CHANNELS, CLUSTERS, DTYPE, WARPS, narrow)
        points = gl.where(number[None, :] > 0, points, at_centre)
    for _ in range(0, refinements):
        # Means in two parts of the tokens' precision, side by side: one alone would move near ties.
        high = points.to(DTYPE)
        low = (points - high.to(gl.float32)).to(DTYPE)
        both = gl.join(high, low).permute((0, 2, 1)).reshape([CHANNELS, 2 * CLUSTERS])
        parts.store(both)
        lengths.store(sums_of_warps(points * points, CHANNELS, CLUSTERS, WARPS))
        fence_async_shared()
        barrier()
        products = gl.zeros([BLOCK, 2 * CLUSTERS], gl.float32, layout=twice)
        products = warpgroup_mma(x, parts, products, use_acc=False, is_async=True)
        squares = gl.where(slots < clusters, add_warps(lengths, gl.float32, CLUSTERS, WARPS, narrow), float("inf"))
        products = warpgroup_mma_wait(0, deps=(products,))
        product = gl.convert_layout(gl.sum(products.reshape([BLOCK, 2, CLUSTERS]), 1), narrow)
        far = squares[None, :] - 2.0 * product
        slot = gl.min(gl.where(far == gl.min(far, 1)[:, None], slots[None, :], CLUSTERS), 1)
        taken = (slot[:, None] == slots[None, :]) & (places < count)[:, None]
        sums, number = add_members(x, some, numbers, taken, CHANNELS, CLUSTERS, DTYPE, WARPS, narrow)
        points = gl.where(number[None, :] > 0, sums / gl.maximum(number, 1).to(gl.float32)[None, :], points)

    target = program * clusters
    gl.store(number_ptr + target + slots, number.to(gl.int64), mask=slots < clusters)
    # Every head writes the same.
    if gl.program_id(0) < query_programs:
        gl.store(query_size_ptr + size_place, count.to(gl.int64))
    else:
        gl.store(key_size_ptr + size_place, count.to(gl.int64))
    mean = gl.where(number[None, :] > 0, points, 0.0).to(DTYPE)
    down: gl.constexpr = gl.BlockedLayout([8, 1], [CHANNELS // 8, 256 // CHANNELS], [1, WARPS], [0, 1])
    mean = gl.convert_layout(mean, down)
    depth = gl.arange(0, CHANNELS, layout=gl.SliceLayout(1, down))
    slots = gl.arange(0, CLUSTERS, layout=gl.SliceLayout(0, down))
    offsets = (target + slots)[None, :] * CHANNELS + depth[:, None]
    gl.store(mean_ptr + offsets, mean, mask=(slots < clusters)[None, :])


@gluon.jit
def sums_of_warps(values, LENGTH: gl.constexpr, CLUSTERS: gl.constexpr, WARPS: gl.constexpr):
    """What each warp has of the sums over the first axis of `values` [LENGTH, CLUSTERS] of a product's layout."""
    return gl.sum(gl.sum(values.reshape([LENGTH // (16 * WARPS), WARPS, 16, CLUSTERS]), 2), 0)


@gluon.jit
def add_warps(parts, KIND: gl.constexpr, CLUSTERS: gl.constexpr, WARPS: gl.constexpr, layout: gl.constexpr):
    """The sums [CLUSTERS] of what `sums_of_warps` left in shared memory."""
    rows = view_as(parts, KIND, [WARPS, 1, CLUSTERS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    total = gl.zeros([CLUSTERS], KIND, layout=gl.SliceLayout(0, layout))
    for warp in gl.static_range(WARPS):
        total += gl.sum(rows.index(warp).load(layout), 0)
    return total


@gluon.jit
def add_members(
    x, some, numbers, taken, CHANNELS: gl.constexpr, CLUSTERS: gl.constexpr, DTYPE: gl.constexpr, WARPS: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """Sums [CHANNELS, CLUSTERS] of the tokens of `x` that are `taken` [BLOCK, CLUSTERS]; their numbers.

    Who calls it again sees to it that all warps have their sums by then.
    """
    some.store(taken.to(DTYPE))
    numbers.store(sums_of_warps(taken.to(gl.int32), TILE, CLUSTERS, WARPS))
    fence_async_shared()
    barrier()
    sums = gl.zeros([CHANNELS, CLUSTERS], gl.float32, layout=layout)
    sums = warpgroup_mma(x.permute((1, 0)), some, sums, use_acc=False, is_async=True)
    number = add_warps(numbers, gl.int32, CLUSTERS, WARPS, layout)
    sums = warpgroup_mma_wait(0, deps=(sums,))
    return sums, number
