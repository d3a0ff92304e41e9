"""Causal and block-causal attention: against loops, against dense attention with that mask, and what it refuses."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from baatt import BAAttConfig, attend, ba_attention, make_plan
from baatt.scores import SCORES
from tests.budget import assert_within_budget, eager_dtype
from tests.naive_causal import naive_causal_attention
from tests.test_attention import random_inputs

IMPLS = ["reference", "cpu"]
CONFIG = BAAttConfig(16, 0.6, representatives=3, refinements=1)


def structures(queries, keys):
    """Name -> arguments: lengths of blocks that divide a block of 16 or do not, offsets, and masks."""
    place, rows = torch.arange(keys), torch.arange(queries)
    start = keys - queries
    left, right = place >= torch.tensor([[5], [keys // 3]]), place < torch.tensor([[keys - 3], [keys // 2]])
    return {
        "plain": {"causal": 1},
        "blocks": {"causal": 4},
        "odd blocks": {"causal": 7},
        "long blocks": {"causal": 24},
        "one block": {"causal": 1000},
        "in the middle": {"causal": 4, "query_start": start // 2},
        "at the front": {"causal": 1, "query_start": 0},
        "behind": {"causal": 8, "query_start": keys + 20},
        "left": {"causal": 1, "key_mask": left, "query_mask": left[:, start:]},
        "right": {"causal": 4, "key_mask": right, "query_mask": right[:, start:]},
        "keys": {"causal": 1, "key_mask": left},
        "interior": {"causal": 4, "key_mask": (place % 3 != 1).expand(2, -1)},
        "scattered queries": {"causal": 1, "query_mask": (rows % 5 == 2).expand(2, -1)},
        "nothing": {"causal": 1, "key_mask": place < torch.tensor([[0], [keys]])},
    }


NAMES = list(structures(37, 61))


def visible_keys(queries, keys, causal, query_start=None, key_mask=None, query_mask=None):
    """[1 or B, 1, N, M] bool."""
    start = keys - queries if query_start is None else query_start
    seen = torch.arange(keys) // causal <= (start + torch.arange(queries))[:, None] // causal
    return seen[None, None] if key_mask is None else seen[None, None] & key_mask[:, None, None, :]


def dense(q, k, v, visible):
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    return out.masked_fill(~visible.any(-1, keepdim=True), 0)


def wanted_rows(q, query_mask=None, **_):
    rows = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool) if query_mask is None else query_mask
    return rows[:, None].expand(q.shape[:3])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("score", ["clusters", "covariance", "exact"])
def test_equals_naive(name, score):
    inputs = random_inputs(2, 2, 1, 37, 61, 5)
    config, structure = dataclasses.replace(CONFIG, score=score), structures(37, 61)[name]
    expected = naive_causal_attention(*inputs, config, **{"query_start": 24, **structure}, scale=5**-0.5)
    for impl in IMPLS:
        check_naive(inputs, config, structure, impl, *expected)


def check_naive(inputs, config, structure, impl, expected, kept):
    q, k, v = inputs
    plan = make_plan(q, k, config, **structure, impl=impl)
    for b, heads in enumerate(kept):
        for h, blocks in enumerate(heads):
            count = plan.selection.count[b, h].tolist()
            found = [plan.selection.index[b, h, i, :some].tolist() for i, some in enumerate(count)]
            assert found == blocks + [[]] * (len(found) - len(blocks))
    rows = wanted_rows(q, **structure)
    out = ba_attention(q, k, v, config, **structure, impl=impl)
    torch.testing.assert_close(out[rows], expected[rows], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(attend(q, k, v, plan, impl=impl), out, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_without_sparsity_it_is_dense_attention(impl, dtype, name):
    inputs = random_inputs(2, 4, 2, 70, 131, 16, dtype)
    structure = structures(70, 131)[name]
    out = ba_attention(*inputs, BAAttConfig(16, 0.0), **structure, impl=impl)
    visible, rows = visible_keys(70, 131, **structure), wanted_rows(inputs[0], **structure)
    exact, eager = (dense(*(x.to(kind) for x in inputs), visible) for kind in (torch.float64, eager_dtype(dtype)))
    assert_within_budget(out[rows], eager[rows], exact[rows])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("budget", ["row", "head"])
@pytest.mark.parametrize("name", ["plain", "odd blocks", "left"])
def test_every_score_keeps_its_budget_and_what_lies_ahead_has_no_influence(score, budget, name):
    q, k, v = random_inputs(2, 4, 2, 80, 80, 16, torch.float32)
    config, structure = BAAttConfig(16, 0.5, score=score, budget=budget, representatives=4), structures(80, 80)[name]
    plan = make_plan(q, k, config, **structure)
    seen = plan.sight.spans[..., 3]
    count = plan.selection.count
    kept = (seen / 2).ceil().long()
    assert (count <= seen[:, None]).all()
    if budget == "row":
        assert (
            count == torch.maximum(kept, (plan.sight.spans[..., :2].diff(dim=-1)[..., 0] + 1) * (seen > 0))[:, None]
        ).all()
    else:
        assert (count.sum(-1) == kept.sum(-1, keepdim=True)).all()
    index, diagonal = plan.selection.index, plan.sight.spans[..., 1]
    assert ((index == diagonal[:, None, :, None]).any(-1) | (seen == 0)[:, None]).all()
    out = ba_attention(q, k, v, config, **structure)
    ahead = torch.arange(80) >= 64  # key blocks that only the last query block sees
    k, v = (torch.where(ahead[:, None], 100.0, x) for x in (k, v))
    if budget == "row" and name == "plain":
        torch.testing.assert_close(ba_attention(q, k, v, config, **structure)[:, :, :64], out[:, :, :64])


@pytest.mark.parametrize("impl", IMPLS)
def test_keys_in_order_of_their_norm_inside_a_block(impl):
    q, k, v = random_inputs(1, 2, 1, 96, 96, 8, torch.float64)
    config = BAAttConfig(16, 0.0, sort="qk", segment=32)
    out = ba_attention(q, k, v, config, causal=64, impl=impl)
    torch.testing.assert_close(out, dense(q, k, v, visible_keys(96, 96, 64)))


@pytest.mark.parametrize(
    ("options", "structure", "said"),
    [
        ({}, {"causal": 0}, "causal must be at least 1, got 0"),
        ({}, {"query_start": 3}, "query_start must be None where causal is None, got 3"),
        ({}, {"causal": 1, "query_start": -1}, "query_start must be at least 0, got -1"),
        ({"sort": "k", "segment": 32}, {"causal": 48}, "sort must be 'none' with causal=48 unless segment divides it"),
        ({"sort": "k", "segment": None}, {"causal": 64}, "sort must be 'none' with causal=64 unless segment divides"),
        ({"sort": "q", "segment": 32}, {"causal": 64, "query_start": 16}, "unless segment=32 divides query_start=16"),
        (
            {"sort": "k", "segment": 32},
            {"causal": 64, "key_mask": torch.ones(1, 64, dtype=torch.bool)},
            "and masked tokens, which move the segments, got 'k'",
        ),
    ],
)
def test_refusals(options, structure, said):
    q, k, v = random_inputs(1, 1, 1, 64, 64, 8)
    with pytest.raises(ValueError, match=said):
        ba_attention(q, k, v, BAAttConfig(16, **options), **structure)


def test_more_queries_than_keys_need_a_start():
    q, k, v = random_inputs(1, 1, 1, 64, 32, 8)
    with pytest.raises(ValueError, match="query must have at most M=32 tokens where query_start is None, got N=64"):
        ba_attention(q, k, v, BAAttConfig(16), causal=1)
    with pytest.raises(TypeError, match="causal must be an int or None, got True"):
        ba_attention(q, k, v, BAAttConfig(16), causal=True)


def test_a_graph_passes_through_it():
    q, k, v = random_inputs(1, 2, 1, 64, 80, 8, torch.float32)
    compiled = torch.compile(ba_attention, backend="eager", fullgraph=True)
    expected = ba_attention(q, k, v, BAAttConfig(16), causal=4)
    assert torch.equal(compiled(q, k, v, BAAttConfig(16), causal=4), expected)
