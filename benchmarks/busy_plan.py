"""What a plan on the CPU costs beside processes that keep all cores busy, over what it costs on an idle machine.

`python benchmarks/busy_plan.py --json FILE` times `make_plan` alone, then beside `--busy` processes that do nothing but
count, with `--threads` threads. A fair share of two cores beside two such processes is half of each: a plan takes twice
its idle time. It takes more if it consists of many small parallel regions, each of which waits for a time slice.
"""

import argparse
import contextlib
import functools
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tables import block

from baatt import BAAttConfig, make_plan
from baatt.lab.bench.timing import median_times
from baatt.lab.records import RecordFile, provenance
from baatt.lab.tables import Record, figures, times

HEADS, TOKENS, CHANNELS = 8, 8192, 64
SETTINGS = {
    "clusters": BAAttConfig(),
    "covariance": BAAttConfig(score="covariance"),
    "paper": BAAttConfig.preset("paper"),
}


@contextlib.contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """That many processes, each of which takes all it gets of a core."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(name: str, busy: int) -> dict[str, Any]:
    """Milliseconds of a setting's plan, idle and busy, and their ratio."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, HEADS, TOKENS, CHANNELS, generator=generator) for _ in range(2))
    plan = {"plan": functools.partial(make_plan, q, k, SETTINGS[name])}
    idle_ms = median_times(plan, q.device)["plan"]
    with busy_cores(busy):
        busy_ms = median_times(plan, q.device)["plan"]
    return {"setting": name, "idle_ms": idle_ms, "busy_ms": busy_ms, "ratio": busy_ms / idle_ms}


def table(record: Record) -> str:
    """A row per setting."""
    rows = [
        (one["setting"], figures(one["idle_ms"]), figures(one["busy_ms"]), times(one["ratio"]))
        for one in record["records"]
    ]
    caption = (
        f"Medians of `make_plan` on {record['threads']} threads, alone and beside {record['busy']} processes "
        f"that count; B 1, H {record['heads']}, N {record['tokens']}, D {record['channels']}, float32."
    )
    return block(record, ("setting", "idle, ms", "busy, ms", "busy / idle"), rows, caption)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--busy", type=int, default=2, help="processes that count (default: 2)")
    parser.add_argument("--threads", type=int, default=2, help="of the plan (default: 2)")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    command = shlex.join(["python", "benchmarks/busy_plan.py", *(sys.argv[1:] if argv is None else argv)])
    header = {
        "study": "plans beside busy processes", **provenance(command, torch.device("cpu")),
        "heads": HEADS, "tokens": TOKENS, "channels": CHANNELS, "busy": arguments.busy, "threads": arguments.threads,
    }  # fmt: skip
    report = RecordFile(arguments.json, header)
    for name in SETTINGS:
        report.add(one := measure(name, arguments.busy))
        sys.stdout.write("{setting}: {idle_ms:.1f} ms idle, {busy_ms:.1f} ms busy, {ratio:.2f}x\n".format(**one))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
