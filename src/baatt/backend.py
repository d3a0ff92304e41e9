"""From `impl` to the functions that do the work, or the reason why it cannot run here.

An explicit choice runs or raises; "auto" picks by device and workload and logs once what it picked and why. Holds no
arithmetic. A new kernel is one entry here and one file in `baatt.kernels`.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from baatt.config import BAAttConfig
from baatt.stages import pooling, scoring, selection, sorting, sparse
from baatt.types import BlockSelection, BlockStats, Partial, PooledTokens, TokenOrder

IMPLS = ("auto", "reference", "cpu", "triton", "hopper")

logger = logging.getLogger("baatt")
_logged: set[str] = set()


class PoolTokens(Protocol):
    """`baatt.stages.pooling.pool_blocks`, or a twin that keeps its sorted copy."""

    def __call__(self, x: Tensor, order: TokenOrder, block_size: int) -> PooledTokens: ...


class ChooseBlocks(Protocol):
    """Scores every block pair and keeps the best: a name in `SCORES`, then `baatt.stages.selection.select_blocks`."""

    def __call__(
        self, query_stats: BlockStats, key_stats: BlockStats, config: BAAttConfig, scale: float
    ) -> BlockSelection: ...


#: `baatt.stages.sparse.sparse_attention` and its twins, which may take `sorted_q` and `sorted_k` besides.
SparseAttention = Callable[..., Partial]


class Backend(NamedTuple):
    """The functions of one implementation, in the order in which they run."""

    name: str
    orders: Mapping[str, tuple[sorting.OrderFunction, sorting.OrderFunction]]
    pool_tokens: PoolTokens
    choose_blocks: ChooseBlocks
    sparse_attention: SparseAttention


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
    return _BACKENDS[impl]()


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
    if impl == "cpu" and device.type != "cpu":
        return f"it needs tensors on the CPU, got device {str(device)!r}"
    if impl in ("triton", "hopper"):
        return _gpu_refusal(device) or _kernel_refusal(impl, device, workload)
    return None


def _gpu_refusal(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs tensors on a GPU, got device {str(device)!r}"
    if importlib.util.find_spec("triton") is None:
        return "the package 'triton' is not installed"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    return None


def _kernel_refusal(impl: str, device: torch.device, workload: Workload | None) -> str | None:
    refused: str | None
    if impl == "triton":
        from baatt.kernels import triton_attention

        refused = triton_attention.refusal(device, workload)
    else:
        from baatt.kernels import hopper

        refused = hopper.refusal(device, workload)
    return refused


def _pool_only(
    pool_blocks: Callable[[Tensor, TokenOrder, int], BlockStats], x: Tensor, order: TokenOrder, block_size: int
) -> PooledTokens:
    return PooledTokens(pool_blocks(x, order, block_size), None)


def _choose_eagerly(
    query_stats: BlockStats, key_stats: BlockStats, config: BAAttConfig, scale: float
) -> BlockSelection:
    scores = scoring.SCORES[config.score](query_stats, key_stats, scale=scale, beta=config.beta)
    return selection.select_blocks(scores, key_stats.size, config.sparsity)


def _reference() -> Backend:
    pool_tokens = functools.partial(_pool_only, pooling.pool_blocks)
    return Backend("reference", sorting.ORDERS, pool_tokens, _choose_eagerly, sparse.sparse_attention)


def _cpu() -> Backend:
    from baatt.kernels import cpu

    pool_tokens = functools.partial(_pool_only, cpu.pool_blocks)
    return Backend("cpu", sorting.ORDERS, pool_tokens, _choose_eagerly, cpu.sparse_attention)


def _choose_on_gpu(query_stats: BlockStats, key_stats: BlockStats, config: BAAttConfig, scale: float) -> BlockSelection:
    from baatt.kernels import triton_selection

    score = functools.partial(scoring.SCORES[config.score], scale=scale, beta=config.beta)
    return triton_selection.choose_blocks(query_stats, key_stats, score, config.sparsity)


def _gpu_orders() -> Mapping[str, tuple[sorting.OrderFunction, sorting.OrderFunction]]:
    from baatt.kernels import triton_sorting

    twins: dict[sorting.OrderFunction, sorting.OrderFunction] = {sorting.by_norm: triton_sorting.by_norm}
    return {
        sort: (twins.get(queries, queries), twins.get(keys, keys)) for sort, (queries, keys) in sorting.ORDERS.items()
    }


def _triton() -> Backend:
    from baatt.kernels import triton_attention, triton_pooling

    return Backend(
        "triton", _gpu_orders(), triton_pooling.pool_tokens, _choose_on_gpu, triton_attention.sparse_attention
    )


def _hopper() -> Backend:
    from baatt.kernels import hopper, triton_pooling

    return Backend("hopper", _gpu_orders(), triton_pooling.pool_tokens, _choose_on_gpu, hopper.sparse_attention)


_BACKENDS: Mapping[str, Callable[[], Backend]] = {
    "reference": functools.cache(_reference),
    "cpu": functools.cache(_cpu),
    "triton": functools.cache(_triton),
    "hopper": functools.cache(_hopper),
}
