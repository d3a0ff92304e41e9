"""Properties of the operator over random shapes, masks and options."""

import math

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from baatt import BAAttConfig, attend, ba_attention, make_plan
from baatt.stages.sorting import ORDERS
from tests.settings import sorted_config

configs = st.builds(
    BAAttConfig,
    block_size=st.sampled_from([16, 32]),
    sparsity=st.floats(0, 0.99),
    sort=st.sampled_from(list(ORDERS)),
    segment=st.sampled_from([None, 32, 64]),
    beta=st.sampled_from([0.0, 0.5]),
)


@st.composite
def inputs(draw):
    batch, groups, repeats = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    queries, keys, channels = draw(st.integers(1, 70)), draw(st.integers(1, 70)), draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    q = torch.randn(batch, groups * repeats, queries, channels, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, batch, groups, keys, channels, generator=generator, dtype=torch.float64)
    key_mask = torch.rand(batch, keys, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.9, 1.1]))
    return q, k, v, key_mask


@settings(max_examples=60, deadline=None, derandomize=True)
@given(inputs(), configs)
def test_the_cpu_kernel_is_the_reference(tensors, config):
    q, k, v, key_mask = tensors
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        x, y, z = q.to(dtype), k.to(dtype), v.to(dtype)
        plan = make_plan(x, y, config, key_mask=key_mask, impl="reference")
        expected, actual = (attend(x, y, z, plan, impl=impl) for impl in ("reference", "cpu"))
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(inputs(), configs)
def test_a_plan_keeps_its_promises(tensors, config):
    q, k, _, key_mask = tensors
    plan = make_plan(q, k, config, key_mask=key_mask)
    index, count = plan.selection[:2]
    length = key_mask.sum(-1)
    blocks = -(-length // config.block_size)
    for b in range(q.shape[0]):
        kept = min(int(blocks[b]), max(1, math.ceil((1 - config.sparsity) * int(blocks[b]))))
        assert (count[b] == kept).all()
        assert (index[b, ..., :kept].diff(dim=-1) > 0).all()
        assert ((index[b] >= 0) & (index[b] < max(1, int(blocks[b])))).all()
        assert key_mask[b][plan.key_order.index[b, :, : length[b]]].all()
    for order in (plan.query_order.index, plan.key_order.index):
        assert (order.sort(-1).values == torch.arange(order.shape[-1])).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(inputs(), configs)
def test_outputs_are_averages_of_values(tensors, config):
    q, k, v, key_mask = tensors
    constant = torch.ones_like(v) * 3.5
    out = ba_attention(q, k, constant, config, key_mask=key_mask)
    expected = torch.where(key_mask.any(-1), 3.5, 0.0).double()[:, None, None, None].expand_as(out)
    torch.testing.assert_close(out, expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(inputs(), st.sampled_from(list(ORDERS)), st.sampled_from([None, 16, 48]))
def test_without_sparsity_it_is_dense_attention(tensors, sort, segment):
    q, k, v, key_mask = tensors
    config = sorted_config(block_size=16, sparsity=0.0, sort=sort, segment=segment)
    out = ba_attention(q, k, v, config, key_mask=key_mask)
    mask = key_mask[:, None, None, :]
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(out, torch.where(mask.any(-1, keepdim=True), dense, 0))
