"""Clusters of blocks and their scores on the GPU: twins of `scores.clusters` (C1-C5) for bf16 and fp16.

`summarise` is one launch a side. A program holds one block and its Gram matrix, so that a farthest-point step takes one
row of it and no arithmetic over channels; Lloyd's rounds are two small products. `compare` is one launch: a program
walks with some rows of query clusters over all key clusters, as attention without values would, leaves the sum of
exponentials of every row and key block in scratch memory of its own, and turns those into shares at the end.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from baatt.kernels.launching import SIZES, cdiv, next_power_of_2
from baatt.kernels.triton_attention import LARGE_MEMORY, LOWEST, _gather_rows, _shared_memory
from baatt.types import BlockClusters, ScoreOptions, Sight, TokenOrder

#: Without matrix units, as for float32, the eager functions are as good.
DTYPES = (torch.bfloat16, torch.float16)
#: Bytes of scratch memory that all programs of a comparison may have together, unless one alone needs more.
SCRATCH = 2**30
#: Rows of query clusters and of key clusters that are multiplied at a time.
TILE = 128


def fits(x: Tensor, block_size: int) -> bool:
    """Whether a block and its Gram matrix find room in shared memory; 128 x 128 does not on gfx942."""
    columns = max(16, next_power_of_2(x.shape[-1]))
    return x.dtype in DTYPES and block_size * (2 * columns + 288) <= _shared_memory(x.device)


def summarise(x: Tensor, order: TokenOrder, options: ScoreOptions) -> BlockClusters:
    """See `scores.clusters.summarise`; the means are in the dtype of x, as the matrix units want them."""
    (batch, heads, tokens, channels), block_size = x.shape, options.block_size
    blocks, clusters = cdiv(tokens, block_size), min(options.representatives, block_size)
    mean = torch.empty(batch, heads, blocks, clusters, channels, dtype=x.dtype, device=x.device)
    number = torch.empty(mean.shape[:-1], dtype=torch.int64, device=x.device)
    size = torch.empty(batch, blocks, dtype=torch.int64, device=x.device)
    index = order.index
    _cluster_kernel[(blocks * batch * heads,)](
        x, *x.stride(), index, *index.stride(), order.length, mean, number, size, heads, tokens, clusters,
        options.refinements, BLOCK=block_size, CHANNELS=channels, COLUMNS=max(16, next_power_of_2(channels)),
        CLUSTERS=max(16, next_power_of_2(clusters)), BATCHED=_is_blackwell(x.device),
        num_warps=4 if channels <= 128 else 8,
    )  # fmt: skip
    return BlockClusters(mean, number, size)


def compare(
    queries: BlockClusters, keys: BlockClusters, options: ScoreOptions, scale: float, sight: Sight | None = None
) -> Tensor:
    """See `scores.clusters.compare`; [B, H, i, J] float32, of empty key blocks 0, beyond sight whatever memory held."""
    query_mean, query_tokens = queries.mean, queries.tokens
    if query_mean.stride(-1) != 1 or query_mean.stride(-2) != query_mean.shape[-1]:
        query_mean = query_mean.contiguous()
    batch, heads, query_blocks, clusters, channels = query_mean.shape
    groups, key_blocks, key_clusters = keys.mean.shape[1:4]
    weights = keys.tokens.log2()  # -inf where a cluster is empty
    scores = torch.empty(batch, heads, query_blocks, key_blocks, dtype=torch.float32, device=query_mean.device)
    launch = launch_options(channels, clusters, key_clusters, _shared_memory(query_mean.device))
    tiles = cdiv(query_blocks, launch["ROWS"] // launch["QUERY_CLUSTERS"]) * batch * heads
    width = cdiv(key_blocks, launch["TILE"]) * launch["TILE"]
    steps = cdiv(key_blocks * launch["KEY_CLUSTERS"], launch["TILE"])
    programs = min(tiles, _programs(query_mean.device), max(1, SCRATCH // (4 * launch["ROWS"] * (width + steps))))
    # Sums of every key block, and what they are relative to in every step.
    scratch = torch.empty(programs, width + steps, launch["ROWS"], dtype=torch.float32, device=query_mean.device)
    spans = None if sight is None else sight.spans.contiguous()
    _logit_kernel[(programs,)](
        query_mean, *query_mean.stride()[:3], query_tokens.contiguous(), keys.mean.contiguous(), weights.contiguous(),
        spans, scores, scratch, tiles, heads, groups, query_blocks, key_blocks, width, clusters, key_clusters,
        scale * math.log2(math.e), CHANNELS=channels, PEAK=options.peak, **launch,
    )  # fmt: skip
    return scores


def launch_options(channels: int, clusters: int, key_clusters: int, shared_memory: int) -> dict[str, Any]:
    """Tile sizes, warps and pipeline stages of a comparison."""
    columns = max(16, next_power_of_2(channels))
    query_clusters, key_clusters = (next_power_of_2(count) for count in (clusters, key_clusters))
    tile = 64 if columns > 128 or shared_memory < LARGE_MEMORY else TILE
    return {
        "COLUMNS": columns,
        "QUERY_CLUSTERS": query_clusters,
        "KEY_CLUSTERS": key_clusters,
        "ROWS": max(tile, query_clusters),
        "TILE": max(tile, key_clusters),
        "num_warps": 4,
        "num_stages": 2,
    }


def _is_blackwell(device: torch.device) -> bool:
    """Whether Triton 3.6 cannot compile sums over a product of two matrices: it stands in a memory of its own there."""
    is_cuda = device.type == "cuda" and torch.version.hip is None
    return is_cuda and torch.cuda.get_device_capability(device)[0] >= 10


def _programs(device: torch.device) -> int:
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@triton.jit(do_not_specialize=SIZES)
def _cluster_kernel(
    x_ptr, stride_batch, stride_head, stride_token, stride_channel,
    order_ptr, order_batch, order_head, order_token, length_ptr, mean_ptr, number_ptr, size_ptr,
    heads, tokens, clusters, refinements,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, CLUSTERS: tl.constexpr, BATCHED: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tokens, BLOCK)
    block = tl.program_id(0) % blocks
    head_entry = (tl.program_id(0) // blocks).to(tl.int64)
    entry, head = head_entry // heads, head_entry % heads
    places, slots = tl.arange(0, BLOCK), tl.arange(0, CLUSTERS)
    count = tl.minimum(tl.maximum(tl.load(length_ptr + entry) - block * BLOCK, 0), BLOCK).to(tl.int32)
    present = places < count
    order_ptr += entry * order_batch + head * order_head
    source = tl.load(order_ptr + (block * BLOCK + places).to(tl.int64) * order_token, mask=present, other=0)
    row_ptrs = x_ptr + entry * stride_batch + head * stride_head + source * stride_token
    members = _gather_rows(row_ptrs, present, 0, stride_channel, CHANNELS, COLUMNS)

    if BATCHED:  # see `_is_blackwell`; the numbers are the same
        gram = tl.dot(members[None], tl.trans(members)[None]).reshape([BLOCK, BLOCK])
    else:
        gram = tl.dot(members, tl.trans(members))
    norms = tl.sum(tl.where(places[:, None] == places[None, :], gram, 0.0), axis=1)
    middle = tl.sum(members.to(tl.float32), axis=0) / tl.maximum(count, 1)
    offset = members.to(tl.float32) - middle[None, :]
    chosen = tl.argmin(tl.where(present, tl.sum(offset * offset, axis=1), float("inf")), axis=0)
    nearest = tl.full([BLOCK], float("inf"), tl.float32)
    belongs = tl.zeros([BLOCK], tl.int32)
    centres = tl.zeros([CLUSTERS], tl.int32)
    for cluster in range(0, clusters):
        centres = tl.where(slots == cluster, chosen, centres)
        product = tl.sum(tl.where(places[None, :] == chosen, gram, 0.0), axis=1)
        distance = norms + tl.sum(tl.where(places == chosen, norms, 0.0), axis=0) - 2 * product
        belongs = tl.where(distance < nearest, cluster, belongs)
        nearest = tl.minimum(nearest, distance)
        chosen = tl.argmax(tl.where(present, nearest, float("-inf")), axis=0)

    points = tl.dot((centres[:, None] == places[None, :]).to(members.dtype), members)
    points, number = _means(members, present, belongs, slots, points)
    for _ in range(0, refinements):
        # Means in two parts of the tokens' precision: one alone would move near ties.
        high = points.to(members.dtype)
        products = tl.dot(members, tl.trans(high))
        products = tl.dot(members, tl.trans((points - high.to(tl.float32)).to(members.dtype)), products)
        squares = tl.where(slots < clusters, tl.sum(points * points, axis=1), float("inf"))
        belongs = tl.argmin(squares[None, :] - 2 * products, axis=1)
        points, number = _means(members, present, belongs, slots, points)

    columns = tl.arange(0, COLUMNS)
    target = (head_entry * blocks + block) * clusters + slots
    mean = tl.where(number[:, None] > 0, points, 0.0).to(members.dtype)
    inside = (slots < clusters)[:, None] & (columns < CHANNELS)[None, :]
    tl.store(mean_ptr + target[:, None] * CHANNELS + columns[None, :], mean, mask=inside)
    tl.store(number_ptr + target, number.to(tl.int64), mask=slots < clusters)
    tl.store(size_ptr + entry * blocks + block, count.to(tl.int64))  # every head the same


@triton.jit
def _means(members, present, belongs, slots, points):
    """Means [CLUSTERS, COLUMNS] of the tokens that belong to each cluster, where none does its point; their numbers."""
    taken = (slots[:, None] == belongs[None, :]) & present[None, :]
    number = tl.sum(taken.to(tl.int32), axis=1)
    sums = tl.dot(taken.to(members.dtype), members)
    return tl.where(number[:, None] > 0, sums / tl.maximum(number, 1)[:, None], points), number


@triton.jit(do_not_specialize=SIZES)
def _logit_kernel(
    q_ptr, stride_batch, stride_head, stride_block, q_tokens_ptr, k_ptr, weight_ptr, spans_ptr, scores_ptr,
    scratch_ptr, tiles, heads, groups, query_blocks, key_blocks, width, clusters, key_clusters, scale,
    CHANNELS: tl.constexpr, PEAK: tl.constexpr, COLUMNS: tl.constexpr, QUERY_CLUSTERS: tl.constexpr,
    KEY_CLUSTERS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """C3 to C5 for some blocks of queries after others, each over all key clusters up to the last that one sees."""
    BLOCKS: tl.constexpr = ROWS // QUERY_CLUSTERS
    KEY_BLOCKS: tl.constexpr = TILE // KEY_CLUSTERS
    rows, columns = tl.arange(0, ROWS), tl.arange(0, TILE)
    # Of a product a thread has columns 8 n + 2 t and 8 n + 2 t + 1 for one t of 4. Where those are given to the
    # clusters of whole key blocks, a block's sum needs no other thread.
    ALONE: tl.constexpr = KEY_CLUSTERS * 4 <= TILE
    place = columns % 8 // 2 * (TILE // 4) + columns // 8 * 2 + columns % 2 if ALONE else columns
    scratch_ptr += tl.program_id(0).to(tl.int64) * (width + tl.cdiv(key_blocks, KEY_BLOCKS)) * ROWS
    maxima_ptr = scratch_ptr + width * ROWS
    for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        head_tiles = tl.cdiv(query_blocks, BLOCKS)
        tile = number
        if spans_ptr is not None:
            # The longest of all heads first, and every other round of the programs from its end: all get as much.
            before = number // tl.num_programs(0) * tl.num_programs(0)
            if before // tl.num_programs(0) % 2 == 1:
                tile = before + tl.minimum(tl.num_programs(0), tiles - before) - 1 - tl.program_id(0)
            every = tiles // head_tiles
            tile = tile % every * head_tiles + head_tiles - 1 - tile // every
        head_entry = (tile // head_tiles).to(tl.int64)
        entry, head = head_entry // heads, head_entry % heads
        first_row = tile % head_tiles * BLOCKS
        blocks, cluster = first_row + rows // QUERY_CLUSTERS, rows % QUERY_CLUSTERS
        present = (blocks < query_blocks) & (cluster < clusters)
        row_ptrs = q_ptr + entry * stride_batch + head * stride_head + blocks.to(tl.int64) * stride_block
        queries = _gather_rows(row_ptrs + cluster * CHANNELS, present, 0, 1, CHANNELS, COLUMNS)
        key_start = (entry * groups + head // (heads // groups)) * key_blocks
        running_max = tl.full([ROWS], LOWEST, tl.float32)
        running_sum = tl.zeros([ROWS], tl.float32)
        last, plain = key_blocks, key_blocks
        if spans_ptr is not None:
            spans_ptrs = spans_ptr + (entry * query_blocks + blocks) * 4 + 3
            seen = tl.load(spans_ptrs, mask=blocks < query_blocks, other=0)
            last = tl.max(seen, axis=0)
            plain = tl.min(tl.where(blocks < query_blocks, seen, key_blocks), axis=0) // KEY_BLOCKS * KEY_BLOCKS
        # Key blocks that all rows see and then, where attention is causal, the last ones, which some rows do not.
        for masked in tl.static_range(1 if spans_ptr is None else 2):
            for first in range(plain if masked else 0, last if masked else plain, KEY_BLOCKS):
                key_block, key_cluster = first + place // KEY_CLUSTERS, place % KEY_CLUSTERS
                inside = (key_block < key_blocks) & (key_cluster < key_clusters)
                key_rows = (key_start + key_block) * key_clusters + key_cluster
                keys = _gather_rows(k_ptr + key_rows * CHANNELS, inside, 0, 1, CHANNELS, COLUMNS)
                weight = tl.load(weight_ptr + key_rows, mask=inside, other=float("-inf"))
                logits = tl.dot(queries, tl.trans(keys)) * scale + weight[None, :]
                if masked:
                    logits = tl.where(key_block[None, :] < seen[:, None], logits, float("-inf"))
                new_max = tl.maximum(running_max, tl.max(logits, axis=1))
                shares = tl.exp2(logits - new_max[:, None])
                if ALONE:
                    shares = tl.permute(tl.reshape(shares, (ROWS, TILE // 8, 4, 2)), (0, 2, 1, 3))
                sums = tl.sum(tl.reshape(shares, (ROWS, KEY_BLOCKS, KEY_CLUSTERS)), axis=2)
                running_sum = running_sum * tl.exp2(running_max - new_max) + tl.sum(sums, axis=1)
                running_max = new_max
                tl.store(scratch_ptr + (first + tl.arange(0, KEY_BLOCKS))[None, :] * ROWS + rows[:, None], sums)
                tl.store(maxima_ptr + first // KEY_BLOCKS * ROWS + rows, new_max)
        tokens = tl.load(
            q_tokens_ptr + (head_entry * query_blocks + blocks) * clusters + cluster, mask=present, other=0
        )
        tl.debug_barrier()  # other threads of the program read what was written
        _peaks(
            scratch_ptr, maxima_ptr, running_max, tl.where(running_sum == 0, 1.0, running_sum), tokens.to(tl.float32),
            scores_ptr + (head_entry * query_blocks + first_row) * key_blocks, query_blocks - first_row, last,
            key_blocks, PEAK, BLOCKS, QUERY_CLUSTERS, KEY_BLOCKS,
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def _peaks(
    sums_ptr, maxima_ptr, maximum, total, tokens, scores_ptr, query_blocks, last, key_blocks,
    PEAK: tl.constexpr, BLOCKS: tl.constexpr, CLUSTERS: tl.constexpr, KEY_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Shares of key blocks up to `last` from the sums [width, BLOCKS * CLUSTERS] of rows; their peak over CLUSTERS, or
    mean."""
    WIDTH: tl.constexpr = 32
    rows, blocks = tl.arange(0, BLOCKS * CLUSTERS), tl.arange(0, BLOCKS)
    for first in range(0, last, WIDTH):
        columns = first + tl.arange(0, WIDTH)
        inside = columns < last
        sources = columns[:, None] * (BLOCKS * CLUSTERS) + rows[None, :]
        steps = (columns // KEY_BLOCKS)[:, None] * (BLOCKS * CLUSTERS) + rows[None, :]
        sums = tl.load(sums_ptr + sources, mask=inside[:, None], other=0.0)
        relative = tl.exp2(tl.load(maxima_ptr + steps, mask=inside[:, None], other=0.0) - maximum[None, :])
        shares = sums * relative / total[None, :]
        if PEAK:
            shares = tl.where((tokens > 0)[None, :], shares, 0.0)
            scores = tl.max(tl.reshape(shares, (WIDTH, BLOCKS, CLUSTERS)), axis=2)
        else:
            scores = tl.sum(tl.reshape(shares * tokens[None, :], (WIDTH, BLOCKS, CLUSTERS)), axis=2)
            scores /= tl.maximum(tl.sum(tl.reshape(tokens, (BLOCKS, CLUSTERS)), axis=1), 1.0)[None, :]
        targets = blocks.to(tl.int64)[None, :] * key_blocks + columns[:, None]
        tl.store(scores_ptr + targets, scores, mask=inside[:, None] & (blocks < query_blocks)[None, :])
