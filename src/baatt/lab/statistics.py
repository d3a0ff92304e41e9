"""Intervals for accuracies measured on a finite number of samples, and the test of two measured on the same ones.

Wilson and McNemar are for samples that are right or wrong, the bootstrap for scores in between. Pearson's correlation
is of tensors.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from baatt.types import widest

NORMAL_QUANTILE = 1.959963984540054  # two-sided 95 %


#: With fewer scores, or equal ones, a bootstrap knows too little of what it has not seen.
FEW = 10


class Interval(NamedTuple):
    """A 95 % interval of a proportion or a mean."""

    low: float
    high: float


def wilson_interval(successes: int, samples: int) -> Interval:
    """Wilson's 95 % score interval of `successes` out of `samples`.

    Raises:
        ValueError: no samples, or successes outside [0, samples].
    """
    if samples < 1:
        raise ValueError(f"samples must be positive, got {samples}")
    if not 0 <= successes <= samples:
        raise ValueError(f"successes must be in [0, {samples}], got {successes}")
    share, z = successes / samples, NORMAL_QUANTILE
    centre = share + z * z / (2 * samples)
    spread = z * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    scale = 1 + z * z / samples
    return Interval(max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale))


def mcnemar_p(first: Sequence[int], second: Sequence[int]) -> float:
    """Two-sided p-value of McNemar's exact test: are two accuracies on the same samples different?

    Only samples that the two answer differently count; without any the p-value is 1. Other numbers of samples on the
    two sides are a ValueError.
    """
    if len(first) != len(second):
        raise ValueError(f"both must answer the same samples, got {len(first)} and {len(second)}")
    gained = sum(not one and two for one, two in zip(first, second, strict=True))
    lost = sum(one and not two for one, two in zip(first, second, strict=True))
    tail = sum(math.comb(gained + lost, number) for number in range(min(gained, lost) + 1))
    return min(1.0, float(tail / 2 ** (gained + lost - 1)) if gained + lost else 1.0)


def bootstrap_interval(scores: Sequence[float], *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """95 % percentile bootstrap interval of the mean over samples, for scores that are not only 0 or 1.

    Of paired scores hand in the differences, sample by sample: the interval of the mean difference. When all scores are
    equal it has no width, however few they are; Wilson's interval of right and wrong has.

    Raises:
        ValueError: no scores, one that is not finite, or fewer than one resample.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"scores must be at least one finite number, got {scores!r}")
    if resamples < 1:
        raise ValueError(f"resamples must be positive, got {resamples}")
    generator = np.random.default_rng(seed)
    # By parts: 10 000 resamples of many scores would take gigabytes at once.
    rows = max(1, 4_000_000 // values.size)
    means = [
        values[generator.integers(values.size, size=(min(rows, resamples - first), values.size))].mean(axis=1)
        for first in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Interval(float(low), float(high))


def bounded_interval(scores: Sequence[float], least: float, most: float) -> Interval:
    """95 % interval of the mean of scores between two limits: the bootstrap's, wider where scores are few or equal.

    It is widened by the share of samples that may be anything else although none of n is, z^2 / (n + z^2): of scores
    that are all `least` or all `most` this is Wilson's interval.

    Raises:
        ValueError: as `bootstrap_interval`.
    """
    low, high = bootstrap_interval(scores)
    if len(scores) < FEW or low == high:
        unseen = NORMAL_QUANTILE**2 / (len(scores) + NORMAL_QUANTILE**2)
        return Interval(low - unseen * (low - least), high + unseen * (most - high))
    return Interval(low, high)


def is_right_or_wrong(scores: Sequence[float]) -> bool:
    """Whether every score is 0 or 1."""
    return all(score in (0, 1) for score in scores)


def score_interval(scores: Sequence[float]) -> Interval:
    """95 % interval of a mean score: Wilson's where every score is 0 or 1, else `bounded_interval`."""
    if is_right_or_wrong(scores):
        return wilson_interval(round(sum(scores)), len(scores))
    return bounded_interval(scores, 0, 1)


def average_interval(tasks: Sequence[tuple[float, float, float]], least: float = 0.0) -> Interval:
    """95 % interval of the mean of several accuracies, from the limits of their own: (accuracy, low, high) of each.

    Not below `least`, which of differences is -1.

    The distances from each accuracy to its limits are added as independent errors are (Zou and Donner's MOVER), so
    tasks that are all right or all wrong keep the width of their Wilson intervals, of which a bootstrap knows nothing.
    """
    mean = sum(value for value, _, _ in tasks) / len(tasks)
    below = math.hypot(*(value - low for value, low, _ in tasks)) / len(tasks)
    above = math.hypot(*(high - value for value, _, high in tasks)) / len(tasks)
    return Interval(max(least, mean - below), mean + above)


def pearson(x: Tensor, y: Tensor) -> float:
    """Correlation of two tensors of one shape over all places where both are finite.

    Raises:
        ValueError: fewer than two such places, or one side constant there.
    """
    usable = x.isfinite() & y.isfinite()
    first, second = (side[usable].to(widest(side.device)) for side in (x, y))
    if first.numel() < 2:
        raise ValueError(f"a correlation needs at least two finite pairs, got {first.numel()}")
    first, second = first - first.mean(), second - second.mean()
    spread = float(first.norm() * second.norm())
    if spread == 0:
        raise ValueError("a correlation needs values that differ, got a constant")
    return float(first @ second) / spread
