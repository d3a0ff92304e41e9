"""The oracle's kernel on a GPU against the eager oracle.

Run with `pytest -m gpu tests/gpu` on a machine with a CUDA device.
"""

import functools

import pytest
import torch

from baatt import BAAttConfig, make_plan
from baatt.backend import gpu_comparison
from baatt.lab.recall import block_mass
from baatt.scores import SCORES
from tests.pairs import mostly_pairs
from tests.settings import sorted_config

pytestmark = pytest.mark.gpu


def case(shape, dtype, block_size, sort="qk"):
    batch, heads, groups, queries, keys, channels = shape
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda *size: torch.randn(*size, device="cuda", generator=generator).to(dtype)  # noqa: E731
    q, k = 2 * draw(batch, heads, queries, channels), draw(batch, groups, keys, channels)
    mask = torch.rand(batch, keys, device="cuda", generator=generator) > 0.3
    if batch > 1:
        mask[0, keys // 2 - 5 :] = False
        mask[1] = False
    k[~mask[:, None].expand(batch, groups, keys)] = float("nan")
    config = sorted_config(block_size, 0.5, sort)
    return q, k, make_plan(q, k, config, key_mask=mask, impl="reference")


def check(q, k, plan):
    """Both add up in fp32; matrix units cut off what fp32 would round, and exp2 is good to two last places."""
    actual = block_mass(q, k, plan, impl="triton")
    torch.testing.assert_close(actual, block_mass(q, k, plan, impl="reference"), rtol=1e-4, atol=1e-7)
    return actual


@pytest.mark.parametrize("sort", ["none", "qk"])
def test_long_ragged_batch(sort):
    q, k, plan = case((3, 8, 8, 4096, 4096, 128), torch.bfloat16, 128, sort)
    actual = check(q, k, plan)
    assert (actual[1] == 0).all()
    assert torch.equal(block_mass(q, k, plan), actual)  # what "auto" takes


@mostly_pairs(
    "shape, block_size, dtype",
    [(1, 1, 1, 1, 1, 64), (2, 4, 2, 1000, 777, 96), (1, 2, 1, 300, 1500, 256)],
    [16, 32, 64, 128],
    [torch.float32, torch.bfloat16, torch.float16],
)
def test_shapes(shape, block_size, dtype):
    check(*case(shape, dtype, block_size))


def test_float64_stays_with_the_eager_function():
    q, k, plan = case((1, 2, 1, 100, 200, 16), torch.float64, 16)
    assert torch.equal(block_mass(q, k, plan), block_mass(q, k, plan, impl="reference"))
    with pytest.raises(RuntimeError, match="float64 is for 'reference'"):
        block_mass(q, k, plan, impl="triton")


@pytest.mark.parametrize(("block_size", "stride"), [(128, 8), (128, 16), (16, 16)])
@pytest.mark.parametrize("causal", [None, 12])
def test_antidiagonals(block_size, stride, causal):
    q, k, _ = case((2, 4, 2, 1000, 1000, 96), torch.bfloat16, block_size)
    config = BAAttConfig(block_size, 0.5, score=f"antidiagonal-{stride}")
    plan = make_plan(q, k.nan_to_num(), config, causal=causal, impl="reference")
    twin = gpu_comparison(SCORES[config.score].compare, torch.bfloat16)
    assert isinstance(twin, functools.partial)
    sides = (plan.query_summary, plan.key_summary, config, plan.scale, plan.sight)
    # Both add up products of bfloat16 in fp32, the eager function after it made them fp32.
    torch.testing.assert_close(twin(*sides), SCORES[config.score].compare(*sides), rtol=1e-3, atol=1e-6)
