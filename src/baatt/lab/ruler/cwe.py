"""RULER's common words extraction: a numbered list in which ten words stand far more often than all others.

In: a random generator, words to draw from and a number of distinct words. Out: a `RulerSample` that asks for the ten,
after a worked example. Knows nothing of models or scoring.

Below 4096 tokens the words are repeated less, as in RULER. With a tokenizer that needs many tokens a word, like that of
the shipped model, RULER's longer form does not fit into 4096 tokens either (RULER's script never ends): see `shape_of`.
"""

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from baatt.lab.ruler.sample import Recipe, Request, RulerSample
from baatt.lab.ruler.sizing import sample_tokens

TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
ANSWER_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
ANSWER_TOKENS = 120
COMMON_WORDS = 10
TOKENS_PER_WORD = 18.0


class Repeats(NamedTuple):
    """How often a common and an uncommon word stand in a list."""

    common: int
    uncommon: int


class Shape(NamedTuple):
    """Repeats of the list and of the example, and the example's number of distinct words."""

    repeats: Repeats
    example_repeats: Repeats
    example_words: int


LONG = Shape(Repeats(30, 3), Repeats(10, 3), 40)
SHORT = Shape(Repeats(6, 1), Repeats(3, 1), 20)
SHORT_BELOW = 4096


def numbered(words: Sequence[str]) -> str:
    """`1. word 2. word ...`"""
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def draw_list(random: Random, words: Sequence[str], size: int, repeats: Repeats) -> tuple[list[str], list[str]]:
    """A shuffled list of `size` distinct words, 10 to all, with repeats, and its common words in the order drawn."""
    if not COMMON_WORDS <= size <= len(words):
        raise ValueError(f"size must be in [{COMMON_WORDS}, {len(words)}] distinct words, got {size}")
    drawn = random.sample(words, size)
    common, uncommon = drawn[:COMMON_WORDS], drawn[COMMON_WORDS:]
    entries = common * repeats.common + uncommon * repeats.uncommon
    random.shuffle(entries)
    return entries, common


def build(random: Random, words: Sequence[str], size: int, shape: Shape = LONG, example: bool = True) -> RulerSample:
    """One sample of `size` distinct words, ten of them common; the values are in order of their first appearance.

    With `example`, a worked question with its answer comes first. ValueError: fewer than ten words, or more than given.
    """
    before = ""
    if example:
        entries, common = draw_list(random, words, shape.example_words, shape.example_repeats)
        before = f"{TEMPLATE.format(context=numbered(entries))}{ANSWER_PREFIX} {numbered(common)}\n"
    entries, common = draw_list(random, words, size, shape.repeats)
    values = tuple(sorted(common, key=entries.index))
    prompt = before + TEMPLATE.format(context=numbered(entries))
    return RulerSample("cwe", prompt, ANSWER_PREFIX, f" {numbered(values)}", values, size, ANSWER_TOKENS)


def shape_of(request: Request) -> Shape:
    """RULER's repeats at a length: the short form below 4096 tokens, else the long one if it fits.

    As many distinct words as its example has must fit. Decided once for a seed, length and tokenizer, not by sample.
    """
    if request.length < SHORT_BELOW:
        return SHORT
    probe = build(request.random("shape"), request.sources.word_lists()[0], LONG.example_words, LONG)
    return LONG if sample_tokens(probe, request.count) <= request.length else SHORT


def recipe(request: Request) -> Recipe:
    """How the sample of a request looks with any number of distinct words.

    When the words run out, all are drawn from the next longer list of the sources, as RULER goes over from wonderwords
    to a list of English words.
    """
    lists, shape = request.sources.word_lists(), shape_of(request)

    def at(size: int) -> RulerSample:
        return build(request.random(), next((one for one in lists if len(one) >= size), lists[-1]), size, shape)

    limit = len(lists[-1])
    shortage = (
        f"cwe at {request.length} tokens must have more than the {limit} distinct words of the sources: give "
        "sources.words='full', or sources.english_words, the path of RULER's json/english_words.json"
    )
    return Recipe(at, COMMON_WORDS, TOKENS_PER_WORD, limit, shortage)
