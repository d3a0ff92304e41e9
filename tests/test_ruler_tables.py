"""The Markdown of a stored summary of `baatt evaluate ruler`."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import ruler_tables

from baatt.config import Policy
from baatt.lab.ruler.cells import Cell
from baatt.lab.ruler.model import RulerAnswer
from baatt.lab.ruler.summary import make_averages, make_records
from tests.settings import sorted_config

SCORES = {
    ("niah_single_1", None): [1.0] * 4,
    ("niah_single_1", 0.5): [1.0, 1.0, 0.0, 0.0],
    ("vt", None): [0.8] * 4,
    ("vt", 0.5): [0.8, 0.8, 0.4, 1.0],
}


def summary(lengths, device="here"):
    cells = [
        Cell(task, length, sparsity and sorted_config(sparsity=sparsity), Policy(dense_layers=(0,)))
        for length in lengths
        for task, sparsity in SCORES
    ]
    answers = [
        [
            RulerAnswer(cell.task, cell.length, number, {}, "", [], score, score, 0.5, 16, 4, 0.4, "c" * 40, device)
            for number, score in enumerate(SCORES[cell.task, cell.config and cell.config.sparsity])
        ]
        for cell in cells
    ]
    records = make_records(cells, answers)
    return {
        "study": "ruler", "command": "baatt evaluate ruler", "commit": "d" * 40, "device": "here",
        "versions": {"torch": "2"}, "model": "m", "dtype": "bfloat16", "seed": 42, "count": 4, "batch_size": 8,
        "chat": False, "dense_layers": [0], "sources": {"words": "full", "essay": "/a/b/essays.json", "squad": None},
        "sampler": {"steps": 32, "gen_length": 128, "block_length": 32, "threshold": None, "cache": "dual"},
        "averages": make_averages(records), "records": records,
    }  # fmt: skip


CAPTION = (
    "RULER's score in percent [95 % interval], n = 4 samples of each task (seed 42; words full, essay essays.json), "
    "`m`. Answers: 32 steps for 128 tokens in blocks of 32, no threshold, cache dual, batches of 8; weights in "
    "bfloat16."
)
SOURCE = "Command: `baatt evaluate ruler`  \nCommit dddddddddd, cccccccccc, device here, torch 2."


def dense(lengths):
    record = summary(lengths)
    records = [one for one in record["records"] if not one["config"]]
    return record | {"records": records, "averages": make_averages(records)}


def grid(lengths):
    """Two settings that differ in the layers that stay dense."""
    other = json.loads(json.dumps(summary(lengths[:1])))
    other["dense_layers"] = []
    for one in [*other["records"], *other["averages"]]:
        one["config"] and one["config"].update(score="mean", sort="none")
    run = {"study": "ruler grid", "command": "python benchmarks/ruler_grid.py F", "commit": "d" * 40, "device": "here"}
    return run | {"versions": {"torch": "2"}, "settings": {"safe": summary(lengths), "mean": other}}


def test_dense_attention_by_length():
    assert ruler_tables.by_length(dense([4096, 8192])) == (
        "| task | 4096 | 8192 |\n"
        "| --- | ---: | ---: |\n"
        "| `niah_single_1` | 100.0 [51.0-100.0] | 100.0 [51.0-100.0] |\n"
        "| `vt` | 80.0 [40.8-89.8] | 80.0 [40.8-89.8] |\n"
        f"| **average of 2** | 90.0 [58.6-94.9] | 90.0 [58.6-94.9] |\n\n{CAPTION}\n\n{SOURCE}"
    )


def test_averages_of_grids():
    short, long = grid([4096]), grid([8192])
    del long["settings"]["mean"]
    source = SOURCE.replace("baatt evaluate ruler", "python benchmarks/ruler_grid.py F")
    assert ruler_tables.grid_averages([short, long]) == (
        "4096 tokens; dense attention: 90.0 [58.6-94.9], n = 4\n\n"
        "| selection | n | 50 % |\n"
        "| --- | ---: | ---: |\n"
        "| BA-Att, k in 256, layer 0 dense | 4 | 62.5 [32.2-83.3]; -27.5 [-66.3, +30.8] |\n"
        "| block means, unsorted | 4 | 62.5 [32.2-83.3]; -27.5 [-66.3, +30.8] |\n\n"
        "8192 tokens; dense attention: 90.0 [58.6-94.9], n = 4\n\n"
        "| selection | n | 50 % |\n"
        "| --- | ---: | ---: |\n"
        "| BA-Att, k in 256, layer 0 dense | 4 | 62.5 [32.2-83.3]; -27.5 [-66.3, +30.8] |\n\n"
        "Average over 2 of 13 tasks. After the semicolon: the difference to dense attention on the same samples [95 % "
        f"paired bootstrap interval]. {CAPTION}\n\n{source}\n\n{source}"
    )


def test_averages_of_several_grids_by_length():
    short, long = grid([4096]), grid([8192, 16384])
    del short["settings"]["mean"], long["settings"]["mean"]["averages"][1]
    cell = "62.5 [32.2-83.3]; -27.5 [-66.3, +30.8]"
    text = ruler_tables.half_by_length([short, long])
    assert text.startswith(
        "| sparsity 50 % | block pairs skipped | 4096 tokens | 8192 tokens | 16384 tokens |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| dense attention | 40 % | 90.0 [58.6-94.9] | 90.0 [58.6-94.9] | 90.0 [58.6-94.9] |\n"
        f"| BA-Att, k in 256, layer 0 dense | 40 % | {cell} | {cell} | {cell} |\n\n"
        "Block pairs skipped: of all layers, mean over lengths and tasks. Average over 2 of 13 tasks. After the"
    )
    assert text.count("python benchmarks/ruler_grid.py F") == 2
    fewer = json.loads(json.dumps(grid([4096])))
    for one in fewer["settings"]["mean"]["records"]:
        one["n"] = 3
    fewer["settings"] = {"mean": fewer["settings"]["mean"]}
    more = ruler_tables.half_by_length([short, long, fewer])
    assert f"| block means, unsorted | 40 % | {cell}; n = 3 | incomplete | incomplete |" in more
    del long["settings"]["safe"]["averages"][1]["by_length"][1]
    assert f"dense | 40 % | {cell} | {cell} | incomplete |" in ruler_tables.half_by_length([short, long])


def test_what_was_asked_of_clusters(monkeypatch):
    grids = grid([4096])
    grids["settings"] = {"clusters": grids["settings"]["safe"]}
    monkeypatch.setattr(ruler_tables, "BARS", ((4096, 0.5, 27.0), (4096, 0.5, 28.0), (8192, 0.5, 1.0)))
    assert ruler_tables.bars_of_clusters([grids]).splitlines()[2:] == [
        "| 4096 | 50 % | -27 | -27.5 [-66.3, +30.8], n = 4 | missed |",
        "| 4096 | 50 % | -28 | -27.5 [-66.3, +30.8], n = 4 | met |",
        "| 8192 | 50 % | -1 | - | - |",
    ]


def test_a_grid_task_by_task():
    text = ruler_tables.grid_tasks(grid([4096, 8192]))
    table = (
        "| task | dense | 50 % |\n"
        "| --- | ---: | ---: |\n"
        "| `niah_single_1` | 100.0 [51.0-100.0] | 50.0 [15.0-85.0] |\n"
        "| `vt` | 80.0 [40.8-89.8] | 75.0 [25.5-97.4] |\n"
        "| seconds a sample | 0.5 | 0.5 |\n"
        "| block pairs skipped | 40.0 % | 40.0 % |\n\n"
    )
    assert text.startswith(
        f"BA-Att, k in 256, layer 0 dense, 4096 tokens:\n\n{table}block means, unsorted, 4096 tokens:\n\n{table}"
        f"BA-Att, k in 256, layer 0 dense, 8192 tokens:\n\n{table}{CAPTION}"
    )


def test_ablations_are_compared_with_the_first_setting():
    grids = grid([4096])
    other = grids["settings"]["mean"]
    for one in other["records"]:
        one["scores"] = [score - 0.1 for score in one["scores"]]
        one.update({name: one[name] - 0.1 for name in ("accuracy", "ci_low", "ci_high")})
    rows = [line.split(" | ") for line in ruler_tables.ablations(grids).splitlines()[:5]]
    assert [row[0] for row in rows[2:]] == [
        "| dense attention", "| **BA-Att, k in 256, layer 0 dense**", "| block means, unsorted",
    ]  # fmt: skip
    assert [row[-1].removesuffix(" |") for row in rows[2:]] == [
        "90.0 [58.6-94.9]; +27.5 [+0.0, +55.0]", "62.5 [32.2-83.3]", "52.5 [22.2-73.3]; -10.0 [-10.0, -10.0]",
    ]  # fmt: skip
    assert "4096 tokens, 50 % sparsity, every layer sparse." in ruler_tables.ablations(grids)


def test_a_run_that_only_counted_says_where_the_answers_are_from():
    text = ruler_tables.answers_source(summary((512,), device="there"))
    assert text == f"{SOURCE} This run counted answers that were there; they were given on: there."


def test_answers_of_several_devices_are_said():
    record = dense([4096])
    record["records"][0]["devices"] = ["here", "there"]
    assert ruler_tables.by_length(record).endswith(
        "torch 2. Answers of other runs are among them; all devices: here, there."
    )
