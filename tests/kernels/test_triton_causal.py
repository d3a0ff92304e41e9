"""Causal attention by the portable kernels against the stages they are twins of, in Triton's interpreter."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU; see tests/gpu", allow_module_level=True)

from baatt import BAAttConfig, make_plan
from baatt.backend import _choose_on_gpu
from baatt.kernels import triton_attention, triton_budget, triton_clusters, triton_mass, triton_selection
from baatt.kernels.triton_structure import look_back
from baatt.scores import clusters, exact
from baatt.stages import sorting, sparse, structure
from baatt.stages.selection import select_blocks
from baatt.types import BlockStats
from tests.budget import assert_within_budget, eager_dtype
from tests.pairs import mostly_pairs
from tests.test_attention import random_inputs
from tests.test_causal import structures

SHAPE = 2, 2, 1, 50, 99, 16
NAMES = list(structures(50, 99))
CONFIG = BAAttConfig(16, 0.6, representatives=16, refinements=0)


def case(name, dtype=torch.float16, block_size=16):
    """q, k, v, NaN where masked; their orders; and what the queries see."""
    q, k, v = random_inputs(*SHAPE, dtype)
    asked = {"query_start": 49, **structures(50, 99)[name]}
    masks = [asked.pop(side, None) for side in ("key_mask", "query_mask")]
    masks = [None if mask is None else mask.expand(2, -1) for mask in masks]
    for x, mask in ((k, masks[0]), (v, masks[0]), (q, masks[1])):
        if mask is not None:
            x[~mask[:, None].expand(x.shape[:3])] = float("nan")
    orders = sorting.by_position(q, None, masks[1]), sorting.by_position(k, None, masks[0])
    return (q, k, v), orders, structure.look_back(q, k, asked["causal"], asked["query_start"], block_size, *masks)


def sizes(order, tokens):
    return (order.length[:, None] - 16 * torch.arange(-(-tokens // 16))).clamp(0, 16)


def beyond_sight(scores, sight):
    """Where scores [B, H, I, J] may be anything."""
    return (torch.arange(scores.shape[-1]) >= sight.spans[..., 3, None])[:, None].expand_as(scores)


@pytest.mark.parametrize("name", [name for name in NAMES if "mask" not in str(structures(50, 99)[name])])
@pytest.mark.parametrize("block_size", [16, 64])
def test_sight(name, block_size, poisoned_memory):
    (q, k, _), _, expected = case(name, block_size=block_size)
    asked = {"query_start": 49, **structures(50, 99)[name]}
    actual = look_back(q, k, asked["causal"], asked["query_start"], block_size)
    assert torch.equal(actual.limit, expected.limit)
    assert torch.equal(actual.spans, expected.spans)


WAYS = ["alone", "passes"]
BUDGETS = [(0.5, 1), (0.0, 0), (0.9, 3), (0.7, 2), (0.9, 0)]


@pytest.mark.parametrize(
    ("name", "way", "sparsity", "keep_first"),
    [
        (name, way, *BUDGETS[(number + step) % len(BUDGETS)])
        for number, name in enumerate(NAMES)
        for step, way in enumerate(["row", WAYS[number % 2]])
    ],
)
def test_selection_is_the_stage_s(name, way, sparsity, keep_first, poisoned_memory, monkeypatch):
    _, orders, sight = case(name)
    query_size, key_size = sizes(orders[0], 50), sizes(orders[1], 99)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-9, 9, (2, 1, 4, 7), generator=generator) * 0.37
    for value in (float("nan"), float("-inf")):
        scores[torch.rand(scores.shape, generator=generator) < 0.05] = value
    scores[beyond_sight(scores, sight)] = float("nan")
    options = {"budget": "row" if way == "row" else "head", "query_block_size": query_size, "sight": sight}
    expected = select_blocks(scores, key_size, sparsity, keep_first, **options)
    summaries = [BlockStats(*2 * [torch.zeros(2, 1, size.shape[1], 1)], size) for size in (query_size, key_size)]
    monkeypatch.setattr(triton_selection, "SLAB_SCORES", 2 * 7 * 3)  # three of the four query blocks at a time
    monkeypatch.setattr(triton_budget, "ALONE", 0 if way == "passes" else 4096)
    monkeypatch.setattr(triton_budget, "SLAB_SCORES", 10**6)
    place = iter(range(0, 4, 3))

    def score(queries, keys, part):
        first = next(place)
        assert torch.equal(part.spans, sight.spans[:, first : first + queries.size.shape[1]])
        return scores[:, :, first : first + queries.size.shape[1]].clone()

    choose = triton_selection.choose_blocks if way == "row" else triton_budget.choose_blocks
    actual = choose(*summaries, score, sparsity, keep_first, sight)
    assert torch.equal(actual.count, expected.count)
    assert torch.equal(actual.index, expected.index)
    assert actual.uneven == expected.uneven


KINDS = [(torch.float16, 16), (torch.float32, 32), (torch.float32, 16), (torch.float16, 32), (torch.float32, 128)]
#: Every structure once, in one kind after the other.
each_in_a_kind = pytest.mark.parametrize(
    ("name", "dtype", "block_size"), [(name, *KINDS[i % len(KINDS)]) for i, name in enumerate(NAMES)]
)


@each_in_a_kind
def test_attention(name, dtype, block_size, poisoned_memory):
    (q, k, v), orders, sight = case(name, dtype, block_size)
    blocks = sight.spans.shape[1], -(-99 // block_size)
    scores = torch.randn(2, 2, *blocks, generator=torch.Generator().manual_seed(0))
    key_size = (orders[1].length[:, None] - block_size * torch.arange(blocks[1])).clamp(0, block_size)
    selection = select_blocks(scores, key_size, 0.4, 1, sight=sight)
    dials = {"block_size": block_size, "scale": 0.3, "sight": sight}
    actual = triton_attention.sparse_attention(q, k, v, *orders, selection, **dials)
    clean = [x.nan_to_num(0) for x in (q, k, v)]
    exact = sparse.sparse_attention(*(x.double() for x in clean), *orders, selection, **dials)
    eager = sparse.sparse_attention(*(x.to(eager_dtype(dtype)) for x in clean), *orders, selection, **dials)
    assert_within_budget(actual.out, eager.out.to(dtype), exact.out)
    torch.testing.assert_close(actual.lse.double(), exact.lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_clusters(name, poisoned_memory):
    check_clusters(name, name != "left")


def check_clusters(name, peak):
    sides, orders, sight = case(name)
    config = dataclasses.replace(CONFIG, peak=peak)
    summaries = [clusters.summarise(x, order, config) for x, order in zip(sides[:2], orders, strict=True)]
    summaries = [one._replace(mean=one.mean.half()) for one in summaries]
    actual = triton_clusters.compare(*summaries, config, 0.25, sight)
    expected = []
    for kind in (torch.float32, torch.float64):
        scores = clusters.compare(*(one._replace(mean=one.mean.to(kind)) for one in summaries), config, 0.25, sight)
        expected.append(scores.masked_fill(beyond_sight(scores, sight), 0))
    assert_within_budget(actual.masked_fill(beyond_sight(actual, sight), 0), *expected)
    return actual


def test_clusters_by_any_number_of_programs(poisoned_memory, monkeypatch):
    alone = check_clusters("odd blocks", True)
    for programs in (1, 3, 64):
        monkeypatch.setattr(triton_clusters, "_programs", lambda device, number=programs: number)
        assert torch.equal(check_clusters("odd blocks", True).nan_to_num(7), alone.nan_to_num(7))


@each_in_a_kind
def test_mass(name, dtype, block_size, poisoned_memory, monkeypatch):
    if dtype == torch.float16:
        monkeypatch.setattr(triton_mass, "SLAB_SUMS", 1)  # a query block at a time
    function = "compare_peak" if name in ("left", "odd blocks") else "compare"
    sides, orders, sight = case(name, dtype, block_size)
    config = dataclasses.replace(CONFIG, block_size=block_size)

    def mass(room, *dtypes):
        tokens = [exact.summarise(x.to(*dtypes), order, config) for x, order in zip(sides[:2], orders, strict=True)]
        return getattr(room, function)(*tokens, config, 0.25, sight)

    actual, eager = mass(triton_mass, dtype), mass(exact, dtype)
    assert_within_budget(actual, eager, mass(exact, torch.float64))
    assert (actual[beyond_sight(actual, sight)] == 0).all()


@mostly_pairs("score, budget", ["covariance", "window", "antidiagonal-8"], ["row", "head"])
def test_from_the_summaries_on(score, budget, poisoned_memory, monkeypatch):
    """Any score, in slabs, gives the selection of the reference."""
    config = dataclasses.replace(CONFIG, score=score, budget=budget)
    q, k, _ = random_inputs(*SHAPE, torch.float32)
    plan = make_plan(q, k, config, causal=4, impl="reference")
    monkeypatch.setattr(triton_selection, "SLAB_SCORES", 2 * 2 * 7 * 3)
    actual = _choose_on_gpu({}, plan.query_summary, plan.key_summary, config, plan.scale, plan.sight)
    assert torch.equal(actual.count, plan.selection.count)
    assert torch.equal(actual.index, plan.selection.index)
