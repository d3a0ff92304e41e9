"""RULER's averages of every score beside the time of the whole operator, as a share of dense attention's.

`python benchmarks/frontier.py --json FILE` verifies and times the operator with the options of RULER's settings that
keep no layer dense, each in turns with cuDNN's dense attention: B 1, H 32, D 128, bfloat16. With `--draw FILE --plot
PNG` it sets stored times beside the answers under benchmarks/results/ and needs no GPU.
"""

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ruler_grid
import torch
from gpu_bars import measure_all
from ruler_tables import GRIDS, averages_of, score
from tables import crossed, source

from baatt.cli.evaluate import read_cells
from baatt.cli.main import build_parser
from baatt.cli.ruler_report import difference
from baatt.config import BAAttConfig
from baatt.lab.bench.benchmarks import start_report
from baatt.lab.bench.case import Case, Shape
from baatt.lab.plots import legend_below, picture
from baatt.lab.records import load_records, short_commit, stored_text
from baatt.lab.ruler.sources import Sources
from baatt.lab.tables import MISSING, Record, Table, percent, short_length, times

RESULTS = Path(__file__).resolve().parent / "results"
PICTURE = "figures/frontier_h200.png"
CAPTION = (
    "*Up and to the left is better: more answers right in less time. The points of a line are 90, 70 and 50 % sparsity "
    "from left to right; the star is dense attention.*"
)
LENGTHS, SPARSITIES = (8192, 16384), (0.5, 0.7, 0.9)
LONGEST = 131072
REAL_LENGTH = 8192  # of the documents that a real model reads
READ = ("block_size", "sort", "score", "representatives", "refinements", "peak", "keep_first", "budget")
SETTINGS = (
    *("paper", "unsorted-first", "mean", "antidiagonal", "antidiagonal-first", "clusters", "oracle", "oracle-peak"),
)


def make_cases(lengths: Sequence[int], heads: int, device: torch.device) -> dict[str, Case]:
    """`clusters-8K-0.5` and so on: what RULER's settings are told, against the fastest dense attention there is."""
    dtype, against = (torch.bfloat16, "cudnn") if device.type == "cuda" else (torch.float32, "dense")
    return {
        f"{setting}-{short_length(tokens)}-{sparsity:g}": Case(
            "operator", Shape(1, heads, heads, tokens, 128), config_of(setting, sparsity), dtype, device,
            against=(against,),
        )
        for tokens in lengths
        for setting in SETTINGS
        for sparsity in SPARSITIES
    }  # fmt: skip


def config_of(setting: str, sparsity: float) -> BAAttConfig:
    """The options of a setting of ruler_grid.py."""
    options = [*ruler_grid.SETTINGS[setting], "--sparsity", f"{sparsity:g}", "--tasks", "vt"]
    config = read_cells(build_parser("evaluate").parse_args(["evaluate", "ruler", *options]), Sources())[-1].config
    if config is None:
        raise ValueError(f"setting must be sparse, got {setting}")
    return config


def points(report: Record, grids: Sequence[Record]) -> list[dict[str, Any]]:
    """RULER's averages that have a time, each with its share of the time of dense attention; dense attention has 1."""
    shares = {one["case"]: one["total_ms"] / next(iter(one["baseline_ms"].values())) for one in report["records"]}
    lengths = {one["shape"][2] for one in report["records"]}
    averages = [one for one in averages_of(grids) if one["length"] in lengths]
    dense = {}
    for one in averages:  # of as many samples as there are
        if not one["config"] and one["n"] >= dense.get(one["length"], {"n": 0})["n"]:
            dense[one["length"]] = {**one, "selection": "dense attention", "share": 1.0}
    sparse = [
        {**one, "share": shares[name]}
        for one in averages
        if one["config"]
        and (name := f"{one['setting']}-{short_length(one['length'])}-{one['config']['sparsity']:g}") in shares
    ]
    return [*dense.values(), *sparse]


def draw(found: Sequence[Record], caption: str, path: Path) -> None:
    """RULER's average over the share of the time, a panel per length, a line per selection."""
    lengths = sorted({one["length"] for one in found})
    names = list(dict.fromkeys(one["selection"] for one in found))
    with picture(path, caption, 1, len(lengths), (6.4 * len(lengths), 6.4), sharey=True) as axes:
        for axis, length in zip(axes[0], lengths, strict=True):
            for number, name in enumerate(names):
                line = [one for one in found if (one["length"], one["selection"]) == (length, name)]
                line.sort(key=lambda one: float(one["share"]))
                values = [100 * one["accuracy"] for one in line]
                spread = [[100 * abs(one["accuracy"] - one[end]) for one in line] for end in ("ci_low", "ci_high")]
                style = {"fmt": "*", "color": "0.2", "markersize": 12} if not number else {"fmt": "-o", "markersize": 4}
                axis.errorbar([one["share"] for one in line], values, spread if line else None, label=name, **style)
            axis.set(title=f"{length} tokens", xlabel="time of the operator / dense attention", xscale="log")
            axis.set_xticks(ticks := (0.1, 0.2, 0.5, 1, 2, 5), [percent(tick) for tick in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0][0].set_ylabel("RULER's score, average over 11 tasks")
        legend_below(axes, len(lengths) + 1)


def table(records: Sequence[Record]) -> str:
    """The picture; then by length a row per selection, a column per sparsity. records: of the times, then grids."""
    report, found = records[0], points(records[0], records[1:])
    parts = [f"![RULER's average over the share of dense attention's time]({PICTURE})", CAPTION]
    for length in sorted({one["length"] for one in found}):
        dense, *sparse = (one for one in found if one["length"] == length)
        header, rows = crossed(
            sparse, ("selection",), lambda one: (one["selection"],),
            lambda one: percent(one["config"]["sparsity"]),
            lambda one: f"{100 * one['accuracy']:.1f} in {percent(one['share'], 0)}",
        )  # fmt: skip
        parts += [f"{length} tokens; dense attention: {score(dense)}", Table(header, rows).markdown()]
    return "\n\n".join([*parts, text(report), source(report)])


def which(records: Sequence[Record]) -> str:
    """The default by sparsity: how much faster it is at each length, and what it loses.

    records: times of this script and of gpu_bars.py, `baatt evaluate fidelity` of a real model, then grids.
    """
    timed = next(place for place, record in enumerate(records) if any("recalled" in one for one in record["records"]))
    reports, real, grids = records[:timed], records[timed], records[timed + 1 :]
    gains = {
        (one["shape"][2], one["sparsity"]): times(one["speedup"]["cudnn"])
        for one in itertools.chain.from_iterable(report["records"] for report in reports)
        if is_default(one["config"]) and one["what"] == "operator"
    }
    lost = {
        (one["length"], one["config"]["sparsity"]): difference(one)
        for one in averages_of(grids)
        if one["setting"] == "clusters" and one["config"]
    }
    recalled = {
        one["config"].get("sparsity", 0.0): f"{100 * one['recalled']:.1f}"
        for one in real["records"]
        if one["length"] == REAL_LENGTH and (not one["config"] or is_default(one["config"]))
    }
    faster = sorted({length for length, _ in gains if LENGTHS[0] <= length <= LONGEST})
    columns = [("speed-up", gains, length) for length in faster] + [("RULER", lost, length) for length in LENGTHS]
    rows = [
        [percent(share), *(found.get((length, share), MISSING) for _, found, length in columns), recalled[share]]
        for share in SPARSITIES
    ]
    header = ["sparsity", *(f"{what}, {short_length(length)}" for what, _, length in columns), "SmolLM2, digits, 8K"]
    batch, heads, _, channels = reports[0]["records"][0]["shape"]
    caption = (
        f"Speed-up: dense attention of cuDNN over the whole call, choosing of blocks too, on an H200 (B {batch}, H "
        f"{heads}, D {channels}, bfloat16). RULER: points of the shipped model's average against dense attention [95 % "
        f"interval]. SmolLM2-135M-Instruct: digits of planted numbers that it recalls, of 100; dense: {recalled[0.0]}. "
        "Every layer sparse."
    )
    caption += " -: not measured." if any(MISSING in row for row in rows) else ""
    commits = ", ".join(short_commit(report["commit"]) for report in (*reports, real))
    made = "Commands: `frontier`, `gpu_clusters`, `ruler_grid` and `fidelity` of benchmarks/README.md"
    return f"{Table(header, rows, caption).markdown()}\n\n{made}; commits of the times and of SmolLM2: {commits}."


def is_default(config: Record) -> bool:
    """Whether a config chooses blocks as `BAAttConfig()` does; what it does not read may differ."""
    usual = BAAttConfig()
    return all(
        config.get(name) == getattr(usual, name) for name in ("block_size", "sort", "keep_first", "budget", *READ)
    )


def text(report: Record) -> str:
    """What is set beside what."""
    first = report["records"][0]
    batch, heads, _, channels = first["shape"]
    baseline, graphs = next(iter(first["baseline_ms"])), ", CUDA graphs" if first["graph"] else ""
    return (
        "RULER's average of the shipped model in percent, in what share of the time of dense attention "
        f"(`{baseline}`) the whole operator runs at this length on random q, k and v: B {batch}, H {heads}, "
        f"D {channels}, {first['dtype']}, `{first['impl']}`{graphs}, the two in turns. The antidiagonal "
        "score and what the exact masses gather are PyTorch's functions, all else are kernels."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 1 if a case failed, the others are kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the times go")
    parser.add_argument("--lengths", type=ruler_grid.numbers, default=list(LENGTHS))
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--draw", type=Path, metavar="FILE", help="stored times; measures nothing")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    arguments = parser.parse_args(argv)
    if (arguments.json is None) == (arguments.draw is None) or (arguments.draw is None) != (arguments.plot is None):
        parser.error("--json FILE, or --draw FILE --plot PNG, must be given")
    if arguments.draw is not None:
        report = load_records(arguments.draw, ("records",), "benchmarks/frontier.py --json")
        grids = [json.loads(stored_text(RESULTS / name)) for name in GRIDS]
        draw(points(report, grids), f"{report['device']}, commit {report['commit'][:10]}", arguments.plot)
        return 0
    cases = make_cases(arguments.lengths, arguments.heads, arguments.device)
    command = shlex.join(["python", "benchmarks/frontier.py", *(sys.argv[1:] if argv is None else argv)])
    first = next(iter(cases.values()))
    return 1 if measure_all(cases, start_report(command, first.device, first.dtype, arguments.json)) else 0


if __name__ == "__main__":
    sys.exit(main())
