"""C1-C5: clusters and their scores against loops, at both ends of their number, on duplicates and masked tokens."""

import dataclasses
import math

import pytest
import torch

from baatt import BAAttConfig, make_plan
from baatt.lab.recall import block_mass
from baatt.scores import SCORES, cluster_variance, clusters
from baatt.scores.covariance import covariance_score
from baatt.stages.pooling import pool_blocks
from tests.lab.test_oracle import case
from tests.naive import naive_blocks, naive_cluster_scores, naive_cluster_tokens, naive_clusters


def summaries(q, k, plan, config):
    return [clusters.summarise(x, order, config) for x, order in ((q, plan.query_order), (k, plan.key_order))]


def expected_scores(q, k, plan, config, beta=0.0):
    """[B][H][i] lists of J scores, of the first head of each group."""

    def clusters_of(x, block):
        return naive_clusters(x, naive_cluster_tokens(x, block, config.representatives, config.refinements))

    for entry in range(2):
        length = int(plan.key_order.length[entry])
        for head in (0, 3):  # one of each group
            rows = plan.query_order.index[entry, head].tolist()
            columns = plan.key_order.index[entry, head // 2, :length].tolist()
            keys = [clusters_of(k[entry, head // 2], block) for block in naive_blocks(columns, 16)]
            for i, block in enumerate(naive_blocks(rows, 16)):
                query = clusters_of(q[entry, head], block)
                scores = naive_cluster_scores(query, keys, plan.scale, config.peak, beta) if keys else []
                yield (entry, head, i), scores


@pytest.mark.parametrize(
    ("representatives", "refinements", "peak", "masked"),
    [(1, 0, True, False), (1, 2, False, True), (5, 2, True, True), (5, 0, False, False), (16, 1, True, True)],
)
def test_scores_equal_the_naive_ones(representatives, refinements, peak, masked):
    q, k, plan = case("none", masked=masked)
    config = dataclasses.replace(
        plan.config, score="clusters", representatives=representatives, refinements=refinements, peak=peak
    )
    found = clusters.compare(*summaries(q, k, plan, config), config, plan.scale)
    for place, expected in expected_scores(q, k, plan, config):
        assert found[place][: len(expected)].tolist() == pytest.approx(expected, rel=1e-9)
        assert (found[place][len(expected) :] == -math.inf).all()


@pytest.mark.parametrize("beta", [0.5, 30.0])  # below the cap, and mostly above it
def test_scores_with_the_variance_of_clusters_equal_the_naive_ones(beta):
    q, k, plan = case("none", masked=True)
    config = dataclasses.replace(plan.config, score="clusters-variance", representatives=5, beta=beta)
    sides = [cluster_variance.summarise(x, o, config) for x, o in ((q, plan.query_order), (k, plan.key_order))]
    found = cluster_variance.compare(*sides, config, plan.scale)
    for place, expected in expected_scores(q, k, plan, config, beta):
        assert found[place][: len(expected)].tolist() == pytest.approx(expected, rel=1e-9)
    without = cluster_variance.compare(*sides, dataclasses.replace(config, beta=0.0), plan.scale)
    assert torch.equal(without, clusters.compare(*summaries(q, k, plan, config), config, plan.scale))


def test_one_representative_ranks_as_the_block_means():
    q, k, plan = case(masked=False)
    whole = q[:, :, :64], k[:, :, :96]
    plan = make_plan(*whole, plan.config, impl="reference")
    config = dataclasses.replace(plan.config, score="clusters", representatives=1)
    found = clusters.compare(*summaries(*whole, plan, config), config, plan.scale)
    stats = [pool_blocks(x, order, 16) for x, order in zip(whole, (plan.query_order, plan.key_order), strict=True)]
    torch.testing.assert_close(found, covariance_score(*stats, scale=plan.scale, beta=0).softmax(-1))


@pytest.mark.parametrize("masked", [False, True])
def test_as_many_representatives_as_tokens_give_the_exact_mass(masked):
    q, k, plan = case(masked=masked)
    config = dataclasses.replace(plan.config, score="clusters", representatives=16, refinements=0, peak=False)
    found = clusters.compare(*summaries(q, k, plan, config), config, plan.scale)
    torch.testing.assert_close(found.clamp(min=0), block_mass(q, k, plan))


def test_duplicates_and_fewer_tokens_than_clusters_leave_clusters_empty():
    x = torch.randn(1, 1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.cat((x, x, x, x), dim=2)[:, :, :11]  # 3 different tokens in 11 places
    plan = make_plan(x, x, BAAttConfig(16, sort="none"), impl="reference")
    found = clusters.summarise(x, plan.key_order, BAAttConfig(16, representatives=8, refinements=1))
    assert found.tokens.sum().item() == 11
    assert sorted(found.tokens[found.tokens > 0].tolist()) == [3, 4, 4]
    assert (found.mean[found.tokens == 0] == 0).all()
    assert torch.isfinite(clusters.compare(found, found, BAAttConfig(16), 0.5)).all()


def test_masked_tokens_change_nothing():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2, 60, 8, generator=generator)
    mask = torch.rand(2, 60, generator=generator) > 0.4
    config = BAAttConfig(16, sort="none", score="clusters", representatives=4)
    seen = []
    for value in (0.0, 1e4, math.nan):
        y = x.masked_fill(~mask[:, None, :, None], value)
        plan = make_plan(y, y, config, key_mask=mask, query_mask=mask, impl="reference")
        seen.append((plan.selection.index, *plan.key_summary))
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_the_registry_reads_its_options():
    assert SCORES["clusters"].options == ("representatives", "refinements", "peak")
