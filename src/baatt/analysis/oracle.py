"""What an ideal selector would know: the attention mass of every block pair (E1), and how much of it a plan keeps.

In: q and k of a layer and a `Plan`. Out: mass [B, H, I, J], the best selection at a budget, recall of a selection.
Needs dense attention, which is computed over slabs of query rows: memory stays at one slab of rows, never N x M; on a
GPU a kernel does it, to which the eager function is the specification. Does not know how the plan came about.
"""

import functools
import logging
import math
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor

from baatt.backend import Workload, choose_backend, gpu_comparison
from baatt.plan import Plan
from baatt.scores import exact
from baatt.stages.selection import select_blocks
from baatt.types import BlockSelection

logger = logging.getLogger("baatt")


class Recall(NamedTuple):
    """mean and 5th percentile, over heads and query blocks, of the attention mass that is kept, 0 to 1."""

    mean: float
    fifth_percentile: float


def block_mass(q: Tensor, k: Tensor, plan: Plan, *, impl: str = "auto") -> Tensor:
    """Attention mass of every block pair in the plan's token order, averaged over the queries of a block (E1).

    Args:
        q: [B, H, N, D]; k: [B, G, M, D], in the original order.
        plan: gives orders, block size and scale; its selection is not looked at.
        impl: "reference" (eager, any device and dtype), "triton" (a GPU, any dtype but float64) or "auto": "triton"
            for bfloat16 and float16 where it can run, else "reference". float32 has no matrix units to gain from.

    Returns:
        [B, H, I, J] float32 (float64 for float64), each row sums to 1; 0 for a batch entry without keys.

    Raises:
        ValueError: an unknown `impl`.
        RuntimeError: `impl` "triton" cannot run here, with the reason.
    """
    if impl not in ("auto", "reference", "triton"):
        raise ValueError(f"impl must be one of ['auto', 'reference', 'triton'], got {impl!r}")
    workload = Workload(q.dtype, q.shape[-1], plan.config.block_size, plan.scale)
    compare = exact.compare
    if impl == "triton":
        choose_backend(impl, q.device, workload)  # for its refusal
        compare = gpu_comparison(exact.compare, torch.bfloat16)
    elif impl == "auto" and q.device.type == "cuda" and _kernel_runs(q.device, workload):
        compare = gpu_comparison(exact.compare, q.dtype)
    queries, keys = (exact.summarise(x, y, plan.config) for x, y in ((q, plan.query_order), (k, plan.key_order)))
    return compare(queries, keys, plan.config, plan.scale)


@functools.cache
def _kernel_runs(device: torch.device, workload: Workload) -> bool:
    """Whether "triton" can run; a refusal is logged, once."""
    try:
        choose_backend("triton", device, workload)
    except RuntimeError as error:
        logger.info(f"block_mass: impl='auto' chose 'reference': {error}")
        return False
    return True


def best_selection(mass: Tensor, plan: Plan, sparsity: float) -> BlockSelection:
    """The selection of the most mass at a budget: the oracle that no selector of blocks can beat.

    Args:
        mass: [B, H, I, J] of `block_mass`.
        plan: gives the sizes of the key blocks.
        sparsity: share of key blocks skipped, as in `BAAttConfig`.
    """
    empty = rearrange(plan.key_summary.size == 0, "b j -> b 1 1 j")
    return select_blocks(mass.masked_fill(empty, -math.inf), plan.key_summary.size, sparsity)


def kept_mass(mass: Tensor, selection: BlockSelection) -> Tensor:
    """Share of the attention mass in the kept blocks, [B, H, I]."""
    slots = torch.arange(selection.index.shape[-1], device=mass.device) < selection.count[..., None]
    kept = mass.gather(-1, selection.index.long())
    return torch.where(slots, kept, 0).sum(dim=-1)


def summarise(shares: Tensor) -> Recall:
    """Mean and 5th percentile of the kept masses of any number of layers, heads and query blocks.

    Raises:
        ValueError: nothing to summarise.
    """
    if shares.numel() == 0:
        raise ValueError(f"shares must hold at least one number, got shape {tuple(shares.shape)}")
    flat = shares.flatten().double().sort().values
    place = 0.05 * (flat.numel() - 1)  # as torch.quantile, which refuses large inputs
    below = flat[math.floor(place)]
    return Recall(float(flat.mean()), float(below + (place % 1) * (flat[math.ceil(place)] - below)))


def run_means(x: Tensor, size: int) -> Tensor:
    """Means over runs of `size` along the last axis; the last run may be shorter."""
    whole = x.shape[-1] // size * size
    parts = [reduce(x[..., :whole], "... (c size) -> ... c", "mean", size=size)]
    if whole < x.shape[-1]:
        parts.append(x[..., whole:].mean(dim=-1, keepdim=True))
    return torch.cat(parts, dim=-1)
