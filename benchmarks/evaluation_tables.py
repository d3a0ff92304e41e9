"""From stored results of RULER to the Markdown of their tables.

A summary of `baatt evaluate ruler` becomes a table by length; a grid of `ruler_grid.py` becomes averages by setting and
tables by task, length by length.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from result_tables import Record, by_cell, device_name, provenance, sample_count, table
from ruler_grid import SETTINGS

from baatt.cli.ruler_tables import difference, score, settings_text, tasks_text

#: Scores under the names that the papers give them.
SCORES = {
    "covariance": "BA-Att",
    "covariance-16": "BA-Att's score of runs of 16",
    "mean": "block means",
    "antidiagonal-8": "antidiagonal-8 (XAttention's)",
}

#: The sparsity of the short table.
HALF = 0.5


def by_length(record: Record) -> str:
    """One setting: a row per task, a column per length, the averages last."""
    each = record["averages"][0]
    lengths = [one["length"] for one in each["by_length"]]
    grid = by_cell(record, lambda one: one["task"], lambda one: one["length"])
    rows = [[f"`{task}`", *(score(row[length]) for length in lengths)] for task, row in grid.items()]
    rows.append([f"**average of {len(grid)}**", *map(score, each["by_length"])])
    return "\n\n".join([table(["task", *map(str, lengths)], rows), caption(record), source(record)])


def grid_averages(grid: Record) -> str:
    """Every length: a row per setting, a column per sparsity, with the difference to dense attention."""
    parts = []
    for length in lengths_of(grid):
        rows, dense = [], ""
        for setting in settings_of(grid):
            averages = {
                each["config"].get("sparsity", 0): one
                for each in setting["averages"]
                for one in each["by_length"]
                if one["length"] == length
            }
            if averages:
                dense = score(averages.pop(0))
                cells = {sparsity: f"{score(one)}; {difference(one)}" for sparsity, one in averages.items()}
                rows.append([describe(setting), *cells.values()])
                header = ["selection", *(f"{100 * sparsity:g} %" for sparsity in cells)]
        parts += [f"{length} tokens; dense attention: {dense}", table(header, rows)]
    return "\n\n".join([*parts, averages_text(grid), grid_source(grid)])


def half_by_length(grids: Sequence[Record]) -> str:
    """Several grids at sparsity 50 %: a row per setting, dense attention first; a column per length."""
    rows: dict[str, dict[int, str]] = {"dense attention": {}}
    skipped: dict[str, list[float]] = {}
    for setting in (setting for grid in grids for setting in settings_of(grid)):
        for each in setting["averages"]:
            if each["config"] and each["config"]["sparsity"] != HALF:
                continue
            name = describe(setting) if each["config"] else "dense attention"
            for one in each["by_length"]:
                text = f"{score(one)}; {difference(one)}" if each["config"] else score(one)
                rows.setdefault(name, {})[one["length"]] = text
            found = (one["sparsity_achieved"] for one in setting["records"] if one["config"] == each["config"])
            skipped.setdefault(name, []).extend(found)
    lengths = sorted(rows["dense attention"])
    cells = [
        [name, f"{sum(skipped[name]) / len(skipped[name]):.0%}", *(row.get(length, "incomplete") for length in lengths)]
        for name, row in rows.items()
    ]
    header = [f"sparsity {HALF:.0%}", "block pairs skipped", *(f"{length} tokens" for length in lengths)]
    text = f"Block pairs skipped: of all layers, mean over lengths and tasks. {averages_text(grids[0])}"
    return "\n\n".join([table(header, cells), text, *map(grid_source, grids)])


def grid_tasks(grid: Record) -> str:
    """Every length and setting: a row per task, a column per sparsity, dense attention first."""
    parts = []
    for length in lengths_of(grid):
        for setting in settings_of(grid):
            here = [one for one in setting["records"] if one["length"] == length]
            if not here:
                continue
            rows = by_cell({"records": here}, lambda one: one["task"], lambda one: one["config"].get("sparsity", 0))
            columns = ["dense" if sparsity == 0 else f"{100 * sparsity:g} %" for sparsity in next(iter(rows.values()))]
            cells = [[f"`{task}`", *map(score, row.values())] for task, row in rows.items()]
            parts += [f"{describe(setting)}, {length} tokens:", table(["task", *columns], [*cells, *costs(here)])]
    return "\n\n".join([*parts, caption(first_setting(grid)), grid_source(grid)])


def averages_text(grid: Record) -> str:
    """What a cell of averages is."""
    first = first_setting(grid)
    return (
        f"Average over {tasks_text(first['averages'])}. After the semicolon: the difference to dense attention [95 % "
        f"paired bootstrap interval]. {caption(first)}"
    )


def first_setting(grid: Record) -> Record:
    """All settings of a grid have the same samples and sampler."""
    return settings_of(grid)[0]


def settings_of(grid: Record) -> list[Record]:
    """The settings of a grid, in one order whichever was asked first."""
    return [grid["settings"][name] for name in SETTINGS if name in grid["settings"]]


def lengths_of(grid: Record) -> list[int]:
    return sorted({one["length"] for setting in settings_of(grid) for one in setting["records"]})


def describe(setting: Record) -> str:
    """Score, order and dense layers of a setting."""
    dials: dict[str, Any] = next(one["config"] for one in setting["records"] if one["config"])
    order = "unsorted" if dials["sort"] == "none" else f"{dials['sort']} in {dials['segment']}"
    layers = " and ".join(map(str, setting["dense_layers"]))
    dense = f", layer{'s' if ' ' in layers else ''} {layers} dense" if layers else ""
    return f"{SCORES.get(dials['score'], dials['score'])}, {order}{dense}"


def costs(records: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of what a sample cost, means over tasks."""
    rows = []
    for label, field, form in (
        ("seconds a sample", "seconds_per_answer", "{:.3g}"),
        ("block pairs skipped", "sparsity_achieved", "{:.1%}"),
    ):
        values: dict[float, list[float]] = {}
        for one in records:
            values.setdefault(one["config"].get("sparsity", 0), []).append(one[field])
        rows.append([label, *(form.format(sum(found) / len(found)) for found in values.values())])
    return rows


def caption(record: Record) -> str:
    """What a cell is, and on which samples."""
    sources = ", ".join(
        f"{name} {Path(str(value)).name}" for name, value in record["sources"].items() if value is not None
    )
    dense = [one for one in record["records"] if not one["config"]]
    return (
        f"RULER's score in percent [95 % interval], {sample_count(record)} samples of each task (seed "
        f"{record['seed']}; {sources}), `{record['model']}`. {settings_text(record, dense)}"
    )


def grid_source(grid: Record) -> str:
    """As `source`, of all settings."""
    records = [one for setting in settings_of(grid) for one in setting["records"]]
    return source({**grid, "records": records})


def source(record: Record) -> str:
    """How to repeat it, with every commit and device that answered."""
    commits = dict.fromkeys(commit for one in record["records"] for commit in one["commits"])
    devices = dict.fromkeys(device_name(device) for one in record["records"] for device in one["devices"])
    text = provenance({**record, "records": [{"commit": commit} for commit in commits]})
    own = device_name(record["device"])
    if own not in devices:
        return f"{text} This run counted answers that were there; they were given on: {', '.join(devices)}."
    if len(devices) < 2:
        return text
    return f"{text} Answers of other runs are among them; all devices: {', '.join(devices)}."
