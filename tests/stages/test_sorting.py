"""E2: token orders."""

import math

import pytest
import torch

from baatt.kernels import cpu_orders
from baatt.stages.sorting import ORDERS, by_norm, by_position
from tests.naive import naive_order


def expected(x, segment, mask, sort):
    batch, heads, tokens = x.shape[:3]
    rows = mask if mask is not None else torch.ones(batch, tokens, dtype=torch.bool)
    return [[naive_order(x[b, h], rows[b].tolist(), sort, segment) for h in range(heads)] for b in range(batch)]


def assert_order(order, x, segment, mask, sort):
    batch, _, tokens = x.shape[:3]
    lengths = [tokens] * batch if mask is None else mask.sum(-1).tolist()
    assert order.index.dtype == order.length.dtype == torch.int64
    assert order.length.tolist() == lengths
    for b, rows in enumerate(expected(x, segment, mask, sort)):
        for h, row in enumerate(rows):
            assert order.index[b, h, : lengths[b]].tolist() == row
            assert sorted(order.index[b, h].tolist()) == list(range(tokens)), "not a permutation"


@pytest.mark.parametrize("segment", [None, 1, 4, 7, 16, 1000])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 16, 37])
def test_orders_equal_the_naive_ones(tokens, masked, segment):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(3, 2, tokens, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, tokens, generator=generator) > 0.4 if masked else None
    assert_order(by_norm(x, segment, mask), x, segment, mask, sort=True)
    assert_order(by_position(x, segment, mask), x, segment, mask, sort=False)


def test_only_tokens_that_all_stand_where_they_were_are_the_identity():
    x, mask = torch.randn(3, 2, 37, 5), torch.ones(3, 37, dtype=torch.bool)
    order = by_position(x, 16, None)
    assert order.identity
    assert order.index.untyped_storage().nbytes() == 8 * 37
    assert not any(order.identity for order in (by_position(x, 16, mask), by_norm(x, 16, None), by_norm(x, 16, mask)))


def test_equal_norms_keep_their_order():
    x = torch.tensor([3.0, -3.0, 1.0, 3.0, -1.0, 0.0]).view(1, 1, 6, 1)
    assert by_norm(x, None, None).index.flatten().tolist() == [5, 2, 4, 0, 1, 3]


def test_masked_tokens_take_no_place_in_a_segment():
    x = torch.tensor([9.0, 4.0, 8.0, 3.0, 7.0, 2.0]).view(1, 1, 6, 1)
    mask = torch.tensor([[False, True, False, True, True, True]])
    # Unmasked 4 3 7 2, segments of two: 3 4 and 2 7.
    assert by_norm(x, 2, mask).index.flatten().tolist()[:4] == [3, 1, 5, 4]


def test_masked_tokens_stay_behind_values_that_are_not_numbers():
    x = torch.tensor([1.0, math.nan, math.inf, 2.0, 0.5, 3.0]).view(1, 1, 6, 1)
    mask = torch.tensor([[True, True, True, False, True, False]])
    order = by_norm(x, None, mask)
    assert order.length.tolist() == [4]
    assert sorted(order.index.flatten().tolist()[:4]) == [0, 1, 2, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_norms_do_not_overflow(dtype):
    x = torch.tensor([300.0, 200.0, 400.0], dtype=dtype).view(1, 1, 3, 1).expand(1, 1, 3, 64)
    assert by_norm(x, None, None).index.flatten().tolist() == [1, 0, 2]


def test_all_masked_gives_length_zero():
    order = by_norm(torch.randn(1, 2, 9, 3), 4, torch.zeros(1, 9, dtype=torch.bool))
    assert order.length.tolist() == [0]
    assert sorted(order.index[0, 1].tolist()) == list(range(9))


def test_the_registry_names_queries_then_keys():
    assert {name: (q is by_norm, k is by_norm) for name, (q, k) in ORDERS.items()} == {
        "none": (False, False),
        "q": (True, False),
        "k": (False, True),
        "qk": (True, True),
    }


@pytest.mark.parametrize("order", [by_norm, cpu_orders.by_norm])
def test_channels_that_are_not_side_by_side_change_no_order(order):
    """Norms so near one another that another order of the sum would swap them."""
    x = torch.randn(2, 4, 512, 80, generator=torch.Generator().manual_seed(0))
    x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    apart = torch.stack([x, x], -1)[..., 0]
    assert torch.equal(order(apart, None, None).index, order(x, None, None).index)
    assert torch.equal(order(x.mT.contiguous().mT, None, None).index, order(x, None, None).index)
