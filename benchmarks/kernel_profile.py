"""What limits the kernels, by the hardware's counters: `python benchmarks/kernel_profile.py --out FILE` on a GPU.

Runs itself under Nsight Compute, which has to be on the PATH: one call of the operator per case, after one that
compiles. Out: what ncu prints of each launch of the attention kernel, of the comparison of clusters and of the two that
find them, and its main numbers as JSON beside it. Clocks are left alone, so that durations are those of a card that is
not held at its base clock; a launch is repeated for every counter, with rests, so that it is cooler than in use.
"""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tables import block

from baatt import BAAttConfig, ba_attention
from baatt.lab.loading import find_device
from baatt.lab.records import provenance, write_json
from baatt.lab.tables import Record, percent

KERNELS = "regex:^(attention|share|centre|refine)_kernel$"
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats")


class Case(NamedTuple):
    """B 1, H 32, D 128, bfloat16."""

    tokens: int
    sparsity: float


CASES = {
    "4K-0.5": Case(4096, 0.5),
    "32K-0": Case(32768, 0.0),
    "32K-0.5": Case(32768, 0.5),
    "32K-0.9": Case(32768, 0.9),
    "128K-0.9": Case(131072, 0.9),
}


def run(names: Sequence[str]) -> None:
    """The call of each case, of which ncu sees the second."""
    for name in names:
        case = CASES[name]
        generator = torch.Generator("cuda").manual_seed(0)
        shape = (1, 32, case.tokens, 128)
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(3))
        config = BAAttConfig(sparsity=case.sparsity)
        ba_attention(q, k, v, config)
        torch.cuda.synchronize()
        sys.stdout.write(f"case {name}\n")
        sys.stdout.flush()
        torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
        ba_attention(q, k, v, config)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


#: What is kept of a launch, by its name in what ncu prints.
METRICS = {
    "ms": "Duration", "ghz": "SM Frequency", "sm": r"Compute \(SM\) Throughput", "l1": "L1/TEX Cache Throughput",
    "dram": "DRAM Throughput",
}  # fmt: skip
UNITS = {"ms": 1.0, "us": 1e-3, "s": 1e3, "Ghz": 1.0, "Mhz": 1e-3, "%": 0.01}


def read(text: str) -> list[dict[str, Any]]:
    """A record for each case and kernel: launches, their milliseconds together, and the shares of the longest.

    Raises:
        ValueError: other launches than ncu announced.
    """
    announced = [
        (case, kernel)
        for part in text.split("case ")[1:]
        for case in [part.split("\n", 1)[0].strip()]
        for kernel in re.findall(r'Profiling "(\w+)"', part)
    ]
    launches = re.split(r"\n  (?=\w+_kernel \(\d)", text)[1:]
    if [kernel for _, kernel in announced] != [launch.split(" ", 1)[0] for launch in launches]:
        raise ValueError(f"{len(announced)} launches must be described, got {len(launches)}")
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for place, launch in zip(announced, launches, strict=True):
        numbers = {}
        for name, words in METRICS.items():
            (unit, value) = re.search(rf"{words}\s+(\S+)\s+([\d.,]+)", launch).groups()  # type: ignore[union-attr]
            numbers[name] = round(float(value.replace(",", "")) * UNITS[unit], 6)
        found.setdefault(place, []).append(numbers)
    records = []
    for (case, kernel), numbers in found.items():
        longest = max(numbers, key=lambda one: one["ms"])
        together = sum(one["ms"] for one in numbers)
        records.append({"case": case, "kernel": kernel, "launches": len(numbers), **longest, "ms": round(together, 6)})
    return records


def table(record: Record) -> str:
    """Markdown: a row for each case and kernel."""
    rows = [
        [
            one["case"],
            f"`{one['kernel']}`",
            str(one["launches"]),
            f"{one['ms']:.3g}",
            f"{one['ghz']:.2f}",
            *(percent(one[name], 0) for name in ("sm", "l1", "dram")),
        ]
        for one in record["records"]
    ]
    caption = (
        "Tokens and sparsity of the call, B 1, H 32, D 128, bfloat16; milliseconds of all launches; of the longest the "
        "clock, and how busy its busiest pipeline, the L1 cache (shared memory too) and the memory were at that clock."
    )
    header = ("case", "kernel", "launches", "ms", "GHz", "pipeline", "L1", "memory")
    return block(record, header, rows, caption)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit code of ncu."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help="some of these, by commas (default: all)")
    parser.add_argument("--out", type=Path, help="file for what ncu prints")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    names = arguments.cases.split(",")
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"--cases must be of {', '.join(CASES)}, got {', '.join(unknown)}")
    if arguments.inside:
        run(names)
        return 0
    if shutil.which("ncu") is None:
        parser.error("ncu, of Nsight Compute, must be on the PATH")
    if arguments.out is None:
        parser.error("--out must name a file")
    sections = [word for section in SECTIONS for word in ("--section", section)]
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--kernel-name", KERNELS, *sections]
    inside = [sys.executable, str(Path(__file__).resolve()), "--inside", "--cases", arguments.cases]
    with arguments.out.open("w", encoding="utf-8") as out:
        code = subprocess.run([*command, *inside], stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    if code == 0:
        line = shlex.join(["python", "benchmarks/kernel_profile.py", *(sys.argv[1:] if argv is None else argv)])
        header = {"study": "kernels under Nsight Compute", **provenance(line, find_device("cuda"))}
        records = read(arguments.out.read_text(encoding="utf-8"))
        write_json(header | {"records": records}, arguments.out.with_suffix(".json"))
    return code


if __name__ == "__main__":
    sys.exit(main())
