"""The grid of an ablation: its cells, records, and the file a later run goes on with."""

import json

import pytest

from baatt.evaluation.ablation import Cell, Store, make_cells, make_record, run_grid
from baatt.evaluation.retrieval import Answer
from baatt.lab.ruler.sample import RulerSample
from baatt.lab.statistics import mcnemar_p, wilson_interval

HEADER = {"study": "ablation", "commit": "a", "seed": 0}


def answers(*texts):
    sample = RulerSample("task", "prompt", "prefix", " 123", ("123",), 1)
    return [Answer(sample, text, float("123" in text), "123" in text, 0.1) for text in texts]


def test_cells_that_would_run_the_same_are_kept_once():
    dials = {"beta": [0.0, 0.5], "sort": ["none", "qk"], "segment": [256, None]}
    cells = make_cells(["a", "b"], [512], dials, ["covariance", "oracle"])
    assert len(cells) == len(set(cells)) == 2 * (1 + 2 * (1 + 2) + (1 + 2))
    assert cells[0] == Cell("a", 512, None, "dense")
    assert cells[0].dials == {}
    assert {cell.task for cell in cells[:10]} == {"a"}
    assert cells[1].dials["score"] == "covariance"
    assert cells[1].dials["segment"] is None
    with pytest.raises(ValueError, match="beta must be at least 0"):
        make_cells(["a"], [512], {"beta": [-1.0]}, ["covariance"])


def test_record():
    cell = make_cells(["a"], [512], {}, ["covariance"])[1]
    dense = make_record(cell, answers("123", "123", "x123", "no"), None)
    assert (dense["accuracy"], dense["accuracy_whole"], dense["mcnemar_p"]) == (0.75, 0.5, 1)
    found = make_record(cell, answers("123", "9123", "no", "no"), dense, recall_mean=0.5)
    assert (found["n"], found["accuracy"], found["dense_accuracy"]) == (4, 0.5, 0.75)
    assert (found["accuracy_whole"], found["dense_accuracy_whole"]) == (0.25, 0.5)
    assert (found["ci_low"], found["ci_high"]) == wilson_interval(2, 4)
    assert found["recall_mean"] == 0.5
    assert found["config"]["beta"] == 0.5


def test_a_grid_goes_on_where_it_was_cut(tmp_path):
    path = tmp_path / "grid.json"
    cells, asked = make_cells(["a"], [512], {"beta": [0.0, 1.0]}, ["covariance"]), []

    def ask(cell):
        asked.append(cell)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return answers("123", "no" if cell.config else "123")

    def run():
        store = Store(path, HEADER, ["commit", "seed"])
        return run_grid(cells, store, ask, lambda cell: {"recall_mean": None}, lambda cell: None)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert [one["accuracy"] for one in json.loads(path.read_text())["records"]] == [1, 0.5]
    records = run()
    assert asked == [*cells, cells[2]]
    assert [one["accuracy"] for one in records] == [1, 0.5, 0.5]
    assert [one["dense_accuracy"] for one in records] == [1, 1, 1]
    assert run() == records
    assert [entry.name for entry in tmp_path.iterdir()] == ["grid.json"]
    with pytest.raises(ValueError, match="was made with seed 0: give another file or the same values"):
        Store(path, HEADER | {"seed": 1}, ["commit", "seed"])
    path.write_text("[]")
    with pytest.raises(ValueError, match="must be a file of this command"):
        Store(path, HEADER, ["seed"])


def test_mcnemar():
    assert mcnemar_p([1, 1, 0], [1, 1, 0]) == 1
    assert mcnemar_p([1] * 6, [0] * 6) == pytest.approx(2 / 2**6)
    assert mcnemar_p([1] * 5 + [0], [0] * 5 + [1]) == pytest.approx(2 * 7 / 2**6)
    assert mcnemar_p([1, 0], [0, 1]) == 1
    assert 0 <= mcnemar_p([1] * 3000, [0] * 3000) < 1e-300
    with pytest.raises(ValueError, match="same samples, got 1 and 2"):
        mcnemar_p([1], [1, 0])
