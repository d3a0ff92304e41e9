"""The grid of RULER: which jobs there are, what `baatt` is told, what stays of a run that was cut."""

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from baatt.assets import shipped_model
from baatt.cli.evaluate import read_cells
from baatt.cli.main import build_parser
from baatt.lab.ruler.cells import RULER_SAMPLER
from baatt.lab.ruler.model import RulerAnswer, checksums, weights_of
from baatt.lab.ruler.sources import Sources
from baatt.lab.ruler.summary import make_averages, make_records

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import ruler_grid  # noqa: E402


def weights():
    return weights_of(checksums(shipped_model()))


def summary_of(arguments):
    """What `baatt evaluate ruler` would store: two samples of one task, sparse attention loses the second."""
    options = build_parser("evaluate").parse_args(arguments)
    options.tasks = "vt"
    cells = read_cells(options, Sources())
    answers = [
        [
            RulerAnswer("vt", cell.length, n, {}, "", [], score, score, 0.5, 16, 4, 0.4, "c" * 40, "gpu")
            for n, score in enumerate([1.0, 1.0 - (cell.config.sparsity if cell.config else 0)])
        ]
        for cell in cells
    ]
    records = make_records(cells, answers)
    return {
        "study": "ruler", "command": shlex.join(["baatt", *arguments]), "commit": "d" * 40, "device": "gpu",
        "versions": {"torch": "2"}, "processes": 1, "model": "needle-18m", "weights": weights(), "count": 2,
        "averages": make_averages(records), "records": records,
    }  # fmt: skip


class Calls:
    """Stands for `subprocess.Popen`: notes what is called and stores a summary."""

    def __init__(self):
        self.seen, self.failing = [], ()

    def __call__(self, command, env, **_):
        arguments = command[command.index("baatt") + 1 :]
        options = build_parser("evaluate").parse_args(arguments)
        self.seen.append((options, env.get("CUDA_VISIBLE_DEVICES"), "torch.distributed.run" in command))
        failed = any(name in str(options.store) for name in self.failing)
        if not failed:
            (options.store / "rank0.jsonl").write_text("an answer\n")
            options.json.write_text(json.dumps(summary_of(arguments)))
        return subprocess.Popen(["sh", "-c", f"exit {int(failed)}"])


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
        ("safe", 4096, "0.3,0.5"), ("mean", 4096, "0.3,0.5"), ("safe", 16384, "0.3"), ("safe", 16384, "0.5"),
        ("mean", 16384, "0.3"), ("mean", 16384, "0.5"),
    ]  # fmt: skip


def test_every_setting_is_told_with_options_that_the_command_knows(tmp_path, calls):
    ruler_grid.main([str(tmp_path), "--lengths", "4096,16384", "--gpus", "2", "--sparsity", "0.3,0.5"])
    dense, *jobs = calls.seen
    assert [(cell.length, cell.config) for cell in read_cells(dense[0], Sources())[::11]] == [
        (4096, None),
        (16384, None),
    ]
    assert dense[1:] == (None, True)
    assert len(jobs) == 12 + 2 * 12
    assert not any(several for _, _, several in jobs)
    assert {gpu for _, gpu, _ in jobs} <= {"0", "1"}
    assert len({options.store for options, _, _ in jobs}) == len(jobs)
    assert {*"".join((one.store / "rank1.jsonl").read_text() for one, _, _ in jobs).splitlines()} == {"an answer"}
    cells = [read_cells(options, Sources())[1] for options, _, _ in jobs]
    read = [(cell.config.sort, cell.config.score, cell.config.beta, cell.config.keep_first) for cell in cells]
    assert {(*one, cell.policy.dense_layers) for one, cell in zip(read, cells, strict=True)} == {
        ("k", "covariance", 0.5, 0, (0, 1)), ("qk", "covariance", 0.5, 0, ()), ("k", "covariance", 0.5, 0, ()),
        ("none", "covariance", 0.5, 0, ()), ("none", "mean", 0.0, 0, ()), ("none", "antidiagonal-8", 0.0, 0, ()),
        ("none", "covariance-16", 0.5, 0, ()), ("none", "oracle", 0.0, 0, ()), ("none", "clusters", 0.0, 1, ()),
        ("none", "covariance", 0.5, 1, ()), ("none", "antidiagonal-8", 0.0, 1, ()), ("none", "exact-peak", 0.0, 0, ()),
    }  # fmt: skip


def test_of_the_gpus_those_that_a_program_may_see_are_used(tmp_path, calls, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    ruler_grid.main([str(tmp_path), "--lengths", "4096", "--gpus", "2", "--settings", "safe,mean", "--sparsity", "0.5"])
    assert {gpu for _, gpu, _ in calls.seen[1:]} <= {"3", "5"}


def test_the_file_of_the_grid_joins_lengths_and_sparsities(tmp_path, calls):
    command = [str(tmp_path), "--lengths", "4096,16384", "--settings", "safe,oracle", "--sparsity", "0.3,0.5"]
    ruler_grid.main(command)
    stored = json.loads((tmp_path / "grid.json").read_text())
    assert stored["command"] == shlex.join(["python", "benchmarks/ruler_grid.py", *command])
    assert (stored["study"], stored["commit"], stored["device"]) == ("ruler grid", "d" * 40, "gpu")
    assert list(stored["settings"]) == ["safe", "oracle"]
    safe = stored["settings"]["safe"]
    found = [(one["length"], one["config"].get("sparsity", 0), one["accuracy"]) for one in safe["records"]]
    assert found == [
        (4096, 0, 1.0), (4096, 0.3, 0.85), (4096, 0.5, 0.75), (16384, 0, 1.0), (16384, 0.3, 0.85), (16384, 0.5, 0.75)
    ]  # fmt: skip
    assert [one["by_length"][1]["accuracy"] for one in safe["averages"]] == [1.0, 0.85, 0.75]
    assert "command" not in safe


def test_finished_jobs_are_not_asked_again_unless_the_model_or_an_option_is_another(tmp_path, calls):
    command = [str(tmp_path), "--lengths", "4096", "--settings", "safe,mean", "--sparsity", "0.5"]
    ruler_grid.main(command)
    stored, asked = (tmp_path / "grid.json").read_text(), len(calls.seen)
    ruler_grid.main(command)
    assert len(calls.seen) == asked
    assert (tmp_path / "grid.json").read_text() == stored
    ruler_grid.main([*command, "--count", "3"])
    assert len(calls.seen) == asked + 3
    path = tmp_path / "answers/mean-4096-0.5/summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": "others"}))
    ruler_grid.main([*command, "--count", "3"])
    assert len(calls.seen) == asked + 5


def test_what_failed_is_named_and_left_out(tmp_path, calls):
    calls.failing = ("mean-16384-0.5",)
    command = [str(tmp_path), "--lengths", "4096,16384", "--settings", "safe,mean", "--sparsity", "0.3,0.5"]
    with pytest.raises(SystemExit, match=r"not finished: mean-16384-0\.5; the same command goes on"):
        ruler_grid.main(command)
    settings = json.loads((tmp_path / "grid.json").read_text())["settings"]
    assert [len(one["averages"][0]["by_length"]) for one in settings.values()] == [2, 1]
    calls.failing = ()
    ruler_grid.main(command)
    settings = json.loads((tmp_path / "grid.json").read_text())["settings"]
    assert [len(one["averages"][0]["by_length"]) for one in settings.values()] == [2, 2]


def test_nothing_is_started_once_the_time_is_up(tmp_path, calls):
    with pytest.raises(SystemExit, match="dense: not finished"):
        ruler_grid.main([str(tmp_path), "--seconds", "-1"])
    assert calls.seen == []


def test_an_unknown_setting_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        ruler_grid.main([str(tmp_path), "--settings", "safe,xattention"])
    assert "must be of dense,safe," in (error := capsys.readouterr().err)
    assert ",all,ablations,orders,betas, got xattention" in error


def test_ablations_change_one_option_of_clusters_each(tmp_path, calls):
    ruler_grid.main([str(tmp_path), "--lengths", "4096", "--settings", "dense,ablations", "--sparsity", "0.9"])
    usual, *others = (dataclasses.asdict(read_cells(options, Sources())[1].config) for options, _, _ in calls.seen[1:])
    assert (usual["representatives"], usual["refinements"], usual["peak"], usual["keep_first"]) == (16, 2, True, 1)
    changed = [{name: value for name, value in one.items() if value != usual[name]} for one in others]
    assert changed == [
        *({"representatives": number} for number in (1, 4, 8, 32)), {"refinements": 0}, {"refinements": 1},
        {"peak": False}, {"keep_first": 0}, {"keep_first": 2}, {"budget": "head"}, {"sort": "k", "segment": 256},
        {"score": "clusters-variance", "beta": 0.5},
    ]  # fmt: skip


def test_orders_and_weights_change_one_option_of_the_papers_setting(tmp_path, calls):
    ruler_grid.main([str(tmp_path), "--lengths", "4096", "--settings", "orders,betas", "--sparsity", "0.5"])
    cells = [read_cells(options, Sources())[1].config for options, _, _ in calls.seen[1:]]
    found = {(cell.sort, cell.segment, cell.beta) for cell in cells}
    assert len(found) == len(cells) - 1  # each of both groups once; unsorted without and with the first block
    assert found == {
        ("none", None, 0.5), ("k", 256, 0.5), ("k", 1024, 0.5), ("qk", 256, 0.5), ("qk", 1024, 0.5),
        *((*order, beta) for order in (("none", None), ("qk", 1024)) for beta in (0.0, 0.1, 1.0, 2.0)),
    }  # fmt: skip
    assert {cell.score for cell in cells} == {"covariance"}
    assert [cell.keep_first for cell in cells] == [0] * 5 + [1] + [0] * 4 + [1] * 4


def test_answers_are_written_as_the_sampler_says(tmp_path, calls):
    for name, expected in (("cached", (8, 128, "dual")), ("uncached", (32, 32, "none"))):
        call = [str(tmp_path / name), "--lengths", "4096", "--settings", "mean", "--sampler", name]
        ruler_grid.main(call)
        cells = read_cells(calls.seen[-1][0], Sources())
        (sampler,) = {cell.sampler for cell in cells}
        assert (sampler.block_length, sampler.steps, sampler.cache) == expected
    assert sampler == RULER_SAMPLER


def test_answers_at_other_sparsities_are_known_to_a_job(tmp_path, calls):
    command = [str(tmp_path), "--lengths", "4096", "--settings", "paper,unsorted"]
    ruler_grid.main([*command, "--sparsity", "0.5,0.9"])
    before = tmp_path / "answers/paper-4096-0.5+0.9/rank0.jsonl"
    before.write_text("paper's\nan answer that is being wri")
    ruler_grid.main([*command, "--sparsity", "0.5"])
    known = tmp_path / "answers/paper-4096-0.5/rank1.jsonl"
    assert sorted(known.read_text().splitlines()) == ["an answer", "paper's"]
