"""E4 and E5: the score of BA-Att."""

import math

import pytest
import torch

from baatt.scores import SCORES
from baatt.scores.covariance import compare, covariance_score, summarise
from baatt.types import BlockStats
from tests.naive import naive_score


def random_stats(batch, heads, blocks, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(batch, heads, blocks, channels, generator=generator, dtype=torch.float64)
    variance = torch.rand(batch, heads, blocks, channels, generator=generator, dtype=torch.float64)
    return BlockStats(mean, variance, torch.full((batch, blocks), 16))


@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (6, 2), (3, 3)])
@pytest.mark.parametrize("scale", [8**-0.5, 1.0])
def test_scores_equal_the_naive_ones(heads, groups, beta, scale):
    query, key = random_stats(2, heads, 3, 8, seed=0), random_stats(2, groups, 5, 8, seed=1)
    scores = covariance_score(query, key, scale=scale, beta=beta)
    assert scores.shape == (2, heads, 3, 5)
    for b in range(2):
        for h in range(heads):
            g = h // (heads // groups)
            for i in range(3):
                for j in range(5):
                    expected = naive_score(
                        (query.mean[b, h, i], query.variance[b, h, i]),
                        (key.mean[b, g, j], key.variance[b, g, j]),
                        scale,
                        beta,
                    )
                    assert scores[b, h, i, j].item() == pytest.approx(expected, rel=1e-12)


def test_compensation_is_the_variance_of_the_logits_for_independent_channels():
    """What E5 means: Delta is the variance of s q.k over all pairs of two blocks, cross-channel terms left out."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    # Every combination of channel values: the channels of these tokens are exactly uncorrelated.
    q, k = (torch.cartesian_prod(*side.mT.unbind()) for side in values.transpose(1, 2))
    logits = (q @ k.T) * 0.5
    stats = [
        BlockStats(x.mean(0).view(1, 1, 1, -1), x.var(0, correction=0).view(1, 1, 1, -1), torch.ones(1, 1))
        for x in (q, k)
    ]
    plain, compensated = (covariance_score(*stats, scale=0.5, beta=beta).item() for beta in (0.0, 1.0))
    assert plain == pytest.approx(logits.mean().item())
    assert compensated - plain == pytest.approx(logits.var(correction=0).item())


def test_empty_key_blocks_score_minus_infinity():
    query, key = random_stats(2, 2, 3, 4, seed=0), random_stats(2, 1, 4, 4, seed=1)
    key.size[0, 2:] = 0
    scores = covariance_score(query, key, scale=1.0, beta=0.5)
    assert (scores[0, :, :, 2:] == -math.inf).all()
    assert torch.isfinite(scores[0, :, :, :2]).all()
    assert torch.isfinite(scores[1]).all()


def test_the_registry_holds_the_paper_s_score():
    assert SCORES["covariance"] == (summarise, compare, ("beta",), True)
