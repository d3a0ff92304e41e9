"""Measure the operator or its attention kernel: verified first, then timed against baselines.

Prints a table per shape and can store a JSON file; `--sweep` goes through lengths and draws speed-up and roofline;
`--draw` draws from a stored file; `--dry-run` says what would be run.
"""

import argparse
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from baatt.checks import check_structure
from baatt.cli.errors import UsageError
from baatt.cli.options import (
    add_sparse_options,
    at_least,
    check_files,
    length,
    lengths,
    names_of,
    read_configs,
    read_device,
    seed,
)
from baatt.lab.bench.baselines import BASELINES, static_refusals
from baatt.lab.bench.benchmarks import BENCHMARKS, REPORT, measure, start_report
from baatt.lab.bench.case import Case, Shape, estimated_bytes, resolve
from baatt.lab.bench.roofline import draw_report
from baatt.lab.bench.verification import VerificationError
from baatt.lab.loading import DTYPES, check_bytes
from baatt.lab.records import RecordFile, load_records, short_commit
from baatt.lab.tables import Record, Table, error_of, figures, gibibytes, mebibytes, percent, short_length, times

DEFAULT_SHAPE = {"cuda": "1x32x32768x128", "cpu": "1x8x4096x64"}
DEFAULT_DTYPE = {"cuda": "bfloat16", "cpu": "float32"}
LENGTHS = {"cuda": "4K,8K,16K,32K,64K,128K,256K", "cpu": "1K,2K,4K,8K,16K"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, against what, and where the results go."""
    parser.add_argument("--what", choices=list(BENCHMARKS), default="operator", help="(default: operator)")
    parser.add_argument(
        "--shape", help="BxHxNxD, several by commas (default: 1x32x32768x128 on a GPU, 1x8x4096x64 on the CPU)"
    )
    parser.add_argument("--heads-kv", type=int, help="G, key and value heads, dividing H (default: H)")
    parser.add_argument(
        "--against", type=names_of(BASELINES, {"none": ()}),
        help=f'of {",".join(BASELINES)}, or "none" (default: dense for the operator, none for the kernel)',
    )  # fmt: skip
    parser.add_argument(
        "--causal", type=at_least(1), metavar="TOKENS", help="per causal block (default: bidirectional)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where (default: the GPU if there is one)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="(default: bfloat16 on a GPU, float32 on the CPU)")
    parser.add_argument("--threads", type=at_least(1), help="of the CPU, at most its cores (default: as PyTorch finds)")
    parser.add_argument("--seed", type=seed, default=0, help="of the random inputs (default: 0)")
    add_sparse_options(parser, many={"sparsity": (0.5, 0.9)}, dense_layers=False)
    parser.add_argument("--json", type=Path, help="file for the records")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run, allocate nothing")
    sweep = parser.add_argument_group("sweep over lengths")
    sweep.add_argument("--sweep", action="store_true", help="every length of --lengths with B, H, D of --shape")
    usual = f"{LENGTHS['cuda']}; on the CPU {LENGTHS['cpu']}"
    sweep.add_argument("--lengths", type=lengths, help=f"numbers of tokens (default: {usual})")
    sweep.add_argument("--plot", type=Path, default=Path("baatt-bench.png"), help="picture (default: baatt-bench.png)")
    sweep.add_argument("--no-plot", action="store_true", help="no picture")
    sweep.add_argument("--draw", type=Path, metavar="FILE.json", help="only draw a stored file, measure nothing")


def run(arguments: argparse.Namespace) -> None:
    """Draw, tell, or measure."""
    console = Console(soft_wrap=True, highlight=False)
    drawn = arguments.sweep and not arguments.no_plot
    if (drawn and not arguments.dry_run) or arguments.draw:
        check_files(arguments, pictures=("plot",))
    if arguments.draw:
        draw_report(load_records(arguments.draw, (*REPORT, "records"), "`baatt bench`"), arguments.plot)
        console.print(f"Picture: {arguments.plot}")
        return
    cases = read_cases(arguments)
    if arguments.dry_run:
        tell(console, cases)
        return
    check_files(arguments, "json")
    check_run(cases)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    report = start_report(arguments.command, cases[0].device, cases[0].dtype, arguments.json)
    header = report.header
    console.print(
        f"{header['device']}, commit {short_commit(header['commit'])}: {header['matrix_peak_dtype']} matrix product "
        f"{header['matrix_peak_tflops']:,.3g} TFLOP/s, memory {header['memory_bandwidth'] / 1e9:,.0f} GB/s"
    )
    measure_all(console, cases, report)
    if drawn:
        draw_report(report.content, arguments.plot)
        console.print(f"Picture: {arguments.plot}")


def measure_all(console: Console, cases: Sequence[Case], report: RecordFile) -> None:
    """Measure case by case, store after each, print a table per shape; what one refuses ends the run."""
    for _, group in itertools.groupby(cases, key=lambda case: case.shape):
        found: list[Record] = []
        try:
            for case in group:
                with console.status(f"{case.what} {case.shape}, sparsity {case.config.sparsity:g}"):
                    record = measure(case)
                found.append(record)
                report.add(record)
        except (torch.OutOfMemoryError, VerificationError) as error:
            full = f"{case.shape} does not fit into memory: " if isinstance(error, torch.OutOfMemoryError) else ""
            raise UsageError(f"{full}{error}") from error
        finally:
            if found:
                console.print(table(found).rich())
                for line in dict.fromkeys(line for one in found for line in remarks(one)):
                    console.print(line, markup=False)


def read_cases(arguments: argparse.Namespace) -> list[Case]:
    """Every shape with every sparsity."""
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[arguments.dtype or DEFAULT_DTYPE[device]]
    text = DEFAULT_SHAPE[device] if arguments.shape is None else arguments.shape
    shapes = [read_shape(part, arguments.heads_kv) for part in text.split(",")]
    if arguments.lengths and not arguments.sweep:
        raise UsageError("--lengths needs --sweep, got --lengths without it")
    if arguments.sweep:
        if len(shapes) > 1:
            raise UsageError(f"--sweep needs one --shape, whose N it replaces, got {arguments.shape!r}")
        tokens = arguments.lengths or lengths(LENGTHS[device])
        shapes = [shapes[0]._replace(tokens=count) for count in tokens]
    if arguments.threads is not None and arguments.threads > (os.cpu_count() or 1):
        raise UsageError(
            f"--threads must be at most {os.cpu_count()}, the cores of this machine, got {arguments.threads}"
        )
    against = arguments.against
    if arguments.causal and arguments.what != "operator":
        raise UsageError(f"--causal applies to --what operator only, got {arguments.causal}")
    against = tuple((["dense"] if arguments.what == "operator" else []) if against is None else against)
    common = dtype, torch.device(device), arguments.impl, against, arguments.seed, arguments.causal
    return [
        Case(arguments.what, shape, config, *common)
        for shape, config in itertools.product(dict.fromkeys(shapes), read_configs(arguments))
    ]


def read_shape(text: str, groups: int | None) -> Shape:
    """BxHxNxD."""
    try:
        batch, heads, tokens, channels = map(length, text.strip().split("x"))
    except (ValueError, argparse.ArgumentTypeError):
        raise UsageError(
            f"--shape must be BxHxNxD, four positive integers such as 1x32x32768x128 or 1x32x32Kx128, got {text!r}"
        ) from None
    groups = heads if groups is None else groups
    if groups < 1 or heads % groups:
        raise UsageError(f"--heads-kv must be positive and divide H={heads}, got {groups}")
    return Shape(batch, heads, groups, tokens, channels)


def check_run(cases: Sequence[Case]) -> None:
    """Refuse what cannot run before anything is measured."""
    for case in cases:
        read_device(case.device.type)
        try:
            resolve(case)
        except RuntimeError as error:
            raise UsageError(f"--impl {case.impl} is refused: {error}") from None
        if case.causal is not None:
            q = torch.empty(case.shape.batch, case.shape.heads, case.shape.tokens, 1, device="meta")
            check_structure(q, q, case.config, case.causal, None, None, None)
        check_bytes(str(case.shape), "it needs", estimated_bytes(case), case.device)


def tell(console: Console, cases: Sequence[Case]) -> None:
    """What would be run."""
    first = cases[0]
    unavailable = first.device.type == "cuda" and not torch.cuda.is_available()

    def resolved(case: Case) -> str:
        try:
            return case.impl if unavailable else resolve(case).name
        except RuntimeError as error:
            return f"refused: {error}"

    rows = [
        (case.what, str(case.shape), f"{case.config.sparsity:g}", resolved(case), gibibytes(estimated_bytes(case)))
        for case in cases
    ]
    title = f"{len(cases)} cases on {first.device.type}, {str(first.dtype).removeprefix('torch.')}: nothing was run"
    console.print(Table(("what", "shape", "sparsity", "impl", "memory, about"), rows, title=title).rich())
    console.print(f"Against: {', '.join(first.against) or 'none'}")
    if unavailable:
        console.print("No GPU here to ask: what impl resolves to, or whether it is refused, is decided there.")
    for name, reason in static_refusals(first).items():
        console.print(f"{name} will be refused: {reason}")


def table(found: Sequence[Record]) -> Table:
    """A column per measurement of one shape, a row per figure."""
    first, rows = found[0], list[Sequence[str]]()

    def add(name: str, text: Callable[[Record], str]) -> None:
        rows.append((name, *map(text, found)))

    add("block pairs skipped", lambda one: percent(one["achieved_sparsity"], 1))
    for stage in dict.fromkeys(stage for one in found for stage in one["stage_ms"]):
        rows.append((f"{stage.replace('_', ' ')}, ms", *(figures(one["stage_ms"].get(stage)) for one in found)))
    add("attention, TFLOP/s of kept pairs", lambda one: figures(one["kept_tflops"]))
    if first["selection_share"] is not None or first["baseline_ms"]:
        add("total, ms", lambda one: figures(one["total_ms"]))
    if first["compensation_cost"] is not None:
        add("total / total with beta=0", lambda one: times(1 + one["compensation_cost"]))
    if first["selection_share"] is not None:
        add("share outside of attention", lambda one: percent(one["selection_share"], 1))
    for name in dict.fromkeys(name for one in found for name in (*one["speedup"], *one["refused"])):
        rows.append((f"{name}, ms", *(figures(one["baseline_ms"].get(name)) for one in found)))
        gained = (times(one["speedup"][name]) if name in one["speedup"] else "refused" for one in found)
        rows.append((f"speed-up over {name}", *gained))
    add("peak memory beyond inputs", lambda one: mebibytes(one["peak_memory_bytes"]))
    peaks = [(one["peak_memory_bytes"], one["input_bytes"]) for one in found]
    rows.append(("beyond inputs / inputs", *(times(None if peak is None else peak / inputs) for peak, inputs in peaks)))
    add("rounding error (limit)", lambda one: error_of(one["error"], one["error_limit"]))
    batch, heads, tokens, channels = first["shape"]
    shape = f"{Shape(batch, heads, first['groups'], tokens, channels)} ({short_length(tokens)} tokens)"
    causal = f", causal in blocks of {first['causal']}" if first["causal"] else ""
    title = f"{first['what']} {first['impl']}, {shape}{causal}, {first['dtype']}"
    title += ", CUDA graphs" if first["graph"] else ""
    strong = [row[0] for row in rows if row[0].startswith(("total, ", "speed-up"))]
    caption = (
        "Medians. Skipped: less than asked for where a row has too few blocks. Arrange: order tokens and summarise "
        "blocks. Rounding error: relative L2 against float64 attention over the same kept blocks, so not what leaving "
        "blocks out costs."
    )
    if first["selection_share"] is not None:
        caption += " Total: the whole call, choosing of blocks too; speed-up: baseline / total."
    if "flex" in first["baseline_ms"]:
        caption += " flex gets the block lists and sorted tokens ready-made: its time has no choosing of blocks."
    return Table(("sparsity", *(f"{one['sparsity']:g}" for one in found)), rows, caption, title, strong)


def remarks(one: Record) -> list[str]:
    """Baselines that did not run, or not as they should."""
    refused = [f"{name} refused: {reason}" for name, reason in one["refused"].items()]
    return refused + [f"timed without a CUDA graph, {reason}" for reason in one["without_graph"]]
