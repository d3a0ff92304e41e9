"""Fills the marked places of the Markdown files with tables and numbers made from the stored results.

A block is `<!-- render:NAME -->`, generated text, `<!-- /render -->`. NAME is a key of `BLOCKS`, which says which JSON
files under benchmarks/results/ it is made from and by which function. A number inside a sentence is
`<!--=NAME WORDS-->97.1<!--/-->`, see values.py. `python benchmarks/render.py` rewrites the files, `--check` only tells
which one is out of date. A missing result is an error, unless the block is listed in `OPTIONAL`.
"""

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ablation_tables
import decoding
import evaluation_tables
import oracle_mass
import scaling_model
from result_tables import (
    Record,
    RenderError,
    accuracy_by_length,
    accuracy_by_setting,
    accuracy_by_task,
    accuracy_totals,
    bound_by_layer,
    compatibility,
    cpu_operator,
    gpu_compensation,
    gpu_kernel,
    gpu_operator,
    recall_by_beta,
    recall_by_score,
    short_queries,
)
from values import VALUES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks/results")
FILES = ("README.md", "docs/**/*.md", "src/baatt/assets/needle-18m/README.md")
BEGIN, END = "<!-- render:{name} -->", "<!-- /render -->"
MARKED = re.compile(r"<!-- render:(?P<name>[\w-]+) -->\n(?P<body>.*?)(?P<end><!-- /render -->)", re.DOTALL)
BEGIN_OR_END = re.compile(r"<!-- render:[^>]*-->|<!-- /render -->")
VALUE = re.compile(r"<!--=(?P<call>[^\n]*?)-->(?P<text>[^\n]*?)<!--/-->")
VALUE_BEGIN_OR_END = re.compile(r"<!--=|<!--/-->")
NOT_MEASURED = "not measured yet"
RULER_GRIDS = ("ruler_grid_4096.json", "ruler_grid_long.json")
#: One setting each, counted from answers of the same runs.
RULER_PARTS = ("ruler_grid_safe_16384.json", "ruler_grid_finer_8192.json")


class Block(NamedTuple):
    """Which results a block is made from, in order, and the function that makes it.

    Args:
        together: the function takes the results of all sources in one call; else their texts are stacked.
    """

    sources: tuple[str, ...]
    render: Callable[..., str]
    together: bool = False


BLOCKS: dict[str, Block] = {
    "needles_dense_h200": Block(("needles_dense_h200.json",), accuracy_by_length),
    "needles_sparse_h200": Block(("needles_sparse_h200.json",), accuracy_by_task),
    "needles_totals": Block(("needles_sparse_h200.json",), accuracy_totals),
    "needles_layers": Block(("needles_layers_h200.json",), accuracy_totals),
    "short_queries": Block(("short_queries_h200.json",), short_queries),
    "ulysses_scaling": Block(("ulysses_scaling.json",), scaling_model.table),
    "ulysses": Block(("ulysses_gpu.json",), scaling_model.measured_table),
    "ruler": Block(("ruler_needle-18m.json",), evaluation_tables.by_length),
    "ruler_half": Block(RULER_GRIDS, evaluation_tables.half_by_length, together=True),
    "ruler_averages": Block(RULER_GRIDS, evaluation_tables.grid_averages),
    "ruler_parts": Block(RULER_PARTS, evaluation_tables.grid_averages),
    "ruler_tasks": Block((*RULER_GRIDS, *RULER_PARTS), evaluation_tables.grid_tasks),
    "oracle_mass": Block(("oracle_mass.json",), oracle_mass.table),
    "decoding": Block(("decoding_h200.json",), decoding.table),
    "compatibility": Block(("compatibility.json",), compatibility),
    "cpu_operator": Block(("cpu_operator.json",), cpu_operator),
    "gpu_operator": Block(("gpu_operator_h200.json",), gpu_operator),
    "gpu_kernel": Block(("gpu_operator_h200.json",), gpu_kernel),
    "gpu_compensation": Block(("gpu_operator_h200.json",), gpu_compensation),
    "recall": Block(("recall_needle-18m.json",), recall_by_score),
    "recall_beta": Block(("recall_beta_needle-18m.json",), recall_by_beta),
    "bound": Block(("bound_needle-18m.json",), bound_by_layer),
    "layers": Block(("layers_needle-18m.json",), ablation_tables.by_layer),
    "ablation_beta": Block(("ablation_beta_h200.json",), ablation_tables.by_beta),
    "ablation_beta_tasks": Block(("ablation_beta_h200.json",), ablation_tables.by_beta_and_task),
    "ablation_sort": Block(("ablation_sort_h200.json",), ablation_tables.by_order),
    "ablation_sort_tasks": Block(("ablation_sort_h200.json",), ablation_tables.by_order_and_task),
    "ablation_score": Block(("ablation_score_h200.json",), ablation_tables.by_score),
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
    records = [record for path in found for record in load(path)]
    return block.render(records) if block.together else "\n\n".join(map(block.render, records))


@functools.cache
def read_once(path: Path) -> Record:
    """A result file that holds one record; numbers of the prose ask for the same few files again and again."""
    return load(path)[0]


def render_value(call: str, root: Path) -> str:
    """The text of one number of the prose.

    Raises:
        RenderError: an unknown name, words that its function does not take, or no such measurement.
    """
    name, *words = call.split()
    if name not in VALUES:
        raise RenderError(f"the value {name} is unknown, known are {', '.join(VALUES)}")
    try:
        return VALUES[name](lambda result: read_once(root / RESULTS / f"{result}.json"), *words)
    except (LookupError, TypeError, ValueError, OSError) as error:
        raise RenderError(f"the value `{call}` cannot be made: {error}") from None


def render_text(text: str, root: Path) -> str:
    """A Markdown text with every block and every number renewed.

    Raises:
        RenderError: as `render_block` and `render_value`, or a mark that is not closed.
    """
    if len(VALUE_BEGIN_OR_END.findall(text)) != 2 * len(VALUE.findall(text)):
        raise RenderError("every `<!--=NAME WORDS-->` needs its own `<!--/-->` on the same line")
    text = VALUE.sub(lambda value: f"<!--={value['call']}-->{render_value(value['call'], root)}<!--/-->", text)
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
