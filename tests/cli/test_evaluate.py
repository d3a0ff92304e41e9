"""`baatt evaluate ruler`: runs that are cut, grow or are shared by processes, its tables and its refusals."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from baatt.cli.main import main
from baatt.cli.ruler_tables import AnswerBar, setting_name, settings_text, show_averages, show_length
from baatt.config import BAAttConfig, Policy
from baatt.evaluation.ablation import Cell
from baatt.evaluation.ruler_answers import RulerAnswer
from baatt.evaluation.ruler_run import Work
from baatt.evaluation.ruler_summary import make_averages, make_records
from baatt.lab import loading
from tests.evaluation.harness import tiny_folder

SHORT = ["--gen-length", "32", "--block-length", "16", "--steps", "4", "--threshold", "none"]
DIALS = ["--block-size", "16", "--segment", "64", "--dense-layers", "0"]
TIMED = {"seconds_per_answer", "tokens_per_second"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return tmp_path


def command(model, *more):
    tasks = ["--tasks", "niah_single_1,niah_multivalue", "--lengths", "700,512", "--count", "3"]
    return ["evaluate", "ruler", "--model", model, *tasks, *SHORT, *DIALS, *more]


def untimed(records):
    return [{name: value for name, value in one.items() if name not in TIMED} for one in records]


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_its_summary_and_what_a_later_run_reuses(model, here, capsys):
    assert main(command(model, "--sparsity", "0.5", "--json", "first.json")) == 0
    out, error = capsys.readouterr()
    assert "RULER at 512 tokens, tiny, 3 samples a task" in out
    assert "Average, 2 of 13 tasks" in out
    assert out.endswith("Summary: first.json, answers: first.answers\n")
    assert "made for up to 256 tokens, --lengths go up to 700" in error
    assert re.search(r"512 niah_single_1 dense: 1/24 answers, \d:\d\d:\d\d left", error)
    stored = json.loads((here / "first.json").read_text())
    assert {"command", "commit", "device", "versions"} <= stored.keys()
    assert stored["command"].startswith("baatt evaluate ruler --model ")
    fixed = {
        "study": "ruler", "model": "tiny", "dtype": "float32", "seed": 42, "count": 3, "dense_layers": [0],
        "batch_size": 1, "chat": False, "max_sequence_length": 256, "processes": 1, "impl": "auto",
    }  # fmt: skip
    assert fixed.items() <= stored.items()
    assert stored["sources"]["words"] == "heldout"
    assert (stored["sampler"]["steps"], stored["sampler"]["threshold"]) == (4, None)
    assert re.fullmatch("[0-9a-f]{16}", stored["weights"])
    places = [(one["length"], one["task"], setting_name(one["config"])) for one in stored["records"]]
    assert places == [
        (length, task, name)
        for length in (512, 700)
        for task in ("niah_single_1", "niah_multivalue")
        for name in ("dense", "50 %")
    ]
    assert stored["records"][1]["config"] == {
        "block_size": 16, "sparsity": 0.5, "sort": "k", "segment": 64, "score": "covariance", "beta": 0.5,
    }  # fmt: skip
    lines = (here / "first.answers/rank0.jsonl").read_text().splitlines()
    assert len(lines) == 24
    wanted = {"task", "length", "number", "setting", "text", "score", "whole", "seconds", "evaluations"}
    assert wanted <= json.loads(lines[0])["answer"].keys()

    more = command(model, "--sparsity", "0,0.5,0.75", "--score", "covariance,oracle", "--store", "first.answers")
    assert main([*more, "--json", "second.json"]) == 0
    error = capsys.readouterr().err
    assert "512 niah_single_1 75 %: 1/36 answers" in error
    assert "dense" not in error.replace("--dense-layers", "")
    second = json.loads((here / "second.json").read_text())
    names = [setting_name(each["config"]) for each in second["averages"]]
    assert names == ["dense", "50 %", "75 %", "50 % oracle", "75 % oracle"]
    kept = [one for one in second["records"] if setting_name(one["config"]) in ("dense", "50 %")]
    assert kept == stored["records"]
    assert all(one["config"]["beta"] == 0 for one in second["records"] if one["config"].get("score") == "oracle")


def test_a_run_that_was_cut_goes_on(model, here, capsys):
    argv = command(model, "--json", "run.json")
    assert main(argv) == 0
    whole = json.loads((here / "run.json").read_text())
    answers = here / "run.answers/rank0.jsonl"
    data = answers.read_bytes()
    answers.write_bytes(data[: len(data) // 2])
    left = 24 - (data[: len(data) // 2]).count(b"\n")
    capsys.readouterr()
    assert main(argv) == 0
    assert f"1/{left} answers" in capsys.readouterr().err
    assert answers.read_bytes().count(b"\n") == 24
    again = json.loads((here / "run.json").read_text())
    assert untimed(again["records"]) == untimed(whole["records"])
    assert again["averages"] == whole["averages"]
    capsys.readouterr()
    assert main(argv) == 0
    assert " left" not in capsys.readouterr().err
    assert json.loads((here / "run.json").read_text()) == again


def test_two_processes_give_the_same_summary(model, here):
    assert main(command(model, "--json", "one.json")) == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "baatt"]
    both = [sys.executable, *launcher, *command(model, "--json", "two.json", "--workers", "1")]
    # Records name the threads of the device; torchrun would give its processes one each.
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.run(both, check=True, capture_output=True, text=True, timeout=240, cwd=here, env=threads)
    assert run.stdout.count("RULER at 512 tokens") == run.stdout.count("Summary: two.json") == 1
    assert run.stderr.count("made for up to 256 tokens") == 1
    one, two = (json.loads((here / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert untimed(two["records"]) == untimed(one["records"])
    assert two["averages"] == one["averages"]
    numbers = [
        {json.loads(line)["answer"]["number"] for line in (here / f"two.answers/rank{rank}.jsonl").open()}
        for rank in (0, 1)
    ]
    assert numbers == [{0, 2}, {1}]
    # One process alone goes on with what both have kept.
    assert main(command(model, "--json", "three.json", "--store", "two.answers")) == 0
    assert untimed(json.loads((here / "three.json").read_text())["records"]) == untimed(one["records"])
    assert len((here / "two.answers/rank0.jsonl").read_text().splitlines()) == 16


def test_processes_with_different_options_stop(model, here):
    (here / "start.py").write_text(
        "import os, sys\nfrom baatt.cli.main import main\n"
        "sys.exit(main([*sys.argv[1:], '--seed', os.environ['RANK']]))\n"
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "start.py"]
    both = [sys.executable, *launcher, *command(model)]
    run = subprocess.run(both, capture_output=True, text=True, timeout=240, cwd=here, check=False)
    assert run.returncode != 0
    assert "baatt: all processes must run the same model with the same options" in run.stderr
    assert not (here / "ruler.json").exists()


def test_the_shipped_model_answers(here):
    assert main(["evaluate", "ruler", "--tasks", "niah_multikey_1", "--lengths", "512", "--count", "1"]) == 0
    stored = json.loads((here / "ruler.json").read_text())
    assert stored["model"] == "needle-18m"
    assert len(stored["weights"].split()) == 3
    dense, sparse = stored["records"]  # which answers survive skipping blocks is measured, not promised
    assert dense["accuracy"] == 1
    assert dense["sparsity_achieved"] == 0 < sparse["sparsity_achieved"]


def test_answers_that_are_there_are_counted_without_the_memory_to_give_them(model, here, capsys, monkeypatch):
    argv = ["evaluate", "ruler", "--model", model, *SHORT, "--tasks", "niah_single_1", "--lengths", "512"]
    assert main([*argv, "--count", "1"]) == 0
    before = (here / "ruler.json").read_text()
    (here / "ruler.json").unlink()
    monkeypatch.setattr(loading, "free_bytes", lambda device: 0)
    assert main([*argv, "--count", "1"]) == 0
    assert json.loads((here / "ruler.json").read_text()) == json.loads(before)
    assert main([*argv, "--count", "2"]) == 2
    assert "512 tokens must fit into memory" in capsys.readouterr().err


def test_dense_layers_everywhere_are_said(model, here, capsys):
    argv = ["evaluate", "ruler", "--model", model, *SHORT, "--tasks", "niah_single_1", "--lengths", "512"]
    for layers, said in (("0", False), ("0,1", True)):
        assert main([*argv, "--count", "1", "--block-size", "32", "--dense-layers", layers]) == 0
        assert ("No attention call skipped a block" in capsys.readouterr().err) == said


def test_chat_questions_and_a_text_of_ones_own(model, here, capsys):
    documents = [{"context": f"The {word} house is large.", "qas": [
        {"question": f"Which house, {word}?", "is_impossible": False, "answers": [{"text": word}]}
    ]} for word in ("red", "green", "blue")]  # fmt: skip
    (here / "squad.json").write_text(json.dumps({"data": [{"paragraphs": documents}]}))
    (here / "essay.txt").write_text("Nothing else stands here. " * 300)
    sources = ["--squad", "squad.json", "--essay", "essay.txt", "--chat", "--batch-size", "2", "--sparsity", "0"]
    argv = ["evaluate", "ruler", "--model", model, *SHORT, *sources, "--tasks", "qa_1,niah_single_2", "--count", "3"]
    assert main([*argv, "--lengths", "512"]) == 0
    stored = json.loads((here / "ruler.json").read_text())
    assert [one["task"] for one in stored["records"]] == ["qa_1", "niah_single_2"]
    assert (stored["sources"]["squad"], stored["chat"], stored["batch_size"]) == ("squad.json", True, 2)
    assert "batches of 2, chat template; weights in float32." in capsys.readouterr().out
    assert main([*argv, "--lengths", "512", "--count", "4"]) == 2
    assert "count must be at most 3, the questions that qa_1 has, got 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", "sudoku"], "--tasks: tasks must be all, needles or of niah_single_1,"),
        (["--tasks", "qa_2"], "tasks must have their data sets: qa_2 needs hotpot, got none"),
        (["--tasks", "qa_1", "--squad", "missing.json"], "missing.json must be a local copy of"),
        (["--essay", "missing"], "essay must be a file or a folder of .txt files, got missing, which does not exist"),
        (["--score", "best"], "--score must be of covariance,"),
        (["--sparsity", "half"], "--sparsity must be a number, got 'half'"),
        (["--sparsity", "1"], "sparsity must be in [0, 1), got 1.0"),
        (["--lengths", "4k,x"], "--lengths must be positive numbers of tokens such as 4096,8K, got 'x'"),
        (["--lengths", "0"], "--lengths must be positive numbers of tokens such as 4096,8K, got '0'"),
        (["--lengths", "200"], "length must hold the smallest niah_single_1 sample"),
        (["--lengths", "999999999"], "999999999 tokens must fit into memory"),
        (["--count", "0"], "--count must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--workers", "-1"], "--workers must be at least 0, got -1"),
        (["--threshold", "2"], "threshold must be in [0, 1], got 2"),
        (["--threshold", "x"], "--threshold must be a number, or \"none\", got 'x'"),
        (["--steps", "3"], "steps must be a multiple of gen_length / block_length = 2, got 3"),
        (["--dense-layers", "2"], "--dense-layers must lie in [-2, 2) for 2 layers, got 2"),
        (["--impl", "hopper"], "--impl hopper is refused"),
        (["--model", "missing"], "missing: no such folder"),
        (["--json", "/nowhere/x.json"], "--json must lie in an existing folder, /nowhere is none"),
        (["--json", "."], "--json must be a file, . is a folder"),
        (["--store", "/dev/null/x"], "--store must lie in a folder that can be written, /dev/null is none"),
    ],
)
def test_refusals(argv, message, model, here, capsys):
    usual = ["--tasks", "niah_single_1", "--lengths", "512", "--count", "1", "--model", model]
    assert main(["evaluate", "ruler", *SHORT, *usual, *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.splitlines()[-1].startswith("baatt: ")
    assert [entry.name for entry in here.iterdir()] in ([], ["ruler.answers"])
    assert not any(here.glob("*/*"))


# --- tables ----------------------------------------------------------------------------------------------------------

CONFIGS = (None, BAAttConfig(sparsity=0.5), BAAttConfig(sparsity=0.7, beta=0.0))
HEADER = {
    "model": "m", "dtype": "float32", "batch_size": 1, "chat": False, "dense_layers": [0, 1],
    "sampler": {"steps": 32, "gen_length": 128, "block_length": 32, "threshold": 0.9, "cache": "none"},
}  # fmt: skip
SCORES = {"a": [[1.0] * 4, [1.0, 1.0, 0.0, 0.0], [1.0] * 4], "b": [[0.5] * 4, [0.5, 0.0, 0.0, 1.0], [0.25] * 4]}


def summary(lengths=(512,), configs=CONFIGS):
    cells = [
        Cell(task, length, config, "dense" if config is None else "covariance" if config.beta else "oracle")
        for length in lengths
        for task in SCORES
        for config in configs
    ]
    answers = [
        [
            RulerAnswer(cell.task, cell.length, number, {}, "", [], score, score, 0.5, 16, 4, 0.4, "c", "here")
            for number, score in enumerate(SCORES[cell.task][CONFIGS.index(cell.config)])
        ]
        for cell in cells
    ]
    records = make_records(cells, answers, Policy(dense_layers=(0, 1)))
    return records, make_averages(records)


def lines_of(table):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(table)
    found = [re.sub(r"[┃│]", "|", line).strip() for line in console.export_text().splitlines()]
    return [re.sub(r" +", " ", line) for line in found if line and line[0] not in "┏┡├└"]


def test_the_table_of_a_length():
    records, averages = summary()
    assert lines_of(show_length(HEADER, records, averages, 512)) == [
        "RULER at 512 tokens, m, 4 samples a task",
        "| task | dense | 50 % | 70 % oracle |",
        "| a | 100.0 [51.0-100.0] | 50.0 [15.0-85.0] | 100.0 [51.0-100.0] |",
        "| | | 2 lost, 0 won, p 0.5 | 0 lost, 0 won, p 1 |",
        "| b | 50.0 [50.0-50.0] | 37.5 [0.0-75.0] | 25.0 [25.0-25.0] |",
        "| | | -12.5 [-50.0, +25.0] | -25.0 [-25.0, -25.0] |",
        "| average, 2 of 13 tasks | 75.0 [50.5-75.0] | 43.8 [18.1-69.4] | 62.5 [38.0-62.5] |",
        "| | | -31.2 [-62.5, -6.2] | -12.5 [-12.5, -12.5] |",
        "| whole words only | 75.0 | 43.8 | 62.5 |",
        "| seconds a sample | 0.5 | 0.5 | 0.5 |",
        "| tokens/s | 32.0 | 32.0 | 32.0 |",
        "| block pairs skipped | 40.0% | 40.0% | 40.0% |",
        "Score in percent [95 % interval]; below, samples lost and won against dense attention with",
        "McNemar's p, or the difference [95 % interval] where a score is a share.",
    ]


def test_the_table_of_averages():
    _, averages = summary((512, 1024))
    assert lines_of(show_averages(averages)) == [
        "Average, 2 of 13 tasks",
        "| setting | 512 | 1024 | mean | wAvg (inc) | wAvg (dec) |",
        "| dense | 75.0 | 75.0 | 75.0 | 75.0 | 75.0 |",
        "| 50 % | 43.8 | 43.8 | 43.8 | 43.8 | 43.8 |",
        "| 70 % oracle | 62.5 | 62.5 | 62.5 | 62.5 | 62.5 |",
    ]


def test_the_settings_in_words():
    text = (
        "Answers: 32 steps for 128 tokens in blocks of 32, threshold 0.9, cache none, batches of 1; weights in float32."
    )
    assert settings_text(HEADER, summary(configs=[None])[0]) == text
    sparse = "Sparse: k sorted in 256, beta 0.5, blocks of 128, layers that stay dense: 0, 1."
    assert settings_text(HEADER, summary()[0]) == f"{text}\n{sparse}"


def test_the_bar_counts_tokens(monkeypatch):
    cells = [Cell("a", length, None, "dense") for length in (512, 1024)]
    works = [Work("a", cell.length, ((cell, (0, 1)),)) for cell in cells]
    lines, clock = [], iter([0.0, 10.0, 20.0])
    monkeypatch.setattr("baatt.cli.ruler_tables.time.monotonic", lambda: next(clock))
    with open("/dev/null", "w") as nowhere:  # noqa: PTH123
        console = Console(file=nowhere)
        monkeypatch.setattr(console, "print", lambda text, **_: lines.append(text))
        with AnswerBar(works, console, shown=True) as bar:
            bar.advance(cells[0], 1)
            bar.advance(cells[0], 1)
            bar.advance(cells[1], 1)
    assert lines == ["512 a dense: 1/4 answers, 0:00:50 left", "1024 a dense: 3/4 answers, 0:00:10 left"]
