"""From `impl` to the functions that do the work, or the reason why it cannot run here.

An explicit choice runs or raises; "auto" picks by device and workload and logs once what it picked and why. Holds no
arithmetic. A new kernel is one entry here and one file in `baatt.kernels`.
"""

import functools
import importlib
import importlib.util
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from baatt.config import BAAttConfig
from baatt.scores import SCORES, antidiagonal, clusters, covariance, exact, simple
from baatt.stages import selection, sorting, sparse, structure
from baatt.types import (
    BlockSelection,
    BlockSummary,
    Partial,
    ScoreOptions,
    Sight,
    SortedBlocks,
    TokenOrder,
    slabs_of_heads,
    take_blocks,
)

IMPLS = ("auto", "reference", "cpu", "triton", "hopper")

#: What GPUs have matrix units for; of float32 the eager functions are faster than a kernel, or as good.
HALF = (torch.bfloat16, torch.float16)
#: Scores of one batch entry in memory at once: 256 MiB in float32.
SLAB_SCORES = 2**26

logger = logging.getLogger("baatt")
_logged: set[str] = set()


class Backend(NamedTuple):
    """The functions of one implementation.

    sort_blocks: (q, k, v, config, key_mask, query_mask) -> orders and summaries: a pair of `ORDERS`, `summarise` of a
        score; v is there, or None, because a kernel copies it on the way.
    choose_blocks: the best block pairs: `compare` of a score, then `baatt.stages.selection.select_blocks`.
    sparse_attention: of `baatt.stages.sparse`, or a twin, which may take the sorted copies of `SortedBlocks` besides.
    look_back: of `baatt.stages.structure`, or a twin.
    """

    name: str
    sort_blocks: Callable[..., SortedBlocks]
    choose_blocks: Callable[[BlockSummary, BlockSummary, BAAttConfig, float, Sight | None], BlockSelection]
    sparse_attention: Callable[..., Partial]
    look_back: Callable[..., Sight] = structure.look_back


class Workload(NamedTuple):
    """What a kernel may have to refuse: dtype, D, P and the factor on q.k."""

    dtype: torch.dtype
    channels: int
    block_size: int
    scale: float


class Availability(NamedTuple):
    """Whether an implementation can run on this machine, and why (not)."""

    impl: str
    available: bool
    reason: str


def choose_backend(impl: str, device: torch.device, workload: Workload | None = None) -> Backend:
    """The functions of `impl` for tensors on `device`.

    Args:
        impl: one of `IMPLS`.
        device: where the query is.
        workload: what it has to do; None asks about the device alone.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a known one that cannot run, with the reason.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {list(IMPLS)}, got {impl!r}")
    if impl == "auto":
        impl, reason = _automatic(device, workload)
        message = f"impl='auto' chose {impl!r} for device type {device.type!r}: {reason}"
        if message not in _logged:
            _logged.add(message)
            logger.info(message)
    elif refusal := _refusal(impl, device, workload):
        raise RuntimeError(f"impl={impl!r} cannot run: {refusal}")
    return _backend(impl)


def describe() -> list[Availability]:
    """What every implementation says about this machine, in the order of `IMPLS`. Builds nothing."""
    from baatt.kernels import cpu_native

    compiler = cpu_native.find_compiler()
    way = f"builds its C kernel with {compiler}" if compiler else "no C compiler found: slower, gathers with PyTorch"
    gpu = torch.device("cuda")
    refusals = {impl: _refusal(impl, gpu, None) for impl in ("triton", "hopper")}
    return [
        Availability("auto", True, "'cpu' for CPU tensors; on a GPU the first of 'hopper', 'triton', 'reference'"),
        Availability("reference", True, "eager PyTorch, any device"),
        Availability("cpu", True, way),
        Availability("triton", refusals["triton"] is None, refusals["triton"] or "sm_80 or newer: any dtype but fp64"),
        Availability("hopper", refusals["hopper"] is None, refusals["hopper"] or "sm_90: bf16 and fp16, D 64 and 128"),
    ]


def _automatic(device: torch.device, workload: Workload | None) -> tuple[str, str]:
    """The fastest implementation that can run, and why it is not a faster one."""
    if device.type == "cpu":
        return "cpu", "the tensors are on the CPU"
    refusals: list[str] = []
    for impl in ("hopper", "triton"):
        refusal = _refusal(impl, device, workload)
        if refusal is None:
            return impl, "; ".join([*refusals, f"{impl!r} runs here"])
        refusals.append(f"not {impl!r}, {refusal}")
    return "reference", "; ".join(refusals)


def _refusal(impl: str, device: torch.device, workload: Workload | None) -> str | None:
    """Why `impl` cannot run, or None."""
    if impl == "reference":
        return None
    if impl == "cpu":
        return None if device.type == "cpu" else f"it needs tensors on the CPU, got device {str(device)!r}"
    if device.type != "cuda":
        return f"it needs tensors on a GPU, got device {str(device)!r}"
    if importlib.util.find_spec("triton") is None:
        return "the package 'triton' is not installed"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    module = _import_kernel(impl)
    refused: str | None = module if isinstance(module, str) else module.refusal(device, workload)
    return refused


@functools.cache
def _import_kernel(impl: str) -> Any:
    """The module of a Triton kernel, or why it cannot be imported; a failure stays, so that it is paid for once."""
    module, kernel = {"triton": ("triton_attention", "portable kernel"), "hopper": ("hopper", "Gluon kernel")}[impl]
    try:
        return importlib.import_module(f"baatt.kernels.{module}")
    except Exception as error:  # Gluon moves between versions, and a broken installation raises whatever it likes
        return f"the {kernel} does not work with this Triton: {type(error).__name__}: {error}"


def _itself(function: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    """The twin of an eager function where none is wanted."""
    return function


def cpu_twin(function: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    """The twin in C of an order or of a score's function, or itself where there is none, or no compiler."""
    from baatt.kernels import cpu_native, cpu_orders, cpu_scores

    twins: dict[Any, Callable[..., Any]] = {
        sorting.by_norm: cpu_orders.by_norm,
        covariance.summarise: cpu_scores.summarise_moments,
        covariance.compare: cpu_scores.compare_covariance,
        simple.compare_means: cpu_scores.compare_means,
        clusters.summarise: cpu_scores.summarise_clusters,
        clusters.compare: cpu_scores.compare_clusters,
    }
    known = function in twins and dtype in cpu_scores.KINDS and cpu_native.library() is not None
    return twins[function] if known else function


def _sort_in_stages(
    twin: Callable[..., Callable[..., Any]],
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    config: BAAttConfig,
    key_mask: Tensor | None,
    query_mask: Tensor | None = None,
) -> SortedBlocks:
    order_queries, order_keys = (twin(order, q.dtype) for order in sorting.ORDERS[config.sort])
    summarise = twin(SCORES[config.score].summarise, q.dtype)
    query_order = order_queries(q, config.segment, query_mask)
    key_order = order_keys(k, config.segment, key_mask)
    return SortedBlocks(query_order, summarise(q, query_order, config), key_order, summarise(k, key_order, config))


def _choose_in_stages(
    twin: Callable[..., Callable[..., Any]],
    query_summary: BlockSummary,
    key_summary: BlockSummary,
    config: BAAttConfig,
    scale: float,
    sight: Sight | None = None,
) -> BlockSelection:
    """Slab by slab of query blocks or, where they share a budget, of heads: up to `SLAB_SCORES` a batch entry."""
    score, (heads, query_blocks) = SCORES[config.score], query_summary[0].shape[1:3]
    compare = twin(score.compare, query_summary[0].dtype)
    if config.budget == "row":
        rows = max(1, SLAB_SCORES // (heads * key_summary.size.shape[1]))
        slabs = [slice(first, first + rows) for first in range(0, query_blocks, rows)]
        sides = [(take_blocks(query_summary, slab), key_summary, sight and sight.take(slab)) for slab in slabs]
    else:
        sides = [(*some[1:], sight) for some in slabs_of_heads(query_summary, key_summary, SLAB_SCORES)]
    empty = (key_summary.size == 0)[:, None, None]
    parts = []
    for queries, keys, part in sides:
        scores = compare(queries, keys, config, scale, part).masked_fill(empty, -math.inf)
        if config.budget == "head" and score.logits:
            scores = selection.log_distribution(scores, part)
        options = {"budget": config.budget, "query_block_size": queries.size, "sight": part}
        parts.append(selection.select_blocks(scores, keys.size, config.sparsity, config.keep_first, **options))
    axis = 2 if config.budget == "row" else 1
    index, count = torch.cat([part.index for part in parts], axis), torch.cat([part.count for part in parts], axis)
    return BlockSelection(index, count, parts[0].uneven)


def _choose_on_gpu(
    twins: Mapping[Any, Any],
    query_summary: BlockSummary,
    key_summary: BlockSummary,
    config: BAAttConfig,
    scale: float,
    sight: Sight | None = None,
) -> BlockSelection:
    from baatt.kernels import triton_budget, triton_selection

    score = SCORES[config.score]
    dtype = query_summary[0].dtype
    twin = twins.get(score.compare) if dtype in HALF else None
    function = twin or gpu_comparison(score.compare, dtype)

    def compare(queries: BlockSummary, keys: BlockSummary, part: Sight | None) -> Tensor:
        return function(queries, keys, config, scale, part)

    sides, budget = (query_summary, key_summary, compare), (config.sparsity, config.keep_first, sight)
    if config.budget == "row":
        return triton_selection.choose_blocks(*sides, *budget)
    return triton_budget.choose_blocks(*sides, *budget, logits=score.logits)


def gpu_comparison(compare: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    """The fast twin of a comparison, or itself where there is none."""
    from baatt.kernels import triton_antidiagonal, triton_mass, triton_selection

    twins: dict[Any, Callable[..., Tensor]] = {}
    twins |= {covariance.compare: triton_selection.compare, simple.compare_means: triton_selection.compare_means}
    if dtype in HALF:
        twins |= {exact.compare: triton_mass.compare, exact.compare_peak: triton_mass.compare_peak}
        twins |= {antidiagonal.compare: triton_antidiagonal.compare}
    if isinstance(compare, functools.partial) and compare.func in twins:
        return functools.partial(twins[compare.func], **compare.keywords)
    return twins.get(compare, compare)


def _sort_on_gpu(
    twins: Mapping[Any, Any],
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    config: BAAttConfig,
    key_mask: Tensor | None,
    query_mask: Tensor | None = None,
) -> SortedBlocks:
    """Orders by norm are the kernel's unless their queries are masked; mean and variance it takes as it copies k and v.

    What another score remembers its `summarise` makes of the orders, or the twin of that.
    """
    from baatt.kernels import triton_arrangement

    def order(x: Tensor, function: sorting.OrderFunction, mask: Tensor | None) -> TokenOrder | None:
        longest = x.shape[2] if config.segment is None else min(config.segment, x.shape[2])
        made_here = function is sorting.by_norm and longest <= triton_arrangement.LONGEST
        return None if made_here else function(x, config.segment, mask)

    order_queries, order_keys = sorting.ORDERS[config.sort]
    given = order(q, order_queries, None) if query_mask is None else order_queries(q, config.segment, query_mask)
    stay = given is not None and given.identity and order_keys is order_queries and key_mask is None
    if given is not None and stay and q.shape[2] == k.shape[2]:  # two launches fewer
        given_keys: TokenOrder | None = given._replace(index=given.index[:, :1].expand(-1, k.shape[1], -1))
    else:
        given_keys = order(k, order_keys, key_mask)
    query_order, key_order = triton_arrangement.order_tokens(
        q, k, given, given_keys, segment=config.segment, key_mask=key_mask
    )
    summarise = SCORES[config.score].summarise
    if summarise is covariance.summarise:
        return triton_arrangement.pool_blocks(q, k, v, query_order, key_order, config.block_size)
    both = twins.get(summarise) or functools.partial(_summarise_sides, summarise)
    summaries = both(q, query_order, k, key_order, config)
    own = (k, v) if key_order.identity else (None, None)
    return SortedBlocks(query_order, summaries[0], key_order, summaries[1], *own)


def _look_back_on_gpu(
    q: Tensor,
    k: Tensor,
    causal: int,
    query_start: int,
    block_size: int,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Sight:
    from baatt.kernels import triton_structure

    where = q, k, causal, query_start, block_size
    if key_mask is None and query_mask is None:
        return triton_structure.look_back(*where)
    return structure.look_back(*where, key_mask, query_mask)


def _summarise_sides(
    summarise: Callable[..., BlockSummary],
    q: Tensor,
    query_order: TokenOrder,
    k: Tensor,
    key_order: TokenOrder,
    options: ScoreOptions,
) -> tuple[BlockSummary, BlockSummary]:
    return summarise(q, query_order, options), summarise(k, key_order, options)


def _cluster_twins(impl: str) -> dict[Any, Callable[..., Any]]:
    """The functions of the score "clusters" on a GPU; that of `summarise` takes both sides."""
    from baatt.kernels import triton_clusters

    fast: Callable[..., Any] = functools.partial(_summarise_sides, triton_clusters.summarise)
    compare: Callable[..., Any] = triton_clusters.compare
    if impl == "hopper":
        fast, compare = _or_portable("summarise_sides", fast), _or_portable("compare", compare)
    eager = functools.partial(_summarise_sides, clusters.summarise)

    def summarise(q: Tensor, *sides: Any) -> tuple[BlockSummary, BlockSummary]:
        found: tuple[BlockSummary, BlockSummary]
        found = (fast if triton_clusters.fits(q, sides[-1].block_size) else eager)(q, *sides)
        return found

    return {clusters.summarise: summarise, clusters.compare: compare}


def _or_portable(name: str, portable: Callable[..., Any]) -> Callable[..., Any]:
    """That function of `hopper_clusters` until it fails, as where a release of Triton calls Gluon's parts differently;
    from then on, with a warning, its portable twin, which would fail too if anything else were wrong."""
    broken = list[str]()

    def run(*args: Any) -> Any:
        if broken:
            return portable(*args)
        try:
            return getattr(importlib.import_module("baatt.kernels.hopper_clusters"), name)(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            found, said = portable(*args), str(error).splitlines()
            reason = f"{type(error).__name__}: {said[-1] if said else ''}"
            broken.append(reason)
            message = (
                f"clusters come from the portable kernels, which are slower, as Hopper's do not run here: {reason}"
            )
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            return found

    return run


@functools.cache
def _backend(impl: str) -> Backend:
    """The functions of an implementation that does not refuse."""
    if impl in ("triton", "hopper"):
        twins, attention = _cluster_twins(impl), _import_kernel(impl).sparse_attention
        sort, choose = functools.partial(_sort_on_gpu, twins), functools.partial(_choose_on_gpu, twins)
        return Backend(impl, sort, choose, attention, _look_back_on_gpu)
    twin, attention = _itself, sparse.sparse_attention
    if impl == "cpu":
        from baatt.kernels import cpu

        twin, attention = cpu_twin, cpu.sparse_attention
    return Backend(
        impl, functools.partial(_sort_in_stages, twin), functools.partial(_choose_in_stages, twin), attention
    )
