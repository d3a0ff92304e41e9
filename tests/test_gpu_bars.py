"""benchmarks/gpu_bars.py with one tiny CPU case in place of its own: what it stores, prints and survives."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from baatt import BAAttConfig
from baatt.lab.bench import timing
from baatt.lab.bench.case import Case, Shape

PATH = Path(__file__).resolve().parents[1] / "benchmarks/gpu_bars.py"


@pytest.fixture
def bars(monkeypatch):
    monkeypatch.syspath_prepend(PATH.parent)
    spec = importlib.util.spec_from_file_location("gpu_bars", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_bars", module)
    spec.loader.exec_module(module)
    return module


def test_the_cases_are_those_of_the_table(bars):
    assert list(bars.CASES) == [
        *("kernel-4K-0.5", "kernel-32K-0", "kernel-32K-0.5", "kernel-32K-0.9", "kernel-128K-0.9", "kernel-32K-0.5-d64"),
        *("operator-4K-0.5", "operator-16K-0.5", "operator-32K-0.5", "operator-32K-0.9", "operator-128K-0.9"),
        *("operator-256K-0.9", "operator-1M-0.9-h8"),
        *(
            f"{chosen}-{place}"
            for chosen in ("clusters-16", "clusters-8", "clusters-16-head")
            for place in ("4K-0.5", "16K-0.5", "32K-0.9", "128K-0.9", "256K-0.9")
        ),
        *(f"clusters-16-{place}" for place in ("32K-0.5", "32K-0.7", "128K-0.5", "128K-0.7")),
        *(
            f"causal-{tokens}-{place}"
            for place in ("4K-0.5", "16K-0.5", "32K-0.9", "128K-0.9", "256K-0.9")
            for tokens in (1, 32)
        ),
    ]
    assert bars.CASES["clusters-16-128K-0.9"].config == BAAttConfig(
        128, 0.9, "none", 1024, "clusters", 0.5, representatives=16, refinements=2, keep_first=1
    )
    assert bars.CASES["operator-256K-0.9"].against == ("cudnn", "flash", "flex")
    assert bars.CASES["operator-1M-0.9-h8"].against == ()


def test_the_floor_is_the_longer_of_products_and_traffic(bars):
    one = {
        "shape": [1, 4, 300, 16], "groups": 2, "config": {"score": "clusters", "representatives": 8, "block_size": 128},
        "kept_tflops": 2.0, "stage_ms": {"attend": 3.0}, "input_bytes": 1000,
    }  # fmt: skip
    # 2 TFLOP/s for 3 ms, and 2 * 16 for each of (3 * 8)^2 pairs of 4 heads; q is half of the inputs.
    products = (6e9 + 32 * 24**2 * 4) / 1e12 * 1e3
    ceilings = {"matrix_peak_tflops": 1.0, "memory_bandwidth": 1e12}
    assert bars.floor_ms(one, ceilings) == pytest.approx(products)
    assert bars.floor_ms(one, ceilings | {"memory_bandwidth": 1e5}) == pytest.approx(15.0)


def test_peers_stand_beside_the_kernel(bars):
    one = {
        "what": "kernel", "shape": [1, 32, 4096, 128], "groups": 32, "dtype": "bfloat16", "impl": "hopper",
        "sparsity": 0.5, "config": {"score": "clusters"}, "kept_tflops": 600.0, "stage_ms": {"attend": 1.0},
        "total_ms": 1.2, "baseline_ms": {"fa4": 1.5, "cudnn": 3.0}, "speedup": {"fa4": 1.25, "cudnn": 2.5},
        "refused": {"vsa": "it needs the package vsa: no"},
    }  # fmt: skip
    report = {
        "records": [one], "matrix_peak_tflops": 750.0, "command": "c", "commit": None, "device": "d", "versions": {},
    }  # fmt: skip
    other = report | {"records": [one | {"shape": [1, 32, 2048, 128]}], "matrix_peak_tflops": 760.0}
    table = bars.peers_table([report, other])
    row = "| 4K | 50 % | 128 | 500 | 400 | refused | 2.50x |"
    assert row in table
    assert table.index(row.replace("| 4K", "| 2K")) < table.index(row)
    assert "peak 750 and 760 TFLOP/s" in table
    assert "Refused: `vsa` it needs the package vsa: no." in table


def test_choosers_stand_beside_the_operator(bars):
    one = {
        "what": "operator", "shape": [1, 32, 4096, 128], "dtype": "bfloat16", "impl": "hopper", "sparsity": 0.5,
        "config": {"score": "clusters"}, "total_ms": 1.2, "baseline_ms": {"xattention": 1.5, "cudnn": 3.0},
        "speedup": {"xattention": 1.25, "cudnn": 2.5}, "refused": {}, "without_graph": ["xattention: no"],
    }  # fmt: skip
    report = {"records": [one], "command": "c", "commit": None, "device": "d", "versions": {}}
    table = bars.choosers_table(report)
    assert "| length | sparsity | baatt | `xattention` | `cudnn` | over xattention | over cudnn |" in table
    assert "| 4K | 50 % | 1.2 | 1.5 | 3 | 1.25x | 2.50x |" in table
    assert "Timed without a CUDA graph: `xattention`." in table


def test_a_failing_case_leaves_the_others(bars, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(timing, "ENOUGH_MS", 0.0)
    monkeypatch.setitem(timing.MATRIX_SIZES, "cpu", (128,))
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 2**20)
    config = BAAttConfig(block_size=16, segment=64)
    cpu, shape = torch.device("cpu"), Shape(1, 2, 2, 100, 16)
    good = Case("operator", shape, config, torch.float32, cpu, against=("dense", "flex"))
    monkeypatch.setattr(bars, "CASES", {"bad": good._replace(device=torch.device("meta")), "good": good})
    monkeypatch.setattr(
        bars, "start_report", lambda command, device, dtype, path: real(command, cpu, torch.float32, path)
    )
    from baatt.lab.bench.benchmarks import start_report as real

    path = tmp_path / "bars.json"
    assert bars.main(["--json", str(path), "--impl", "cpu", "--cases", "bad,good", "--no-flex"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith("bad: FAILED, RuntimeError")
    assert printed[2].startswith("good: ")
    assert "x over dense" in printed[2]
    stored = json.loads(path.read_text())
    assert [one["case"] for one in stored["records"]] == ["good"]
    assert "flex" not in stored["records"][0]["refused"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_wrong_calls(bars, tmp_path, capsys):
    for options, message in ((["--cases", "x"], "--cases must be of"), ([], "a GPU is needed")):
        with pytest.raises(SystemExit):
            bars.main(["--json", str(tmp_path / "bars.json"), *options])
        assert message in capsys.readouterr().err
