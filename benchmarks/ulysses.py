"""Ulysses attention over several GPUs against one: verified, then timed in turns, with the share of the exchange.

`torchrun --nproc-per-node 2 benchmarks/ulysses.py --json FILE`. Every process holds the whole inputs, so that one GPU
can be measured in the same run, and gives its part of them to `ulysses_attention`. A call is as slow as its slowest
process. The file is written again after each record. `--device cpu` runs small sizes over gloo.
"""

import argparse
import dataclasses
import os
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tables import block, length_text, sizes_text, sparsity_text
from torch import Tensor

from baatt.attention import ba_attention, make_plan
from baatt.backend import IMPLS
from baatt.config import BAAttConfig
from baatt.distributed import ulysses_attention
from baatt.lab.bench.benchmarks import start_report
from baatt.lab.bench.case import Case, Inputs, Shape, make_inputs, resolve
from baatt.lab.bench.timing import SLEEP_CYCLES, synchronise
from baatt.lab.bench.verification import VerificationError, require_verified, verify
from baatt.lab.tables import Record, error_of

ROUNDS = 15


class Place(NamedTuple):
    """Where a process is: its rank of how many, and its device."""

    rank: int
    size: int
    device: torch.device


class UlyssesRecord(NamedTuple):
    """One measurement; times are medians over rounds of the slowest process.

    impl, shape [B, H, N, D], groups, dtype, sparsity, config, gpus: what ran.
    single_ms: the whole on one GPU. ulysses_ms: the same over all. local_ms: the attention that one of them does.
    exchange_ms: everything but attention: agreeing on sizes, copies, two all-to-alls. all_to_all_ms: the latter alone.
    exchange_share: of ulysses_ms. speedup: single_ms / ulysses_ms; efficiency: that by the number of GPUs.
    sent_bytes: that one GPU sends to others in a call. sent_bytes_per_second: sent_bytes / all_to_all_ms.
    bit_equal: every part equals that of one GPU bit for bit; error, error_limit: of all parts against float64 with the
    mask that one GPU chose, see `baatt.lab.bench.verification`; verified_blocks: [compared, all].
    """

    impl: str
    shape: list[int]
    groups: int
    dtype: str
    sparsity: float
    config: dict[str, Any]
    gpus: int
    single_ms: float
    ulysses_ms: float
    local_ms: float
    exchange_ms: float
    all_to_all_ms: float
    exchange_share: float
    speedup: float
    efficiency: float
    sent_bytes: int
    sent_bytes_per_second: float
    bit_equal: bool
    error: float
    error_limit: float
    verified_blocks: list[int]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tokens", default="32768,131072", help="of the whole sequence, by commas")
    parser.add_argument("--sparsity", default="0.9,0.5", help="by commas")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--groups", type=int, default=None, help="heads of keys and values; as many as --heads")
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--impl", default="auto", choices=IMPLS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args(argv)
    arguments.tokens = [int(tokens) for tokens in arguments.tokens.split(",")]
    arguments.sparsity = [float(sparsity) for sparsity in arguments.sparsity.split(",")]
    size = int(os.environ.get("WORLD_SIZE", "0"))
    if size < 2:
        parser.error("start it with torchrun --nproc-per-node N, N at least 2")
    if arguments.heads % size or any(tokens % size for tokens in arguments.tokens):
        parser.error(f"--heads and --tokens must be multiples of the {size} processes")
    if arguments.device == "cuda" and torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        parser.error(f"a GPU for every process is needed, PyTorch found {torch.cuda.device_count()}")
    if not arguments.json.parent.is_dir():
        parser.error(f"--json must lie in an existing folder, {arguments.json.parent} is none")
    return arguments


def start(device_type: str) -> Place:
    """Join the process group."""
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if device_type == "cpu":
        dist.init_process_group("gloo")
        return Place(rank, size, torch.device("cpu"))
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return Place(rank, size, device)


def cases(arguments: argparse.Namespace, device: torch.device) -> list[Case]:
    """A case for every length and sparsity."""
    groups = arguments.heads if arguments.groups is None else arguments.groups
    return [
        Case(
            "operator",
            Shape(1, arguments.heads, groups, tokens, arguments.channels),
            BAAttConfig(block_size=arguments.block_size, sparsity=sparsity),
            getattr(torch, arguments.dtype),
            device,
            impl=arguments.impl,
        )
        for tokens in arguments.tokens
        for sparsity in arguments.sparsity
    ]


def measure(case: Case, place: Place, rounds: int) -> UlyssesRecord:
    """Verify, then time.

    Raises:
        VerificationError: on every process.
    """
    impl = resolve(case).name
    inputs = make_inputs(case)
    for x in inputs:
        dist.broadcast(x, 0)  # one seed draws the same numbers on like devices only
    parts = Inputs(*(x.chunk(place.size, dim=2)[place.rank].contiguous() for x in inputs))

    def attention(q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        return ba_attention(q, k, v, case.config, key_mask=key_mask, impl=impl)

    checked = check(case, impl, inputs, attention(*inputs), ulysses_attention(attention, *parts), place)
    functions, buffers = candidates(attention, inputs, parts)
    times = times_in_turn(functions, place, rounds)
    sent = sum(buffer.nbytes for buffer in buffers) * (place.size - 1) // place.size
    batch, heads, groups, tokens, channels = case.shape
    return UlyssesRecord(
        impl=impl,
        shape=[batch, heads, tokens, channels],
        groups=groups,
        dtype=str(case.dtype).removeprefix("torch."),
        sparsity=case.config.sparsity,
        config=dataclasses.asdict(case.config),
        gpus=place.size,
        **{f"{name}_ms": milliseconds for name, milliseconds in times.items()},
        exchange_share=times["exchange"] / times["ulysses"],
        speedup=times["single"] / times["ulysses"],
        efficiency=times["single"] / times["ulysses"] / place.size,
        sent_bytes=sent,
        sent_bytes_per_second=1e3 * sent / times["all_to_all"],
        **checked,
    )


def candidates(
    attention: Callable[..., Tensor], inputs: Inputs, parts: Inputs
) -> tuple[dict[str, Callable[[], Any]], list[Tensor]]:
    """What is timed, by name, and buffers as large as those of the two all-to-alls."""
    whole: list[Tensor] = []

    def keep(q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None) -> Tensor:
        whole.extend((q, k, v))
        return q

    ulysses_attention(keep, *parts)
    buffers = [torch.cat([x.flatten() for x in given]) for given in (whole, whole[:1])]
    received = [torch.empty_like(buffer) for buffer in buffers]

    def all_to_all() -> None:
        for target, source in zip(received, buffers, strict=True):
            dist.all_to_all_single(target, source)

    functions: dict[str, Callable[[], Any]] = {
        "single": lambda: attention(*inputs),
        "ulysses": lambda: ulysses_attention(attention, *parts),
        "local": lambda: attention(*whole),
        "exchange": lambda: ulysses_attention(lambda q, k, v, key_mask: q, *parts),
        "all_to_all": all_to_all,
    }
    return functions, buffers


def check(case: Case, impl: str, inputs: Inputs, single: Tensor, part: Tensor, place: Place) -> dict[str, Any]:
    """The fields of a record about correctness; the first process verifies all parts together.

    Raises:
        VerificationError: on every process.
    """
    expected = single.chunk(place.size, dim=2)[place.rank]
    equal = torch.tensor(int(torch.equal(part, expected)), device=place.device)
    dist.all_reduce(equal, dist.ReduceOp.MIN)
    gathered = [torch.empty_like(part) for _ in range(place.size)]
    dist.all_gather(gathered, part.contiguous())
    plan = make_plan(inputs.q, inputs.k, case.config, impl=impl)
    found = verify(*inputs, plan, torch.cat(gathered, dim=2))  # on every process: all of them must raise
    require_verified(f"ulysses of {place.size} at {case.shape}, sparsity {case.config.sparsity:g}", found)
    return {
        "bit_equal": bool(equal),
        "error": found.error,
        "error_limit": found.limit,
        "verified_blocks": [found.checked, found.blocks],
    }


def times_in_turn(functions: Mapping[str, Callable[[], Any]], place: Place, rounds: int) -> dict[str, float]:
    """Median milliseconds by name, of the slowest process in each round.

    The number of rounds is fixed and the order drawn from one seed: all processes must make the same calls.
    """
    for function in functions.values():
        dist.barrier()
        warm_up_together(function, place.device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    shuffle = random.Random(0)
    for _ in range(rounds):
        for name in shuffle.sample(list(functions), len(functions)):
            dist.barrier()
            times[name].append(milliseconds(functions[name], place.device))
    slowest = torch.tensor([times[name] for name in functions], device=place.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return {name: statistics.median(row) for name, row in zip(functions, slowest.tolist(), strict=True)}


def warm_up_together(function: Callable[[], Any], device: torch.device) -> None:
    """A number of calls that does not depend on their time: all processes must make the same."""
    for _ in range(2):
        function()
    synchronise(device)


def milliseconds(function: Callable[[], Any], device: torch.device) -> float:
    """Of one call: on a GPU by events behind a short sleep, so that the first launch costs nothing."""
    if device.type == "cpu":
        started = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - started)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP_CYCLES)
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def line(record: UlyssesRecord) -> str:
    """A record in one line."""
    return (
        f"{record.shape} sparsity {record.sparsity:g} on {record.gpus}: {record.ulysses_ms:.4g} ms, one "
        f"{record.single_ms:.4g} ms ({record.speedup:.2f}x, efficiency {record.efficiency:.1%}), exchange "
        f"{record.exchange_ms:.3g} ms ({record.exchange_share:.1%}), all-to-all {record.all_to_all_ms:.3g} ms = "
        f"{record.sent_bytes_per_second:.3g} B/s, attention {record.local_ms:.4g} ms, error {record.error:.2e} of "
        f"{record.error_limit:.2e}, {'equal' if record.bit_equal else 'not equal'} bit for bit\n"
    )


def table(record: Record) -> str:
    """A row per length and sparsity."""
    rows = [
        [
            length_text(one),
            sparsity_text(one),
            str(one["gpus"]),
            f"{one['single_ms']:.3g}",
            f"{one['ulysses_ms']:.3g}",
            f"{one['speedup']:.2f}x ({100 * one['efficiency']:.0f} %)",
            f"{one['exchange_ms']:.2f} ({100 * one['exchange_share']:.0f} %)",
            f"{one['all_to_all_ms']:.2f}",
            f"{one['sent_bytes_per_second'] / 1e9:.0f}",
            "yes" if one["bit_equal"] else "no",
            error_of(one["error"], one["error_limit"]),
        ]
        for one in record["records"]
    ]
    header = (
        *("length", "sparsity", "GPUs", "one GPU, ms", "all, ms", "speed-up (efficiency)", "exchange, ms (share)"),
        *("all-to-all, ms", "GB/s sent", "bit-equal", "error (limit)"),
    )
    caption = (
        f"Measured. {sizes_text(record['records'][0])}. Exchange: everything but attention, that is "
        "agreeing on sizes, packing, two all-to-alls and unpacking, timed alone. Error: relative L2 of all parts "
        "together against float64 with the mask that one GPU chose."
    )
    return block(record, header, rows, caption)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of every process; returns 1 if a case failed verification, the others are kept."""
    arguments = parse_arguments(argv)
    place = start(arguments.device)
    command = shlex.join(["benchmarks/ulysses.py", *(sys.argv[1:] if argv is None else argv)])
    report = None
    if place.rank == 0:
        command = f"torchrun --nproc-per-node {place.size} {command}"
        report = start_report(command, place.device, getattr(torch, arguments.dtype), arguments.json)
        if place.device.type == "cuda":
            report.header["versions"]["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        report.header["device"] = f"{place.size} x {report.header['device']}"
        report.header = {"study": "ulysses", "backend": dist.get_backend(), **report.header}
    failures = 0
    for case in cases(arguments, place.device):
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            record = measure(case, place, arguments.rounds)
        except VerificationError as error:
            failures += 1
            sys.stdout.write(f"FAILED: {error}\n" if place.rank == 0 else "")
            continue
        if report is not None:
            report.add(record._asdict())
            sys.stdout.write(line(record))
            sys.stdout.flush()
    dist.barrier()
    dist.destroy_process_group()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
