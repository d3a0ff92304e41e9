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

import torch
from tables import block, crossed

from baatt import BAAttConfig, make_plan
from baatt.lab.bench.timing import median_times
from baatt.lab.recall import block_mass
from baatt.lab.records import RecordFile, provenance
from baatt.lab.tables import Record

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


def table(record: Record) -> str:
    """A row per length, a column per number format and width of a head."""
    header, rows = crossed(
        record["records"],
        ("tokens",),
        lambda one: (str(one["length"]),),
        lambda one: f"{one['dtype']}, {one['channels']} channels",
        lambda one: f"{one['triton_ms']:.3g} ms, {one['speedup']:.1f}x",
    )
    caption = f"Time of the kernel, and that of the eager function over it; {record['heads']} heads, one batch entry."
    return block(record, header, rows, caption)


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
    command = shlex.join(["python", "benchmarks/oracle_mass.py", *(sys.argv[1:] if argv is None else argv)])
    header = {"study": "attention mass of every block pair", **provenance(command, device), "heads": HEADS}
    report = RecordFile(arguments.json, header)
    for dtype in (torch.bfloat16, torch.float32):
        for channels in arguments.channels:
            for length in arguments.lengths:
                report.add(one := measure(length, channels, dtype, device))
                sys.stdout.write("{dtype} {length} x {channels}: {triton_ms:.2f} ms, {speedup:.1f}x\n".format(**one))
                sys.stdout.flush()


if __name__ == "__main__":
    main()
