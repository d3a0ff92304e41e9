"""The allocation of kept blocks to layers: known optima, equal means, and layers that become dense."""

import itertools

import pytest

from baatt import Policy
from baatt.lab.fidelity.profile import Cost, allocate, grid, lower_hull


def costs(weights, sparsity):
    """Layers whose cost is weight x (1 / kept - 1): convex."""
    return [
        Cost(layer, one, 1 - one, weight * (1 / (1 - one) - 1))
        for layer, weight in enumerate(weights)
        for one in grid(sparsity)
    ]


def total(weights, policy):
    given = dict(policy.layer_sparsity) | dict.fromkeys(policy.dense_layers, 0.0)
    return sum(weight * (1 / (1 - given[layer]) - 1) for layer, weight in enumerate(weights))


def test_grid():
    assert grid(0.9) == [0.95, 0.9, 0.8, 0.6]
    assert grid(0.5) == [0.75, 0.5]


def test_equal_layers_stay_uniform():
    policy = allocate(costs([1, 1, 1], 0.9), 0.9, Policy(min_length=7))
    assert policy == Policy(layer_sparsity=((0, 0.9), (1, 0.9), (2, 0.9)), min_length=7)


def test_layers_that_cost_more_keep_more_at_the_same_mean():
    weights = [1, 100, 1, 0.1]
    policy = allocate(costs(weights, 0.9), 0.9, Policy())
    given = dict(policy.layer_sparsity)
    assert sum(given.values()) / 4 == pytest.approx(0.9)
    assert given[1] < 0.9 < given[3]
    assert total(weights, policy) < total(weights, Policy(layer_sparsity=tuple((n, 0.9) for n in range(4)))) / 1.5
    grids = itertools.product(grid(0.9), repeat=4)  # no mixture of measured points is better
    best = min(total(weights, Policy(layer_sparsity=tuple(enumerate(one)))) for one in grids if sum(one) >= 3.6 - 1e-9)
    assert total(weights, policy) <= best + 1e-9


def test_a_layer_that_costs_all_becomes_dense():
    policy = allocate(costs([1e-3, 1e3, 1e-3, 1e-3], 0.5), 0.5, Policy(dense_layers=(7,)))
    assert policy.dense_layers == (7, 1)
    assert sum(sparsity for _, sparsity in policy.layer_sparsity) == pytest.approx(2)


def test_the_hull_leaves_out_what_noise_lifts():
    points = [Cost(0, 0.9, 0.1, 1.0), Cost(0, 0.8, 0.2, 0.9), Cost(0, 0.6, 0.4, 0.1), Cost(0, 0.0, 1.0, 0.0)]
    assert [one.sparsity for one in lower_hull([*points, Cost(0, 0.7, 0.3, 1.2)])] == [0.9, 0.6, 0.0]
    # The least sparse point measured may keep as much as a sparser one, at few blocks.
    assert len(lower_hull([Cost(0, 0.95, 0.2, 1.0), Cost(0, 0.9, 0.2, 1.0), Cost(0, 0.0, 1.0, 0.0)])) == 2
