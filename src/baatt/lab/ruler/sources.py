"""Where the words, the running text and the questions of the tasks come from.

In: names and local paths, held by `Sources`, which is small and goes to worker processes as it is. Out: word pools,
words of an essay, question sets, read once a process. Downloads nothing; what is missing is refused with its origin.

RULER draws words from the package wonderwords; the shipped lists, `assets/words.json`, are its words of lower-case
letters without its profanity list, in a part for training and a part held out.
"""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from baatt.lab.ruler.questions import DATA_SETS, QuestionSet, read_questions
from baatt.lab.texts import read_text

WORD_FILES = ("nounlist.txt", "adjectivelist.txt", "verblist.txt")


class WordPool(NamedTuple):
    """Words a needle key is drawn from (nouns and adjectives) or counted in a list (all three)."""

    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        """Every word once, sorted."""
        return tuple(sorted({*self.nouns, *self.adjectives, *self.verbs}))


@functools.cache
def load_words(split: str) -> WordPool:
    """The pool of one split: "train" or "heldout", whose words are disjoint; "full", both together; or "wonderwords".

    The last are the lists as the installed package has them, which is what RULER uses: phrases and capitals too.
    ValueError: an unknown split, or "wonderwords" without the package.
    """
    if split not in POOLS:
        raise ValueError(f"split must be one of {list(POOLS)}, got {split!r}")
    return POOLS[split](split)


def _shipped(split: str) -> WordPool:
    words = json.loads(files("baatt.assets").joinpath("words.json").read_text(encoding="utf-8"))[split]
    return WordPool(*(tuple(words[kind]) for kind in WordPool._fields))


def _full(split: str) -> WordPool:
    lists = zip(_shipped("train"), _shipped("heldout"), strict=True)
    return WordPool(*(tuple(sorted((*train, *heldout))) for train, heldout in lists))


def _installed(split: str) -> WordPool:
    try:
        assets = import_module("wonderwords.assets")
    except ImportError as error:
        raise ValueError(f"split {split!r} needs the package wonderwords: pip install baatt[ruler]") from error
    texts = (files(assets).joinpath(name).read_text(encoding="utf-8") for name in WORD_FILES)
    lists = ((word.strip() for word in text.splitlines()) for text in texts)
    return WordPool(*(tuple(sorted({word for word in words if word})) for words in lists))


POOLS = {"train": _shipped, "heldout": _shipped, "full": _full, "wonderwords": _installed}
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def split_sentences(text: str) -> list[str]:
    """Cuts after every full stop, question or exclamation mark that white space follows."""
    return SENTENCE_END.split(text)


def punkt_sentences(text: str) -> list[str]:
    """The sentences of nltk's punkt, as in RULER: it knows abbreviations and closing quotes. Needs nltk and data."""
    try:
        return [str(sentence) for sentence in import_module("nltk.tokenize").sent_tokenize(text)]
    except (ImportError, LookupError) as error:
        raise ValueError(
            "sentences='punkt' needs nltk and its data: pip install baatt[ruler]; python -m nltk.downloader punkt_tab"
        ) from error


SENTENCES: dict[str, Callable[[str], list[str]]] = {"regex": split_sentences, "punkt": punkt_sentences}


@dataclass(frozen=True)
class Sources:
    """What the tasks are made of; the defaults are words and text that the shipped model never saw.

    Args:
        words: "heldout" or "train", which share no word, "full", both together, or "wonderwords", the lists of that
            package, as RULER takes them.
        english_words: RULER's `json/english_words.json`, or any JSON list or object of words, for word lists so long
            that `words` runs out (cwe).
        essay: running text: RULER's `PaulGrahamEssays.json` ({"text": ...}), one text file, or a folder whose .txt
            files are taken in order of name. None is the project's own held-out text.
        random_place: start the essay at a random word. False starts every sample at the first word, as RULER does; None
            is False for an essay that is given and True for the project's own.
        sentences: how an essay is cut where needles may stand, "regex" or "punkt" (RULER's, needs nltk).
        squad: SQuAD's `dev-v2.0.json`, needed by qa_1.
        hotpot: HotpotQA's `hotpot_dev_distractor_v1.json`, needed by qa_2.

    An essay shorter than needed is repeated from its first word on, as RULER does.

    Raises:
        ValueError: an unknown name. Files are looked at when they are used, or by `tasks.check_sources`.
    """

    words: str = field(default="heldout", metadata={"choices": POOLS})
    english_words: Path | None = None
    essay: Path | None = None
    random_place: bool | None = None
    sentences: str = field(default="regex", metadata={"choices": SENTENCES})
    squad: Path | None = None
    hotpot: Path | None = None

    def __post_init__(self) -> None:
        for name in ("english_words", "essay", "squad", "hotpot"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, Path(value))
        for name, known in (("words", POOLS), ("sentences", SENTENCES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {list(known)}, got {getattr(self, name)!r}")

    @property
    def pool(self) -> WordPool:
        """The words of the chosen split."""
        return load_words(self.words)

    @property
    def starts_anywhere(self) -> bool:
        """Whether an essay starts at a random word."""
        return self.essay is None if self.random_place is None else self.random_place

    def word_lists(self) -> list[tuple[str, ...]]:
        """Lists to draw common words from, each longer than the one before; the next is for when one runs out.

        Held-out words are followed by all words, then comes `english_words`. Training words are followed by nothing
        else of ours, so training never meets a held-out word.
        """
        splits = ("heldout", "full") if self.words == "heldout" else (self.words,)
        lists = [load_words(split).all for split in splits]
        if self.english_words is not None:
            lists.append(read_word_list(self.english_words))
        return [one for number, one in enumerate(lists) if number == 0 or len(one) > len(lists[number - 1])]

    def essay_words(self) -> tuple[str, ...]:
        """Words of the running text."""
        return heldout_words() if self.essay is None else read_essay(self.essay)

    def questions(self, name: str) -> QuestionSet:
        """The question set "squad" or "hotpot"; ValueError: no path is given, or the file is not what it should be."""
        path: Path | None = getattr(self, name)
        if path is None:
            raise ValueError(f"sources.{name} must be the path of a local copy of {DATA_SETS[name][1]}, got None")
        return read_questions(name, path)


@functools.cache
def heldout_words() -> tuple[str, ...]:
    """Words of running text that the shipped model never saw in training."""
    return tuple(files("baatt.assets").joinpath("heldout.txt").read_text(encoding="utf-8").split())


@functools.cache
def read_essay(path: Path) -> tuple[str, ...]:
    """Words of a text file, of all .txt files of a folder, or of the member "text" of a JSON file (else ValueError)."""
    if not path.exists():
        raise ValueError(f"essay must be a file or a folder of .txt files, got {path}, which does not exist")
    parts = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not parts:
        raise ValueError(f"essay must be a folder with .txt files, got none in {path}")
    try:
        texts = [read_text(part) for part in parts]
        found = json.loads(texts[0]) if parts[0].suffix == ".json" else {"text": "\n".join(texts)}
    except ValueError as error:
        raise ValueError(f"essay must be UTF-8 text or JSON, got {path}: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("text"), str):
        raise ValueError(f'essay must be JSON of the form {{"text": "..."}}, got another in {path}')
    if not (words := tuple(found["text"].split())):
        raise ValueError(f"essay must hold words, got none in {path}")
    return words


@functools.cache
def read_word_list(path: Path) -> tuple[str, ...]:
    """Distinct words of a JSON list, or of the values of a JSON object as RULER's file has them, sorted."""
    if not path.is_file():
        raise ValueError(f"english_words must be RULER's json/english_words.json, got {path}, which does not exist")
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"english_words must be JSON, got {path}: {error}") from error
    words = list(found.values()) if isinstance(found, dict) else found
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise ValueError(f"english_words must be a JSON list or object of words, got another form in {path}")
    return tuple(sorted(set(words)))
