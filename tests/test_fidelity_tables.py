"""The Markdown of stored runs of `baatt evaluate fidelity`, and of those of the script before it."""

import dataclasses
import json
from pathlib import Path

import pytest

from baatt.config import Policy
from baatt.lab.records import stored_text

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import fidelity_tables

    return fidelity_tables


def record(score, sparsity, kl, *, length=8192, recalled=0.9, lost=0.0, name=""):
    config = {
        "score": score, "sparsity": sparsity, "sort": "none", "segment": 256, "block_size": 128, "beta": 0.5,
        "representatives": 16, "refinements": 2, "peak": True, "keep_first": 1, "budget": "row",
    } if score else {}  # fmt: skip
    numbers = {"kl": kl, "recalled": recalled, "recalled_lost": lost}
    ends = {f"{key}{end}": value for key, value in numbers.items() for end in ("", "_low", "_high")}
    return {
        "length": length, "config": config, "name": name, "commit": "c" * 40, "sparsity_achieved": sparsity,
        "loss": 2.5, "kl_of_documents": [kl, kl + 0.001], **ends,
    }  # fmt: skip


def run(*records):
    return {
        "command": "baatt evaluate fidelity", "commit": "d" * 40, "device": "here", "versions": {"torch": "2"},
        "model": "tiny", "documents": 2, "needles": 3, "dtype": "bfloat16", "records": list(records),
    }  # fmt: skip


def test_scores_by_length_and_sparsity(tables):
    text = tables.by_score(
        run(
            record("", 0.0, 0.0, length=2048, recalled=1.0), record("clusters", 0.5, 0.25, length=2048),
            record("clusters", 0.9, 0.5, length=2048, recalled=0.125), record("exact", 0.5, 0.125, length=2048),
        )
    )  # fmt: skip
    lines = text.splitlines()
    assert lines[0] == "| tokens | score | 50 % | 90 % |"
    assert lines[2] == "| 2K | clusters | 0.25; 90.0 | 0.5; 12.5 |"
    assert lines[3] == "| 2K | exact | 0.125; 90.0 | - |"
    assert "Dense: 100.0 at 2K." in text


def test_the_first_block_free_and_kept(tables):
    def free(score, *rest):
        found = record(score, *rest)
        return found | {"config": found["config"] | {"keep_first": 0}}

    text = tables.by_first(
        [
            run(record("", 0.0, 0.0, recalled=1.0), free("clusters", 0.7, 0.5), free("exact", 0.7, 0.25)),
            run(record("", 0.0, 0.0, recalled=1.0), record("clusters", 0.7, 0.25)),
        ]
    )
    lines = text.splitlines()
    assert lines[0] == "| score | first block | 70 % |"
    assert lines[2:5] == [
        "| clusters | free | 0.5; 90.0 |", "| exact | free | 0.25; 90.0 |", "| clusters | kept | 0.25; 90.0 |",
    ]  # fmt: skip
    assert "tiny, 2 documents of 8192 tokens" in text
    assert "Dense: 100.0." in text


def test_what_was_asked(tables):
    scores = run(
        record("", 0.0, 0.0), record("clusters", 0.7, 0.018, lost=0.004), record("exact", 0.7, 0.01),
        record("clusters", 0.7, 9.0, length=4096),
    )  # fmt: skip
    profile = run(record("", 0.0, 0.0), record("clusters", 0.9, 0.2), record("clusters", 0.9, 0.1, name="p"))
    lines = tables.bars([scores, profile]).splitlines()[2:]
    assert [line.rsplit(" | ", 1)[1] for line in lines] == ["met |", "missed |", "met |"]
    assert "-0.4 [-0.4, -0.4]" in lines[0]
    assert "1.80 times" in lines[1]
    assert "below 0.2, uniform | 0.1; less by 0.1 to 0.1" in lines[2]
    assert len(tables.bars([scores]).splitlines()) == 4


def test_profiles(tables):
    text = tables.profile(
        run(record("", 0.0, 0.0), record("clusters", 0.9, 0.2), record("clusters", 0.9, 0.1, name="p"))
    )
    assert [line.split(" | ")[0] for line in text.splitlines()[2:5]] == ["| dense", "| 90 %", "| 90 %, p"]
    layers = [{"layer": layer, "config": {"sparsity": 0.9}, "kl": 0.01 * (layer + 1)} for layer in (0, 1)]
    content = run() | {"layers": layers, "profile": {"dense_layers": [1], "layer_sparsity": [[0, 0.95]]}}
    lines = tables.layers(content).splitlines()
    assert lines[:4] == [
        "| layer | KL at 90 % | profile |", "| --- | ---: | ---: |", "| 0 | 0.01 | 95.0 % |", "| 1 | 0.02 | dense |",
    ]  # fmt: skip


def test_the_stored_profile_is_that_of_the_layers():
    stored = json.loads(stored_text(BENCHMARKS / "results/fidelity_layers.json"))["profile"]
    policy = Policy.load(BENCHMARKS / "results/fidelity_profile.policy.json")
    assert json.loads(json.dumps(dataclasses.asdict(policy))) == stored


def test_a_stored_run_is_drawn_in_words(tables, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(tables, "draw_fidelity", lambda content, path: drawn.append((content, path)))
    stored = run(record("", 0.0, 0.0), record("exact", 0.5, 0.1), record("clusters", 0.5, 0.2))
    tables.draw(stored, tmp_path / "f.png")
    content, path = drawn[0]
    assert path == tmp_path / "f.png"
    assert [one["config"].get("score") for one in content["records"]] == [None, "exact attention mass", "clusters"]
    assert "tiny, every layer sparse; shades are 95 % intervals over 2 documents." in content["model"]
    assert stored["records"][1]["config"]["score"] == "exact"


def test_what_was_asked_of_clusters_before(tables):
    import real_weights_tables

    def one(setting, sparsity, first, kl, digits):
        config = {"sparsity": sparsity, "keep_first": first, "beta": 0.5}
        return {"setting": setting, "config": config, "kl": kl, "digits": digits}

    records = [{"digits": 0.95}, {}, one("clusters-16", 0.7, 1, 0.016, 0.945), one("exact", 0.7, 0, 0.01, 0.9)]
    text = real_weights_tables.bars_table({"records": [*records, one("clusters-16", 0.9, 1, 0.1, 0.9)]})
    assert text.splitlines()[2:] == [
        "| 70 % | KL | at most 1.5 times that of exact mass | 1.60 times | missed |",
        "| 70 % | digits | at most 1 points less than dense | 0.5 points | met |",
        "| 90 % | digits | at most 4 points less than dense | 5.0 points | missed |",
    ]
