"""The Markdown of the model grown from SmolLM2: what it can do, its runs, and what it wrote."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
MADE = {"command": "python x.py", "commit": "c" * 40, "device": "here", "versions": {"torch": "2"}}


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import card_tables

    return card_tables


def measured(**more):
    questions = [
        {"question": "One?", "answer": "One.", "right": True},
        {"question": "Two?", "answer": "Three,\nI think. " + 40 * "Or so. ", "right": False},
    ]
    text = {"tokens": 64, "accuracy_at_0.15": 0.5, "bound_per_token": 4.0, "base_loss_per_token": 3.25}
    return {
        **MADE, "text": text, "questions_right": 1, "questions": questions, **more,
        "continuations": {"Once upon a time": "\n\nthere was a cat."},
    }  # fmt: skip


def ruler(length, **tasks):
    records = [{"task": task, "length": length, "n": 25, "values_found": score} for task, score in tasks.items()]
    return {**MADE, "records": records}


def test_what_the_model_can_do(tables):
    asked = ruler(4096, niah_single_1=1.0, niah_multivalue=0.96, vt=0.5)
    asked["records"] += ruler(8192, niah_single_1=0.92)["records"]
    read = {"right": 3, "answers": [{}] * 4}
    lines = tables.bars([measured(read_1000=read), asked]).splitlines()
    assert lines[2:9] == [
        "| RULER, 2 needle tasks, 4096 tokens, 25 samples each | 98.0 %, lowest `niah_multivalue` 96.0 % | 95 % |",
        "| RULER, 3 tasks, 4096 tokens, 25 samples each | 82.0 %, lowest `vt` 50.0 % | 80 % |",
        "| RULER, 1 needle tasks, 8192 tokens, 25 samples each | 92.0 %, lowest `niah_single_1` 92.0 % | 90 % |",
        "| RULER, 1 tasks, 8192 tokens, 25 samples each | 92.0 %, lowest `niah_single_1` 92.0 % | - |",
        "| statements in documents of 1000 tokens, asked in plain words | 3 of 4 | - |",
        "| simple questions, all of which the base answers rightly | 1 of 2 | 60 % |",
        "| hidden tokens of held-out prose, 15 % of them hidden | 50.0 % | - |",
    ]
    assert lines[9].endswith("| 4.00; 3.25 | - |")
    assert "statements" not in tables.bars([measured(), asked])  # of an earlier measurement


def test_its_runs(tables):
    told = {"seconds": 380.4, "learning_rate": 0.001, "free": 0.35}
    run = {**MADE, "arguments": told, "step": 1361, "tokens": 101_855_744, "stage": 7}
    rows = tables.runs([run, {**run, "step": 2226, "processes": 4}]).splitlines()[2:]
    assert rows == [
        "| 1 | 1 x here | 380 | 0.001 | 35 % | 7 | 1,361 | 102 | cccccccccc |",
        "| 2 | 4 x here | 380 | 0.001 | 35 % | 7 | 2,226 | 102 | cccccccccc |",
    ]


def test_what_it_wrote_stands_word_for_word(tables):
    text = tables.texts(measured())
    assert "Once upon a time | there was a cat." in text
    assert "Two? | Three, I think. Or so." in text
    assert "One?" not in text
    assert max(map(len, text.splitlines())) <= 116
