"""The words needles are named with: nouns and adjectives of `assets/words.json`, split by training and held-out."""

import json
from importlib.resources import files
from typing import NamedTuple


class WordPool(NamedTuple):
    """Words a needle key is drawn from."""

    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]


def load_words(split: str) -> WordPool:
    """The pool of one split, "train" or "heldout".

    Raises:
        ValueError: an unknown split.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f'split must be "train" or "heldout", got {split!r}')
    words = json.loads(files("baatt.assets").joinpath("words.json").read_text())[split]
    return WordPool(tuple(words["nouns"]), tuple(words["adjectives"]))


def load_heldout_essay() -> list[str]:
    """Words of running text that the shipped model never saw in training."""
    return files("baatt.assets").joinpath("heldout.txt").read_text().split()
