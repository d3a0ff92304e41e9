"""The bound of E9 holds and is what the equation says; the correlation is Pearson's."""

import math

import pytest
import torch

from baatt.lab.layers import deviation
from baatt.lab.statistics import pearson
from tests.lab.test_oracle import case


@pytest.mark.parametrize("sort", ["none", "qk"])
def test_every_logit_is_within_the_bound(sort):
    q, k, plan = case(sort)
    found = deviation(q, k, plan)
    empty = (plan.key_summary.size == 0)[:, None, None].expand(found.bound.shape)
    assert found.bound.isnan().equal(empty)
    assert found.largest.isnan().equal(empty)
    there = ~empty
    assert (found.largest[there] <= found.bound[there]).all()
    assert (found.mean[there] < found.largest[there]).all()
    entry, head, i, j = 0, 3, 4, 2  # the last query block has 11 tokens
    queries = q[entry, head, plan.query_order.index[entry, head, 64:75]]
    keys = k[entry, 1, plan.key_order.index[entry, 1, 32:48]]
    means = queries.mean(0), keys.mean(0)
    off = plan.scale * (queries @ keys.T - means[0] @ means[1])
    assert found.largest[entry, head, i, j] == pytest.approx(float(off.abs().max()))
    assert found.mean[entry, head, i, j] == pytest.approx(float(off.abs().mean()))
    radius = [float((x - mean).norm(dim=-1).max()) for x, mean in zip((queries, keys), means, strict=True)]
    norm = [float(x.norm(dim=-1).max()) for x in (queries, keys)]
    bound = plan.scale * (radius[0] * norm[1] + norm[0] * radius[1] + radius[0] * radius[1])
    assert found.bound[entry, head, i, j] == pytest.approx(bound)


def test_pearson():
    x = torch.tensor([1.0, 2.0, 3.0, math.nan, 5.0])
    assert pearson(x, 3 * x + 1) == pytest.approx(1)
    assert pearson(x, -x) == pytest.approx(-1)
    y = torch.tensor([1.0, 0.0, 4.0, 9.0, 2.0])
    assert pearson(x, y) == pytest.approx(float(torch.corrcoef(torch.stack([x, y])[:, [0, 1, 2, 4]])[0, 1]))
    with pytest.raises(ValueError, match="at least two finite pairs, got 1"):
        pearson(x[:1], y[:1])
    with pytest.raises(ValueError, match="got a constant"):
        pearson(x, torch.ones(5))
