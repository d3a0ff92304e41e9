"""The search for the size: the largest within the budget, few countings, and what it refuses."""

from random import Random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baatt.lab.ruler.sample import Recipe, RulerSample
from baatt.lab.ruler.sizing import INTERPOLATIONS, largest_sample, largest_size, sample_tokens, token_counter


class Counted:
    """A cost that counts its calls."""

    def __init__(self, cost):
        self.cost, self.sizes = cost, []

    def __call__(self, size):
        self.sizes.append(size)
        return self.cost(size)


@pytest.mark.parametrize("slope", [0.3, 1.0, 1.4, 25.0, 200.0])
@pytest.mark.parametrize("guess", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("budget", [1024, 4096, 131072])
def test_a_linear_cost_takes_few_countings(slope, guess, budget):
    cost = Counted(lambda size: 150 + int(slope * size))
    found = largest_size(cost, budget, 2, slope * guess)
    assert cost.cost(found) <= budget < cost.cost(found + 1)
    assert len(cost.sizes) <= 7


@given(
    steps=st.lists(st.integers(0, 60), min_size=1, max_size=300),
    budget=st.integers(0, 3000),
    smallest=st.integers(0, 5),
    guess=st.floats(0.05, 500),
)
def test_any_growing_cost(steps, budget, smallest, guess):
    costs = [100]
    for step in steps:
        costs.append(costs[-1] + step)
    cost = Counted(lambda size: costs[size - smallest] if size - smallest < len(costs) else 10**6)
    found = largest_size(cost, budget, smallest, guess)
    if budget < 100:
        assert found is None
        return
    assert cost.cost(found) <= budget < cost.cost(found + 1)
    assert len(cost.sizes) <= INTERPOLATIONS + 20


def test_a_rough_cost_stays_within_the_budget():
    """Another sample at every size, as in tasks that shuffle: one more does not fit, and that is all that is asked."""
    for seed in range(50):
        noise = {size: Random(f"{seed}/{size}").randint(-40, 40) for size in range(2000)}
        cost = Counted(lambda size, noise=noise: 500 + 5 * size + noise[size])
        found = largest_size(cost, 4096, 1, 4.0)
        assert cost.cost(found) <= 4096 < cost.cost(found + 1)
        assert len(cost.sizes) <= INTERPOLATIONS + 12


def test_a_limit():
    assert largest_size(lambda size: size, 100, 1, 1.0, limit=40) == 40
    assert largest_size(lambda size: size, 100, 1, 1.0, limit=150) == 100
    assert largest_size(lambda size: size, 100, 1, 0.01, limit=101) == 100
    assert largest_size(lambda size: size, 100, 7, 1.0, limit=7) == 7


def test_a_cost_that_does_not_grow_is_refused():
    with pytest.raises(ValueError, match="tokenizer must count more tokens for a longer text, got 0 for 160 units"):
        largest_size(lambda size: 0, 10, 1, 1.0)


def make(size):
    return RulerSample("some", "x" * size, "yy", "", ("v",), size, 10)


def test_samples():
    assert sample_tokens(make(5), len) == 17
    found = largest_sample(Recipe(make, 3, 2.0), len, 1000)
    assert found == make(988)
    with pytest.raises(ValueError, match=r"length must hold the smallest some sample \(15 tokens\), got 14"):
        largest_sample(Recipe(make, 3, 2.0), len, 14)
    with pytest.raises(ValueError, match="more of it"):
        largest_sample(Recipe(make, 3, 2.0, 500, "more of it"), len, 1000)


@pytest.mark.parametrize(
    "tokenizer",
    [
        lambda text: len(text.split()),
        SimpleNamespace(encode=lambda text: text.split()),
        SimpleNamespace(encode=lambda text: SimpleNamespace(ids=text.split())),
    ],
)
def test_tokenizers(tokenizer):
    assert token_counter(tokenizer)("one two  three") == 3


def test_no_tokenizer():
    with pytest.raises(TypeError, match=r"tokenizer must have encode\(text\) or be a function"):
        token_counter("path")
    with pytest.raises(TypeError, match="number of tokens as an int, got <class 'list'>"):
        token_counter(str.split)("a b")
