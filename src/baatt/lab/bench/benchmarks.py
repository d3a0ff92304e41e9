"""Every benchmark by name, and one measurement: verified first, then timed.

In: a `Case`. Out: a record, ready for JSON, or `VerificationError` before anything is timed. All candidates take turns
in one process; on a GPU up to 32768 tokens are timed as replays of a CUDA graph, baselines too, so that launches do not
count. The only file here that knows how a `Backend` is put together.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from baatt.attention import ba_attention, make_plan
from baatt.backend import Backend
from baatt.lab.bench.baselines import first_line, prepare_baseline, sort_tokens
from baatt.lab.bench.case import Case, Inputs, RefusedError, make_inputs, resolve
from baatt.lab.bench.peers import NO_GRAPH
from baatt.lab.bench.timing import captured, matrix_peak_tflops, median_times, memory_bandwidth, peak_bytes
from baatt.lab.bench.verification import require_verified, verify
from baatt.lab.records import RecordFile, provenance
from baatt.plan import Plan
from baatt.scores import SCORES
from baatt.types import BlockSelection, BlockStats, Partial, TokenOrder

#: Implementations that never wait for the device, and whose attention takes the sorted copies of the first stage.
KERNELS = ("triton", "hopper")
GRAPH_TOKENS = 32768
PAIR_ROUNDS = 25
#: Fields of a stored report.
REPORT = ("command", "commit", "device", "versions", "matrix_peak_tflops", "matrix_peak_dtype", "memory_bandwidth")


def measure(case: Case) -> dict[str, Any]:
    """Verify, then time; what was found as it is stored, field by field in `_record`.

    Raises:
        VerificationError: the output is out of budget; nothing was timed.
        RuntimeError: the implementation cannot run this.
    """
    backend = resolve(case)
    if case.device.type == "cuda":
        torch.cuda.empty_cache()
    return BENCHMARKS[case.what](case, backend, make_inputs(case))


def start_report(command: str, device: torch.device, dtype: torch.dtype, path: Path | None = None) -> RecordFile:
    """A file for measurements, with `REPORT` as its header: measures the machine's ceilings, which takes seconds.

    matrix_peak_tflops: of a large product in `matrix_peak_dtype`; memory_bandwidth: bytes per second of a large copy.
    """
    ceilings = {
        "matrix_peak_tflops": matrix_peak_tflops(device, dtype),
        "matrix_peak_dtype": str(dtype).removeprefix("torch."), "memory_bandwidth": memory_bandwidth(device),
    }  # fmt: skip
    return RecordFile(path, provenance(command, device) | ceilings)


def measure_operator(case: Case, backend: Backend, inputs: Inputs) -> dict[str, Any]:
    """Every stage alone, then the whole call in turns with beta 0, where the score reads it, and with the baselines."""
    options: dict[str, Any] = {"impl": backend.name, "causal": case.causal}
    total, uncompensated = (
        functools.partial(ba_attention, *inputs, dataclasses.replace(case.config, beta=beta), **options)
        for beta in (case.config.beta, 0.0)
    )
    plan = make_plan(inputs.q, inputs.k, case.config, **options)
    stages: dict[str, Callable[[], Any]] = {
        "arrange": functools.partial(backend.sort_blocks, *inputs, plan.config, None),
        "score_and_select": lambda: backend.choose_blocks(
            plan.query_summary, plan.key_summary, plan.config, plan.scale, plan.sight
        ),
        "attend": attention_kernel(inputs, plan, backend),
    }
    record = _record(case, backend, inputs, plan, total, stages)
    functions: dict[str, Callable[[], Any]] = {"total": total}
    if "beta" in SCORES[case.config.score].options:
        functions["uncompensated"] = uncompensated
    if record["graph"]:
        functions = {name: captured(function, case.device) for name, function in functions.items()}
    if len(functions) > 1:
        # The two alone: beside dense attention, which heats the chip, their small difference drowns.
        pair = median_times(functions, case.device, PAIR_ROUNDS)
        record["compensation_cost"] = pair["total"] / pair["uncompensated"] - 1
    stages_ms = record["stage_ms"]
    record["selection_share"] = 1 - stages_ms["attend"] / sum(stages_ms.values())
    return record | in_turns(record, case, inputs, plan, functions["total"])


def in_turns(
    record: Mapping[str, Any], case: Case, inputs: Inputs, plan: Plan, function: Callable[[], Any]
) -> dict[str, Any]:
    """The fields of a record that come from a function in turns with the baselines; tells the record of refusals."""
    candidates = {"total": function}
    for name in case.against:
        try:
            candidates[name] = prepare_baseline(name, inputs, plan)
        except RefusedError as error:
            record["refused"][name] = str(error)
            continue
        if not record["graph"]:
            continue
        if name.removeprefix("xattention-") in NO_GRAPH:
            record["without_graph"].append(f"{name}: its kernels do not bear being replayed")
            continue
        try:
            candidates[name] = captured(candidates[name], case.device)
        except Exception as error:  # of a compiled function nobody knows what it does inside
            record["without_graph"].append(f"{name}: {type(error).__name__}: {first_line(error)}")
    times = median_times(candidates, case.device)
    total_ms = times.pop("total")
    speedup = {name: milliseconds / total_ms for name, milliseconds in times.items()}
    return {"total_ms": total_ms, "baseline_ms": times, "speedup": speedup}


def measure_kernel(case: Case, backend: Backend, inputs: Inputs) -> dict[str, Any]:
    """The attention of a plan alone, over random lists of blocks of tokens in their own order; in turns with others."""
    plan = random_plan(case)
    kernel = attention_kernel(inputs, plan, backend)
    record = _record(case, backend, inputs, plan, lambda: kernel().out, {"attend": kernel})
    if not case.against:
        return record
    return record | in_turns(record, case, inputs, plan, captured(kernel, case.device) if record["graph"] else kernel)


def attention_kernel(inputs: Inputs, plan: Plan, backend: Backend) -> Callable[[], Partial]:
    """The attention of a plan alone: on sorted keys, if they move, where the implementation takes them, else with its
    gathers."""
    copies: dict[str, Tensor] = {}
    if backend.name in KERNELS and not plan.key_order.identity:
        copies = {"sorted_k": sort_tokens(inputs.k, plan.key_order), "sorted_v": sort_tokens(inputs.v, plan.key_order)}
    return functools.partial(
        backend.sparse_attention, *inputs, plan.query_order, plan.key_order, plan.selection,
        block_size=plan.config.block_size, scale=plan.scale, **copies,
    )  # fmt: skip


def random_plan(case: Case) -> Plan:
    """Random ascending lists of as many distinct blocks each, over tokens in their own order."""
    batch, heads, groups, tokens, _ = case.shape
    blocks, kept = case.blocks, case.config.kept_blocks(case.blocks)
    generator = torch.Generator(case.device).manual_seed(case.seed)
    index = torch.empty(batch, heads, blocks, kept, dtype=torch.int32, device=case.device)
    for row in index.flatten(0, 1):  # head by head: the random table is [I, J]
        table = torch.rand(blocks, blocks, device=case.device, generator=generator)
        row.copy_(table.topk(kept).indices.sort().values)
    count = torch.full(index.shape[:3], kept, dtype=torch.int32, device=case.device)
    positions = torch.arange(tokens, device=case.device)
    length = torch.full((batch,), tokens, device=case.device)
    query_order, key_order = (
        TokenOrder(repeat(positions, "n -> b h n", b=batch, h=side), length, identity=True) for side in (heads, groups)
    )
    nothing = torch.empty(0, device=case.device)
    stats = BlockStats(nothing, nothing, nothing)
    config = dataclasses.replace(case.config, sort="none", budget="row")
    return Plan(config, case.scale, query_order, key_order, stats, stats, BlockSelection(index, count))


def kept_pairs(plan: Plan) -> int:
    """Pairs of a query and a key that a plan keeps, over all heads; the last block may be shorter."""
    size, queries, keys = plan.config.block_size, plan.query_order.index.shape[-1], plan.key_order.index.shape[-1]
    index, count = plan.selection[:2]
    slots = torch.arange(index.shape[-1], device=index.device, dtype=torch.int32)
    used, first = slots < count.unsqueeze(-1), torch.arange(index.shape[2], device=index.device) * size
    if plan.sight is not None:  # query by query, a row of a block at a time
        limits = plan.sight.limit.long().unbind(-1)
        seen = ((limit[:, None, :, None] - index * size).clamp(0, size) * used for limit in limits)
        return sum(int(keys_seen.sum()) for keys_seen in seen)
    keys_kept = torch.where(used, (keys - index * size).clamp(max=size), 0).sum(-1)
    return int((keys_kept * (queries - first).clamp(max=size)).sum())


def seen_blocks(plan: Plan, blocks: int) -> int:
    """Block pairs over all heads of which some query sees some key; `blocks`: J."""
    if plan.sight is None:
        return plan.selection.count.numel() * blocks
    return int(plan.sight.spans[..., 3].sum()) * plan.selection.count.shape[1]


def _record(
    case: Case, backend: Backend, inputs: Inputs, plan: Plan, call: Callable[[], Tensor],
    stages: Mapping[str, Callable[[], Any]],
) -> dict[str, Any]:  # fmt: skip
    """Verifies `call`, then times the stages; what only the whole operator has is empty."""
    name = f"{case.what} {backend.name} at {case.shape}, sparsity {case.config.sparsity:g}"
    found = require_verified(name, verify(*inputs, plan, call()))
    peak = peak_bytes(call, case.device)
    graph = case.device.type == "cuda" and case.shape.tokens <= GRAPH_TOKENS and backend.name in KERNELS
    stage_ms = median_times(stages, case.device, graph=graph)
    input_bytes = sum(x.nbytes for x in inputs)
    operations = 4 * case.shape.channels * kept_pairs(plan)
    selection, kept_blocks = plan.selection, int(plan.selection.count.sum())
    return {
        "what": case.what,
        "impl": backend.name,  # never "auto"
        "shape": list(inputs.q.shape),
        "groups": case.shape.groups,
        "dtype": str(case.dtype).removeprefix("torch."),
        "causal": case.causal,  # tokens per causal block; None: bidirectional
        "sparsity": case.config.sparsity,
        "achieved_sparsity": 1 - kept_blocks / seen_blocks(plan, case.blocks),  # of block pairs that are seen
        "config": dataclasses.asdict(plan.config),
        "graph": graph,  # timed as replays of a CUDA graph
        "without_graph": [],  # the baselines that could not be, with the reason
        "stage_ms": stage_ms,  # each stage alone
        "total_ms": stage_ms["attend"],  # the whole call, in turns with the baselines
        # Share by which the whole call is slower than with beta=0, the two in turns; of scores that read it.
        "compensation_cost": None,
        "baseline_ms": {},
        "speedup": {},
        "refused": {},  # baseline -> why it did not run
        "kept_tflops": operations / stage_ms["attend"] / 1e9,  # of the attention stage, kept pairs counted only
        # Those operations per byte of q, k, v, output and lists, each moved once.
        "arithmetic_intensity": operations / (input_bytes + inputs.q.nbytes + kept_blocks * selection.index.itemsize),
        "selection_share": None,  # of the sum of `stage_ms`, what is not attention
        "error": found.error,  # relative L2
        "error_limit": found.limit,
        "verified_blocks": [found.checked, found.blocks],
        "peak_memory_bytes": peak,  # beyond the inputs, output included; None where unknown
        "input_bytes": input_bytes,  # q, k and v
    }


#: name -> verifies and measures a case. A new benchmark is a function and a line here.
BENCHMARKS: dict[str, Callable[[Case, Backend, Inputs], dict[str, Any]]] = {
    "operator": measure_operator,
    "kernel": measure_kernel,
}
