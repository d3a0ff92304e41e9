"""From the cost of making each layer sparse alone to a sparsity per layer at the same mean.

Costs of layers are taken to add up. Every layer begins at the sparsest point measured; block pairs are then given back
where a pair saves most, along the lower convex hull of each layer's costs, until as many are kept as uniformly. For
costs that add up and are convex no allocation of the points measured is cheaper.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from baatt.config import Policy
from baatt.lab.tables import Record

#: Shares of key blocks kept that each layer is measured at, over the share that a uniform sparsity keeps.
FACTORS = (0.5, 1, 2, 4)


class Cost(NamedTuple):
    """A layer made sparse alone: share of its block pairs that it kept, and what that cost."""

    layer: int
    sparsity: float
    kept: float
    cost: float


def grid(sparsity: float) -> list[float]:
    """The sparsities that a layer is measured at; without the dense one, which costs nothing."""
    return [round(1 - factor * (1 - sparsity), 6) for factor in FACTORS if factor * (1 - sparsity) < 1]


def costs_of(records: Sequence[Record]) -> list[Cost]:
    """From the records of layers made sparse alone: the others were dense and count in the share skipped."""
    return [
        Cost(one["layer"], one["config"]["sparsity"], 1 - one["sparsity_achieved"] * one["layers_routed"], one["kl"])
        for one in records
    ]


def allocate(costs: Sequence[Cost], sparsity: float, policy: Policy) -> Policy:
    """The policy with a sparsity for every layer measured, or dense where that is worth it.

    Args:
        costs: of every layer at `grid(sparsity)`. sparsity: the uniform one whose kept pairs are shared out. policy:
            what else stays as it is.
    """
    layers: dict[int, list[Cost]] = {}
    for one in costs:
        layers.setdefault(one.layer, []).append(one)
    budget = sum(one.kept for one in costs if one.sparsity == sparsity)
    steps: list[tuple[Cost, Cost]] = []
    chosen: dict[int, float] = {}
    for layer, points in layers.items():
        hull = lower_hull([*points, Cost(layer, 0.0, 1.0, 0.0)])
        chosen[layer] = hull[0].sparsity
        budget -= hull[0].kept
        steps += itertools.pairwise(hull)
    for one, other in sorted(steps, key=_slope):
        share = min(1.0, budget / (other.kept - one.kept))
        if share <= 0:
            break
        budget -= share * (other.kept - one.kept)
        chosen[one.layer] = round(one.sparsity + share * (other.sparsity - one.sparsity), 6)
    dense = [layer for layer, value in chosen.items() if value == 0]
    return dataclasses.replace(
        policy,
        dense_layers=(*policy.dense_layers, *dense),
        layer_sparsity=tuple((layer, value) for layer, value in chosen.items() if value > 0),
    )


def lower_hull(points: Iterable[Cost]) -> list[Cost]:
    """The points of a layer that no mixture of two others beats, from the sparsest on."""
    hull: list[Cost] = []
    for one in sorted(points, key=lambda one: (one.kept, one.cost)):
        if hull and one.cost >= hull[-1].cost and one.kept < 1:
            continue
        if hull and one.kept == hull[-1].kept:
            continue
        while len(hull) > 1 and _slope((hull[-2], hull[-1])) >= _slope((hull[-1], one)):
            hull.pop()
        hull.append(one)
    return hull


def _slope(step: tuple[Cost, Cost]) -> float:
    """Cost that a step changes by, for a share kept; the steepest descent is the smallest."""
    one, other = step
    return (other.cost - one.cost) / (other.kept - one.kept)
