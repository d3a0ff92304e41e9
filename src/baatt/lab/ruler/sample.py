"""What all tasks share: the sample they make, the recipe that makes it at any size, and what a recipe is made from.

A task turns a `Request` into a `Recipe`; `sizing` chooses the size; the result is a `RulerSample`. Also how tasks draw
names that differ, and hide lines among others. Knows no task.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from baatt.lab.ruler.sources import Sources


class RulerSample(NamedTuple):
    """One prompt. The model reads `prompt + answer_prefix` and continues with `answer`.

    answer: what a model that knows everything would write, in the form of the prompt's example where there is one.
    values: the references a prediction is scored against, in the order of `answer`.
    size: units of haystack: lines, words, distinct words or documents.
    answer_tokens: tokens RULER lets a model write for this task; they count towards the length.
    metric: a name in `baatt.lab.ruler.scoring.METRICS`.
    """

    task: str
    prompt: str
    answer_prefix: str
    answer: str
    values: tuple[str, ...]
    size: int
    answer_tokens: int = 128
    metric: str = "all"


class Recipe(NamedTuple):
    """How one sample looks at every size; the same size always gives the same sample.

    tokens_per_unit: a guess of what one more unit costs, where the search for the size starts.
    limit: the largest size there is material for, None without limit; `shortage` says what gives more.
    """

    build: Callable[[int], RulerSample]
    smallest: int
    tokens_per_unit: float
    limit: int | None = None
    shortage: str = ""


class Request(NamedTuple):
    """One sample to make. It depends on seed, task, length and number, on the sources and on how tokens are counted.

    length: tokens of prompt, answer prefix and answer together.
    """

    task: str
    seed: int
    length: int
    number: int
    sources: Sources
    count: Callable[[str], int]

    def random(self, part: object = None) -> Random:
        """A generator of this sample alone, or with `part` one that all samples of the task and length share."""
        return Random(f"{self.seed}/{self.task}/{self.length}/{self.number if part is None else part}")


def draw_distinct(draw: Callable[[], str], count: int) -> list[str]:
    """The first `count` different texts that `draw` returns, in that order."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def hide_lines(lines: list[str], hidden: Sequence[str], random: Random) -> list[str]:
    """`lines` with others among them: in their order, at distinct random places, each before the line of its place."""
    places = sorted(random.sample(range(len(lines)), len(hidden)))
    lines = list(lines)
    for number, (place, line) in enumerate(zip(places, hidden, strict=True)):
        lines.insert(place + number, line)
    return lines
