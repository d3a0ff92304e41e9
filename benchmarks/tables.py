"""From stored results to the Markdown of their tables: what all tables share, and the tables of `baatt` commands.

In: a result as it is stored. Out: a table, what its numbers are, and how to repeat it. A benchmark with a script of its
own has its table there; RULER's tables are in ruler_tables.py, those of the first checkpoint in archive_tables.py.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from baatt.cli.analyze import key_tables
from baatt.lab.describe import order_name, selection_name
from baatt.lab.records import short_commit
from baatt.lab.tables import MISSING, Record, Table, error_of, figures, percent, pivot, short_length, times

Text = Callable[[Record], str]
#: What made the file of studies that do not say it.
NEEDLE_CAPTURE = "baatt analyze capture --output needle-18m.safetensors"


class RenderError(Exception):
    """A block that cannot be rendered: unknown, not closed, or without its result."""


def block(
    record: Record | list[Record], columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str = ""
) -> str:
    """A table with its caption and its source, or its sources."""
    records = record if isinstance(record, list) else [record]
    return "\n\n".join([Table(columns, list(rows), caption).markdown(), *map(source, records)])


def source(record: Record) -> str:
    """The lines below every table: command, commits, device and versions of the run."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    commits = dict.fromkeys(one["commit"] for one in [record, *record["records"]] if "commit" in one)
    return (
        f"Command: `{record['command']}`  \n"
        f"Commit {', '.join(map(short_commit, commits))}, device {device_text(record['device'])}, {versions}."
    )


def verdict(holds: bool) -> str:
    """`met` or `missed`, of what was asked beforehand."""
    return "met" if holds else "missed"


def device_text(device: Any) -> str:
    """A device as one phrase; some records hold a table of its properties."""
    if isinstance(device, Mapping):
        return ", ".join(f"{name} {value}" for name, value in device.items())
    return str(device)


def share_of(text: str) -> float:
    """The share that is written `70%`."""
    return int(text.removesuffix("%")) / 100


def crossed(
    records: Iterable[Record],
    first: Sequence[str],
    row: Callable[[Record], tuple[str, ...]],
    column: Text,
    cell: Text,
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row for each value of `row`, which fills the first columns, a column for each of `column`."""
    records = list(records)
    names = list(dict.fromkeys(map(column, records)))
    rows = [
        [*labels, *(cell(found[name]) if name in found else MISSING for name in names)]
        for labels, found in pivot(records, row, column).items()
    ]
    return [*first, *names], rows


def sizes_text(one: Record) -> str:
    """All that matters but length and options: `B 1, H 32, D 128, bfloat16`."""
    batch, heads, _, channels = one["shape"]
    grouped = "" if one["groups"] == heads else f", G {one['groups']}"
    return f"B {batch}, H {heads}{grouped}, D {channels}, {one['dtype']}, `{one['impl']}`"


def length_text(one: Record) -> str:
    """`32K`, of a record of an operator."""
    return short_length(one["shape"][2])


def sparsity_text(one: Record) -> str:
    """`50 %`."""
    return percent(one["sparsity"])


def cpu_operator(record: Record) -> str:
    """The operator on a processor against dense attention, a row per sparsity."""
    chosen, peak = record["records"], record["matrix_peak_tflops"]
    rows = [
        [
            sparsity_text(one),
            figures(one["total_ms"]),
            percent(one["selection_share"], 0),
            figures(one["baseline_ms"]["dense"]),
            times(one["speedup"]["dense"]),
            f"{1e3 * one['kept_tflops']:.0f}",
            times(one["peak_memory_bytes"] / one["input_bytes"]),
            error_of(one["error"], one["error_limit"]),
        ]
        for one in chosen
    ]
    header = (
        *("sparsity", "ms", "not attention", "dense, ms", "speed-up", "GFLOP/s", "extra memory / inputs"),
        "error (limit)",
    )
    caption = (
        f"{selection_name(chosen[0]['config'], ())}; {sizes_text(chosen[0])}. Time of the whole call, selection "
        "included; share of it that is not attention; operations a second of attention on kept pairs, beside "
        f"{1e3 * peak:.0f} GFLOP/s of a large {record['matrix_peak_dtype']} matrix product in the same run; relative "
        "L2 error against float64 with the same mask, and its limit."
    )
    return block(record, header, rows, caption)


def study(record: Record, columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """As `block`, for a study of `baatt analyze`: also what it was made on."""
    about = record["about"]
    made = f"`{about['model']}`, {about['tokens']} tokens of {about['text']}, weights in {about['dtype']}, all heads"
    command = about.get("command", NEEDLE_CAPTURE)
    return block(record, columns, rows, f"{caption}\n\nOn {made}; the file comes from `{command}`.")


def order_and_sparsity(one: Record) -> tuple[str, str]:
    """The first two columns of a table of attention mass."""
    return order_name(one), sparsity_text(one)


def whole_model(record: Record) -> list[Record]:
    """The records over all layers together."""
    return [one for one in record["records"] if one["layer"] is None]


def recall_by_score(record: Record) -> str:
    """Attention mass kept: a row per order and sparsity, a column per score."""
    caption = (
        "Share of the attention mass in the kept blocks: mean (5th percentile) over layers, heads and query blocks."
    )
    header, rows = crossed(
        whole_model(record),
        ("order", "sparsity"),
        order_and_sparsity,
        lambda one: str(one["score"]),
        lambda one: f"{one['recall_mean']:.3f} ({one['recall_p5']:.3f})",
    )
    return study(record, header, rows, caption)


def recall_by_beta(record: Record) -> str:
    """Attention mass kept by the covariance score: a row per order and sparsity, a column per beta."""
    header, rows = crossed(
        whole_model(record),
        ("order", "sparsity"),
        order_and_sparsity,
        lambda one: f"beta {one['beta']:g}",
        lambda one: f"{one['recall_mean']:.4f}",
    )
    return study(record, header, rows, "Mean share of the attention mass kept.")


def by_layer(record: Record, cell: Text, name: str = "") -> tuple[list[str], list[list[str]]]:
    """A row per layer, a column per order."""
    return crossed(
        record["records"], ("layer",), lambda one: (str(one["layer"]),), lambda one: f"{name}{order_name(one)}", cell
    )


def bound_by_layer(record: Record) -> str:
    """Pearson's R of the bound with the largest deviation: a row per layer, a column per order."""
    caption = (
        "Pearson's R of the bound U with the largest deviation of a logit from its block logit, over "
        f"{record['records'][0]['pairs']:,} block pairs a cell."
    )
    return study(record, *by_layer(record, lambda one: f"{one['correlation_largest']:.3f}"), caption)


def keys_by_layer(record: Record) -> str:
    """What single keys get, a row per layer."""
    (table,) = key_tables(record["records"])
    return study(record, table.columns, table.rows, table.caption)


def sorting_by_layer(record: Record) -> str:
    """What an order does to each layer: norms, widths of blocks, spread of attention."""
    caption = (
        "Norms vary: standard deviation over mean. Radius: largest distance of a key to the mean of its block over the "
        "mean norm of a key. Blocks: share of the key blocks that hold 90 % of the attention of a block of queries."
    )
    radius_header, radius = by_layer(record, lambda one: f"{one['key_radius']:.2f}", "radius, ")
    blocks_header, blocks = by_layer(record, lambda one: percent(one["blocks_for_most"], 0), "blocks, ")
    layers = {str(one["layer"]): one for one in record["records"]}  # norms are the same in every order
    norms = [
        [f"{one['query_norm_variation']:.3f}", f"{one['key_norm_variation']:.3f}"]
        for one in (layers[row[0]] for row in radius)
    ]
    rows = [[wide[0], *norm, *wide[1:], *most[1:]] for wide, norm, most in zip(radius, norms, blocks, strict=True)]
    header = ["layer", "norms of q vary", "norms of k vary", *radius_header[1:], *blocks_header[1:]]
    return study(record, header, rows, caption)
