"""What limits the kernels, by the hardware's counters: `python benchmarks/kernel_profile.py --out FILE` on a GPU.

Runs itself under Nsight Compute, which has to be on the PATH: one call of the operator per case, after one that
compiles. Out: what ncu prints of each launch of the attention kernel, of the comparison of clusters and of the two that
find them. Clocks are left alone, so that durations are those of a card that is not held at its base clock.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from baatt import BAAttConfig, ba_attention

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
        return subprocess.run([*command, *inside], stdout=out, stderr=subprocess.STDOUT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
