"""Measure the operator or its attention kernel: verified first, then timed against baselines.

Prints a table per shape and can store a JSON file; `--sweep` goes through lengths and draws speed-up and roofline;
`--draw` draws from a stored file; `--dry-run` says what would be run.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from baatt.analysis.baselines import BASELINES
from baatt.analysis.benchmark import (
    WHAT,
    Case,
    Record,
    Shape,
    estimated_bytes,
    measure,
    resolve,
    static_refusals,
)
from baatt.analysis.plots import draw_report, short_length
from baatt.analysis.reports import Report, load_report, start_report, store_report
from baatt.analysis.verification import VerificationError
from baatt.cli.errors import UsageError
from baatt.cli.options import add_sparse_options, check_files, lengths, names_of, read_configs, read_device
from baatt.lab.loading import DTYPES, check_bytes

DEFAULT_SHAPE = {"cuda": "1x32x32768x128", "cpu": "1x8x4096x64"}
DEFAULT_DTYPE = {"cuda": "bfloat16", "cpu": "float32"}
LENGTHS = {"cuda": "4K,8K,16K,32K,64K,128K,256K", "cpu": "1K,2K,4K,8K,16K"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, against what, and where the results go."""
    parser.add_argument("--what", choices=WHAT, default="operator", help="the whole call, or its attention alone")
    parser.add_argument("--shape", help="BxHxNxD, several by commas (default: 1x32x32768x128 on a GPU, 1x8x4096x64)")
    parser.add_argument("--heads-kv", type=int, help="G, key and value heads, dividing H (default: H)")
    parser.add_argument(
        "--against", type=names_of(BASELINES, {"none": ()}),
        help=f'of {",".join(BASELINES)}, or "none" (default: dense for the operator, none for the kernel)',
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where (default: the GPU if there is one)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="(default: bfloat16 on a GPU, float32 on the CPU)")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default: 0)")
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
    console = Console()
    if (arguments.sweep and not arguments.no_plot and not arguments.dry_run) or arguments.draw:
        check_files(arguments, pictures=("plot",))
    if arguments.draw:
        draw_report(load_report(arguments.draw), arguments.plot)
        console.print(f"Picture: {arguments.plot}", soft_wrap=True)
        return
    cases = read_cases(arguments)
    if arguments.dry_run:
        tell(console, cases)
        return
    check_files(arguments, "json")
    check_run(cases)
    first = cases[0]
    report = start_report(arguments.command, first.device, first.dtype)
    console.print(
        f"{report.device}, commit {report.commit or 'unknown'}: {report.matrix_peak_dtype} matrix product "
        f"{report.matrix_peak_tflops:,.3g} TFLOP/s, memory {report.memory_bandwidth / 1e9:,.0f} GB/s",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    measure_all(console, cases, report, arguments.json)
    if arguments.sweep and not arguments.no_plot:
        draw_report(report._asdict(), arguments.plot)
        console.print(f"Picture: {arguments.plot}", soft_wrap=True)


def measure_all(console: Console, cases: Sequence[Case], report: Report, path: Path | None) -> None:
    """Measure case by case, store after each, print a table per shape.

    Raises:
        UsageError: an output out of budget, a kernel that refuses, or memory that does not suffice.
    """
    for _, group in itertools.groupby(cases, key=lambda case: case.shape):
        records: list[Record] = []
        try:
            for case in group:
                with console.status(f"{case.what} {case.shape}, sparsity {case.config.sparsity:g}"):
                    records.append(measure(case))
                report.records.append(records[-1]._asdict())
                if path is not None:
                    store_report(report, path)
        except torch.OutOfMemoryError as error:
            raise UsageError(f"{case.shape} does not fit into memory: {error}") from error
        except VerificationError as error:
            raise UsageError(str(error)) from error
        finally:
            if records:
                show(console, records)


def read_cases(arguments: argparse.Namespace) -> list[Case]:
    """Every shape with every sparsity."""
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[arguments.dtype or DEFAULT_DTYPE[device]]
    shapes = [read_shape(text, arguments.heads_kv) for text in (arguments.shape or DEFAULT_SHAPE[device]).split(",")]
    if arguments.lengths and not arguments.sweep:
        raise UsageError("--lengths needs --sweep, got --lengths without it")
    if arguments.sweep:
        if len(shapes) > 1:
            raise UsageError(f"--sweep needs one --shape, whose N it replaces, got {arguments.shape!r}")
        tokens = arguments.lengths or lengths(LENGTHS[device])
        shapes = [shapes[0]._replace(tokens=length) for length in tokens]
    configs = read_configs(arguments)
    against = read_against(arguments.against, arguments.what)
    return [
        Case(arguments.what, shape, config, dtype, torch.device(device), arguments.impl, against, arguments.seed)
        for shape in dict.fromkeys(shapes)
        for config in configs
    ]


def read_shape(text: str, groups: int | None) -> Shape:
    """BxHxNxD."""
    sizes = text.strip().split("x")
    if len(sizes) != 4 or not all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes):
        raise UsageError(f"--shape must be BxHxNxD, four positive integers such as 1x32x32768x128, got {text!r}")
    batch, heads, tokens, channels = map(int, sizes)
    groups = heads if groups is None else groups
    if groups < 1 or heads % groups:
        raise UsageError(f"--heads-kv must be positive and divide H={heads}, got {groups}")
    return Shape(batch, heads, groups, tokens, channels)


def read_against(names: list[str] | None, what: str) -> tuple[str, ...]:
    """Names of baselines."""
    if names is None:
        return ("dense",) if what == "operator" else ()
    if names and what == "kernel":
        raise UsageError(f"--against applies to --what operator only: random lists have no baseline, got {names}")
    return tuple(names)


def check_run(cases: Sequence[Case]) -> None:
    """Refuse what cannot run before anything is measured."""
    for case in cases:
        read_device(case.device.type)
        try:
            resolve(case)
        except RuntimeError as error:
            raise UsageError(f"--impl {case.impl} is refused: {error}") from None
        check_bytes(str(case.shape), "it needs", estimated_bytes(case), case.device)


def tell(console: Console, cases: Sequence[Case]) -> None:
    """What would be run."""
    first = cases[0]
    title = f"{len(cases)} cases on {first.device.type}, {str(first.dtype).removeprefix('torch.')}: nothing was run"
    out = Table("what", "shape", "sparsity", "impl", "memory, about", title=title, title_justify="left")
    unavailable = first.device.type == "cuda" and not torch.cuda.is_available()
    for case in cases:
        impl = case.impl if unavailable else _resolved(case)
        memory = f"{estimated_bytes(case) / 2**30:.2f} GiB"
        out.add_row(case.what, str(case.shape), f"{case.config.sparsity:g}", impl, memory)
    console.print(out)
    console.print(f"Against: {', '.join(first.against) or 'none'}", highlight=False)
    if unavailable:
        console.print(
            "No GPU here to ask: what impl resolves to, or whether it is refused, is decided there.", soft_wrap=True
        )
    for name, reason in static_refusals(first).items():
        console.print(f"{name} will be refused: {reason}", soft_wrap=True, highlight=False)


def _resolved(case: Case) -> str:
    try:
        return resolve(case).name
    except RuntimeError as error:
        return f"refused: {error}"


def show(console: Console, records: Sequence[Record]) -> None:
    """One table: a column per record of one shape, a row per figure."""
    first = records[0]
    batch, heads, tokens, channels = first.shape
    graph = ", CUDA graphs" if first.graph else ""
    shape = Shape(batch, heads, first.groups, tokens, channels)
    title = f"{first.what} {first.impl}, {shape} ({short_length(tokens)} tokens), {first.dtype}{graph}"
    out = Table("sparsity", *(f"{one.sparsity:g}" for one in records), title=title, title_justify="left")
    out.add_row("block pairs skipped", *(f"{one.achieved_sparsity:.1%}" for one in records))
    for stage in dict.fromkeys(stage for one in records for stage in one.stage_ms):
        out.add_row(f"{stage.replace('_', ' ')}, ms", *(_number(one.stage_ms.get(stage)) for one in records))
    out.add_row("attention, TFLOP/s of kept pairs", *(_number(one.kept_tflops) for one in records))
    if first.what == "operator":
        out.add_row("total, ms", *(_number(one.total_ms) for one in records), style="bold")
        out.add_row("slower than with beta=0 by", *(f"{one.compensation_cost or 0:.1%}" for one in records))
        out.add_row("share outside of attention", *(f"{one.selection_share or 0:.1%}" for one in records))
    for name in dict.fromkeys(name for one in records for name in (*one.speedup, *one.refused)):
        out.add_row(f"{name}, ms", *(_number(one.baseline_ms.get(name)) for one in records))
        cells = (f"{one.speedup[name]:.2f}x" if name in one.speedup else "refused" for one in records)
        out.add_row(f"speed-up over {name}", *cells, style="bold")
    out.add_row("peak memory beyond inputs", *(_bytes(one.peak_memory_bytes) for one in records))
    out.add_row("error (limit)", *(f"{one.error:.1e} ({one.error_limit:.1e})" for one in records))
    console.print(out)
    for line in dict.fromkeys(line for one in records for line in _remarks(one)):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _remarks(one: Record) -> list[str]:
    refused = [f"{name} refused: {reason}" for name, reason in one.refused.items()]
    return refused + [f"timed without a CUDA graph, {reason}" for reason in one.without_graph]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}" if value >= 100 else f"{value:.3g}"


def _bytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.0f} MiB"
