"""The CPU twins of scores against the specification: moments and clusters, and how they compare."""

import inspect
import math

import pytest
import torch

from baatt import BAAttConfig, make_plan
from baatt.kernels import cpu_native, cpu_scores
from baatt.scores import clusters, covariance, simple
from baatt.stages import pooling
from baatt.stages.sorting import by_norm, by_position
from baatt.types import BlockClusters, BlockStats
from tests.budget import assert_within_budget
from tests.pairs import mostly_pairs

pytestmark = [
    pytest.mark.skipif(cpu_native.find_compiler() is None, reason="no C compiler on this machine"),
    pytest.mark.usefixtures("poisoned_memory"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: B, H, G, N, M, D: ragged ends, shared key heads, channels that fill no vector.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 4, 2, 130, 70, 33),
    (1, 2, 2, 129, 257, 64),
    (1, 6, 2, 40, 600, 16),
    (1, 1, 1, 64, 300, 200),
]
#: representatives, refinements
CLUSTERS = [(1, 2), (5, 0), (16, 2), (128, 1)]


def random_case(shape, dtype, seed=0, masked=True):
    """q and k, and their orders: masked keys and queries, keys sorted."""
    batch, heads, groups, queries, keys, channels = shape
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, queries, channels, generator=generator).to(dtype)
    k = torch.randn(batch, groups, keys, channels, generator=generator).to(dtype)
    masks = [torch.rand(batch, length, generator=generator) > 0.3 * masked for length in (queries, keys)]
    return (q, by_position(q, None, masks[0])), (k, by_norm(k, 64, masks[1]))


def config(block_size=16, **options):
    return BAAttConfig(block_size, sort="none", score="clusters", **options)


def assert_same_clusters(x, order, options):
    """The same tokens in every cluster, and means within budget of them."""
    actual = cpu_scores.summarise_clusters(x, order, options)
    eager = clusters.summarise(x, order, options)
    exact = clusters.summarise(x.double(), order, options)
    assert torch.equal(actual.size, eager.size)
    assert torch.equal(actual.tokens, eager.tokens)
    assert_within_budget(actual.mean, eager.mean, exact.mean)
    return actual


def test_twins_have_the_signatures_of_the_scores():
    for twin, function in (
        (cpu_scores.summarise_moments, covariance.summarise),
        (cpu_scores.compare_covariance, covariance.compare),
        (cpu_scores.compare_means, simple.compare_means),
        (cpu_scores.summarise_clusters, clusters.summarise),
        (cpu_scores.compare_clusters, clusters.compare),
    ):
        assert inspect.signature(twin) == inspect.signature(function)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [16, 128])
def test_moments_are_their_twin_s(shape, dtype, block_size):
    for x, order in random_case(shape, dtype):
        actual = cpu_scores.summarise_moments(x, order, BAAttConfig(block_size))
        eager, exact = (pooling.pool_blocks(y, order, block_size) for y in (x, x.double()))
        assert torch.equal(actual.size, exact.size)
        for found, expected, truth in zip(actual[:2], eager[:2], exact[:2], strict=True):
            assert_within_budget(found, expected, truth)


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_covariance_scores_are_their_twin_s(shape, beta):
    options = BAAttConfig(16, beta=beta)
    stats = [pooling.pool_blocks(x, order, 16) for x, order in random_case(shape, torch.float32)]
    pairs = [(cpu_scores.compare_covariance, covariance.compare)]
    if beta == 0:
        pairs.append((cpu_scores.compare_means, simple.compare_means))
    for twin, function in pairs:
        assert_scores(twin, function, stats, options)


def assert_scores(twin, function, summaries, options):
    """Scores within budget of float64, and -inf for the same blocks."""
    doubles = [
        side._replace(**{name: x.double() for name, x in side._asdict().items() if x.is_floating_point()})
        for side in summaries
    ]
    actual, eager, exact = (
        compare(*sides, options, 0.3)
        for compare, sides in ((twin, summaries), (function, summaries), (function, doubles))
    )
    kept = exact > -math.inf
    assert actual.dtype == torch.float32
    assert torch.equal(actual == -math.inf, ~kept)
    if kept.any():
        assert_within_budget(actual[kept], eager[kept], exact[kept])


@mostly_pairs("shape, clusters, dtype", SHAPES, CLUSTERS, DTYPES)
@pytest.mark.parametrize("block_size", [16, 128])
def test_clusters_are_their_twin_s(shape, clusters, dtype, block_size):
    representatives, refinements = clusters
    options = config(block_size, representatives=representatives, refinements=refinements)
    for x, order in random_case(shape, dtype):
        assert_same_clusters(x, order, options)


@pytest.mark.parametrize("distinct", [1, 3, 40])
def test_clusters_of_duplicates_and_equal_distances_are_their_twin_s(distinct):
    """Small integers: every distance between tokens is exact, and many are equal."""
    generator = torch.Generator().manual_seed(distinct)
    x = torch.randint(-2, 3, (1, 2, distinct, 8), generator=generator).float()
    x = x[:, :, torch.randint(0, distinct, (200,), generator=generator)]
    order = by_position(x, None, None)
    for block_size in (16, 128):
        # The mean of 16 and 128 integers is exact; the last block is shorter, and only one token decides there.
        found = assert_same_clusters(x, order, config(block_size, representatives=16, refinements=0))
        assert (found.mean[found.tokens == 0] == 0).all()


@mostly_pairs("shape, representatives, peak", SHAPES, [1, 5, 16, 128], [True, False])
@pytest.mark.parametrize("block_size", [16, 128])
def test_shares_are_their_twin_s(shape, block_size, representatives, peak):
    options = config(block_size, representatives=representatives, peak=peak)
    summaries = [clusters.summarise(x, order, options) for x, order in random_case(shape, torch.float32)]
    assert_scores(cpu_scores.compare_clusters, clusters.compare, summaries, options)


@pytest.mark.parametrize("spread", [1e-20, 30.0, 300.0])
def test_flat_and_peaked_shares_are_their_twin_s(spread):
    options = config(representatives=5)
    (q, query_order), (k, key_order) = random_case((1, 2, 1, 100, 700, 64), torch.float32)
    summaries = [clusters.summarise(x, order, options) for x, order in ((q * spread, query_order), (k, key_order))]
    assert_scores(cpu_scores.compare_clusters, clusters.compare, summaries, options)


def test_an_entry_without_keys_has_no_scores():
    (q, query_order), (k, key_order) = random_case((2, 2, 1, 40, 50, 8), torch.float32)
    key_order.length[1] = 0
    sides = [
        cpu_scores.summarise_clusters(x, order, config(representatives=4))
        for x, order in ((q, query_order), (k, key_order))
    ]
    assert (sides[1].mean[1] == 0).all()
    assert (sides[1].tokens[1] == 0).all()
    assert (cpu_scores.compare_clusters(*sides, config(), 1.0)[1] == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_tokens_change_nothing(dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2, 60, 8, generator=generator).to(dtype)
    mask = torch.rand(2, 60, generator=generator) > 0.4
    seen = []
    for value in (0.0, 1e4, math.nan):
        y = x.masked_fill(~mask[:, None, :, None], value)
        plan = make_plan(y, y, config(representatives=4), key_mask=mask, query_mask=mask, impl="cpu")
        seen.append((plan.selection.index, *plan.key_summary))
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def both_summaries_and_scores(q, k, options):
    results = []
    for summarise, compare in (
        (cpu_scores.summarise_clusters, cpu_scores.compare_clusters),
        (cpu_scores.summarise_moments, cpu_scores.compare_covariance),
    ):
        sides = [summarise(x, by_position(x, None, None), options) for x in (q, k)]
        results += [sides[0][0], sides[1][0], compare(*sides, options, 0.2)]
    return results


def test_number_of_threads_does_not_matter():
    (q, _), (k, _) = random_case((2, 4, 2, 200, 300, 40), torch.float32)
    results = []
    for threads in (1, 2, 7):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        results.append(both_summaries_and_scores(q, k, config()))
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


def test_an_entry_does_not_depend_on_the_batch():
    (q, _), (k, _) = random_case((3, 4, 2, 200, 300, 40), torch.float32)
    whole, single = (both_summaries_and_scores(x, y, config()) for x, y in ((q, k), (q[1:2], k[1:2])))
    assert all(torch.equal(x[1:2], y) for x, y in zip(whole, single, strict=True))


def test_strided_inputs_and_slabs_of_rows_are_the_same():
    (q, _), (k, _) = random_case((2, 4, 2, 200, 300, 40), torch.float32)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    transposed = [x.mT.contiguous().mT for x in (q, k)]
    expected = both_summaries_and_scores(q, k, config())
    for inputs in (strided, transposed):
        found = both_summaries_and_scores(*inputs, config())
        assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))
    sides = [cpu_scores.summarise_clusters(x, by_position(x, None, None), config()) for x in (q, k)]
    slab = BlockClusters(sides[0].mean[:, :, 3:7], sides[0].tokens[:, :, 3:7], sides[0].size[:, 3:7])
    assert torch.equal(cpu_scores.compare_clusters(slab, sides[1], config(), 0.2), expected[2][:, :, 3:7])


@pytest.mark.usefixtures("narrower_vectors")
def test_narrower_vectors_are_twins_too():
    for shape in SHAPES:
        sides = random_case(shape, torch.float32)
        summaries = [assert_same_clusters(x, order, config(representatives=5)) for x, order in sides]
        assert_scores(cpu_scores.compare_clusters, clusters.compare, summaries, config())
        stats = [BlockStats(*pooling.pool_blocks(x, order, 16)) for x, order in sides]
        assert_scores(cpu_scores.compare_covariance, covariance.compare, stats, config())


@pytest.mark.parametrize("score", ["clusters", "covariance", "mean"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_plans_agree_with_the_reference(score, dtype):
    (q, _), (k, _) = random_case((2, 4, 2, 300, 500, 32), dtype)
    mask = torch.rand(2, 500, generator=torch.Generator().manual_seed(0)) > 0.2
    options = BAAttConfig(16, sort="none", score=score, keep_first=1)
    plans = [make_plan(q, k, options, key_mask=mask, impl=impl) for impl in ("reference", "cpu")]
    assert torch.equal(plans[0].selection.index, plans[1].selection.index)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_values_that_are_not_numbers_or_too_large_still_give_a_plan(value):
    (q, _), (k, _) = random_case((1, 2, 2, 60, 90, 8), torch.float32)
    q[:, 0, 5:30], k[:, 0, 20:60] = value, value
    plan = make_plan(q, k, config(representatives=16), impl="cpu")
    assert (plan.key_summary.tokens.sum(-1) == plan.key_summary.size[:, None]).all()
    assert ((plan.selection.index >= 0) & (plan.selection.index < 6)).all()
    other = make_plan(q[:, 1:], k[:, 1:], config(representatives=16), impl="cpu")
    assert torch.equal(plan.selection.index[:, 1:], other.selection.index)


def test_shares_of_logits_of_billions_agree_with_the_reference():
    (q, _), (k, _) = random_case((1, 2, 2, 320, 320, 64), torch.float32)
    plans = [make_plan(q * 2e5, k * 2e5, config(representatives=16), impl=impl) for impl in ("reference", "cpu")]
    assert torch.equal(plans[0].selection.index, plans[1].selection.index)
