"""Writes the word lists of needle keys and word counting, with a held-out part that training never sees.

The nouns, adjectives and verbs are those of the PyPI package wonderwords, which RULER uses. A word is held out by a
stable hash of the word itself, so a word that is both a noun and a verb is on the same side in both lists. Words of the
package's own profanity list are left out, because the lists are shipped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from importlib import metadata, resources
from pathlib import Path

HELDOUT_PERCENT = 15
VERSION = "3.0.1"
LISTS = {"nouns": "nounlist.txt", "adjectives": "adjectivelist.txt", "verbs": "verblist.txt"}


def is_heldout(word: str) -> bool:
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:8]) % 100 < HELDOUT_PERCENT


def read_words(file_name: str) -> set[str]:
    """Lower-case words of letters only."""
    text = resources.files("wonderwords.assets").joinpath(file_name).read_text(encoding="utf-8")
    return {word for line in text.splitlines() if re.fullmatch(r"[a-z]+", word := line.strip().lower())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("src/baatt/assets/words.json"))
    arguments = parser.parse_args()
    try:
        version = metadata.version("wonderwords")
    except metadata.PackageNotFoundError:
        sys.exit(f"wonderwords is not installed: pip install wonderwords=={VERSION}")
    if version != VERSION:
        sys.exit(
            f"wonderwords {VERSION} is needed for these lists, found {version}: pip install wonderwords=={VERSION}"
        )
    profane = read_words("profanitylist.txt")
    words = {kind: sorted(read_words(file_name) - profane) for kind, file_name in LISTS.items()}
    splits = {
        split: {kind: [word for word in words[kind] if is_heldout(word) == heldout] for kind in LISTS}
        for split, heldout in (("train", False), ("heldout", True))
    }
    source, licence = f"wonderwords {VERSION} (PyPI)", "MIT, Copyright (c) 2020 Maxim Rebguns"
    lines = [f'"source": {json.dumps(source)}', f'"licence": {json.dumps(licence)}']
    for split, lists in splits.items():
        kinds = ",\n".join(
            f"  {json.dumps(kind)}: {json.dumps(values, separators=(',', ':'))}" for kind, values in lists.items()
        )
        lines.append(f"{json.dumps(split)}: {{\n{kinds}\n }}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("{\n " + ",\n ".join(lines) + "\n}\n", encoding="utf-8")
    for split, lists in splits.items():
        print(split, {kind: len(values) for kind, values in lists.items()})


if __name__ == "__main__":
    main()
