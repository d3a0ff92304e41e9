"""Builds the training text and the held-out text from free documentation packages of Debian.

The packages are fetched with `apt-get download` (or read from a folder, `--debs`), unpacked with `dpkg-deb` and
reduced to plain English prose: one paragraph per line, a blank line between documents. `heldout.txt` holds whole
documents of the public-domain SQLite documentation; no paragraph of it occurs in `train.txt`. `sources.json` records
versions, licences and sizes. The same packages always give the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from prose import (
    clean,
    html_paragraphs,
    is_prose,
    is_running_prose,
    pod_paragraphs,
    vim_paragraphs,
    word_runs,
)

HELDOUT_PACKAGE = "sqlite3-doc"
HELDOUT_BYTES = 400_000
HELDOUT_DOCUMENT_BYTES = 3_000
HELDOUT_PROSE_SHARE = 0.55
HELDOUT_PARAGRAPH_BYTES = 260
SOURCES: tuple[tuple[str, str, Callable[[str], list[str]], str], ...] = (  # package, documents, reader, licence stanza
    ("anarchism", "usr/share/doc/anarchism/html/*.html", html_paragraphs, "*"),
    ("debian-handbook", "usr/share/doc/debian-handbook/html/en-US/*.html", html_paragraphs, "*"),
    ("perl-doc", "usr/share/perl/*/**/*.pod", pod_paragraphs, "*"),
    ("sqlite3-doc", "usr/share/doc/sqlite3/**/*.html", html_paragraphs, "*"),
    ("vim-doc", "usr/share/doc/vim/html/*.html", vim_paragraphs, "runtime/doc/*"),
)


def run(*command: str, folder: Path | None = None) -> str:
    if shutil.which(command[0]) is None:
        sys.exit(f"{command[0]} is not installed: run this on a Debian system, or pass --debs with dpkg-deb installed")
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed: {result.stderr.strip()}")
    return result.stdout


def find_deb(package: str, folder: Path) -> Path:
    found = sorted(folder.glob(f"{package}_*.deb"))
    if len(found) != 1:
        sys.exit(f"expected one {package}_*.deb in {folder}, found {len(found)}")
    return found[0]


def licence_of(copyright_file: Path, files: str) -> dict[str, str]:
    """Of a machine-readable copyright file: the stanza that covers `files` and the start of its licence text."""
    stanzas = copyright_file.read_text(encoding="utf-8").split("\n\n")
    stanza = next(text.strip() for text in stanzas if text.lstrip().startswith(f"Files: {files}\n"))
    name = re.findall(r"^License: (.*)", stanza, re.MULTILINE)[0]
    statement = next(
        text.strip() for text in stanzas if text.lstrip().startswith(f"License: {name.split(' or ')[0]}\n")
    )
    return {"licence": name, "stanza": stanza, "statement": statement[:900] + " [...]" * (len(statement) > 900)}


def read_documents(root: Path, pattern: str, reader: Callable[[str], list[str]]) -> dict[str, list[str]]:
    """Clean paragraphs by document path."""
    documents = {}
    for path in sorted(root.glob(pattern)):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            text = path.read_text(encoding="latin-1")
        paragraphs = [clean(paragraph) for paragraph in reader(text)]
        documents[str(path.relative_to(root))] = [paragraph for paragraph in paragraphs if is_prose(paragraph)]
    if not documents:
        sys.exit(f"the unpacked package in {root} holds no {pattern}")
    return documents


def choose_heldout(documents: dict[str, list[str]]) -> dict[str, list[str]]:
    """Prose-dense documents with long paragraphs, in the order of the hash of their path, up to the wanted size."""
    chosen: dict[str, list[str]] = {}
    size = 0
    for path in sorted(documents, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        running = [text for text in documents[path] if is_running_prose(text)]
        length, total = sum(map(len, running)), sum(map(len, documents[path]))
        dense = length >= HELDOUT_PROSE_SHARE * total and length >= HELDOUT_PARAGRAPH_BYTES * len(running)
        if dense and length >= HELDOUT_DOCUMENT_BYTES and size < HELDOUT_BYTES:
            chosen[path] = running
            size += length
    return chosen


def join_documents(documents: Iterable[list[str]], excluded: set[str] | None = None) -> list[str]:
    """Documents as text, each paragraph once over all of them, none that shares a word run with `excluded`."""
    seen: set[str] = set()
    result = []
    for paragraphs in documents:
        fresh = []
        for text in paragraphs:
            key = " ".join(re.findall(r"[a-z0-9]+", text.lower()))
            if key not in seen and (excluded is None or excluded.isdisjoint(word_runs(text))):
                seen.add(key)
                fresh.append(text)
        if fresh:
            result.append("\n".join(fresh))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("training/data"))
    parser.add_argument("--debs", type=Path, help="folder of .deb files to use instead of downloading")
    parser.add_argument("--assets", type=Path, help="folder that also gets heldout.txt")
    arguments = parser.parse_args()
    records: list[dict[str, object]] = []
    documents: dict[str, dict[str, list[str]]] = {}
    with tempfile.TemporaryDirectory() as work:
        folder = arguments.debs or Path(work)
        for package, pattern, reader, stanza in SOURCES:
            if arguments.debs is None:
                run("apt-get", "download", package, folder=folder)
            deb, root = find_deb(package, folder), Path(work) / "unpacked" / package
            root.mkdir(parents=True)
            run("dpkg-deb", "-x", str(deb), str(root))
            version = run("dpkg-deb", "-f", str(deb), "Version").strip()
            licence = licence_of(root / f"usr/share/doc/{package}/copyright", stanza)
            records.append({"package": package, "version": version} | licence)
            documents[package] = read_documents(root, pattern, reader)
    chosen = choose_heldout(documents[HELDOUT_PACKAGE])
    heldout = join_documents(chosen.values())
    documents[HELDOUT_PACKAGE] = {path: text for path, text in documents[HELDOUT_PACKAGE].items() if path not in chosen}
    reserved = set().union(*(word_runs(line) for text in heldout for line in text.splitlines()))
    train = []
    for record in records:
        texts = join_documents(documents[str(record["package"])].values(), reserved)
        record |= {"train_documents": len(texts), "train_bytes": sum(len(text.encode()) for text in texts)}
        if record["package"] == HELDOUT_PACKAGE:
            record |= {"heldout_documents": list(chosen), "heldout_bytes": sum(map(len, heldout))}
        train += texts
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, texts in (("train", train), ("heldout", heldout)):
        path = arguments.out / f"{name}.txt"
        path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
        print(f"{path}: {path.stat().st_size} bytes, {len(texts)} documents")
    (arguments.out / "sources.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    if arguments.assets is not None:
        arguments.assets.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(arguments.out / "heldout.txt", arguments.assets / "heldout.txt")


if __name__ == "__main__":
    main()
