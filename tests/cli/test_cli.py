"""The command line as a stranger uses it: right calls, wrong calls, one line on stderr and exit code 2."""

import importlib
import json
import re
import runpy
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch

import baatt
from baatt.assets import shipped_model
from baatt.cli.generate import EXAMPLE
from baatt.cli.main import VERBS, build_parser, main
from baatt.cli.options import read_configs, read_preset
from baatt.config import PRESETS, BAAttConfig, Policy, Preset
from baatt.integrations.handle import NoSparseAttentionWarning
from baatt.lab.ruler.tasks import OFFLINE_TASKS, draw_samples, is_asked
from baatt.models import MaskedDiffusionLM, ModelConfig
from baatt.models.checkpoint import load_tokenizer
from tests.processes import run_module

SHORT = ["--gen-length", "8", "--block-length", "8", "--steps", "4"]


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line a refused call prints."""
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("baatt: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_the_prompt_in_the_help_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--gen-length", "16", "--block-length", "16"]
    with pytest.warns(NoSparseAttentionWarning, match="the budget keeps every key block"):
        assert main(["generate", "--prompt", EXAMPLE, *short]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == "4821973."
    assert "--dense is faster" not in printed.err  # nothing was chosen
    assert main(["generate", "--prompt", EXAMPLE, *short, "--block-size", "16"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == "4821973."
    assert "--dense is faster" in printed.err


@pytest.mark.parametrize("prompt", ["Most SQL database engines are", "What is 2 + 2?", "Hello", "def f(x):"])
def test_the_shipped_model_says_what_it_has_learnt(prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    for options in ([], ["--dense"]):
        message = refused(capsys, "generate", "--prompt", prompt, *options)
        assert "must ask one of RULER's questions about a text, all that the needle model has learnt" in message
        assert "--model DIR" in message


@pytest.mark.parametrize("task", OFFLINE_TASKS)
def test_questions_of_every_task_are_known(task: str) -> None:
    sample = draw_samples(task, 2048, 1, load_tokenizer(shipped_model()))[0]
    assert is_asked(sample.prompt + sample.answer_prefix)


def test_generate_prints_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\nThe grass is green. The sky is blue.\nOne of the special magic numbers for "
        "calm-river is: 4821973.\nThe sun is yellow. Here we go.\nWhat is the special magic number for calm-river "
        "mentioned in the provided text? The special magic number for calm-river mentioned in the provided text is"
    )
    assert main(["generate", "--prompt", prompt, "--gen-length", "16", "--block-length", "16", "--steps", "16"]) == 0
    assert capsys.readouterr().out.strip() == "4821973."


def test_generate_json_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("The grass is green.")
    assert main(["generate", "--prompt-file", str(path), "--json", "--sparsity", "0.75", "--sort", "k", *SHORT]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["sparse"]["sparsity"] == 0.75
    assert record["sparse"]["sort"] == "k"
    assert len(record["generated_tokens"]) == 8
    assert record["model_evaluations"] == 4


def test_a_model_with_a_chat_template_is_asked_through_it(chatting: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(chatting)
    for options, expected in (([], "user: the\n"), (["--chat"], "user: the\n"), (["--no-chat"], "the")):
        call = ["generate", "--model", str(chatting), "--prompt", "the", "--dense", "--json", *options, *SHORT]
        assert main(call) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["prompt_tokens"] == len(tokenizer.encode(expected).ids)
        assert record["chat"] == (options != ["--no-chat"])
        assert record["sampler"]["remasking"] == "left_to_right"  # its head tells the next token
    assert main(["generate", "--model", str(chatting), "--prompt", "a", "--remasking", "low_confidence", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sampler"]["remasking"] == "low_confidence"
    message = refused(capsys, "generate", "--prompt", EXAMPLE, "--chat")
    assert "--chat needs a model whose folder has a chat template, needle-18m has none" in message


def test_dense_and_sparsity_zero_agree(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for options in (["--dense"], ["--sparsity", "0", "--dense-layers", "none"]):
        assert main(["generate", "--prompt", EXAMPLE, *options, *SHORT]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("argv", "pattern"),
    [
        ((), "VERB"),
        (("dance",), "invalid choice: 'dance'"),
        (("generate",), "--prompt"),
        (("generate", "--prompt", "  "), "prompt must not be empty"),
        (("generate", "--prompt-file", "/nowhere/text"), "/nowhere/text cannot be read: No such file"),
        (("generate", "--prompt-file", "/"), "cannot be read: Is a directory"),
        (("generate", "--prompt", "a", "--model", "/nowhere"), "/nowhere"),
        (("generate", "--prompt", "a", "--sparsity", "1"), r"sparsity must be in \[0, 1\), got 1.0"),
        (("generate", "--prompt", "a", "--sparsity", "much"), "--sparsity must be a number, got 'much'"),
        (("generate", "--prompt", "a", "--segment", "100"), "multiple of block_size=128, got 100"),
        (("generate", "--prompt", "a", "--segment", "some"), '--segment must be a whole number, or "whole"'),
        (("generate", "--prompt", "a", "--dense-layers", "first"), "--dense-layers must be numbers of layers"),
        (("generate", "--prompt", "a", "--dense-layers", "9"), "--dense-layers must lie in"),
        (("generate", "--prompt", "a", "--gen-length", "10"), "--block-length must divide gen_length=10"),
        (("generate", "--prompt", "a", "--device", "abacus"), "--device must be a device"),
        (
            ("generate", "--prompt", "a", "--steps", "1000"),
            "--steps must be at most --gen-length, 64 tokens to fill, got 1000",
        ),
        (("generate", "--prompt", "a", "--steps", "9", *SHORT[:4]), "--steps must be at most --gen-length, 8 tokens"),
        (
            ("generate", "--prompt", "a", "--sparsity", "50"),
            r"--sparsity must be in \[0, 1\), got 50.0; a share: 0.5 for 50 %",
        ),
        (("generate", "--prompt", "a", "--sparsity", "-1"), r"--sparsity must be in \[0, 1\), got -1.0$"),
        (("demo", "--device", "mps"), "--device must be one that computes here, got 'mps'"),
        (("generate", "--prompt", "a", "--device", "meta"), "--device must be one that computes here, got 'meta'"),
        (("generate", "--prompt", "a", "--seed", "9" * 30), "--seed must be a number of 64 bits"),
        (("demo", "--seed", "9" * 30), "--seed must be a whole number of 64 bits"),
        (("bench", "--seed", "x"), "--seed must be a whole number, got 'x'"),
        (("bench", "--heads-kv", "x"), "^baatt: --heads-kv must be a whole number, got 'x'"),
        (("evaluate", "fidelity", "--mask-share", "x"), "^baatt: --mask-share must be a number, got 'x'"),
        (("bench", "--shape", ""), "--shape must be BxHxNxD"),
        (("bench", "--draw", "/"), "^baatt: / cannot be used: Is a directory"),
        (("evaluate", "fidelity", "--store", __file__), "--store must lie in a folder that can be written, .* is none"),
        (("evaluate", "ruler", "--store", __file__), "--store must lie in a folder that can be written, .* is none"),
        (
            ("evaluate", "ruler", "--lengths", "999999M", "--tasks", "vt", "--json", "/tmp/x.json"),
            "must fit into memory",
        ),
        (("demo", "--length", "four"), "--length must be positive numbers of tokens such as 4096,8K, got 'four'"),
        (("demo", "--length", "1K,2K"), "--length must be one number of tokens such as 4096 or 4K, got '1K,2K'"),
        (("demo", "--score", "x"), r"--score must be one of .*\(try baatt demo --help\)"),
        (("demo", "--dense-layers", "9"), r"^baatt: --dense-layers must lie in \[-6, 6\)"),
        (("demo", "--length", "10"), "^baatt: --length must hold the smallest"),
        (("analyze", "capture", "--length", "10"), "^baatt: --length must hold the smallest"),
        (("evaluate", "ruler", "--lengths", "10", "--json", "/tmp/x.json"), "^baatt: --lengths must hold the smallest"),
        (("evaluate", "ruler", "--essay", "/nope", "--json", "/tmp/x.json"), "^baatt: --essay must be a file"),
        (("generate", "--prompt", "a", "--gen-length", "-1"), "^baatt: --gen-length must be positive, got -1"),
        (("generate", "--prompt", "a", "--dense", "--sparsity", ".5"), "--dense leaves nothing sparse, got --sparsity"),
        (("fetch", "smollm2", "--out", "a", "--adapter", "/nope"), "^baatt: --adapter must be a file, /nope is none"),
        (("demo", "--length", "10000000000"), "must fit into memory"),
        (("demo", "--task", "hide_and_seek"), "invalid choice: 'hide_and_seek'"),
        (("demo", "--output", "/nowhere/picture.png"), "must lie in an existing folder, /nowhere is none"),
        (("demo", "--output", "picture.txt"), "must end in .png"),
    ],
)
def test_wrong_calls(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], pattern: str) -> None:
    assert re.search(pattern, refused(capsys, *argv))


def test_binary_prompt_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prompt.bin"
    path.write_bytes(b"\xff\xfe\x00\x80")
    assert "UTF-8" in refused(capsys, "generate", "--prompt-file", str(path))


def test_gpu_kernels_are_refused_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "generate", "--prompt", "a", "--dense-layers", "none", "--impl", "triton", *SHORT)
    assert "triton" in message


def test_a_warning_is_one_line_without_code(tmp_path: Path) -> None:
    run = run_module("baatt", "generate", "--prompt", EXAMPLE, *SHORT, "--sparsity", "0.1", folder=tmp_path)
    assert run.returncode == 0, run.stderr
    told = run.stderr.splitlines()
    assert re.match("baatt: MaskedDiffusionLM ran without a single sparse attention call: the budget keeps", told[0])
    assert len(told) == 2  # and the time


def test_model_without_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(d_model=32, n_heads=2, n_layers=1, mlp_hidden_size=32, vocab_size=16, mask_token_id=1)
    MaskedDiffusionLM(config).save_pretrained(tmp_path)
    assert "tokenizer.json" in refused(capsys, "generate", "--prompt", "a", "--model", str(tmp_path))


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "9.8.7+cu999")
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for expected in ("Versions", "torch", torch.__version__, "Devices", "Implementations", "reference"):
        assert expected in printed
    assert f"--model needle: present at {shipped_model()}" in printed
    assert "--model smollm2: MISSING: smollm2 is not here yet: run `baatt fetch smollm2`" in printed


def test_help_says_what_the_verbs_say(capsys: pytest.CaptureFixture[str]) -> None:
    for name, summary in VERBS.items():
        assert importlib.import_module(f"baatt.cli.{name}").__doc__.splitlines()[0] == summary
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert f"usage: baatt {name}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"    {name} " in printed for name in VERBS)


def test_the_package_runs_as_a_module(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["baatt", "--version"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("baatt", run_name="__main__")
    assert not end.value.code
    assert capsys.readouterr().out == f"baatt {baatt.__version__}\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["demo"], ["generate", "--prompt", "a"], ["evaluate", "ruler"], ["bench"],
        *(["analyze", action, "capture.safetensors"] for action in ("recall", "maps", "bound", "layers")),
    ],
)  # fmt: skip
def test_every_verb_has_the_same_defaults(argv: list[str]) -> None:
    arguments = build_parser(argv[0]).parse_args(argv)
    assert arguments.preset == "default"
    config, policy = read_preset(arguments)
    assert replace(config, sparsity=0.5) == BAAttConfig.preset("default") == BAAttConfig()
    assert policy == Policy.preset("default") == Policy()
    arguments = build_parser(argv[0]).parse_args([*argv, "--preset", "paper"])
    assert replace(read_preset(arguments).config, sparsity=0.5) == BAAttConfig.preset("paper")


def test_the_help_of_preset_is_made_from_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert all(f"{name}: " in printed for name in PRESETS)
    assert "paper: BA-Att, qk in 1024" in printed
    assert "safe: 16 clusters, first block kept, unsorted, layers 0 and 1 dense" in printed


def test_a_new_field_of_the_config_is_an_option_of_every_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Extended(BAAttConfig):
        """Args:
        representatives: tokens that stand for a block.
        """

        representatives: int = 16

    presets = {name: Preset(Extended(**asdict(one.config)), one.policy) for name, one in PRESETS.items()}
    monkeypatch.setattr("baatt.cli.options.PRESETS", presets)
    for argv in (["demo"], ["generate", "--prompt", "a"], ["evaluate", "ruler"], ["bench"]):
        arguments = build_parser(argv[0]).parse_args([*argv, "--representatives", "4"])
        assert read_configs(arguments)[0].representatives == 4
