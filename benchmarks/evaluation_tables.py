"""From a stored summary of `baatt evaluate ruler` to the Markdown of its tables: task by task, and the averages."""

from pathlib import Path
from typing import Any

from result_tables import Record, by_cell, device_name, provenance, sample_count, table

from baatt.cli.ruler_tables import against_dense, difference, score, setting_name, settings_text, tasks_text


def ruler(record: Record) -> str:
    """Every length: a row per task, a column per setting; then what a sample cost. The averages last."""
    lengths = list(dict.fromkeys(one["length"] for one in record["records"]))
    parts = []
    for length in lengths:
        here = [one for one in record["records"] if one["length"] == length]
        names = settings(here)
        grid = by_cell({"records": here}, lambda one: one["task"], lambda one: setting_name(one["config"]))
        rows = [[f"`{task}`", *(with_difference(row[name]) for name in names)] for task, row in grid.items()]
        rows.append([f"**average of {len(grid)}**", *(average_at(each, length) for each in record["averages"])])
        rows += costs(here, names)
        parts += [f"{length} tokens:", table(["task", *names], rows)]
    return "\n\n".join([*parts, averages_table(record), caption(record), source(record)])


def ruler_averages(record: Record) -> str:
    """The averages alone: a row per setting, a column per length, then RULER's averages over lengths."""
    return "\n\n".join([averages_table(record), caption(record), source(record)])


def settings(records: list[dict[str, Any]]) -> list[str]:
    """Names of the settings, dense attention first."""
    return list(dict.fromkeys(setting_name(one["config"]) for one in records))


def with_difference(one: Record) -> str:
    """Score with its interval; after the semicolon, what differs from dense attention."""
    beside = against_dense(one)
    return f"{score(one)}; {beside}" if beside else score(one)


def average_at(each: Record, length: int) -> str:
    """As `with_difference`, of a setting's average at a length."""
    one = next(one for one in each["by_length"] if one["length"] == length)
    return f"{score(one)}; {difference(one)}" if each["config"] else score(one)


def costs(records: list[dict[str, Any]], names: list[str]) -> list[list[str]]:
    """Rows of what a sample cost, means over tasks."""
    rows = []
    for label, field, form in (
        ("seconds a sample", "seconds_per_answer", "{:.3g}"),
        ("tokens/s", "tokens_per_second", "{:.1f}"),
        ("block pairs skipped", "sparsity_achieved", "{:.1%}"),
    ):
        values = {name: [one[field] for one in records if setting_name(one["config"]) == name] for name in names}
        rows.append([label, *(form.format(sum(found) / len(found)) for found in values.values())])
    return rows


def averages_table(record: Record) -> str:
    """RULER's averages over tasks and, of several lengths, over lengths."""
    lengths = [one["length"] for one in record["averages"][0]["by_length"]]
    over = {"mean": "mean", "rising": "wAvg (inc)", "falling": "wAvg (dec)"} if len(lengths) > 1 else {}
    rows = [
        [
            setting_name(each["config"]),
            *(average_at(each, length) for length in lengths),
            *(f"{100 * each[name]:.1f}" for name in over),
        ]
        for each in record["averages"]
    ]
    return table(["average", *map(str, lengths), *over.values()], rows)


def caption(record: Record) -> str:
    """What a cell is, and on which samples."""
    sources = ", ".join(
        f"{name} {Path(str(value)).name}" for name, value in record["sources"].items() if value is not None
    )
    return (
        f"RULER's score in percent [95 % interval] of {tasks_text(record['averages'])}, {sample_count(record)} samples "
        f"each (seed {record['seed']}; {sources}), `{record['model']}`. After the semicolon: samples lost and won "
        "against dense attention on the same samples with McNemar's exact p, or, where a score may be a share, the "
        f"difference [95 % paired bootstrap interval]. {settings_text(record, record['records']).replace(chr(10), ' ')}"
    )


def source(record: Record) -> str:
    """How to repeat it, with every commit and device that answered."""
    commits = dict.fromkeys(commit for one in record["records"] for commit in one["commits"])
    devices = dict.fromkeys(device for one in record["records"] for device in one["devices"])
    text = provenance(record | {"records": [{"commit": commit} for commit in commits]})
    if len(devices) < 2:
        return text
    return f"{text} Answers of other runs are among them; all devices: {', '.join(map(device_name, devices))}."
