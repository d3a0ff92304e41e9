"""Sorting, pooling and selection for the GPU against the stages they are twins of, in Triton's interpreter."""

import functools

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU; see tests/gpu", allow_module_level=True)

from baatt.kernels import triton_pooling, triton_selection, triton_sorting
from baatt.stages import pooling, scoring, selection, sorting

CASES = [  # B, heads, tokens, D, P, segment, masked
    (2, 4, 75, 40, 16, 32, False),
    (1, 2, 200, 64, 64, None, False),
    (2, 2, 101, 16, 32, 64, True),
    (1, 1, 1, 3, 16, 16, False),
]


def case(batch, heads, tokens, channels, masked, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, heads, channels, generator=generator).transpose(1, 2).to(dtype)
    mask = None
    if masked:
        mask = torch.rand(batch, tokens, generator=generator) > 0.3
        mask[0] = False
        x[~mask[:, None].expand(batch, heads, tokens)] = float("nan")
    return x, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", CASES)
def test_order_and_moments(shape, dtype, poisoned_memory):
    batch, heads, tokens, channels, block_size, segment, masked = shape
    x, mask = case(batch, heads, tokens, channels, masked, dtype)
    order, expected = triton_sorting.by_norm(x, segment, mask), sorting.by_norm(x, segment, mask)
    assert torch.equal(order.index, expected.index)
    assert torch.equal(order.length, expected.length)
    pooled, eager = triton_pooling.pool_tokens(x, order, block_size), pooling.pool_blocks(x, order, block_size)
    torch.testing.assert_close(pooled.stats.mean, eager.mean, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(pooled.stats.variance, eager.variance, atol=2e-6, rtol=2e-6)
    assert torch.equal(pooled.stats.size, eager.size)
    counted = torch.arange(tokens) < order.length[:, None]
    rows = x.gather(2, order.index[..., None].expand_as(x))
    assert torch.equal(pooled.tokens, torch.where(counted[:, None, :, None], rows, 0))
    assert torch.equal(triton_pooling.permute(x, order), pooled.tokens)


def test_equal_and_nan_norms_keep_their_order():
    x = torch.ones(1, 2, 70, 16)
    x[:, :, 7] = float("nan")
    assert torch.equal(triton_sorting.by_norm(x, 32, None).index, sorting.by_norm(x, 32, None).index)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_selection_in_slabs(sparsity, masked, beta, poisoned_memory, monkeypatch):
    q, _ = case(2, 4, 90, 24, False)
    k, mask = case(2, 2, 333, 24, masked)
    query_stats = pooling.pool_blocks(q, sorting.by_norm(q, 32, None), 16)
    key_stats = pooling.pool_blocks(k, sorting.by_norm(k, 32, mask), 16)
    score = functools.partial(scoring.covariance_score, scale=0.2, beta=beta)
    monkeypatch.setattr(triton_selection, "SLAB_SCORES", 2 * 4 * 21 * 3)  # three query blocks at a time
    actual = triton_selection.choose_blocks(query_stats, key_stats, score, sparsity)
    expected = selection.select_blocks(score(query_stats, key_stats), key_stats.size, sparsity)
    assert torch.equal(actual.index, expected.index)
    assert torch.equal(actual.count, expected.count)


def test_ties_go_to_the_lower_id_and_nan_loses():
    scores = torch.tensor([1.0, 2.0, 2.0, -0.0, 0.0, float("nan"), 2.0, float("-inf"), 5.0]).expand(1, 2, 3, 9)
    index = torch.full((1, 2, 3, 4), -1, dtype=torch.int32)
    triton_selection._select(scores.contiguous(), torch.tensor([4], dtype=torch.int32), index, 0)
    assert index.flatten(0, 2).tolist() == [[1, 2, 6, 8]] * 6
    wide = torch.full((1, 2, 3, 6), -1, dtype=torch.int32)
    triton_selection._select(scores.contiguous(), torch.tensor([6], dtype=torch.int32), wide, 0)
    assert wide.flatten(0, 2).tolist() == [[0, 1, 2, 3, 6, 8]] * 6
