"""The operator where programs and machines are unkind: named checks, each of which passes, fails, or needs a GPU.

`python benchmarks/reliability.py --json FILE` runs all of them and ends with 1 if one failed. Results are compared with
the same call made alone, or with attention in float64 over the plan.
"""

import argparse
import contextlib
import functools
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tables import block
from torch import Tensor

from baatt import BAAttConfig, ba_attention, make_plan
from baatt.lab.bench.verification import require_verified, verify
from baatt.lab.records import RecordFile, provenance
from baatt.lab.tables import Record

SMALL = (1, 4, 1000, 64)


class Place(NamedTuple):
    """Where to run."""

    device: torch.device
    dtype: torch.dtype

    def draw(self, *shape: int, seed: int = 0, count: int = 3) -> list[Tensor]:
        """q, k and v [B, H, N, D]."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return [torch.randn(shape, device=self.device, dtype=self.dtype, generator=generator) for _ in range(count)]


def require(holds: bool, text: str) -> None:
    """AssertionError with the text unless it holds."""
    if not holds:
        raise AssertionError(text)


def attention_is_right(q: Tensor, k: Tensor, v: Tensor, config: BAAttConfig) -> dict[str, float]:
    """The error of a call against float64 over its own plan."""
    found = require_verified("the call", verify(q, k, v, make_plan(q, k, config), ba_attention(q, k, v, config)))
    return {"error": found.error, "limit": found.limit}


def empty_and_one_token(place: Place) -> dict[str, Any]:
    """No tokens are refused by name, one token gives its own value."""
    refused = 0
    for shape in ((1, 2, 0, 64), (0, 2, 8, 64), (1, 0, 8, 64)):
        try:
            ba_attention(*place.draw(*shape))
        except ValueError as error:
            refused += "without an empty axis" in str(error)
    require(refused == 3, f"3 empty inputs must be refused by name, got {refused}")
    q, k, v = place.draw(2, 3, 1, 64)
    torch.testing.assert_close(ba_attention(q, k, v), v)  # its own value
    return {"refused": refused}


def strided_views(place: Place) -> dict[str, Any]:
    """Views that are not contiguous give what their copies give."""
    batch, heads, tokens, channels = SMALL
    both = place.draw(batch, tokens, heads, 2 * channels)
    views = [x[..., ::2].transpose(1, 2) for x in both]
    require(not any(x.is_contiguous() for x in views), "the views must not be contiguous")
    same = torch.equal(ba_attention(*views), ba_attention(*(x.contiguous() for x in views)))
    require(same, "views must give what their copies give")
    return {}


def two_threads(place: Place) -> dict[str, Any]:
    """Threads with a stream each give what they give alone."""
    inputs = [place.draw(*SMALL, seed=seed) for seed in range(2)]
    alone = [ba_attention(*one) for one in inputs]
    wrong: list[str] = []

    def work(number: int) -> None:
        is_gpu = place.device.type == "cuda"
        stream = torch.cuda.Stream() if is_gpu else None
        if stream is not None:
            stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream) if is_gpu else contextlib.nullcontext():  # type: ignore[no-untyped-call]
            for _ in range(20):
                if not torch.equal(ba_attention(*inputs[number]), alone[number]):
                    wrong.append(f"thread {number}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    require(not wrong, f"{len(wrong)} of 40 results differ")
    return {"calls": 40}


def dynamic_shapes(place: Place) -> dict[str, Any]:
    """Seven lengths through torch.compile with dynamic shapes: at most two graphs."""
    graphs = []

    def backend(graph: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(len(inputs))
        function: Callable[..., Any] = graph.forward
        return function

    torch.compiler.reset()
    compiled = torch.compile(lambda q, k, v: 2 * ba_attention(q, k, v), backend=backend, fullgraph=True, dynamic=True)
    for tokens in (300, 301, 640, 777, 1024, 129, 2000):
        q, k, v = place.draw(1, 2, tokens, 64)
        require(torch.equal(compiled(q, k, v), 2 * ba_attention(q, k, v)), f"{tokens} tokens differ when compiled")
    require(len(graphs) <= 2, f"at most 2 graphs for 7 lengths, got {len(graphs)}")
    return {"lengths": 7, "graphs": len(graphs)}


#: On one thread: PyTorch's own do not survive a fork.
FORKED = """
import os, torch, baatt
torch.set_num_threads(1)
x = torch.randn(1, 2, 600, 64)

def forked():
    child = os.fork()
    if not child:
        both = [baatt.ba_attention(x, x, x, impl=impl) for impl in ("cpu", "reference")]
        os._exit(0 if torch.allclose(*both, atol=1e-5) else 3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

after_import = forked()
baatt.ba_attention(x, x, x, impl="cpu")
raise SystemExit(after_import or forked())
"""


def fork(place: Place) -> dict[str, Any]:
    """A process forked after the import, and after a call on the CPU, computes on."""
    del place
    done = subprocess.run([sys.executable, "-c", FORKED], timeout=240, check=False, capture_output=True, text=True)
    require(done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-300:]}")
    return {}


def two_streams(place: Place) -> dict[str, Any]:
    """Calls that run on two streams at once give what they give alone."""
    inputs = [place.draw(1, 16, 8192, 128, seed=seed) for seed in range(2)]
    alone = [ba_attention(*one) for one in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[number].append(ba_attention(*inputs[number]))
    torch.cuda.synchronize()
    wrong = sum(not torch.equal(one, alone[number]) for number in range(2) for one in found[number])
    require(wrong == 0, f"{wrong} of 40 results differ")
    return {"calls": 40}


def graph_after_other_work(place: Place) -> dict[str, Any]:
    """A CUDA graph replayed after calls of other shapes and an emptied cache gives the result of new inputs."""
    given = place.draw(1, 8, 4096, 128)
    graph = torch.cuda.CUDAGraph()
    for _ in range(3):
        ba_attention(*given)
    with torch.cuda.graph(graph):
        out = ba_attention(*given)
    for replay in range(5):
        other = place.draw(2, 4, 5000 + replay, 128, seed=replay)
        ba_attention(*other)
        del other
        torch.cuda.empty_cache()
        for old, new in zip(given, place.draw(1, 8, 4096, 128, seed=10 + replay), strict=True):
            old.copy_(new)
        graph.replay()
        require(torch.equal(out, ba_attention(*given)), f"replay {replay} differs")
    return {"replays": 5}


def out_of_memory(place: Place) -> dict[str, Any]:
    """After a call that found no memory, memory is as before and the same call works."""
    q, k, v = place.draw(1, 8, 65536, 128)
    expected = ba_attention(q, k, v)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    hog = torch.empty(free - 2**26, dtype=torch.uint8, device=place.device)
    try:
        ba_attention(q, k, v)
    except torch.OutOfMemoryError:
        pass
    else:
        raise AssertionError("the call must run out of memory")
    del hog
    torch.cuda.empty_cache()
    left = torch.cuda.memory_allocated() - before
    require(left == 0, f"{left} bytes are left behind")
    require(torch.equal(ba_attention(q, k, v), expected), "the call after it differs")
    return {}


def offsets_beyond_int32(place: Place) -> dict[str, Any]:
    """Tensors of more than 2^31 elements: every head against float64, and the last keeps the blocks it keeps alone."""
    q, k, v = place.draw(1, 34, 2**19, 128)
    require(q.numel() > 2**31, "more than 2^31 elements")
    config = BAAttConfig(sparsity=0.98)
    found = attention_is_right(q, k, v, config)
    whole, alone = (
        make_plan(*(x[:, heads] for x in (q, k)), config).selection for heads in (slice(None), slice(-1, None))
    )
    rows = [0, whole.count.shape[2] // 2, -1]
    both = [[set(one.index[0, -1, row, : one.count[0, -1, row]].tolist()) for row in rows] for one in (whole, alone)]
    # Other numbers of heads may round otherwise, which turns the order of scores that are nearly equal.
    least = min(len(a & b) / len(a | b) for a, b in zip(*both, strict=True))
    require(least > 0.9, f"the last head keeps other blocks than alone, {least:.0%} are common")
    return {"elements": q.numel(), "common_blocks": least, **found}


def a_million_tokens(place: Place) -> dict[str, Any]:
    """One sequence of 2^20 tokens against float64 over its plan."""
    return attention_is_right(*place.draw(1, 2, 2**20, 128), BAAttConfig(sparsity=0.95))


def many_heads(place: Place) -> dict[str, Any]:
    """More than 65,535 pairs of a batch entry and a head: the last are what they are alone."""
    for config in (BAAttConfig(), BAAttConfig(budget="head"), BAAttConfig.preset("paper")):
        q, k, v = place.draw(70, 1000, 200, 64)
        out = ba_attention(q, k, v, config)[-1:, -3:].clone()
        alone = ba_attention(*(x[-1:, -3:].contiguous() for x in (q, k, v)), config)
        require(torch.allclose(out, alone, atol=2e-2), f"{config.score}, budget {config.budget}: the last heads differ")
    return {"heads": 70_000}


#: name -> the check, and whether it needs a GPU
CHECKS: dict[str, tuple[Callable[[Place], dict[str, Any]], bool]] = {
    "empty and one token": (empty_and_one_token, False),
    "strided views": (strided_views, False),
    "two threads": (two_threads, False),
    "dynamic shapes": (dynamic_shapes, False),
    "fork": (fork, False),
    "two streams": (two_streams, True),
    "graph after other work": (graph_after_other_work, True),
    "out of memory": (out_of_memory, True),
    "offsets beyond 2^31": (offsets_beyond_int32, True),
    "a million tokens": (a_million_tokens, True),
    "many heads": (many_heads, True),
}


def run(name: str, place: Place) -> dict[str, Any]:
    """The record of a check; passed is None where it needs a GPU."""
    check, needs_gpu = CHECKS[name]
    if needs_gpu and place.device.type != "cuda":
        return {"check": name, "passed": None, "about": "it needs a GPU"}
    started = time.perf_counter()
    try:
        found: dict[str, Any] = {"passed": True, "about": check(place)}
    except Exception as error:  # whatever it is, the other checks still run
        found = {"passed": False, "about": f"{type(error).__name__}: {str(error)[:500]}"}
    if place.device.type == "cuda":
        torch.cuda.empty_cache()
    return {"check": name, **found, "seconds": time.perf_counter() - started}


def table(records: list[Record]) -> str:
    """Markdown: a row per check, of the last record that has it."""
    words = {True: "passed", False: "failed", None: "not run"}
    found = {one["check"]: one["passed"] for record in records for one in record["records"]}
    rows = [[name, (CHECKS[name][0].__doc__ or "").strip(), words[passed]] for name, passed in found.items()]
    return block(records, ("check", "what must hold", "result"), rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=f"checks: {', '.join(CHECKS)}")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--checks", default=",".join(CHECKS), help="some of the checks below, by commas")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    names = arguments.checks.split(",")
    if unknown := [name for name in names if name not in CHECKS]:
        parser.error(f"--checks must be of {', '.join(CHECKS)}, got {', '.join(unknown)}")
    device = torch.device(arguments.device)
    place = Place(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    command = shlex.join(["python", "benchmarks/reliability.py", *(sys.argv[1:] if argv is None else argv)])
    report = RecordFile(arguments.json, {"study": "reliability", **provenance(command, device)})
    say = functools.partial(print, flush=True)
    words = {True: "passed", False: "FAILED", None: "not run"}
    with torch.no_grad():
        for name in names:
            record = run(name, place)
            report.add(record)
            say(f"{name}: {words[record['passed']]}, {record.get('seconds', 0):.1f} s, {record['about']}")
    return 1 if any(record["passed"] is False for record in report.records) else 0


if __name__ == "__main__":
    sys.exit(main())
