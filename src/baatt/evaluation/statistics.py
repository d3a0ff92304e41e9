"""Intervals for accuracies measured on a finite number of samples, and the test of two measured on the same ones."""

import math
from collections.abc import Sequence
from typing import NamedTuple

NORMAL_QUANTILE = 1.959963984540054  # two-sided 95 %


class Interval(NamedTuple):
    """A 95 % interval of a proportion."""

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

    Only samples that the two answer differently count; without any the p-value is 1.

    Raises:
        ValueError: not the same number of samples.
    """
    if len(first) != len(second):
        raise ValueError(f"both must answer the same samples, got {len(first)} and {len(second)}")
    gained = sum(not one and two for one, two in zip(first, second, strict=True))
    lost = sum(one and not two for one, two in zip(first, second, strict=True))
    tail = sum(math.comb(gained + lost, number) for number in range(min(gained, lost) + 1))
    return min(1.0, float(tail / 2 ** (gained + lost - 1)) if gained + lost else 1.0)
