"""The oracle's kernel against the eager oracle in fp64, in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU; see tests/gpu", allow_module_level=True)

from baatt import make_plan
from baatt.kernels import triton_mass
from baatt.scores import exact
from tests.budget import assert_within_budget
from tests.settings import sorted_config

SHAPES = [  # B, H, G, N, M, D, P
    (3, 2, 1, 40, 70, 16, 16),
    (2, 2, 1, 33, 150, 40, 32),
    (2, 4, 4, 130, 101, 96, 64),
    (2, 2, 1, 257, 300, 64, 128),
    (1, 1, 1, 1, 1, 3, 128),
]
# The interpreter multiplies bfloat16 as the integers it keeps them in; tests/gpu has that dtype.
DTYPES = [torch.float32, torch.float16]


def case(shape, dtype, sort="qk", masked=True):
    batch, heads, groups, queries, keys, channels, block_size = shape
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, queries, heads, channels, generator=generator).transpose(1, 2).to(dtype)
    k = torch.randn(batch, groups, keys, channels, generator=generator).to(dtype)
    mask = None
    if masked:
        mask = torch.rand(batch, keys, generator=generator) > 0.3
        mask[0, 0] = True
        if batch > 1:
            mask[0, keys // 2 :] = False  # ends inside a block, with blocks behind it
            mask[1] = False
        k[~mask[:, None].expand(batch, groups, keys)] = float("nan")
    config = sorted_config(block_size, 0.5, sort, block_size)
    return q, k, make_plan(q, k, config, key_mask=mask, impl="reference")


def mass(q, k, plan, room=triton_mass, name="compare"):
    tokens = (exact.summarise(x, order, plan.config) for x, order in ((q, plan.query_order), (k, plan.key_order)))
    return getattr(room, name)(*tokens, plan.config, plan.scale)


def check(q, k, plan, name="compare"):
    actual, eager = mass(q, k, plan, name=name), mass(q, k, plan, exact, name)
    assert actual.dtype == torch.float32
    assert_within_budget(actual, eager, mass(q.double(), k.double(), plan, exact, name))
    # Nothing at all, and not a little, where there is no key.
    empty = (plan.key_summary.size == 0)[:, None, None].expand(actual.shape)
    assert (actual[empty] == 0).all()
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_within_the_error_budget(shape, dtype, poisoned_memory):
    actual = check(*case(shape, dtype))
    torch.testing.assert_close(actual[0].sum(-1), torch.ones_like(actual[0, ..., 0]))


@pytest.mark.parametrize("shape", SHAPES)
def test_peak(shape, poisoned_memory):
    check(*case(shape, torch.float32), "compare_peak")


@pytest.mark.parametrize(("sort", "masked"), [("none", True), ("k", False), ("q", True)])
def test_orders(sort, masked, poisoned_memory):
    check(*case(SHAPES[0], torch.float32, sort, masked))


@pytest.mark.parametrize(
    ("queries", "keys", "block_size", "slab"),
    # A query block at a time; three of seven; two of three.
    [
        (100, 70, 16, 1),
        (100, 70, 16, 3 * 4 * 5 * 16),
        pytest.param(300, 201, 128, 1, marks=pytest.mark.slow),
        (300, 201, 128, 2 * 4 * 8 * 128),
    ],
)
def test_slabs(queries, keys, block_size, slab, poisoned_memory, monkeypatch):
    q, k, plan = case((2, 2, 1, queries, keys, 16, block_size), torch.float32)
    together = check(q, k, plan)
    monkeypatch.setattr(triton_mass, "SLAB_SUMS", slab)
    # A row stands at another place in its tile, and NumPy's products, which the interpreter takes, may round by place.
    torch.testing.assert_close(mass(q, k, plan), together, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scale", [-0.5, 6.0])
def test_scales_that_are_negative_or_leave_one_key_all_the_weight(scale, poisoned_memory):
    q, k, plan = case(SHAPES[0], torch.float32)
    check(q, k, plan._replace(scale=scale))


def test_several_parts_of_the_channels(poisoned_memory):
    check(*case((1, 2, 1, 40, 70, 200, 32), torch.float32))
    check(*case((1, 2, 1, 40, 70, 200, 32), torch.float16))


@pytest.mark.parametrize("name", ["compare", "compare_peak"])
def test_a_query_that_is_not_a_number_spoils_its_block_only(name, poisoned_memory):
    q, k, plan = case(SHAPES[0], torch.float32, "none")
    clean = mass(q, k, plan, name=name)
    q[0, 1, 20, 3] = float("nan")
    spoilt, expected = mass(q, k, plan, name=name), mass(q, k, plan, exact, name)
    assert torch.equal(spoilt.isnan(), expected.isnan())
    assert spoilt.isnan().any()
    assert torch.equal(spoilt[~spoilt.isnan()], clean[~spoilt.isnan()])
