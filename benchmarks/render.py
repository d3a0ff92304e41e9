"""Fills the marked blocks of the Markdown files with tables made from the stored results.

A block is `<!-- render:NAME -->`, generated text, `<!-- /render -->`. NAME is a key of `BLOCKS`, which says which JSON
files under benchmarks/results/ it is made from and by which function. `python benchmarks/render.py` rewrites the files,
`--check` only tells which one is out of date. A missing result is an error, unless the block is listed in `OPTIONAL`.
"""

import argparse
import itertools
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks/results")
FILES = ("README.md", "docs/*.md", "src/baatt/assets/needle-18m/README.md")
BEGIN, END = "<!-- render:{name} -->", "<!-- /render -->"
MARKED = re.compile(r"<!-- render:(?P<name>[\w-]+) -->\n(?P<body>.*?)(?P<end><!-- /render -->)", re.DOTALL)
BEGIN_OR_END = re.compile(r"<!-- render:[^>]*-->|<!-- /render -->")
NOT_MEASURED = "not measured yet"
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
    return (
        f"Command: `{record['command']}`  \n"
        f"Commit {commit_name(record['commit'])}, device {device_name(record['device'])}, {versions}."
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
    return "\n\n".join([table(header, rows), provenance(record)])


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
        f"{usual}. Time of the whole call, selection included; share of it that is not attention; speed-up over dense "
        "attention of cuDNN and FlashAttention and over compiled FlexAttention, which gets our block lists and sorted "
        "tokens ready-made; memory beyond q, k and v; relative L2 error against float64 with the same mask, and its "
        "limit." + (f" Not run: {'; '.join(refused)}." if refused else "")
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


class Block(NamedTuple):
    """Which results a block is made from, in order, and the function that makes it; results of several are stacked."""

    sources: tuple[str, ...]
    render: Callable[[Record], str]


BLOCKS: dict[str, Block] = {
    "needles_dense_h200": Block(("needles_dense_h200.json",), accuracy_by_length),
    "needles_sparse_h200": Block(("needles_sparse_h200.json",), accuracy_by_task),
    "cpu_operator": Block(("cpu_operator.json",), cpu_operator),
    "gpu_operator": Block(("gpu_operator_h200.json",), gpu_operator),
    "gpu_kernel": Block(("gpu_operator_h200.json",), gpu_kernel),
    "gpu_compensation": Block(("gpu_operator_h200.json",), gpu_compensation),
    "demo_settings": Block(("needles_sparse_cpu.json",), accuracy_by_setting),
}
#: Blocks that may stand without a result; they say so.
OPTIONAL: frozenset[str] = frozenset({"gpu_operator", "gpu_kernel", "gpu_compensation"})


def load(path: Path) -> list[Record]:
    """The records of one result file, which holds one or a list of them."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    return stored if isinstance(stored, list) else [stored]


def render_block(name: str, root: Path) -> str:
    """The text of one block.

    Raises:
        RenderError: an unknown name, or a missing result that is not optional.
    """
    if name not in BLOCKS:
        raise RenderError(f"render:{name} is unknown, known are {', '.join(BLOCKS)}")
    block = BLOCKS[name]
    found = [path for source in block.sources if (path := root / RESULTS / source).exists()]
    if not found and name in OPTIONAL:
        return f"*{NOT_MEASURED}* (`{name}`)"
    if not found:
        raise RenderError(f"render:{name} needs {' or '.join(str(RESULTS / source) for source in block.sources)}")
    return "\n\n".join(block.render(record) for path in found for record in load(path))


def render_text(text: str, root: Path) -> str:
    """A Markdown text with every block renewed.

    Raises:
        RenderError: as `render_block`, or a block that is not closed.
    """
    marks = BEGIN_OR_END.findall(text)
    if len(marks) != 2 * len(MARKED.findall(text)) or END in marks[::2]:
        raise RenderError(f"every `{BEGIN.format(name='NAME')}` needs its own `{END}`, each on a line of its own")
    return MARKED.sub(
        lambda block: f"{BEGIN.format(name=block['name'])}\n{render_block(block['name'], root)}\n{END}", text
    )


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a block is out of date")
    check = parser.parse_args(arguments).check
    problems = []
    for path in (path for pattern in FILES for path in sorted(root.glob(pattern))):
        name, text = path.relative_to(root), path.read_text(encoding="utf-8")
        try:
            rendered = render_text(text, root)
        except RenderError as error:
            problems.append(f"{name}: {error}")
            continue
        if rendered != text and check:
            problems.append(f"{name}: out of date, run `python benchmarks/render.py`")
        elif rendered != text:
            path.write_text(rendered, encoding="utf-8")
            sys.stdout.write(f"{name}: rewritten\n")
    for problem in problems:
        sys.stderr.write(f"{problem}\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
