"""Whole models with dense and with sparse attention: one pass, one denoising step, one prompt or one answer.

`python benchmarks/end_to_end.py --json FILE` goes through `CASES` and writes the file again after each. Of every case a
model of one or two layers is verified first on the same input (sparsity 0 against dense) and warms everything up; then
the whole model runs dense (one row a backend of PyTorch) and sparse in turns. Weights are random: time does not depend
on them. The share of attention is that of the self-attention of the small model, by the number of calls.
"""

import argparse
import contextlib
import gc
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from unittest import mock

import torch
from end_to_end_models import HUNYUAN, LLADA_8B, LLAMA_8B, WAN_1B, WAN_14B, Case, Client, build, parameters, tokens_of
from tables import block, verdict
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import baatt
from baatt.integrations.calls import SdpaCall
from baatt.lab.bench.baselines import first_line
from baatt.lab.bench.timing import synchronise
from baatt.lab.records import RecordFile, provenance
from baatt.lab.tables import Record, gibibytes, percent, short_length, times

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip
#: Latents of 81 frames at 832 x 480 and 1280 x 720, and of 129 frames at 1280 x 720.
LOW, HIGH, LONG = (21, 60, 104), (21, 90, 160), (33, 90, 160)
FEWER = {"n_layers": 2}
CASES: dict[str, Case] = {
    **{f"llada-8b-{n}K": Case("llada", LLADA_8B, FEWER, (1024 * n,)) for n in (4, 8, 16, 32, 64)},
    **{
        f"llada-8b-answer-{n}K": Case("llada", LLADA_8B, FEWER, (1024 * n,), against=("cudnn",), answer=64)
        for n in (8, 16, 32, 64)
    },
    "wan-1.3b-480p": Case("wan", WAN_1B, {"num_layers": 2}, LOW),
    "wan-1.3b-720p": Case("wan", WAN_1B, {"num_layers": 2}, HIGH),
    "wan-14b-480p": Case("wan", WAN_14B, {"num_layers": 2}, LOW),
    "wan-14b-720p": Case("wan", WAN_14B, {"num_layers": 2}, HIGH, (0.5, 0.75, 0.9), ("cudnn",)),
    "hunyuan-720p": Case("hunyuan", HUNYUAN, {"num_layers": 1, "num_single_layers": 1}, LONG, against=("cudnn",)),
    "llama-8b-32K": Case("decoder", LLAMA_8B, {"num_hidden_layers": 2}, (32768,)),
    "llama-8b-128K": Case("decoder", LLAMA_8B, {"num_hidden_layers": 2}, (131072,), against=("cudnn",)),
}
#: case -> sparsity, least speed-up over the fastest dense
BARS = {"llada-8b-32K": (0.9, 1.8), "wan-14b-720p": (0.75, 1.7)}
#: Rounds are taken until this many seconds of a case are over.
ENOUGH, MOST_ROUNDS = 10.0, 7
#: An answer is many short steps, which wait for the processor, and its times scatter.
LEAST_ROUNDS_OF_ANSWERS, ENOUGH_OF_ANSWERS = 3, 40.0
#: A self-attention of fewer queries is none that could be sparse.
FEW = 256

#: What is entered around an evaluation; gives what counts its calls, a `Dense` or a `Handle`.
Candidate = Callable[[], AbstractContextManager[Any]]


class Evaluation(NamedTuple):
    """One evaluation of a whole model."""

    seconds: float
    peak_bytes: int | None
    counts: Any


class Examined(NamedTuple):
    """What a small model told: seconds of one dense self-attention, refusals, error of sparsity 0 and its limit."""

    attention: dict[str, float]
    refused: dict[str, str]
    error: float
    limit: float


class Dense:
    """Self-attention by one backend of PyTorch; other calls as they come. `attend` stands in for PyTorch's function.

    A mask that hides nothing is left out, which favours dense attention, and grouped heads are repeated where the
    backend knows none. calls, seconds: of self-attention; seconds are counted where `is_timed`, and wait.
    """

    def __init__(self, backend: str) -> None:
        self.attention = torch.nn.functional.scaled_dot_product_attention
        self.backend, self.calls, self.seconds, self.is_timed = backend, 0, 0.0, False

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        call = SdpaCall(*args, **kwargs)
        q, k, v, mask = call[:4]
        if q.shape[2] != k.shape[2] or q.shape[2] <= FEW:
            return self.attention(*args, **kwargs)
        if mask is not None and mask.dtype == torch.bool and bool(mask.all()):
            call = call._replace(attn_mask=None)
        started = self._now(q.device)
        with sdpa_kernel(BACKENDS[self.backend]):
            try:
                out = self.attention(**call._asdict())
            except RuntimeError:
                if k.shape[1] == q.shape[1]:
                    raise
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
                call = call._replace(key=k, value=v, enable_gqa=False)
                out = self.attention(**call._asdict())
        self.calls += 1
        self.seconds += self._now(q.device) - started
        return out

    def _now(self, device: torch.device) -> float:
        if self.is_timed:
            synchronise(device)
        return time.perf_counter() if self.is_timed else 0.0


@contextlib.contextmanager
def densely(backend: str) -> Iterator[Dense]:
    """A candidate: as `Dense`. A mode of PyTorch would slow down every operation of a step that waits for Python."""
    dense = Dense(backend)
    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", dense.attend):
        yield dense


def make_candidates(client: Client, case: Case) -> dict[str, Candidate]:
    """Every way to run a client by name: a backend, or a sparsity with the options that `BAAttConfig` has of itself."""
    return {
        **{name: lambda name=name: densely(name) for name in case.against},
        **{
            f"{sparsity:g}": lambda sparsity=sparsity: baatt.enable(client.model, baatt.BAAttConfig(sparsity=sparsity))
            for sparsity in case.sparsities
        },
    }  # fmt: skip


def measure(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Verify and warm up with few layers, then time the whole model; what is stored of a case.

    Raises:
        RuntimeError: nothing dense ran, or the results of sparsity 0 are too far from it.
    """
    small = examine(build(case, device, dtype, few=True), case, device)
    free(device)
    client = build(case, device, dtype, few=False)
    free(device)
    candidates = {name: one for name, one in make_candidates(client, case).items() if name not in small.refused}
    found: dict[str, list[Evaluation]] = {name: [] for name in candidates}
    started, shuffle = time.perf_counter(), Random(0)
    least, enough = (LEAST_ROUNDS_OF_ANSWERS, ENOUGH_OF_ANSWERS) if case.answer else (1, ENOUGH)
    for number in range(MOST_ROUNDS):
        for name in shuffle.sample(list(candidates), len(candidates)):
            found[name].append(evaluate(client, candidates[name], device))
        # A pass that takes long needs no second round.
        if number + 1 >= least and time.perf_counter() - started > (enough if number else 2 * enough):
            break
    about = {"parameters": parameters(client), "dtype": str(dtype).removeprefix("torch.")}
    return record_of(case, small, found) | about


def examine(client: Client, case: Case, device: torch.device) -> Examined:
    """Run a small model in every way once, which compiles and plans, and compare sparsity 0 with dense attention."""
    refused, attention = dict[str, str](), dict[str, float]()
    for name, candidate in make_candidates(client, case).items():
        try:
            evaluate(client, candidate, device)
            if name in BACKENDS:
                attention[name] = attention_of(client, candidate)
        except RuntimeError as error:
            if name not in BACKENDS:
                raise
            refused[name] = f"{type(error).__name__}: {first_line(error)}"
    if not attention:
        raise RuntimeError(f"no dense attention ran: {refused}")
    return Examined(attention, refused, *verified(client))


def record_of(case: Case, small: Examined, found: Mapping[str, list[Evaluation]]) -> dict[str, Any]:
    """The fields of a record."""
    seconds = {name: statistics.median(one.seconds for one in some) for name, some in found.items()}
    counts = {name: some[-1].counts for name, some in found.items()}
    dense, sparse = ([name for name in seconds if (name in BACKENDS) == chosen] for chosen in (True, False))
    share = {name: small.attention[name] * counts[name].calls / seconds[name] for name in dense}
    fastest = min(dense, key=lambda name: seconds[name])
    return {
        "kind": case.kind, "tokens": tokens_of(case), "answer": case.answer, "sizes": dict(case.sizes),
        "rounds": len(found[fastest]),
        "seconds": seconds,  # medians over the rounds, all candidates in turns
        "all_seconds": {name: [one.seconds for one in some] for name, some in found.items()},
        "attention_share": share,  # of self-attention, by dense backend
        "fastest": fastest,  # the dense backend that speed-ups are over
        "speedup": {name: seconds[fastest] / seconds[name] for name in sparse},
        # Were attention to cost exactly the kept share of the dense one, and choosing nothing: no limit, because a
        # kernel may need less for a kept pair than the dense one, and the share is a small model's.
        "bound": {name: 1 / (1 - share[fastest] * float(name)) for name in sparse},
        "calls": {name: {"sparse": counts[name].sparse_calls, "dense": counts[name].reasons} for name in sparse},
        "skipped": {name: counts[name].sparsity for name in sparse},  # block pairs of the calls that came to `enable`
        "peak_bytes": {name: some[-1].peak_bytes for name, some in found.items()},  # weights included
        "refused": dict(small.refused),
        "error": small.error, "error_limit": small.limit,  # at sparsity 0, of few layers, relative L2
    }  # fmt: skip


def evaluate(client: Client, candidate: Candidate, device: torch.device) -> Evaluation:
    """One evaluation, timed."""
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with torch.no_grad(), candidate() as counts:
        synchronise(device)
        started = time.perf_counter()
        client.run()
        synchronise(device)
        seconds = time.perf_counter() - started
    return Evaluation(seconds, torch.cuda.max_memory_allocated(device) if is_gpu else None, counts)


def attention_of(client: Client, candidate: Candidate) -> float:
    """Seconds of one call of dense self-attention, mean over an evaluation."""
    with torch.no_grad(), candidate() as counted:
        counted.is_timed = True
        client.run()
    if not counted.calls:
        raise RuntimeError(f"no self-attention of more than {FEW} queries")
    seconds: float = counted.seconds / counted.calls
    return seconds


def verified(client: Client) -> tuple[float, float]:
    """Relative L2 error of the result at sparsity 0 against dense, and its limit: twice that of dense against dense.

    Raises:
        RuntimeError: it is beyond the limit.
    """
    results = []
    for name in ("cudnn", "flash", "math"):
        with torch.no_grad(), contextlib.suppress(RuntimeError), densely(name):
            results.append(client.check().double())
        if len(results) == 2:
            break
    with torch.no_grad(), baatt.enable(client.model, baatt.BAAttConfig(sparsity=0.0)) as handle:
        found = client.check()
    error = distance(found.double(), results[0])
    epsilon = torch.finfo(found.dtype).eps
    limit = 2 * distance(results[1], results[0]) + epsilon / 2
    if not error <= limit or not handle.sparse_calls:
        raise RuntimeError(
            f"sparsity 0 must be within a relative error of {limit:.2e} of dense attention in every layer, "
            f"got {error:.2e} with {handle.report()}"
        )
    return error, limit


def distance(x: Tensor, y: Tensor) -> float:
    """Relative L2 norm of the difference; infinite where something is not finite."""
    found = float((x - y).norm() / y.norm())
    return found if math.isfinite(found) else math.inf


def free(device: torch.device) -> None:
    """Give back what the allocator holds, and models that cycles of references hold, which a peak would count."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def line(name: str, one: Record, seconds: float) -> str:
    """What is printed of a case."""
    dense = ", ".join(
        f"{backend} {one['seconds'][backend]:.3g} s, {percent(share, 0)} attention"
        for backend, share in one["attention_share"].items()
    )
    sparse = "".join(
        f"; {percent(float(name), 0)} {one['seconds'][name]:.3g} s, {found:.2f}x of {one['bound'][name]:.2f}x"
        for name, found in one["speedup"].items()
    )
    peaks = "/".join(gibibytes(peak) for peak in one["peak_bytes"].values())
    refused = "".join(f"; {backend} refused: {reason}" for backend, reason in one["refused"].items())
    return (
        f"{name} ({one['tokens']} tokens): {dense}{sparse}; {peaks}, error {one['error']:.1e} of "
        f"{one['error_limit']:.1e}, {one['rounds']} rounds, took {seconds:.0f} s{refused}\n"
    )


def bars(records: Iterable[Record]) -> list[tuple[str, bool]]:
    """What was asked beforehand of the cases that were measured, and whether it holds."""
    found = {one["case"]: one["speedup"] for one in records}
    asked = [
        (f"{name} at {percent(sparsity, 0)}: at least {least}x, {found[name][f'{sparsity:g}']:.2f}x",
         found[name][f"{sparsity:g}"] >= least)
        for name, (sparsity, least) in BARS.items() if name in found
    ]  # fmt: skip
    usual = f"{baatt.BAAttConfig().sparsity:g}"
    slower = [f"{name} {one[usual]:.2f}x" for name, one in found.items() if one.get(usual, math.inf) < 1]
    return [*asked, (f"nothing slower than dense at {percent(float(usual), 0)}: {', '.join(slower) or 'none'}",
                     not slower)]  # fmt: skip


def table(records: list[Record]) -> str:
    """Markdown: a row per case, of the last record that has it."""
    found = {one["case"]: one for record in records for one in record["records"]}
    chosen = sorted(found.values(), key=lambda one: list(CASES).index(one["case"]))
    rows = []
    for one in chosen:
        fastest = one["fastest"]
        rows.append([
            f"`{one['case']}`", short_length(one["tokens"]), f"{one['parameters'] / 1e9:.1f}",
            *(f"{one['seconds'][name]:.3g}" if name in one["seconds"] else "-" for name in ("cudnn", "flash")),
            percent(one["attention_share"][fastest], 0),
            "; ".join(f"{percent(float(name), 0)}: {times(gain)} of {times(one['bound'][name])}"
                      for name, gain in one["speedup"].items()),
            gibibytes(max(peak or 0 for peak in one["peak_bytes"].values())), str(one["rounds"]),
        ])  # fmt: skip
    header = ("case", "tokens", "10^9 parameters", "cudnn, s", "flash, s", "attention", "sparse", "memory", "rounds")
    caption = (
        "Seconds of a whole pass (LLaDA-8B; `answer`: 64 tokens with the dual cache), prompt (Llama) or denoising step "
        "(Wan2.1-T2V and HunyuanVideo, diffusers), random weights, bfloat16, medians of the rounds; share of "
        "self-attention in the time of the faster dense backend, from single calls in a model of one or two layers; at "
        "each sparsity the speed-up over that backend, `of` what the rest of the model would leave if attention cost "
        "just the kept share of it and choosing nothing; the largest peak of memory, weights included. "
        + " ".join(f"{text}: {verdict(holds)}." for text, holds in bars(chosen))
    )
    return block(records, header, rows, caption)


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=f"cases: {', '.join(CASES)}")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--cases", default=",".join(CASES), help="some of the cases below, by commas")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after these")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--cores", type=int, help="stay on so many of the cores that it may use (default: on all)")
    arguments = parser.parse_args(argv)
    arguments.cases = arguments.cases.split(",")
    if unknown := [name for name in arguments.cases if name not in CASES]:
        parser.error(f"--cases must be of {', '.join(CASES)}, got {', '.join(unknown)}")
    if arguments.cores is not None and arguments.cores < 1:
        parser.error(f"--cores must be at least 1, got {arguments.cores}")
    if not arguments.json.parent.is_dir():
        parser.error(f"--json must lie in an existing folder, {arguments.json.parent} is none")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("a GPU is needed, and PyTorch found none")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 1 if a case failed or was left out, the others are kept."""
    arguments = read_arguments(argv)
    if arguments.cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    command = shlex.join(["python", "benchmarks/end_to_end.py", *(sys.argv[1:] if argv is None else argv)])
    report = RecordFile(arguments.json, {"study": "end to end", **provenance(command, device)})
    begun, failures = time.perf_counter(), 0
    for name in arguments.cases:
        started = time.perf_counter()
        if started - begun > arguments.seconds:
            failures += 1
            sys.stdout.write(f"{name}: left out, {started - begun:.0f} s are over\n")
            continue
        try:
            record = measure(CASES[name], device, dtype)
        except (RuntimeError, ImportError) as error:  # the other cases may still run
            failures += 1
            sys.stdout.write(f"{name}: FAILED, {type(error).__name__}: {error}\n")
        else:
            report.add({"case": name, **record})
            sys.stdout.write(line(name, record, time.perf_counter() - started))
        sys.stdout.flush()
        free(device)
    sys.stdout.write("".join(f"{text}: {verdict(holds)}\n" for text, holds in bars(report.records)))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
