"""From a stored grid of `baatt ablate` to the Markdown of its tables: accuracy pooled over tasks, and task by task."""

import json
from collections.abc import Callable, Iterable
from typing import Any

from result_tables import Record, by_cell, order_name, provenance, table

from baatt.lab.statistics import wilson_interval

#: RULER-4K column of the paper's Table 8, and its sorting ablation at 50, 70 and 90 % sparsity, in percent.
PAPER_BETA = {0.0: 88.42, 0.1: 91.11, 0.5: 90.06, 1.0: 86.12, 2.0: 80.10}
PAPER_SORT = {
    "none": {0.5: 81.08, 0.7: 52.91, 0.9: 22.34},
    "q": {0.5: 82.64, 0.7: 55.66, 0.9: 24.07},
    "k": {0.5: 87.25, 0.7: 60.56, 0.9: 27.13},
    "qk": {0.5: 88.27, 0.7: 61.66, 0.9: 26.98},
}


def percent(sparsity: float) -> str:
    """`50 %`."""
    return f"{100 * sparsity:g} %"


def pooled(cells: Iterable[Record]) -> str:
    """As whole words in percent with its 95 % interval; after the semicolon by RULER's measure."""
    cells = list(cells)
    whole = [right for one in cells for right in one["right_whole"]]
    contained = [right for one in cells for right in one["right"]]
    low, high = wilson_interval(sum(whole), len(whole))
    shares = 100 * sum(whole) / len(whole), 100 * sum(contained) / len(contained)
    return f"{shares[0]:.1f} [{100 * low:.1f}-{100 * high:.1f}]; {shares[1]:.1f}"


def finished_tasks(record: Record) -> list[str]:
    """Tasks that have every cell any task has: of a run that was cut, the others are not pooled."""
    cells: dict[str, set[str]] = {}
    for one in record["records"]:
        cells.setdefault(one["task"], set()).add(json.dumps(one["config"]))
    everything = set().union(*cells.values())
    return [task for task, found in cells.items() if found == everything]


def sparse_cells(record: Record, *, finished: bool = True) -> list[dict[str, Any]]:
    """The sparse cells, of finished tasks or of all, with the names that `order_name` reads."""
    tasks = finished_tasks(record)
    cells = [one for one in record["records"] if one["config"] and (one["task"] in tasks or not finished)]
    return [one | {"sort": one["config"]["sort"], "segment": one["config"]["segment"]} for one in cells]


def grid(cells: list[dict[str, Any]], row: Callable[[Record], Any], column: Callable[[Record], Any]) -> list[list[str]]:
    """Rows of a table, cells of the same row and column pooled; `-` where the run's time limit came before."""
    columns = list(dict.fromkeys(map(column, cells)))
    found: dict[Any, dict[Any, list[Record]]] = {}
    for one in cells:
        found.setdefault(row(one), {}).setdefault(column(one), []).append(one)
    return [
        [*key, *(pooled(cells_here[name]) if name in cells_here else "-" for name in columns)]
        for key, cells_here in found.items()
    ]


def caption(record: Record, *, pooled_over_tasks: bool) -> str:
    """What a cell is, and dense attention beside it."""
    dense = [one for one in record["records"] if not one["config"]]
    if pooled_over_tasks:
        dense = [one for one in dense if one["task"] in finished_tasks(record)]
    tasks = ", ".join(f"`{one['task']}`" for one in dense)
    samples = record["count"] * (len(dense) if pooled_over_tasks else 1)
    layers = ", ".join(map(str, record["dense_layers"])) or "none"
    share = pooled(dense) if pooled_over_tasks else "; ".join(f"`{one['task']}` {pooled([one])}" for one in dense)
    return (
        "Answers right as whole words, in percent [95 % Wilson interval]; after the semicolon, those that contain "
        f"every value, RULER's measure. {samples} answers a cell, of {tasks}{'' if pooled_over_tasks else ', each'}, "
        f"{dense[0]['length']} tokens, seed {record['seed']}, `{record['model']}` in {record['dtype']}, layers that "
        f"stay dense: {layers}. Dense attention on the same samples: {share}. `-`: the run's time ended before."
    )


def by_beta(record: Record) -> str:
    """Table 8: a row per order and sparsity, a column per beta; the paper's row last."""
    betas = list(dict.fromkeys(one["config"]["beta"] for one in sparse_cells(record)))
    rows = grid(
        sparse_cells(record),
        lambda one: (order_name(one), percent(one["config"]["sparsity"])),
        lambda one: one["config"]["beta"],
    )
    rows.append(["paper, RULER-4K", "not stated", *(f"{PAPER_BETA[beta]:.2f}" for beta in betas)])
    header = ["order", "sparsity", *(f"beta {beta:g}" for beta in betas)]
    return "\n\n".join([table(header, rows), caption(record, pooled_over_tasks=True), provenance(record)])


def by_beta_and_task(record: Record) -> str:
    """As `by_beta`, task by task."""
    betas = list(dict.fromkeys(one["config"]["beta"] for one in sparse_cells(record)))
    rows = grid(
        sparse_cells(record, finished=False),
        lambda one: (f"`{one['task']}`", order_name(one), percent(one["config"]["sparsity"])),
        lambda one: one["config"]["beta"],
    )
    header = ["task", "order", "sparsity", *(f"beta {beta:g}" for beta in betas)]
    return "\n\n".join([table(header, rows), caption(record, pooled_over_tasks=False), provenance(record)])


def by_order(record: Record) -> str:
    """The sorting ablation: a row per order, a column per sparsity; the paper's rows last."""
    sparsities = list(dict.fromkeys(one["config"]["sparsity"] for one in sparse_cells(record)))
    rows = grid(sparse_cells(record), lambda one: (order_name(one),), lambda one: one["config"]["sparsity"])
    rows += [
        [f"paper, RULER-4K, {sort}", *(f"{values[sparsity]:.2f}" for sparsity in sparsities)]
        for sort, values in PAPER_SORT.items()
    ]
    header = ["order", *map(percent, sparsities)]
    return "\n\n".join([table(header, rows), caption(record, pooled_over_tasks=True), provenance(record)])


def by_order_and_task(record: Record) -> str:
    """As `by_order`, task by task."""
    sparsities = list(dict.fromkeys(one["config"]["sparsity"] for one in sparse_cells(record)))
    cells = sparse_cells(record, finished=False)
    rows = grid(cells, lambda one: (f"`{one['task']}`", order_name(one)), lambda one: one["config"]["sparsity"])
    header = ["task", "order", *map(percent, sparsities)]
    return "\n\n".join([table(header, rows), caption(record, pooled_over_tasks=False), provenance(record)])


def by_score(record: Record) -> str:
    """Scores at equal budgets: a row per score, a column per order and sparsity."""

    def column(one: Record) -> str:
        return f"{order_name(one)}, {percent(one['config']['sparsity'])}"

    columns = list(dict.fromkeys(map(column, sparse_cells(record))))
    rows = grid(sparse_cells(record), lambda one: (one["config"]["score"],), column)
    return "\n\n".join([table(["score", *columns], rows), caption(record, pooled_over_tasks=True), provenance(record)])


def by_layer(record: Record) -> str:
    """What an order does to each layer: norms, widths of blocks, spread of attention."""
    orders = list(dict.fromkeys(map(order_name, record["records"])))
    cells = by_cell(record, lambda one: one["layer"], order_name)
    rows = []
    for layer, row in cells.items():
        first = next(iter(row.values()))
        rows.append([
            str(layer), f"{first['query_norm_variation']:.3f}", f"{first['key_norm_variation']:.3f}",
            *(f"{row[name]['key_radius']:.2f}" for name in orders),
            *(f"{100 * row[name]['blocks_for_most']:.0f} %" for name in orders),
        ])  # fmt: skip
    header = ["layer", "norms of q vary", "norms of k vary", *(f"radius, {name}" for name in orders),
              *(f"blocks, {name}" for name in orders)]  # fmt: skip
    text = (
        "Norms vary: standard deviation over mean. Radius: largest distance of a key to the mean of its block over the "
        "mean norm of a key. Blocks: share of the key blocks that hold 90 % of the attention of a block of queries."
    )
    about = record["about"]
    source = (
        f"On `{about['model']}`, {about['tokens']} tokens of {about['text']}, weights in {about['dtype']}, all heads; "
        "the file comes from `baatt analyze capture --output needle-18m.safetensors`."
    )
    return "\n\n".join([table(header, rows), text, source, provenance(record)])
