"""Rivals at an equal budget: shapes, the antidiagonal sum entry by entry, and the oracle above all."""

import pytest
import torch

from baatt import BAAttConfig, attend, ba_attention, make_plan
from baatt.analysis.oracle import block_mass, kept_mass
from baatt.analysis.rivals import RIVALS, antidiagonal, covariance, pooled_mass, rival_attention, select_by
from tests.analysis.test_oracle import case


@pytest.mark.parametrize("rival", list(RIVALS))
@pytest.mark.parametrize("masked", [False, True])
def test_every_rival_keeps_as_many_blocks(rival, masked):
    q, k, plan = case(masked=masked)
    selection = select_by(rival, q, k, plan)
    assert torch.equal(selection.count, plan.selection.count)
    assert selection.index.shape == plan.selection.index.shape
    mass = block_mass(q, k, plan)
    assert (kept_mass(mass, selection) <= kept_mass(mass, select_by("oracle", q, k, plan)) + 1e-12).all()
    again = select_by(rival, q, k, plan)
    assert torch.equal(selection.index, again.index)


def test_covariance_is_the_plan():
    q, k, plan = case()
    assert torch.equal(select_by("covariance", q, k, plan).index, plan.selection.index)


def test_attention_by_a_rival():
    q, k, plan = case(masked=False)
    ours = rival_attention("covariance", plan.config, "reference")(q, k, k)
    assert torch.equal(ours, ba_attention(q, k, k, plan.config, impl="reference"))
    best = rival_attention("oracle", plan.config, "reference")(q, k, k, key_mask=None)
    selection = select_by("oracle", q, k, plan)
    assert torch.equal(best, attend(q, k, k, plan._replace(selection=selection), impl="reference"))


def test_antidiagonal_entry_by_entry():
    q, k, plan = case(masked=False, batch=1)
    stride, size = 4, 16
    found = antidiagonal(q, k, plan, stride=stride)
    head = 3
    rows = torch.nn.functional.pad(q[0, head, plan.query_order.index[0, head]], (0, 0, 0, 5))
    columns = torch.nn.functional.pad(k[0, 1, plan.key_order.index[0, 1]], (0, 0, 0, 11))
    logits = torch.full((20, 28), -torch.inf, dtype=torch.float64)
    for i in range(20):
        for j in range(26):  # the last run that holds a key
            pairs = [rows[i * stride + s] @ columns[j * stride + stride - 1 - s] for s in range(stride)]
            logits[i, j] = plan.scale * sum(pairs) / stride
    weights = logits.softmax(-1)
    per_block = size // stride
    for i in range(5):
        for j in range(7):
            part = weights[i * per_block : (i + 1) * per_block, j * per_block : (j + 1) * per_block]
            assert found[0, head, i, j] == pytest.approx(float(part.sum()))


@pytest.mark.parametrize("masked", [False, True])
def test_masses_of_runs_of_one_token_are_the_oracle_s(masked):
    q, k, plan = case(masked=masked)
    queries = plan.query_stats.size[:, None, :, None]
    expected = block_mass(q, k, plan) * queries
    torch.testing.assert_close(pooled_mass(q, k, plan, run=1), expected)


def test_masses_of_whole_blocks_rank_as_the_plan():
    q, k, plan = case(masked=False)
    whole = q[:, :, :64], k[:, :, :96]
    plan = make_plan(*whole, plan.config, impl="reference")
    shares = pooled_mass(*whole, plan, run=plan.config.block_size)
    torch.testing.assert_close(shares, covariance(*whole, plan).softmax(-1) * plan.config.block_size)
    assert torch.equal(select_by("covariance", *whole, plan).index, plan.selection.index)


def test_finer_runs_come_nearer_to_the_oracle():
    """Of means alone the smaller runs know more; on average over many pairs, not pair by pair."""
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, 4, 512, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    plan = make_plan(q, k, BAAttConfig(block_size=64, sort="none"), impl="reference")
    mass = block_mass(q, k, plan)
    errors = [float((pooled_mass(q, k, plan, run=run) / 64 - mass).abs().mean()) for run in (64, 16, 4, 1)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(0, abs=1e-12)


def test_window_keeps_the_sink_and_the_diagonal():
    q, k, plan = case("none", sparsity=0.6, masked=False)
    kept = select_by("window", q, k, plan).index[0, 0].tolist()
    assert kept == [[0, 1, 2], [0, 1, 2], [0, 3, 4], [0, 4, 5], [0, 5, 6]] or all(0 in row for row in kept)


def test_unknown_names_and_strides_are_refused():
    q, k, plan = case()
    with pytest.raises(ValueError, match="score must be one of"):
        select_by("best", q, k, plan)
    with pytest.raises(ValueError, match="stride must divide block_size=16, got 3"):
        antidiagonal(q, k, plan, stride=3)
    with pytest.raises(ValueError, match="run must divide block_size=16, got 5"):
        pooled_mass(q, k, plan, run=5)
