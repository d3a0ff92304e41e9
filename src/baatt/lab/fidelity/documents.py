"""Documents that a model is compared on: prose with planted facts that are asked later, at an exact number of tokens.

A fact is a line `Secret number of Paris: 1234567`. All facts stand in the first half; in the second half the same line
stands again, and its number has to be predicted. Every question has its own place between stretches of prose, spread
over the second half: side by side they would share one query block, which at a high sparsity keeps fewer key blocks
than there are facts, so that no choice of blocks could answer them. Answers are counted in tokens, whatever tokens the
tokenizer makes of a number.
"""

import itertools
import random
from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from baatt.models.checkpoint import without_limits

DIGITS = 7
#: Of eight wordings tried on SmolLM2 at 1024 tokens the dense model answers this one best; no sparse run had a say.
ASKED = "Secret number of {}: "
CITIES = (
    *("Amsterdam", "Athens", "Berlin", "Boston", "Cairo", "Chicago", "Copenhagen", "Delhi", "Dublin", "Geneva"),
    *("Houston", "Lisbon", "London", "Madrid", "Melbourne", "Moscow", "Oslo", "Paris", "Prague", "Rome"),
    *("Seattle", "Stockholm", "Sydney", "Tokyo", "Toronto", "Vienna", "Warsaw", "Zurich"),
)


class Document(NamedTuple):
    """inputs: ids that the model reads. targets: places whose tokens are predicted, in order; answers: those of each
    planted number among them. tokens: ids without masks.
    """

    inputs: list[int]
    targets: list[int]
    answers: list[list[int]]
    tokens: list[int]


class Masks(NamedTuple):
    """Which tokens a masked model has to predict: the id of the mask, and the share of the prose that is masked."""

    token: int
    share: float


def make_documents(
    tokenizer: Tokenizer, text: str, length: int, *, count: int, needles: int, seed: int, masks: Masks | None
) -> list[Document]:
    """Documents of `length` tokens, each of another stretch of the text.

    Args:
        needles: facts of a document, at most one a city. masks: None predicts every token of the second half from those
            before it, a token of the first half having seen less than half of the length; else masked prose anywhere,
            and the masked numbers of the questions.

    Raises:
        ValueError: a text too short for the documents, or a length too short for the facts.
    """
    prose = without_limits(tokenizer).encode(text, add_special_tokens=False).ids
    if count * length > len(prose):
        raise ValueError(
            f"the text must have {count} x {length} tokens for documents that differ, got {len(prose)}: "
            "fewer --documents, shorter --lengths or a longer --text"
        )
    step = len(prose) // count
    return [
        _document(tokenizer, prose[number * step :], length, random.Random(f"{seed} {number}"), needles, masks)
        for number in range(count)
    ]


def _document(
    tokenizer: Tokenizer, prose: Sequence[int], length: int, draw: random.Random, needles: int, masks: Masks | None
) -> Document:
    front, end = _surroundings(tokenizer)
    facts = [_fact(tokenizer, city, draw) for city in draw.sample(CITIES, needles)]
    asked = draw.sample(facts, needles)
    planted = sum(len(ids) for ids, _ in facts)
    room = length - len(front) - len(end) - 2 * planted
    half = max(0, length // 2 - len(front) - planted)
    if room < half or half < needles:
        raise ValueError(f"--lengths must have room for {needles} facts and their questions, got {length} tokens")
    sentence_end = tokenizer.encode(".", add_special_tokens=False).ids[-1]
    tokens, free, answers = list(front), list[int](), list[list[int]]()
    for lines, first, last in ((facts, 0, half), (asked, half, room)):
        cuts = [first, *_places(prose, first, last, needles, draw, sentence_end), last]
        for line, (begin, stop) in enumerate(itertools.pairwise(cuts)):
            free += range(len(tokens), len(tokens) + stop - begin)
            tokens += prose[begin:stop]
            if line == needles:  # behind the last one
                break
            ids, number = lines[line]
            if lines is asked:
                answers.append([len(tokens) + place for place in number])
            tokens += ids
    tokens += end
    if masks is None:
        return Document(tokens, list(range(length // 2, length - len(end))), answers, tokens)
    hidden = {place for answer in answers for place in answer}
    targets = sorted(hidden | set(draw.sample(free, max(1, round(masks.share * len(free))))))
    inputs = list(tokens)
    for place in targets:
        inputs[place] = masks.token
    return Document(inputs, targets, answers, tokens)


def _places(prose: Sequence[int], first: int, last: int, count: int, draw: random.Random, stop: int) -> list[int]:
    """Where `count` lines are put in between: one in each equal part of [first, last), after a sentence if one ends."""
    found = []
    for part in range(count):
        begin, end = (first + (last - first) * one // count for one in (part, part + 1))
        place = draw.randrange(begin, end)
        found.append(next((one + 1 for one in range(place, end - 1) if prose[one] == stop), place))
    return found


def _fact(tokenizer: Tokenizer, city: str, draw: random.Random) -> tuple[list[int], list[int]]:
    """Ids of a line, and the places in it of the tokens that hold the number."""
    start = f"\n{ASKED.format(city)}"
    encoded = tokenizer.encode(f"{start}{draw.randrange(10 ** (DIGITS - 1), 10**DIGITS)}\n", add_special_tokens=False)
    first, last = len(start), len(start) + DIGITS
    return encoded.ids, [n for n, (begin, end) in enumerate(encoded.offsets) if begin < last and end > first]


def _surroundings(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and behind a text."""
    plain, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    first = next((place for place in range(len(whole)) if whole[place : place + len(plain)] == plain), 0)
    return whole[:first], whole[first + len(plain) :]
