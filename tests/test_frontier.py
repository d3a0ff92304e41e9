"""benchmarks/frontier.py: what it times, and made-up times beside stored answers."""

import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import frontier  # noqa: E402

from baatt import BAAttConfig  # noqa: E402
from tests.test_ruler_tables import grid  # noqa: E402


def report(shares):
    one = {"shape": [1, 2, 8192, 128], "dtype": "float32", "impl": "cpu", "graph": False}
    records = [one | {"case": case, "total_ms": 4 * share, "baseline_ms": {"dense": 4.0}} for case, share in shares]
    return {"command": "c", "commit": "e" * 40, "device": "here", "versions": {}, "records": records}


def test_cases_are_what_ruler_was_told():
    cases = frontier.make_cases([8192], 2, torch.device("cpu"))
    assert list(cases)[:3] == ["paper-8K-0.5", "paper-8K-0.7", "paper-8K-0.9"]
    read = {name: (case.config.score, case.config.sort, case.config.keep_first) for name, case in cases.items()}
    assert read["paper-8K-0.5"] == ("covariance", "qk", 0)
    assert read["clusters-8K-0.9"] == ("clusters", "none", 1)
    assert read["antidiagonal-first-8K-0.7"] == ("antidiagonal-8", "none", 1)
    assert {case.against for case in cases.values()} == {("dense",)}


def test_points_without_a_time_or_an_answer_are_left_out(tmp_path):
    grids = [grid([4096, 8192])]
    grids[0]["settings"]["paper"] = grids[0]["settings"].pop("safe")
    times = report([("paper-8K-0.5", 0.25), ("clusters-8K-0.5", 0.3)])
    found = frontier.points(times, grids)
    assert [(one["selection"], one["length"], one["share"], one["accuracy"]) for one in found] == [
        ("dense attention", 8192, 1.0, pytest.approx(0.9)),
        ("BA-Att, k in 256, layer 0 dense", 8192, 0.25, pytest.approx(0.625)),
    ]
    text = frontier.table([times, *grids])
    assert text.startswith("![RULER's average over the share of dense attention's time](figures/frontier_h200.png)")
    assert "| BA-Att, k in 256, layer 0 dense | 62.5 in 25 % |" in text
    frontier.draw(found, "a caption", tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


@pytest.mark.parametrize(("length", "share", "name"), [(8192, 0.7, "8K"), (16384, 0.9, "16K"), (65536, 0.5, "64K")])
def test_which_sparsity_has_a_place_for_every_length_that_was_timed(length, share, name):
    config = asdict(BAAttConfig(sparsity=share))
    other = config | {"representatives": 8}
    timed = report([])
    timed["records"] = [
        {"what": "operator", "shape": [1, 2, length, 128], "sparsity": share, "config": one, "speedup": {"cudnn": gain}}
        for one, gain in ((config, 2.5), (other, 9.0))
    ]
    real = report([])
    real["records"] = [
        {"length": 8192, "config": asdict(BAAttConfig(sparsity=one)) if one else {}, "recalled": 0.9 - one / 2}
        for one in (0.0, *frontier.SPARSITIES)
    ]
    lines = frontier.which([timed, report([]), report([]), real, grid([8192])]).splitlines()
    assert lines[0].startswith(f"| sparsity | speed-up, {name} | RULER, 8K | RULER, 16K | SmolLM2")
    row = next(line for line in lines if line.startswith(f"| {100 * share:g} % |"))
    assert "| 2.50x |" in row
    assert "9.00x" not in "".join(lines)
    assert f"| {100 * (0.9 - share / 2):.1f} |" in row
