"""The Markdown of a stored summary of `baatt evaluate ruler`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import evaluation_tables

from baatt.config import BAAttConfig, Policy
from baatt.evaluation.ablation import Cell
from baatt.evaluation.ruler_answers import RulerAnswer
from baatt.evaluation.ruler_summary import make_averages, make_records

SCORES = {
    ("niah_single_1", None): [1.0] * 4,
    ("niah_single_1", 0.5): [1.0, 1.0, 0.0, 0.0],
    ("vt", None): [0.8] * 4,
    ("vt", 0.5): [0.8, 0.8, 0.4, 1.0],
}


def summary(lengths, device="here"):
    cells = [
        Cell(task, length, None if sparsity is None else BAAttConfig(sparsity=sparsity), "covariance")
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
    records = make_records(cells, answers, Policy(dense_layers=(0,)))
    return {
        "study": "ruler", "command": "baatt evaluate ruler", "commit": "d" * 40, "device": "here",
        "versions": {"torch": "2"}, "model": "m", "dtype": "bfloat16", "seed": 42, "count": 4, "batch_size": 8,
        "chat": False, "dense_layers": [0], "sources": {"words": "full", "essay": "/a/b/essays.json", "squad": None},
        "sampler": {"steps": 32, "gen_length": 128, "block_length": 32, "threshold": None, "cache": "dual"},
        "averages": make_averages(records), "records": records,
    }  # fmt: skip


CAPTION = (
    "RULER's score in percent [95 % interval] of 2 of 13 tasks, n = 4 samples each (seed 42; words full, essay "
    "essays.json), `m`. After the semicolon: samples lost and won against dense attention on the same samples with "
    "McNemar's exact p, or, where a score may be a share, the difference [95 % paired bootstrap interval]. Answers: 32 "
    "steps for 128 tokens in blocks of 32, no threshold, cache dual, batches of 8; weights in bfloat16. Sparse: k "
    "sorted in 256, beta 0.5, blocks of 128, layers that stay dense: 0.\n\n"
    "Command: `baatt evaluate ruler`  \nCommit dddddddddd, cccccccccc, device here, torch 2."
)


def test_task_by_task():
    text = evaluation_tables.ruler(summary([4096]))
    assert text.startswith(
        "4096 tokens:\n\n"
        "| task | dense | 50 % |\n"
        "| --- | ---: | ---: |\n"
        "| `niah_single_1` | 100.0 [51.0-100.0] | 50.0 [15.0-85.0]; 2 lost, 0 won, p 0.5 |\n"
        "| `vt` | 80.0 [80.0-80.0] | 75.0 [50.0-95.0]; -5.0 [-30.0, +15.0] |\n"
        "| **average of 2** | 90.0 [65.5-90.0] | 62.5 [41.0-82.7]; -27.5 [-55.0, +0.0] |\n"
        "| seconds a sample | 0.5 | 0.5 |\n"
        "| tokens/s | 32.0 | 32.0 |\n"
        "| block pairs skipped | 40.0% | 40.0% |\n"
    )
    assert text.endswith(CAPTION)


def test_averages():
    text = evaluation_tables.ruler_averages(summary([4096, 8192]))
    assert text == (
        "| average | 4096 | 8192 | mean | wAvg (inc) | wAvg (dec) |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| dense | 90.0 [65.5-90.0] | 90.0 [65.5-90.0] | 90.0 | 90.0 | 90.0 |\n"
        "| 50 % | 62.5 [41.0-82.7]; -27.5 [-55.0, +0.0] | 62.5 [41.0-82.7]; -27.5 [-55.0, +0.0] | 62.5 | 62.5 | 62.5 |"
        f"\n\n{CAPTION}"
    )


def test_answers_of_several_devices_are_said():
    record = summary([4096])
    record["records"][0]["devices"] = ["here", "there"]
    assert evaluation_tables.ruler_averages(record).endswith(
        "torch 2. Answers of other runs are among them; all devices: here, there."
    )
