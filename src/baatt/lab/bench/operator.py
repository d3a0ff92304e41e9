"""The benchmark "operator": the whole call, stage by stage and in turns with baselines.

All candidates take turns in one process; on a GPU up to 32768 tokens are timed as replays of a CUDA graph, baselines
too, so that launches do not count.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from baatt.attention import ba_attention, make_plan
from baatt.backend import Backend
from baatt.config import BAAttConfig
from baatt.lab.bench.baselines import RefusedError, first_line, prepare_baseline
from baatt.lab.bench.case import Case, Inputs, Measurement, measurement, uses_graph
from baatt.lab.bench.memory import peak_bytes
from baatt.lab.bench.stages import stage_functions
from baatt.lab.bench.timing import captured, median_times
from baatt.lab.bench.verification import require_verified, verify
from baatt.plan import Plan

PAIR_ROUNDS = 25


def measure_operator(case: Case, backend: Backend, inputs: Inputs) -> Measurement:
    """Every stage alone, then the whole call in turns with beta 0 and with the baselines."""

    def operator(config: BAAttConfig) -> Callable[[], Any]:
        return lambda: ba_attention(*inputs, config, impl=backend.name)

    plan = make_plan(inputs.q, inputs.k, case.config, impl=backend.name)
    found = require_verified(
        case.title(backend), verify(*inputs, plan, ba_attention(*inputs, case.config, impl=backend.name))
    )
    peak = peak_bytes(operator(case.config), case.device)
    graph = uses_graph(case, backend)
    stage_ms = median_times(stage_functions(inputs, plan, backend), case.device, graph=graph)
    functions = {"total": operator(case.config), "uncompensated": operator(dataclasses.replace(case.config, beta=0.0))}
    if graph:
        functions = {name: captured(function, case.device) for name, function in functions.items()}
    # The two alone: beside dense attention, which heats the chip, their small difference drowns.
    pair = median_times(functions, case.device, PAIR_ROUNDS)
    baselines, refused, without_graph = _baselines(case, inputs, plan, graph)
    times = median_times({"total": functions["total"], **baselines}, case.device)
    total = times.pop("total")
    return measurement(case, backend, plan, found, stage_ms, peak)._replace(
        total_ms=total,
        compensation_cost=pair["total"] / pair["uncompensated"] - 1,
        baseline_ms=times,
        speedup={name: milliseconds / total for name, milliseconds in times.items()},
        refused=refused,
        without_graph=without_graph,
        selection_share=1 - stage_ms["attend"] / sum(stage_ms.values()),
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
