"""`baatt bench` as a stranger uses it: tables, files, pictures, refusals."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from baatt.cli import bench
from baatt.cli.main import main
from baatt.lab.bench import benchmarks, timing
from baatt.lab.bench.benchmarks import REPORT
from tests.processes import run_code

TINY = ["bench", "--device", "cpu", "--shape", "1x2x300x16", "--block-size", "16", "--segment", "64"]
FIELDS = (
    "what impl shape groups dtype causal sparsity achieved_sparsity config graph without_graph stage_ms total_ms "
    "compensation_cost baseline_ms speedup refused kept_tflops arithmetic_intensity selection_share error "
    "error_limit verified_blocks peak_memory_bytes input_bytes "
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(timing, "ENOUGH_MS", 0.0)
    monkeypatch.setitem(timing.MATRIX_SIZES, "cpu", (128,))
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 2**20)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("baatt: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_table_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    call = [*TINY, "--sparsity", "0.5,0.75", "--against", "dense,flash", "--heads-kv", "1", "--json", str(path)]
    assert main(call) == 0
    printed = capsys.readouterr().out
    for expected in ("1x2:1x300x16", "attend, ms", "TFLOP/s", "speed-up over dense", "block pairs skipped", "peak"):
        assert expected in printed
    assert "flash refused: it needs a GPU, got device 'cpu'" in printed
    stored = json.loads(path.read_text())
    assert set(stored) == {*REPORT, "records"}
    assert stored["command"].startswith("baatt bench --device cpu --shape 1x2x300x16")
    assert stored["matrix_peak_dtype"] == "float32"
    assert [one["sparsity"] for one in stored["records"]] == [0.5, 0.75]
    for one in stored["records"]:
        assert set(one) == set(FIELDS.split())
        assert one["config"]["segment"] == 64
        assert list(one["speedup"]) == ["dense"]


def test_several_shapes_and_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    call = ["bench", "--device", "cpu", "--shape", "1x1x256x16,2x1x130x16", "--what", "kernel", "--json", str(path)]
    assert main([*call, "--sparsity", "0", "--impl", "reference", "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "kernel reference, 1x1x256x16" in printed
    assert "speed-up" not in printed
    records = json.loads(path.read_text())["records"]
    assert [one["shape"] for one in records] == [[1, 1, 256, 16], [2, 1, 130, 16]]
    assert all(one["what"] == "kernel" and one["dtype"] == "bfloat16" for one in records)


def test_no_speed_up_without_verification(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    path, right = tmp_path / "bench.json", benchmarks.ba_attention

    def wrong(q, k, v, config, **options):
        out = right(q, k, v, config, **options)
        return out if config.sparsity == 0.5 else 1.5 * out

    monkeypatch.setattr(benchmarks, "ba_attention", wrong)
    assert main([*TINY, "--sparsity", "0.75", "--json", str(path)]) == 2
    captured = capsys.readouterr()
    assert "speed-up over" not in captured.out
    assert re.search(r"relative error of \d.*got 5.00e-01: no speed-up is given\n$", captured.err)
    assert captured.err.count("\n") == 1
    assert not path.exists()
    assert main([*TINY, "--sparsity", "0.5,0.75", "--json", str(path)]) == 2
    assert [one["sparsity"] for one in json.loads(path.read_text())["records"]] == [0.5]


def test_dry_run_runs_nothing(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch, "randn", lambda *_, **__: pytest.fail("allocates"))
    path = tmp_path / "bench.json"
    call = ["bench", "--device", "cuda", "--shape", "1x32x262144x128", "--against", "cudnn,flash,flex,dense"]
    assert main([*call, "--dry-run", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    for expected in ("2 cases on cuda, bfloat16", "1x32x262144x128", "GiB", "cudnn, flash, flex, dense"):
        assert expected in printed
    assert not path.exists()
    assert main(["bench", "--device", "cuda", "--dtype", "float32", "--against", "cudnn", "--dry-run"]) == 0
    assert "cudnn will be refused: it needs bfloat16 or float16, got float32" in capsys.readouterr().out
    assert main(["bench", "--device", "cpu", "--sweep", "--lengths", "1K,512", "--dry-run", "--impl", "triton"]) == 0
    printed = capsys.readouterr().out
    assert "4 cases on cpu, float32" in printed
    assert printed.index("1x8x512x64") < printed.index("1x8x1024x64")
    assert "refused" in printed


def test_sweep_and_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, path, again = tmp_path / "sweep.png", tmp_path / "sweep.json", tmp_path / "again.png"
    call = [*TINY, "--sweep", "--lengths", "256,512", "--sparsity", "0.5,0.75"]
    assert main([*call, "--plot", str(picture), "--json", str(path)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [one["shape"][2] for one in json.loads(path.read_text())["records"]] == [256, 256, 512, 512]
    assert main(["bench", "--draw", str(path), "--plot", str(again)]) == 0
    assert again.read_bytes().startswith(b"\x89PNG")
    assert "again.png" in capsys.readouterr().out.replace("\n", "")


def test_sweep_without_matplotlib(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    call = [*TINY, "--sweep", "--lengths", "64", "--sparsity", "0", "--plot", str(tmp_path / "sweep.png")]
    assert "pip install 'baatt[plots]'" in refused(capsys, *call)
    assert main([*call, "--no-plot"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_too_much_memory(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "must fit into memory" in refused(capsys, "bench", "--device", "cpu", "--shape", "1x8x100000000x64")

    def full(case):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(bench, "measure", full)
    assert "1x2x300x16 does not fit into memory: CUDA out of memory" in refused(capsys, *TINY)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (("--shape", "1x2x3"), r"--shape must be BxHxNxD, four positive integers .*got '1x2x3'"),
        (("--shape", "1x2x0x16"), "--shape must be BxHxNxD"),
        (("--shape", "1x2x300x16,"), "--shape must be BxHxNxD, .*got ''"),
        (("--shape", "1x4x300x16", "--heads-kv", "3"), "--heads-kv must be positive and divide H=4, got 3"),
        (("--sparsity", "1"), r"sparsity must be in \[0, 1\), got 1.0"),
        (("--sparsity", "0.5;0.9"), "--sparsity must be a number, got '0.5;0.9'"),
        (("--against", "sage"), "--against must be of cudnn,flash,flex,dense,.*none, got 'sage'"),
        (("--json", "/nowhere/bench.json"), "--json must lie in an existing folder, /nowhere is none"),
        (("--block-size", "128", "--segment", "100"), "segment must be a positive multiple of block_size=128, got 100"),
        (("--impl", "hopper"), "--impl hopper is refused: impl='hopper' cannot run: it needs tensors on a GPU"),
        (("--lengths", "1K"), "--lengths needs --sweep"),
        (("--sweep", "--lengths", "1K,-4", "--no-plot"), "--lengths must be positive numbers of tokens .*got '-4'"),
        (("--sweep", "--shape", "1x1x16x16,1x1x32x16", "--no-plot"), "--sweep needs one --shape"),
        (("--sweep", "--plot", "/nowhere/a.png"), "--plot must lie in an existing folder, /nowhere is none"),
        (("--sweep", "--plot", "a.svg"), "--plot must end in .png, got 'a.svg'"),
        (("--shape", "1x8x4KB"), "--shape must be BxHxNxD, .*got '1x8x4KB'"),
        (("--threads", "1000000"), r"--threads must be at most \d+, the cores of this machine, got 1000000"),
        (("--causal", "1", "--sort", "qk"), "^baatt: --sort must be 'none' with causal=1"),
        (("--draw", "/nowhere/a.json", "--plot", "a.png"), "/nowhere/a.json"),
    ],
)
def test_wrong_calls(capsys: pytest.CaptureFixture[str], options: tuple[str, ...], pattern: str) -> None:
    assert re.search(pattern, refused(capsys, "bench", "--device", "cpu", *options))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--device cuda needs a GPU" in refused(capsys, "bench", "--device", "cuda")


def test_runs_without_the_packages_of_other_verbs() -> None:
    """A GPU machine of ours has torch, triton, numpy, einops and rich."""
    absent = "sys.modules.update(dict.fromkeys(['tokenizers', 'safetensors', 'matplotlib', 'transformers']))"
    call = "['bench', '--device', 'cpu', '--shape', '1x1x64x16', '--sparsity', '0']"
    quick = "timing.ENOUGH_MS = 0.0; timing.MATRIX_SIZES['cpu'] = (128,); timing.COPY_BYTES['cpu'] = 2**20"
    code = f"import sys; {absent}; from baatt.lab.bench import timing; {quick}"
    code += f"; from baatt.cli.main import main; sys.exit(main({call}))"
    run = run_code(code)
    assert run.returncode == 0, run.stderr
    assert "speed-up over dense" in run.stdout
