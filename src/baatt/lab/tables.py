"""One table for the screen and for Markdown, made of ready text, and how numbers are written in it.

In: columns and rows of text. Out: a rich table, or Markdown. Shares are 0 to 1 everywhere but in text: percent begins
here.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import rich.table

Record = Mapping[str, Any]
Row = TypeVar("Row", bound=Hashable)
Column = TypeVar("Column", bound=Hashable)
#: What stands where nothing was measured.
MISSING = "-"


class Table(NamedTuple):
    """columns: headers, the first one's column is left-aligned; rows: a text for every column, or fewer.

    title, caption: above and below. strong: first cells of the rows to stand out. parted: number of the row above which
    a line is drawn on the screen. text: the other columns hold words, which are left-aligned too on the screen.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    title: str = ""
    strong: Collection[str] = ()
    parted: int | None = None
    text: bool = False

    def markdown(self) -> str:
        """Title, table and caption, with an empty line between them."""
        rows = [[f"**{cell}**" for cell in row] if row[0] in self.strong else row for row in self.rows]
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join(part for part in (self.title, table, self.caption) if part)

    def rich(self) -> rich.table.Table:
        """The same for a console."""
        table = rich.table.Table(
            title=self.title or None, caption=self.caption or None, title_justify="left", caption_justify="left"
        )
        for number, name in enumerate(self.columns):
            # A name is folded where it has no room: cut off it may read like another.
            table.add_column(name, justify="right" if number and not self.text else "left", overflow="fold")
        for number, row in enumerate(self.rows):
            if number == self.parted:
                table.add_section()
            table.add_row(*row, style="bold" if row[0] in self.strong else None)
        return table


def pivot(
    records: Iterable[Record], row: Callable[[Record], Row], column: Callable[[Record], Column]
) -> dict[Row, dict[Column, Record]]:
    """Records as rows of columns, in the order in which they were made; two for one cell are a ValueError."""
    grid: dict[Row, dict[Column, Record]] = {}
    for one in records:
        if column(one) in grid.setdefault(row(one), {}):
            raise ValueError(f"two measurements for {row(one)}, {column(one)}")
        grid[row(one)][column(one)] = one
    return grid


def percent(share: float, digits: int | None = None) -> str:
    """`50 %`, with as many digits as are needed or as are asked for."""
    return f"{100 * share:g} %" if digits is None else f"{100 * share:.{digits}f} %"


def interval(value: float, low: float, high: float) -> str:
    """A share in percent with its 95 % interval: `97.5 [94.3-98.9]`."""
    return f"{100 * value:.1f} [{100 * low:.1f}-{100 * high:.1f}]"


def signed_interval(value: float, low: float, high: float) -> str:
    """A difference of shares in percent with its 95 % interval: `-2.5 [-4.0, -1.0]`."""
    return f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def figures(value: float | None) -> str:
    """Three figures, all of them from 100 on: milliseconds, TFLOP/s."""
    return MISSING if value is None else f"{value:,.1f}" if value >= 100 else f"{value:.3g}"


def times(value: float | None) -> str:
    """`1.25x`."""
    return MISSING if value is None else f"{value:.2f}x"


def error_of(error: float, limit: float) -> str:
    """`1.2e-03 (5.0e-03)`: an error and its limit."""
    return f"{error:.1e} ({limit:.1e})"


def mebibytes(value: int | None) -> str:
    """`1,024 MiB`."""
    return MISSING if value is None else f"{value / 2**20:,.0f} MiB"


def gibibytes(value: float | None) -> str:
    """`1.25 GiB`."""
    return MISSING if value is None else f"{value / 2**30:.2f} GiB"


def short_length(tokens: int) -> str:
    """4096 -> 4K, 1048576 -> 1M, 1000 -> 1000."""
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return str(tokens)
