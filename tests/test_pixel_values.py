"""Numbers of the prose that come from the two small models on real pixels."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import pixel_values


def value(call, record):
    name, *words = call.split()
    return pixel_values.VALUES[name](lambda _: record, *words)


def average(accuracy, difference, **config):
    return {
        "config": config, "tasks": ["clip_when", "clip_often"],
        "by_length": [{"accuracy": accuracy, "difference": difference}],
    }  # fmt: skip


def test_scores_and_losses_are_of_a_kind_a_sparsity_and_a_beta():
    clips = [
        average(0.9, None),
        average(0.5, -0.4, sparsity=0.5, score="covariance", beta=0.0),
        average(0.6, -0.3, sparsity=0.5, score="covariance", beta=0.5),
    ]
    record = {"averages": {"clips": clips}}
    assert value("pixels_score paper clips 0%", record) == "90.0"
    assert value("pixels_score paper clips 50%", record) == "60.0"
    assert value("pixels_score paper clips 50% 0", record) == "50.0"
    assert value("pixels_loss paper clips 50%", record) == "30.0"
    with pytest.raises(LookupError, match="vision_paper has no clips at 90% with beta 1"):
        value("pixels_score paper clips 90% 1", record)


def test_a_score_without_a_beta_is_found_whatever_beta_its_config_has():
    record = {"averages": [average(0.8, 0.0, sparsity=0.7, score="clusters", beta=0.0)]}
    assert value("pixels_score ruler_clusters words 70%", record) == "80.0"
    assert value("pixels_loss ruler_clusters words 70%", record) == "0.0"


def test_tasks_are_those_of_a_kind():
    config = {"sparsity": 0.5}
    records = [
        {"task": "clip_when", "config": {}, "accuracy": 1.0},
        {"task": "clip_when", "config": config, "accuracy": 0.25},
        {"task": "clip_often", "config": config, "accuracy": 0.75},
        {"task": "photo_count", "config": config, "accuracy": 0.0},
    ]
    record = {"averages": {"clips": [average(0.5, 0.0)]}, "records": records}
    assert value("pixels_tasks clusters clips 50%", record) == "25.0 to 75.0"


def test_clips_are_compared_one_by_one():
    def clip(method, psnr, dense_steps=0.0, tiles="none"):
        return {
            "method": method, "tiles": tiles, "sparsity": 0.5, "dense_steps": dense_steps, "psnr": sum(psnr) / 2,
            "psnr_of_clips": psnr,
        }  # fmt: skip

    record = {
        "records": [
            clip("clusters", [10.0, 20.0]), clip("paper", [11.0, 15.0]),
            clip("clusters", [14.0, 24.0], 0.1), clip("paper", [10.0, 20.0], 0.1),
            clip("clusters", [1.0, 1.0], tiles="4x8x4"), clip("paper", [1.0, 2.0], tiles="4x8x4"),
        ]
    }  # fmt: skip
    assert value("clips_gap clusters paper", record) == "-0.5 to 4.0"
    assert value("clips_gap clusters paper none", record) == "2.0 to 4.0"
    assert value("clips_nearer clusters paper", record) == "3 of 6"
    assert value("clips_dense_steps clusters 10%", record) == "4.0"
