"""Counting of block pairs against the lists of plans."""

import pytest
import torch

from baatt import BAAttConfig, make_plan
from baatt.integrations.counts import block_pairs


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("causal", [None, 1, 4, 24, 100])
@pytest.mark.parametrize(
    ("queries", "keys", "start"), [(70, 70, 0), (30, 70, 40), (30, 70, 7), (70, 30, 0), (64, 64, 0)]
)
def test_pairs_are_those_of_plans(queries, keys, start, causal, sparsity):
    q, k = torch.randn(1, 1, queries, 8), torch.randn(1, 1, keys, 8)
    structure = {} if causal is None else {"causal": causal, "query_start": start}
    plans = [make_plan(q, k, BAAttConfig(block_size=16, sparsity=s), **structure) for s in (0.0, sparsity)]
    seen, kept = (int(plan.selection.count.sum()) for plan in plans)
    assert block_pairs(plans[1].config, queries, keys, causal, start) == (seen, kept)
