"""Tables of results in docs/archive, whose runs no command of today makes: needles and ablations.

`training/evaluate.py` of then stored `accuracy` (contains every value) and `trained_format` (word for word), `baatt
ablate` the lists `right` (contains every value) and `right_whole` (as whole words).
"""

import itertools
import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import paper
from tables import RenderError, Text, block, crossed

from baatt.lab.describe import layers_name, order_name
from baatt.lab.statistics import wilson_interval
from baatt.lab.tables import MISSING, Record, interval, percent


def task_name(one: Record) -> str:
    """In backticks."""
    return f"`{one['task']}`"


def setting(one: Record) -> str:
    """In backticks."""
    return f"`{one['setting']}`"


def accuracy(one: Record) -> str:
    """`97.5 [94.3-98.9]`."""
    return interval(one["accuracy"], one["ci_low"], one["ci_high"])


def share_text(right: int, samples: int) -> str:
    """A share in percent with its Wilson interval."""
    return interval(right / samples, *wilson_interval(right, samples))


def dtype_text(record: Record) -> str:
    """`bfloat16`; older files have `torch.bfloat16`."""
    return str(record["dtype"]).removeprefix("torch.")


def counts_text(record: Record) -> str:
    """`n = 200`, or the range where the cells differ."""
    counts = sorted({one["n"] for one in record["records"]})
    return f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"


def needles_by_length(record: Record) -> str:
    """A row per task, a column per length."""
    caption = (
        f"Share of samples with every value right, in percent [95 % Wilson interval]; {counts_text(record)} samples "
        f"per cell, {', '.join(dict.fromkeys(one['setting'] for one in record['records']))} attention, weights in "
        f"{dtype_text(record)}, held-out words and text. Columns: tokens of prompt and answer budget together."
    )
    records = sorted(record["records"], key=lambda one: int(one["length"]))
    header, rows = crossed(records, ("task",), lambda one: (task_name(one),), lambda one: str(one["length"]), accuracy)
    return block(record, header, rows, caption)


def needles_by_setting(record: Record) -> str:
    """A row per setting and length, a column per task."""
    caption = (
        "Share of samples with every value right, in percent [95 % Wilson interval] and number of samples; weights in "
        f"{dtype_text(record)}, held-out words and text."
    )
    header, rows = crossed(
        record["records"],
        ("setting", "length"),
        lambda one: (setting(one), str(one["length"])),
        task_name,
        lambda one: f"{accuracy(one)} n={one['n']}",
    )
    return block(record, header, rows, caption)


def needles_by_task(record: Record) -> str:
    """At one length: a row per task, a column per setting.

    A run stores its cells one by one, so a cell that is missing is one that the run's time limit came before.
    """
    lengths = {one["length"] for one in record["records"]}
    if len(lengths) > 1:
        raise RenderError(f"a table by task and setting is of one length, got {sorted(lengths)}")
    header, rows = crossed(
        record["records"],
        ("task",),
        lambda one: (task_name(one),),
        setting,
        lambda one: f"{accuracy(one)}; {100 * one['trained_format']:.1f}",
    )
    caption = (
        "Share of samples whose answer contains every value, in percent [95 % Wilson interval]; after the semicolon, "
        f"share of answers that are right word for word. {counts_text(record)} samples per cell (seed "
        f"{record['seed']}), {lengths.pop()} tokens of prompt and answer budget together, weights in "
        f"{dtype_text(record)}, held-out words and text."
    )
    if missing := sum(row.count(MISSING) for row in rows):
        asked = settings_of_command(record["command"])
        skipped = ", ".join(f"`{name}`" for name in asked if f"`{name}`" not in header)
        caption += (
            "\n\n`-`: not measured, the run was cut by its time limit before "
            f"{'this cell' if missing == 1 else 'these cells'}"
            f"{f' and never began with {skipped}' if skipped else ''}."
        )
    return block(record, header, rows, caption)


def needles_totals(record: Record) -> str:
    """All tasks together: a row per setting, answers right by both measures, the task that suffers most."""
    by_setting: dict[str, list[Record]] = {}
    for one in record["records"]:
        by_setting.setdefault(setting(one), []).append(one)
    rows = []
    for name, cells in by_setting.items():
        samples = sum(one["n"] for one in cells)
        counts = [sum(round(one[key] * one["n"]) for one in cells) for key in ("trained_format", "accuracy")]
        least = min(cells, key=lambda one: float(one["trained_format"]))
        shares = (f"{right} of {samples}, {share_text(right, samples)}" for right in counts)
        rows.append([name, *shares, f"{task_name(least)} {100 * least['trained_format']:.1f}"])
    tasks, lengths = ({one[key] for one in record["records"]} for key in ("task", "length"))
    caption = (
        f"Answers right, in percent [95 % Wilson interval], of RULER's {len(tasks)} needle tasks together at "
        f"{', '.join(map(str, lengths))} tokens (seed {record['seed']}), and the task with the fewest right word for "
        f"word. Weights in {dtype_text(record)}, held-out words and text."
    )
    return block(record, ["setting", "word for word", "contains every value", "lowest, word for word"], rows, caption)


def settings_of_command(command: str) -> list[str]:
    """The settings that a call of training/evaluate.py asked for."""
    words = shlex.split(command)
    following = words[words.index("--settings") + 1 :] if "--settings" in words else []
    return list(itertools.takewhile(lambda word: not word.startswith("--"), following))


def finished_tasks(record: Record) -> list[str]:
    """Tasks that have every cell any task has: of a run that was cut, the others are not pooled."""
    cells: dict[str, set[str]] = {}
    for one in record["records"]:
        cells.setdefault(one["task"], set()).add(json.dumps(one["config"]))
    everything = set().union(*cells.values())
    return [task for task, found in cells.items() if found == everything]


def pooled(cells: Iterable[Record], key: Callable[[Record], Any] = lambda one: None) -> list[dict[str, Any]]:
    """Cells of the same key as one, with the answers of all of them."""
    found: dict[Any, dict[str, Any]] = {}
    for one in cells:
        whole = found.setdefault(key(one), {**one, "right": [], "right_whole": []})
        whole["right"] += one["right"]
        whole["right_whole"] += one["right_whole"]
    return list(found.values())


def right(one: Record) -> str:
    """As whole words in percent with its 95 % interval; after the semicolon by RULER's measure."""
    whole = share_text(sum(one["right_whole"]), len(one["right_whole"]))
    return f"{whole}; {100 * sum(one['right']) / len(one['right']):.1f}"


def ablation(
    record: Record,
    columns: dict[str, Text],
    column: Text,
    *,
    by_task: bool = False,
    reported: Callable[[Sequence[Record]], list[list[str]]] = lambda cells: [],
) -> str:
    """A grid: rows by the values of `columns`, cells of the same place pooled over tasks, or task by task.

    Args:
        reported: makes the rows of the paper from the sparse cells.
    """
    tasks = finished_tasks(record)
    chosen = [one for one in record["records"] if by_task or one["task"] in tasks]
    sparse, dense = ([one for one in chosen if bool(one["config"]) is found] for found in (True, False))
    shown = ({"task": task_name} if by_task else {}) | columns

    def row(one: Record) -> tuple[str, ...]:
        return tuple(text(one) for text in shown.values())

    header, rows = crossed(pooled(sparse, lambda one: (row(one), column(one))), list(shown), row, column, right)
    samples = record["count"] * (1 if by_task else len(dense))
    beside = "; ".join(f"{task_name(one)} {right(one)}" for one in dense) if by_task else right(pooled(dense)[0])
    caption = (
        "Answers right as whole words, in percent [95 % Wilson interval]; after the semicolon, those that contain "
        f"every value, RULER's measure. {samples} answers a cell, of {', '.join(map(task_name, dense))}"
        f"{', each' if by_task else ''}, {dense[0]['length']} tokens, seed {record['seed']}, `{record['model']}` in "
        f"{record['dtype']}, layers that stay dense: {layers_name(record['dense_layers'])}. Dense attention on the "
        f"same samples: {beside}. `-`: the run's time ended before."
    )
    return block(record, header, [*rows, *reported(sparse)], caption)


def order(one: Record) -> str:
    """`qk in 1024`."""
    return order_name(one["config"])


def sparsity(one: Record) -> str:
    """`50 %`."""
    return percent(one["config"]["sparsity"])


def by_beta(record: Record, *, by_task: bool = False) -> str:
    """Table 8: a row per order and sparsity, a column per beta; the paper's row last."""

    def reported(cells: Sequence[Record]) -> list[list[str]]:
        betas = dict.fromkeys(one["config"]["beta"] for one in cells)
        return [["paper, RULER-4K", "not stated", *(f"{paper.BETA[beta]:.2f}" for beta in betas)]]

    def column(one: Record) -> str:
        return f"beta {one['config']['beta']:g}"

    columns = {"order": order, "sparsity": sparsity}
    if by_task:
        return ablation(record, columns, column, by_task=True)
    return ablation(record, columns, column, reported=reported)


def by_order(record: Record, *, by_task: bool = False) -> str:
    """The sorting ablation: a row per order, a column per sparsity; the paper's rows last."""

    def reported(cells: Sequence[Record]) -> list[list[str]]:
        sparsities = dict.fromkeys(one["config"]["sparsity"] for one in cells)
        return [
            [f"paper, RULER-4K, {sort}", *(f"{values[share]:.2f}" for share in sparsities)]
            for sort, values in paper.SORT.items()
        ]

    if by_task:
        return ablation(record, {"order": order}, sparsity, by_task=True)
    return ablation(record, {"order": order}, sparsity, reported=reported)


def by_score(record: Record) -> str:
    """Scores at equal budgets: a row per score, a column per order and sparsity."""
    return ablation(
        record, {"score": lambda one: str(one["config"]["score"])}, lambda one: f"{order(one)}, {sparsity(one)}"
    )
