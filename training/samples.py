"""Training sequences as token arrays: bare pairs, documents with many questions, RULER's own tasks.

In: a stage of the curriculum. Out: `Batch` of token ids and of regions, which say what each token may be masked as.
Runs in worker processes on the CPU; masking itself happens on the GPU in `train.py`. Uses the same task code as the
evaluation, with the training split of words and text.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding

from baatt.lab.ruler import cwe, fwe, niah, vt
from baatt.lab.ruler.sources import WordPool, load_words
from baatt.lab.ruler.tasks import OFFLINE_TASKS
from baatt.models.checkpoint import load_tokenizer

CONTEXT, TEXT, TAIL, FIRST_ANSWER = 0, 1, 2, 3  # regions; answer number n of a sequence is FIRST_ANSWER + n
MAX_ANSWERS = 48
NEEDLE_SPAN = re.compile(r"One of the special magic \w+ for \S+ is: \S+\.")
SOURCES = ("pairs", "document", *OFFLINE_TASKS, "prose", "chat", "reading")
TOKENS_PER_BATCH = 65536
#: Length at which attention is taken to be half of a training step: a guess from the steps of earlier runs.
EVEN_LENGTH = 8192
LEAST_COMMON_WORDS = 768  # tokens that ten common words, some others and a worked example need
LEAST_FREQUENT_WORDS = 384  # tokens that coded words of which no two ranks tie need


class Batch(NamedTuple):
    """tokens [B, T] int32, regions [B, T] uint8, source [B] uint8 (index into SOURCES), stage: its number."""

    tokens: np.ndarray
    regions: np.ndarray
    source: np.ndarray
    stage: int


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum: which sequences of which length, how many candidates they hold at most, and how
    often a question asks for several values at once. The next stage begins once exact match reaches `target`, or after
    `patience` seconds. Earlier stages from `replay` on keep a share of the batches. `others`: share of all tasks that
    are no needles."""

    kind: str
    lengths: tuple[int, ...]
    candidates: int
    rows: int | None = None
    joint: float = 0.0
    target: float = 0.9
    patience: float = 90.0
    replay: int = 0
    others: float = 0.6


CURRICULUM = (
    Stage("pairs", (80,), 2, 1024),
    Stage("pairs", (160,), 4, 768),
    Stage("pairs", (320,), 8, 384),
    Stage("pairs", (640,), 16, 160),
    Stage("sentences", (512, 768), 8),
    Stage("document", (512, 768, 1024), 16, joint=0.1),
    Stage("ruler", (512, 1024, 1536, 2048), 32, joint=0.25),
    Stage("ruler", tuple(range(512, 4097, 256)), 64, joint=0.3, target=0.96, patience=400),
    # Accuracy falls off towards the longest length unless that length is practised most.
    Stage("ruler", (1024, 2048, 3072, 3584, 4096, 4096, 4096), 64, joint=0.3, target=2.0, patience=200),
    # The other tasks of RULER: few things to find first, as with needles, then longer documents of all tasks.
    Stage("counting", (256, 384), 2, patience=120, replay=8),
    Stage("counting", (384, 512, 768), 4, patience=120, replay=8),
    Stage("counting", (512, 768, 1024), 10, patience=150, replay=8),
    Stage("all", (512, 1024, 1024, 2048), 64, joint=0.3, target=2.0, patience=150, replay=8),
    Stage("all", (1024, 2048, 4096, 4096, 6144, 8192, 8192), 96, joint=0.3, target=2.0, patience=200, replay=11),
    Stage("all", (2048, 4096, 4096, 8192, 12288, 16384), 128, joint=0.3, target=2.0, patience=350, replay=11),
    # Needles fall off at the longest length too; documents with many questions practise it most.
    Stage("all", (4096, 8192, 16384, 16384, 16384), 192, joint=0.3, target=2.0, patience=355, replay=12, others=0.3),
    Stage("all", (4096, 8192, 16384, 16384, 32768, 32768), 256, joint=0.3, target=2.0, replay=12, others=0.4),
)
#: Sources by whose exact match a stage ends; of several the lowest counts.
JUDGED_BY = {"pairs": ("pairs",), "counting": ("vt", "cwe", "fwe")}
# Seven digits of a single needle are learned at once; the others need the practice, the two weakest most of it.
TASK_WEIGHTS = {"niah_single_1": 1, "niah_single_2": 1, "niah_single_3": 6, "niah_multikey_3": 6, "niah_multivalue": 10}
TASK_WEIGHT = 3
DOCUMENT_SHARE = 0.3  # of needles, among all tasks
#: Of variable tracking, frequent words (learned first) and common words.
OTHER_WEIGHTS = (2, 1, 3)

Pieces = list[tuple[str, int]]


class SampleMaker:
    """Draws sequences with one random generator; holds the tokenizer, words, text and running size estimates."""

    def __init__(self, data: Path, seed: int) -> None:
        self.random = Random(seed)
        self.tokenizer = load_tokenizer(data)
        self.end = self.tokenizer.token_to_id("<|endoftext|>")
        self.words: WordPool = load_words("train")
        self.common = self.words.all
        self.text = (data / "train.txt").read_text()
        self.tokens_per_unit: dict[tuple[str, str, str], float] = {}
        self.unit = ("", "", "")
        self.shrink = 1.0
        self.joint = 0.0

    def essay(self, size: int) -> list[str]:
        """Words of training text from a random place, enough for `size` of them."""
        start = self.random.randrange(max(1, len(self.text) - 12 * size - 200))
        return self.text[start : start + 12 * size + 200].split()[1:]

    def types(self) -> tuple[str, str]:
        """Key type and value type of a document."""
        draw = self.random.random()
        return ("words", "numbers") if draw < 0.6 else ("words", "uuids") if draw < 0.75 else ("uuids", "uuids")

    def pairs(self, length: int, candidates: int) -> tuple[Pieces, str]:
        """`key: value.` lines, then every key again with its value to be filled in."""
        key_type, value_type = self.types() if length >= 320 else ("words", "numbers")
        count = candidates
        if value_type == "uuids":
            count = max(2, min(candidates, length // (150 if key_type == "uuids" else 90)))
        task = niah.NeedleTask("pairs", "needle", key_type, value_type)
        needles = niah.draw_needles(task, self.random, self.words, count)
        pieces: Pieces = [("".join(f"{needle.key} is: {needle.value}.\n" for needle in needles), CONTEXT)]
        for number, needle in enumerate(self.random.sample(needles, len(needles))):
            pieces += [(f"{needle.key} is", CONTEXT), (f" {needle.value}.", FIRST_ANSWER + number), ("\n", CONTEXT)]
        return pieces[:-1], "pairs"

    def groups(self, names: list[str], value_type: str, values: int, tokens: int) -> list[list[str]]:
        """Keys to ask for, one list per question, as many as fit into `tokens` tokens."""
        random, groups, used = self.random, [], 0
        asked = random.sample(names, len(names))
        while asked and len(groups) < MAX_ANSWERS:
            group = asked[: random.choice((2, 3, 4)) if random.random() < self.joint else 1]
            asked = asked[len(group) :]
            text = niah.join_list(group)
            answer = (9 if value_type == "numbers" else 42) * values * len(group)
            used += 28 + answer + 2 * self.count(text)
            if used > tokens and groups:
                break
            groups.append(group)
        return groups

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer.encode(text).ids)

    def document(self, length: int, candidates: int, haystacks: tuple[str, ...]) -> tuple[Pieces, str]:
        """A haystack with several needles and several questions."""
        random = self.random
        key_type, value_type = self.types()
        values = random.choice((2, 3, 4)) if random.random() < self.joint and key_type == "words" else 1
        haystack = random.choice(haystacks)
        probe = niah.draw_needles(niah.NeedleTask("", "", key_type, value_type), random, self.words, 1)[0]
        per_needle = self.count(niah.needle_sentence(niah.NeedleTask("", "", key_type, value_type), probe)) + 1
        room = max(2, int(length * random.uniform(0.1, 0.6)) // per_needle // values)
        limit = len(niah.DEPTHS) if haystack == "essay" else 10**6
        keys = random.randint(2, max(2, min(candidates, room, limit // values)))
        task = niah.NeedleTask("document", haystack, key_type, value_type, keys=keys, values=values)
        needles = niah.draw_needles(task, random, self.words, keys)
        random.shuffle(needles)
        sentences = [niah.needle_sentence(task, needle) for needle in needles]
        rest = length - 60 - len(needles) * per_needle
        groups = self.groups(sorted({needle.key for needle in needles}), value_type, values, int(rest * 0.6))
        asked = "".join(2 * niah.join_list(group) for group in groups)
        answers = (9 if value_type == "numbers" else 42) * values * sum(map(len, groups))
        size = self.size(haystack, value_type, key_type, rest - self.count(asked) - answers - 28 * len(groups))
        essay = self.essay(size) if haystack == "essay" else []
        context = niah.fill_haystack(task, sentences, size, random, self.words, essay)
        pieces: Pieces = []
        for number, group in enumerate(groups):
            found = sorted(
                (needle for needle in needles if needle.key in group),
                key=lambda needle: (group.index(needle.key), context.index(niah.needle_sentence(task, needle))),
            )
            template, prefix = niah.question(task, group, len(found))
            if pieces:
                template = "\n" + template.split("{context}\n")[1]
            answer = f" {niah.join_list([needle.value for needle in found])}."
            pieces += [(template.replace("{context}", context) + prefix, CONTEXT), (answer, FIRST_ANSWER + number)]
        return pieces, "document"

    def tracking(self, length: int, most_hops: int = 4) -> tuple[Pieces, str]:
        """Chains of assignments among noise lines and a question for each, often after RULER's worked example."""
        random, pieces = self.random, []
        most = max(1, (length - 200) // 300)
        count, hops = random.randint(1, min(6, most)), min(most_hops, random.choice((1, 2, 3, 4, 4, 4, 4)))
        worked = ""
        if length >= 1024 and random.random() < 0.7:
            example = vt.make_example(random, random, random.randint(5, 17), hops=hops)
            worked = f"{example.prompt}{example.answer_prefix}{example.answer}\n\n"
        line = self.unit_tokens(("vt", "", ""), lambda: vt.NOISE_LINE + "\n", 1)
        rest = length - self.count(worked) - 60 - count * (hops + 1) * 22 - count * 75 - random.randint(8, 60)
        chains = vt.draw_chains(random, count, hops, vt.LETTERS)
        context = vt.hide(chains, max(hops + 1, int(rest * self.shrink / line)), random)
        for number, chain in enumerate(random.sample(chains, count)):
            question = vt.ask([chain], context if not pieces else "")
            prompt = worked + question.prompt if not pieces else "\n" + question.prompt.split("\n\n\n")[1]
            pieces += [(prompt + question.answer_prefix, CONTEXT), (question.answer, FIRST_ANSWER + number)]
        return pieces, "vt"

    def common_words(self, length: int) -> tuple[Pieces, str]:
        """RULER's list of words in which ten are common, at other repeats too."""
        random = self.random
        # Which of the two fits at 4096 tokens depends on the tokenizer, so both are met there.
        short = length < cwe.SHORT_BELOW or (length < 6144 and random.random() < 0.5)
        shape = cwe.SHORT if short else cwe.LONG
        if random.random() < 0.5:
            uncommon = random.randint(1, 3)
            shape = shape._replace(repeats=cwe.Repeats(uncommon * random.choice((6, 8, 10, 10)), uncommon))
        entries = max(200, length // 6)  # the numbers grow longer
        token = self.unit_tokens(
            ("cwe", "", str(entries)), lambda: cwe.numbered(random.choices(self.common, k=entries)), entries
        )
        room = (length - 190 - random.randint(8, 60)) * self.shrink / token
        example = length >= 1024 or random.random() < 0.5
        if example:
            room -= 10 * shape.example_repeats.common + (shape.example_words - 10) * shape.example_repeats.uncommon
        size = 10 + int((room - 10 * shape.repeats.common) / shape.repeats.uncommon)
        if size < 20:  # too short for these repeats
            shape = shape._replace(repeats=cwe.Repeats(4, 1))
            size = max(12, 10 + int(room - 40))
        size = min(size, len(self.common))
        sample = cwe.build(random, self.common, size, shape, example)
        return [(sample.prompt + sample.answer_prefix, CONTEXT), (sample.answer, FIRST_ANSWER)], "cwe"

    def few_common_words(self, length: int, most: int) -> tuple[Pieces, str]:
        """A list as RULER's in which up to `most` words are common, far more often than the others."""
        random = self.random
        number, often = random.randint(1, most), random.randint(4, 8)
        token = self.unit_tokens(("cwe", "", "200"), lambda: cwe.numbered(random.choices(self.common, k=200)), 200)
        entries = int((length - 75 - 8 * number - random.randint(4, 20)) * self.shrink / token)
        words = random.sample(self.common, number + max(1, entries - number * often))
        listed = words[:number] * often + words[number:]
        random.shuffle(listed)
        common = sorted(words[:number], key=listed.index)
        context = cwe.TEMPLATE.replace("10 most", f"{number} most").format(context=cwe.numbered(listed))
        prefix = cwe.ANSWER_PREFIX.replace("top 10", f"top {number}")
        return [(context + prefix, CONTEXT), (f" {cwe.numbered(common)}", FIRST_ANSWER)], "cwe"

    def counting(self, length: int, most: int) -> tuple[Pieces, str]:
        """Short sequences of the other tasks, with at most `most` hops or common words."""
        self.unit = ("", "", "")
        makers = (
            lambda: self.tracking(length, min(4, most)),
            lambda: self.few_common_words(length, most),
            lambda: self.frequent_words(length),
        )
        return self.random.choice(makers if length >= LEAST_FREQUENT_WORDS else makers[:2])()

    def frequent_words(self, length: int) -> tuple[Pieces, str]:
        """RULER's coded words by a zeta distribution."""
        random = self.random
        vocabulary = max(10, length // fwe.TOKENS_PER_VOCABULARY_WORD)

        def words() -> str:
            return fwe.build(random, 2000, vocabulary).prompt

        token = self.unit_tokens(("fwe", "", str(vocabulary)), words, 2000)
        size = int((length - 160 - random.randint(8, 60)) * self.shrink / token)
        sample = fwe.build(random, max(size, fwe.smallest_size()), vocabulary)
        return [(sample.prompt + sample.answer_prefix, CONTEXT), (sample.answer, FIRST_ANSWER)], "fwe"

    def any_task(self, length: int, candidates: int, others: float) -> tuple[Pieces, str]:
        """A document with many questions, a needle task as it stands, or, in a share of `others`, another task."""
        draw = self.random.random()
        if draw < DOCUMENT_SHARE * (1 - others):
            return self.document(length, candidates, ("noise", "essay", "essay", "needle"))
        if draw < 1 - others:
            return self.ruler(length)
        self.unit = ("", "", "")
        makers, weights = (self.tracking, self.frequent_words, self.common_words), OTHER_WEIGHTS
        if length < LEAST_COMMON_WORDS:
            makers, weights = makers[:2], weights[:2]
        return self.random.choices(makers, weights)[0](length)

    def unit_tokens(self, unit: tuple[str, str, str], text: Callable[[], str], units: int) -> float:
        """Tokens of one unit of haystack, measured once."""
        if unit not in self.tokens_per_unit:
            self.tokens_per_unit[unit] = self.count(text()) / units
        return self.tokens_per_unit[unit]

    def ruler(self, length: int) -> tuple[Pieces, str]:
        """One of RULER's needle tasks as it stands, a single question."""
        weights = [TASK_WEIGHTS.get(name, TASK_WEIGHT) for name in niah.NIAH_TASKS]
        task = self.random.choices(tuple(niah.NIAH_TASKS.values()), weights)[0]
        answer = (12 if task.value_type == "numbers" else 44) * task.values * task.queries
        tail = self.random.randint(8, 125)
        queries = 2 * task.queries * (40 if task.key_type == "uuids" else 8)
        size = self.size(task.haystack, task.value_type, task.key_type, length - tail - answer - queries - 90)
        essay = self.essay(size) if task.haystack == "essay" else []
        sample = niah.build(task, self.random, self.words, essay, size)
        return [(sample.prompt + sample.answer_prefix, CONTEXT), (sample.answer, FIRST_ANSWER)], task.name

    def size(self, haystack: str, value_type: str, key_type: str, tokens: int) -> int:
        """Units of haystack that take about `tokens` tokens, from what earlier sequences of that kind took."""
        self.unit = (haystack, value_type, key_type)
        task = niah.NeedleTask("", haystack, key_type, value_type)

        def context() -> str:
            return niah.fill_haystack(task, [], 200, self.random, self.words, self.essay(200))

        return max(1, int(tokens * self.shrink / self.unit_tokens(self.unit, context, 200)))

    def draw(self, stage: Stage, length: int) -> tuple[Pieces, str]:
        """Pieces of one sequence of a stage."""
        if stage.kind == "pairs":
            return self.pairs(length, stage.candidates)
        if stage.kind == "sentences":
            return self.document(length, stage.candidates, ("needle",))
        if stage.kind == "counting":
            return self.counting(length, stage.candidates)
        if stage.kind == "all":
            return self.any_task(length, stage.candidates, stage.others)
        if stage.kind == "document" or self.random.random() < 0.6:
            return self.document(length, stage.candidates, ("noise", "essay", "essay", "needle"))
        return self.ruler(length)

    def sequence(self, stage: Stage, length: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Tokens and regions of exactly `length`, ended by end-of-text tokens."""
        self.shrink, self.unit, self.joint = 1.0, ("", "", ""), stage.joint
        while True:
            pieces, source = self.draw(stage, length)
            encodings = self.tokenizer.encode_batch([text for text, _ in pieces])
            if sum(len(encoding.ids) for encoding in encodings) < length:
                break
            self.shrink *= 0.9
        tokens = [token for encoding in encodings for token in encoding.ids] + [self.end]
        regions = self.text_regions(pieces[0][0], encodings[0])
        for encoding, (_, region) in zip(encodings[1:], pieces[1:], strict=True):
            regions += [region] * len(encoding.ids)
        regions.append(regions[-1])
        padded = np.full(length, self.end, np.int32)
        kinds = np.full(length, TAIL, np.uint8)
        padded[: len(tokens)] = tokens
        kinds[: len(regions)] = regions
        return padded, kinds, SOURCES.index(source)

    def text_regions(self, text: str, encoding: Encoding) -> list[int]:
        """Which tokens of the first piece are running text that may be masked: all but instructions and needles."""
        if self.unit[0] != "essay":
            return [CONTEXT] * len(encoding.ids)
        allowed = np.zeros(len(text) + 1, bool)
        allowed[text.index("\n") + 1 : text.rindex("\n")] = True
        for needle in NEEDLE_SPAN.finditer(text):
            allowed[needle.start() : needle.end() + 1] = False
        starts, ends = np.asarray(encoding.offsets).T
        return list(np.where(allowed[starts] & allowed[ends], TEXT, CONTEXT))

    def batch(self, number: int, tokens: int | None = None, longest: int | None = None) -> Batch:
        """One batch of stage `number`.

        Args:
            number: of the stage.
            tokens: about so many of them (None: TOKENS_PER_BATCH).
            longest: the length whose batches have `tokens` tokens, at least one row; shorter rows take less attention,
                so that there are more of them in the same time, up to TOKENS_PER_BATCH (None: all lengths alike).
        """
        stage = CURRICULUM[number]
        length = self.random.choice(stage.lengths)
        tokens = TOKENS_PER_BATCH if tokens is None else tokens
        if stage.rows is not None:
            rows = stage.rows * tokens // TOKENS_PER_BATCH
        elif longest is None:
            rows = tokens // length
        else:
            time = max(1, tokens // longest) * step_time(longest)
            rows = min(max(tokens, TOKENS_PER_BATCH) // length, int(time / step_time(length)))
        drawn = [self.sequence(stage, length) for _ in range(max(1, rows))]
        sequences, regions, source = zip(*drawn, strict=True)
        return Batch(np.stack(sequences), np.stack(regions), np.asarray(source, np.uint8), number)


def step_time(length: int) -> float:
    """Time that a training step takes for a row of `length` tokens, in no unit."""
    return length * (1 + length / EVEN_LENGTH)
