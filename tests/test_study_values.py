"""Numbers of the prose that come from studies of `baatt analyze`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import study_values


def read_of(*records):
    return lambda name: {"records": [{"layer": None, "sort": "none", "segment": None} | one for one in records]}


def value(call, read):
    name, *words = call.split()
    return study_values.VALUES[name](read, *words)


def test_attention_kept_is_of_all_layers_and_of_the_order_and_weight_that_are_named():
    one = {"score": "mean", "beta": 0.5, "sparsity": 0.7, "recall_mean": 0.5}
    read = read_of(
        one | {"layer": 0, "recall_mean": 0.1}, one, one | {"sort": "k", "segment": 256, "recall_mean": 0.25},
        one | {"beta": 0.1, "recall_mean": 0.75},
    )  # fmt: skip
    assert value("kept file mean none 70%", read) == "50.0"
    assert value("kept file mean k256 70%", read) == "25.0"
    assert value("kept file mean none 70% 0.1", read) == "75.0"
    with pytest.raises(LookupError, match=r"file has no mean at 50% in the order none with beta 0\.5"):
        value("kept file mean none 50%", read)


def test_the_bound_is_counted_by_layer():
    read = read_of(
        *({"layer": n, "correlation_largest": r} for n, r in enumerate([0.4, 0.6, 0.7])),
        *({"layer": n, "sort": "qk", "segment": 64, "correlation_largest": r} for n, r in enumerate([0.5, 0.6, 0.8])),
    )
    assert value("bound_above file none 0.5", read) == "2"
    assert value("bound_least file qk64", read) == "0.50"
    assert value("bound_better file qk64 none", read) == "2"


def test_layers_and_keys():
    layers = read_of({"layer": 0, "blocks_for_most": 0.1}, {"layer": 1, "blocks_for_most": 0.285})
    assert value("blocks_needed file none 1", layers) == "28"
    keys = read_of(
        {"layer": 0, "on_few": 0.5, "heaviest_key": 7, "heaviest_norm": 1.0},
        {"layer": 1, "on_few": 0.2, "heaviest_key": 3, "heaviest_norm": 0.25},
        {"layer": 2, "on_few": 0.3, "heaviest_key": 7, "heaviest_norm": 0.5},
    )
    assert value("keys_from file on_few 1 2", keys) == "20 to 30"
    assert value("keys_from file heaviest_norm 0 1", keys) == "0.25 to 1.00"
    assert value("keys_at file 7", keys) == "2"
    assert value("most file on_few", keys) == "50.0"
