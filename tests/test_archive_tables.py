"""What the tables of stored ablations make of a run that was cut."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import archive_tables


def one(task, beta, right, right_whole):
    config = None if beta is None else {"sort": "none", "segment": None, "sparsity": 0.5, "beta": beta}
    return {"task": task, "length": 512, "config": config or {}, "right": right, "right_whole": right_whole}


RECORD = {
    "records": [
        one("a", None, [1, 1], [1, 1]), one("a", 0.0, [1, 1], [1, 0]), one("a", 2.0, [0, 0], [0, 0]),
        one("b", None, [1, 0], [1, 0]), one("b", 0.0, [1, 1], [1, 1]),
    ],
    "command": "baatt ablate", "commit": "c" * 40, "device": "here", "versions": {}, "model": "m", "dtype": "float32",
    "seed": 0, "count": 2, "dense_layers": [],
}  # fmt: skip


def test_only_finished_tasks_are_pooled():
    assert archive_tables.finished_tasks(RECORD) == ["a"]
    text = archive_tables.by_beta(RECORD)
    assert "| unsorted | 50 % | 50.0 [9.5-90.5]; 100.0 | 0.0 [0.0-65.8]; 0.0 |" in text
    assert "2 answers a cell, of `a`, 512 tokens" in text


def test_an_unfinished_task_is_shown_by_itself():
    text = archive_tables.by_beta(RECORD, by_task=True)
    assert "| `b` | unsorted | 50 % | 100.0 [34.2-100.0]; 100.0 | - |" in text


def test_finished_tasks_share_a_cell():
    record = RECORD | {"records": [*RECORD["records"], one("b", 2.0, [1, 1], [1, 1])]}
    assert "| unsorted | 50 % | 75.0 [30.1-95.4]; 100.0 | 50.0 [15.0-85.0]; 50.0 |" in archive_tables.by_beta(record)
