"""What a benchmark is given and what it returns: `Case` and `Measurement`, and what is known of a case beforehand.

Knows how much memory a case takes and which backend runs it. Measures nothing.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from baatt.backend import Backend, Workload, choose_backend
from baatt.config import BAAttConfig
from baatt.lab.bench.verification import Verification
from baatt.plan import Plan

GRAPH_TOKENS = 32768
KERNELS = ("triton", "hopper")


class Shape(NamedTuple):
    """B, H, G, N = M and D."""

    batch: int
    heads: int
    groups: int
    tokens: int
    channels: int

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.groups == self.heads else f"{self.heads}:{self.groups}"
        return f"{self.batch}x{heads}x{self.tokens}x{self.channels}"


class Inputs(NamedTuple):
    """q: [B, H, N, D]; k, v: [B, G, N, D]."""

    q: Tensor
    k: Tensor
    v: Tensor


class Case(NamedTuple):
    """What to measure: a name in `BENCHMARKS`, on which tensors, with which options, against which `BASELINES`."""

    what: str
    shape: Shape
    config: BAAttConfig
    dtype: torch.dtype
    device: torch.device
    impl: str = "auto"
    against: tuple[str, ...] = ()
    seed: int = 0

    @property
    def scale(self) -> float:
        """1 / sqrt(D)."""
        return 1 / math.sqrt(self.shape.channels)

    @property
    def blocks(self) -> int:
        """J, key blocks of a head."""
        return -(-self.shape.tokens // self.config.block_size)

    def title(self, backend: Backend) -> str:
        """What runs, in a few words."""
        return f"{self.what} {backend.name} at {self.shape}, sparsity {self.config.sparsity:g}"


class Measurement(NamedTuple):
    """What a benchmark found, as it is stored.

    what, impl, shape [B, H, N, D], groups, dtype, sparsity, config: what ran, `impl` never "auto".
    achieved_sparsity: share of block pairs skipped.
    graph: timed as replays of a CUDA graph; without_graph: the baselines that could not be.
    stage_ms: each stage alone; total_ms: the whole call, in turns with the baselines.
    compensation_cost: share by which the whole call is slower than with beta=0, the two in turns; None for a kernel.
    baseline_ms, speedup: by baseline; refused: baseline -> why it did not run.
    kept_tflops: 10^12 operations per second of the attention stage, kept pairs counted only.
    arithmetic_intensity: those operations per byte of q, k, v, output and lists, each moved once.
    selection_share: share of the sum of `stage_ms` that is not attention; None for a kernel.
    error, error_limit: relative L2, see `baatt.lab.bench.verification`; verified_blocks: [compared, all].
    peak_memory_bytes: beyond the inputs, output included, None where unknown; input_bytes: q, k and v.
    """

    what: str
    impl: str
    shape: list[int]
    groups: int
    dtype: str
    sparsity: float
    achieved_sparsity: float
    config: dict[str, Any]
    graph: bool
    without_graph: list[str]
    stage_ms: dict[str, float]
    total_ms: float
    compensation_cost: float | None
    baseline_ms: dict[str, float]
    speedup: dict[str, float]
    refused: dict[str, str]
    kept_tflops: float
    arithmetic_intensity: float
    selection_share: float | None
    error: float
    error_limit: float
    verified_blocks: list[int]
    peak_memory_bytes: int | None
    input_bytes: int


def measurement(
    case: Case, backend: Backend, plan: Plan, found: Verification, stage_ms: dict[str, float], peak: int | None
) -> Measurement:
    """Of the attention of a plan alone; a benchmark of more replaces what it knows better."""
    batch, heads, groups, tokens, channels = case.shape
    operations = 4 * channels * kept_pairs(plan)
    input_bytes = batch * (heads + 2 * groups) * tokens * channels * case.dtype.itemsize
    output_bytes = batch * heads * tokens * channels * case.dtype.itemsize
    kept = int(plan.selection.count.sum())
    return Measurement(
        what=case.what,
        impl=backend.name,
        shape=[batch, heads, tokens, channels],
        groups=groups,
        dtype=str(case.dtype).removeprefix("torch."),
        sparsity=case.config.sparsity,
        achieved_sparsity=1 - kept / (plan.selection.count.numel() * case.blocks),
        config=dataclasses.asdict(plan.config),
        graph=uses_graph(case, backend),
        without_graph=[],
        stage_ms=stage_ms,
        total_ms=stage_ms["attend"],
        compensation_cost=None,
        baseline_ms={},
        speedup={},
        refused={},
        kept_tflops=operations / stage_ms["attend"] / 1e9,
        arithmetic_intensity=operations / (input_bytes + output_bytes + plan.selection.index.nbytes),
        selection_share=None,
        error=found.error,
        error_limit=found.limit,
        verified_blocks=[found.checked, found.blocks],
        peak_memory_bytes=peak,
        input_bytes=input_bytes,
    )


def resolve(case: Case) -> Backend:
    """The backend of a case; RuntimeError with the reason if it cannot run."""
    workload = Workload(case.dtype, case.shape.channels, case.config.block_size, case.scale)
    return choose_backend(case.impl, case.device, workload)


def make_inputs(case: Case) -> Inputs:
    """q, k and v, normally distributed, from the seed."""
    generator = torch.Generator(case.device).manual_seed(case.seed)
    batch, heads, groups, tokens, channels = case.shape
    sizes = ((batch, count, tokens, channels) for count in (heads, groups, groups))
    draw = functools.partial(torch.randn, device=case.device, dtype=case.dtype, generator=generator)
    return Inputs(*(draw(size) for size in sizes))


def uses_graph(case: Case, backend: Backend) -> bool:
    """Whether a case is short enough for launches to count, and its implementation never waits for the device."""
    return case.device.type == "cuda" and case.shape.tokens <= GRAPH_TOKENS and backend.name in KERNELS


def kept_pairs(plan: Plan) -> int:
    """Pairs of a query and a key that a plan keeps, over all heads; the last block may be shorter."""
    size, queries, keys = plan.config.block_size, plan.query_order.index.shape[-1], plan.key_order.index.shape[-1]
    index, count = plan.selection
    slots = torch.arange(index.shape[-1], device=index.device, dtype=torch.int32)
    keys_kept = torch.where(slots < count.unsqueeze(-1), (keys - index * size).clamp(max=size), 0).sum(-1)
    first = torch.arange(index.shape[2], device=index.device) * size
    return int((keys_kept * (queries - first).clamp(max=size)).sum())


def estimated_bytes(case: Case) -> int:
    """About what a case holds at once: tensors, sorted copies, orders, scores and lists, FlexAttention's tables."""
    batch, heads, groups, tokens, channels = case.shape
    query_side = batch * heads * tokens * channels * case.dtype.itemsize
    key_sides = 2 * query_side * groups // heads
    inputs = query_side + key_sides
    pairs = batch * heads * case.blocks**2
    lists = 4 * batch * heads * case.blocks * case.config.kept_blocks(case.blocks)
    total = inputs + query_side + 8 * batch * (heads + groups) * tokens + lists
    if case.device.type == "cuda":
        total += key_sides  # sorted copies
    if case.what == "operator":
        # Kernels score in slabs of 256 MiB; the stages hold scores and two sorts of them, with int64 places.
        total += min(4 * pairs, 2**28) if case.device.type == "cuda" else 28 * pairs
    if "flex" in case.against:
        total += inputs + query_side + 28 * pairs
    return total
