"""Sources: word lists by split, essays of several forms, sentence rules, and what is refused."""

import json
import pickle
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from baatt.lab.ruler import sources as room
from baatt.lab.ruler.sources import (
    Sources,
    WordPool,
    heldout_words,
    load_words,
    read_essay,
    read_word_list,
    split_sentences,
)
from baatt.lab.ruler.tasks import OFFLINE_TASKS, TASKS, check_sources, draw


def test_word_lists():
    sizes = {split: [len(words) for words in load_words(split)] for split in ("train", "heldout", "full")}
    assert sizes == {"train": [5662, 769, 879], "heldout": [1006, 131, 158], "full": [6668, 900, 1037]}
    full = load_words("full")
    assert all(list(words) == sorted(set(words)) for words in full)
    assert set(full.all) == {*load_words("train").all, *load_words("heldout").all}
    assert len(full.all) == 8039
    assert WordPool(("b", "a"), ("b",), ("c",)).all == ("a", "b", "c")


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"split must be one of .*'wonderwords'.*, got 'test'"):
        load_words("test")
    with pytest.raises(ValueError, match=r"words must be one of .*, got 'test'"):
        Sources(words="test")
    with pytest.raises(ValueError, match=r"sentences must be one of .*, got 'nltk'"):
        Sources(sentences="nltk")


def test_the_installed_package(tmp_path, monkeypatch):
    for name, text in zip(room.WORD_FILES, ("ox\nTV\ncontact lens\nox\n\n", "nasty \nbig", "go"), strict=True):
        (tmp_path / name).write_text(text)
    package, assets = ModuleType("wonderwords"), ModuleType("wonderwords.assets")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "wonderwords", package)
    monkeypatch.setitem(sys.modules, "wonderwords.assets", assets)
    monkeypatch.setattr(room, "files", lambda found: tmp_path if found is assets else None)
    load_words.cache_clear()
    assert load_words("wonderwords") == WordPool(("TV", "contact lens", "ox"), ("big", "nasty"), ("go",))
    load_words.cache_clear()
    monkeypatch.setitem(sys.modules, "wonderwords.assets", None)
    with pytest.raises(ValueError, match=r"needs the package wonderwords: pip install baatt\[ruler\]"):
        load_words("wonderwords")


def test_heldout_words_then_all_then_those_given(tmp_path):
    path = tmp_path / "words.json"
    path.write_text(json.dumps([f"w{number}" for number in range(9000)]))
    sizes = [len(words) for words in Sources(english_words=path).word_lists()]
    assert sizes == [1207, 8039, 9000]
    assert [len(words) for words in Sources(words="train", english_words=path).word_lists()] == [6832, 9000]
    path = tmp_path / "few.json"
    path.write_text('["a", "b"]')
    assert [len(words) for words in Sources(words="full", english_words=path).word_lists()] == [8039]


def test_word_files(tmp_path):
    path = tmp_path / "words.json"
    for number, found in enumerate(({"0": "b", "1": "a", "2": "b"}, ["b", "a"])):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(found))
        assert read_word_list(path) == ("a", "b")
    for number, (text, message) in enumerate(
        (("[", "must be JSON, got"), ("[1]", "list or object"), ("{}", "list or"))
    ):
        path = tmp_path / f"bad{number}.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_word_list(path)
    with pytest.raises(ValueError, match=r"must be RULER's json/english_words.json, got .*which does not exist"):
        read_word_list(tmp_path / "none.json")


def test_essays(tmp_path):
    (tmp_path / "b.txt").write_text("three\n\n four")
    (tmp_path / "a.txt").write_text("one\ttwo")
    (tmp_path / "notes.md").write_text("no")
    (tmp_path / "essays.json").write_text(json.dumps({"text": "five  six\n"}))
    assert read_essay(tmp_path) == ("one", "two", "three", "four")
    assert read_essay(tmp_path / "b.txt") == ("three", "four")
    assert read_essay(tmp_path / "essays.json") == ("five", "six")
    assert Sources(essay=str(tmp_path)).essay_words() == ("one", "two", "three", "four")
    assert Sources().essay_words() == heldout_words()
    assert len(heldout_words()) == 70498


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b" \n", "essay must hold words, got none in"),
        ("latin.txt", b"caf\xe9", "essay must be UTF-8 text or JSON, got .*latin.txt"),
        ("list.json", b"[]", r'JSON of the form {"text": "..."}, got another'),
        ("cut.json", b"{", "essay must be UTF-8 text or JSON"),
    ],
)
def test_bad_essays(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_essay(tmp_path / name)


def test_missing_essays(tmp_path):
    with pytest.raises(ValueError, match=r"a folder with \.txt files, got none in"):
        read_essay(tmp_path)
    with pytest.raises(ValueError, match="which does not exist"):
        check_sources(["niah_single_2"], Sources(essay=tmp_path / "nothing"))


def contexts(sources, count=4):
    samples = (draw(TASKS["niah_single_2"], 2000, number, len, sources=sources) for number in range(count))
    return [sample.prompt.split("\n")[1] for sample in samples]


def test_a_given_essay_starts_at_its_first_word(tmp_path):
    """As in RULER; the project's own text starts anywhere, so that samples differ in more than the needle."""
    path = tmp_path / "essay.txt"
    path.write_text(" ".join(f"Word{number}." for number in range(1000)))
    given = contexts(Sources(essay=path))
    assert all("Word0. Word1." in text or "Word0. One" in text for text in given)
    assert sum("Word0." in text for text in contexts(Sources(essay=path, random_place=True))) < 4
    start = " ".join(heldout_words()[:3])
    assert not any(start in text for text in contexts(Sources()))
    assert all(start in text for text in contexts(Sources(random_place=False)))


def test_a_short_essay_is_repeated(tmp_path):
    path = tmp_path / "essay.txt"
    path.write_text("Start here. Stop there.")
    for text in contexts(Sources(essay=path)):
        assert text.count("Start here.") > 40


def test_sentences(monkeypatch):
    assert split_sentences("Mr. X said: no! Why?  Well.\nYes.No") == ["Mr.", "X said: no!", "Why?", "Well.", "Yes.No"]
    monkeypatch.setattr(room, "import_module", lambda name: SimpleNamespace(sent_tokenize=lambda text: [name, text]))
    assert room.punkt_sentences("A. B.") == ["nltk.tokenize", "A. B."]
    assert "nltk.tokenize" in draw(TASKS["niah_single_2"], 900, 0, len, sources=Sources(sentences="punkt")).prompt


@pytest.mark.parametrize("error", [ImportError("nltk"), LookupError("punkt_tab")])
def test_punkt_that_is_not_installed(monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr(room, "import_module", fail)
    with pytest.raises(ValueError, match=r"pip install baatt\[ruler\]; python -m nltk.downloader punkt_tab"):
        check_sources(["niah_single_2"], Sources(sentences="punkt"))


def test_sources_are_small_and_go_to_workers():
    sources = Sources(squad="a/b.json")
    assert sources.squad == Path("a/b.json")
    assert pickle.loads(pickle.dumps(sources)) == sources
    assert len(pickle.dumps(sources)) < 1000
    check_sources(OFFLINE_TASKS, Sources())
