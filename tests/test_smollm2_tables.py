"""The Markdown of grids of RULER on the model grown from SmolLM2."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import ruler_tables
import smollm2_tables
import values

from baatt.lab.ruler.cells import Cell, make_cells
from baatt.lab.ruler.model import RulerAnswer
from baatt.lab.ruler.summary import make_averages, make_records
from tests.settings import sorted_config

TASKS = ("niah_single_1", "vt")
#: Of four samples of each task what a setting has right.
DENSE, ALL, HALF, NONE = [1, 1, 1, 0.9], [1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]


def setting(config, right, length=4096):
    cells = make_cells(TASKS, [length], config)
    scores = dict(zip([None, *config], [DENSE, *right], strict=True))
    answers = [[answer(cell, n, score) for n, score in enumerate(scores[cell.config])] for cell in cells]
    records = make_records(cells, answers)
    return {
        "model": "m", "dtype": "bfloat16", "seed": 42, "batch_size": 8, "chat": False, "dense_layers": [],
        "sources": {"words": "heldout"}, "averages": make_averages(records), "records": records,
        "sampler": {"steps": 32, "gen_length": 128, "block_length": 32, "threshold": None, "cache": "dual"},
    }  # fmt: skip


def answer(cell: Cell, number: int, score: float) -> RulerAnswer:
    return RulerAnswer(cell.task, cell.length, number, {}, "", [], score, score, 0.5, 16, 4, 0.4, "c" * 40, "here")


def grid(**settings):
    run = {"study": "ruler grid", "command": "python benchmarks/ruler_grid.py F", "commit": "d" * 40, "device": "here"}
    return run | {
        "versions": {"torch": "2"},
        "settings": {name.replace("_", "-"): one for name, one in settings.items()},
    }


def betas(sort, *weights):
    segment, first = (None, 1) if sort == "none" else (1024, 0)
    return [sorted_config(sort=sort, segment=segment, beta=beta, keep_first=first) for beta in weights]


def test_weights_stand_beside_table_8():
    found = smollm2_tables.by_beta(grid(
        paper=setting(betas("qk", 0.5), [ALL]), unsorted_first=setting(betas("none", 0.5), [HALF]),
        unsorted_first_beta_0=setting(betas("none", 0.0), [NONE]), paper_beta_0=setting(betas("qk", 0.0), [ALL]),
        paper_beta_2=setting(betas("qk", 2.0), [HALF]),
    ))  # fmt: skip
    assert found.splitlines()[:5] == [
        "| order | beta 0 | beta 0.5 | beta 2 |",
        "| --- | ---: | ---: | ---: |",
        "| unsorted, first block kept | 0.0 [0.0-34.6] | 50.0 [25.3-74.7]; +50.0 [+0.0, +100.0] | - |",
        "| qk in 1024 | 100.0 [65.4-100.0] | 100.0 [65.4-100.0]; +0.0 [+0.0, +0.0] | "
        "50.0 [25.3-74.7]; -50.0 [-100.0, +0.0] |",
        "| paper, RULER-4K | 88.42 | 90.06 | 80.10 |",
    ]
    assert "4096 tokens, 50 % sparsity. Average over 2 tasks; after the semicolon the difference to beta 0 in" in found
    assert "Dense attention on them: 97.5 [" in found
    assert "n = 4 samples of each task (seed 42; words heldout), `m`." in found
    assert "Command: `python benchmarks/ruler_grid.py F`" in found


def test_orders_stand_beside_the_papers():
    def ordered(sort, segment, *right):
        configs = [sorted_config(sort=sort, segment=segment, sparsity=sparsity) for sparsity in (0.5, 0.9)]
        return setting(configs[: len(right)], right)

    found = smollm2_tables.by_order(grid(
        paper=ordered("qk", 1024, ALL, HALF), keys=ordered("k", 256, HALF, NONE),
        unsorted=ordered("none", None, HALF, NONE), keys_1024=ordered("k", 1024, NONE),
    ))  # fmt: skip
    assert found.splitlines()[:8] == [
        "| order | 50 % | 90 % |",
        "| --- | ---: | ---: |",
        "| unsorted | 50.0 [25.3-74.7] | 0.0 [0.0-34.6] |",
        "| k in 256 | 50.0 [25.3-74.7]; +0.0 [+0.0, +0.0] | 0.0 [0.0-34.6]; +0.0 [+0.0, +0.0] |",
        "| k in 1024 | 0.0 [0.0-34.6]; -50.0 [-100.0, +0.0] | - |",
        "| qk in 1024 | 100.0 [65.4-100.0]; +50.0 [+0.0, +100.0] | 50.0 [25.3-74.7]; +50.0 [+0.0, +100.0] |",
        "| paper, RULER-4K, none | 81.08 | 22.34 |",
        "| paper, RULER-4K, q | 82.64 | 24.07 |",
    ]


def test_tasks_at_half_of_the_blocks():
    both = [sorted_config(sort="qk", segment=1024, sparsity=sparsity) for sparsity in (0.5, 0.9)]
    found = smollm2_tables.by_task(grid(paper=setting(both, [HALF, NONE], 8192)))
    assert found.splitlines()[:4] == [
        "| task | dense attention | BA-Att, qk in 1024 |",
        "| --- | ---: | ---: |",
        "| `niah_single_1` | 97.5 [47.2-100.0] | 50.0 [15.0-85.0] |",
        "| `vt` | 97.5 [47.2-100.0] | 50.0 [15.0-85.0] |",
    ]
    assert "8192 tokens, 50 % sparsity. RULER's score" in found


def test_what_was_asked_of_dense_attention():
    found = smollm2_tables.dense_bars([grid(paper=setting(betas("qk", 0.5), [ALL]))])
    rows = found.splitlines()[2:]
    assert rows[0].startswith("| needle tasks | 4096 | 95 | 97.5 [")
    assert rows[0].endswith("], n = 4 of each of 1 | met |")
    assert rows[1] == "| needle tasks | 8192 | 90 | - | - |"
    assert rows[2].endswith("], n = 4 of each of 2 | met |")


def test_every_setting_has_a_place_in_the_tables():
    assert {*ruler_tables.ruler_grid.ORDERS, *ruler_tables.ruler_grid.BETAS} <= {*ruler_tables.ORDER}


def test_numbers_of_the_prose_are_of_its_grids(monkeypatch):
    stored = {"ruler_smollm2_4096": grid(paper=setting(betas("qk", 0.5), [HALF]))}
    monkeypatch.setitem(values.TASK_COUNTS, "all", len(TASKS))
    assert values.VALUES["smollm2_loss"](stored.__getitem__, "paper", "50%", "4096") == "47.5"
    with pytest.raises(LookupError):
        values.VALUES["score"](stored.__getitem__, "paper", "50%", "4096")
