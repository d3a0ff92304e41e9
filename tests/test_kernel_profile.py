"""benchmarks/kernel_profile.py: ncu is called on the script itself, and wrong calls are told in a line."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import kernel_profile


def test_it_runs_itself_under_ncu(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(kernel_profile.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(
        kernel_profile.subprocess,
        "run",
        lambda command, **options: calls.append(command) or subprocess.CompletedProcess(command, 3),
    )
    assert kernel_profile.main(["--cases", "4K-0.5", "--out", str(tmp_path / "profile.txt")]) == 3
    assert calls[0][0] == "ncu"
    assert calls[0][-3:] == ["--inside", "--cases", "4K-0.5"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--cases", "x"], "--cases must be of 4K-0.5, "), ([], "ncu, of Nsight Compute, must be on the PATH")],
)
def test_wrong_calls(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(kernel_profile.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit):
        kernel_profile.main(arguments)
    assert message in capsys.readouterr().err


LAUNCH = """
  share_kernel (132, 1, 1)x(512, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    SM Frequency                    {unit}hz         {clock}
    DRAM Throughput                   %        22.42
    Duration                         {time}
    L1/TEX Cache Throughput           %        66.57
    Compute (SM) Throughput           %        49.63
"""


def test_what_ncu_prints_is_read():
    profiled = '==PROF== Profiling "share_kernel": 0%....100% - 20 passes\n'
    text = f"==PROF== Connected\ncase 4K-0.5\n{profiled}{profiled}"
    text += LAUNCH.format(unit="G", clock="1.80", time="us       1,015.26")
    text += LAUNCH.format(unit="M", clock="900", time="ms       2.5")
    (record,) = kernel_profile.read(text)
    assert record == {
        "case": "4K-0.5", "kernel": "share_kernel", "launches": 2, "ms": 3.51526, "ghz": 0.9, "sm": 0.4963,
        "l1": 0.6657, "dram": 0.2242,
    }  # fmt: skip
    with pytest.raises(ValueError, match="3 launches must be described, got 2"):
        kernel_profile.read(text.replace("case 4K-0.5\n", f"case 4K-0.5\n{profiled}"))
