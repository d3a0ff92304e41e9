"""Dense attention against a softmax in loops, with grouped heads and masked keys."""

import math

import pytest
import torch

from baatt.stages.dense import dense_attention


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
def test_dense_attention_equals_softmax(heads: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, heads[0], 11, 5, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 3, heads[1], 11, 5, generator=generator, dtype=torch.float64)
    key_mask = torch.rand(3, 11, generator=generator) > 0.4
    key_mask[2] = False
    for mask in (None, key_mask):
        expected = torch.zeros_like(q)
        for b in range(3):
            for h in range(heads[0]):
                g = h // (heads[0] // heads[1])
                keep = torch.ones(11, dtype=torch.bool) if mask is None else mask[b]
                if keep.any():
                    weights = (q[b, h] @ k[b, g, keep].T / math.sqrt(5)).softmax(-1)
                    expected[b, h] = weights @ v[b, g, keep]
        torch.testing.assert_close(dense_attention(q, k, v, key_mask=mask), expected, rtol=1e-10, atol=1e-10)
