"""benchmarks/kernel_profile.py: ncu is called on the script itself, and wrong calls are told in a line."""

import subprocess

import pytest

from benchmarks import kernel_profile


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
