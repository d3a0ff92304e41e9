"""Fewer cases than all combinations."""

from collections.abc import Sequence
from typing import Any

import pytest


def mostly_pairs(names: str, one: Sequence[Any], other: Sequence[Any], *rest: Sequence[Any]) -> pytest.MarkDecorator:
    """`parametrize` over all pairs of the first two axes; each further one moves on from pair to pair."""
    cases = [
        (first, second, *(axis[(i + (number + 1) * j) % len(axis)] for number, axis in enumerate(rest)))
        for i, first in enumerate(one)
        for j, second in enumerate(other)
    ]
    return pytest.mark.parametrize(names, cases)
