"""CPU twins of scores, in C: what blocks are remembered by (E3, C1, C2) and how they compare (E4, E5, C3 to C5).

Every call is one or two passes of threads over all batch entries and heads, because beside other busy processes each
start and each barrier may cost a time slice. In: what the specification takes, but for float64. Needs the library of
`cpu_native`.
"""

import ctypes

import torch
from einops import rearrange
from torch import Tensor

from baatt.kernels import cpu_native
from baatt.types import BlockClusters, BlockStats, ScoreOptions, Sight, TokenOrder

#: `kind` of cpu_summaries.c; these are the dtypes that have twins.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Summary(ctypes.Structure):
    """`Summary` of cpu_summaries.c: the same fields in the same order."""

    _fields_ = cpu_native.fields(
        pointers=("source", "order", "length", "mean", "variance", "count", "scratch"),
        sizes=(
            *("source_batch_stride", "source_head_stride", "source_row_stride"),
            *("order_batch_stride", "order_head_stride"),
            *("batch", "heads", "tokens", "channels", "block_size", "clusters", "refinements", "kind", "threads"),
        ),
    )


class _Comparison(ctypes.Structure):
    """`Comparison` of cpu_comparisons.c: the same fields in the same order."""

    _fields_ = cpu_native.fields(
        pointers=(
            *("query", "key", "query_variance", "key_variance", "query_count", "key_count", "key_size", "spans"),
            *("scores", "scratch"),
        ),
        sizes=(
            *("batch", "heads", "groups", "query_blocks", "key_blocks", "query_clusters", "key_clusters"),
            *("channels", "peak", "threads"),
        ),
        factors=("scale", "weight"),
    )


def summarise_moments(x: Tensor, order: TokenOrder, options: ScoreOptions) -> BlockStats:
    """Mean and variance of every block (E3); see `scores.covariance.summarise`."""
    mean = x.new_empty(*x.shape[:2], _blocks(x, options), x.shape[3], dtype=torch.float32)
    variance = torch.empty_like(mean)
    _summarise("baatt_moments", x, order, options, 1, {"mean": mean, "variance": variance})
    return BlockStats(mean, variance, _sizes(x, order, options))


def summarise_clusters(x: Tensor, order: TokenOrder, options: ScoreOptions) -> BlockClusters:
    """Means and sizes of the clusters of every block (C1, C2); see `scores.clusters.summarise`."""
    clusters = min(options.representatives, options.block_size)
    tokens = x.new_empty(*x.shape[:2], _blocks(x, options), clusters, dtype=torch.int64)
    mean = x.new_empty(*tokens.shape, x.shape[3], dtype=torch.float32)
    _summarise("baatt_clusters", x, order, options, clusters, {"mean": mean, "count": tokens})
    return BlockClusters(mean, tokens, _sizes(x, order, options))


def compare_covariance(
    queries: BlockStats, keys: BlockStats, options: ScoreOptions, scale: float, sight: Sight | None = None
) -> Tensor:
    """Logit of the block means and its compensation (E4, E5); see `scores.covariance.compare`."""
    tensors = {"query": queries.mean, "key": keys.mean}
    if options.beta:
        tensors |= {"query_variance": queries.variance, "key_variance": keys.variance}
    return _compare(tensors, keys.size, scale=scale, weight=options.beta * scale * scale)


def compare_means(
    queries: BlockStats, keys: BlockStats, options: ScoreOptions, scale: float, sight: Sight | None = None
) -> Tensor:
    """Logit of the block means (E4); see `scores.simple.compare_means`."""
    return _compare({"query": queries.mean, "key": keys.mean}, keys.size, scale=scale)


def compare_clusters(
    queries: BlockClusters, keys: BlockClusters, options: ScoreOptions, scale: float, sight: Sight | None = None
) -> Tensor:
    """Share of a key block for the query cluster that wants it most (C3 to C5); see `scores.clusters.compare`."""
    tensors = {"query": queries.mean, "key": keys.mean, "query_count": queries.tokens, "key_count": keys.tokens}
    if sight is not None:
        tensors["spans"] = sight.spans
    return _compare(tensors, keys.size, scale=scale, peak=options.peak)


def _blocks(x: Tensor, options: ScoreOptions) -> int:
    return -(-x.shape[2] // options.block_size)


def _sizes(x: Tensor, order: TokenOrder, options: ScoreOptions) -> Tensor:
    first = torch.arange(_blocks(x, options), device=x.device) * options.block_size
    return (rearrange(order.length, "b -> b 1") - first).clamp(0, options.block_size)


def _summarise(
    function: str, x: Tensor, order: TokenOrder, options: ScoreOptions, clusters: int, results: dict[str, Tensor]
) -> None:
    """Fill the results; besides them it takes one block and its clusters per thread."""
    library, threads = cpu_native.library(), torch.get_num_threads()
    source, index = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x, order.index))
    batch, heads, tokens, channels = x.shape
    summary = _Summary(
        **dict(zip(("source_batch_stride", "source_head_stride", "source_row_stride"), source.stride(), strict=False)),
        **dict(zip(("order_batch_stride", "order_head_stride"), index.stride(), strict=False)),
        batch=batch, heads=heads, tokens=tokens, channels=channels, block_size=options.block_size,
        clusters=clusters, refinements=options.refinements, kind=KINDS[x.dtype], threads=threads,
    )  # fmt: skip
    room = library.baatt_summary_scratch(ctypes.byref(summary))
    scratch = torch.empty(threads, room, dtype=torch.float32, device=x.device)
    inputs = {"source": source, "order": index, "length": order.length.contiguous()}
    cpu_native.call(getattr(library, function), summary, inputs | results | {"scratch": scratch})


def _compare(
    tensors: dict[str, Tensor], key_size: Tensor, *, scale: float, weight: float = 0.0, peak: bool = True
) -> Tensor:
    """[B, H, i, J]; `tensors` by their names in `Comparison`. Besides the scores it takes some rows per thread."""
    library, threads = cpu_native.library(), torch.get_num_threads()
    query, key = tensors["query"], tensors["key"]
    batch, heads, query_blocks = query.shape[:3]
    groups, key_blocks = key.shape[1:3]
    query_clusters, key_clusters = (side.shape[3] if side.ndim == 5 else 1 for side in (query, key))
    comparison = _Comparison(
        batch=batch, heads=heads, groups=groups, query_blocks=query_blocks, key_blocks=key_blocks,
        query_clusters=query_clusters, key_clusters=key_clusters, channels=query.shape[-1], peak=peak, threads=threads,
        scale=scale, weight=weight,
    )  # fmt: skip
    tensors = {name: tensor.contiguous() for name, tensor in (tensors | {"key_size": key_size}).items()}
    # What is compared decides how much room it takes.
    cpu_native.point(comparison, tensors)
    scores = query.new_empty(batch, heads, query_blocks, key_blocks)
    scratch = query.new_empty(threads, library.baatt_comparison_scratch(ctypes.byref(comparison)))
    cpu_native.call(library.baatt_compare, comparison, {"scores": scores, "scratch": scratch})
    return scores
