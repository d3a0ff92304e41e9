"""The oracle's exact block masses: the Triton kernel against the eager function, selection excluded.

`python benchmarks/oracle_mass.py --json FILE` times `block_mass` after comparing what the two return. The kernel needs
a GPU; the eager function, its specification, multiplies in float32.
"""

import argparse
import functools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import result_tables
import torch

from baatt import BAAttConfig, make_plan
from baatt.analysis.oracle import block_mass
from baatt.analysis.reports import commit_here, device_name, store_json, versions_here
from baatt.analysis.timing import median_times

HEADS = 8
RELATIVE, ABSOLUTE = 1e-4, 1e-7  # as tests/gpu/test_mass.py


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def measure(length: int, channels: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Milliseconds of both, and the largest difference."""
    generator = torch.Generator(device).manual_seed(0)
    q, k = (
        torch.randn(1, HEADS, length, channels, generator=generator, device=device).to(dtype) * factor
        for factor in (2, 1)
    )
    plan = make_plan(q, k, BAAttConfig.preset("paper"))
    functions = {impl: functools.partial(block_mass, q, k, plan, impl=impl) for impl in ("triton", "reference")}
    actual, expected = (function() for function in functions.values())
    torch.testing.assert_close(actual, expected, rtol=RELATIVE, atol=ABSOLUTE)
    found = median_times(functions, device)
    return {
        "length": length, "channels": channels, "dtype": str(dtype).removeprefix("torch."),
        "triton_ms": found["triton"], "reference_ms": found["reference"],
        "speedup": found["reference"] / found["triton"], "difference": float((actual - expected).abs().max()),
    }  # fmt: skip


def table(record: result_tables.Record) -> str:
    """A row per length, a column per number format and width of a head."""
    grid = result_tables.by_cell(
        record, lambda one: one["length"], lambda one: f"{one['dtype']}, {one['channels']} channels"
    )
    rows = [
        [str(length), *(f"{one['triton_ms']:.3g} ms, {one['speedup']:.1f}x" for one in row.values())]
        for length, row in grid.items()
    ]
    columns = next(iter(grid.values()))
    caption = f"Time of the kernel, and that of the eager function over it; {record['heads']} heads, one batch entry."
    parts = [result_tables.table(["tokens", *columns], rows), caption, result_tables.provenance(record)]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=numbers, default=[4096, 8192, 16384, 32768])
    parser.add_argument("--channels", type=numbers, default=[64, 128])
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("the kernel needs a GPU, and this machine has none")
    device = torch.device("cuda")
    records: list[dict[str, Any]] = []
    report = {
        "study": "attention mass of every block pair",
        "command": shlex.join(["python", "benchmarks/oracle_mass.py", *(sys.argv[1:] if argv is None else argv)]),
        "commit": commit_here(), "device": device_name(device), "versions": versions_here(device),
        "heads": HEADS, "records": records,
    }  # fmt: skip
    for dtype in (torch.bfloat16, torch.float32):
        for channels in arguments.channels:
            for length in arguments.lengths:
                records.append(measure(length, channels, dtype, device))
                store_json(report, arguments.json)
                sys.stdout.write(
                    "{dtype} {length} x {channels}: {triton_ms:.2f} ms, {speedup:.1f}x\n".format(**records[-1])
                )
                sys.stdout.flush()


if __name__ == "__main__":
    main()
