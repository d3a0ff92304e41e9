"""Intervals for accuracies measured on a finite number of samples."""

import math
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
