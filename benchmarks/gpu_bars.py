"""The GPU table of the README in one run: attention kernel and whole operator, verified, against dense and flex.

`python benchmarks/gpu_bars.py --json FILE` goes through `CASES` and writes the file again after each, so that a killed
run keeps what it has. One line per record. What is measured, and how, is `baatt.analysis.benchmark`.
"""

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from baatt.analysis.benchmark import Case, Record, Shape, measure
from baatt.analysis.plots import short_length
from baatt.analysis.reports import start_report, store_report
from baatt.analysis.verification import VerificationError
from baatt.backend import IMPLS
from baatt.config import BAAttConfig

AGAINST = ("cudnn", "flash", "flex")
KERNEL = [(4096, 0.5), (32768, 0.0), (32768, 0.5), (32768, 0.9), (131072, 0.9)]
OPERATOR = [(4096, 0.5), (16384, 0.5), (32768, 0.5), (32768, 0.9), (131072, 0.9), (262144, 0.9)]


def make_case(
    what: str, tokens: int, sparsity: float, heads: int = 32, channels: int = 128, against: tuple[str, ...] = ()
) -> Case:
    """B 1, bfloat16, the paper's dials: of all orders the one that costs most."""
    shape = Shape(1, heads, heads, tokens, channels)
    config = dataclasses.replace(BAAttConfig.preset("paper"), sparsity=sparsity)
    return Case(what, shape, config, torch.bfloat16, torch.device("cuda"), against=against)


def name_of(case: Case) -> str:
    """`operator-32K-0.5`, with H and D where they are not 32 and 128."""
    heads = "" if case.shape.heads == 32 else f"-h{case.shape.heads}"
    channels = "" if case.shape.channels == 128 else f"-d{case.shape.channels}"
    return f"{case.what}-{short_length(case.shape.tokens)}-{case.config.sparsity:g}{heads}{channels}"


ALL = [
    *(make_case("kernel", tokens, sparsity) for tokens, sparsity in KERNEL),
    make_case("kernel", 32768, 0.5, channels=64),
    *(make_case("operator", tokens, sparsity, against=AGAINST) for tokens, sparsity in OPERATOR),
    make_case("operator", 2**20, 0.9, heads=8),
]
CASES = {name_of(case): case for case in ALL}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=f"cases: {', '.join(CASES)}")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--impl", default="hopper", choices=IMPLS)
    parser.add_argument("--cases", default=",".join(CASES), help="some of the cases below, by commas")
    parser.add_argument("--no-flex", action="store_true", help="leave out FlexAttention, which is slow to compile")
    parser.add_argument("--skip-baselines", action="store_true")
    arguments = parser.parse_args(argv)
    arguments.cases = arguments.cases.split(",")
    if unknown := [name for name in arguments.cases if name not in CASES]:
        parser.error(f"--cases must be of {', '.join(CASES)}, got {', '.join(unknown)}")
    if not arguments.json.parent.is_dir():
        parser.error(f"--json must lie in an existing folder, {arguments.json.parent} is none")
    if any(CASES[name].device.type == "cuda" for name in arguments.cases) and not torch.cuda.is_available():
        parser.error("a GPU is needed, and PyTorch found none")
    return arguments


def line(name: str, record: Record, seconds: float) -> str:
    """Everything that a bar asks for."""
    stages = ", ".join(f"{stage} {found:.3g}" for stage, found in record.stage_ms.items())
    share = "" if record.selection_share is None else f", not attention {record.selection_share:.1%}"
    speedup = "".join(f", {found:.2f}x over {baseline}" for baseline, found in record.speedup.items())
    notes = [f"{baseline} refused: {reason}" for baseline, reason in record.refused.items()] + record.without_graph
    cost = record.compensation_cost
    return (
        f"{name}: {record.total_ms:.4g} ms ({stages}){'' if cost is None else f', {cost:+.1%} to beta=0'}, "
        f"{record.kept_tflops:.0f} TFLOP/s{share}{speedup}, error {record.error:.2e} of {record.error_limit:.2e}, "
        f"{(record.peak_memory_bytes or 0) / 2**30:.2f} GiB beyond inputs, took {seconds:.0f} s"
        f"{''.join(f'; {note}' for note in notes)}\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 1 if a case failed verification or could not run, the others are kept."""
    arguments = parse_arguments(argv)
    first = CASES[arguments.cases[0]]
    command = shlex.join(["python", "benchmarks/gpu_bars.py", *(sys.argv[1:] if argv is None else argv)])
    report = start_report(command, first.device, first.dtype)
    sys.stdout.write(f"{report.device}: {report.matrix_peak_tflops:.0f} TFLOP/s, {report.memory_bandwidth:.3g} B/s\n")
    failures = 0
    for name in arguments.cases:
        case = CASES[name]
        against = () if arguments.skip_baselines else case.against
        against = tuple(one for one in against if not (arguments.no_flex and one == "flex"))
        started = time.perf_counter()
        try:
            record = measure(case._replace(impl=arguments.impl, against=against))
        except (VerificationError, RuntimeError) as error:
            failures += 1
            sys.stdout.write(f"{name}: FAILED, {type(error).__name__}: {error}\n")
            continue
        report.records.append(record._asdict())
        store_report(report, arguments.json)
        sys.stdout.write(line(name, record, time.perf_counter() - started))
        sys.stdout.flush()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
