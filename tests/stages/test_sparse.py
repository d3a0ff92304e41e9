"""E8: block-sparse attention for given orders and blocks."""

import math

import pytest
import torch

from baatt.stages.sorting import by_norm, by_position
from baatt.stages.sparse import sparse_attention
from baatt.types import BlockSelection
from tests.naive import naive_row


def random_case(queries, keys, heads=4, groups=2, channels=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads, queries, channels, generator=generator, dtype=torch.float64)
    k = torch.randn(2, groups, keys, channels, generator=generator, dtype=torch.float64)
    v = torch.randn(2, groups, keys, channels, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, keys, generator=generator) > 0.3
    return q, k, v, mask, generator


def random_selection(batch, heads, query_blocks, key_blocks, slots, generator):
    """Any plan is allowed: counts from 0 to all slots, and blocks without a key."""
    ranked = torch.rand(batch, heads, query_blocks, key_blocks, generator=generator).argsort(-1)[..., :slots]
    count = torch.randint(0, slots + 1, (batch, heads, query_blocks), generator=generator)
    beyond = torch.arange(slots) >= count[..., None]
    index = ranked.masked_fill(beyond, key_blocks).sort(-1).values
    last = index.gather(-1, (count - 1).clamp(min=0)[..., None])
    index = torch.where(beyond, last, index).masked_fill((count == 0)[..., None], 0)
    return BlockSelection(index.int(), count.int())


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (40, 70), (33, 16), (16, 33)])
def test_equals_the_naive_attention(queries, keys):
    q, k, v, mask, generator = random_case(queries, keys)
    query_order, key_order = by_norm(q, 32, None), by_norm(k, 32, mask)
    blocks, slots = -(-keys // 16), (-(-keys // 16) + 1) // 2
    selection = random_selection(2, 4, -(-queries // 16), blocks, slots, generator)
    partial = sparse_attention(q, k, v, query_order, key_order, selection, block_size=16, scale=0.4)
    for b in range(2):
        for h in range(4):
            order = key_order.index[b, h // 2, : key_order.length[b]].tolist()
            for place, n in enumerate(query_order.index[b, h].tolist()):
                kept = selection.index[b, h, place // 16, : selection.count[b, h, place // 16]].tolist()
                attended = [m for j in kept for m in order[16 * j : 16 * j + 16]]
                out, lse = naive_row(q[b, h, n], k[b, h // 2], v[b, h // 2], attended, 0.4)
                torch.testing.assert_close(partial.out[b, h, n], out)
                assert partial.lse[b, h, n].item() == pytest.approx(lse)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_masked_values_do_not_leak(poison):
    q, k, v, mask, generator = random_case(20, 50)
    dirty_k, dirty_v = (x.masked_fill(~mask[:, None, :, None], poison) for x in (k, v))
    selection = random_selection(2, 4, 2, 4, 3, generator)
    order = by_position(q, None, None)
    clean = sparse_attention(q, k, v, order, by_norm(k, 16, mask), selection, block_size=16, scale=1.0)
    dirty = sparse_attention(
        q, dirty_k, dirty_v, order, by_norm(dirty_k, 16, mask), selection, block_size=16, scale=1.0
    )
    assert torch.equal(clean.out, dirty.out)
    assert torch.equal(clean.lse, dirty.lse)


def test_rows_without_a_key_are_zero_with_lse_minus_infinity():
    q, k, v, _, generator = random_case(20, 30)
    mask = torch.tensor([[False] * 30, [True] * 30])
    selection = random_selection(2, 4, 2, 2, 2, generator)
    selection.count[1, 2] = 0
    partial = sparse_attention(
        q, k, v, by_position(q, None, None), by_position(k, None, mask), selection, block_size=16, scale=1.0
    )
    assert (partial.out[0] == 0).all()
    assert (partial.lse[0] == -math.inf).all()
    assert (partial.out[1, 2] == 0).all()
    assert (partial.lse[1, 2] == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_the_result(dtype):
    *tensors, _, generator = random_case(20, 30)
    q, k, v = (x.to(dtype) for x in tensors)
    selection = random_selection(2, 4, 2, 2, 2, generator)
    partial = sparse_attention(
        q, k, v, by_position(q, None, None), by_position(k, None, None), selection, block_size=16, scale=1.0
    )
    assert partial.out.dtype == dtype
    assert partial.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
