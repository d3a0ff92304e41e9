"""Times the whole operator on a GPU against dense attention, and the kernel alone, in one run; verifies first.

In: shapes and sparsities. Out: one JSON file with a record per case. `python benchmarks/gpu_operator.py --json FILE`.
Small shapes are timed as replays of a CUDA graph, dense baselines too, so that launches do not count.
"""

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import baatt
from baatt import BAAttConfig, ba_attention, make_plan
from baatt.backend import Workload, choose_backend
from baatt.kernels import hopper, triton_attention
from baatt.types import BlockSelection, Plan, TokenOrder

BASELINES = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
KERNELS = {"hopper": hopper, "triton": triton_attention}
OPERATOR = [(4096, 0.5), (16384, 0.5), (32768, 0.5), (32768, 0.9), (131072, 0.9), (262144, 0.9)]
KERNEL = [(4096, 0.5), (32768, 0.0), (32768, 0.5), (32768, 0.9), (131072, 0.9)]
BLOCK = 128


def median_ms(function: Callable[[], Any], *, graph: bool) -> float:
    """Median time of one call, by events; as replays of a graph if asked."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    call = function
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            function()
        call = captured.replay
    times: list[float] = []
    while len(times) < 7 or (sum(times) < 300 and len(times) < 200):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def inputs(heads: int, tokens: int, channels: int) -> list[Tensor]:
    """q, k, v from a fixed seed."""
    generator = torch.Generator("cuda").manual_seed(0)
    size = (1, heads, tokens, channels)
    return [torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(3)]


def verify(q: Tensor, k: Tensor, v: Tensor, plan: Plan, out: Tensor) -> tuple[float, float]:
    """Relative L2 error against fp64 with the same plan on three query blocks a head, and the limit (rule 14)."""
    exact, eager, actual = [], [], []
    blocks = plan.selection.index.shape[2]
    for block in sorted({0, blocks // 2, blocks - 1}):
        for head in range(q.shape[1]):
            rows = plan.query_order.index[0, head, block * BLOCK : (block + 1) * BLOCK]
            kept = plan.selection.index[0, head, block, : int(plan.selection.count[0, head, block])].long()
            places = (kept[:, None] * BLOCK + torch.arange(BLOCK, device=q.device)).flatten()
            keys = plan.key_order.index[0, head][places[places < k.shape[2]]]
            for results, dtype in ((exact, torch.float64), (eager, torch.float32)):
                scores = q[0, head, rows].to(dtype) @ k[0, head, keys].to(dtype).T * plan.scale
                results.append(scores.softmax(-1) @ v[0, head, keys].to(dtype))
            actual.append(out[0, head, rows].double())
    truth = torch.cat(exact)
    error = ((torch.cat(actual) - truth).norm() / truth.norm()).item()
    rounded = torch.cat(eager).to(q.dtype).double()
    limit = 2 * ((rounded - truth).norm() / truth.norm()).item() + torch.finfo(q.dtype).eps / 2
    return error, limit


def operator(heads: int, tokens: int, channels: int, sparsity: float, impl: str, *, dense: bool) -> dict[str, Any]:
    """One record of the whole operator."""
    q, k, v = inputs(heads, tokens, channels)
    config, graph = BAAttConfig(sparsity=sparsity), tokens <= 32768
    plan = make_plan(q, k, config, impl=impl)
    torch.cuda.reset_peak_memory_stats()
    out = ba_attention(q, k, v, config, impl=impl)
    peak = torch.cuda.max_memory_allocated()
    error, limit = verify(q, k, v, plan, out)
    if not error <= limit:
        raise RuntimeError(f"verification failed at {tokens} tokens: error {error:.2e} is above {limit:.2e}")
    del out
    backend = choose_backend(impl, q.device, Workload(q.dtype, channels, BLOCK, plan.scale))
    arranged = backend.arrange(q, k, v, config, None)
    side = (plan.query_order, plan.key_order.length, plan.selection)
    stages: dict[str, Callable[[], Any]] = {
        "arrange": lambda: backend.arrange(q, k, v, config, None),
        "score_and_select": lambda: backend.choose_blocks(plan.query_stats, plan.key_stats, config, plan.scale),
        "attend": lambda: KERNELS[impl].attend_sorted(
            arranged.sorted_q, arranged.sorted_k, arranged.sorted_v, *side, block_size=BLOCK, scale=plan.scale
        ),
    }
    stage_ms = {name: median_ms(function, graph=graph) for name, function in stages.items()}
    total = median_ms(lambda: ba_attention(q, k, v, config, impl=impl), graph=graph)
    off = BAAttConfig(sparsity=sparsity, beta=0.0)
    without = median_ms(lambda: ba_attention(q, k, v, off, impl=impl), graph=graph)
    baseline: dict[str, float] = {}
    for name, choice in BASELINES.items() if dense else ():
        with sdpa_kernel(choice):
            baseline[name] = median_ms(lambda: scaled_dot_product_attention(q, k, v), graph=graph)
    kept = int(plan.selection.count.sum())
    return {
        "what": "operator", "impl": impl, "shape": [1, heads, tokens, channels], "dtype": "bfloat16",
        "sparsity": sparsity, "config": vars(config), "graph": graph, "stage_ms": stage_ms, "total_ms": total,
        "total_ms_without_compensation": without, "baseline_ms": baseline,
        "kept_tflops": 4 * BLOCK * BLOCK * channels * kept / stage_ms["attend"] / 1e9,
        "speedup": {name: ms / total for name, ms in baseline.items()},
        "selection_share": 1 - stage_ms["attend"] / total,
        "error": error, "error_limit": limit, "peak_memory_bytes": peak,
    }  # fmt: skip


def kernel(heads: int, tokens: int, channels: int, sparsity: float, impl: str) -> dict[str, Any]:
    """One record of the attention kernel alone on sorted random lists."""
    q, k, v = inputs(heads, tokens, channels)
    blocks = tokens // BLOCK
    kept = max(1, math.ceil((1 - sparsity) * blocks))
    lists = [torch.rand(blocks, blocks, device="cuda").topk(kept).indices.sort().values.int() for _ in range(heads)]
    index = torch.stack(lists)[None].contiguous()
    selection = BlockSelection(index, torch.full(index.shape[:3], kept, device="cuda", dtype=torch.int32))
    positions = torch.arange(tokens, device="cuda").expand(1, heads, tokens).contiguous()
    order = TokenOrder(positions, torch.tensor([tokens], device="cuda"))
    scale = channels**-0.5
    plan = Plan(BAAttConfig(sparsity=sparsity, sort="none"), scale, order, order, None, None, selection)  # type: ignore[arg-type]

    def run() -> Tensor:
        return KERNELS[impl].attend_sorted(q, k, v, order, order.length, selection, block_size=BLOCK, scale=scale).out

    error, limit = verify(q, k, v, plan, run())
    if not error <= limit:
        raise RuntimeError(f"verification failed at {tokens} tokens: error {error:.2e} is above {limit:.2e}")
    ms = median_ms(run, graph=tokens <= 32768)
    return {
        "what": "kernel", "impl": impl, "shape": [1, heads, tokens, channels], "dtype": "bfloat16",
        "sparsity": sparsity, "total_ms": ms,
        "kept_tflops": 4 * BLOCK * BLOCK * channels * kept * blocks * heads / ms / 1e9,
        "error": error, "error_limit": limit,
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--impl", default="hopper", choices=list(KERNELS))
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    peak = 2 * 8192**3 / median_ms(lambda: square @ square, graph=False) / 1e9
    commit = Path(".commit").read_text().strip() if Path(".commit").exists() else None
    if commit is None:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    records: list[dict[str, Any]] = []
    result = {
        "study": "GPU operator and kernel", "command": shlex.join(["python", *sys.argv]), "commit": commit,
        "device": torch.cuda.get_device_name(), "matrix_peak_tflops": peak,
        "versions": {
            "torch": torch.__version__, "triton": triton.__version__, "cudnn": torch.backends.cudnn.version(),
            "baatt": baatt.__version__,
        },
        "records": records,
    }  # fmt: skip
    cases: list[Callable[[], dict[str, Any]]] = []
    cases += [lambda n=n, s=s: kernel(32, n, 128, s, arguments.impl) for n, s in KERNEL]
    cases += [lambda: kernel(32, 32768, 64, 0.5, arguments.impl)]
    cases += [lambda n=n, s=s: operator(32, n, 128, s, arguments.impl, dense=True) for n, s in OPERATOR]
    cases += [lambda: operator(8, 2**20, 128, 0.9, arguments.impl, dense=False)]
    for case in cases:
        record = case()
        records.append(record)
        arguments.json.write_text(json.dumps(result, indent=1))
        shown = {key: record[key] for key in ("what", "shape", "sparsity", "total_ms", "kept_tflops")}
        print({**shown, **{key: record.get(key) for key in ("speedup", "selection_share", "stage_ms")}}, flush=True)  # noqa: T201
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
