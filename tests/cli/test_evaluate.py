"""`baatt evaluate ruler`: runs that are cut, grow or are shared by processes, its tables and its refusals."""

import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from baatt.cli.main import main
from baatt.cli.ruler_report import answer_bar, setting_names, show_averages, show_length
from baatt.config import BAAttConfig, Policy
from baatt.lab import loading
from baatt.lab.answers import AnswerStore
from baatt.lab.describe import settings_text
from baatt.lab.options import variants
from baatt.lab.records import stored_text
from baatt.lab.ruler.cells import Cell, make_cells
from baatt.lab.ruler.model import RulerAnswer
from baatt.lab.ruler.summary import make_averages, make_records
from tests.lab.lm_eval.harness import tiny_folder
from tests.processes import run_script
from tests.settings import sorted_config

SHORT = ["--gen-length", "32", "--block-length", "16", "--steps", "4", "--threshold", "none"]
DIALS = ["--preset", "paper", "--block-size", "16", "--segment", "64", "--dense-layers", "0"]
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
    assert "RULER at 512 tokens, tiny, samples a task: 3" in out
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
    places = [(one["length"], one["task"], one["config"].get("sparsity")) for one in stored["records"]]
    assert places == [
        (length, task, name)
        for length in (512, 700)
        for task in ("niah_single_1", "niah_multivalue")
        for name in (None, 0.5)
    ]
    assert BAAttConfig(**stored["records"][1]["config"]) == sorted_config(16, 0.5, "qk", 64)
    lines = (here / "first.answers/rank0.jsonl").read_text().splitlines()
    assert len(lines) == 24
    wanted = {"task", "length", "number", "setting", "text", "score", "whole", "seconds", "evaluations"}
    assert wanted <= json.loads(lines[0])["answer"].keys()

    more = command(model, "--sparsity", "0,0.5,0.75", "--score", "covariance,oracle", "--store", "first.answers")
    assert main([*more, "--json", "second.json"]) == 0
    error = capsys.readouterr().err
    assert "512 niah_single_1 beta 0.5, 75 %: 1/36 answers" in error
    assert "dense" not in error.replace("--dense-layers", "")
    second = json.loads((here / "second.json").read_text())
    names = ["dense", "beta 0.5, 50 %", "beta 0.5, 75 %", "oracle, 50 %", "oracle, 75 %"]
    assert setting_names(second["averages"]) == names
    asked_before = [one["config"] for one in stored["records"]]
    kept = [one for one in second["records"] if one["config"] in asked_before]
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


#: What both processes do one after the other in one world: a run with different seeds, then the same run.
START = """
import json, os, sys
from baatt.cli import evaluate
from baatt.cli.main import main
if __name__ == "__main__":
    different, same = json.loads(sys.argv[1])
    leave, evaluate.leave_process_group = evaluate.leave_process_group, lambda: None
    print("refused with", main([*different, "--seed", os.environ["RANK"]]), flush=True)
    evaluate.leave_process_group = leave
    sys.exit(main(same))
"""


def test_two_processes_give_the_same_summary_or_stop_if_their_options_differ(model, here):
    few = ["--tasks", "niah_multivalue", "--lengths", "512"]
    assert main(command(model, *few, "--json", "one.json")) == 0
    (here / "start.py").write_text(START)
    calls = [command(model, *few, "--json", f"{name}.json", "--workers", "0") for name in ("zero", "two")]
    out, error = run_script("start.py", json.dumps(calls), folder=here)
    assert out.count("refused with 2") == 2
    assert error.count("baatt: all processes must run the same model with the same options") == 2
    assert not (here / "zero.json").exists()
    assert out.count("RULER at 512 tokens") == out.count("Summary: two.json") == 1
    assert error.count("made for up to 256 tokens") == 1  # once a run, and not of one that is refused
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
    assert main(command(model, *few, "--json", "three.json", "--store", "two.answers")) == 0
    assert untimed(json.loads((here / "three.json").read_text())["records"]) == untimed(one["records"])
    assert len((here / "two.answers/rank0.jsonl").read_text().splitlines()) == 4


def test_the_shipped_model_answers(here):
    assert main(["evaluate", "ruler", "--tasks", "niah_multikey_1", "--lengths", "512", "--count", "1"]) == 0
    stored = json.loads((here / "ruler.json").read_text())
    assert stored["model"] == "needle-18m"
    assert len(stored["weights"].split()) == 2
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


def test_a_grid_its_attention_mass_and_its_picture(here, capsys):
    grid = ["--dial", "block_size=16", "--dial", "segment=64", "--dial", "sort=none,qk"]
    grid += [
        "--preset",
        "paper",
        "--dial",
        "score=covariance,oracle",
        "--dense-layers",
        "none",
        "--recall-samples",
        "1",
    ]
    argv = ["evaluate", "ruler", "--tasks", "niah_multikey_1", "--lengths", "320", "--count", "1", *grid]
    assert main([*argv, "--json", "grid.json", "--plot", "grid.png"]) == 0
    stored = json.loads((here / "grid.json").read_text())
    assert [one["config"].get("score") for one in stored["records"]] == [None, *["covariance", "oracle"] * 2]
    dense, *sparse = stored["records"]
    assert (dense["accuracy"], "recall_mean" in dense) == (1, False)
    recalls = {(one["config"]["sort"], one["config"]["score"]): one["recall_mean"] for one in sparse}
    assert recalls["none", "oracle"] > recalls["none", "covariance"] > 0.5
    names = ["dense", "unsorted, beta 0.5, 50 %", "unsorted, oracle, 50 %", "qk in 64, beta 0.5, 50 %"]
    assert setting_names(stored["averages"]) == [*names, "qk in 64, oracle, 50 %"]
    assert re.search(rf"attention mass kept +│ +- │ +{sparse[0]['recall_mean']:.3f} │", capsys.readouterr().out)
    assert (here / "grid.png").stat().st_size > 10_000
    assert main(["evaluate", "ruler", "--draw", "grid.json", "--plot", "again.png"]) == 0
    assert (here / "again.png").read_bytes() == (here / "grid.png").read_bytes()
    assert main([*argv, "--json", "grid.json"]) == 0  # nothing is asked again
    assert json.loads((here / "grid.json").read_text())["records"] == stored["records"]


def test_a_grid_of_samplers_and_dense_layers(model, here, capsys):
    argv = ["evaluate", "ruler", "--model", model, *SHORT, *DIALS, "--tasks", "niah_single_1", "--lengths", "512"]
    assert main([*argv, "--count", "1", "--dial", "cache=none,dual", "--dial", "dense_layers=none,0"]) == 0
    stored = json.loads((here / "ruler.json").read_text())
    assert setting_names(stored["averages"]) == [
        f"{name}, cache {cache}"
        for cache in ("none", "dual")
        for name in ("dense", "50 %, dense layers none", "50 %, dense layers 0")
    ]
    out = capsys.readouterr().out
    assert "setting" in out  # many settings are rows
    assert "dense layers 0, cache dual" in out


@pytest.mark.parametrize("name", ["ablation_beta_h200", "ablation_score_h200", "ruler_needle-18m"])
def test_files_of_earlier_versions_are_drawn(name, here):
    stored = json.loads(stored_text(Path(__file__).resolve().parents[2] / f"benchmarks/results/{name}.json"))
    place = stored["records"][0]["task"], stored["records"][0]["length"]
    stored["records"] = [one for one in stored["records"] if (one["task"], one["length"]) == place]
    (here / "old.json").write_text(json.dumps(stored))
    assert main(["evaluate", "ruler", "--draw", "old.json", "--plot", "old.png"]) == 0
    assert (here / "old.png").stat().st_size > 10_000


def test_ctrl_c_says_what_is_kept_and_the_same_command_goes_on(model, here, capsys, monkeypatch):
    argv, put = command(model, "--sparsity", "0.5", "--json", "cut.json"), AnswerStore.put

    def cut(store, key, answer):
        put(store, key, answer)
        if len(store) % 5 == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AnswerStore, "put", cut)
        for kept in (5, 10):
            assert main(argv) == 130
            said = f"baatt: interrupted: {kept} of 24 answers in cut.answers are kept; the same command goes on"
            assert said + " from there: baatt evaluate ruler" in capsys.readouterr().err.splitlines()[-1]
    assert main(argv) == 0
    assert len((here / "cut.answers/rank0.jsonl").read_text().splitlines()) == 24


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", "sudoku"], "--tasks: tasks must be all, needles or of niah_single_1,"),
        (["--tasks", "qa_2"], "tasks must have their data sets: qa_2 needs --hotpot FILE, got none"),
        (["--tasks", "qa_1", "--squad", "missing.json"], "missing.json must be a local copy of"),
        (["--essay", "missing"], "essay must be a file or a folder of .txt files, got missing, which does not exist"),
        (["--score", "best"], "--score must be one of ['covariance',"),
        (["--sparsity", "half"], "--sparsity must be a number, got 'half'"),
        (["--sparsity", "1"], "--sparsity must be in [0, 1), got 1.0"),
        (["--dial", "gamma=1"], "--dial must be NAME=VALUE,... once for each of block_size,"),
        (["--dial", "beta"], "--dial must be NAME=VALUE,..."),
        (["--dial", "beta=0", "--dial", "beta=1"], "--dial must be NAME=VALUE,... once"),
        (["--dial", "beta=x"], "--dial beta must be a number, got 'x'"),
        (["--dial", "beta=-1"], "--beta must be at least 0"),
        (["--dial", "score=best"], "--dial score must be one of ['covariance',"),
        (["--dial", "cache=all"], "--dial cache must be one of ['none',"),
        (["--dial", "dense_layers=0+9"], "--dense-layers must lie in [-2, 2)"),
        (["--draw", "x.json"], "--draw needs --plot FILE.png"),
        (["--draw", "x.json", "--plot", "x.png"], "x.json"),
        (["--plot", "x.jpg"], "--plot must end in .png, got 'x.jpg'"),
        (["--recall-samples", "-1"], "--recall-samples must be at least 0, got -1"),
        (["--lengths", "4k,x"], "--lengths must be positive numbers of tokens such as 4096,8K, got 'x'"),
        (["--lengths", "0"], "--lengths must be positive numbers of tokens such as 4096,8K, got '0'"),
        (["--lengths", "200"], "--lengths must hold the smallest niah_single_1 sample"),
        (["--lengths", "999999999"], "999999999 tokens must fit into memory"),
        (["--count", "0"], "--count must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--workers", "-1"], "--workers must be at least 0, got -1"),
        (["--threshold", "2"], "threshold must be in [0, 1], got 2"),
        (["--threshold", "x"], "--threshold must be a number, or \"none\", got 'x'"),
        (["--steps", "3"], "steps must be a multiple of gen_length / block_length = 2, got 3"),
        (["--dense-layers", "2"], "--dense-layers must lie in [-2, 2)"),
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

CONFIGS = (sorted_config(sparsity=0.5), sorted_config(sparsity=0.7, score="oracle"))
HEADER = {
    "model": "m", "dtype": "float32", "batch_size": 1, "chat": False, "dense_layers": [0, 1],
    "sampler": {"steps": 32, "gen_length": 128, "block_length": 32, "threshold": 0.9, "cache": "none"},
}  # fmt: skip
SCORES = {"a": [[1.0] * 4, [1.0, 1.0, 0.0, 0.0], [1.0] * 4], "b": [[0.5] * 4, [0.5, 0.0, 0.0, 1.0], [0.25] * 4]}


def summary(lengths=(512,), configs=CONFIGS):
    cells = make_cells(list(SCORES), lengths, configs, [Policy(dense_layers=(0, 1))])
    answers = [
        [
            RulerAnswer(cell.task, cell.length, number, {}, "", [], score, score, 0.5, 16, 4, 0.4, "c", "here")
            for number, score in enumerate(SCORES[cell.task][[0, 0.5, 0.7].index(cell.options.get("sparsity", 0))])
        ]
        for cell in cells
    ]
    records = make_records(cells, answers)
    return records, make_averages(records)


def lines_of(table):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(table.rich())
    found = [re.sub(r"[┃│]", "|", line).strip() for line in console.export_text().splitlines()]
    return [re.sub(r" +", " ", line) for line in found if line and line[0] not in "┏┡├└"]


def test_the_table_of_a_length():
    records, averages = summary()
    assert lines_of(show_length(HEADER, records, averages, 512)) == [
        "RULER at 512 tokens, m, samples a task: 4",
        "| task | dense | beta 0.5, 50 % | oracle, 70 % |",
        "| a | 100.0 [51.0-100.0] | 50.0 [15.0-85.0] | 100.0 [51.0-100.0] |",
        "| | | 2 lost, 0 won, p 0.5 | 0 lost, 0 won, p 1 |",
        "| b | 50.0 [25.5-74.5] | 37.5 [0.0-87.2] | 25.0 [12.8-61.7] |",
        "| | | -12.5 [-74.5, +61.7] | -25.0 [-61.7, +36.2] |",
        "| average, 2 of 13 tasks | 75.0 [47.6-87.2] | 43.8 [18.1-74.2] | 62.5 [37.3-80.9] |",
        "| | | -31.2 [-71.1, +30.6] | -12.5 [-43.1, +26.7] |",
        "| whole words only | 75.0 | 43.8 | 62.5 |",
        "| seconds a sample | 0.5 | 0.5 | 0.5 |",
        "| tokens/s | 32.0 | 32.0 | 32.0 |",
        "| block pairs skipped | 40.0% | 40.0% | 40.0% |",
        "Score in percent [95 % interval]; below, samples lost and won against dense attention with",
        "McNemar's p, or the difference [95 % interval] where a score is a share. A setting is named",
        "by the share of key blocks that its sparse layers skip; the block pairs skipped are those of",
        "all layers, dense ones included. Whole words only: an answer counts where no further letter",
        "or digit stands next to it.",
    ]


def test_the_table_of_averages():
    _, averages = summary((512, 1024))
    assert lines_of(show_averages(averages)) == [
        "Average, 2 of 13 tasks",
        "| setting | 512 | 1024 | mean | wAvg (inc) | wAvg (dec) |",
        "| dense | 75.0 | 75.0 | 75.0 | 75.0 | 75.0 |",
        "| beta 0.5, 50 % | 43.8 | 43.8 | 43.8 | 43.8 | 43.8 |",
        "| oracle, 70 % | 62.5 | 62.5 | 62.5 | 62.5 | 62.5 |",
        "In percent. wAvg weighs the lengths 1, 2, 3 ...: (inc) from the",
        "shortest on, (dec) from the longest on.",
    ]


def test_the_settings_in_words():
    text = (
        "Answers: 32 steps for 128 tokens in blocks of 32, threshold 0.9, cache none, batches of 1; weights in float32."
    )
    assert settings_text(HEADER, summary(configs=[])[0]) == text
    sparse = "Sparse: k in 256, beta 0.5, blocks of 128, layers that stay dense: 0, 1."
    assert settings_text(HEADER, summary()[0]) == f"{text}\n{sparse}"


def test_the_bar_counts_tokens(monkeypatch):
    cells = [Cell("a", length) for length in (512, 1024)]
    places = {("a", cell.length): {cell: [0, 1]} for cell in cells}
    lines, clock = [], iter([0.0, 10.0, 20.0])
    monkeypatch.setattr("baatt.cli.ruler_report.time.monotonic", lambda: next(clock))
    with open("/dev/null", "w") as nowhere:  # noqa: PTH123
        console = Console(file=nowhere)
        monkeypatch.setattr(console, "print", lambda text, **_: lines.append(text))
        with answer_bar(places, console, shown=True) as advance:
            advance(cells[0], 1)
            advance(cells[0], 1)
            advance(cells[1], 1)
    assert lines == ["512 a dense: 1/4 answers, 0:00:50 left", "1024 a dense: 3/4 answers, 0:00:10 left"]


def test_settings_have_different_names():
    configs = variants(sorted_config(), {"score": ["covariance", "covariance-8", "oracle"], "beta": [0.0, 0.5]})
    cells = make_cells(["a"], [512], configs)
    names = setting_names([{"config": cell.options, "dense_layers": []} for cell in cells])
    assert names == [
        "dense", "beta 0, 50 %", "beta 0.5, 50 %", "covariance-8, 50 %, beta 0", "covariance-8, 50 %, beta 0.5",
        "oracle, 50 %",
    ]  # fmt: skip
