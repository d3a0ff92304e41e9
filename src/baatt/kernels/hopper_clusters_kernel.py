"""The Gluon kernels that cluster blocks of 128 tokens, behind `hopper_clusters`: one finds the centres, one refines.

The first keeps the distances inside a block in shared memory, where a farthest-point step reads one row of them; the
second needs little of it, so that many blocks are under way at once. Each product has the block as an operand.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

TILE = gl.constexpr(128)


@gluon.jit
def load_tokens(
    x_ptr, stride_batch, stride_head, stride_token, order_ptr, order_batch, order_head, order_token, length_ptr,
    heads, tokens, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The tokens of this program's block, 0 where there is none, and how many there are."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // CHANNELS, CHANNELS // 8], [WARPS, 1], [1, 0])
    blocks = gl.cdiv(tokens, TILE)
    block, row = gl.program_id(0) % blocks, gl.program_id(0) // blocks
    entry, head = gl.cast(row // heads, gl.int64), row % heads
    count = gl.minimum(gl.maximum(gl.load(length_ptr + entry) - block * TILE, 0), TILE).to(gl.int32)
    places = gl.arange(0, TILE, layout=gl.SliceLayout(1, wide))
    channels = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, wide))
    present = places < count
    order_ptr += entry * order_batch + head * order_head
    source = gl.load(order_ptr + (block * TILE + places).to(gl.int64) * order_token, mask=present, other=0)
    x_ptr += entry * stride_batch + head * stride_head
    return gl.load(x_ptr + source[:, None] * stride_token + channels[None, :], mask=present[:, None], other=0.0), count


@gluon.jit
def centre_kernel(
    x_ptr, stride_batch, stride_head, stride_token, order_ptr, order_batch, order_head, order_token, length_ptr,
    centre_ptr, nearest_ptr, heads, tokens, clusters,
    CHANNELS: gl.constexpr, DTYPE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """C1 for one block of 128 tokens: the places of the centres, and for every token the centre nearest to it."""
    BLOCK: gl.constexpr = TILE
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK, 16])
    # Every warp has all 128 tokens: a step needs no barrier.
    line: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    members, count = load_tokens(
        x_ptr, stride_batch, stride_head, stride_token, order_ptr, order_batch, order_head, order_token, length_ptr,
        heads, tokens, CHANNELS, WARPS,
    )  # fmt: skip
    whole = gl.allocate_shared_memory(gl.float32, [BLOCK, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    # The tokens stand where their distances will.
    x = whole._reinterpret(DTYPE, [BLOCK, CHANNELS], gl.NVMMASharedLayout.get_default_for([BLOCK, CHANNELS], DTYPE))
    x.store(members)
    fence_async_shared()
    gl.thread_barrier()
    gram = warpgroup_mma(
        x, x.permute((1, 0)), gl.zeros([BLOCK, BLOCK], gl.float32, layout=square), use_acc=False, is_async=True
    )
    gram = warpgroup_mma_wait(0, deps=(gram,))
    lower = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, square))
    upper = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, square))
    norms = gl.sum(gl.where(lower[:, None] == upper[None, :], gram, 0.0), 1)
    # Nearest to the mean: its distance to all tokens together is the least.
    away = gl.where(lower < count, norms - gl.sum(gram, 1) * (2.0 / gl.maximum(count, 1).to(gl.float32)), float("inf"))
    chosen = gl.min(gl.where(away == gl.min(away, 0), lower, BLOCK - 1), 0)
    distances = norms[:, None] + gl.convert_layout(norms, gl.SliceLayout(0, square))[None, :] - 2.0 * gram
    gl.thread_barrier()
    whole.store(gl.maximum(distances, 0.0))
    rows = whole._reinterpret(gl.float32, [BLOCK, 1, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    gl.thread_barrier()

    places = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, line))
    nearest = gl.where(places < count, float("inf"), -1.0)
    belongs = gl.zeros([BLOCK], gl.int32, layout=gl.SliceLayout(0, line))
    program = gl.cast(gl.program_id(0), gl.int64)
    for cluster in range(0, clusters):
        gl.store(centre_ptr + program * clusters + cluster, chosen)
        distance = gl.sum(rows.index(chosen).load(line), 0)
        belongs = gl.where(distance < nearest, cluster, belongs)
        nearest = gl.minimum(nearest, distance)
        # The bits of floats that are not negative are in their order, and integers have an instruction for a warp.
        bits = nearest.to(gl.int32, bitcast=True)
        chosen = gl.min(gl.where(bits == gl.max(bits, 0), places, BLOCK - 1), 0)
    gl.store(nearest_ptr + program * BLOCK + places, belongs.to(gl.int8))


@gluon.jit
def refine_kernel(
    x_ptr, stride_batch, stride_head, stride_token, order_ptr, order_batch, order_head, order_token, length_ptr,
    centre_ptr, nearest_ptr, mean_ptr, number_ptr, size_ptr, heads, tokens, clusters, refinements,
    CHANNELS: gl.constexpr, CLUSTERS: gl.constexpr, DTYPE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """C2 for one block of 128 tokens: means of the clusters, moved by Lloyd's rounds."""
    BLOCK: gl.constexpr = TILE
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, CLUSTERS, 16])
    twice: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 2 * CLUSTERS, 16])
    members, count = load_tokens(
        x_ptr, stride_batch, stride_head, stride_token, order_ptr, order_batch, order_head, order_token, length_ptr,
        heads, tokens, CHANNELS, WARPS,
    )  # fmt: skip
    places = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, narrow))
    slots = gl.arange(0, CLUSTERS, layout=gl.SliceLayout(0, narrow))
    program = gl.cast(gl.program_id(0), gl.int64)
    slot = gl.load(nearest_ptr + program * BLOCK + places).to(gl.int32)
    centres = gl.load(centre_ptr + program * clusters + slots, mask=slots < clusters, other=BLOCK)
    x = gl.allocate_shared_memory(
        DTYPE, [BLOCK, CHANNELS], gl.NVMMASharedLayout.get_default_for([BLOCK, CHANNELS], DTYPE)
    )
    some = gl.allocate_shared_memory(
        DTYPE, [BLOCK, CLUSTERS], gl.NVMMASharedLayout.get_default_for([BLOCK, CLUSTERS], DTYPE)
    )
    parts = gl.allocate_shared_memory(
        DTYPE, [CHANNELS, 2 * CLUSTERS], gl.NVMMASharedLayout.get_default_for([CHANNELS, 2 * CLUSTERS], DTYPE)
    )
    x.store(members)
    taken = (slot[:, None] == slots[None, :]) & (places < count)[:, None]
    sums, number = add_members(x, some, taken, CHANNELS, CLUSTERS, DTYPE, narrow)
    points = sums / gl.maximum(number, 1).to(gl.float32)[None, :]
    if gl.min(gl.where(slots < clusters, number, 1), 0) == 0:  # a cluster without tokens stays at its centre
        taken = (places[:, None] == centres[None, :]) & (places < count)[:, None]
        at_centre, _ = add_members(x, some, taken, CHANNELS, CLUSTERS, DTYPE, narrow)
        points = gl.where(number[None, :] > 0, points, at_centre)
    for _ in range(0, refinements):
        # Means in two parts of the tokens' precision, side by side: one alone would move near ties.
        high = points.to(DTYPE)
        low = (points - high.to(gl.float32)).to(DTYPE)
        both = gl.join(high, low).permute((0, 2, 1)).reshape([CHANNELS, 2 * CLUSTERS])
        parts.store(both)
        fence_async_shared()
        gl.thread_barrier()
        products = gl.zeros([BLOCK, 2 * CLUSTERS], gl.float32, layout=twice)
        products = warpgroup_mma(x, parts, products, use_acc=False, is_async=True)
        squares = gl.where(slots < clusters, gl.sum(points * points, 0), float("inf"))
        products = warpgroup_mma_wait(0, deps=(products,))
        product = gl.convert_layout(gl.sum(products.reshape([BLOCK, 2, CLUSTERS]), 1), narrow)
        far = squares[None, :] - 2.0 * product
        slot = gl.min(gl.where(far == gl.min(far, 1)[:, None], slots[None, :], CLUSTERS), 1)
        taken = (slot[:, None] == slots[None, :]) & (places < count)[:, None]
        sums, number = add_members(x, some, taken, CHANNELS, CLUSTERS, DTYPE, narrow)
        points = gl.where(number[None, :] > 0, sums / gl.maximum(number, 1).to(gl.float32)[None, :], points)

    blocks = gl.cdiv(tokens, BLOCK)
    target = program * clusters
    gl.store(number_ptr + target + slots, number.to(gl.int64), mask=slots < clusters)
    row = gl.program_id(0) // blocks
    gl.store(size_ptr + row // heads * blocks + gl.program_id(0) % blocks, count.to(gl.int64))  # every head the same
    mean = gl.where(number[None, :] > 0, points, 0.0).to(DTYPE)
    down: gl.constexpr = gl.BlockedLayout([8, 1], [CHANNELS // 8, 256 // CHANNELS], [1, WARPS], [0, 1])
    mean = gl.convert_layout(mean, down)
    depth = gl.arange(0, CHANNELS, layout=gl.SliceLayout(1, down))
    slots = gl.arange(0, CLUSTERS, layout=gl.SliceLayout(0, down))
    offsets = (target + slots)[None, :] * CHANNELS + depth[:, None]
    gl.store(mean_ptr + offsets, mean, mask=(slots < clusters)[None, :])


@gluon.jit
def add_members(
    x, some, taken, CHANNELS: gl.constexpr, CLUSTERS: gl.constexpr, DTYPE: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """Sums [CHANNELS, CLUSTERS] of the tokens of `x` that are `taken` [BLOCK, CLUSTERS]; their numbers."""
    some.store(taken.to(DTYPE))
    fence_async_shared()
    gl.thread_barrier()
    sums = gl.zeros([CHANNELS, CLUSTERS], gl.float32, layout=layout)
    sums = warpgroup_mma(x.permute((1, 0)), some, sums, use_acc=False, is_async=True)
    number = gl.sum(taken.to(gl.int32), 0)
    sums = warpgroup_mma_wait(0, deps=(sums,))
    gl.thread_barrier()
    return sums, number
