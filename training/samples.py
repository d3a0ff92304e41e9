"""Training sequences as token arrays: bare pairs, needle documents with many questions, RULER's own tasks.

In: a stage of the curriculum. Out: `Batch` of token ids and of regions, which say what each token may be masked as.
Runs in worker processes on the CPU; masking itself happens on the GPU in `train.py`. Uses the same task code as the
evaluation, with the training split of words and text.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from baatt.evaluation.ruler import niah
from baatt.evaluation.ruler.words import WordPool, load_words

CONTEXT, TEXT, TAIL, FIRST_ANSWER = 0, 1, 2, 3  # regions; answer number n of a sequence is FIRST_ANSWER + n
MAX_ANSWERS = 48
NEEDLE_SPAN = re.compile(r"One of the special magic \w+ for \S+ is: \S+\.")
SOURCES = ("pairs", "document", *niah.NIAH_TASKS)
TOKENS_PER_BATCH = 65536


class Batch(NamedTuple):
    """tokens [B, T] int16, regions [B, T] uint8, source [B] uint8 (index into SOURCES), stage: its number."""

    tokens: np.ndarray
    regions: np.ndarray
    source: np.ndarray
    stage: int


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum: which sequences of which length, how many candidates they hold at most, and how
    often a question asks for several values at once. The next stage begins once exact match reaches `target`, or after
    `patience` seconds."""

    kind: str
    lengths: tuple[int, ...]
    candidates: int
    rows: int | None = None
    joint: float = 0.0
    target: float = 0.9
    patience: float = 90.0


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
    Stage("ruler", (1024, 2048, 3072, 3584, 4096, 4096, 4096), 64, joint=0.3),
)
# Seven digits of a single needle are learned at once; the others need the practice, the two weakest most of it.
TASK_WEIGHTS = {"niah_single_1": 1, "niah_single_2": 1, "niah_single_3": 8, "niah_multivalue": 5}
TASK_WEIGHT = 3

Pieces = list[tuple[str, int]]


class SampleMaker:
    """Draws sequences with one random generator; holds the tokenizer, words, text and running size estimates."""

    def __init__(self, data: Path, seed: int) -> None:
        self.random = Random(seed)
        self.tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
        self.end = self.tokenizer.token_to_id("<|endoftext|>")
        self.words: WordPool = load_words("train")
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
        context = niah.HAYSTACKS[haystack](task, sentences, size, random, self.words, essay)
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

    def ruler(self, length: int) -> tuple[Pieces, str]:
        """One of RULER's tasks as it stands, a single question."""
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
        if self.unit not in self.tokens_per_unit:
            task = niah.NeedleTask("", haystack, key_type, value_type)
            context = niah.HAYSTACKS[haystack](task, [], 200, self.random, self.words, self.essay(200))
            self.tokens_per_unit[self.unit] = self.count(context) / 200
        return max(1, int(tokens * self.shrink / self.tokens_per_unit[self.unit]))

    def draw(self, stage: Stage, length: int) -> tuple[Pieces, str]:
        """Pieces of one sequence of a stage."""
        if stage.kind == "pairs":
            return self.pairs(length, stage.candidates)
        if stage.kind == "sentences":
            return self.document(length, stage.candidates, ("needle",))
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
        padded = np.full(length, self.end, np.int16)
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

    def batch(self, number: int) -> Batch:
        """One batch of stage `number`."""
        stage = CURRICULUM[number]
        length = self.random.choice(stage.lengths)
        rows = stage.rows or TOKENS_PER_BATCH // length
        drawn = [self.sequence(stage, length) for _ in range(rows)]
        tokens, regions, source = zip(*drawn, strict=True)
        return Batch(np.stack(tokens), np.stack(regions), np.asarray(source, np.uint8), number)
