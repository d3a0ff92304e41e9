"""Order, moments and sorted copies for the GPU against the stages they are twins of, in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU; see tests/gpu", allow_module_level=True)

from baatt.backend import _sort_on_gpu
from baatt.kernels import triton_arrangement
from baatt.scores import SCORES, covariance
from baatt.stages import pooling, sorting
from tests.settings import sorted_config

CASES = [  # B, H, G, N, M, D, P, segment, masked
    (1, 2, 1, 75, 90, 40, 16, 32, False),
    (1, 2, 1, 100, 130, 64, 64, None, False),
    (2, 1, 1, 40, 70, 16, 32, 32, True),
    (1, 1, 1, 1, 3, 3, 16, 16, False),
    (1, 1, 1, 20, 200, 8, 128, 256, True),
]
#: Orders per shape, hand-picked: every order in every dtype. The interpreter's time goes with the numbers it sorts.
PICKED = {
    torch.float32: ("qk", "k", "none", "q", "k"),
    torch.bfloat16: ("q", "none", "k", "qk"),
    torch.float16: ("none", "q", "qk", "k"),
}


def draw(batch, heads, tokens, channels, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, heads, channels, generator=generator).transpose(1, 2).to(dtype)


def case(shape, dtype):
    batch, heads, groups, queries, keys, channels, block_size, segment, masked = shape
    q = draw(batch, heads, queries, channels, dtype, 0)
    k, v = (draw(batch, groups, keys, channels, dtype, seed) for seed in (1, 2))
    mask = None
    if masked:
        mask = torch.rand(batch, keys, generator=torch.Generator().manual_seed(3)) > 0.3
        if batch > 1:
            mask[0] = False
        for x in (k, v):
            x[~mask[:, None].expand(batch, groups, keys)] = float("nan")
    return q, k, v, mask, block_size, segment


def check_side(x, order, stats, expected, block_size):
    assert torch.equal(order.index, expected.index)
    assert torch.equal(order.length, expected.length)
    assert order.identity == expected.identity
    eager = pooling.pool_blocks(x, expected, block_size)
    torch.testing.assert_close(stats.mean, eager.mean, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(stats.variance, eager.variance, atol=2e-6, rtol=2e-6)
    assert torch.equal(stats.size, eager.size)


@pytest.mark.parametrize(("keys", "masked", "shared"), [(40, False, True), (41, False, False), (40, True, False)])
def test_sides_that_stay_share_their_order(keys, masked, shared):
    q, k = draw(2, 4, 40, 16, torch.float32, 0), draw(2, 2, keys, 16, torch.float32, 1)
    mask = torch.arange(keys).expand(2, -1) > 3 if masked else None
    blocks = _sort_on_gpu({}, q, k, None, sorted_config(16, sort="none", score="window"), mask)
    for x, order, one in ((q, blocks.query_order, None), (k, blocks.key_order, mask)):
        expected = sorting.by_position(x, None, one)
        assert torch.equal(order.index, expected.index)
        assert torch.equal(order.length, expected.length)
        assert order.identity == expected.identity
    assert (blocks.key_order.index.data_ptr() == blocks.query_order.index.data_ptr()) == shared


def check_copy(x, order, copy):
    if order.identity:
        assert copy is x
        return
    counted = torch.arange(x.shape[2]) < order.length[:, None]
    rows = x.gather(2, order.index[..., None].expand_as(x))
    assert torch.equal(copy, torch.where(counted[:, None, :, None], rows, 0))
    assert torch.equal(triton_arrangement.sorted_copies(x, x, order, None, x)[0], copy)


@pytest.mark.parametrize(
    ("shape", "dtype", "sort"),
    [
        *((shape, dtype, sort) for dtype, sorts in PICKED.items() for shape, sort in zip(CASES, sorts, strict=False)),
        pytest.param((1, 1, 1, 20, 1100, 8, 128, 1152, True), torch.float32, "k", marks=pytest.mark.slow),
    ],
)
def test_orders_moments_and_copies(shape, dtype, sort, poisoned_memory):
    q, k, v, mask, block_size, segment = case(shape, dtype)
    config = sorted_config(block_size=block_size, segment=segment, sort=sort)
    order_queries, order_keys = sorting.ORDERS[sort]
    found = _sort_on_gpu({}, q, k, v, config, mask)
    key_order = order_keys(k, segment, mask)
    check_side(q, found.query_order, found.query_summary, order_queries(q, segment, None), block_size)
    check_side(k, found.key_order, found.key_summary, key_order, block_size)
    check_copy(k, key_order, found.sorted_k)
    check_copy(v, key_order, found.sorted_v)
    assert _sort_on_gpu({}, q, k, None, config, mask).sorted_v is None


@pytest.mark.parametrize("masked", [False, True])
def test_segments_too_long_for_the_kernel_are_sorted_by_the_stage(masked, poisoned_memory, monkeypatch):
    monkeypatch.setattr(triton_arrangement, "LONGEST", 64)
    q, k, v, mask, block_size, _ = case((2, 2, 2, 150, 140, 16, 32, 128, masked), torch.float32)
    found = _sort_on_gpu({}, q, k, v, sorted_config(block_size=block_size, sort="qk", segment=128), mask)
    expected = sorting.by_norm(q, 128, None), sorting.by_norm(k, 128, mask)
    check_side(q, found.query_order, found.query_summary, expected[0], block_size)
    check_side(k, found.key_order, found.key_summary, expected[1], block_size)
    check_copy(k, expected[1], found.sorted_k)
    check_copy(v, expected[1], found.sorted_v)


def test_equal_and_nan_norms_keep_their_order():
    x = torch.ones(1, 2, 70, 16)
    x[:, :, 7] = float("nan")
    found = _sort_on_gpu({}, x, x, None, sorted_config(block_size=16, segment=32), None)
    assert torch.equal(found.key_order.index, sorting.by_norm(x, 32, None).index)


@pytest.mark.parametrize("sort", ["none", "k", "qk"])
def test_masked_queries_stand_behind_and_are_not_pooled(sort, poisoned_memory):
    q, k, v, mask, block_size, _ = case((2, 1, 1, 70, 70, 16, 16, 32, True), torch.float32)
    found = _sort_on_gpu({}, q, k, v, sorted_config(block_size=block_size, sort=sort, segment=32), mask, mask)
    by_norm = sorting.by_norm if sort == "qk" else sorting.by_position
    check_side(q, found.query_order, found.query_summary, by_norm(q, 32, mask), block_size)


@pytest.mark.parametrize("sort", ["none", "q", "k"])
@pytest.mark.parametrize("score", ["covariance", "clusters", "oracle"])  # with moments, with a twin, with neither
def test_nothing_is_made_that_a_score_does_not_want(score, sort, monkeypatch):
    """No moments for a score that has none, no copies but on the way to them, no launch where nothing is sorted."""
    q, k, v, _, block_size, segment = case(CASES[0], torch.float32)
    config = sorted_config(block_size, sort=sort, segment=segment, score=score)
    has_moments = SCORES[score].summarise is covariance.summarise
    unwanted = (["_norm_kernel", "_order_kernel"] if sort == "none" else []) + ["_gather_kernel"] * (not has_moments)
    for kernel in (*unwanted, "_permute_kernel"):
        monkeypatch.setattr(triton_arrangement, kernel, None)
    found = _sort_on_gpu({}, q, k, v, config, None)
    assert (found.sorted_k is k and found.sorted_v is v) == (sort != "k")
    assert (found.sorted_k is None) == (sort == "k" and not has_moments)
    calls = []
    twins = {SCORES[score].summarise: lambda *given: calls.append(given) or (1, 2)}
    found = _sort_on_gpu(twins, q, k, v, config, None)
    if not has_moments:
        assert (found.query_summary, found.key_summary) == (1, 2)
        assert calls == [(q, found.query_order, k, found.key_order, config)]
