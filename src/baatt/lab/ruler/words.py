"""Word lists for keys and for common words: those of `assets/words.json` by split, or the installed wonderwords.

Out: a `WordPool` of nouns, adjectives and verbs. RULER draws from the package wonderwords; the shipped lists are its
words of lower-case letters without its profanity list, in a part for training and a part held out. Knows no task.
"""

import functools
import json
from importlib import import_module
from importlib.resources import files
from typing import NamedTuple

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
    """The pool of one split.

    Args:
        split: "train" or "heldout", whose words are disjoint; "full", both together; or "wonderwords", the lists as
            the installed package has them, which is what RULER uses: phrases and capitals too.

    Raises:
        ValueError: an unknown split, or "wonderwords" without the package.
    """
    if split not in POOLS:
        raise ValueError(f"split must be one of {list(POOLS)}, got {split!r}")
    return POOLS[split](split)


def _shipped(split: str) -> WordPool:
    words = json.loads(files("baatt.assets").joinpath("words.json").read_text(encoding="utf-8"))[split]
    return WordPool(tuple(words["nouns"]), tuple(words["adjectives"]), tuple(words["verbs"]))


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
