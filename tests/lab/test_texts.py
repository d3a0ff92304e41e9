"""Texts of users: the same characters from a file, standard input and an argument, or one line that says which byte."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from baatt.cli.main import main
from baatt.config import Policy
from baatt.lab.chat import load_chat_templates
from baatt.lab.ruler.sources import read_essay, read_word_list
from baatt.lab.texts import decode_text, read_text
from baatt.models.checkpoint import read_json

MARK = b"\xef\xbb\xbf"


@pytest.fixture(params=["file", "standard input"])
def give(request, tmp_path, monkeypatch):
    """Bytes as a file or as standard input -> the path that names them."""

    def write(data: bytes) -> Path:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))
        (tmp_path / "text.txt").write_bytes(data)
        return tmp_path / "text.txt" if request.param == "file" else Path("-")

    return write


@pytest.mark.parametrize(
    "text", ["", "one\r\ntwo\n\rthree\r", "caf\u00e9 \u4e2d \U0001f600", "\ufeff twice", "in\ufeffside"]
)
@pytest.mark.parametrize("mark", [b"", MARK])
def test_characters_are_kept(give, text, mark):
    if text.startswith("\ufeff"):
        mark = MARK
    assert read_text(give(mark + text.encode())) == decode_text(mark + text.encode(), "--prompt") == text


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"abc\xff", "0xff at place 3"),
        (MARK + b"abc\xe9 x", "0xe9 at place 6"),
        (b"\xff\xfea", "0xff at place 0"),
        (b"ab\xc3", "0xc3 at place 2"),
    ],
)
def test_bytes_that_are_not_utf_8(give, data, found, request):
    path = give(data)
    name = "standard input" if str(path) == "-" else str(path)
    with pytest.raises(ValueError, match="must hold UTF-8 text") as error:
        read_text(path)
    assert str(error.value) == f"{name} must hold UTF-8 text, got byte {found}"


def test_commands_read_alike(give, tmp_path, capsys):
    """Prompts of files, standard input and arguments give the same tokens, or one line."""
    short = ["--gen-length", "8", "--block-length", "8", "--steps", "1", "--json"]
    path, text = give(MARK + b"The grass\r\nis green."), "The grass\r\nis green."
    assert main(["generate", "--prompt-file", str(path), *short]) == 0
    assert main(["generate", "--prompt", text, *short]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["prompt_tokens"] == second["prompt_tokens"]
    assert first["generated_tokens"] == second["generated_tokens"]
    for argv in (
        ["generate", "--prompt-file"],
        ["analyze", "capture", "--output", str(tmp_path / "x"), "--prompt-file"],
        ["evaluate", "fidelity", "--json", str(tmp_path / "y.json"), "--text"],
    ):
        assert main([*argv, str(give(b"abc\xff"))]) == 2
        assert capsys.readouterr().err.endswith("must hold UTF-8 text, got byte 0xff at place 3\n")
    assert main(["generate", "--prompt", "abc\udcff"]) == 2
    assert capsys.readouterr().err == "baatt: --prompt must hold UTF-8 text, got byte 0xff at place 3\n"


def test_other_files_with_a_mark(tmp_path):
    """JSON, templates and word lists, as some editors write them."""

    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_bytes(MARK + text.encode())
        return tmp_path / name

    assert read_json(write("config.json", '{"a": 1}')) == {"a": 1}
    assert Policy.load(write("policy.json", '{"min_length": 9}')) == Policy(min_length=9)
    write("chat_template.jinja", "C")
    assert load_chat_templates(tmp_path).source() == "C"
    assert read_essay(write("essay.txt", "one two")) == ("one", "two")
    assert read_word_list(write("words.json", '["b", "a"]')) == ("a", "b")
    with pytest.raises(
        ValueError, match=r"policy\.json must hold the JSON of Policy\.save, got maximum recursion depth"
    ):
        Policy.load(write("policy.json", "[" * 100_000))
    (tmp_path / "config.json").write_bytes(b"\xff{}")
    with pytest.raises(ValueError, match=r"config\.json: must hold JSON: .* byte 0xff in position 0"):
        read_json(tmp_path / "config.json")
