"""Clusters of blocks and their scores on Hopper GPUs (sm_90): twins of `scores.clusters` for blocks of 128.

What they cannot take, few or very many clusters, goes to `triton_clusters`, which takes all.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from baatt.kernels import triton_clusters
from baatt.kernels.hopper import DTYPES, tile_descriptor
from baatt.kernels.hopper_clusters_kernel import centre_kernel, refine_kernel
from baatt.kernels.hopper_shares_kernel import CONSUMERS, share_kernel
from baatt.kernels.launching import SIZES, cdiv, next_power_of_2
from baatt.kernels.triton_attention import _gather_rows
from baatt.types import BlockClusters, ScoreOptions, Sight, TokenOrder

BLOCK = 128
#: Key clusters that are multiplied at a time, and rows of query clusters.
TILE, ROWS = 128, 64 * CONSUMERS.value
STAGES = {64: 6, 128: 4}
#: How many clusters of a block the layouts of the kernels hold.
FEWEST, MOST = 4, 32


def summarise(x: Tensor, order: TokenOrder, options: ScoreOptions) -> BlockClusters:
    """See `scores.clusters.summarise`; the means are in the dtype of x."""
    return summarise_sides(x, order, x[:, :, :0], order, options)[0]


def summarise_sides(
    q: Tensor, query_order: TokenOrder, k: Tensor, key_order: TokenOrder, options: ScoreOptions
) -> tuple[BlockClusters, BlockClusters]:
    """Both sides in the same two launches: more blocks at once fill the multiprocessors better."""
    channels, clusters = q.shape[-1], options.representatives
    if clusters > MOST:
        return triton_clusters.summarise(q, query_order, options), triton_clusters.summarise(k, key_order, options)
    q, k = _aligned(q), _aligned(k)
    in_order = query_order.identity and key_order.identity
    sides: list[object] = []
    for x, order in ((q, query_order), (k, key_order)):
        index = None if in_order else order.index
        sides += [x, *_strides(x)[:3], index, *order.index.stride(), order.length, *x.shape[1:3]]
    blocks = [x.shape[0] * x.shape[1] * cdiv(x.shape[2], BLOCK) for x in (q, k)]
    new = functools.partial(torch.empty, device=q.device)
    mean = new(sum(blocks), clusters, channels, dtype=q.dtype)
    number = new(sum(blocks), clusters, dtype=torch.int64)
    centre, nearest = new(sum(blocks), clusters, dtype=torch.int32), new(sum(blocks), BLOCK, dtype=torch.int8)
    sizes = [new(x.shape[0], cdiv(x.shape[2], BLOCK), dtype=torch.int64) for x in (q, k)]
    grid, dtype = (sum(blocks),), DTYPES[q.dtype]
    centre_kernel[grid](
        *sides, blocks[0], centre, nearest, clusters,
        CHANNELS=channels, DTYPE=dtype, WARPS=4, num_warps=4, maxnreg=168,
    )  # fmt: skip
    refine_kernel[grid](
        *sides, blocks[0], centre, nearest, mean, number, *sizes, clusters, options.refinements,
        CHANNELS=channels, CLUSTERS=max(16, next_power_of_2(clusters)), DTYPE=dtype, WARPS=4, num_warps=4,
        maxnreg=128,
    )  # fmt: skip
    shapes = [(*x.shape[:2], cdiv(x.shape[2], BLOCK), clusters) for x in (q, k)]
    means = [part.view(*shape, channels) for part, shape in zip(mean.split(blocks), shapes, strict=True)]
    numbers = [part.view(shape) for part, shape in zip(number.split(blocks), shapes, strict=True)]
    queries, keys = map(BlockClusters, means, numbers, sizes)
    return queries, keys


def _strides(x: Tensor) -> list[int]:
    """Strides, 0 of an axis that has no second entry: there they may be anything."""
    return [stride if length > 1 else 0 for stride, length in zip(x.stride(), x.shape, strict=True)]


def _aligned(x: Tensor) -> Tensor:
    """x [B, H, N, D], or a copy where Triton cannot tell that all rows begin at multiples of 16 bytes: it reads such
    rows alone without a way through registers."""
    suits = x.stride(-1) == 1 and all(stride % 16 == 0 for stride in _strides(x)[:3]) and x.data_ptr() % 16 == 0
    return x if suits else x.clone(memory_format=torch.contiguous_format)


def compare(
    queries: BlockClusters, keys: BlockClusters, options: ScoreOptions, scale: float, sight: Sight | None = None
) -> Tensor:
    """See `scores.clusters.compare`; [B, H, i, J] float32, of empty key blocks 0 and beyond sight whatever was there.

    scale: positive, as the backend sees to: maxima are taken of products that are not scaled yet.
    """
    query_mean, clusters = queries.mean, queries.mean.shape[3]
    if not FEWEST <= clusters <= MOST:
        return triton_clusters.compare(queries, keys, options, scale, sight)
    batch, heads, query_blocks, _, channels = query_mean.shape
    groups, key_blocks = keys.mean.shape[1:3]
    wide = next_power_of_2(clusters)
    steps = cdiv(key_blocks * wide, TILE)
    tiled, numbers = _tiles_of_keys(keys, wide, steps)
    scores = torch.empty(batch, heads, query_blocks, key_blocks, dtype=torch.float32, device=query_mean.device)
    head_tiles = cdiv(query_blocks, ROWS // wide)
    tiles = head_tiles * batch * heads
    room = ROWS * steps * (TILE // wide + 1)
    programs = min(tiles, _multiprocessors(query_mean.device), max(1, triton_clusters.SCRATCH // (4 * room)))
    scratch = torch.empty(programs, room, dtype=torch.float32, device=query_mean.device)
    limits = (None, None) if sight is None else (sight.spans, sight.spans.stride(0))
    share_kernel[(programs,)](
        query_mean, *query_mean.stride()[:3], queries.tokens.contiguous(),
        tile_descriptor(tiled, DTYPES[tiled.dtype]), numbers, *limits, scores, scratch,
        tiles, head_tiles, heads, groups, query_blocks, key_blocks, steps, clusters, scale * math.log2(math.e),
        CHANNELS=channels, QUERY_CLUSTERS=wide, KEY_CLUSTERS=wide, PEAK=options.peak, STAGES=STAGES[channels],
        DTYPE=DTYPES[query_mean.dtype], num_warps=4,
    )  # fmt: skip
    return scores


def _tiles_of_keys(keys: BlockClusters, wide: int, steps: int) -> tuple[Tensor, Tensor]:
    """Means [B, G, steps * TILE, D] and numbers of tokens as the products want them.

    Where there is no cluster stands the first one of the head, with 0 tokens: it adds nothing and moves no maximum.
    """
    batch, groups, key_blocks, clusters, channels = keys.mean.shape
    tiled = torch.empty(batch, groups, steps * TILE, channels, dtype=keys.mean.dtype, device=keys.mean.device)
    numbers = torch.empty(tiled.shape[:3], dtype=torch.float32, device=tiled.device)
    _tile_kernel[(batch * groups * steps,)](
        keys.mean.contiguous(), keys.tokens.contiguous(), tiled, numbers, key_blocks, steps, clusters,
        CHANNELS=channels, CLUSTERS=wide, TILE=TILE, num_warps=4,
    )  # fmt: skip
    return tiled, numbers


@triton.jit(do_not_specialize=SIZES)
def _tile_kernel(
    mean_ptr, tokens_ptr, tiled_ptr, number_ptr, key_blocks, steps, clusters,
    CHANNELS: tl.constexpr, CLUSTERS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Clusters of thread t of 4 to columns 8 n + 2 t and 8 n + 2 t + 1, see `hopper_shares_kernel.sums_layout`."""
    program = tl.program_id(0).to(tl.int64)
    row, step = program // steps, program % steps
    columns, channels = tl.arange(0, TILE), tl.arange(0, CHANNELS)
    place = columns % 8 // 2 * (TILE // 4) + columns // 8 * 2 + columns % 2
    block, cluster = step * (TILE // CLUSTERS) + place // CLUSTERS, place % CLUSTERS
    inside = (block < key_blocks) & (cluster < clusters)
    source = row * key_blocks * clusters
    tokens = tl.load(tokens_ptr + source + block * clusters + cluster, mask=inside, other=0)
    source += tl.where(tokens > 0, block * clusters + cluster, 0)
    target = program * TILE + columns
    means = _gather_rows(mean_ptr + source * CHANNELS, columns < TILE, 0, 1, CHANNELS, CHANNELS)
    tl.store(tiled_ptr + target[:, None] * CHANNELS + channels[None, :], means)
    tl.store(number_ptr + target, tokens.to(tl.float32))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
