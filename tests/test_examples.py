"""Every example: at most 40 lines, and it runs on its tiny model as its first line says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_it_is_short(path):
    assert len(path.read_text().splitlines()) <= 40


@pytest.mark.parametrize("path", [one for one in EXAMPLES if one.name != "ulysses.py"], ids=lambda path: path.name)
def test_it_runs(path):  # that of several processes: tests/test_distributed.py
    run = subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert "sparse" in run.stdout
    assert "0 sparse" not in run.stdout.splitlines()[0]
