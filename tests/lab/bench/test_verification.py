"""Right outputs pass, wrong ones do not, with grouped heads and ragged blocks."""

import math

import pytest
import torch

from baatt import attend, make_plan
from baatt.lab.bench import verification
from baatt.lab.bench.verification import VerificationError, kept_places, require_verified, verify
from tests.settings import sorted_config


def example(dtype, block_size=16, tokens=301):
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 4, tokens, 40, generator=generator).to(dtype)
    k, v = (torch.randn(2, 2, tokens, 40, generator=generator).to(dtype) for _ in range(2))
    plan = make_plan(q, k, sorted_config(sparsity=0.6, block_size=block_size, segment=128))
    return q, k, v, plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [16, 128])
def test_every_implementation_passes(dtype, block_size):
    q, k, v, plan = example(dtype, block_size)
    for impl in ("cpu", "reference"):
        found = verify(q, k, v, plan, attend(q, k, v, plan, impl=impl))
        assert 0 < found.error <= found.limit
        require_verified(impl, found)


def test_the_error_is_the_norm_of_the_difference():
    q, k, v, plan = example(torch.float32, block_size=128)
    exact = attend(q.double(), k.double(), v.double(), plan, impl="reference")
    found = verify(q, k, v, plan, (1.01 * exact).float())
    assert math.isclose(found.error, 0.01, rel_tol=1e-4)
    assert found.checked == found.blocks == 2 * 4 * 3
    with pytest.raises(VerificationError, match=r"name must be within a relative error of .* got 1.00e-02"):
        require_verified("name", found)


def test_large_inputs_are_sampled(monkeypatch):
    monkeypatch.setattr(verification, "ALL_BLOCKS", 10)
    q, k, v, plan = example(torch.float32)
    out = attend(q, k, v, plan)
    found = verify(q, k, v, plan, out)
    assert found.checked == 2 * 4 * 3
    assert found.blocks == 2 * 4 * 19
    out[1, 3, plan.query_order.index[1, 3, 2]] += 1  # the first block
    assert verify(q, k, v, plan, out).error > 100 * found.limit


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_not_finite_is_wrong_wherever_it_stands(monkeypatch, poison):
    monkeypatch.setattr(verification, "ALL_BLOCKS", 10)
    q, k, v, plan = example(torch.float32)
    out = attend(q, k, v, plan)
    out[0, 0, plan.query_order.index[0, 0, 50], 0] = poison  # in no sampled block
    with pytest.raises(VerificationError):
        require_verified("name", verify(q, k, v, plan, out))


def test_kept_places_are_those_of_the_list():
    _, _, _, plan = example(torch.float32)
    kept = kept_places(plan, 1, 3, 0)
    blocks = plan.selection.index[1, 3, 0, : plan.selection.count[1, 3, 0]].tolist()
    places = [place for block in blocks for place in range(16 * block, min(16 * block + 16, 301))]
    assert kept.tolist() == places
