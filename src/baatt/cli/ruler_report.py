"""What `baatt evaluate ruler` shows: a bar while it asks, a table per length, one of RULER's averages, and a picture.

In: records and averages of `lab.ruler.summary`. Scores are printed in percent, as RULER prints them.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from baatt.lab.describe import differences, setting_name
from baatt.lab.ruler.cells import Cell
from baatt.lab.ruler.run import Open, Watch
from baatt.lab.ruler.summary import setting_of
from baatt.lab.ruler.tasks import TASKS
from baatt.lab.tables import MISSING, Table, interval, signed_interval

Record = Mapping[str, Any]
#: With more settings than these a table has a row per setting instead of a column.
COLUMNS = 5


@contextmanager
def answer_bar(places: Open, console: Console, *, shown: bool) -> Iterator[Watch]:
    """How far this process is, and how long the rest takes if a token takes as long as so far; gives what to tell after
    every batch. Without a terminal a line of the same says when a cell begins."""
    cells = {cell: len(numbers) for some in places.values() for cell, numbers in some.items()}
    among, answers = [cell.options for cell in cells], sum(cells.values())
    tokens = sum(cell.length * count for cell, count in cells.items())
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[answers]} answers"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True,
        disable=not shown or not console.is_terminal, speed_estimate_period=3600,
    )  # fmt: skip
    task = bar.add_task("drawing samples", total=tokens, answers=f"0/{answers}")
    done: dict[Cell, int] = {}
    started = time.monotonic()

    def advance(cell: Cell, count: int) -> None:
        begins = cell not in done
        done[cell] = done.get(cell, 0) + count
        place = f"{cell.length} {cell.task} {setting_name(cell.options, among)}"
        text = f"{sum(done.values())}/{answers}"
        bar.update(task, advance=cell.length * count, description=place, answers=text)
        if begins and shown and not console.is_terminal:
            rest = tokens / sum(one.length * number for one, number in done.items()) - 1
            left = timedelta(seconds=round((time.monotonic() - started) * rest))
            console.print(f"{place}: {text} answers, {left} left", highlight=False, soft_wrap=True)

    with bar:
        yield advance


def setting_names(settings: Sequence[Record]) -> list[str]:
    """Names of the settings of a run, `dense`, `50 %`, `qk in 1024, 50 %, cache dual`: what all share is left out.

    Args:
        settings: averages, or records of one task and length.
    """
    configs = [one["config"] for one in settings]
    return [", ".join([setting_name(one["config"], configs), *differences(one, settings)]) for one in settings]


def show_length(header: Record, records: Sequence[Record], averages: Sequence[Record], length: int) -> Table:
    """Tasks by settings, or the other way round where settings are many: score [95 % interval], and how it differs
    from dense attention."""
    here = [one for one in records if one["length"] == length]
    settings = [[one for one in here if setting_of(one) == setting_of(each)] for each in averages]
    rows = {
        task: [beside_dense(one) for found in settings for one in found if one["task"] == task]
        for task in dict.fromkeys(one["task"] for one in here)
    }
    tasks = len(rows)
    averaged = ((each["config"], one) for each in averages for one in each["by_length"])
    mean = [one | {"config": config} for config, one in averaged if one["length"] == length]
    rows[f"average, {tasks_text(averages)}"] = [beside_dense(one) for one in mean]
    rows["whole words only"] = [f"{100 * one['accuracy_whole']:.1f}" for one in mean]
    for label, field, form in (
        ("attention mass kept", "recall_mean", "{:.3f}"), ("seconds a sample", "seconds_per_answer", "{:.3g}"),
        ("tokens/s", "tokens_per_second", "{:.1f}"), ("block pairs skipped", "sparsity_achieved", "{:.1%}"),
    ):  # fmt: skip
        values = [[one[field] for one in found if one.get(field) is not None] for found in settings]
        if any(values):
            rows[label] = [form.format(sum(found) / len(found)) if found else MISSING for found in values]
    names = setting_names(averages)
    columns, lines = ["task", *names], [[label, *cells] for label, cells in rows.items()]
    if wide := len(names) > COLUMNS:
        columns, lines = ["setting", *rows], [list(line) for line in zip(names, *rows.values(), strict=True)]
    return Table(
        columns, lines, parted=None if wide else tasks,
        title=f"RULER at {length} tokens, {header['model']}, samples a task: {here[0]['n']}",
        caption="Score in percent [95 % interval]; below, samples lost and won against dense attention with McNemar's "
        "p, or the difference [95 % interval] where a score is a share. A setting is named by the share of key blocks "
        "that its sparse layers skip; the block pairs skipped are those of all layers, dense ones included. Whole "
        "words only: an answer counts where no further letter or digit stands next to it.",
    )  # fmt: skip


def show_averages(averages: Sequence[Record]) -> Table:
    """RULER's averages: a row per setting, a column per length, then those over lengths."""
    lengths = [str(one["length"]) for one in averages[0]["by_length"]]
    rows = []
    for name, each in zip(setting_names(averages), averages, strict=True):
        values = [*(one["accuracy"] for one in each["by_length"]), each["mean"], each["rising"], each["falling"]]
        rows.append([name, *(f"{100 * value:.1f}" for value in values)])
    columns = ["setting", *lengths, "mean", "wAvg (inc)", "wAvg (dec)"]
    caption = "In percent. wAvg weighs the lengths 1, 2, 3 ...: (inc) from the shortest on, (dec) from the longest on."
    return Table(columns, rows, caption, f"Average, {tasks_text(averages)}")


def tasks_text(averages: Sequence[Record]) -> str:
    """`11 of 13 tasks`: the average of some is not the one that is published."""
    return f"{len(averages[0]['tasks'])} of {len(TASKS)} tasks"


def score(one: Record) -> str:
    """`97.5 [94.3-98.9]`."""
    return interval(one["accuracy"], one["ci_low"], one["ci_high"])


def beside_dense(one: Record) -> str:
    """The score; of sparse attention, below it `3 lost, 1 won, p 0.62` or `-2.5 [-4.0, -1.0]`."""
    return f"{score(one)}\n{against_dense(one)}" if one["config"] else score(one)


def against_dense(one: Record) -> str:
    """`3 lost, 1 won, p 0.62` or `-2.5 [-4.0, -1.0]`."""
    if one.get("mcnemar_p") is not None:
        return f"{one['only_dense_right']} lost, {one['only_sparse_right']} won, p {one['mcnemar_p']:.2g}"
    return difference(one)


def difference(one: Record) -> str:
    """`-2.5 [-4.0, -1.0]`."""
    return signed_interval(one["difference"], one["difference_low"], one["difference_high"])
