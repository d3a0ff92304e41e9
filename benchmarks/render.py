"""Fills the marked places of the Markdown files with tables and numbers made from the stored results.

A block is `<!-- render:NAME -->`, generated text, `<!-- /render -->`. NAME is a key of `BLOCKS` in registry.py, which
says which results it is made from and by which function. A number inside a sentence is
`<!--=NAME WORDS-->97.1<!--/-->`, see values.py. `python benchmarks/render.py` rewrites the files, `--check` only tells
which one is out of date. A missing result is an error.
"""

import argparse
import functools
import json
import re
import sys
from pathlib import Path

from registry import BLOCKS
from tables import RenderError
from values import VALUES

from baatt.lab.records import stored_text
from baatt.lab.tables import Record

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks/results")
FILES = ("README.md", "benchmarks/README.md", "docs/**/*.md", "src/baatt/assets/*/README.md")
BEGIN, END = "<!-- render:{name} -->", "<!-- /render -->"
MARKED = re.compile(r"<!-- render:(?P<name>[\w-]+) -->\n(?P<body>.*?)(?P<end><!-- /render -->)", re.DOTALL)
BEGIN_OR_END = re.compile(r"<!-- render:[^>]*-->|<!-- /render -->")
VALUE = re.compile(r"<!--=(?P<call>[^\n]*?)-->(?P<text>[^\n]*?)<!--/-->")
VALUE_BEGIN_OR_END = re.compile(r"<!--=|<!--/-->")


@functools.cache
def load(path: Path) -> Record:
    """A stored result; the same few are asked for again and again."""
    return dict(json.loads(stored_text(path)))


def is_stored(path: Path) -> bool:
    """Whether there is a result, as it is or packed."""
    return path.exists() or Path(f"{path}.gz").exists()


def render_block(name: str, root: Path) -> str:
    """The text of one block.

    Raises:
        RenderError: an unknown name, a missing result, or one without what the block shows.
    """
    if name not in BLOCKS:
        raise RenderError(f"render:{name} is unknown, known are {', '.join(BLOCKS)}")
    block = BLOCKS[name]
    if not block.results:
        return block.render()
    if missing := [str(RESULTS / result) for result in block.results if not is_stored(root / RESULTS / result)]:
        raise RenderError(f"render:{name} needs {', '.join(missing)}")
    records = [load(root / RESULTS / result) for result in block.results]
    try:
        return block.render(records) if block.together else "\n\n".join(map(block.render, records))
    except ValueError as error:
        raise RenderError(f"render:{name}: {error}") from None


def render_value(call: str, root: Path) -> str:
    """The text of one number of the prose.

    Raises:
        RenderError: an unknown name, words that its function does not take, or no such measurement.
    """
    name, *words = call.split()
    if name not in VALUES:
        raise RenderError(f"the value {name} is unknown, known are {', '.join(VALUES)}")
    try:
        return VALUES[name](lambda result: load(root / RESULTS / f"{result}.json"), *words)
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
    load.cache_clear()  # files may have changed since the last call
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
