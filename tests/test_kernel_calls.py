"""benchmarks/kernel_calls.py: the calls are valid, and it knows every kernel that the code launches."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def calls():
    spec = importlib.util.spec_from_file_location("kernel_calls", ROOT / "benchmarks/kernel_calls.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_call_is_valid(calls):
    for call in calls.CALLS.values():
        assert calls.run(call, torch.device("cpu"), torch.float32, "cpu")
    assert not calls.run(calls.CALLS["default"], torch.device("cpu"), torch.bfloat16, "hopper")


def test_a_call_that_goes_wrong_ends_the_run(calls, monkeypatch):
    monkeypatch.setattr(calls, "ba_attention", lambda q, *_, **__: torch.full_like(q, torch.nan))
    with pytest.raises(RuntimeError, match="not finite"):
        calls.run(calls.CALLS["default"], torch.device("cpu"), torch.float32, "cpu")


def test_it_knows_the_kernels_that_are_launched(calls):
    text = "".join(path.read_text() for path in (ROOT / "src/baatt/kernels").glob("*.py"))
    launched = set(re.findall(r"(\w+)\[", text)) & set(re.findall(r"@\w+\.jit.*\ndef (\w+)\(", text))
    assert {name.partition(".")[2] for name, _ in calls.kernels()} == launched


def test_what_was_not_launched_is_told(calls, capsys, monkeypatch):
    monkeypatch.setattr(calls, "CALLS", {"default": calls.CALLS["default"]})
    options = ["--impls", "cpu", "--dtypes", "float32", "--device", "cpu"]
    assert calls.main(options) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "cpu float32 default: ran"
    assert "triton_attention._attention_kernel" in printed[1]
    assert calls.main(options, lambda kernel: True) == 0


def test_the_script_is_valid():
    subprocess.run(["bash", "-n", str(ROOT / "benchmarks/sanitize.sh")], check=True)
