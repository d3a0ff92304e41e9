"""RULER's variable tracking: chains of assignments hidden in order among noise lines, one worked example before them.

In: a random generator, a number of noise lines, chains and hops. Out: a `RulerSample` that asks for every name of the
first chain. `recipe` also sizes the example, to 500 tokens as RULER does. Knows nothing of models or scoring.

The example keeps its places for all samples of a length; its names and value are new in each. Names and values of one
prompt are distinct here; RULER draws names again when two are equal, but not values, and gives all chains of an example
the same value, so that with several chains the example answers only part of its question.
"""

import itertools
from random import Random
from string import ascii_uppercase
from typing import NamedTuple

from baatt.lab.ruler.niah import NOISE_LINE
from baatt.lab.ruler.sample import Recipe, Request, RulerSample, draw_distinct, hide_lines
from baatt.lab.ruler.sizing import largest_size

TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above."
)
ANSWER_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{count} variables are assigned the value {query}, they are: "
)
ANSWER_TOKENS = 30
EXAMPLE_TOKENS = 500
EXAMPLE_HOPS = 10
LETTERS, EXAMPLE_LETTERS = 5, 3
TOKENS_PER_LINE = 25.0


class Chain(NamedTuple):
    """A value and the names it is handed on to, in that order."""

    value: str
    names: tuple[str, ...]


def draw_chains(random: Random, chains: int, hops: int, letters: int) -> list[Chain]:
    """Chains of `hops` + 1 names of capitals; all names differ, and all values.

    ValueError: fewer than one chain or hop, or more names than half of those there are.
    """
    if chains < 1 or hops < 1:
        raise ValueError(f"chains and hops must be at least 1, got {chains} and {hops}")
    needed = chains * (hops + 1)
    if needed > 26**letters // 2:
        raise ValueError(f"chains * (hops + 1) must be at most {26**letters // 2} names, got {needed}")
    names = iter(draw_distinct(lambda: "".join(random.choices(ascii_uppercase, k=letters)), needed))
    # The upper end is left out, as numpy's randint does in RULER.
    values = random.sample(range(10000, 99999), chains)
    return [Chain(str(value), tuple(itertools.islice(names, hops + 1))) for value in values]


def assignments(chain: Chain) -> list[str]:
    """RULER's lines of a chain; all but the first end with a space."""
    handed = (f"VAR {new} = VAR {old} " for old, new in itertools.pairwise(chain.names))
    return [f"VAR {chain.names[0]} = {chain.value}", *handed]


def hide(chains: list[Chain], size: int, random: Random) -> str:
    """The chains at random places among `size` noise lines, each chain in its order."""
    lines = [NOISE_LINE] * size
    for chain in chains:
        lines = hide_lines(lines, assignments(chain), random)
    # RULER's clean-up. These noise lines have no space to lose, and the assignments keep theirs.
    return "\n".join(lines).replace(". \n", ".\n")


def ask(chains: list[Chain], context: str) -> RulerSample:
    """The question for the names of the first chain."""
    value, names = chains[0]
    prompt, prefix = (text.format(context=context, count=len(names), query=value) for text in (TEMPLATE, ANSWER_PREFIX))
    return RulerSample("vt", prompt, prefix, f" {' '.join(names)}", names, context.count(NOISE_LINE), ANSWER_TOKENS)


def make_example(random: Random, places: Random, size: int, chains: int = 1, hops: int = 4) -> RulerSample:
    """The worked question of at most 10 hops, as in RULER: names and values from `random`, places from `places`."""
    drawn = draw_chains(random, chains, min(EXAMPLE_HOPS, hops), EXAMPLE_LETTERS)
    return ask(drawn, hide(drawn, size, places))


def build(
    random: Random, size: int, *, chains: int = 1, hops: int = 4, example: RulerSample | None = None
) -> RulerSample:
    """One sample with `size` noise lines, after a worked example if one is given.

    ValueError: fewer lines than a chain has assignments, or what `draw_chains` refuses.
    """
    if size <= hops:
        raise ValueError(f"size must be at least hops + 1 = {hops + 1} lines, got {size}")
    drawn = draw_chains(random, chains, hops, LETTERS)
    sample = ask(drawn, hide(drawn, size, random))
    worked = "" if example is None else f"{example.prompt}{example.answer_prefix}{example.answer}\n\n"
    return sample._replace(prompt=worked + sample.prompt)


def recipe(request: Request, chains: int = 1, hops: int = 4) -> Recipe:
    """How the sample of a request looks with any number of noise lines."""

    def example_cost(size: int) -> int:
        worked = make_example(request.random("names"), request.random("places"), size, chains, hops)
        return request.count(worked.prompt + worked.answer_prefix)  # without its answer, as RULER counts it

    smallest = min(EXAMPLE_HOPS, hops) + 1
    lines = largest_size(example_cost, EXAMPLE_TOKENS, smallest, TOKENS_PER_LINE) or smallest

    def at(size: int) -> RulerSample:
        random = request.random()
        worked = make_example(random, request.random("places"), lines, chains, hops)
        return build(random, size, chains=chains, hops=hops, example=worked)

    return Recipe(at, hops + 1, TOKENS_PER_LINE)
