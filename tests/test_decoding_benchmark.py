"""benchmarks/decoding.py on short samples: it checks, times, and stores what a table is made from."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from baatt.sampling import SampleResult

PATH = Path(__file__).resolve().parents[1] / "benchmarks/decoding.py"
SMALL = ["--count", "1", "--lengths", "256", "--task", "niah_single_1"]
SMALL += ["--gen-length", "16", "--block-length", "8", "--steps", "4"]


@pytest.fixture
def decoding(monkeypatch):
    monkeypatch.syspath_prepend(str(PATH.parent))  # as `python benchmarks/decoding.py` has it
    spec = importlib.util.spec_from_file_location("decoding", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "decoding", module)
    spec.loader.exec_module(module)
    return module


def test_stores_every_setting(decoding, tmp_path, capsys):
    path = tmp_path / "decoding.json"
    decoding.main(["--json", str(path), "--device", "cpu", *SMALL, "--caches", "none,dual"])
    stored = json.loads(path.read_text())
    assert {"study", "command", "commit", "device", "versions", "model", "dtype", "sampler", "sparse"} <= stored.keys()
    assert stored["command"].startswith("python benchmarks/decoding.py --json")
    records = stored["records"]
    names = [(one["cache"], one["attention"], one["threshold"]) for one in records]
    assert names == [
        (cache, attention, threshold)
        for cache in ("none", "dual")
        for attention in ("dense", "sparse")
        for threshold in (None, 0.9)
    ]
    for one in records:
        assert (one["samples"], one["filled"], one["length"]) == (1, 16, 256)
        assert one["tokens_per_second"] == 16 / one["seconds"]
        assert one["accuracy"] == one["right"]
        assert one["interval"][0] <= one["accuracy"] <= one["interval"][1]
        assert one["text_tokens"] < 16
        evaluations = one["full_evaluations"], one["cached_evaluations"]
        if one["threshold"] is None:
            assert evaluations == ((4, 0) if one["cache"] == "none" else (2, 2))
        else:
            assert sum(evaluations) < 8
            assert evaluations[1] == 0 if one["cache"] == "none" else evaluations[0] == 2
        if one["attention"] == "dense":
            assert one["right"] == 1
        if one["cache"] == "none":
            assert one["agreed"] == 1
    assert records[0]["speedup"] == 1
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 8
    assert printed[0].startswith("256 none dense threshold None: ")
    assert printed[0].endswith(" tokens/s, 1.00x, 1/1 right")


@pytest.mark.slow
def test_some_settings_of_some_lengths(decoding, tmp_path):
    path = tmp_path / "decoding.json"
    some = ["--caches", "dual", "--attention", "dense", "--thresholds", "0.9", "--batch-size", "2", "--count", "3"]
    decoding.main(["--json", str(path), "--device", "cpu", *SMALL, *some, "--lengths", "300,340"])
    records = json.loads(path.read_text())["records"]
    assert [(one["length"], one["samples"], one["right"], one["speedup"], one["agreed"]) for one in records] == [
        (300, 3, 3, None, None),
        (340, 3, 3, None, None),
    ]


def test_refuses_results_that_are_not_valid(decoding):
    model = decoding.MaskedDiffusionLM.from_pretrained(decoding.shipped_model())
    good, at = torch.full((1, 4), 5), torch.zeros(1, 4, dtype=torch.int64)
    decoding.check(SampleResult(good, 1, 1.0, at), model)
    for token in (model.config.mask_token_id, model.config.vocab_size):
        with pytest.raises(RuntimeError, match="a mask token or an unused id is left"):
            decoding.check(SampleResult(torch.full((1, 4), token), 1, 1.0, at), model)
    with pytest.raises(RuntimeError, match="a position was never filled"):
        decoding.check(SampleResult(good, 1, 1.0, at - 1), model)


def test_wrong_names_are_refused(decoding, tmp_path, capsys):
    with pytest.raises(SystemExit):
        decoding.main(["--json", str(tmp_path / "decoding.json"), "--caches", "dual,both"])
    assert "must be of none, prefix, dual, got 'dual,both'" in capsys.readouterr().err
