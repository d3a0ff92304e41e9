"""RULER's eight needle-in-a-haystack tasks as text.

In: a task, a word pool, an essay as words, a random generator and a haystack size. Out: a `RulerSample` with the
prompt, the start of the answer and the expected values. Knows nothing of tokens, models, attention or scoring.

Two keys of one sample are never equal; RULER's may be, once in millions. A line of the needle haystack may have the key
that is asked for, as in RULER, where distractors are drawn without a look at the needles: one multikey_2 sample of
about 40 000 at 4096 tokens with all words, of about 900 with the held-out ones. The value expected is the needle's.
"""

import itertools
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from baatt.lab.ruler.sample import Recipe, Request, RulerSample, draw_distinct, hide_lines
from baatt.lab.ruler.sources import SENTENCES, WordPool, split_sentences

TEMPLATE = (
    "Some special magic {type} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {type} afterwards.\n{context}\n"
    "What are all the special magic {type} for {query} mentioned in the provided text?"
)
ANSWER_PREFIX = " The special magic {type} for {query} mentioned in the provided text are"
NEEDLE = "One of the special magic {type} for {key} is: {value}."
NOISE_LINE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
ANSWER_TOKENS = 128
DEPTHS = tuple(round(step * 100 / 39) for step in range(40))
#: Tokens one unit of haystack takes with most tokenizers, roughly.
TOKENS_PER_UNIT = {"noise": 25.0, "essay": 1.4, "needle": 22.0}


@dataclass(frozen=True)
class NeedleTask:
    """One row of RULER's needle tasks; `keys` needles of distinct keys, `values` per key, `queries` keys asked for."""

    name: str
    haystack: str
    key_type: str = "words"
    value_type: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


class Needle(NamedTuple):
    """One key and one of its values."""

    key: str
    value: str


def draw_needles(task: NeedleTask, random: Random, words: WordPool, count: int) -> list[Needle]:
    """`count` distinct keys with `task.values` values each, grouped by key; ValueError: the pool has fewer pairs."""
    draw_key, draw_value = ITEMS[task.key_type], ITEMS[task.value_type]
    pairs = len(words.adjectives) * len(words.nouns)
    if task.key_type == "words" and count > pairs:
        raise ValueError(f"words must hold at least {count} adjective-noun pairs for as many keys, got {pairs}")
    keys = draw_distinct(lambda: draw_key(random, words), count)
    return [Needle(key, draw_value(random, words)) for key in keys for _ in range(task.values)]


def needle_sentence(task: NeedleTask, needle: Needle) -> str:
    """RULER's sentence that hides one needle."""
    return NEEDLE.format(type=task.value_type, key=needle.key, value=needle.value)


def join_list(items: list[str]) -> str:
    """RULER's list: comma separated, `and` before the last."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])}, and {items[-1]}"


def question(task: NeedleTask, keys: list[str], value_count: int) -> tuple[str, str]:
    """The template (with `{context}` still open) and the answer prefix, in the singular for a single value."""
    texts, kind, query = [TEMPLATE, ANSWER_PREFIX], task.value_type, join_list(keys)
    if value_count == 1:
        texts = [text.replace("Some", "A").replace("are all", "is").replace("are", "is") for text in texts]
        kind = kind[:-1]
    template, prefix = (text.format(type=kind, query=query, context="{context}") for text in texts)
    return template, prefix


def fill_haystack(
    task: NeedleTask,
    sentences: list[str],
    size: int,
    random: Random,
    words: WordPool,
    essay: Sequence[str],
    split: Callable[[str], list[str]] = split_sentences,
) -> str:
    """The task's haystack of `size` units, lines of their own or words of the essay, with the needles' sentences.

    Needles go between the sentences of the essay, at distinct depths; two at one place, or one at either end, leave a
    doubled or outer space, as in RULER. Distractors are drawn without a look at the other needles.
    """
    if task.haystack != "essay":
        count = max(size, len(sentences))
        if task.haystack == "noise":
            lines = [NOISE_LINE] * count
        else:
            draw_key, draw_value = ITEMS[task.key_type], ITEMS[task.value_type]
            distractors = (Needle(draw_key(random, words), draw_value(random, words)) for _ in range(count))
            lines = [needle_sentence(task, needle) for needle in distractors]
        return "\n".join(hide_lines(lines, sentences[::-1], random))
    text = split(" ".join(itertools.islice(itertools.cycle(essay), size)))
    places = sorted(int(len(text) * depth / 100) for depth in random.sample(DEPTHS, len(sentences)))
    pieces, start = [], 0
    for place, sentence in zip(places, sentences, strict=True):
        pieces += [" ".join(text[start:place]), sentence]
        start = place
    return " ".join([*pieces, " ".join(text[start:])])


def build(
    task: NeedleTask,
    random: Random,
    words: WordPool,
    essay: Sequence[str],
    size: int,
    split: Callable[[str], list[str]] = split_sentences,
) -> RulerSample:
    """One sample whose haystack has `size` units (lines, or words of `essay`, which a task may need: ValueError).

    A larger size from the same state of `random` keeps needles and question.
    """
    if task.haystack == "essay" and not essay:
        raise ValueError(f"essay must hold words of running text for task {task.name!r}, got none")
    needles = draw_needles(task, random, words, max(task.keys, task.queries))
    random.shuffle(needles)
    keys = random.sample(sorted({needle.key for needle in needles}), task.queries)
    sentences = [needle_sentence(task, needle) for needle in needles]
    context = fill_haystack(task, sentences, size, Random(random.getrandbits(64)), words, essay, split)
    values = sorted(
        (needle for needle in needles if needle.key in keys),
        key=lambda needle: (keys.index(needle.key), context.index(needle_sentence(task, needle))),
    )
    template, prefix = question(task, keys, len(values))
    answers = [needle.value for needle in values]
    answer, prompt = f" {join_list(answers)}.", template.replace("{context}", context)
    return RulerSample(task.name, prompt, prefix, answer, tuple(answers), size, ANSWER_TOKENS)


def recipe(request: Request, task: NeedleTask) -> Recipe:
    """How the sample of a request looks at any size, with the words and the essay of its sources."""
    sources, words = request.sources, request.sources.pool
    essay = sources.essay_words() if task.haystack == "essay" else ()
    if essay and sources.starts_anywhere:
        start = request.random(f"place/{request.number}").randrange(len(essay))
        essay = essay[start:] + essay[:start]
    # An essay of one word leaves no room between sentences, but needles may stand at its ends.
    smallest = 1 if task.haystack == "essay" else max(task.keys, task.queries) * task.values
    return Recipe(
        lambda size: build(task, request.random(), words, essay, size, SENTENCES[sources.sentences]),
        smallest, TOKENS_PER_UNIT[task.haystack],
    )  # fmt: skip


ITEMS: dict[str, Callable[[Random, WordPool], str]] = {
    "numbers": lambda random, words: str(random.randint(10**6, 10**7 - 1)),  # seven digits
    "words": lambda random, words: f"{random.choice(words.adjectives)}-{random.choice(words.nouns)}",
    "uuids": lambda random, words: str(uuid.UUID(int=random.getrandbits(128), version=4)),
}
NIAH_TASKS: dict[str, NeedleTask] = {
    task.name: task
    for task in (
        NeedleTask("niah_single_1", "noise"),
        NeedleTask("niah_single_2", "essay"),
        NeedleTask("niah_single_3", "essay", value_type="uuids"),
        NeedleTask("niah_multikey_1", "essay", keys=4),
        NeedleTask("niah_multikey_2", "needle"),
        NeedleTask("niah_multikey_3", "needle", key_type="uuids", value_type="uuids"),
        NeedleTask("niah_multivalue", "essay", values=4),
        NeedleTask("niah_multiquery", "essay", queries=4),
    )
}
