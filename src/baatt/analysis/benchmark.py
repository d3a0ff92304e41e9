"""One measurement: the operator, or its attention kernel alone, verified first and then timed against baselines.

In: a `Case`. Out: a `Record`, or `VerificationError` before anything is timed. All candidates take turns in one
process; on a GPU up to 32768 tokens are timed as replays of a CUDA graph, baselines too, so that launches do not count.
Knows nothing of files, tables or pictures.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import repeat

from baatt.analysis.baselines import BASELINES, Inputs, RefusedError, first_line, prepare_baseline
from baatt.analysis.memory import peak_bytes
from baatt.analysis.stage_timing import attention_kernel, stage_functions
from baatt.analysis.timing import captured, median_times
from baatt.analysis.verification import require_verified, verify
from baatt.attention import ba_attention, make_plan
from baatt.backend import Backend, Workload, choose_backend
from baatt.config import BAAttConfig
from baatt.plan import Plan
from baatt.types import BlockSelection, BlockStats, TokenOrder

GRAPH_TOKENS = 32768
PAIR_ROUNDS = 25
KERNELS = ("triton", "hopper")
WHAT = ("operator", "kernel")


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


class Case(NamedTuple):
    """What to measure: "operator" or "kernel", on which tensors, with which dials, against which `BASELINES`."""

    what: str
    shape: Shape
    config: BAAttConfig
    dtype: torch.dtype
    device: torch.device
    impl: str = "auto"
    against: tuple[str, ...] = ()
    seed: int = 0


class Record(NamedTuple):
    """One measurement.

    what, impl, shape [B, H, N, D], groups, dtype, sparsity, config: what ran, `impl` never "auto".
    achieved_sparsity: share of block pairs skipped.
    graph: timed as replays of a CUDA graph; without_graph: the baselines that could not be.
    stage_ms: each stage alone; total_ms: the whole call, in turns with the baselines.
    compensation_cost: share by which the whole call is slower than with beta=0, the two in turns; None for a kernel.
    baseline_ms, speedup: by baseline; refused: baseline -> why it did not run.
    kept_tflops: 10^12 operations per second of the attention stage, kept pairs counted only.
    arithmetic_intensity: those operations per byte of q, k, v, output and lists, each moved once.
    selection_share: share of the sum of `stage_ms` that is not attention; None for a kernel.
    error, error_limit: relative L2, see `baatt.analysis.verification`; verified_blocks: [compared, all].
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


def measure(case: Case) -> Record:
    """Verify, then time.

    Raises:
        VerificationError: the output is out of budget; nothing was timed.
        RuntimeError: the implementation cannot run this.
    """
    backend = resolve(case)
    if case.device.type == "cuda":
        torch.cuda.empty_cache()
    inputs = make_inputs(case)
    return (_measure_kernel if case.what == "kernel" else _measure_operator)(case, backend, inputs)


def resolve(case: Case) -> Backend:
    """The backend of a case; RuntimeError with the reason if it cannot run."""
    workload = Workload(case.dtype, case.shape.channels, case.config.block_size, scale_of(case))
    return choose_backend(case.impl, case.device, workload)


def scale_of(case: Case) -> float:
    """1 / sqrt(D)."""
    return 1 / math.sqrt(case.shape.channels)


def make_inputs(case: Case) -> Inputs:
    """q, k and v, normally distributed, from the seed."""
    generator = torch.Generator(case.device).manual_seed(case.seed)
    batch, heads, groups, tokens, channels = case.shape
    sizes = ((batch, count, tokens, channels) for count in (heads, groups, groups))
    draw = functools.partial(torch.randn, device=case.device, dtype=case.dtype, generator=generator)
    return Inputs(*(draw(size) for size in sizes))


def _measure_operator(case: Case, backend: Backend, inputs: Inputs) -> Record:
    def operator(config: BAAttConfig) -> Callable[[], Any]:
        return lambda: ba_attention(*inputs, config, impl=backend.name)

    plan = make_plan(inputs.q, inputs.k, case.config, impl=backend.name)
    found = verify(*inputs, plan, ba_attention(*inputs, case.config, impl=backend.name))
    require_verified(_name(case, backend), found)
    peak = peak_bytes(operator(case.config), case.device)
    graph = uses_graph(case, backend)
    stage_ms = _times(stage_functions(inputs, plan, backend), case, graph)
    functions = {"total": operator(case.config), "uncompensated": operator(dataclasses.replace(case.config, beta=0.0))}
    if graph:
        functions = {name: captured(function, case.device) for name, function in functions.items()}
    # The two alone: beside dense attention, which heats the chip, their small difference drowns.
    pair = median_times(functions, case.device, PAIR_ROUNDS)
    baselines, refused, without_graph = _baselines(case, inputs, plan, graph)
    times = median_times({"total": functions["total"], **baselines}, case.device)
    total = times.pop("total")
    return _record(case, backend, plan, stage_ms)._replace(
        total_ms=total,
        compensation_cost=pair["total"] / pair["uncompensated"] - 1,
        baseline_ms=times,
        speedup={name: milliseconds / total for name, milliseconds in times.items()},
        refused=refused,
        without_graph=without_graph,
        selection_share=1 - stage_ms["attend"] / sum(stage_ms.values()),
        error=found.error,
        error_limit=found.limit,
        verified_blocks=[found.checked, found.blocks],
        peak_memory_bytes=peak,
    )


def _measure_kernel(case: Case, backend: Backend, inputs: Inputs) -> Record:
    plan = random_plan(case)
    kernel = attention_kernel(inputs, plan, backend)
    found = verify(*inputs, plan, kernel().out)
    require_verified(_name(case, backend), found)
    peak = peak_bytes(kernel, case.device)
    stage_ms = _times({"attend": kernel}, case, uses_graph(case, backend))
    return _record(case, backend, plan, stage_ms)._replace(
        error=found.error,
        error_limit=found.limit,
        verified_blocks=[found.checked, found.blocks],
        peak_memory_bytes=peak,
    )


def _record(case: Case, backend: Backend, plan: Plan, stage_ms: dict[str, float]) -> Record:
    """What follows from case, plan and stages; the rest is for the caller to replace."""
    batch, heads, groups, tokens, channels = case.shape
    operations = 4 * channels * kept_pairs(plan)
    input_bytes = batch * (heads + 2 * groups) * tokens * channels * case.dtype.itemsize
    output_bytes = batch * heads * tokens * channels * case.dtype.itemsize
    key_blocks = -(-tokens // case.config.block_size)
    kept = int(plan.selection.count.sum())
    return Record(
        what=case.what,
        impl=backend.name,
        shape=[batch, heads, tokens, channels],
        groups=groups,
        dtype=str(case.dtype).removeprefix("torch."),
        sparsity=case.config.sparsity,
        achieved_sparsity=1 - kept / (plan.selection.count.numel() * key_blocks),
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
        error=math.nan,
        error_limit=math.nan,
        verified_blocks=[],
        peak_memory_bytes=None,
        input_bytes=input_bytes,
    )


def _baselines(
    case: Case, inputs: Inputs, plan: Plan, graph: bool
) -> tuple[dict[str, Callable[[], Any]], dict[str, str], list[str]]:
    """Functions by name, reasons of those that refused, names of those that do not go into a graph."""
    functions: dict[str, Callable[[], Any]] = {}
    refused: dict[str, str] = {}
    without_graph: list[str] = []
    for name in case.against:
        try:
            functions[name] = prepare_baseline(name, inputs, plan)
        except RefusedError as error:
            refused[name] = str(error)
            continue
        if not graph:
            continue
        try:
            functions[name] = captured(functions[name], case.device)
        except Exception as error:  # of a compiled function nobody knows what it does inside
            without_graph.append(f"{name}: {type(error).__name__}: {first_line(error)}")
    return functions, refused, without_graph


def _times(functions: dict[str, Callable[[], Any]], case: Case, graph: bool) -> dict[str, float]:
    if graph:
        functions = {name: captured(function, case.device) for name, function in functions.items()}
    return median_times(functions, case.device)


def uses_graph(case: Case, backend: Backend) -> bool:
    """Whether a case is short enough for launches to count, and its implementation never waits for the device."""
    return case.device.type == "cuda" and case.shape.tokens <= GRAPH_TOKENS and backend.name in KERNELS


def random_plan(case: Case) -> Plan:
    """Random ascending lists of distinct blocks over tokens in their own order."""
    batch, heads, groups, tokens, _ = case.shape
    size = case.config.block_size
    blocks = -(-tokens // size)
    kept = max(1, math.ceil((1 - case.config.sparsity) * blocks))
    generator = torch.Generator(case.device).manual_seed(case.seed)
    index = torch.empty(batch, heads, blocks, kept, dtype=torch.int32, device=case.device)
    for row in index.flatten(0, 1):  # head by head: the random table is [I, J]
        table = torch.rand(blocks, blocks, device=case.device, generator=generator)
        row.copy_(table.topk(kept).indices.sort().values)
    count = torch.full(index.shape[:3], kept, dtype=torch.int32, device=case.device)
    positions = torch.arange(tokens, device=case.device)
    length = torch.full((batch,), tokens, device=case.device)
    query_order, key_order = (
        TokenOrder(repeat(positions, "n -> b h n", b=batch, h=side).contiguous(), length) for side in (heads, groups)
    )
    nothing = torch.empty(0, device=case.device)
    stats = BlockStats(nothing, nothing, nothing)
    config = dataclasses.replace(case.config, sort="none")
    return Plan(config, scale_of(case), query_order, key_order, stats, stats, BlockSelection(index, count))


def kept_pairs(plan: Plan) -> int:
    """Pairs of a query and a key that a plan keeps, over all heads; the last block may be shorter."""
    size, queries, keys = plan.config.block_size, plan.query_order.index.shape[-1], plan.key_order.index.shape[-1]
    index, count = plan.selection
    slots = torch.arange(index.shape[-1], device=index.device, dtype=torch.int32)
    keys_kept = torch.where(slots < count.unsqueeze(-1), (keys - index * size).clamp(max=size), 0).sum(-1)
    first = torch.arange(index.shape[2], device=index.device) * size
    return int((keys_kept * (queries - first).clamp(max=size)).sum())


def static_refusals(case: Case) -> dict[str, str]:
    """Baselines that are known not to run, without running anything."""
    reasons = {name: BASELINES[name].refusal(case.device.type, case.dtype) for name in case.against}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def estimated_bytes(case: Case) -> int:
    """About what a case holds at once: tensors, sorted copies, orders, scores and lists, FlexAttention's tables."""
    batch, heads, groups, tokens, channels = case.shape
    blocks = -(-tokens // case.config.block_size)
    kept = max(1, math.ceil((1 - case.config.sparsity) * blocks))
    query_side = batch * heads * tokens * channels * case.dtype.itemsize
    key_sides = 2 * query_side * groups // heads
    inputs = query_side + key_sides
    pairs = batch * heads * blocks * blocks
    orders, lists = 8 * batch * (heads + groups) * tokens, 4 * batch * heads * blocks * kept
    total = inputs + query_side + orders + lists
    if case.device.type == "cuda":
        total += key_sides  # sorted copies
    if case.what == "operator":
        # Kernels score in slabs of 256 MiB; the stages hold scores and two sorts of them, with int64 places.
        total += min(4 * pairs, 2**28) if case.device.type == "cuda" else 28 * pairs
    if "flex" in case.against:
        total += inputs + query_side + 28 * pairs
    return total


def _name(case: Case, backend: Backend) -> str:
    return f"{case.what} {backend.name} at {case.shape}, sparsity {case.config.sparsity:g}"
