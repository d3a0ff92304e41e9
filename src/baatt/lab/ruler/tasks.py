"""The 13 tasks in RULER's order, and the one function that makes a sample of any of them.

In: a task, a length in tokens, the model's tokenizer, sources. Out: a `RulerSample` as long as the length allows. A
task with other options is one of these with another recipe:
`TASKS["vt"]._replace(name="vt_2_8", recipe=functools.partial(vt.recipe, chains=2, hops=8))`.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from baatt.lab.ruler import cwe, fwe, niah, qa, vt
from baatt.lab.ruler.sample import Recipe, Request, RulerSample
from baatt.lab.ruler.sizing import largest_sample, token_counter
from baatt.lab.ruler.sources import SENTENCES, Sources


class RulerTask(NamedTuple):
    """One task. answer_tokens: what a model may write; part of the length. metric: a name in `scoring.METRICS`.

    needs: the member of `Sources` that must be given, "" for a task that runs offline as it is.
    """

    name: str
    recipe: Callable[[Request], Recipe]
    answer_tokens: int
    metric: str = "all"
    needs: str = ""


TASKS: dict[str, RulerTask] = {
    task.name: task
    for task in (
        *(
            RulerTask(name, functools.partial(niah.recipe, task=task), niah.ANSWER_TOKENS)
            for name, task in niah.NIAH_TASKS.items()
        ),
        RulerTask("vt", vt.recipe, vt.ANSWER_TOKENS),
        RulerTask("cwe", cwe.recipe, cwe.ANSWER_TOKENS),
        RulerTask("fwe", fwe.recipe, fwe.ANSWER_TOKENS),
        RulerTask("qa_1", functools.partial(qa.recipe, data="squad"), qa.ANSWER_TOKENS, "part", "squad"),
        RulerTask("qa_2", functools.partial(qa.recipe, data="hotpot"), qa.ANSWER_TOKENS, "part", "hotpot"),
    )
}
#: How questions of the tasks that need no data set begin their answer: in lower case, up to what differs.
ASKED = tuple(
    prefix.partition("{")[0].strip().lower()
    for prefix in (niah.ANSWER_PREFIX, vt.ANSWER_PREFIX, cwe.ANSWER_PREFIX, fwe.ANSWER_PREFIX)
)
#: The tasks that need no data set.
OFFLINE_TASKS = tuple(name for name, task in TASKS.items() if not task.needs)


def is_asked(text: str) -> bool:
    """Whether a text asks as a task that needs no data set does, which is all that the shipped model has learnt."""
    return any(words in text.lower() for words in ASKED)


def find_task(name: str) -> RulerTask:
    """A task by its name; ValueError: no such task."""
    if name not in TASKS:
        raise ValueError(f"task must be one of {list(TASKS)}, got {name!r}")
    return TASKS[name]


def check_sources(names: Iterable[str], sources: Sources, count: int = 1) -> None:
    """Reads all that is given or needed, so that a long run does not stop half-way for want of a file.

    ValueError: an unknown task, sources that one of them cannot be made from, or, as sample n of a task with a data set
    is question n of its file, fewer questions than the `count` samples of each task.
    """
    for task in map(find_task, names):
        if task.needs and (found := len(sources.questions(task.needs).questions)) < count:
            raise ValueError(f"count must be at most {found}, the questions that {task.name} has, got {count}")
    SENTENCES[sources.sentences](" ".join(sources.essay_words()[:100]))
    sources.word_lists()


def draw(
    task: RulerTask,
    length: int,
    number: int,
    tokenizer: Any,
    *,
    seed: int = 42,
    sources: Sources = Sources(),  # noqa: B008  (frozen)
    reserve: int = 0,
) -> RulerSample:
    """Sample `number` of a task: the same for the same seed, task, length and number, whatever else is drawn.

    Args:
        length: tokens of prompt, answer prefix and answer budget together, RULER's `max_seq_length`.
        tokenizer: the model's, see `sizing.token_counter`.
        reserve: tokens of the length to leave free, for a chat template around the prompt.

    Raises:
        TypeError: `length` or `number` is not an int.
        ValueError: a length too small for the task, or sources it cannot be made from.
    """
    for name, value, least in (("length", length, 1), ("number", number, 0), ("reserve", reserve, 0)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    count = token_counter(tokenizer)
    recipe = task.recipe(Request(task.name, seed, length, number, sources, count))

    def named(size: int) -> RulerSample:
        return recipe.build(size)._replace(task=task.name, answer_tokens=task.answer_tokens, metric=task.metric)

    return largest_sample(recipe._replace(build=named), count, length - reserve)


def draw_samples(
    task: str,
    length: int,
    count: int,
    tokenizer: Any,
    *,
    first: int = 0,
    **options: Any,
) -> list[RulerSample]:
    """`count` samples of a RULER task from number `first` on, by default with held-out words and held-out text.

    Args:
        length, tokenizer, options: as `draw`; sample n of a seed is the same however many are drawn.

    Raises:
        ValueError: an unknown task, or as `draw`.
    """
    found = find_task(task)
    return [draw(found, length, number, tokenizer, **options) for number in range(first, first + count)]
