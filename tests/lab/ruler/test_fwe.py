"""Frequent words extraction is RULER's: template, zeta frequencies and the dots."""

import math
import re
from collections import Counter
from random import Random

import pytest

from baatt.lab.ruler import fwe

#: int(1000 / (rank ** 2 * pi ** 2 / 6)), by hand.
COUNTS = [607, 151, 67, 37, 24, 16, 12, 9, 7, 6, 5, 4, 3, 3, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 0]


def test_frequencies():
    assert fwe.frequencies(1000, 25) == COUNTS
    assert fwe.frequencies(1000, 4, alpha=3.5) == [887, 78, 18, 6]  # zeta(3.5) = 1.1267338673


def test_zeta():
    assert fwe.zeta(2.0) == pytest.approx(math.pi**2 / 6, rel=1e-15)
    assert fwe.zeta(4.0) == pytest.approx(math.pi**4 / 90, rel=1e-15)
    assert fwe.zeta(1.5) == pytest.approx(2.612375348685488, rel=1e-14)
    for alpha in (1.0, 0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match="alpha must be above 1"):
            fwe.zeta(alpha)


class Still:
    """A generator that names the words a, b, ... and shuffles nothing."""

    def __init__(self):
        self.names = iter("dcba")

    def choices(self, letters, k):
        assert (letters, k) == ("abcdefghijklmnopqrstuvwxyz", 6)
        return [next(self.names)]

    def shuffle(self, words):
        pass


def test_prompt_as_a_whole():
    sample = fwe.build(Still(), 74, 4)
    text = " ".join(["..."] * 44 + ["b"] * 11 + ["c"] * 4 + ["d"] * 2)
    assert sample.prompt == (
        "Read the following coded text and track the frequency of each coded word. "
        f"Find the three most frequently appeared coded words. {text}\n"
        "Question: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?"
    )
    assert sample.answer_prefix == (
        " Answer: According to the coded text above, the three most frequently appeared words are:"
    )
    assert sample.values == ("b", "c", "d")
    assert sample.answer == " b, c, d."
    assert (sample.task, sample.answer_tokens, sample.metric, sample.size) == ("fwe", 50, "all", 74)


def text_of(sample):
    """The words of the coded text."""
    return sample.prompt.split("coded words. ")[1].split("\nQuestion")[0].split(" ")


@pytest.mark.parametrize("seed", range(5))
def test_samples(seed):
    sample = fwe.build(Random(seed), 1000, 25)
    words = text_of(sample)
    ranked = Counter(words).most_common()
    assert [count for _, count in ranked] == [count for count in COUNTS if count]
    assert ranked[0][0] == "..."
    assert tuple(word for word, _ in ranked[1:4]) == sample.values
    assert all(re.fullmatch(r"[a-z]{6}", word) for word, _ in ranked[1:])
    assert words[:607] != ["..."] * 607


def test_words_are_new_in_every_sample():
    first, second = (set(text_of(fwe.build(Random(seed), 1000, 25))) for seed in (0, 1))
    assert first & second == {"..."}


@pytest.mark.parametrize("alpha", [1.1, 2.0, 3.5])
def test_the_answer_is_one_from_the_smallest_size_on(alpha):
    smallest = fwe.smallest_size(alpha)
    for size in range(smallest, smallest + 300):
        counts = fwe.frequencies(size, 5, alpha)
        assert counts[3] > counts[4]
    with pytest.raises(ValueError, match=f"size must be at least {smallest} words"):
        fwe.build(Random(0), smallest - 1, 20, alpha)


def test_a_vocabulary_too_small_is_refused():
    with pytest.raises(ValueError, match=r"vocabulary must have 4 to .* words, got 3"):
        fwe.build(Random(0), 1000, 3)
