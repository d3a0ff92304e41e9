"""Trains the byte-level BPE tokenizer of the small diffusion LM.

Vocabulary 4096 with `<|endoftext|>` (0) and `<|mask|>` (1). Every digit is a token of its own, and a space before a
digit too, so a number has the same tokens wherever it stands. The training text is `train.txt` plus a share of RULER
needles and questions with training words, so that the needle vocabulary is short. Deterministic given the inputs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 4096
SPECIAL_TOKENS = ["<|endoftext|>", "<|mask|>"]
SYNTHETIC_SHARE = 0.07
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
QUESTION_MANY = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind}s afterwards.\n{context}\n"
    "What are all the special magic {kind}s for {query} mentioned in the provided text? "
    "The special magic {kind}s for {query} mentioned in the provided text are {answer}"
)
QUESTION_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text? "
    "The special magic {kind} for {query} mentioned in the provided text is {answer}"
)
Words = dict[str, list[str]]


def random_key(words: Words, generator: random.Random) -> str:
    return f"{generator.choice(words['adjectives'])}-{generator.choice(words['nouns'])}"


def random_uuid(generator: random.Random) -> str:
    return str(uuid.UUID(int=generator.getrandbits(128), version=4))


def random_value(kind: str, generator: random.Random) -> str:
    return random_uuid(generator) if kind == "uuid" else str(generator.randint(10**6, 10**7 - 1))


def synthetic_sample(words: Words, generator: random.Random) -> str:
    """A short RULER prompt with its answer: needles among noise lines."""
    kind = generator.choices(("number", "uuid"), weights=(3, 1))[0]
    make_key = random_uuid if kind == "uuid" and generator.random() < 0.5 else lambda _: random_key(words, generator)
    pairs = [(make_key(generator), random_value(kind, generator)) for _ in range(8)]
    lines = [NEEDLE.format(kind=kind, key=key, value=value) for key, value in pairs] + [NOISE] * 2
    generator.shuffle(lines)
    template, asked = generator.choice(((QUESTION_ONE, pairs[:1]), (QUESTION_MANY, pairs[:4])))
    keys, answers = [key for key, _ in asked], ", ".join(value for _, value in asked)
    query = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]
    return template.format(kind=kind, context="\n".join(lines), query=query, answer=answers)


def training_texts(text: str, words: Words, generator: random.Random) -> Iterator[str]:
    yield from text.split("\n\n")
    remaining = SYNTHETIC_SHARE * len(text)
    while remaining > 0:
        sample = synthetic_sample(words, generator)
        remaining -= len(sample)
        yield sample


def build_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def check(tokenizer: Tokenizer) -> None:
    """Digits are single tokens in every context, and decoding inverts encoding."""
    digits = [tokenizer.token_to_id(digit) for digit in "1234567"]
    for prefix in ("", " ", "magic ", "is: ", "x", "(", "\n", "  ", "a-", "9, "):
        ids = tokenizer.encode(f"{prefix}1234567.").ids
        if ids[-8:-1] != digits or ids[:-8] != tokenizer.encode(prefix).ids:
            sys.exit(f"the digits after {prefix!r} are not seven tokens that stand apart: {ids}")
    for text in ("a\n\n b\t c  \n", "naïve café € 東京 🙂", " leading and trailing ", "12 34\n5", NOISE):
        if tokenizer.decode(tokenizer.encode(text).ids) != text:
            sys.exit(f"decoding does not invert encoding for {text!r}")
    if [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] != [0, 1]:
        sys.exit("the special tokens do not have the ids 0 and 1")


def span(counts: list[int]) -> str:
    return f"mean {statistics.mean(counts):.2f}, range {min(counts)}-{max(counts)}"


def report(tokenizer: Tokenizer, words: dict[str, Words], heldout: str, generator: random.Random) -> None:
    def count(text: str) -> int:
        return len(tokenizer.encode(text).ids)

    print(f"vocabulary: {tokenizer.get_vocab_size()}")
    for split, lists in words.items():
        for kind in ("number", "uuid"):
            needles = [
                NEEDLE.format(kind=kind, key=random_key(lists, generator), value=random_value(kind, generator))
                for _ in range(1000)
            ]
            print(f"tokens per needle, {kind}, {split} words: {span([count(needle) for needle in needles])}")
        print(f"tokens per noun (after a hyphen), {split}: {span([count(noun) for noun in lists['nouns']])}")
        print(f"tokens per adjective (after a space), {split}: {span([count(' ' + a) for a in lists['adjectives']])}")
    print(f"tokens per uuid: {span([count(random_uuid(generator)) for _ in range(1000)])}")
    print(f"characters per token on heldout.txt: {len(heldout) / count(heldout):.3f}")


def read(path: Path, script: str) -> str:
    if not path.is_file():
        sys.exit(f"{path} is missing: run training/{script} first")
    return path.read_text(encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("training/data"), help="folder of train.txt and heldout.txt")
    parser.add_argument("--assets", type=Path, default=Path("src/baatt/assets"), help="folder of words.json")
    arguments = parser.parse_args()
    lists = json.loads(read(arguments.assets / "words.json", "words.py"))
    text = read(arguments.data / "train.txt", "corpus.py")
    heldout = read(arguments.data / "heldout.txt", "corpus.py")
    generator = random.Random(0)
    tokenizer = build_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(text, lists["train"], generator), trainer)
    check(tokenizer)
    tokenizer.save(str(arguments.data / "tokenizer.json"))
    report(tokenizer, {split: lists[split] for split in ("train", "heldout")}, heldout, generator)


if __name__ == "__main__":
    main()
