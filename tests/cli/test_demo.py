"""The demo: which model answers, which document it reads, what is called right, and what is refused."""

import re
import shutil
from pathlib import Path

import pytest

from baatt.assets import shipped_model
from baatt.cli.main import main
from baatt.lab import smollm2
from baatt.lab.reading import held_out_document
from baatt.lab.ruler.tasks import draw_samples
from baatt.models import MaskedDiffusionLM, ModelConfig
from baatt.models.checkpoint import load_tokenizer


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A tiny random model without one, for 512 tokens."""
    folder = tmp_path / "plain"
    config = ModelConfig(
        d_model=64, n_heads=2, n_layers=3, mlp_hidden_size=64, vocab_size=4096, mask_token_id=1, max_sequence_length=512
    )
    MaskedDiffusionLM(config).save_pretrained(folder)
    shutil.copy(shipped_model() / "tokenizer.json", folder)
    return folder


def row(printed: str, name: str) -> str:
    return next(line for line in printed.splitlines() if re.search(rf"\b{name}\b", line))


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "demo.png"
    assert main(["demo", "--length", "640", "--seed", "3", "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "One of the special magic numbers",
        "Question",
        "Setting",
        "full attention",
        "paper: BA-Att",
        "default:",
        "seconds per step",
        "skipped",
    ):
        assert expected in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_demo_of_the_paper_s_setting_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["demo", "--length", "640", "--preset", "paper", "--output", str(tmp_path / "demo.png")]
    assert main(call) == 0
    printed = capsys.readouterr().out
    assert printed.count("Setting") == 1
    assert "default:" not in printed


@pytest.mark.parametrize(("before", "verdict"), [(" ", "yes"), ("1", "no")])
def test_demo_calls_a_longer_number_wrong_and_warns_beyond_the_trained_length(
    before: str, verdict: str, plain: Path, picture: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    value = draw_samples("niah_single_2", 640, 1, load_tokenizer(shipped_model()), seed=1)[0].values[0]
    monkeypatch.setattr("baatt.cli.demo.answer_text", lambda *_: f"{before}{value}.")
    monkeypatch.setattr("baatt.cli.demo.draw", lambda *_: None)
    assert main(["demo", "--model", str(plain), "--task", "niah_single_2", "--length", "640", *picture]) == 0
    printed = capsys.readouterr().out
    assert "trained up to 512 tokens" in printed
    assert re.findall(r"\b(yes|no)\b", row(printed, "right")) == [verdict] * 3


@pytest.fixture
def picture(tmp_path: Path) -> list[str]:
    """The option of the picture."""
    return ["--output", str(tmp_path / "demo.png")]


def test_a_model_that_chats_is_asked_about_a_real_text(
    chatting: Path, picture: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--model", str(chatting), "--length", "1500", *picture]) == 0
    printed = capsys.readouterr().out
    document, facts = held_out_document(load_tokenizer(chatting), 1000, 1)
    assert facts[0].statement in document
    folded = " ".join(printed.split())
    assert f"Question {facts[0].question}" in folded
    assert facts[0].statement in folded
    assert f"Expected: {facts[0].answer}" in folded
    tokens = re.search(r"held-out text with 8 statements planted in it, (\d+) tokens", folded)
    assert tokens is not None
    assert 1200 < int(tokens[1]) <= 1500 - 64
    for name in ("right", "seconds per pass", "pass speed-up"):
        assert name in folded
    assert re.findall(r"\b50\.0%", folded)
    assert Path(picture[1]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("before", "verdict"), [(" ", "yes"), ("1", "no")])
def test_the_planted_value_says_what_is_right(
    before: str, verdict: str, chatting: Path, picture: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    fact = held_out_document(load_tokenizer(chatting), 1000, 1)[1][0]
    monkeypatch.setattr("baatt.cli.demo.answer_text", lambda *_: f"It is{before}{fact.value}.")
    monkeypatch.setattr("baatt.cli.demo.draw", lambda *_: None)
    assert main(["demo", "--model", str(chatting), "--length", "1000", *picture]) == 0
    assert re.findall(r"\b(yes|no)\b", row(capsys.readouterr().out, "right")) == [verdict] * 3


def test_a_document_of_one_s_own_has_no_right_answer(
    chatting: Path, picture: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("baatt.cli.demo.answer_text", lambda *_: "[/b] [red]trees")
    file = tmp_path / "letter.txt"
    file.write_text("The [bold]first[/bold] line.\nThe second line is about trees. " + 40 * "And so on it went. ")
    call = ["demo", "--model", str(chatting), "--document", str(file), "--question", "What is [it] about?"]
    assert main([*call, *picture]) == 0
    printed = capsys.readouterr().out
    assert "Document letter.txt, " in printed
    assert "Question What is [it] about?" in printed
    assert "The [bold]first[/bold] line. The second line is about trees." in " ".join(printed.split())
    assert printed.count("[/b] [red]trees") == 3
    assert not re.search(r"\bright\b|Expected", printed)


def test_smollm2_answers_where_it_was_fetched_and_needle_18m_where_not(
    cache: Path, chatting: Path, picture: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baatt.cli.demo.draw", lambda *_: None)
    assert main(["demo", "--length", "640", *picture]) == 0
    printed = capsys.readouterr().out
    first = "smollm2 is not here yet: run `baatt fetch smollm2` (98 MB, once); needle-18m answers in its place"
    assert printed.splitlines()[0] == first
    assert "Model    needle-18m, 17.8 million parameters" in printed
    monkeypatch.setattr(smollm2, "kept_merged", lambda: chatting)
    assert main(["demo", "--length", "1000", *picture]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Model    model, ")
    assert "held-out text" in printed
    assert main(["demo", "--length", "640", "--task", "niah_single_1", *picture]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Model    needle-18m")
    assert "niah_single_1" in printed


def test_a_model_that_chats_may_be_given_a_needle_task(
    chatting: Path, picture: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["demo", "--model", str(chatting), "--length", "3000", "--task", "niah_single_2", *picture]
    assert main(call) == 0
    printed = capsys.readouterr().out
    assert "Document niah_single_2" in printed
    assert "seconds per step" in printed


@pytest.mark.parametrize(
    ("argv", "pattern"),
    [
        (("--document", "F"), "--document and --question must come together"),
        (("--question", "why?"), "--document and --question must come together"),
        (("--document", "F", "--question", "why?"), "smollm2 is not here yet: run `baatt fetch smollm2`"),
        (("--document", "F", "--question", "why?", "--model", "needle"), "--document needs a model with a chat templ"),
        (("--document", "F", "--question", " ", "--model", "CHAT"), "--question must not be empty"),
        (("--document", "EMPTY", "--question", "a", "--model", "CHAT"), "--document must not be empty"),
        (("--document", "/nowhere", "--question", "a", "--model", "CHAT"), "/nowhere cannot be read: No such file"),
        (("--document", "F", "--question", "a", "--length", "4K"), "--length must come without --document, which is"),
        (("--document", "F", "--question", "a", "--task", "niah_single_1"), "--task must come without --document"),
        (("--document", "F", "--question", "a", "--seed", "0"), "--seed must come without --document"),
        (("--document", "F", "--question", "a", "--video"), "--video must come without --document"),
        (("--length", "100", "--model", "CHAT"), "--length 100 leaves -?\\d+ tokens for a document, whose tokens must"),
        (("--length", "1M", "--model", "CHAT"), "tokens must be at most 52112 of the text shipped with baatt, got"),
        (("--steps", "3"), "--steps must come with --video"),
    ],
)
def test_wrong_calls(
    argv: tuple[str, ...], pattern: str, chatting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"F": tmp_path / "text.txt", "EMPTY": tmp_path / "empty.txt"}
    files["F"].write_text("A text.")
    files["EMPTY"].write_text("\n")
    named = {name: str(file) for name, file in files.items()} | {"CHAT": str(chatting)}
    assert main(["demo", *(named.get(word, word) for word in argv)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert re.search(pattern, captured.err)
