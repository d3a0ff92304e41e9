"""RULER's frequent words extraction: coded words whose frequencies follow a zeta distribution, the first of them dots.

In: a random generator, a number of words and a vocabulary size. Out: a `RulerSample` that asks for the three most
frequent words after the dots. Knows nothing of tokens or scoring.

RULER's script does not take the 50 answer tokens off the length; here they are part of it, as in all other tasks.
"""

import math
from random import Random
from string import ascii_lowercase

import torch

from baatt.lab.ruler.sample import Recipe, Request, RulerSample, draw_distinct

TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
ANSWER_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
ANSWER_TOKENS = 50
WORD_LENGTH = 6
ALPHA = 2.0
TOKENS_PER_VOCABULARY_WORD = 50
TOKENS_PER_WORD = 3.0


def zeta(alpha: float) -> float:
    """Riemann's zeta function, of an alpha above 1."""
    if not (math.isfinite(alpha) and alpha > 1):
        raise ValueError(f"alpha must be above 1, got {alpha}")
    return float(torch.special.zeta(torch.tensor(alpha, dtype=torch.float64, device="cpu"), 1.0))


def frequencies(size: int, vocabulary: int, alpha: float = ALPHA) -> list[int]:
    """How often the word of each rank stands in a text of about `size` words: int(size * rank^-alpha / zeta(alpha))."""
    scale = zeta(alpha)
    return [int(size * rank**-alpha / scale) for rank in range(1, vocabulary + 1)]


def smallest_size(alpha: float = ALPHA) -> int:
    """Words from which on rank 4 always stands more often than rank 5, so that the answer is one."""
    return math.ceil(zeta(alpha) / (4**-alpha - 5**-alpha))


def build(random: Random, size: int, vocabulary: int, alpha: float = ALPHA) -> RulerSample:
    """One sample of about `size` words, of which `vocabulary` are distinct, the dots with them.

    ValueError: a size at which ranks may tie, fewer than the four ranks the question needs, more words than half of
    those there are, or as `zeta`.
    """
    if size < smallest_size(alpha):
        raise ValueError(f"size must be at least {smallest_size(alpha)} words for alpha={alpha}, got {size}")
    if not 4 <= vocabulary <= 26**WORD_LENGTH // 2:
        raise ValueError(f"vocabulary must have 4 to {26**WORD_LENGTH // 2} words, got {vocabulary}")
    ranked = sorted(draw_distinct(lambda: "".join(random.choices(ascii_lowercase, k=WORD_LENGTH)), vocabulary))
    random.shuffle(ranked)
    ranked[0] = "..."
    counted = zip(ranked, frequencies(size, vocabulary, alpha), strict=True)
    words = [word for word, count in counted for _ in range(count)]
    random.shuffle(words)
    values, prompt = tuple(ranked[1:4]), TEMPLATE.format(context=" ".join(words))
    return RulerSample("fwe", prompt, ANSWER_PREFIX, f" {', '.join(values)}.", values, size, ANSWER_TOKENS)


def recipe(request: Request, alpha: float = ALPHA) -> Recipe:
    """How the sample of a request looks with any number of words; the vocabulary grows with the length."""
    # Four ranks at least; that many tokens hold no sample anyway.
    vocabulary = max(4, request.length // TOKENS_PER_VOCABULARY_WORD)
    smallest = smallest_size(alpha)
    return Recipe(lambda size: build(request.random(), size, vocabulary, alpha), smallest, TOKENS_PER_WORD)
