"""The GPU tables of the README in one run: attention kernel and whole operator, verified, against dense and flex.

The operator with the paper's options, and with blocks chosen by clusters: 16 or 8 a block, one budget a row or a head.
`python benchmarks/gpu_bars.py --json FILE` goes through `CASES` and writes the file again after each, so that a killed
run keeps what it has. One line per record. What is measured, and how, is `baatt.lab.bench`.
"""

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tables import RenderError, block, length_text, sizes_text, sparsity_text

from baatt.backend import IMPLS
from baatt.config import BAAttConfig
from baatt.lab.bench.benchmarks import measure, start_report
from baatt.lab.bench.case import Case, Shape
from baatt.lab.bench.verification import VerificationError
from baatt.lab.describe import order_name
from baatt.lab.records import RecordFile
from baatt.lab.tables import Record, error_of, gibibytes, percent, short_length, times

AGAINST = ("cudnn", "flash", "flex")
KERNEL = [(4096, 0.5), (32768, 0.0), (32768, 0.5), (32768, 0.9), (131072, 0.9)]
OPERATOR = [(4096, 0.5), (16384, 0.5), (32768, 0.5), (32768, 0.9), (131072, 0.9), (262144, 0.9)]
OPERATOR_OF_CLUSTERS = [(4096, 0.5), (16384, 0.5), (32768, 0.9), (131072, 0.9), (262144, 0.9)]
#: What else README's table of sparsities shows.
LESS_SPARSE = [(32768, 0.5), (32768, 0.7), (131072, 0.5), (131072, 0.7)]
PAPER = BAAttConfig.preset("paper")
CLUSTERS = dataclasses.replace(
    PAPER, score="clusters", sort="none", representatives=16, refinements=2, peak=True, keep_first=1, budget="row"
)


def make_case(
    what: str, tokens: int, sparsity: float, heads: int = 32, channels: int = 128, against: tuple[str, ...] = (),
    config: BAAttConfig = PAPER, causal: int | None = None,
) -> Case:  # fmt: skip
    """B 1, bfloat16; the paper's options are of all orders the one that costs most."""
    shape = Shape(1, heads, heads, tokens, channels)
    config = dataclasses.replace(config, sparsity=sparsity)
    return Case(what, shape, config, torch.bfloat16, torch.device("cuda"), against=against, causal=causal)


def name_of(case: Case) -> str:
    """`operator-32K-0.5`, `clusters-8-head-4K-0.5`, `causal-32-16K-0.5`; with H and D where they are not 32 and 128."""
    config = case.config
    if case.causal is not None:
        return f"causal-{case.causal}-{short_length(case.shape.tokens)}-{config.sparsity:g}"
    chosen = f"clusters-{config.representatives}" if config.score == "clusters" else case.what
    budget = "" if config.budget == "row" else f"-{config.budget}"
    heads = "" if case.shape.heads == 32 else f"-h{case.shape.heads}"
    channels = "" if case.shape.channels == 128 else f"-d{case.shape.channels}"
    return f"{chosen}{budget}-{short_length(case.shape.tokens)}-{config.sparsity:g}{heads}{channels}"


ALL = [
    *(make_case("kernel", tokens, sparsity) for tokens, sparsity in KERNEL),
    make_case("kernel", 32768, 0.5, channels=64),
    *(make_case("operator", tokens, sparsity, against=AGAINST) for tokens, sparsity in OPERATOR),
    make_case("operator", 2**20, 0.9, heads=8),
    *(
        make_case("operator", tokens, sparsity, against=against, config=dataclasses.replace(CLUSTERS, **changes))
        for changes, against in (
            ({}, ("cudnn", "flash")),
            ({"representatives": 8}, ("cudnn",)),
            ({"budget": "head"}, ("cudnn", "budget-row")),
        )
        for tokens, sparsity in OPERATOR_OF_CLUSTERS
    ),
    *(make_case("operator", *one, against=("cudnn",), config=CLUSTERS) for one in LESS_SPARSE),
    *(
        make_case("operator", tokens, sparsity, against=against, config=CLUSTERS, causal=causal)
        for tokens, sparsity in OPERATOR_OF_CLUSTERS
        for causal, against in ((1, ("cudnn", "flash")), (32, ("cudnn", "flash", "causal-1")))
    ),
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
    stages = ", ".join(f"{stage} {found:.3g}" for stage, found in record["stage_ms"].items())
    share = "" if record["selection_share"] is None else f", not attention {record['selection_share']:.1%}"
    speedup = "".join(f", {found:.2f}x over {baseline}" for baseline, found in record["speedup"].items())
    notes = [f"{baseline} refused: {reason}" for baseline, reason in record["refused"].items()] + record[
        "without_graph"
    ]
    cost = record["compensation_cost"]
    return (
        f"{name}: {record['total_ms']:.4g} ms ({stages}){'' if cost is None else f', {cost:+.1%} to beta=0'}, "
        f"{record['kept_tflops']:.0f} TFLOP/s{share}{speedup}, "
        f"error {record['error']:.2e} of {record['error_limit']:.2e}, "
        f"{(record['peak_memory_bytes'] or 0) / 2**30:.2f} GiB beyond inputs, took {seconds:.0f} s"
        f"{''.join(f'; {note}' for note in notes)}\n"
    )


def operator_table(record: Record) -> str:
    """The operator with the paper's options against dense and block-sparse attention, a row per length and sparsity."""
    chosen = records_of(record, "operator", "covariance")
    usual = sizes_text(chosen[0])
    rows = [
        [
            length_text(one) + ("" if sizes_text(one) == usual else f" ({sizes_text(one)})"),
            sparsity_text(one),
            f"{one['total_ms']:.3g}",
            percent(one["selection_share"], 0),
            *(times(one["speedup"].get(name)) for name in AGAINST),
            gibibytes(one["peak_memory_bytes"]),
            error_of(one["error"], one["error_limit"]),
        ]
        for one in chosen
    ]
    header = ("length", "sparsity", "ms", "not attention", *(f"over {name}" for name in AGAINST), "extra memory")
    refused = dict.fromkeys(f"{name}: {reason}" for one in chosen for name, reason in one["refused"].items())
    caption = (
        f"{usual}, tokens sorted: {order_name(chosen[0]['config'])}. Time of the whole call, selection "
        "included; share of it that is not attention; speed-up over dense attention of cuDNN and FlashAttention and "
        "over compiled FlexAttention, which gets our block lists and sorted tokens ready-made; memory beyond q, k "
        "and v; relative L2 error against float64 with the same mask, and its limit."
        + (f" Not run: {'; '.join(refused)}." if refused else "")
    )
    return block(record, [*header, "error (limit)"], rows, caption)


def clusters_table(records: list[Record]) -> str:
    """The operator with the paper's setting and with blocks chosen by clusters, beside its floor; row by length.

    Of a length, sparsity and setting that several records have, the last is shown.
    """
    found = {
        (one["shape"][2], one["sparsity"], setting_of(one)): (one, record)
        for record in records
        for one in records_of(record, "operator")
    }
    settings = list(dict.fromkeys(setting for _, _, setting in found))
    chosen = [found[key] for key in sorted(found, key=lambda key: (*key[:2], settings.index(key[2])))]
    rows = [
        [
            length_text(one),
            sparsity_text(one),
            setting_of(one),
            f"{one['total_ms']:.3g}",
            percent(one["selection_share"], 0),
            f"{one['baseline_ms']['cudnn']:.3g}",
            *(times(one["speedup"].get(name)) for name in ("cudnn", "flash", "budget-row")),
            f"{(floor := floor_ms(one, record)):.3g}",
            times(one["total_ms"] / floor),
            gibibytes(one["peak_memory_bytes"]),
            error_of(one["error"], one["error_limit"]),
        ]
        for one, record in chosen
    ]
    header = (
        *("length", "sparsity", "setting", "ms", "not attention", "cudnn, ms", "over cudnn", "over flash"),
        *("over budgets of rows", "floor, ms", "over the floor", "extra memory", "error (limit)"),
    )
    peaks = " and ".join(f"{record['matrix_peak_tflops']:.0f}" for record in records)
    widths = " and ".join(f"{record['memory_bandwidth'] / 1e12:.2f}" for record in records)
    caption = (
        f"{sizes_text(chosen[0][0])}. Time of the whole call, selection included. The floor: products of the kept "
        "pairs and of all pairs of clusters (C3), or of block statistics (E5), at the TFLOP/s of a large "
        f"{records[0]['matrix_peak_dtype']} matrix product in the same run ({peaks}), or q, k, v and output moved once "
        f"at its TB/s ({widths}), whichever is longer; finding the clusters and sorting are not counted. Each row has "
        "its own time of cuDNN, which moves with the clock of the machine: rows compare by what they are over it. "
        "Budgets of a head took turns with the same call with budgets of rows."
    )
    return block(records, header, rows, caption)


def setting_of(one: Record) -> str:
    """`the paper's`, `16 clusters` or `16 clusters, budget of a head`."""
    if one["config"]["score"] != "clusters":
        return "the paper's"
    budget = ", budget of a head" if one["config"]["budget"] == "head" else ""
    return f"{one['config']['representatives']} clusters{budget}"


def floor_ms(one: Record, report: Record) -> float:
    """Least time of a record of the operator on a machine of these ceilings."""
    (batch, heads, tokens, channels), config = one["shape"], one["config"]
    blocks = -(-tokens // config["block_size"])
    products = config["representatives"] ** 2 if config["score"] == "clusters" else 3
    kept = 1e9 * one["kept_tflops"] * one["stage_ms"]["attend"]
    operations = 2 * batch * heads * products * blocks**2 * channels + kept
    moved = one["input_bytes"] * (1 + heads / (heads + 2 * one["groups"]))
    return max(operations / report["matrix_peak_tflops"] / 1e9, 1e3 * moved / report["memory_bandwidth"])


def causal_table(record: Record) -> str:
    """Causal attention, blocks chosen by clusters, against causal dense attention; a row per length and structure."""
    chosen = [one for one in records_of(record, "operator") if one["causal"]]
    rows = [
        [
            length_text(one),
            sparsity_text(one),
            str(one["causal"]),
            f"{one['total_ms']:.3g}",
            f"{sum(one['stage_ms'].values()):.3g}",
            percent(one["selection_share"], 0),
            *(times(one["speedup"].get(name)) for name in ("cudnn", "flash", "causal-1")),
            error_of(one["error"], one["error_limit"]),
        ]
        for one in chosen
    ]
    caption = (
        f"{sizes_text(chosen[0])}. Sparsity: of the blocks that queries see. Time of the whole call, selection "
        "included; of its stages, each timed alone, added up, and the share of them that is not attention; speed-up of "
        "the call over causal dense attention of cuDNN and FlashAttention-2, in turns with them; they know no blocks "
        "of several tokens, so those calls took turns with the same call with blocks of 1; relative L2 error against "
        "float64 with the same mask, and its limit."
    )
    header = ("length", "sparsity", "tokens per causal block", "ms", "stages, ms", "not attention")
    return block(record, (*header, "over cudnn", "over flash", "over blocks of 1", "error (limit)"), rows, caption)


def compensation_table(record: Record) -> str:
    """By how much the operator is slower than with beta 0, a row per length and sparsity."""
    rows = [
        [length_text(one), str(one["shape"][1]), sparsity_text(one), f"{100 * one['compensation_cost']:+.1f} %"]
        for one in records_of(record, "operator", "covariance")
    ]
    return block(record, ("length", "H", "sparsity", "slower by"), rows)


def kernel_table(record: Record) -> str:
    """The attention kernel alone on random lists, a row per length, sparsity and D."""
    chosen, peak = records_of(record, "kernel"), record["matrix_peak_tflops"]
    rows = [
        [
            length_text(one),
            sparsity_text(one),
            str(one["shape"][3]),
            f"{one['kept_tflops']:.0f}",
            percent(one["kept_tflops"] / peak, 0),
        ]
        for one in chosen
    ]
    batch, heads = chosen[0]["shape"][:2]
    caption = (
        f"B {batch}, H {heads}, {chosen[0]['dtype']}, `{chosen[0]['impl']}`, random lists; operations of kept pairs. "
        f"The peak is {peak:.0f} TFLOP/s, a large {record['matrix_peak_dtype']} matrix product in the same run."
    )
    return block(record, ("length", "sparsity", "D", "TFLOP/s", "of the peak"), rows, caption)


def peers_table(records: list[Record]) -> str:
    """The attention kernel in turns with block-sparse attention of other libraries, a row per shape and sparsity."""
    found = [one for record in records for one in records_of(record, "kernel")]
    chosen = sorted(found, key=lambda one: (-one["shape"][3], one["shape"][2], one["sparsity"]))
    peaks = " and ".join(f"{record['matrix_peak_tflops']:.0f}" for record in records)
    names = dict.fromkeys(name for one in chosen for name in (*one["baseline_ms"], *one["refused"]))
    dense = [name for name in names if name in ("cudnn", "flash", "fa4-dense")]
    peers = [name for name in names if name not in dense]
    rows = []
    for one in chosen:
        operations = one["kept_tflops"] * one["stage_ms"]["attend"]
        rates = [operations / one["baseline_ms"][name] if name in one["baseline_ms"] else None for name in peers]
        rows.append([
            length_text(one), sparsity_text(one), str(one["shape"][3]), f"{operations / one['total_ms']:.0f}",
            *("refused" if rate is None else f"{rate:.0f}" for rate in rates),
            *(times(one["speedup"].get(name)) for name in dense),
        ])  # fmt: skip
    batch, heads = chosen[0]["shape"][:2]
    refused = dict.fromkeys(f"`{name}` {reason}" for one in chosen for name, reason in one["refused"].items())
    caption = (
        f"TFLOP/s of kept pairs, the same random lists for all: B {batch}, H {heads}, {chosen[0]['dtype']}, in turns, "
        f"peak {peaks} TFLOP/s; then ours over dense attention.{without_graph(chosen)}"
        + "".join(f" Refused: {one}." for one in refused)
    )
    header = ("length", "sparsity", "D", f"baatt, `{chosen[0]['impl']}`", *(f"`{name}`" for name in peers))
    return block(records, (*header, *(f"over {name}" for name in dense)), rows, caption)


def without_graph(chosen: list[Record]) -> str:
    """The sentence of a caption about what was launched each time where the others were replayed."""
    alone = dict.fromkeys(one.split(":")[0] for row in chosen for one in row.get("without_graph", ()))
    return f" Timed without a CUDA graph: {', '.join(f'`{name}`' for name in alone)}." if alone else ""


def choosers_table(record: Record) -> str:
    """The whole operator in turns with another library's kernel behind its users' way to choose blocks."""
    chosen = records_of(record, "operator")
    names = dict.fromkeys(name for one in chosen for name in one["baseline_ms"])
    rows = [
        [
            length_text(one),
            sparsity_text(one),
            f"{one['total_ms']:.3g}",
            *(f"{ms:.3g}" if (ms := one["baseline_ms"].get(name)) else "refused" for name in names),
            *(times(one["speedup"].get(name)) for name in names),
        ]
        for one in chosen
    ]
    batch, heads, _, channels = chosen[0]["shape"]
    caption = (
        f"Milliseconds of the whole call, B {batch}, H {heads}, D {channels}, {chosen[0]['dtype']}, "
        f"`{chosen[0]['impl']}`, blocks chosen by clusters; `xattention`: blocks chosen as XAttention does, by our "
        "kernel for its score, and our attention over them; with another name behind it: that library's kernel, which "
        "gets lists in its layout for nothing. All at the same sparsity; which answers survive is in docs/ruler.md."
        + without_graph(chosen)
    )
    header = ("length", "sparsity", "baatt", *(f"`{name}`" for name in names), *(f"over {name}" for name in names))
    return block(record, header, rows, caption)


def records_of(record: Record, what: str, score: str | None = None) -> list[Record]:
    """The measurements of the operator with a score, or of its kernel."""
    chosen = [one for one in record["records"] if one["what"] == what and score in (None, one["config"]["score"])]
    if not chosen:
        raise RenderError(f"no record is of the {what}{f' with the score {score}' if score else ''}")
    return chosen


def measure_all(cases: Mapping[str, Case], report: RecordFile) -> int:
    """Measures and tells case by case; returns how many failed verification or could not run, the others are kept."""
    failures = 0
    for name, case in cases.items():
        started = time.perf_counter()
        try:
            record = measure(case)
        except (VerificationError, RuntimeError) as error:
            failures += 1
            sys.stdout.write(f"{name}: FAILED, {type(error).__name__}: {error}\n")
            continue
        report.add({"case": name, **record})
        sys.stdout.write(line(name, record, time.perf_counter() - started))
        sys.stdout.flush()
    return failures


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 1 if a case failed verification or could not run, the others are kept."""
    arguments = parse_arguments(argv)
    first = CASES[arguments.cases[0]]
    command = shlex.join(["python", "benchmarks/gpu_bars.py", *(sys.argv[1:] if argv is None else argv)])
    report = start_report(command, first.device, first.dtype, arguments.json)
    sys.stdout.write("{device}: {matrix_peak_tflops:.0f} TFLOP/s, {memory_bandwidth:.3g} B/s\n".format(**report.header))
    left_out = {"flex"} if arguments.no_flex else set(AGAINST) if arguments.skip_baselines else set()
    cases = {
        name: case._replace(impl=arguments.impl, against=tuple(one for one in case.against if one not in left_out))
        for name, case in CASES.items()
        if name in arguments.cases
    }
    return 1 if measure_all(cases, report) else 0


if __name__ == "__main__":
    sys.exit(main())
