"""RULER's eight needle-in-a-haystack tasks as text.

In: a task, a word pool, an essay as words, a random generator and a haystack size. Out: a `NeedleSample` with the
prompt, the start of the answer and the expected values. `fit` chooses the size so that prompt and answer fill a token
budget counted with the model's own tokenizer. Knows nothing of models, attention or scoring.
"""

import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from tokenizers import Tokenizer

from baatt.evaluation.ruler.words import WordPool

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
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


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


class NeedleSample(NamedTuple):
    """One prompt. The model reads `prompt + answer_prefix` and continues with `answer`.

    values: the expected values: by query, and within one key in order of appearance.
    """

    task: str
    prompt: str
    answer_prefix: str
    answer: str
    values: tuple[str, ...]
    haystack_size: int


def random_number(random: Random, words: WordPool) -> str:
    """Seven digits."""
    return str(random.randint(10**6, 10**7 - 1))


def random_words(random: Random, words: WordPool) -> str:
    """`adjective-noun` from the pool."""
    return f"{random.choice(words.adjectives)}-{random.choice(words.nouns)}"


def random_uuid(random: Random, words: WordPool) -> str:
    """A version 4 UUID."""
    return str(uuid.UUID(int=random.getrandbits(128), version=4))


def draw_needles(task: NeedleTask, random: Random, words: WordPool, count: int) -> list[Needle]:
    """`count` distinct keys with `task.values` values each, grouped by key.

    Raises:
        ValueError: the pool has fewer adjective-noun pairs than keys are asked for.
    """
    draw_key, draw_value = ITEMS[task.key_type], ITEMS[task.value_type]
    pairs = len(words.adjectives) * len(words.nouns)
    if task.key_type == "words" and count > pairs:
        raise ValueError(f"words must hold at least {count} adjective-noun pairs for as many keys, got {pairs}")
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[draw_key(random, words)] = None
    return [Needle(key, draw_value(random, words)) for key in keys for _ in range(task.values)]


def needle_sentence(task: NeedleTask, needle: Needle) -> str:
    """RULER's sentence that hides one needle."""
    return NEEDLE.format(type=task.value_type, key=needle.key, value=needle.value)


def join_list(items: list[str]) -> str:
    """RULER's list: comma separated, `and` before the last."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])}, and {items[-1]}"


def question(task: NeedleTask, keys: list[str], value_count: int) -> tuple[str, str]:
    """The template (with `{context}` still open) and the answer prefix, in the singular for a single value."""
    template, prefix, kind = TEMPLATE, ANSWER_PREFIX, task.value_type
    if value_count == 1:
        template, prefix = (
            text.replace("Some", "A").replace("are all", "is").replace("are", "is") for text in (template, prefix)
        )
        kind = kind[:-1]
    query = join_list(keys)
    return template.format(type=kind, query=query, context="{context}"), prefix.format(type=kind, query=query)


def among_lines(lines: list[str], sentences: list[str], random: Random) -> str:
    """Needles at distinct random lines."""
    lines = list(lines)
    places = sorted(random.sample(range(len(lines)), len(sentences)), reverse=True)
    for place, sentence in zip(places, sentences, strict=True):
        lines.insert(place, sentence)
    return "\n".join(lines)


def noise_context(
    task: NeedleTask, sentences: list[str], size: int, random: Random, words: WordPool, essay: Sequence[str]
) -> str:
    """`size` lines of one repeated noise line."""
    return among_lines([NOISE_LINE] * max(size, len(sentences)), sentences, random)


def needle_context(
    task: NeedleTask, sentences: list[str], size: int, random: Random, words: WordPool, essay: Sequence[str]
) -> str:
    """`size` lines, each a distractor needle."""
    single = NeedleTask(task.name, task.haystack, task.key_type, task.value_type)
    distractors = draw_needles(single, random, words, max(size, len(sentences)))
    return among_lines([needle_sentence(task, needle) for needle in distractors], sentences, random)


def essay_context(
    task: NeedleTask, sentences: list[str], size: int, random: Random, words: WordPool, essay: Sequence[str]
) -> str:
    """`size` words of running text from a random place, needles between its sentences at distinct depths."""
    start = random.randrange(len(essay))
    text = SENTENCE_END.split(" ".join(essay[(start + offset) % len(essay)] for offset in range(size)))
    depths = sorted(int(len(text) * depth / 100) for depth in random.sample(DEPTHS, len(sentences)))
    pieces = list(text)
    for depth, sentence in sorted(zip(depths, sentences, strict=True), key=lambda pair: pair[0], reverse=True):
        pieces.insert(depth, sentence)
    return " ".join(pieces)


def build(task: NeedleTask, random: Random, words: WordPool, essay: Sequence[str], size: int) -> NeedleSample:
    """One sample whose haystack has `size` units (lines, or words of an essay).

    Raises:
        ValueError: `essay` (words of running text) is empty though the task needs it.
    """
    if task.haystack == "essay" and not essay:
        raise ValueError(f"essay must hold words of running text for task {task.name!r}, got none")
    needles = draw_needles(task, random, words, max(task.keys, task.queries))
    random.shuffle(needles)
    sentences = [needle_sentence(task, needle) for needle in needles]
    context = HAYSTACKS[task.haystack](task, sentences, size, random, words, essay)
    keys = random.sample(sorted({needle.key for needle in needles}), task.queries)
    values = sorted(
        (needle for needle in needles if needle.key in keys),
        key=lambda needle: (keys.index(needle.key), context.index(needle_sentence(task, needle))),
    )
    template, prefix = question(task, keys, len(values))
    answers = tuple(needle.value for needle in values)
    return NeedleSample(
        task.name, template.replace("{context}", context), prefix, f" {join_list(list(answers))}.", answers, size
    )


def fit(
    task: NeedleTask, random: Random, words: WordPool, essay: Sequence[str], tokenizer: Tokenizer, max_length: int
) -> NeedleSample:
    """The largest sample whose prompt, answer prefix and answer budget (128 tokens) stay within `max_length` tokens.

    Raises:
        ValueError: not even the smallest haystack fits.
    """
    state = random.getstate()

    def attempt(size: int) -> tuple[NeedleSample, int]:
        random.setstate(state)
        sample = build(task, random, words, essay, size)
        return sample, len(tokenizer.encode(sample.prompt + sample.answer_prefix).ids) + ANSWER_TOKENS

    smallest = max(task.keys, task.queries) * task.values if task.haystack != "essay" else 1
    best, length = attempt(smallest)
    if length > max_length:
        raise ValueError(f"max_length must hold the smallest {task.name} sample ({length} tokens), got {max_length}")
    low, high = smallest, smallest + 1
    while attempt(high)[1] <= max_length:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        sample, length = attempt(middle)
        if length <= max_length:
            best, low = sample, middle
        else:
            high = middle
    if low != best.haystack_size:
        best, _ = attempt(low)
    return best


ITEMS: dict[str, Callable[[Random, WordPool], str]] = {
    "numbers": random_number,
    "words": random_words,
    "uuids": random_uuid,
}
HAYSTACKS: dict[str, Callable[[NeedleTask, list[str], int, Random, WordPool, Sequence[str]], str]] = {
    "noise": noise_context,
    "essay": essay_context,
    "needle": needle_context,
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
