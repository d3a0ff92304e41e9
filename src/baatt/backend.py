"""From `impl` to the functions that do the work, or the reason why it cannot run here.

An explicit choice runs or raises; "auto" picks by the device of the tensors and logs once what it picked and why.
Holds no arithmetic. A new kernel is one entry here and one file in `baatt.kernels`.
"""

import logging
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from baatt.stages import pooling, sparse
from baatt.types import BlockSelection, BlockStats, Partial, TokenOrder

IMPLS = ("auto", "reference", "cpu", "triton", "hopper")

logger = logging.getLogger("baatt")
_logged: set[str] = set()


class PoolBlocks(Protocol):
    """`baatt.stages.pooling.pool_blocks` and its twins."""

    def __call__(self, x: Tensor, order: TokenOrder, block_size: int) -> BlockStats: ...


class SparseAttention(Protocol):
    """`baatt.stages.sparse.sparse_attention` and its twins."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_order: TokenOrder,
        key_order: TokenOrder,
        selection: BlockSelection,
        *,
        block_size: int,
        scale: float,
    ) -> Partial: ...


class Backend(NamedTuple):
    """The hot functions of one implementation."""

    name: str
    pool_blocks: PoolBlocks
    sparse_attention: SparseAttention


class Availability(NamedTuple):
    """Whether an implementation can run on this machine, and why (not)."""

    impl: str
    available: bool
    reason: str


def choose_backend(impl: str, device: torch.device) -> Backend:
    """The functions of `impl` for tensors on `device`.

    Args:
        impl: one of `IMPLS`.
        device: where the query is.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a known one that cannot run, with the reason.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {list(IMPLS)}, got {impl!r}")
    if impl == "auto":
        impl, reason = ("cpu", "the tensors are on the CPU") if device.type == "cpu" else ("reference", _NO_GPU_KERNEL)
        message = f"impl='auto' chose {impl!r} for device type {device.type!r}: {reason}"
        if message not in _logged:
            _logged.add(message)
            logger.info(message)
    if impl == "reference":
        return Backend("reference", pooling.pool_blocks, sparse.sparse_attention)
    if impl == "cpu":
        if device.type != "cpu":
            raise RuntimeError(f"impl='cpu' needs tensors on the CPU, got device {str(device)!r}")
        from baatt.kernels import cpu

        return Backend("cpu", cpu.pool_blocks, cpu.sparse_attention)
    raise RuntimeError(f"impl={impl!r} cannot run: {_NO_GPU_KERNEL}")


def describe() -> list[Availability]:
    """What every implementation says about this machine, in the order of `IMPLS`. Builds nothing."""
    from baatt.kernels import cpu_native

    compiler = cpu_native.find_compiler()
    way = f"builds its C kernel with {compiler}" if compiler else "no C compiler found: slower, gathers with PyTorch"
    return [
        Availability("auto", True, "'cpu' for CPU tensors, 'reference' elsewhere"),
        Availability("reference", True, "eager PyTorch, any device"),
        Availability("cpu", True, way),
        Availability("triton", False, _NO_GPU_KERNEL),
        Availability("hopper", False, _NO_GPU_KERNEL),
    ]


_NO_GPU_KERNEL = "GPU kernels do not exist yet in this version"
