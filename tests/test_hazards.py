"""What racecheck says is told apart: what it cannot follow from everything else."""

import importlib.util
import sys
from pathlib import Path

import pytest

import baatt.kernels

ROOT = Path(__file__).resolve().parents[1]
LOG = """========= COMPUTE-SANITIZER
========= Error: Race reported between Read access at attention_kernel+0x120 in hopper_kernel.py:{head}
=========     and Write access at attention_kernel+0x9ac0 in hopper_kernel.py:{head} [17 hazards]
=========     and Write access at attention_kernel+0x11ce0 in hopper_kernel.py:{parts} [14 hazards]
=========
{more}========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""
OTHER = """========= Error: Race reported between Write access at attention_kernel+0x20 in hopper_kernel.py:{line}
=========     and Read access at attention_kernel+0x9ac0 in hopper_kernel.py:{head} [3 hazards]
"""


@pytest.fixture
def hazards(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    spec = importlib.util.spec_from_file_location("hazards", ROOT / "benchmarks/hazards.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines_of(text):
    lines = (Path(baatt.kernels.__file__).parent / "hopper_kernel.py").read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def test_the_hand_over_is_counted_apart(hazards, tmp_path, capsys):
    places = {"head": lines_of("def attention_kernel("), "parts": lines_of("gl.warp_specialize("), "line": 99}
    log = tmp_path / "log"
    log.write_text(LOG.format(more="", **places))
    assert hazards.main([str(log)]) == 0
    assert "attention_kernel, hand-over: 31 hazards" in capsys.readouterr().out
    log.write_text(LOG.format(more=OTHER.format(**places), **places))
    assert hazards.main([str(log)]) == 1
    assert "HAZARD attention_kernel hopper_kernel.py:99" in capsys.readouterr().out


def test_ends_of_a_ring(hazards):
    folder = Path(baatt.kernels.__file__).parent
    store, load = lines_of("ring.index(turn % SLOTS).store("), lines_of("ring.index(turn % SLOTS).load(")
    assert hazards.kind_of("hopper_kernel.py", store, [folder]) == "ring"
    assert hazards.kind_of("hopper_kernel.py", load, [folder]) == "ring"
    assert hazards.kind_of("hopper_kernel.py", lines_of("k_ring = gl.allocate"), [folder]) == ""
    assert hazards.kind_of("triton_kernel.py", 1, [folder]) == ""


def test_a_log_that_does_not_end_is_no_clean_one(hazards, tmp_path, capsys):
    (tmp_path / "log").write_text("========= COMPUTE-SANITIZER\n")
    assert hazards.main([str(tmp_path / "log")]) == 1
    assert "did not end" in capsys.readouterr().out
