"""Clusters and their scores on a GPU against the eager ones, and the operator that chooses by them.

Run with `pytest -m gpu tests/gpu` on a machine with a CUDA device.
"""

import dataclasses

import pytest
import torch

from baatt import BAAttConfig, attend, ba_attention, make_plan
from baatt.kernels import hopper_clusters, triton_clusters
from baatt.scores import clusters
from baatt.stages import sorting
from tests.pairs import mostly_pairs

pytestmark = pytest.mark.gpu

CONFIG = BAAttConfig(sparsity=0.7)
ROOMS = [triton_clusters, hopper_clusters]


@pytest.fixture(params=ROOMS, ids=["triton", "hopper"])
def room(request):
    if request.param is hopper_clusters and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a GPU of compute capability 9.0")
    return request.param


def case(batch, heads, groups, queries, keys, channels, dtype, masked):
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda *size: torch.randn(*size, device="cuda", generator=generator).to(dtype)  # noqa: E731
    sides = [2 * draw(batch, queries, heads, channels).transpose(1, 2), draw(batch, groups, keys, channels)]
    masks = [None, None]
    if masked:
        masks = [torch.rand(batch, x.shape[2], device="cuda", generator=generator) > 0.3 for x in sides]
        for x, mask in zip(sides, masks, strict=True):
            mask[0, x.shape[2] // 2 - 5 :] = False
            x[~mask[:, None].expand(x.shape[:3])] = float("nan")
    return sides, masks


def check(room, sides, masks, config):
    orders = [sorting.by_position(x, None, mask) for x, mask in zip(sides, masks, strict=True)]
    summaries = []
    for x, order in zip(sides, orders, strict=True):
        actual, expected = room.summarise(x, order, config), clusters.summarise(x, order, config)
        # A token between two clusters may fall to either, or another be the first: distances come from products here.
        close = (actual.mean.float() - expected.mean).abs() <= 2**-7 * (1 + expected.mean.abs())
        same = (actual.tokens == expected.tokens).all(-1) & close.flatten(3).all(-1)
        assert same.float().mean() > 0.99
        assert torch.equal(actual.tokens.sum(-1), expected.tokens.sum(-1))
        assert torch.equal(actual.size, expected.size)
        summaries.append(actual)
    wide = [one._replace(mean=one.mean.float()) for one in summaries]
    filled = (summaries[1].size > 0)[:, None, None]
    actual = room.compare(*summaries, config, 0.1)
    expected = clusters.compare(*wide, config, 0.1)
    torch.testing.assert_close(actual, expected.where(filled, 0), rtol=1e-4, atol=2e-6)
    assert torch.equal(room.compare(*summaries, config, 0.1), actual)
    return actual


@mostly_pairs("representatives, masked, channels", [1, 4, 5, 8, 16, 32, 64], [False, True], [64, 128])
def test_clusters_and_scores(room, representatives, channels, masked):
    config = dataclasses.replace(CONFIG, representatives=representatives)
    check(room, *case(2, 4, 2, 1000, 1777, channels, torch.bfloat16, masked), config)


@pytest.mark.parametrize("options", [{"peak": False}, {"refinements": 0}, {"refinements": 5}])
def test_options(room, options):
    check(room, *case(1, 2, 2, 1300, 900, 128, torch.float16, True), dataclasses.replace(CONFIG, **options))


@pytest.mark.parametrize(("channels", "block_size"), [(16, 16), (80, 32), (256, 128), (256, 64)])
def test_other_shapes(channels, block_size):
    config = dataclasses.replace(CONFIG, block_size=block_size)
    check(triton_clusters, *case(1, 2, 1, 300, 500, channels, torch.bfloat16, True), config)


def test_long_and_many(room):
    check(room, *case(1, 8, 2, 16384, 16500, 128, torch.bfloat16, False), CONFIG)


@pytest.mark.parametrize("channels", [64, 128])
def test_rows_that_begin_anywhere(room, channels):
    """What the kernels cannot copy 16 bytes at a time gives the same clusters."""
    sides, masks = case(2, 2, 2, 700, 500, channels, torch.bfloat16, True)
    expected = check(room, sides, masks, CONFIG)
    x = sides[0]
    wide = x.new_zeros(*x.shape[:3], channels + 9)
    for first in (0, 1):
        odd = wide[..., first : first + channels].copy_(x)
        assert torch.equal(check(room, [odd, sides[1]], masks, CONFIG), expected)
    apart = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(check(room, [apart, sides[1]], masks, CONFIG), expected)
    one = [x[:, :, :1], sides[1][:, :, :1]]
    check(room, one, [mask[:, :1] for mask in masks], CONFIG)


def test_an_entry_does_not_depend_on_the_batch(room):
    sides, masks = case(3, 4, 4, 1500, 1500, 128, torch.bfloat16, True)
    together = check(room, sides, masks, CONFIG)
    alone = check(room, [x[1:2] for x in sides], [mask[1:2] for mask in masks], CONFIG)
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize("budget", ["row", "head"])
def test_the_operator(budget):
    (q, k), _ = case(2, 4, 2, 3000, 3000, 128, torch.bfloat16, False)
    config = dataclasses.replace(CONFIG, budget=budget)
    plans = [make_plan(q, k, config, impl=impl) for impl in ("auto", "triton", "reference")]
    for plan in plans:
        assert (plan.selection.index[..., 0] == 0).all()
    # Scores of the reference are of float32 means: blocks at the threshold may differ.
    kept = [torch.zeros(2, 4, 24, 24, device="cuda") for _ in plans]
    for plan, one in zip(plans, kept, strict=True):
        slots = torch.arange(plan.selection.index.shape[-1], device="cuda") < plan.selection.count[..., None]
        one.scatter_add_(-1, plan.selection.index.long(), slots.float())
        assert one.max() == 1
    assert (kept[0] == kept[2]).float().mean() > 0.99
    assert (kept[1] == kept[2]).float().mean() > 0.99
    out = ba_attention(q, k, k, config)
    assert torch.equal(out, ba_attention(q, k, k, config))
    # A block at the threshold more or less changes a row, so both attend by one plan.
    torch.testing.assert_close(out, attend(q, k, k, plans[0], impl="reference"), rtol=0.02, atol=0.02)


def test_float32_takes_the_eager_functions():
    (q, k), _ = case(1, 2, 2, 500, 500, 64, torch.float32, False)
    plan, expected = (make_plan(q, k, CONFIG, impl=impl) for impl in ("triton", "reference"))
    assert torch.equal(plan.selection.index, expected.selection.index)
