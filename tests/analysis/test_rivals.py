"""Rivals at an equal budget: shapes, the antidiagonal sum entry by entry, and the oracle above all."""

import pytest
import torch

from baatt import attend, ba_attention
from baatt.analysis.oracle import block_mass, kept_mass
from baatt.analysis.rivals import RIVALS, antidiagonal, rival_attention, select_by
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
