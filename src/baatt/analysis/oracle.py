"""What an ideal selector would know: the attention mass of every block pair (E1), and how much of it a plan keeps.

In: q and k of a layer and a `Plan`. Out: mass [B, H, I, J], the best selection at a budget, recall of a selection.
Needs dense attention, which is computed over slabs of query rows: memory stays at one slab of rows, never N x M; on a
GPU a kernel does it, to which the eager function is the specification. Does not know how the plan came about.
"""

import functools
import itertools
import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from baatt.backend import Workload, choose_backend
from baatt.plan import Plan
from baatt.stages.selection import select_blocks
from baatt.types import BlockSelection

logger = logging.getLogger("baatt")

#: Attention weights in memory at once: elsewhere, on a GPU.
SLAB_WEIGHTS = (2**25, 2**28)


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
    if impl not in ("auto", *MASSES):
        raise ValueError(f"impl must be one of {['auto', *MASSES]}, got {impl!r}")
    workload = Workload(q.dtype, q.shape[-1], plan.config.block_size, plan.scale)
    if impl == "auto":
        half = q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16)
        impl = "triton" if half and _kernel_runs(q.device, workload) else "reference"
    elif impl == "triton":
        choose_backend(impl, q.device, workload)  # for its refusal
    return MASSES[impl](q, k, plan)


def _block_mass_by_kernel(q: Tensor, k: Tensor, plan: Plan) -> Tensor:
    from baatt.kernels import triton_mass

    size, scale = plan.config.block_size, plan.scale
    return triton_mass.block_mass(q, k, plan.query_order, plan.key_order, block_size=size, scale=scale)


@functools.cache
def _kernel_runs(device: torch.device, workload: Workload) -> bool:
    """Whether "triton" can run; a refusal is logged, once."""
    try:
        choose_backend("triton", device, workload)
    except RuntimeError as error:
        logger.info(f"block_mass: impl='auto' chose 'reference': {error}")
        return False
    return True


def _block_mass_eagerly(q: Tensor, k: Tensor, plan: Plan) -> Tensor:
    """The specification, entry by entry."""
    batch, heads, queries, _ = q.shape
    groups, keys = k.shape[1:3]
    size = plan.config.block_size
    key_blocks = -(-keys // size)
    dtype = torch.promote_types(q.dtype, torch.float32)
    mass = torch.zeros(batch, heads, -(-queries // size), key_blocks, dtype=dtype, device=q.device)
    slab = SLAB_WEIGHTS[q.device.type == "cuda"]
    heads_at_once = max(1, min(heads, slab // (queries * keys)))
    rows_at_once = max(1, slab // (keys * size)) * size
    for entry, first_head in itertools.product(range(batch), range(0, heads, heads_at_once)):
        length = int(plan.key_order.length[entry])
        if length == 0:
            continue
        chosen = torch.arange(first_head, min(first_head + heads_at_once, heads), device=q.device)
        group = chosen * groups // heads
        sorted_q = _gather(q[entry, chosen], plan.query_order.index[entry, chosen]).to(dtype)
        sorted_k = _gather(k[entry, group], plan.key_order.index[entry, group, :length]).to(dtype)
        for first in range(0, queries, rows_at_once):
            weights = torch.softmax(plan.scale * sorted_q[:, first : first + rows_at_once] @ sorted_k.mT, dim=-1)
            weights = torch.nn.functional.pad(weights, (0, key_blocks * size - length))
            per_row = reduce(weights, "h n (j p) -> h n j", "sum", p=size)
            blocks = slice(first // size, first // size + -(-per_row.shape[1] // size))
            mass[entry, chosen, blocks] = run_means(per_row.mT, size).mT
    return mass


def best_selection(mass: Tensor, plan: Plan, sparsity: float) -> BlockSelection:
    """The selection of the most mass at a budget: the oracle that no selector of blocks can beat.

    Args:
        mass: [B, H, I, J] of `block_mass`.
        plan: gives the sizes of the key blocks.
        sparsity: share of key blocks skipped, as in `BAAttConfig`.
    """
    empty = rearrange(plan.key_stats.size == 0, "b j -> b 1 1 j")
    return select_blocks(mass.masked_fill(empty, -math.inf), plan.key_stats.size, sparsity)


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


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows [H, L, D] of x [H, N, D] by index [H, L]."""
    return x.gather(1, repeat(index, "h n -> h n d", d=x.shape[-1]))


def run_means(x: Tensor, size: int) -> Tensor:
    """Means over runs of `size` along the last axis; the last run may be shorter."""
    whole = x.shape[-1] // size * size
    parts = [reduce(x[..., :whole], "... (c size) -> ... c", "mean", size=size)]
    if whole < x.shape[-1]:
        parts.append(x[..., whole:].mean(dim=-1, keepdim=True))
    return torch.cat(parts, dim=-1)


#: impl -> mass(q, k, plan)
MASSES: dict[str, Callable[[Tensor, Tensor, Plan], Tensor]] = {
    "reference": _block_mass_eagerly,
    "triton": _block_mass_by_kernel,
}
