"""Settings in words."""

import dataclasses

from baatt import BAAttConfig, Policy
from baatt.lab import describe
from tests.settings import sorted_config

CONFIG = dataclasses.asdict(sorted_config())
HEADER = {
    "sampler": {"steps": 64, "gen_length": 32, "block_length": 16, "threshold": 0.9, "cache": "none"},
    "batch_size": 2, "chat": False, "dtype": "float32", "dense_layers": [0, 1],
}  # fmt: skip


def test_orders_and_scores():
    assert describe.order_name(CONFIG) == "k in 256"
    assert describe.order_name(CONFIG | {"segment": None}) == "k in one segment"
    assert describe.order_name({"sort": "none", "segment": 256}) == "unsorted"
    assert describe.score_name(CONFIG) == "beta 0.5"
    assert describe.score_name(CONFIG | {"score": "oracle"}) == "oracle"
    clusters = CONFIG | {"score": "clusters", "sort": "none"}
    assert describe.score_name(clusters | {"keep_first": 1}) == "16 clusters, first block kept"
    assert describe.score_name(clusters | {"representatives": 8, "refinements": 0, "peak": False, "keep_first": 2}) == (
        "8 clusters, refinements 0, mean over queries, first 2 blocks kept"
    )
    spread = clusters | {"score": "clusters-variance"}
    assert describe.score_name(spread) == "16 clusters with their variance, beta 0.5"
    assert describe.selection_name(clusters | {"keep_first": 1}, []) == "16 clusters, first block kept, unsorted"
    assert describe.selection_name(CONFIG | {"keep_first": 1}, []) == "BA-Att, first block kept, k in 256"
    assert describe.score_name(clusters | {"budget": "head"}) == "16 clusters, one budget a head"


def test_a_setting_and_what_a_run_shares():
    oracle = CONFIG | {"score": "oracle", "sparsity": 0.9}
    assert describe.setting_name({}) == "dense"
    assert describe.setting_name(CONFIG) == "k in 256, beta 0.5, 50 %"
    assert describe.setting_name(oracle | {"block_size": 16}) == "k in 256, oracle, 90 %, blocks of 16"
    run = [{}, CONFIG, CONFIG | {"sparsity": 0.9}]
    assert [describe.setting_name(one, run) for one in run] == ["dense", "50 %", "90 %"]
    run = [{}, CONFIG, oracle]
    assert [describe.setting_name(one, run) for one in run] == ["dense", "beta 0.5, 50 %", "oracle, 90 %"]


def test_what_is_selected():
    assert describe.selection_name(CONFIG, [0, 1]) == "BA-Att, k in 256, layers 0 and 1 dense"
    assert describe.selection_name(CONFIG | {"score": "window"}, [3]) == "window, k in 256, layer 3 dense"
    assert describe.selection_name(CONFIG | {"sort": "none"}, []) == "BA-Att, unsorted"
    without = describe.selection_name(CONFIG | {"score": "covariance-16", "sort": "none", "beta": 0.0}, [])
    assert without == "BA-Att's score of runs of 16 with beta 0, unsorted"
    assert describe.layers_name([]) == "none"


def test_every_option():
    text = describe.options_text(sorted_config(), Policy(dense_layers=(0, -1)))
    assert text.startswith("block_size=128, sparsity=0.5, sort=k, segment=256, score=covariance, beta=0.5")
    assert text.endswith("; dense layers: 0, -1")
    assert "representatives" not in text
    usual = describe.options_text(BAAttConfig(), Policy())
    assert "score=clusters, representatives=16" in usual
    assert "segment" not in usual


def test_an_old_record_is_what_it_was():
    """Before there was anything but a row's budget and `keep_first`, no first block was kept."""
    stored = {"block_size": 128, "sparsity": 0.5, "sort": "qk", "segment": 1024, "score": "covariance", "beta": 0.5}
    assert describe.read_config(stored) == BAAttConfig.preset("paper")
    assert describe.selection_name(stored, []) == "BA-Att, qk in 1024"
    for config in (BAAttConfig(), BAAttConfig.preset("paper")):
        assert describe.read_config(dataclasses.asdict(config)) == config


def test_how_samples_are_answered():
    text = (
        "Answers: 64 steps for 32 tokens in blocks of 16, threshold 0.9, cache none, batches of 2; weights in float32."
    )
    assert describe.settings_text(HEADER, [{"config": {}}]) == text
    sparse = "Sparse: k in 256, beta 0.5, blocks of 128, layers that stay dense: 0, 1."
    records = [{"config": {}, "dense_layers": []}, {"config": CONFIG, "dense_layers": [0, 1]}]
    assert describe.settings_text(HEADER, records) == f"{text}\n{sparse}"
    records.append({"config": CONFIG | {"sort": "none", "beta": 0.0}, "dense_layers": []})
    assert describe.settings_text(HEADER, records) == f"{text}\nSparse: blocks of 128."
    random = HEADER["sampler"] | {"threshold": None, "remasking": "random"}
    assert "in blocks of 16, random, no threshold" in describe.settings_text(HEADER | {"sampler": random}, [])
