"""benchmarks/reliability.py: the checks that need no GPU pass, and one that fails is told."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).resolve().parents[1] / "benchmarks/reliability.py"


@pytest.fixture
def reliability(monkeypatch):
    monkeypatch.syspath_prepend(PATH.parent)
    spec = importlib.util.spec_from_file_location("reliability", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["empty and one token", "strided views", "two threads", "dynamic shapes", "fork"])
def test_what_needs_no_gpu_passes(reliability, name):
    record = reliability.run(name, reliability.Place(torch.device("cpu"), torch.float32))
    assert record["passed"], record


def test_a_failure_is_told_and_the_others_run(reliability, tmp_path, capsys, monkeypatch):
    real = reliability.ba_attention
    monkeypatch.setattr(reliability, "ba_attention", lambda q, *rest: real(q, *rest) + (not q.is_contiguous()))
    path = tmp_path / "record.json"
    options = ["--json", str(path), "--device", "cpu", "--checks", "strided views,two streams,empty and one token"]
    assert reliability.main(options) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("strided views: FAILED")
    assert printed[0].endswith("AssertionError: views must give what their copies give")
    stored = json.loads(path.read_text())
    assert [one["passed"] for one in stored["records"]] == [False, None, True]
    assert "| two streams | Calls that run on two streams" in reliability.table([stored])
    with pytest.raises(SystemExit):
        reliability.main(["--checks", "weather"])
    assert "--checks must be of" in capsys.readouterr().err
