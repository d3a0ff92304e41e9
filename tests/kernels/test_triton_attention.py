"""Portable Triton attention against `stages.sparse` in fp64, in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU; see tests/gpu", allow_module_level=True)

from baatt.kernels import triton_attention
from baatt.stages import sorting, sparse
from baatt.types import BlockSelection
from tests.budget import assert_within_budget, eager_dtype

SHAPES = [  # B, H, G, N, M, D, P
    (2, 4, 2, 40, 70, 16, 16),
    (1, 2, 1, 33, 130, 40, 32),
    (2, 2, 2, 70, 129, 64, 64),
    (1, 1, 1, 1, 1, 3, 128),
]


def case(shape, dtype):
    batch, heads, groups, queries, keys, channels, block_size = shape
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, queries, channels, generator=generator).to(dtype)
    k, v = (torch.randn(batch, groups, keys, channels, generator=generator).to(dtype) for _ in range(2))
    mask = torch.rand(batch, keys, generator=generator) > 0.2
    mask[-1] &= keys == 1
    orders = sorting.by_norm(q, None, None), sorting.by_norm(k, None, mask)
    query_blocks, key_blocks = -(-queries // block_size), -(-keys // block_size)
    ranked = torch.rand(batch, heads, query_blocks, key_blocks, generator=generator).argsort(-1)
    count = torch.randint(1, key_blocks + 1, (batch, heads, query_blocks), generator=generator)
    beyond = torch.arange(key_blocks) >= count[..., None]
    index = ranked.masked_fill(beyond, key_blocks).sort(-1).values.masked_fill(beyond, 0)
    return q, k, v, *orders, BlockSelection(index.int(), count.int())


# The interpreter multiplies bfloat16 as the integers it keeps them in; tests/gpu has that dtype.
@pytest.mark.parametrize(
    ("shape", "dtype", "scale"),
    [
        *zip(SHAPES, [torch.float32] * 4, [0.3, -0.3] * 2, strict=True),
        *zip(SHAPES, [torch.float16] * 4, [-0.3, 0.3] * 2, strict=True),
    ],
)
def test_within_the_error_budget(shape, dtype, scale, poisoned_memory):
    q, k, v, *sides = case(shape, dtype)
    dials = {"block_size": shape[-1], "scale": scale}
    actual = triton_attention.sparse_attention(q, k, v, *sides, **dials)
    exact = sparse.sparse_attention(q.double(), k.double(), v.double(), *sides, **dials)
    eager = sparse.sparse_attention(*(x.to(eager_dtype(dtype)) for x in (q, k, v)), *sides, **dials)
    assert actual.out.dtype == dtype
    assert_within_budget(actual.out, eager.out.to(dtype), exact.out)
    torch.testing.assert_close(actual.lse.double(), exact.lse, atol=1e-5, rtol=1e-5)
    if shape[0] > 1:  # the last entry has no key at all
        assert (actual.out[-1] == 0).all()
