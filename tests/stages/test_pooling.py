"""E3: block moments."""

import pytest
import torch

from baatt.stages.pooling import pool_blocks
from baatt.stages.sorting import by_norm
from tests.naive import naive_blocks, naive_moments


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("masked", [False, True])
def test_moments_equal_the_naive_ones(tokens, masked):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(2, 3, tokens, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, tokens, generator=generator) > 0.5 if masked else None
    order = by_norm(x, 32, mask)
    stats = pool_blocks(x, order, 16)
    blocks = -(-tokens // 16)
    assert stats.mean.shape == stats.variance.shape == (2, 3, blocks, 4)
    assert stats.size.shape == (2, blocks)
    for b in range(2):
        for h in range(3):
            members = naive_blocks(order.index[b, h, : order.length[b]].tolist(), 16)
            assert stats.size[b].tolist() == [len(block) for block in members] + [0] * (blocks - len(members))
            for i, block in enumerate(members):
                mean, variance = naive_moments(x[b, h], block)
                torch.testing.assert_close(stats.mean[b, h, i], mean)
                torch.testing.assert_close(stats.variance[b, h, i], variance)
            assert (stats.mean[b, h, len(members) :] == 0).all()
            assert (stats.variance[b, h, len(members) :] == 0).all()


def test_variance_survives_a_large_mean():
    x = (10_000 + torch.randn(1, 1, 128, 8, generator=torch.Generator().manual_seed(0))).float()
    variance = pool_blocks(x, by_norm(x, None, None), 128).variance
    exact = x.double().var(dim=2, correction=0)
    torch.testing.assert_close(variance[:, :, 0].double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_accumulates_in_float32_or_float64(dtype):
    x = torch.randn(1, 1, 40, 4).to(dtype)
    stats = pool_blocks(x, by_norm(x, None, None), 16)
    assert stats.mean.dtype == stats.variance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_masked_values_do_not_leak(poison):
    x, mask = torch.randn(1, 2, 40, 4), torch.ones(1, 40, dtype=torch.bool)
    mask[0, [0, 17, 39]] = False
    dirty = x.masked_fill(~mask[:, None, :, None], poison)
    clean, poisoned = (pool_blocks(y, by_norm(y, 32, mask), 16) for y in (x, dirty))
    for expected, actual in zip(clean, poisoned, strict=True):
        assert torch.equal(expected, actual)
