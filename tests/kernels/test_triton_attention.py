"""Portable Triton attention against `stages.sparse` in fp64, in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU; see tests/gpu", allow_module_level=True)

from baatt.backend import _sort_on_gpu
from baatt.kernels import triton_arrangement, triton_attention
from baatt.stages import sorting, sparse
from baatt.types import BlockSelection
from tests.budget import assert_within_budget, eager_dtype
from tests.settings import sorted_config

DTYPES = [torch.float32, torch.float16, torch.float16, torch.float32]
SHAPES = [  # B, H, G, N, M, D, P
    (2, 4, 2, 40, 70, 16, 16),
    (1, 2, 1, 33, 130, 40, 32),
    (2, 2, 2, 70, 129, 64, 64),
    (1, 1, 1, 1, 1, 3, 128),
]


def case(shape, dtype):
    batch, heads, groups, queries, keys, channels, _ = shape
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, queries, channels, generator=generator).to(dtype)
    k, v = (torch.randn(batch, groups, keys, channels, generator=generator).to(dtype) for _ in range(2))
    mask = torch.rand(batch, keys, generator=generator) > 0.2
    mask[-1] &= keys == 1
    orders = sorting.by_norm(q, None, None), sorting.by_norm(k, None, mask)
    return q, k, v, *orders, random_selection(shape, generator)


def random_selection(shape, generator):
    batch, heads, _, queries, keys, _, block_size = shape
    query_blocks, key_blocks = -(-queries // block_size), -(-keys // block_size)
    ranked = torch.rand(batch, heads, query_blocks, key_blocks, generator=generator).argsort(-1)
    count = torch.randint(1, key_blocks + 1, (batch, heads, query_blocks), generator=generator)
    beyond = torch.arange(key_blocks) >= count[..., None]
    index = ranked.masked_fill(beyond, key_blocks).sort(-1).values.masked_fill(beyond, 0)
    return BlockSelection(index.int(), count.int())


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


def transposed(x):
    """x [B, G, M, D] as models have it: tokens before heads, inside of a larger tensor."""
    batch, heads, tokens, channels = x.shape
    wide = x.new_full((batch, tokens + 9, heads + 3, channels + 8), float("nan"))
    view = wide[:, 4 : tokens + 4, 1 : heads + 1, :channels].transpose(1, 2)
    return view.copy_(x)


def spread(x):
    """x [B, G, M, D] with channels that are not side by side and whose number does not divide any stride."""
    batch, heads, tokens, channels = x.shape
    wide = x.new_full((batch, heads, channels, 2, tokens + 7), float("nan"))
    return wide[:, :, :, 1, 5 : tokens + 5].transpose(2, 3).copy_(x)


VIEWS = {
    "contiguous": (torch.clone, torch.clone),
    "transposed": (transposed, transposed),
    "spread": (spread, spread),
    "mixed": (transposed, spread),
    "one head for all": (lambda x: x[:, :1].expand_as(x), torch.clone),
}


@pytest.mark.parametrize(
    ("view", "shape", "sort", "dtype"),
    [
        pytest.param(view, shape, sort, dtype, marks=[] if (place + step) % 3 == 0 else pytest.mark.slow)
        for place, view in enumerate(VIEWS)
        for step, (shape, sort, dtype) in enumerate(zip(SHAPES, ("none", "q") * 2, DTYPES, strict=True))
    ],
)
def test_keys_that_are_not_sorted_are_read_where_they_are(view, shape, sort, dtype, poisoned_memory, monkeypatch):
    monkeypatch.setattr(triton_arrangement, "_room_for_copy", None)  # nobody may call it
    q, k, v, *_ = case(shape, dtype)
    k, v = (function(x) for function, x in zip(VIEWS[view], (k, v), strict=True))
    blocks = _sort_on_gpu({}, transposed(q), k, v, sorted_config(shape[-1], sort=sort, segment=shape[-1]), None)
    assert blocks.sorted_k.data_ptr() == k.data_ptr()
    assert blocks.sorted_v.data_ptr() == v.data_ptr()
    assert blocks.key_order.index.untyped_storage().nbytes() == 8 * k.shape[2]
    sides = blocks.query_order, blocks.key_order, random_selection(shape, torch.Generator().manual_seed(1))
    dials = {"block_size": shape[-1], "scale": 0.3}
    attend = triton_attention.sparse_attention
    actual = attend(transposed(q), k, v, *sides, **dials, sorted_k=blocks.sorted_k, sorted_v=blocks.sorted_v)
    exact = sparse.sparse_attention(q.double(), k.double(), v.double(), *sides, **dials)
    eager = sparse.sparse_attention(*(x.to(eager_dtype(dtype)) for x in (q, k, v)), *sides, **dials)
    assert_within_budget(actual.out, eager.out.to(dtype), exact.out)
    torch.testing.assert_close(actual.lse.double(), exact.lse, atol=1e-5, rtol=1e-5)
    alone = attend(q, k.contiguous(), v.contiguous(), *sides, **dials)  # as from `baatt.attend`: nothing handed over
    assert torch.equal(alone.out, actual.out)
    assert torch.equal(alone.lse, actual.lse)


def test_tokens_too_far_apart_for_32_bits_are_copied(monkeypatch):
    monkeypatch.setattr(triton_attention, "FAR", 32)
    q, k, v, *sides = case(SHAPES[0], torch.float32)
    dials = {"block_size": 16, "scale": 0.3, "sorted_k": transposed(k), "sorted_v": spread(v)}
    contiguous = dials | {"sorted_k": k, "sorted_v": v}
    attend = triton_attention.sparse_attention
    assert torch.equal(attend(q, k, v, *sides, **dials).out, attend(q, k, v, *sides, **contiguous).out)
