"""Every example: at most 40 lines, and it runs on its tiny model as its first line says."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_it_is_short(path):
    assert len(path.read_text().splitlines()) <= 40


@pytest.mark.parametrize("path", [one for one in EXAMPLES if one.name != "ulysses.py"], ids=lambda path: path.name)
def test_it_runs(path, monkeypatch, capsys):  # that of several processes: tests/test_distributed.py
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert "sparse" in printed
    assert "0 sparse" not in printed.splitlines()[0]
