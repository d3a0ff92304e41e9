"""How Ulysses attention should scale to 64 GPUs: measured times of one GPU, modelled exchange between them.

`python benchmarks/scaling_model.py` reads a result of `gpu_bars.py` and writes one of its own, marked as a model: per
case and number of GPUs the bytes a GPU sends, the time of the exchange at assumed bandwidths, and the efficiency if
attention takes its measured time divided by the GPUs. Knows no contention, no skew and no overlap. Also makes the
tables of this model and of the measurements of `ulysses.py`.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tables import block, crossed, length_text, sparsity_text

from baatt.lab.records import provenance, short_commit, write_json
from baatt.lab.tables import Record, Table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks/results")
GPUS = (1, 2, 4, 8, 16, 32, 64)
LEAST_TOKENS = 32768
USUAL_HEADS = 32
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class Links(NamedTuple):
    """What is assumed of the machines.

    gpus_per_node; node_bandwidth and network_bandwidth: bytes per second that one GPU sends inside a node and beyond,
    both at once; node_latency and network_latency: seconds of a collective that sends next to nothing; collectives: of
    one call, to agree on sizes, for q, k and v, and for the output.
    """

    gpus_per_node: int = 8
    node_bandwidth: float = 350e9
    network_bandwidth: float = 40e9
    node_latency: float = 30e-6
    network_latency: float = 60e-6
    collectives: int = 3


class Volume(NamedTuple):
    """Bytes of one call on one GPU: what it sends inside the node and beyond, and what it copies to pack and unpack."""

    node_bytes: int
    network_bytes: int
    copied_bytes: int


def volume(shape: Sequence[int], groups: int, item_bytes: int, gpus: int, gpus_per_node: int) -> Volume:
    """Of `baatt.distributed.ulysses_attention` for [B, H, N, D] with G key heads.

    Keys and values are repeated to lcm(G, gpus) heads. A GPU keeps 1 / gpus of what it packs and sends the rest. Every
    tensor is written once on each side of an exchange, and a copy reads and writes.
    """
    batch, heads, tokens, channels = shape
    head_bytes = batch * math.ceil(tokens / gpus) * channels * item_bytes
    sides = heads + 2 * math.lcm(groups, gpus), heads
    packed = sum(sides) * head_bytes
    neighbours = min(gpus, gpus_per_node)
    copied = 0 if gpus == 1 else 4 * packed
    return Volume(packed * (neighbours - 1) // gpus, packed * (gpus - neighbours) // gpus, copied)


def estimate(one: Record, gpus: int, links: Links, memory_bandwidth: float) -> dict[str, Any]:
    """One row of the model from a measured record of the operator."""
    names = ("shape", "groups", "dtype", "sparsity", "impl", "config")
    row = {name: one[name] for name in names} | {"gpus": gpus, "one_gpu_is": one.get("one_gpu_is", "measured")}
    heads = one["shape"][1]
    if heads % gpus:
        return row | {"refused": f"{gpus} processes do not divide {heads} heads"}
    sent = volume(one["shape"], one["groups"], ITEM_BYTES[one["dtype"]], gpus, links.gpus_per_node)
    crosses = gpus > links.gpus_per_node
    latency = 0.0 if gpus == 1 else links.network_latency if crosses else links.node_latency
    transfer = max(sent.node_bytes / links.node_bandwidth, sent.network_bytes / links.network_bandwidth)
    exchange = 1e3 * (transfer + links.collectives * latency + sent.copied_bytes / memory_bandwidth)
    attention = one["total_ms"] / gpus
    return row | {
        "one_gpu_ms": one["total_ms"],
        **sent._asdict(),
        "attention_ms": attention,
        "exchange_ms": exchange,
        "total_ms": attention + exchange,
        "speedup": one["total_ms"] / (attention + exchange),
        "efficiency": attention / (attention + exchange),
    }


def doubled(one: Record) -> Record:
    """A measured record as if it had twice the heads: they are independent, so it takes twice the time."""
    batch, heads, tokens, channels = one["shape"]
    return {
        **one,
        "shape": [batch, 2 * heads, tokens, channels],
        "groups": 2 * one["groups"],
        "total_ms": 2 * one["total_ms"],
        "one_gpu_is": f"twice what was measured with {heads} heads",
    }


def build(measured: Record, links: Links, gpus: Sequence[int]) -> list[dict[str, Any]]:
    """All long cases of the operator with the paper's score, and its last with 32 heads as if it had 64."""
    paper = (one for one in measured["records"] if one["what"] == "operator" and one["config"]["score"] == "covariance")
    chosen = [one for one in paper if one["shape"][2] >= LEAST_TOKENS]
    usual = [one for one in chosen if one["shape"][1] == USUAL_HEADS]
    return [
        estimate(one, count, links, measured["memory_bandwidth"])
        for one in [*chosen, *map(doubled, usual[-1:])]
        for count in gpus
    ]


def case_name(one: Record) -> str:
    """`128K, 90 %`, with H where it is not the usual one."""
    heads = "" if one["shape"][1] == USUAL_HEADS else f", H {one['shape'][1]}"
    return f"{length_text(one)}, {sparsity_text(one)}{heads}"


def table(record: Record) -> str:
    """The model: a row per number of GPUs, a column per case, first the speed-up, then what is exchanged."""

    def by_gpus(cell: Callable[[Record], str]) -> tuple[list[str], list[list[str]]]:
        return crossed(record["records"], ("GPUs",), lambda one: (str(one["gpus"]),), case_name, cell)

    links, measured = record["assumptions"], record["measurement"]
    caption = (
        f"**Model, not a measurement**, of the speed-up over one GPU (efficiency). Measured is one GPU only: "
        f"`{measured['file']}`, commit {short_commit(measured['commit'])}, {measured['device']}. Assumed: "
        "attention takes that time divided by the GPUs; nothing overlaps; a GPU sends "
        f"{links['node_bandwidth'] / 1e9:g} GB/s inside a node of {links['gpus_per_node']} and at the same time "
        f"{links['network_bandwidth'] / 1e9:g} GB/s beyond it; {links['collectives']} collectives a call wait "
        f"{1e6 * links['node_latency']:g} us each, {1e6 * links['network_latency']:g} us across nodes; packing and "
        f"unpacking copy at the {measured['memory_bandwidth'] / 1e12:.2f} TB/s measured there. -: the GPUs do not "
        "divide the heads. One GPU with 64 heads is taken to need twice what was measured with 32."
    )
    gained = Table(*by_gpus(speedup_cell), caption).markdown()
    sent = "The same model: MiB that one GPU sends in a call, and ms of the whole exchange."
    return f"{gained}\n\n{block(record, *by_gpus(exchange_cell), sent)}"


def speedup_cell(one: Record) -> str:
    """`6.1x (76 %)`."""
    return "-" if "refused" in one else f"{one['speedup']:.1f}x ({100 * one['efficiency']:.0f} %)"


def exchange_cell(one: Record) -> str:
    """`448 MiB, 1.9 ms`."""
    if "refused" in one:
        return "-"
    return f"{(one['node_bytes'] + one['network_bytes']) / 2**20:.0f} MiB, {one['exchange_ms']:.2f} ms"


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Links]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=RESULTS / "gpu_operator_h200.json", help="of gpu_bars.py")
    parser.add_argument("--json", type=Path, default=RESULTS / "ulysses_scaling.json")
    parser.add_argument("--gpus", default=",".join(map(str, GPUS)), help="by commas")
    for name, value in Links()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = parser.parse_args(argv)
    arguments.gpus = [int(count) for count in arguments.gpus.split(",")]
    return arguments, Links(**{name: getattr(arguments, name) for name in Links._fields})


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    arguments, links = parse_arguments(argv)
    measured = json.loads((ROOT / arguments.source).read_text(encoding="utf-8"))
    command = shlex.join(["python", "benchmarks/scaling_model.py", *(sys.argv[1:] if argv is None else argv)])
    record = {
        "study": "ulysses scaling, a model",
        **provenance(command, torch.device("cpu")),
        "device": "model, no device",
        "assumptions": links._asdict(),
        "measurement": {
            "file": str(arguments.source),
            **{name: measured[name] for name in ("commit", "device", "memory_bandwidth")},
        },
        "records": build(measured, links, arguments.gpus),
    }
    write_json(record, ROOT / arguments.json)
    sys.stdout.write(f"{table(record)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
