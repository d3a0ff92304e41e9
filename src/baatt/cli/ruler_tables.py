"""What `baatt evaluate ruler` shows: a bar while it asks, a table per length, and one of RULER's averages.

In: records and averages of `evaluation.ruler_summary`. Scores are printed in percent, as RULER prints them.
"""

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from baatt.evaluation.ablation import Cell
from baatt.evaluation.ruler_run import Work
from baatt.lab.ruler.tasks import TASKS

Record = Mapping[str, Any]


class AnswerBar:
    """How far this process is, and how long the rest takes if a token takes as long as so far.

    Without a terminal a line of the same says when a cell begins.
    """

    def __init__(self, works: Sequence[Work], console: Console, *, shown: bool) -> None:
        cells = [(cell, len(numbers)) for work in works for cell, numbers in work.cells]
        self._answers, self._tokens = sum(n for _, n in cells), sum(cell.length * n for cell, n in cells)
        self._console, self._lines = console, shown and not console.is_terminal
        self._done = self._done_tokens = 0
        self._cell: Cell | None = None
        self._started = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[answers]} answers"))
        self._bar = Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True,
            disable=not shown or not console.is_terminal, speed_estimate_period=3600,
        )  # fmt: skip
        self._task = self._bar.add_task("drawing samples", total=self._tokens, answers=f"0/{self._answers}")

    def __enter__(self) -> "AnswerBar":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, cell: Cell, count: int) -> None:
        """`count` samples of a cell are answered."""
        self._done += count
        self._done_tokens += cell.length * count
        place, answers = f"{cell.length} {cell.task} {setting_name(cell.dials)}", f"{self._done}/{self._answers}"
        self._bar.update(self._task, advance=cell.length * count, description=place, answers=answers)
        if self._lines and cell != self._cell:
            seconds = time.monotonic() - self._started
            left = timedelta(seconds=round(seconds * (self._tokens / self._done_tokens - 1)))
            self._console.print(f"{place}: {answers} answers, {left} left", highlight=False, soft_wrap=True)
        self._cell = cell


def settings_text(header: Record, records: Sequence[Record]) -> str:
    """How samples are answered, and on a second line what all sparse settings share."""
    sampler = header["sampler"]
    sure = "no threshold" if sampler["threshold"] is None else f"threshold {sampler['threshold']:g}"
    chat = ", chat template" if header["chat"] else ""
    order = sampler.get("remasking", "low_confidence")
    filled = "" if order == "low_confidence" else f"{order.replace('_', ' ')}, "
    text = (
        f"Answers: {sampler['steps']} steps for {sampler['gen_length']} tokens in blocks of {sampler['block_length']}, "
        f"{filled}{sure}, cache {sampler['cache']}, batches of {header['batch_size']}{chat}; weights in "
        f"{header['dtype']}."
    )
    sparse = [one["config"] for one in records if one["config"]]
    if not sparse:
        return text
    dials = sparse[0]
    order = "unsorted" if dials["sort"] == "none" else f"{dials['sort']} sorted in {dials['segment'] or 'one segment'}"
    betas = [f"beta {one['beta']:g}, " for one in sparse if one["score"] == "covariance"]
    layers = ", ".join(map(str, header["dense_layers"])) or "none"
    dials_text = f"{order}, {''.join(betas[:1])}blocks of {dials['block_size']}"
    return f"{text}\nSparse: {dials_text}, layers that stay dense: {layers}."


def show_length(header: Record, records: Sequence[Record], averages: Sequence[Record], length: int) -> Table:
    """A row per task, a column per setting: score [95 % interval], and how it differs from dense attention."""
    here = [one for one in records if one["length"] == length]
    names = list(dict.fromkeys(setting_name(one["config"]) for one in here))
    table = Table(
        "task", title=f"RULER at {length} tokens, {header['model']}, {here[0]['n']} samples a task",
        caption="Score in percent [95 % interval]; below, samples lost and won against dense attention with McNemar's "
        "p, or the difference [95 % interval] where a score is a share.", title_justify="left", caption_justify="left",
    )  # fmt: skip
    for name in names:
        table.add_column(name, justify="right")
    for task in dict.fromkeys(one["task"] for one in here):
        row = {setting_name(one["config"]): one for one in here if one["task"] == task}
        table.add_row(task, *(f"{score(row[name])}\n{against_dense(row[name])}".rstrip() for name in names))
    table.add_section()
    mean = [next(one for one in each["by_length"] if one["length"] == length) for each in averages]
    differences = [difference(one) if each["config"] else "" for one, each in zip(mean, averages, strict=True)]
    table.add_row(
        f"average, {tasks_text(averages)}",
        *(f"{score(one)}\n{beside}".rstrip() for one, beside in zip(mean, differences, strict=True)),
    )
    table.add_row("whole words only", *(f"{100 * one['accuracy_whole']:.1f}" for one in mean))
    by_name = [[one for one in here if setting_name(one["config"]) == name] for name in names]
    for label, field, form in (
        ("seconds a sample", "seconds_per_answer", "{:.3g}"), ("tokens/s", "tokens_per_second", "{:.1f}"),
        ("block pairs skipped", "sparsity_achieved", "{:.1%}"),
    ):  # fmt: skip
        table.add_row(label, *(form.format(sum(one[field] for one in cells) / len(cells)) for cells in by_name))
    return table


def show_averages(averages: Sequence[Record]) -> Table:
    """RULER's averages: a row per setting, a column per length, then those over lengths."""
    lengths = [one["length"] for one in averages[0]["by_length"]]
    table = Table("setting", title=f"Average, {tasks_text(averages)}", title_justify="left")
    for name in (*map(str, lengths), "mean", "wAvg (inc)", "wAvg (dec)"):
        table.add_column(name, justify="right")
    for each in averages:
        values = [*(one["accuracy"] for one in each["by_length"]), each["mean"], each["rising"], each["falling"]]
        table.add_row(setting_name(each["config"]), *(f"{100 * value:.1f}" for value in values))
    return table


def tasks_text(averages: Sequence[Record]) -> str:
    """`11 of 13 tasks`: the average of some is not the one that is published."""
    return f"{len(averages[0]['tasks'])} of {len(TASKS)} tasks"


def score(one: Record) -> str:
    """`97.5 [94.3-98.9]`."""
    return f"{100 * one['accuracy']:.1f} [{100 * one['ci_low']:.1f}-{100 * one['ci_high']:.1f}]"


def against_dense(one: Record) -> str:
    """`3 lost, 1 won, p 0.62` or `-2.5 [-4.0, -1.0]`; nothing for dense attention itself."""
    if not one["config"]:
        return ""
    if one["mcnemar_p"] is None:
        return difference(one)
    return f"{one['only_dense_right']} lost, {one['only_sparse_right']} won, p {one['mcnemar_p']:.2g}"


def difference(one: Record) -> str:
    """`-2.5 [-4.0, -1.0]`."""
    return f"{100 * one['difference']:+.1f} [{100 * one['difference_low']:+.1f}, {100 * one['difference_high']:+.1f}]"


def setting_name(config: Record) -> str:
    """`dense`, `50 %`, `50 % oracle`: what all sparse settings of a run share is left out."""
    if not config:
        return "dense"
    return f"{100 * config['sparsity']:g} %" + ("" if config["score"] == "covariance" else f" {config['score']}")
