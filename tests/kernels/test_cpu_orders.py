"""The CPU twin of sorting by norm against the stage, to the last token."""

import inspect
import math

import pytest
import torch

from baatt.kernels import cpu_native, cpu_orders
from baatt.stages import sorting

pytestmark = [
    pytest.mark.skipif(cpu_native.find_compiler() is None, reason="no C compiler on this machine"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def test_the_twin_has_the_signature_of_the_stage():
    assert inspect.signature(cpu_orders.by_norm) == inspect.signature(sorting.by_norm)


def assert_same_order(x, segment, mask):
    found, expected = (function(x, segment, mask) for function in (cpu_orders.by_norm, sorting.by_norm))
    assert torch.equal(found.index, expected.index)
    assert torch.equal(found.length, expected.length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("segment", [None, 16, 64, 1024])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 200, 33), (3, 2, 1030, 8)])
def test_orders_are_their_twin_s(shape, masked, segment, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    mask = torch.rand(shape[0], shape[2], generator=generator) > 0.3 if masked else None
    assert_same_order(x, segment, mask)
    assert_same_order(x.mT.contiguous().mT, segment, mask)


def test_equal_infinite_and_missing_norms_keep_their_order():
    x = torch.randint(-1, 2, (2, 2, 100, 4), generator=torch.Generator().manual_seed(0)).float()
    x[0, :, ::7], x[0, :, 3::7], x[1, :, 2::5] = math.nan, math.inf, -math.inf
    mask = torch.arange(100) % 3 > 0
    for one in (None, mask.expand(2, 100), torch.zeros(2, 100, dtype=torch.bool)):
        assert_same_order(x, 32, one)
