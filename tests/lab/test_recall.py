"""The studies of a capture: every combination once, numbers those of the parts they are made of."""

import dataclasses

import pytest
import torch

from baatt import ba_attention, make_plan
from baatt.lab.capture import Capture, Heads
from baatt.lab.layers import POINTS, deviation, measure_bound
from baatt.lab.plots import draw_bound, draw_recall
from baatt.lab.recall import block_mass, kept_mass, measure_recall, output_error
from baatt.lab.statistics import pearson
from tests.settings import sorted_config


@pytest.fixture
def recorded():
    generator = torch.Generator().manual_seed(0)
    draw = lambda heads, tokens: torch.randn(1, heads, tokens, 16, generator=generator)  # noqa: E731
    return Capture({layer: Heads(draw(4, 70), draw(2, 90), draw(2, 90)) for layer in (0, 3)}, 0.4, {"model": "x"})


CONFIGS = [sorted_config(16, 0.5, "none", None, beta=0.5), sorted_config(16, 0.5, "qk", 32, beta=0.0)]


def test_the_mass_of_a_causal_plan_is_what_its_queries_see(recorded):
    q, k, _ = recorded.layers[3]
    plan = make_plan(q, k, sorted_config(16, 0.0, "none", None), causal=4)
    mass = block_mass(q, k, plan)
    assert (mass.triu(plan.sight.spans[0, 0, 3]) == 0).all()
    torch.testing.assert_close(kept_mass(mass, plan.selection), torch.ones(1, 4, 5))


def test_recall(recorded, tmp_path):
    steps = []
    configs = [
        dataclasses.replace(config, sparsity=sparsity, score=score)
        for config in CONFIGS
        for sparsity in (0.5, 0.8)
        for score in ("covariance", "oracle")
    ]
    records = measure_recall(recorded, configs, progress=lambda: steps.append(1))
    assert len(steps) == 2 * len(configs)
    assert len(records) == 2 * 2 * 2 * 2 + 2 * 2 * 2
    by_key = {(one["layer"], one["sort"], one["sparsity"], one["score"]): one for one in records}
    assert len(by_key) == len(records)
    q, k, v = recorded.layers[3]
    config = sorted_config(16, 0.8, "qk", 32, beta=0.0)
    plan = make_plan(q, k, config, scale=0.4)
    shares = kept_mass(block_mass(q, k, plan), plan.selection)
    one = by_key[3, "qk", 0.8, "covariance"]
    assert one["recall_mean"] == pytest.approx(float(shares.mean()))
    assert one["recall_p5"] == pytest.approx(float(shares.flatten().quantile(0.05)))
    assert one["achieved_sparsity"] == pytest.approx(1 - 2 / 6)
    out = ba_attention(q, k, v, config, scale=0.4)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.4, enable_gqa=True)
    assert (one["relative_l1"], one["relative_l2"], one["cosine"]) == pytest.approx(output_error(out, dense), rel=1e-4)
    for key, one in by_key.items():
        assert by_key[(*key[:3], "oracle")]["recall_mean"] >= one["recall_mean"] - 1e-6
    whole = by_key[None, "none", 0.5, "covariance"]
    layers = [by_key[layer, "none", 0.5, "covariance"] for layer in (0, 3)]
    assert whole["recall_mean"] == pytest.approx(sum(one["recall_mean"] for one in layers) / 2)
    assert whole["relative_l2"] == pytest.approx(sum(one["relative_l2"] for one in layers) / 2)
    quick = measure_recall(recorded, [dataclasses.replace(CONFIGS[0], score="mean")], outputs=False)
    assert all(one["relative_l1"] is None for one in quick)
    draw_recall(records, "caption", tmp_path / "recall.png")
    assert (tmp_path / "recall.png").stat().st_size > 10_000


def test_bound(recorded, tmp_path):
    records = measure_bound(recorded, CONFIGS)
    assert [(one["layer"], one["sort"]) for one in records] == [(0, "none"), (0, "qk"), (3, "none"), (3, "qk")]
    q, k, _ = recorded.layers[3]
    found = deviation(q, k, make_plan(q, k, CONFIGS[1], scale=0.4, impl="reference"))
    one = records[3]
    assert one["pairs"] == 4 * 5 * 6
    assert one["correlation_largest"] == pytest.approx(pearson(found.bound, found.largest))
    assert one["correlation_mean"] == pytest.approx(pearson(found.bound, found.mean))
    assert one["bound_mean"] > one["largest_mean"] > one["deviation_mean"] > 0
    assert len(one["points"]) == min(POINTS, one["pairs"])
    draw_bound(records, "caption", tmp_path / "bound.png")
    assert (tmp_path / "bound.png").stat().st_size > 10_000


def test_errors_of_an_output():
    dense = torch.tensor([[[[3.0, 4.0], [0.0, 0.0]]]])
    assert output_error(dense, dense) == pytest.approx((0, 0, 1))
    found = torch.tensor([[[[3.0, -4.0], [0.0, 0.0]]]])
    assert output_error(found, dense) == pytest.approx((8 / 7, 8 / 5, (-7 / 25 + 1) / 2))
    with pytest.raises(ValueError, match="found must have the shape"):
        output_error(found[..., :1], dense)
    with pytest.raises(ValueError, match="must not be zero everywhere"):
        output_error(found, torch.zeros_like(dense))
