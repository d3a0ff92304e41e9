"""Tables of RULER: a summary of `baatt evaluate ruler` by length, and grids of ruler_grid.py by setting and by task."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import ruler_grid
from tables import crossed, device_text, source, verdict

from baatt.cli.ruler_report import difference, score, tasks_text
from baatt.lab.describe import selection_name, settings_text
from baatt.lab.statistics import average_interval, bootstrap_interval
from baatt.lab.tables import MISSING, Record, Table, interval, percent, signed_interval

#: Settings of a grid in the order of its tables, whichever was asked first.
ORDER = (
    *("paper", "clusters", "keep-first-0", "budget-head", "safe", "keys", "unsorted", "unsorted-first", "mean"),
    *("antidiagonal", "antidiagonal-first", "finer", "oracle", "oracle-peak"),
    *ruler_grid.ORDERS, *ruler_grid.BETAS,
)  # fmt: skip
#: Results of all tasks; one file holds some settings at some lengths.
GRIDS = (
    *("ruler_grid_4096.json", "ruler_grid_long.json", "ruler_grid_finer_8192.json"),
    *("ruler_clusters.json", "ruler_clusters_16384.json", "ruler_first_4096.json", "ruler_first_8192.json"),
    *("ruler_free.json", "ruler_options_8192.json"),
)
#: Asked of clusters: tokens, sparsity, points lost against dense attention.
BARS = ((4096, 0.5, 1.0), (4096, 0.7, 2.0), (8192, 0.9, 2.5), (16384, 0.9, 3.5))
#: The sparsity of the short table.
HALF = 0.5


def score_and_difference(one: Record) -> str:
    """`97.5 [94.3-98.9]; -2.5 [-4.0, -1.0]`: the score, and its difference to dense attention."""
    return f"{score(one)}; {difference(one)}"


def by_length(record: Record) -> str:
    """One setting: a row per task, a column per length, the averages last."""
    header, rows = crossed(
        record["records"], ("task",), lambda one: (f"`{one['task']}`",), lambda one: str(one["length"]), score
    )
    rows.append([f"**average of {len(rows)}**", *map(score, record["averages"][0]["by_length"])])
    return "\n\n".join([Table(header, rows, answers_text(record)).markdown(), answers_source(record)])


def grid_averages(grids: Sequence[Record]) -> str:
    """Several grids by length: a row per setting, a column per sparsity, with the difference to dense attention."""
    averages = averages_of(grids)
    parts = []
    for length in sorted({one["length"] for one in averages}):
        here = [one for one in averages if one["length"] == length]
        dense = max((one for one in here if not one["config"]), key=lambda one: int(one["n"]))
        header, rows = crossed(
            [one for one in here if one["config"]],
            ("selection", "n"),
            lambda one: (one["selection"], str(one["n"])),
            lambda one: percent(one["config"]["sparsity"]),
            score_and_difference,
        )
        parts += [
            f"{length} tokens; dense attention: {score(dense)}, n = {dense['n']}",
            Table(header, rows).markdown(),
        ]
    return "\n\n".join([*parts, averages_text(grids), *map(grid_source, grids)])


def bars_of_clusters(grids: Sequence[Record]) -> str:
    """What was asked of clusters beforehand, and what they lose."""
    found = {
        (one["length"], one["config"]["sparsity"]): one
        for one in averages_of(grids)
        if one["setting"] == "clusters" and one["config"]
    }
    rows = []
    for length, sparsity, most in BARS:
        one = found.get((length, sparsity))
        cells = (
            [f"{difference(one)}, n = {one['n']}", verdict(-100 * one["difference"] <= most)] if one else [MISSING] * 2
        )
        rows.append([str(length), percent(sparsity), f"-{most:g}", *cells])
    return Table(("tokens", "sparsity", "at most", "difference to dense", ""), rows).markdown()


def half_by_length(grids: Sequence[Record]) -> str:
    """Several grids at sparsity 50 %: a row per setting, dense attention first; a column per length."""
    averages = [one for one in averages_of(grids) if not one["config"] or one["config"]["sparsity"] == HALF]
    most = max(one["n"] for one in averages)
    rows: dict[str, dict[int, str]] = {"dense attention": {}}
    skipped: dict[str, list[float]] = {}
    for one in averages:
        name, text = (one["selection"], score_and_difference) if one["config"] else ("dense attention", score)
        fewer = "" if one["n"] == most else f"; n = {one['n']}"
        if one["config"] or not fewer:
            rows.setdefault(name, {})[one["length"]] = text(one) + fewer
            skipped.setdefault(name, []).append(one["skipped"])
    lengths = sorted(rows["dense attention"])
    cells = [
        [name, percent(mean(skipped[name]), 0), *(row.get(length, "incomplete") for length in lengths)]
        for name, row in rows.items()
    ]
    header = [f"sparsity {percent(HALF)}", "block pairs skipped", *(f"{length} tokens" for length in lengths)]
    caption = f"Block pairs skipped: of all layers, mean over lengths and tasks. {averages_text(grids)}"
    return "\n\n".join([Table(header, cells, caption).markdown(), *map(grid_source, grids)])


def grid_tasks(grid: Record) -> str:
    """Every length and setting: a row per task, a column per sparsity, dense attention first."""
    parts = []
    lengths = sorted({one["length"] for setting in settings_of(grid) for one in setting["records"]})
    for length, setting in itertools.product(lengths, settings_of(grid)):
        if here := [one for one in setting["records"] if one["length"] == length]:
            header, rows = crossed(here, ("task",), lambda one: (f"`{one['task']}`",), sparsity_name, score)
            table = Table(header, [*rows, *costs(here)])
            parts += [f"{selection(setting)}, {length} tokens:", table.markdown()]
    return "\n\n".join([*parts, answers_text(settings_of(grid)[0]), grid_source(grid)])


def ablations(grid: Record) -> str:
    """One length and sparsity: a row per setting, dense attention and the unchanged one first, a column per task."""
    usual, *others = grid["settings"].values()
    dense, base = ([one for one in usual["records"] if bool(one["config"]) == sparse] for sparse in (False, True))
    named = [("dense attention", dense), (f"**{selection(usual)}**", base)]
    named += [(selection(one), [each for each in one["records"] if each["config"]]) for one in others]
    rows = []
    for name, records in named:
        beside = "" if records is base else f"; {beyond(records, base)}"
        rows.append([name, *map(score, records), average(records) + beside])
    first = base[0]
    caption = (
        f"{first['length']} tokens, {percent(first['config']['sparsity'])} sparsity, every layer sparse. After the "
        "semicolon: the difference to the row in bold on the same samples [95 % paired bootstrap interval]. "
        f"{answers_text(usual)}"
    )
    header = ["selection", *(f"`{one['task']}`" for one in base), "average"]
    every = [one for setting in grid["settings"].values() for one in setting["records"]]
    return "\n\n".join([Table(header, rows, caption).markdown(), answers_source({**grid, "records": every})])


def average(records: Sequence[Record]) -> str:
    """`97.1 [96.5-97.4]`: of the means over samples, of one setting at one length and sparsity."""
    limits = average_interval([(one["accuracy"], one["ci_low"], one["ci_high"]) for one in records])
    return interval(mean(one["accuracy"] for one in records), *limits)


def beyond(records: Sequence[Record], base: Sequence[Record]) -> str:
    """`-2.5 [-4.0, -1.0]`: of the means over tasks, sample by sample."""
    one, other = (
        [mean(sample) for sample in zip(*(each["scores"] for each in some), strict=True)] for some in (records, base)
    )
    differences = [here - there for here, there in zip(one, other, strict=True)]
    return signed_interval(mean(differences), *bootstrap_interval(differences))


def costs(records: Sequence[Record]) -> list[list[str]]:
    """Rows of what a sample cost, means over tasks."""
    columns: dict[str, list[Record]] = {}
    for one in records:
        columns.setdefault(sparsity_name(one), []).append(one)
    seconds, skipped = (
        [mean([one[field] for one in column]) for column in columns.values()]
        for field in ("seconds_per_answer", "sparsity_achieved")
    )
    return [
        ["seconds a sample", *(f"{value:.3g}" for value in seconds)],
        ["block pairs skipped", *(percent(value, 1) for value in skipped)],
    ]


def sparsity_name(one: Record) -> str:
    """`dense`, `50 %`."""
    return percent(one["config"]["sparsity"]) if one["config"] else "dense"


def settings_of(grid: Record) -> list[Record]:
    """The settings of a grid in the order of the tables."""
    return [grid["settings"][name] for name in ORDER if name in grid["settings"]]


def selection(setting: Record) -> str:
    """How a setting of a grid selects blocks."""
    config = next(one["config"] for one in setting["records"] if one["config"])
    return selection_name(config, setting["dense_layers"])


def averages_of(grids: Sequence[Record]) -> list[dict[str, Any]]:
    """RULER's averages of all settings and lengths in the order of the tables, each with the name of its setting, the
    words for its selection, its config, and over its tasks the samples of one and the block pairs skipped."""
    found = []
    for name, grid in ((name, grid) for name in ORDER for grid in grids if name in grid["settings"]):
        setting = grid["settings"][name]
        for config, one in ((each["config"], one) for each in setting["averages"] for one in each["by_length"]):
            here = [each for each in setting["records"] if (each["length"], each["config"]) == (one["length"], config)]
            about = {"setting": name, "selection": selection(setting), "config": config, "n": here[0]["n"]}
            found.append({**one, **about, "skipped": mean(each["sparsity_achieved"] for each in here)})
    return found


def averages_text(grids: Sequence[Record]) -> str:
    """What a cell of averages is."""
    settings = [setting for grid in grids for setting in settings_of(grid)]
    every = {**settings[0], "records": [one for setting in settings for one in setting["records"]]}
    return (
        f"Average over {tasks_text(settings[0]['averages'])}. After the semicolon: the difference to dense attention "
        f"on the same samples [95 % paired bootstrap interval]. {answers_text(every)}"
    )


def answers_text(record: Record) -> str:
    """What a cell is, and on which samples."""
    sources = ", ".join(
        f"{name} {Path(str(value)).name}" for name, value in record["sources"].items() if value is not None
    )
    dense = [one for one in record["records"] if not one["config"]]
    counts = " to ".join(map(str, sorted({one["n"] for one in record["records"]})))
    return (
        f"RULER's score in percent [95 % interval], n = {counts} samples of each task (seed {record['seed']}; "
        f"{sources}), `{record['model']}`. {settings_text(record, dense)}"
    )


def grid_source(grid: Record) -> str:
    """As `answers_source`, of all settings."""
    return answers_source({**grid, "records": [one for each in settings_of(grid) for one in each["records"]]})


def answers_source(record: Record) -> str:
    """How to repeat it, with every commit and device that answered."""
    commits = dict.fromkeys(commit for one in record["records"] for commit in one["commits"])
    devices = dict.fromkeys(device_text(device) for one in record["records"] for device in one["devices"])
    text = source({**record, "records": [{"commit": commit} for commit in commits]})
    if device_text(record["device"]) not in devices:
        return f"{text} This run counted answers that were there; they were given on: {', '.join(devices)}."
    if len(devices) < 2:
        return text
    return f"{text} Answers of other runs are among them; all devices: {', '.join(devices)}."
