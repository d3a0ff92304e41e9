"""One table, on the screen and in Markdown, and numbers as they are written in it."""

import pytest
from rich.console import Console

from baatt.lab import tables
from baatt.lab.tables import Table, pivot


def test_markdown_and_screen_say_the_same():
    table = Table(
        ["task", "50 %", "90 %"], [["a", "1.0", "2.0"], ["mean", "1.5", "-"]], "What it is.", "Title", ["mean"], 1
    )
    assert table.markdown() == (
        "Title\n\n| task | 50 % | 90 % |\n| --- | ---: | ---: |\n| a | 1.0 | 2.0 |\n"
        "| **mean** | **1.5** | **-** |\n\nWhat it is."
    )
    console = Console(width=60, record=True, file=None)
    with console.capture() as captured:
        console.print(table.rich())
    lines = captured.get().splitlines()
    assert lines[0].startswith("Title")
    assert lines[-1].startswith("What it is.")
    assert any("├" in line or "─┼─" in line for line in lines[4:]), "a line above the parted row"


def test_a_table_without_words():
    assert Table(["a"], []).markdown() == "| a |\n| --- |"
    assert Table(["a"], [["1"]]).rich().row_count == 1


def test_pivot_refuses_two_for_one_cell():
    records = [{"row": 1, "column": name} for name in "ab"]
    assert pivot(records, lambda one: one["row"], lambda one: one["column"]) == {1: {"a": records[0], "b": records[1]}}
    with pytest.raises(ValueError, match="two measurements for 1, 2"):
        pivot(records, lambda one: one["row"], lambda one: 2)


def test_numbers():
    assert (tables.percent(0.5), tables.percent(0.875), tables.percent(0.1234, 1)) == ("50 %", "87.5 %", "12.3 %")
    assert tables.interval(0.975, 0.943, 0.989) == "97.5 [94.3-98.9]"
    assert tables.signed_interval(-0.025, -0.04, -0.01) == "-2.5 [-4.0, -1.0]"
    assert [tables.figures(value) for value in (None, 1.2345, 1234.56)] == ["-", "1.23", "1,234.6"]
    assert [tables.times(value) for value in (None, 1.256)] == ["-", "1.26x"]
    assert tables.error_of(0.002, 0.005) == "2.0e-03 (5.0e-03)"
    assert (tables.mebibytes(None), tables.mebibytes(2**30)) == ("-", "1,024 MiB")
    assert (tables.gibibytes(None), tables.gibibytes(2**30)) == ("-", "1.00 GiB")
    lengths = [tables.short_length(tokens) for tokens in (300, 1024, 1500, 2**18, 2**20)]
    assert lengths == ["300", "1K", "1500", "256K", "1M"]
