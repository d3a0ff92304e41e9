"""`make fuzz`: cases come again from a seed, agree, and a fault is told with all that makes it."""

import importlib
import json
from pathlib import Path

import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "benchmarks")
    return importlib.import_module("fuzz")


def test_cases_agree_and_are_stored(fuzz, tmp_path, capsys):
    command = f"--impl cpu reference --seed 7 --count 15 --seconds 250 --json {tmp_path / 'fuzz.json'}"
    assert fuzz.main(command.split()) == 0
    assert capsys.readouterr().out.startswith("seed 7: ")
    cpu, reference = json.loads((tmp_path / "fuzz.json").read_text())["records"]
    assert (cpu["impl"], cpu["seed"], cpu["first"], cpu["wrong"]) == ("cpu", 7, 0, 0)
    assert cpu["cases"] + cpu["refused"] == 15
    assert reference["shared"] == reference["kept"] > 0
    assert cpu["shared"] > 0.98 * cpu["kept"]
    assert "| `cpu` | " in fuzz.table(json.loads((tmp_path / "fuzz.json").read_text()))


@pytest.mark.slow
def test_processes_share_the_cases(fuzz, tmp_path):
    command = f"--seed 7 --first 28 --count 9 --seconds 250 --processes 2 --json {tmp_path / 'fuzz.json'}"
    assert fuzz.main(command.split()) == 0
    (cpu,) = json.loads((tmp_path / "fuzz.json").read_text())["records"]
    assert cpu["cases"] + cpu["refused"] == 9


def test_a_case_comes_again(fuzz):
    first, again = (fuzz.make_case(3, 11, CPU) for _ in range(2))
    assert first.words == again.words
    for a, b in zip(first[:3], again[:3], strict=True):
        assert a.stride() == b.stride()
        assert torch.equal(a.nan_to_num(1.5), b.nan_to_num(1.5))
    assert fuzz.make_case(3, 12, CPU).words != first.words


def test_all_kinds_come_up(fuzz):
    cases = [fuzz.make_case(1, number, CPU).words for number in range(0, 300 * fuzz.ALIKE, fuzz.ALIKE)]
    assert {word for case in cases for word in case["strides"]} == set(fuzz.STRIDES)
    assert {word for case in cases for word in case["values"]} == set(fuzz.VALUES)
    assert {case["config"]["score"] for case in cases} == set(fuzz.SCORES)
    assert {case["config"]["budget"] for case in cases} == set(fuzz.BUDGETS)
    assert {case["config"]["sort"] for case in cases} == set(fuzz.ORDERS)
    assert {case["dtype"] for case in cases} == {"float64", "float32", "bfloat16", "float16"}


@pytest.mark.parametrize("kind", ["wrong values", "not finite", "an error", "another plan"])
def test_a_fault_is_told(fuzz, kind, tmp_path, capsys, monkeypatch):
    whole = fuzz.ba_attention

    def broken(q, *rest, **options):
        out = whole(q, *rest, **options)
        if kind == "an error":
            raise IndexError("behind the end")
        return out * torch.nan if kind == "not finite" else out + (kind == "wrong values")

    monkeypatch.setattr(fuzz, "ba_attention", broken)
    if kind == "another plan":
        monkeypatch.setattr(fuzz, "kept_pairs", lambda index, *_: torch.zeros(1, dtype=torch.bool))
    arguments = ["--seed", "7", "--first", "1", "--count", "1", "--json", str(tmp_path / "fuzz.json")]
    assert fuzz.main(arguments) == 1
    told = capsys.readouterr().out
    assert "WRONG" in told
    wrong = json.loads((tmp_path / "fuzz.json").read_text())["records"][0]
    assert (wrong["kind"], wrong["seed"], wrong["number"]) == ("wrong", 7, 1)
    assert {"shape", "dtype", "config", "fault"} <= wrong.keys()
