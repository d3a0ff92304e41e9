"""Dense attention against a softmax in loops, with grouped heads, masked keys and causal blocks."""

import itertools
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


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "start"), [(11, None), (11, 0), (5, None), (5, 0), (5, 3), (14, 0)])
@pytest.mark.parametrize("causal", [1, 4])
def test_causal_attention_equals_softmax(causal: int, queries: int, start: int | None, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, queries, 5, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 11, 5, generator=generator, dtype=torch.float64)
    key_mask = torch.arange(11) >= torch.tensor([[0], [3]])
    expected = torch.zeros_like(q)
    for b, h, n in itertools.product(range(2), range(4), range(queries)):
        place = n + (11 - queries if start is None else start)
        keep = torch.tensor([j // causal <= place // causal for j in range(11)])
        keep &= key_mask[b] | (not masked)
        if keep.any():
            weights = (k[b, h // 2, keep] @ q[b, h, n] / math.sqrt(5)).softmax(-1)
            expected[b, h, n] = weights @ v[b, h // 2, keep]
    options = {"key_mask": key_mask if masked else None, "causal": causal, "query_start": start}
    torch.testing.assert_close(dense_attention(q, k, v, **options), expected, rtol=1e-10, atol=1e-10)
