"""The whole operator against the naive implementation, against dense attention, and the invariants it promises."""

import dataclasses
import math

import numpy
import pytest
import torch
import torch.nn.functional as F

from baatt import BAAttConfig, attend, attend_partial, ba_attention, make_plan
from baatt.config import BLOCK_SIZES
from baatt.stages.sorting import ORDERS
from tests.budget import assert_float64_within_budget, assert_within_budget, eager_dtype
from tests.naive import naive_ba_attention
from tests.pairs import mostly_pairs
from tests.settings import sorted_config

IMPLS = ["reference", "cpu"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.parametrize("impl", IMPLS)
both_settings = pytest.mark.parametrize(
    "config", [sorted_config(16, segment=32), BAAttConfig(16)], ids=["sorted", "clusters"]
)


def random_inputs(batch, heads, groups, queries, keys, channels, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, queries, channels), (batch, groups, keys, channels), (batch, groups, keys, channels)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def masks(batch, keys):
    """Keys masked on the left, on the right, inside, all but one, and all of them; None."""
    place = torch.arange(keys)
    rows = {
        "left": place >= keys // 3,
        "right": place < keys - keys // 3,
        "interior": place % 3 != 1,
        "one": place == keys // 2,
        "all": place < 0,
    }
    mixed = torch.stack([list(rows.values())[b % len(rows)] for b in range(batch)])
    return {name: row.expand(batch, keys) for name, row in rows.items()} | {"none": None, "mixed": mixed}


def dense(q, k, v, key_mask=None, scale=None):
    mask = None if key_mask is None else key_mask[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out if key_mask is None else torch.where(mask.any(-1, keepdim=True), out, 0)


def dense_in_80_bits(q, k, v):
    q, k, v = (x.numpy().astype(numpy.longdouble) for x in (q, k, v))
    k, v = (x.repeat(q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    logits = numpy.einsum("bhnd,bhmd->bhnm", q, k) / numpy.sqrt(numpy.longdouble(q.shape[-1]))
    weights = numpy.exp(logits - logits.max(axis=-1, keepdims=True))
    return numpy.einsum("bhnm,bhmd->bhnd", weights / weights.sum(axis=-1, keepdims=True), v)


def assert_dense(actual, q, k, v, key_mask=None):
    if q.dtype == torch.float64 and key_mask is None and numpy.finfo(numpy.longdouble).eps < 1e-18:
        assert_float64_within_budget(actual, dense(q, k, v), dense_in_80_bits(q, k, v))
        return
    exact, eager = ([x.to(dtype) for x in (q, k, v)] for dtype in (torch.float64, eager_dtype(q.dtype)))
    assert_within_budget(actual, dense(*eager, key_mask), dense(*exact, key_mask))


def assert_equals_naive(q, k, v, config, impl, key_mask=None, scale=None):
    plan = make_plan(q, k, config, key_mask=key_mask, scale=scale, impl=impl)
    out, _, kept = naive_ba_attention(
        q,
        k,
        v,
        block_size=config.block_size,
        sparsity=config.sparsity,
        sort=config.sort,
        segment=config.segment,
        beta=config.beta,
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
        key_mask=key_mask,
    )
    for b, heads in enumerate(kept):
        for h, blocks in enumerate(heads):
            for i, ids in enumerate(blocks):
                count = int(plan.selection.count[b, h, i])
                assert plan.selection.index[b, h, i, :count].tolist() == ids
    actual = ba_attention(q, k, v, config, key_mask=key_mask, scale=scale, impl=impl)
    torch.testing.assert_close(actual, out, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sort", ORDERS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_equals_naive_for_every_sort_and_sparsity(impl, sort, sparsity):
    inputs = random_inputs(2, 2, 1, 37, 61, 5)
    config = sorted_config(block_size=16, sparsity=sparsity, sort=sort, segment=32)
    assert_equals_naive(*inputs, config, impl, key_mask=masks(2, 61)["mixed"])


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1, 1),
        (1, 1, 1, 1, 40, 3),
        (1, 1, 1, 40, 1, 3),
        (3, 2, 2, 17, 33, 2),
        (1, 6, 2, 48, 32, 7),
        (1, 4, 1, 16, 49, 16),
    ],
)
@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
def test_equals_naive_for_odd_shapes_and_betas(impl, shape, beta):
    assert_equals_naive(*random_inputs(*shape), sorted_config(block_size=16, segment=16, beta=beta), impl)


@pytest.mark.parametrize("name", ["left", "right", "interior", "one", "all", "mixed", "none"])
@pytest.mark.parametrize("segment", [None, 16, 48])
def test_equals_naive_for_every_mask_and_segment(impl, name, segment):
    config = sorted_config(block_size=16, sparsity=0.6, segment=segment)
    assert_equals_naive(*random_inputs(2, 2, 1, 20, 50, 4), config, impl, key_mask=masks(2, 50)[name], scale=0.9)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_equals_naive_for_every_block_size(impl, block_size):
    config = sorted_config(block_size=block_size, segment=2 * block_size)
    assert_equals_naive(*random_inputs(1, 1, 1, 33, 150, 4), config, impl)


@mostly_pairs("sort, name, dtype", list(ORDERS), ["none", "left", "interior", "mixed"], DTYPES)
def test_without_sparsity_it_is_dense_attention(impl, dtype, sort, name):
    q, k, v = random_inputs(5, 4, 2, 70, 150, 24, dtype)
    key_mask = masks(5, 150)[name]
    config = sorted_config(block_size=32, sparsity=0.0, sort=sort, segment=64)
    actual = ba_attention(q, k, v, config, key_mask=key_mask, impl=impl)
    assert_dense(actual, q, k, v, key_mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1, 1), (2, 3, 3, 129, 257, 64), (1, 8, 2, 300, 128, 128), (1, 2, 1, 64, 1000, 40)]
)
def test_without_sparsity_it_is_dense_attention_for_odd_shapes(impl, dtype, shape):
    q, k, v = random_inputs(*shape, dtype)
    actual = ba_attention(q, k, v, sorted_config(sparsity=0.0), impl=impl)
    assert_dense(actual, q, k, v)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@both_settings
def test_masked_keys_count_for_nothing(impl, dtype, config):
    """The result for an entry is the one for that entry with its masked keys taken out."""
    q, k, v = random_inputs(3, 4, 2, 75, 200, 16, dtype)
    key_mask = torch.rand(3, 200, generator=torch.Generator().manual_seed(1)) > 0.4
    config = dataclasses.replace(config, sparsity=0.7)
    plan = make_plan(q, k, config, key_mask=key_mask, impl=impl)
    out = attend(q, k, v, plan, impl=impl)
    for b in range(3):
        entry, keep = slice(b, b + 1), key_mask[b]
        alone = make_plan(q[entry], k[entry][:, :, keep], config, impl=impl)
        slots = alone.selection.index.shape[-1]
        assert torch.equal(plan.selection.index[entry, ..., :slots], alone.selection.index)
        assert torch.equal(plan.selection.count[entry], alone.selection.count)
        alone_out = attend(q[entry], k[entry][:, :, keep], v[entry][:, :, keep], alone, impl=impl)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(out[entry], alone_out, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@both_settings
def test_values_of_masked_keys_do_not_matter(impl, dtype, poison, config):
    q, k, v = random_inputs(5, 2, 1, 40, 90, 8, dtype)
    key_mask = masks(5, 90)["mixed"]
    dirty_k, dirty_v = (x.masked_fill(~key_mask[:, None, :, None], poison) for x in (k, v))
    clean = ba_attention(q, k, v, config, key_mask=key_mask, impl=impl)
    assert torch.equal(ba_attention(q, dirty_k, dirty_v, config, key_mask=key_mask, impl=impl), clean)
    assert torch.isfinite(clean).all()
    assert (clean[4] == 0).all(), "an entry without a key gives 0"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(3, 1, 1, 7, 13, 15), (3, 2, 2, 130, 70, 33), (2, 6, 2, 65, 300, 64), (5, 1, 1, 3, 40, 1)]
)
@both_settings
def test_an_entry_does_not_depend_on_the_batch(impl, dtype, shape, config):
    q, k, v = random_inputs(*shape, dtype)
    key_mask = masks(shape[0], shape[4])["mixed"]
    plan = make_plan(q, k, config, key_mask=key_mask, impl=impl)
    out = attend(q, k, v, plan, impl=impl)
    for b in range(shape[0]):
        entry = slice(b, b + 1)
        alone = make_plan(q[entry], k[entry], config, key_mask=key_mask[entry], impl=impl)
        assert torch.equal(alone.selection.index, plan.selection.index[entry])
        assert torch.equal(attend(q[entry], k[entry], v[entry], alone, impl=impl), out[entry])


def test_is_deterministic(impl):
    q, k, v = random_inputs(2, 4, 2, 200, 300, 32, torch.float32)
    first = ba_attention(q, k, v, impl=impl)
    assert all(torch.equal(ba_attention(q, k, v, impl=impl), first) for _ in range(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@both_settings
def test_memory_layout_does_not_matter(impl, dtype, config):
    q, k, v = random_inputs(2, 4, 2, 70, 90, 16, dtype)
    expected = ba_attention(q, k, v, config, impl=impl)
    shared = torch.stack([k, v])
    layouts = {
        "tokens before heads": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)],
        "channels strided": [torch.stack([x, x], dim=-1)[..., 1] for x in (q, k, v)],
        "channels before tokens": [x.mT.contiguous().mT for x in (q, k, v)],
        "views of one storage": [q, shared[0], shared[1]],
        "a slice of more tokens": [torch.cat([x, x], dim=2)[:, :, : x.shape[2]] for x in (q, k, v)],
    }
    eps = torch.finfo(dtype).eps
    for name, tensors in layouts.items():
        actual = ba_attention(*tensors, config, impl=impl)
        torch.testing.assert_close(
            actual, expected, rtol=4 * eps, atol=4 * eps, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert actual.is_contiguous()


def test_heads_expanded_without_a_copy(impl):
    q, k, v = random_inputs(2, 4, 1, 40, 50, 8)
    config = sorted_config(block_size=16, segment=32)
    expected = ba_attention(q, k, v, config, impl=impl)
    torch.testing.assert_close(
        ba_attention(q, k.expand(2, 4, 50, 8), v.expand(2, 4, 50, 8), config, impl=impl), expected
    )


def test_inputs_are_left_alone(impl):
    tensors = random_inputs(1, 2, 2, 40, 50, 8, torch.float32)
    copies = [x.clone() for x in tensors]
    ba_attention(*tensors, impl=impl)
    assert all(torch.equal(x, copy) for x, copy in zip(tensors, copies, strict=True))


def test_modes_of_the_caller_do_not_matter(impl):
    q, k, v = random_inputs(1, 4, 2, 100, 200, 16, torch.float32)
    expected = ba_attention(q, k, v, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ba_attention(q, k, v, impl=impl), expected)
    with torch.inference_mode():
        assert torch.equal(ba_attention(q.clone(), k, v, impl=impl), expected)
    with torch.no_grad():
        assert torch.equal(ba_attention(q.requires_grad_(), k, v, impl=impl), expected)


def test_a_plan_is_data(impl):
    """Replacing the selection by all blocks gives dense attention; the rest of the plan stays."""
    q, k, v = random_inputs(1, 2, 1, 50, 80, 8)
    config = sorted_config(block_size=16, sparsity=0.8, segment=32)
    plan, full = (
        make_plan(q, k, c, impl=impl) for c in (config, sorted_config(block_size=16, sparsity=0.0, segment=32))
    )
    actual = attend(q, k, v, plan._replace(selection=full.selection), impl=impl)
    torch.testing.assert_close(actual, dense(q, k, v))


def test_scale_defaults_to_the_usual_one(impl):
    q, k, v = random_inputs(1, 2, 1, 50, 80, 8)
    assert torch.equal(ba_attention(q, k, v, impl=impl), ba_attention(q, k, v, scale=1 / math.sqrt(8), impl=impl))


@pytest.mark.parametrize(
    "scale",
    [
        numpy.float32(0.25),
        numpy.float64(0.25),
        numpy.array(0.25),
        torch.tensor(0.25),
        torch.tensor(0.25, dtype=torch.bfloat16),
    ],
    ids=repr,
)
def test_a_scale_of_any_kind(scale, impl):
    q, k, v = random_inputs(1, 2, 1, 50, 80, 8)
    assert torch.equal(ba_attention(q, k, v, scale=scale, impl=impl), ba_attention(q, k, v, scale=0.25, impl=impl))
    plan = make_plan(q, k, BAAttConfig(), scale=scale, impl=impl)
    assert (plan.scale, type(plan.scale)) == (0.25, float)


@pytest.mark.parametrize("sort", [*ORDERS, "clusters"])
@pytest.mark.parametrize("side", ["left", "right", "interior"])
def test_padding_on_both_sides_changes_nothing(impl, sort, side):
    """Real rows of padded self-attention get what they get without the padding, whatever stands there."""
    q, k, v = random_inputs(2, 4, 2, 150, 150, 16, torch.float32)
    mask = masks(2, 150)[side]
    config = BAAttConfig(16, 0.6) if sort == "clusters" else sorted_config(16, 0.6, sort, 64)
    alone = ba_attention(*(x[:, :, mask[0]] for x in (q, k, v)), config, impl=impl)
    for padding in (0.0, 1e3, float("nan")):
        padded = [x.masked_fill(~mask[:, None, :, None], padding) for x in (q, k, v)]
        out = ba_attention(*padded, config, key_mask=mask, query_mask=mask, impl=impl)
        assert torch.equal(out[:, :, mask[0]], alone)


def test_query_mask_alone(impl):
    """What stands in rows that are not wanted does not change the blocks of the others."""
    q, k, v = random_inputs(2, 2, 2, 100, 90, 16, torch.float32)
    wanted = torch.rand(2, 100, generator=torch.Generator().manual_seed(3)) < 0.7
    config = sorted_config(block_size=16, sparsity=0.7, sort="qk", segment=32)
    first, second = (
        ba_attention(q.masked_fill(~wanted[:, None, :, None], x), k, v, config, query_mask=wanted, impl=impl)
        for x in (0.0, 50.0)
    )
    assert torch.equal(first.transpose(1, 2)[wanted], second.transpose(1, 2)[wanted])


@pytest.mark.parametrize("score", ["covariance", "clusters", "antidiagonal-8", "covariance-8"])
def test_one_budget_for_a_head(impl, score):
    """Every implementation attends over uneven lists, as many block pairs as row by row, whatever the batch."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, heads, 90, 16, generator=generator) for heads in (4, 2, 2))
    k[0, 0, 16:48] *= 4
    mask = torch.arange(90) < torch.tensor([[90], [60]])
    config = BAAttConfig(16, 0.6, score=score, budget="head")
    masks = {"key_mask": mask, "query_mask": mask}
    plan = make_plan(q, k, config, **masks, impl=impl)
    even = make_plan(q, k, dataclasses.replace(config, budget="row"), **masks, impl=impl).selection.count
    assert torch.equal(plan.selection.count.sum(-1), even.sum(-1))
    assert not torch.equal(plan.selection.count, even)
    out = ba_attention(q, k, v, config, **masks, impl=impl)
    exact = attend(q.double(), k.double(), v.double(), plan, impl="reference")
    torch.testing.assert_close(out, exact.float(), rtol=1e-5, atol=1e-6)
    alone = ba_attention(q[1:, :, :60], k[1:, :, :60], v[1:, :, :60], config, impl=impl)
    torch.testing.assert_close(out[1:, :, :60], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [None, 1])
def test_parts_of_the_keys_join_exactly(impl, causal):
    q, k, v = random_inputs(2, 4, 2, 70, 70, 8)
    mask = masks(2, 70)["mixed"]
    config, halves = BAAttConfig(16, 0.0), (torch.arange(70) < 33, torch.arange(70) >= 33)
    parts = []
    for half in halves:
        plan = make_plan(q, k, config, causal=causal, key_mask=mask & half, impl=impl)
        parts.append(attend_partial(q, k, v, plan, impl=impl))
        assert torch.equal(parts[-1].out, attend(q, k, v, plan, impl=impl))
    lse = torch.stack([part.lse for part in parts])
    weights = (lse - lse.logsumexp(0)).exp().nan_to_num()  # -inf - -inf where a row sees no key of any part
    joined = sum(weight[..., None] * part.out for weight, part in zip(weights, parts, strict=True))
    whole = attend_partial(q, k, v, make_plan(q, k, config, causal=causal, key_mask=mask, impl=impl), impl=impl)
    torch.testing.assert_close(joined, whole.out, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lse.logsumexp(0), whole.lse, rtol=1e-10, atol=1e-12)
