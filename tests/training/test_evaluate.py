"""training/evaluate.py: settings by name, records of the model card's table, and a call that is repeated."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from baatt.config import BAAttConfig, Policy
from tests.lab.lm_eval.harness import tiny_folder

PATH = Path(__file__).resolve().parents[2] / "training/evaluate.py"


@pytest.fixture
def evaluate(monkeypatch):
    spec = importlib.util.spec_from_file_location("training_evaluate", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "training_evaluate", module)
    spec.loader.exec_module(module)
    return module


def test_settings_have_names(evaluate):
    assert evaluate.read_setting("dense") == (None, Policy())
    assert evaluate.read_setting("paper") == (BAAttConfig.preset("paper"), Policy())
    config = BAAttConfig(sort="none", segment=None, block_size=32)
    named = evaluate.read_setting("sort=none,segment=whole,block_size=32,dense_layers=0+1")
    assert named == (config, Policy(dense_layers=(0, 1)))
    with pytest.raises(ValueError, match="--settings must be among block_size"):
        evaluate.read_setting("gamma=1")


def test_records_are_stored_and_answers_are_kept(evaluate, tmp_path, capsys):
    folder, path = tiny_folder(tmp_path / "tiny"), tmp_path / "out/accuracy.json"
    sparse = "sort=k,segment=64,block_size=32,dense_layers=0"
    argv = ["--model", str(folder), "--device", "cpu", "--count", "2", "--lengths", "512", "--tasks", "niah_single_1"]
    argv += ["--settings", "dense", sparse, "--workers", "0", "--json", str(path)]
    evaluate.main(argv)
    stored = json.loads(path.read_text())
    assert {"study", "command", "commit", "device", "versions", "model", "weights", "dtype", "sampler"} <= stored.keys()
    dense, other = stored["records"]
    assert (dense["setting"], dense["config"], dense["policy"]["dense_layers"]) == ("dense", None, [])
    assert (other["setting"], other["config"]["segment"], other["policy"]["dense_layers"]) == (sparse, 64, [0])
    assert all((one["task"], one["length"], one["n"]) == ("niah_single_1", 512, 2) for one in stored["records"])
    assert all(one["trained_format"] == 0 <= one["accuracy"] <= one["values_found"] for one in stored["records"])
    assert f"{sparse} niah_single_1 512 " in capsys.readouterr().out
    kept = (path.with_suffix(".answers") / "rank0.jsonl").read_text()
    evaluate.main(argv)
    assert json.loads(path.read_text())["records"] == stored["records"]
    assert (path.with_suffix(".answers") / "rank0.jsonl").read_text() == kept
