"""Wilson's interval against known values and its own definition; the bootstrap against the normal approximation."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baatt.lab.statistics import (
    FEW,
    NORMAL_QUANTILE,
    bootstrap_interval,
    bounded_interval,
    score_interval,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "samples", "low", "high"),
    [
        (475, 500, 92.7, 96.6),
        (95, 100, 88.8, 97.8),
        (188, 200, 89.8, 96.5),
        (200, 200, 98.1, 100.0),
        (0, 10, 0.0, 27.8),
    ],
)
def test_known_values(successes, samples, low, high):
    interval = wilson_interval(successes, samples)
    assert (round(100 * interval.low, 1), round(100 * interval.high, 1)) == (low, high)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_limits_solve_the_score_equation(case):
    """(share - p)^2 = z^2 p (1 - p) / n at both ends, and the share lies between them."""
    successes, samples = case
    share = successes / samples
    low, high = wilson_interval(successes, samples)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    for limit in (low, high):
        assert (share - limit) ** 2 == pytest.approx(NORMAL_QUANTILE**2 * limit * (1 - limit) / samples, abs=1e-12)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_symmetry(case):
    successes, samples = case
    low, high = wilson_interval(successes, samples)
    assert wilson_interval(samples - successes, samples) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize(
    ("successes", "samples", "message"),
    [(0, 0, "samples must be positive"), (-1, 5, r"in \[0, 5\]"), (6, 5, r"in \[0, 5\], got 6")],
)
def test_impossible_counts(successes, samples, message):
    with pytest.raises(ValueError, match=message):
        wilson_interval(successes, samples)


def test_bootstrap_agrees_with_the_normal_approximation():
    scores = [number % 11 / 10 for number in range(550)]  # mean 0.5, standard deviation 0.3162
    low, high = bootstrap_interval(scores)
    half = NORMAL_QUANTILE * 0.3162 / math.sqrt(550)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.002)
    assert bootstrap_interval(scores) == (low, high)
    assert bootstrap_interval(scores, seed=1) != (low, high)


def test_bootstrap_of_equal_scores_and_of_many():
    assert bootstrap_interval([0.25] * 7) == (0.25, 0.25)
    low, high = bootstrap_interval([0.0, 1.0] * 30_000, resamples=200)
    assert 0.49 < low < 0.5 < high < 0.51


@pytest.mark.parametrize(
    ("scores", "resamples", "message"),
    [
        ([], 10, "at least one finite number, got"),
        ([0.5, math.nan], 10, "at least one finite number"),
        ([[0.5]], 10, "at least one finite number"),
        ([0.5], 0, "resamples must be positive, got 0"),
    ],
)
def test_bootstrap_refuses(scores, resamples, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(scores, resamples=resamples)


@pytest.mark.parametrize("samples", [1, 2, 7, 200])
@pytest.mark.parametrize("score", [0.0, 0.25, 0.8, 1.0])
def test_equal_scores_do_not_claim_certainty(samples, score):
    low, high = score_interval([score] * samples)
    wilson = wilson_interval(round(score) * samples, samples)
    assert 0 <= low <= score + 1e-12
    assert score - 1e-12 <= high <= 1
    assert high - low == pytest.approx(wilson.high - wilson.low)  # exactly Wilson's at both ends
    if score in (0, 1):
        assert (low, high) == pytest.approx(wilson)


@given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0]), min_size=1, max_size=12))
def test_few_differences_get_wide_intervals(differences):
    low, high = bounded_interval(differences, -1, 1)
    inside = bootstrap_interval(differences)
    assert -1 <= low <= inside.low
    assert inside.high <= high <= 1
    equal = len(set(differences)) == 1
    widened = len(differences) < FEW or equal
    assert (high - low > inside.high - inside.low) == (widened and inside != (-1, 1))
