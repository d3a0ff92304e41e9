"""From how many query rows on a call over many cached keys is worth being sparse: operator against dense attention.

`python benchmarks/short_queries.py --json FILE` times N rows against M keys, selection included, after verifying the
output. Cached decoding calls attention like this, with N the tokens of a block; `Policy.min_queries` comes from here.
"""

import argparse
import dataclasses
import functools
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tables import block, crossed

from baatt import BAAttConfig, attend, ba_attention, make_plan
from baatt.lab.bench.timing import captured, median_times
from baatt.lab.bench.verification import require_verified, verify
from baatt.lab.records import RecordFile, provenance
from baatt.lab.tables import Record, percent, short_length, times

CHANNELS = 128


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def measure(
    queries: int, keys: int, heads: int, config: BAAttConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Milliseconds of both, and the speed-up."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, length, CHANNELS, generator=generator, device=device).to(dtype)
        for length in (queries, keys, keys)
    )
    plan = make_plan(q, k, config)
    require_verified(f"{queries} x {keys}", verify(q, k, v, plan, attend(q, k, v, plan)))
    functions: dict[str, Callable[[], Any]] = {
        "sparse": functools.partial(ba_attention, q, k, v, config),
        "dense": functools.partial(F.scaled_dot_product_attention, q, k, v),
    }
    if device.type == "cuda":
        functions = {name: captured(function, device) for name, function in functions.items()}
    found = median_times(functions, device)
    return {
        "queries": queries, "keys": keys, "sparsity": config.sparsity, "sparse_ms": found["sparse"],
        "dense_ms": found["dense"], "speedup": found["dense"] / found["sparse"],
    }  # fmt: skip


def table(record: Record) -> str:
    """A row per number of queries, a column per number of keys."""
    header, rows = crossed(
        record["records"],
        ("queries",),
        lambda one: (str(one["queries"]),),
        lambda one: f"{short_length(one['keys'])} keys",
        lambda one: times(one["speedup"]),
    )
    options = {"paper": "the paper's options", "default": "its defaults"}[record.get("preset", "paper")]
    caption = (
        f"Time of dense attention over that of the operator with {options}, selection included, at "
        f"{percent(record['records'][0]['sparsity'])} sparsity: {record['heads']} heads of {record['channels']}, "
        f"{record['dtype']}{', as CUDA graphs' if 'cuda' in record['versions'] else ''}."
    )
    return block(record, header, rows, caption)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=numbers, default=[16, 32, 64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--keys", type=numbers, default=[4096, 16384, 65536])
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--preset", choices=("paper", "default"), default="default", help="options of the method")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    command = shlex.join(["python", "benchmarks/short_queries.py", *(sys.argv[1:] if argv is None else argv)])
    header = {
        "study": "short queries over many keys", **provenance(command, device),
        "preset": arguments.preset, "heads": arguments.heads, "channels": CHANNELS,
        "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    report = RecordFile(arguments.json, header)
    config = dataclasses.replace(BAAttConfig.preset(arguments.preset), sparsity=arguments.sparsity)
    for keys in arguments.keys:
        for queries in (one for one in arguments.queries if one < keys):
            report.add(one := measure(queries, keys, arguments.heads, config, device, dtype))
            sys.stdout.write("{queries} x {keys}: {speedup:.2f}x\n".format(**one))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
