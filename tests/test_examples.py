"""Every example: at most 40 lines, and it runs on its tiny model as its first line says."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_it_is_short(path):
    assert len(path.read_text().splitlines()) <= 40


def test_the_one_of_several_processes_says_how(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="run it as: torchrun --nproc-per-node 2"):
        runpy.run_path(str(next(one for one in EXAMPLES if one.name == "ulysses.py")), run_name="__main__")


@pytest.mark.parametrize("path", [one for one in EXAMPLES if one.name != "ulysses.py"], ids=lambda path: path.name)
def test_it_runs(path, monkeypatch, capsys):  # that of several processes: tests/test_distributed.py
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert "sparse" in printed
    assert "0 sparse" not in printed.splitlines()[0]
