"""Tables of grids of RULER on a diffusion model grown from SmolLM2, beside what the paper reports.

In: results of ruler_grid.py, each of one model and one number of samples. Out: Markdown. Averages over tasks of all
settings and sparsities are `ruler_tables.grid_averages`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import card_tables
import paper
import ruler_tables
from case import Block, Case
from ruler_tables import answers_text, average, beyond, grid_source, selection, settings_of
from tables import crossed, verdict

from baatt.cli.ruler_report import score
from baatt.lab.describe import order_name
from baatt.lab.tables import MISSING, Record, Table, percent

#: Asked of dense attention: of which tasks, the beginning of their names, tokens, points at least.
BARS = (("needle tasks", "niah_", 4096, 95), ("needle tasks", "niah_", 8192, 90), ("all tasks", "", 4096, 80))
#: The sparsity of the table task by task.
HALF = 0.5

#: The runs of the model grown from SmolLM2, in order, and what it can do: bars.py first, then RULER's tasks.
SMOLLM2_RUNS = ("training/smollm2_run1.json", "training/smollm2_run2.json")
SMOLLM2_BARS = tuple(f"training/smollm2_{name}.json" for name in ("bars", "ruler", "ruler_8192"))
#: RULER on it with the same settings at two lengths.
SMOLLM2_GRIDS = ("ruler_smollm2_4096.json", "ruler_smollm2_8192.json")
#: With the first key block free, at the same lengths.
SMOLLM2_FREE = ("ruler_smollm2_free_4096.json", "ruler_smollm2_free_8192.json")
#: Records of all tasks by order and by what differs within it.
Cells = dict[tuple[str, float], list[Record]]


def dense_bars(grids: Sequence[Record]) -> str:
    """What was asked of the model with dense attention, and what it reaches."""
    rows = []
    for name, beginning, length, least in BARS:
        dense = [one for grid in grids for one in dense_records(grid)]
        found = [one for one in dense if one["length"] == length and one["task"].startswith(beginning)]
        cells = [MISSING] * 2
        if found:
            reached = 100 * sum(one["accuracy"] for one in found) / len(found)
            cells = [f"{average(found)}, n = {found[0]['n']} of each of {len(found)}", verdict(reached >= least)]
        rows.append([name, str(length), str(least), *cells])
    return Table(("dense attention", "tokens", "at least", "found", ""), rows).markdown()


def by_beta(grid: Record) -> str:
    """Table 8: a row per order, a column per weight of the compensation; the paper's row last."""
    cells = grouped(grid, "beta")
    betas = sorted({beta for _, beta in cells})
    rows = [
        [order, *(beside(cells, (order, beta), (order, 0.0)) for beta in betas)]
        for order in dict.fromkeys(order for order, _ in cells)
    ]
    rows.append(["paper, RULER-4K", *(f"{paper.BETA[beta]:.2f}" for beta in betas)])
    sparsity = percent(next(iter(cells.values()))[0]["config"]["sparsity"])
    text = caption(grid, "beta 0 in the same order", f", {sparsity} sparsity")
    return with_source(grid, ["order", *(f"beta {beta:g}" for beta in betas)], rows, text)


def by_order(grid: Record) -> str:
    """The sorting ablation: a row per order, a column per sparsity; the paper's rows last."""
    cells = grouped(grid, "sparsity")
    sparsities = sorted({sparsity for _, sparsity in cells})
    rows = [
        [order, *(beside(cells, (order, sparsity), ("unsorted", sparsity)) for sparsity in sparsities)]
        for order in dict.fromkeys(order for order, _ in cells)
    ]
    rows += [
        [f"paper, RULER-4K, {side}", *(f"{values[sparsity]:.2f}" for sparsity in sparsities)]
        for side, values in paper.SORT.items()
    ]
    return with_source(grid, ["order", *map(percent, sparsities)], rows, caption(grid, "unsorted tokens"))


def by_task(grid: Record) -> str:
    """At half of the blocks: a row per task, a column per setting, dense attention first."""
    settings = settings_of(grid)
    named = [("dense attention", one) for one in dense_records(grid)]
    named += [
        (selection(setting), one)
        for setting in settings
        for one in setting["records"]
        if one["config"] and one["config"]["sparsity"] == HALF
    ]
    header, rows = crossed(
        [{**one, "column": name} for name, one in named],
        ("task",),
        lambda one: (f"`{one['task']}`",),
        lambda one: str(one["column"]),
        score,
    )
    text = f"{named[0][1]['length']} tokens, {percent(HALF)} sparsity. {answers_text(settings[0])}"
    return with_source(grid, header, rows, text)


def dense_records(grid: Record) -> list[Record]:
    """Of dense attention, each task once at every length."""
    return [one for one in settings_of(grid)[0]["records"] if not one["config"]]


def grouped(grid: Record, field: str) -> Cells:
    """Sparse records by order and by a field of their config, unsorted ones first."""
    sparse = [one for setting in settings_of(grid) for one in setting["records"] if one["config"]]
    sparse.sort(key=lambda one: place(one["config"]))
    cells: Cells = {}
    for one in sparse:
        kept = ", first block kept" if one["config"]["keep_first"] else ""
        cells.setdefault((order_name(one["config"]) + kept, one["config"][field]), []).append(one)
    return cells


def place(config: Mapping[str, Any]) -> tuple[bool, str, int]:
    """Of an order in the tables."""
    return config["sort"] != "none", config["sort"], config["segment"] or 0


def beside(cells: Cells, one: tuple[str, float], base: tuple[str, float]) -> str:
    """`87.3 [86.0-88.4]; +6.1 [+4.9, +7.4]`: an average, and its difference to another on the same samples."""
    if one not in cells:
        return MISSING
    if one == base or base not in cells:
        return average(cells[one])
    return f"{average(cells[one])}; {beyond(cells[one], cells[base])}"


def caption(grid: Record, base: str, more: str = "") -> str:
    """What the cells are."""
    dense = dense_records(grid)
    return (
        f"BA-Att's score, every layer sparse; {dense[0]['length']} tokens{more}. "
        f"Average over {len(dense)} tasks; after the semicolon the difference to {base} on the same samples [95 % "
        f"paired bootstrap interval]. Dense attention on them: {average(dense)}. {answers_text(settings_of(grid)[0])}"
    )


def with_source(grid: Record, header: Sequence[str], rows: list[list[str]], text: str) -> str:
    """A table, what its cells are, and how to repeat it."""
    return "\n\n".join([Table(header, rows, text).markdown(), grid_source(grid)])


#: Entries of registry.py.
CASES: dict[str, Case] = {
    "smollm2_grids": Case(
        "RULER's tasks of the diffusion model grown from SmolLM2 with several ways to choose blocks, beside the paper",
        "bash benchmarks/smollm2.sh grids MODEL WORK RESULTS SECONDS",
        (*SMOLLM2_GRIDS, *SMOLLM2_FREE, "ruler_smollm2_orders.json", "ruler_smollm2_betas.json"),
        {
            "smollm2_averages": Block(ruler_tables.grid_averages, (*SMOLLM2_GRIDS, *SMOLLM2_FREE), together=True),
            "smollm2_dense": Block(dense_bars, SMOLLM2_GRIDS, together=True),
            "smollm2_tasks": Block(by_task, SMOLLM2_GRIDS),
            "smollm2_orders": Block(by_order, ("ruler_smollm2_orders.json",)),
            "smollm2_betas": Block(by_beta, ("ruler_smollm2_betas.json",)),
        },
    ),
    "training_smollm2": Case(
        "a diffusion model grown from SmolLM2: history, text, questions, documents, RULER's tasks",
        "bash training/session.sh",
        (*SMOLLM2_RUNS, *SMOLLM2_BARS),
        {
            "smollm2_bars": Block(card_tables.bars, SMOLLM2_BARS, together=True),
            "smollm2_runs": Block(card_tables.runs, SMOLLM2_RUNS, together=True),
            "smollm2_texts": Block(card_tables.texts, SMOLLM2_BARS[:1]),
        },
    ),
}
