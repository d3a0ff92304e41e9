"""What runs: models that attend causally, block-causally or both ways, each under its own loop, dense and sparse.

`python benchmarks/clients.py --json FILE` runs every client of tests/integrations/clients.py, tiny and random: densely,
with all blocks kept, with half of them, and after it was disabled. Ends with 1 if one is not its dense self where it
must be.
"""

import argparse
import importlib
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tables import block

import baatt
from baatt import BAAttConfig
from baatt.integrations.handle import NoSparseAttentionWarning
from baatt.lab.records import RecordFile, provenance
from baatt.lab.tables import Record, percent

ROOT = Path(__file__).resolve().parents[1]
ALL_BLOCKS, HALF = (BAAttConfig(block_size=16, sparsity=sparsity) for sparsity in (0.0, 0.5))


def measure(client: Any) -> dict[str, Any]:
    """Counts and differences of the runs of one client."""
    dense = client.run()
    with baatt.enable(client.model, ALL_BLOCKS) as handle:
        kept = client.run()
    with baatt.enable(client.model, HALF) as half:
        client.run()
    return {
        "attends": client.attends,
        "code": client.code,
        "sparse": handle.sparse_calls,
        "reasons": handle.reasons,
        "difference": float((kept - dense).abs().max()),
        "tokens": not dense.is_floating_point(),
        "skipped": half.sparsity,
        "restored": torch.equal(client.run(), dense),
    }


def is_right(one: Record) -> bool:
    """Whether it equals dense attention with all blocks, tokens exactly, and after it was disabled."""
    return one["restored"] and one["difference"] <= (0 if one["tokens"] else 1e-5)


def table(record: Record) -> str:
    """A row per client."""
    rows = [
        [
            one["client"],
            one["attends"],
            one["code"],
            str(one["sparse"]),
            "; ".join(f"{count}: {reason}" for reason, count in one["reasons"].items()) or "none",
            "the same tokens" if one["tokens"] and not one["difference"] else f"{one['difference']:.0e}",
            percent(one["skipped"], 0),
        ]
        for one in record["records"]
    ]
    header = ("client", "attends", "code", "sparse calls", "dense calls, and why", "all blocks kept", "skipped at 50 %")
    caption = (
        "Calls of one run of its own loop. All blocks kept: the greatest difference to the dense run. Skipped at 50 %: "
        "share of the block pairs that queries may see, over all calls, dense ones included; blocks of 16 tokens, "
        "prompts of about 90. Every one of them is its dense self again, bit for bit, after `disable`."
    )
    return block(record, header, rows, caption)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the runs are stored")
    arguments = parser.parse_args(argv)
    command = shlex.join(["python", "benchmarks/clients.py", *(sys.argv[1:] if argv is None else argv)])
    report = RecordFile(arguments.json, {"study": "clients", **provenance(command, torch.device("cpu"))})
    sys.path.insert(0, str(ROOT))
    clients = importlib.import_module("tests.integrations.clients")
    warnings.simplefilter("ignore", NoSparseAttentionWarning)
    for name in clients.CLIENTS:
        report.add({"client": name, **measure(clients.build(name))})
        sys.stdout.write(f"{name}: {'right' if is_right(report.records[-1]) else 'WRONG'}\n")
    return 0 if all(map(is_right, report.records)) else 1


if __name__ == "__main__":
    sys.exit(main())
