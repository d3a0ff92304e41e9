"""The benchmark "kernel": the attention of a plan alone, over random lists of blocks."""

import dataclasses

import torch
from einops import repeat

from baatt.backend import Backend
from baatt.lab.bench.case import Case, Inputs, Measurement, measurement, uses_graph
from baatt.lab.bench.memory import peak_bytes
from baatt.lab.bench.stages import attention_kernel
from baatt.lab.bench.timing import median_times
from baatt.lab.bench.verification import require_verified, verify
from baatt.plan import Plan
from baatt.types import BlockSelection, BlockStats, TokenOrder


def measure_kernel(case: Case, backend: Backend, inputs: Inputs) -> Measurement:
    """The kernel on tokens in their own order."""
    plan = random_plan(case)
    kernel = attention_kernel(inputs, plan, backend)
    found = require_verified(case.title(backend), verify(*inputs, plan, kernel().out))
    peak = peak_bytes(kernel, case.device)
    stage_ms = median_times({"attend": kernel}, case.device, graph=uses_graph(case, backend))
    return measurement(case, backend, plan, found, stage_ms, peak)


def random_plan(case: Case) -> Plan:
    """Random ascending lists of distinct blocks over tokens in their own order."""
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
        TokenOrder(repeat(positions, "n -> b h n", b=batch, h=side).contiguous(), length) for side in (heads, groups)
    )
    nothing = torch.empty(0, device=case.device)
    stats = BlockStats(nothing, nothing, nothing)
    config = dataclasses.replace(case.config, sort="none")
    return Plan(config, case.scale, query_order, key_order, stats, stats, BlockSelection(index, count))
