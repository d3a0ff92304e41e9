"""Speed, error and memory of the operator on the CPU against dense scaled_dot_product_attention.

Verifies first: without sparsity against dense attention, and every sparsity against the reference stages, with the
error budget of the tests. Then times the operator, selection included, and dense attention in turn in one process,
forwards and backwards alternately, so that a change of the machine's mood hits both. Medians go to a JSON file.
Runs on Linux (it reads /proc).
"""

import argparse
import dataclasses
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from baatt import BAAttConfig, attend, ba_attention, make_plan
from baatt.backend import choose_backend, describe
from baatt.scores import SCORES
from baatt.stages.selection import select_blocks

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.budget import assert_within_budget, eager_dtype  # noqa: E402

Inputs = tuple[Tensor, Tensor, Tensor]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1x8x8192x64", help="BxHxNxD")
    parser.add_argument("--sparsity", default="0.5,0.875", help="comma-separated")
    parser.add_argument("--dtype", default="float32", choices=["float64", "float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each, at least 7")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None, help="where to store the record")
    parser.add_argument("--memory-of", type=float, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.shape = [int(size) for size in arguments.shape.split("x")]
    arguments.sparsity = [float(sparsity) for sparsity in arguments.sparsity.split(",")]
    if len(arguments.shape) != 4 or arguments.repeats < 7:
        parser.error("--shape needs four sizes BxHxNxD and --repeats at least 7")
    return arguments


def make_inputs(shape: list[int], dtype: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for _ in range(3))
    return q, k, v


def paper(sparsity: float) -> BAAttConfig:
    """The paper's dials: of all orders the one that costs most."""
    return dataclasses.replace(BAAttConfig.preset("paper"), sparsity=sparsity)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def verify(inputs: Inputs, sparsities: list[float]) -> dict[float, float]:
    """Largest absolute error per sparsity against float64 on the same plan; raises where it exceeds the budget."""
    q, _, _ = inputs
    exact, eager = (tuple(x.to(dtype) for x in inputs) for dtype in (torch.float64, eager_dtype(q.dtype)))
    everything = ba_attention(*inputs, paper(0.0), impl="cpu")
    assert_within_budget(everything, dense(*eager), dense(*exact))
    errors = {}
    for sparsity in sparsities:
        plan = make_plan(*inputs[:2], paper(sparsity), impl="cpu")
        actual = attend(*inputs, plan, impl="cpu")
        expected = attend(*exact, plan, impl="reference")
        assert_within_budget(actual, attend(*eager, plan, impl="reference"), expected)
        errors[sparsity] = (actual.double() - expected).abs().max().item()
    return errors


def milliseconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def time_in_turn(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median of each; a round runs all of them, every other round backwards."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats):
        for name in list(functions)[:: 1 if repeat % 2 == 0 else -1]:
            times[name].append(milliseconds(functions[name]))
    return {name: statistics.median(found) for name, found in times.items()}


def time_stages(inputs: Inputs, config: BAAttConfig, repeats: int) -> dict[str, float]:
    """Median of each step of the operator, as `make_plan` and `attend` call them."""
    q, k, _ = inputs
    backend, scale = choose_backend("cpu", q.device), q.shape[-1] ** -0.5
    plan = make_plan(q, k, config, impl="cpu")
    query_stats, key_stats, score = plan.query_summary, plan.key_summary, SCORES[config.score].compare
    scores = score(query_stats, key_stats, config, scale)
    steps: dict[str, Callable[[], Any]] = {
        "arrange": lambda: backend.sort_blocks(q, k, None, config, None),
        "score": lambda: score(query_stats, key_stats, config, scale),
        "select": lambda: select_blocks(scores, key_stats.size, config.sparsity),
        "attend": lambda: attend(*inputs, plan, impl="cpu"),
    }
    return time_in_turn(steps, repeats)


def peak_memory(sparsity: float, arguments: argparse.Namespace) -> int:
    """Bytes beyond the inputs, output included: growth of the resident set of a fresh process, nothing escapes it."""
    size = "x".join(map(str, arguments.shape))
    options = ["--shape", size, "--dtype", arguments.dtype, "--memory-of", str(sparsity)]
    run = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True, check=True)
    return int(run.stdout)


def print_memory(arguments: argparse.Namespace) -> None:
    """What `peak_memory` runs in its fresh process."""
    inputs, config = make_inputs(arguments.shape, arguments.dtype), paper(arguments.memory_of)
    ba_attention(*(x[:, :, :256] for x in inputs), config, impl="cpu")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    out = ba_attention(*inputs, config, impl="cpu")
    sys.stdout.write(f"{resident('VmHWM') - before}\n")
    del out


def resident(field: str) -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[field].split()[0]) * 1024


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def provenance(arguments: argparse.Namespace) -> dict[str, Any]:
    def output_of(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT).stdout.strip()

    changed = output_of("git", "status", "--porcelain", "--", "src", "benchmarks/cpu_operator.py")
    return {
        "command": shlex.join(["python", "benchmarks/cpu_operator.py", *sys.argv[1:]]),
        "commit": output_of("git", "rev-parse", "HEAD") + ("+changes" if changed else ""),
        "device": {"cpu": processor(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "what": "operator",
        "impl": next(entry.reason for entry in describe() if entry.impl == "cpu"),
        "shape": arguments.shape,
        "dtype": arguments.dtype,
        "repeats": arguments.repeats,
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    inputs = make_inputs(arguments.shape, arguments.dtype)
    configs = {sparsity: paper(sparsity) for sparsity in arguments.sparsity}
    errors = verify(inputs, arguments.sparsity)
    functions: dict[str, Callable[[], Any]] = {"dense": lambda: dense(*inputs)}
    for sparsity, config in configs.items():
        functions[str(sparsity)] = lambda config=config: ba_attention(*inputs, config, impl="cpu")
    times = time_in_turn(functions, arguments.repeats)
    input_bytes = sum(x.nbytes for x in inputs)
    records = []
    for sparsity, config in configs.items():
        peak = peak_memory(sparsity, arguments)
        total = times[str(sparsity)]
        records.append(
            {
                "sparsity": sparsity,
                "config": vars(config),
                "stage_ms": time_stages(inputs, config, arguments.repeats),
                "total_ms": total,
                "dense_ms": times["dense"],
                "speedup": times["dense"] / total,
                "error": errors[sparsity],
                "peak_memory_bytes": peak,
                "extra_memory_ratio": peak / input_bytes,
            }
        )
    return {**provenance(arguments), "records": records}


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.memory_of is not None:
        print_memory(arguments)
        return
    record = measure(arguments)
    for one in record["records"]:
        stages = ", ".join(f"{name} {time:.1f}" for name, time in one["stage_ms"].items())
        sys.stdout.write(
            f"sparsity {one['sparsity']}: {one['total_ms']:.1f} ms, dense {one['dense_ms']:.1f} ms, "
            f"{one['speedup']:.2f}x; error {one['error']:.1e}; extra memory {one['extra_memory_ratio']:.2f}x of the "
            f"inputs; stages in ms: {stages}\n"
        )
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
