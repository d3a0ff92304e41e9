"""From a stored result to the Markdown of its table: one function per kind of result, each for `render.py`."""

import itertools
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from baatt.lab.statistics import wilson_interval

GPU_BASELINES = ("cudnn", "flash", "flex")

Record = Mapping[str, Any]


class RenderError(Exception):
    """A block that cannot be rendered: unknown, not closed, or without its result."""


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, first column left, the others right."""
    header = list(header)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def provenance(record: Record) -> str:
    """The lines below every table: command, commit, device and versions of the run."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    commits = dict.fromkeys(one["commit"] for one in [record, *record["records"]] if "commit" in one)
    return (
        f"Command: `{record['command']}`  \n"
        f"Commit {', '.join(map(commit_name, commits))}, device {device_name(record['device'])}, {versions}."
    )


def commit_name(commit: str | None) -> str:
    """First ten characters; a mark such as `+changes` or `-dirty` stays."""
    if commit is None:
        return "unknown"
    base = re.split(r"[+-]", commit, maxsplit=1)[0]
    return base[:10] + commit[len(base) :]


def device_name(device: Any) -> str:
    """A device as one phrase; some records hold a table of its properties."""
    if isinstance(device, Mapping):
        return ", ".join(f"{name} {value}" for name, value in device.items())
    return str(device)


def cell(one: Record, *, samples: bool) -> str:
    """Accuracy in percent with its 95 % Wilson interval."""
    text = f"{100 * one['accuracy']:.1f} [{100 * one['ci_low']:.1f}-{100 * one['ci_high']:.1f}]"
    return f"{text} n={one['n']}" if samples else text


def cell_with_exact_text(one: Record) -> str:
    """As `cell`, and the share of answers that equal the expected text.

    RULER's measure looks for a value anywhere in the answer: it finds 123 in 1123.
    """
    return f"{cell(one, samples=False)}; {100 * one['trained_format']:.1f}"


def by_cell(
    record: Record, row: Callable[[Record], Any], column: Callable[[Record], Any]
) -> dict[Any, dict[Any, Record]]:
    """The measurements of a record as rows of columns, in the order in which they were made."""
    grid: dict[Any, dict[Any, Record]] = {}
    for one in record["records"]:
        if column(one) in grid.setdefault(row(one), {}):
            raise RenderError(f"two measurements for {row(one)}, {column(one)}")
        grid[row(one)][column(one)] = one
    return grid


def sample_count(record: Record) -> str:
    """`n = 200`, or the range where the cells differ."""
    counts = sorted({one["n"] for one in record["records"]})
    return f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"


def dtype_name(record: Record) -> str:
    """`bfloat16`."""
    return str(record["dtype"]).removeprefix("torch.")


def accuracy_by_length(record: Record) -> str:
    """Needle accuracy: a row per task, a column per length."""
    grid = by_cell(record, lambda one: one["task"], lambda one: one["length"])
    lengths = sorted({length for row in grid.values() for length in row})
    rows = [
        [f"`{task}`", *(cell(row[length], samples=False) if length in row else "-" for length in lengths)]
        for task, row in grid.items()
    ]
    settings = ", ".join(dict.fromkeys(one["setting"] for one in record["records"]))
    caption = (
        f"Share of samples with every value right, in percent [95 % Wilson interval]; {sample_count(record)} samples "
        f"per cell, {settings} attention, weights in {dtype_name(record)}, held-out words and text. Columns: tokens of "
        "prompt and answer budget together."
    )
    return "\n\n".join([table(["task", *map(str, lengths)], rows), caption, provenance(record)])


def accuracy_by_setting(record: Record) -> str:
    """Needle accuracy: a row per setting and length, a column per task."""
    grid = by_cell(record, lambda one: (one["setting"], one["length"]), lambda one: one["task"])
    tasks = list(dict.fromkeys(one["task"] for one in record["records"]))
    rows = [
        [f"`{setting}`", str(length), *(cell(row[task], samples=True) if task in row else "-" for task in tasks)]
        for (setting, length), row in grid.items()
    ]
    caption = (
        "Share of samples with every value right, in percent [95 % Wilson interval] and number of samples; weights in "
        f"{dtype_name(record)}, held-out words and text."
    )
    return "\n\n".join(
        [table(["setting", "length", *(f"`{task}`" for task in tasks)], rows), caption, provenance(record)]
    )


def accuracy_by_task(record: Record) -> str:
    """Needle accuracy at one length: a row per task, a column per setting.

    A run stores its cells one by one, so a cell that is missing is one that the run's time limit came before.
    """
    lengths = {one["length"] for one in record["records"]}
    if len(lengths) > 1:
        raise RenderError(f"a table by task and setting is of one length, got {sorted(lengths)}")
    grid = by_cell(record, lambda one: one["task"], lambda one: one["setting"])
    settings = list(dict.fromkeys(one["setting"] for one in record["records"]))
    rows = [
        [f"`{task}`", *(cell_with_exact_text(row[name]) if name in row else "-" for name in settings)]
        for task, row in grid.items()
    ]
    caption = (
        "Share of samples whose answer contains every value, in percent [95 % Wilson interval]; after the semicolon, "
        f"share of answers that are right word for word. {sample_count(record)} samples per cell (seed "
        f"{record['seed']}), {lengths.pop()} tokens of prompt and answer budget together, weights in "
        f"{dtype_name(record)}, held-out words and text."
    )
    parts = [table(["task", *(f"`{name}`" for name in settings)], rows), caption]
    missing = sum(line.count("-") for line in rows)
    skipped = ", ".join(f"`{name}`" for name in settings_of_command(record["command"]) if name not in settings)
    if missing:
        parts.append(
            "`-`: not measured, the run was cut by its time limit before "
            f"{'this cell' if missing == 1 else 'these cells'}"
            f"{f' and never began with {skipped}' if skipped else ''}."
        )
    return "\n\n".join([*parts, provenance(record)])


def accuracy_totals(record: Record) -> str:
    """Needle accuracy over all tasks: a row per setting, answers right by both measures, the task that suffers most."""
    by_setting = by_cell(record, lambda one: one["setting"], lambda one: one["task"])
    rows = []
    for setting, tasks in by_setting.items():
        samples = sum(one["n"] for one in tasks.values())
        shares = []
        for key in ("trained_format", "accuracy"):
            right = sum(round(one[key] * one["n"]) for one in tasks.values())
            low, high = wilson_interval(right, samples)
            shares.append(f"{right} of {samples}, {100 * right / samples:.1f} [{100 * low:.1f}-{100 * high:.1f}]")
        worst, least = min(tasks.items(), key=lambda item: float(item[1]["trained_format"]))
        rows.append([f"`{setting}`", *shares, f"`{worst}` {100 * least['trained_format']:.1f}"])
    tasks, lengths = ({one[key] for one in record["records"]} for key in ("task", "length"))
    caption = (
        "Answers right, in percent [95 % Wilson interval], of RULER's "
        f"{len(tasks)} needle tasks together at {', '.join(map(str, lengths))} tokens (seed {record['seed']}), and the "
        f"task with the fewest right word for word. Weights in {dtype_name(record)}, held-out words and text."
    )
    header = ["setting", "word for word", "contains every value", "lowest, word for word"]
    return "\n\n".join([table(header, rows), caption, provenance(record)])


def short_queries(record: Record) -> str:
    """Speed-up of calls with few queries: a row per number of queries, a column per number of keys."""
    grid = by_cell(record, lambda one: one["queries"], lambda one: one["keys"])
    columns = list(dict.fromkeys(one["keys"] for one in record["records"]))
    rows = [[str(n), *(f"{row[m]['speedup']:.2f}x" if m in row else "-" for m in columns)] for n, row in grid.items()]
    sparsity = 100 * record["records"][0]["sparsity"]
    caption = (
        "Time of dense attention over that of the operator with the paper's dials, selection included, at "
        f"{sparsity:g} % sparsity: "
        f"{record['heads']} heads of {record['channels']}, {record['dtype']}, as CUDA graphs."
    )
    return "\n\n".join(
        [table(["queries", *(f"{m // 1024}K keys" for m in columns)], rows), caption, provenance(record)]
    )


def compatibility(record: Record) -> str:
    """Tests of the integrations by library version: a row per test file, a column per environment."""
    names = [one["environment"] for one in record["records"]]
    files = list(dict.fromkeys(name for one in record["records"] for name in one["files"]))

    def outcome(one: Record, name: str) -> str:
        if name not in one["files"]:
            return "-"
        row = one["files"][name]
        skipped = f", {row['skipped']} skipped" if row["skipped"] else ""
        return f"{row['passed']} passed{skipped}" + (f", **{row['failed']} failed**" if row["failed"] else "")

    rows = [[f"`{name}.py`", *(outcome(one, name) for one in record["records"])] for name in files]
    libraries = [
        [name, *(f"{one['libraries'][name]}" for one in record["records"])]
        for name in record["records"][0]["libraries"]
    ]
    caption = "Tests are skipped where a version lacks the model or the feature they are about. `-`: not run there."
    return "\n\n".join([table(["", *names], [*libraries, *rows]), caption, provenance(record)])


def settings_of_command(command: str) -> list[str]:
    """The settings that a call of training/evaluate.py asked for."""
    words = shlex.split(command)
    following = words[words.index("--settings") + 1 :] if "--settings" in words else []
    return list(itertools.takewhile(lambda word: not word.startswith("--"), following))


def cpu_operator(record: Record) -> str:
    """Time and memory of the operator on the CPU, a row per sparsity."""
    rows = [
        [
            f"{100 * one['sparsity']:g} %",
            f"{one['total_ms']:.1f}",
            f"{one['dense_ms']:.1f}",
            f"{one['speedup']:.2f}x",
            f"{one['extra_memory_ratio']:.2f}x",
            f"{one['error']:.1e}",
        ]
        for one in record["records"]
    ]
    header = ("sparsity", "BA-Att, ms", "dense, ms", "speed-up", "extra memory / inputs", "error")
    caption = f"Tokens sorted: {order_name(record['records'][0]['config'])}."
    return "\n\n".join([table(header, rows), caption, provenance(record)])


def length_name(one: Record) -> str:
    """`32K`, `1M`."""
    tokens = one["shape"][2]
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return str(tokens)


def sizes_name(one: Record) -> str:
    """All that matters but length and dials: `B 1, H 32, D 128, bfloat16`."""
    batch, heads, _, channels = one["shape"]
    grouped = "" if one["groups"] == heads else f", G {one['groups']}"
    return f"B {batch}, H {heads}{grouped}, D {channels}, {one['dtype']}, `{one['impl']}`"


def gpu_operator(record: Record) -> str:
    """The operator on a GPU against dense and block-sparse attention, a row per length and sparsity."""
    chosen = [one for one in record["records"] if one["what"] == "operator"]
    if not chosen:
        raise RenderError("no record is of the operator")
    usual = sizes_name(chosen[0])
    rows = [
        [
            length_name(one) + ("" if sizes_name(one) == usual else f" ({sizes_name(one)})"),
            f"{100 * one['sparsity']:g} %",
            f"{one['total_ms']:.3g}",
            f"{100 * one['selection_share']:.0f} %",
            *(f"{one['speedup'][name]:.2f}x" if name in one["speedup"] else "-" for name in GPU_BASELINES),
            "-" if one["peak_memory_bytes"] is None else f"{one['peak_memory_bytes'] / 2**30:.2f} GiB",
            f"{one['error']:.1e} ({one['error_limit']:.1e})",
        ]
        for one in chosen
    ]
    header = ("length", "sparsity", "ms", "not attention", *(f"over {name}" for name in GPU_BASELINES))
    refused = dict.fromkeys(f"{name}: {reason}" for one in chosen for name, reason in one["refused"].items())
    caption = (
        f"{usual}, tokens sorted: {order_name(chosen[0]['config'])}. Time of the whole call, selection "
        "included; share of it that is not attention; speed-up over dense attention of cuDNN and FlashAttention and "
        "over compiled FlexAttention, which gets our block lists and sorted tokens ready-made; memory beyond q, k "
        "and v; relative L2 error against float64 with the same mask, and its limit."
        + (f" Not run: {'; '.join(refused)}." if refused else "")
    )
    return "\n\n".join([table([*header, "extra memory", "error (limit)"], rows), caption, provenance(record)])


def gpu_compensation(record: Record) -> str:
    """By how much the operator is slower than with beta 0, a row per length and sparsity."""
    chosen = [one for one in record["records"] if one["what"] == "operator"]
    rows = [
        [
            length_name(one),
            str(one["shape"][1]),
            f"{100 * one['sparsity']:g} %",
            f"{100 * one['compensation_cost']:+.1f} %",
        ]
        for one in chosen
    ]
    return "\n\n".join([table(("length", "H", "sparsity", "slower by"), rows), provenance(record)])


def gpu_kernel(record: Record) -> str:
    """The attention kernel alone on random lists, a row per length, sparsity and D."""
    chosen = [one for one in record["records"] if one["what"] == "kernel"]
    if not chosen:
        raise RenderError("no record is of the kernel")
    peak = record["matrix_peak_tflops"]
    rows = [
        [
            length_name(one),
            f"{100 * one['sparsity']:g} %",
            str(one["shape"][3]),
            f"{one['kept_tflops']:.0f}",
            f"{100 * one['kept_tflops'] / peak:.0f} %",
        ]
        for one in chosen
    ]
    batch, heads = chosen[0]["shape"][:2]
    caption = (
        f"B {batch}, H {heads}, {chosen[0]['dtype']}, `{chosen[0]['impl']}`, random lists; operations of kept pairs. "
        f"The peak is {peak:.0f} TFLOP/s, a large {record['matrix_peak_dtype']} matrix product in the same run."
    )
    header = ("length", "sparsity", "D", "TFLOP/s", "of the peak")
    return "\n\n".join([table(header, rows), caption, provenance(record)])


def order_name(one: Record) -> str:
    """`unsorted`, `qk in 1024`."""
    return "unsorted" if one["sort"] == "none" else f"{one['sort']} in {one['segment'] or 'one segment'}"


def study_source(record: Record) -> str:
    """What a study of `baatt analyze` was made on, and how to repeat it."""
    about = record["about"]
    made = f"`{about['model']}`, {about['tokens']} tokens of {about['text']}, weights in {about['dtype']}, all heads"
    first = "the file comes from `baatt analyze capture --output needle-18m.safetensors`"
    return f"On {made}; {first}.\n\n{provenance(record)}"


def recall_by_score(record: Record) -> str:
    """Attention mass kept: a row per order and sparsity, a column per score."""
    whole = [one for one in record["records"] if one["layer"] is None]
    scores = list(dict.fromkeys(one["score"] for one in whole))
    rows = [
        [*key, *(f"{row[score]['recall_mean']:.3f} ({row[score]['recall_p5']:.3f})" for score in scores)]
        for key, row in by_cell(
            {"records": whole}, lambda one: (order_name(one), f"{100 * one['sparsity']:g} %"), lambda one: one["score"]
        ).items()
    ]
    caption = (
        "Share of the attention mass in the kept blocks: mean (5th percentile) over layers, heads and query blocks."
    )
    return "\n\n".join([table(["order", "sparsity", *scores], rows), caption, study_source(record)])


def recall_by_beta(record: Record) -> str:
    """Attention mass kept by the covariance score: a row per order and sparsity, a column per beta."""
    whole = [one for one in record["records"] if one["layer"] is None]
    betas = list(dict.fromkeys(one["beta"] for one in whole))
    cells = by_cell(
        {"records": whole}, lambda one: (order_name(one), f"{100 * one['sparsity']:g} %"), lambda one: one["beta"]
    )
    rows = [[*key, *(f"{row[beta]['recall_mean']:.4f}" for beta in betas)] for key, row in cells.items()]
    header = ["order", "sparsity", *(f"beta {beta:g}" for beta in betas)]
    return "\n\n".join([table(header, rows), "Mean share of the attention mass kept.", study_source(record)])


def bound_by_layer(record: Record) -> str:
    """Pearson's R of the bound with the largest deviation: a row per layer, a column per order."""
    cells = by_cell(record, lambda one: one["layer"], order_name)
    orders = list(dict.fromkeys(map(order_name, record["records"])))
    rows = [
        [str(layer), *(f"{row[name]['correlation_largest']:.3f}" for name in orders)] for layer, row in cells.items()
    ]
    caption = (
        "Pearson's R of the bound U with the largest deviation of a logit from its block logit, over "
        f"{record['records'][0]['pairs']:,} block pairs a cell."
    )
    return "\n\n".join([table(["layer", *orders], rows), caption, study_source(record)])
