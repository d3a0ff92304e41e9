"""The grid of RULER: which jobs there are, what `baatt` is told, what stays of a run that was cut."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from baatt.cli.main import build_parser

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import ruler_grid  # noqa: E402


class Calls:
    """Stands for `subprocess.Popen`: notes what is called; a summary is a file that names its store's parts."""

    def __init__(self, failing=()):
        self.seen, self.failing = [], failing

    def __call__(self, command, env, **_):
        arguments = command[command.index("baatt") + 1 :]
        options = build_parser("evaluate").parse_args(arguments)
        self.seen.append((options, env.get("CUDA_VISIBLE_DEVICES"), "torch.distributed.run" in command))
        failed = any(name in str(options.store) for name in self.failing)
        if not failed:
            (options.store / "rank0.jsonl").touch()
            options.json.write_text(json.dumps(sorted(file.name for file in options.store.glob("rank*"))))
        return subprocess.Popen([sys.executable, "-c", f"raise SystemExit({int(failed)})"])


@pytest.fixture
def calls(monkeypatch):
    calls, start = Calls(), subprocess.Popen
    monkeypatch.setattr(
        ruler_grid.subprocess,
        "Popen",
        lambda command, **options: (calls if "baatt" in command else start)(command, **options),
    )
    return calls


def test_jobs_come_from_short_to_long_and_long_ones_are_split():
    jobs = ruler_grid.make_jobs(["dense", "safe", "mean"], [16384, 4096], "0.3,0.5")
    assert [(job.setting, job.length, job.sparsity) for job in jobs] == [
        ("safe", 4096, "0.3,0.5"), ("mean", 4096, "0.3,0.5"), ("safe", 16384, "0.3"), ("mean", 16384, "0.3"),
        ("safe", 16384, "0.5"), ("mean", 16384, "0.5"),
    ]  # fmt: skip


def test_every_setting_is_told_with_options_that_the_command_knows(tmp_path, calls):
    ruler_grid.main([str(tmp_path), "--lengths", "4096,16384", "--gpus", "2", "--sparsity", "0.3,0.5"])
    dense, *others = calls.seen
    assert (dense[0].sparsity, dense[1], dense[2]) == ("0", None, True)
    jobs = [(options, gpu) for options, gpu, several in others if not several and options.json.name == "summary.json"]
    assert len(jobs) == 5 + 2 * 5
    assert {gpu for _, gpu in jobs} <= {"0", "1"}
    assert len({options.store for options, _ in jobs}) == len(jobs)
    assert all((options.store / "rank1.jsonl").exists() for options, _ in jobs)  # the dense answers
    summaries = {options.json.name: options for options, _, _ in others if options.json.name != "summary.json"}
    scores = {name: (one.preset, one.sort, one.score) for name, one in summaries.items()}
    assert scores == {
        "ruler_safe.json": ("safe", None, "covariance"),
        "ruler_paper.json": ("paper", None, "covariance"),
        "ruler_mean.json": ("paper", "none", "mean"),
        "ruler_antidiagonal.json": ("paper", "none", "antidiagonal-8"),
        "ruler_oracle.json": ("paper", "none", "oracle"),
    }
    assert json.loads((tmp_path / "ruler_safe.json").read_text()) == [f"rank{part}.jsonl" for part in range(4)]


def test_a_setting_with_a_failed_job_has_no_summary_and_is_named(tmp_path, calls):
    calls.failing = ("mean-16384-0.5",)
    with pytest.raises(SystemExit, match=r"not finished: mean-16384-0\.5; the same command goes on"):
        ruler_grid.main([str(tmp_path), "--lengths", "16384", "--settings", "safe,mean", "--sparsity", "0.3,0.5"])
    assert (tmp_path / "ruler_safe.json").exists()
    assert not (tmp_path / "ruler_mean.json").exists()


def test_nothing_is_started_once_the_time_is_up(tmp_path, calls):
    with pytest.raises(SystemExit, match="dense: not finished"):
        ruler_grid.main([str(tmp_path), "--seconds", "-1"])
    assert calls.seen == []


def test_an_unknown_setting_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        ruler_grid.main([str(tmp_path), "--settings", "safe,xattention"])
    assert "must be of dense,safe,paper,mean,antidiagonal,oracle, got xattention" in capsys.readouterr().err
