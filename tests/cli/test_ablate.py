"""`baatt ablate` on the shipped model at a short length, and its refusals."""

import json

import pytest

from baatt.cli.ablate import cell_name
from baatt.cli.main import main

GRID = ["--lengths", "512", "--count", "1", "--dial", "block_size=16", "--dial", "segment=64"]


def test_a_small_grid(tmp_path, capsys):
    path, picture = tmp_path / "grid.json", tmp_path / "grid.png"
    argv = ["ablate", *GRID, "--dial", "sort=none,qk", "--dial", "score=covariance,oracle", "--json", str(path)]
    assert main([*argv, "--plot", str(picture)]) == 0
    stored = json.loads(path.read_text())
    assert {"command", "commit", "device", "versions", "model", "seed"} <= stored.keys()
    assert [one["config"].get("score") for one in stored["records"]] == [None, *["covariance"] * 2, *["oracle"] * 2]
    dense, *sparse = stored["records"]
    assert dense["accuracy"] == 1
    recalls = {(one["config"]["sort"], one["config"]["score"]): one["recall_mean"] for one in sparse}
    assert recalls["none", "oracle"] > recalls["none", "covariance"] > 0.5
    out = capsys.readouterr().out
    assert "niah_multikey_1, 512 tokens, 1 samples" in out
    assert cell_name(sparse[-1]["config"]) == "qk in 64, oracle, 50 %, blocks of 16"
    assert cell_name(dense["config"]) in out
    assert picture.stat().st_size > 10_000
    again = tmp_path / "again.png"
    assert main(["ablate", "--draw", str(path), "--plot", str(again)]) == 0
    assert again.read_bytes() == picture.read_bytes()
    assert main(argv) == 0  # goes on with the file: nothing is run again
    assert json.loads(path.read_text()) == stored


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dial", "gamma=1"], "--dial must be among block_size, "),
        (["--dial", "beta"], "--dial must be NAME=VALUE,..."),
        (["--dial", "beta=0", "--dial", "beta=1"], "--dial must be NAME=VALUE,... once"),
        (["--dial", "beta=x"], "--dial beta must be a number, got 'x'"),
        (["--dial", "beta=-1"], "beta must be at least 0"),
        (["--dial", "score=best"], "--dial score must be of covariance,"),
        (["--tasks", "sudoku"], "--tasks must be of"),
        (["--lengths", "4G"], "--lengths must be positive numbers of tokens such as 4096,8K, got '4G'"),
        (["--count", "0"], "--count must be at least 1, got 0"),
        (["--dense-layers", "9"], "--dense-layers must lie in [-6, 6) for 6 layers, got 9"),
        (["--draw", "x.json"], "--draw needs --plot FILE.png"),
        (["--draw", "x.json", "--plot", "x.png"], "x.json"),
        (["--workers", "-1"], "--workers must be at least 0, got -1"),
        (["--json", "/nowhere/x"], "--json must lie in an existing folder, /nowhere is none"),
    ],
)
def test_refusals(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["ablate", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
