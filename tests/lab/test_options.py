"""The one reader of options: from fields to argparse, from flat dicts and from texts, and what it refuses."""

import argparse
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from baatt.config import BAAttConfig, Policy
from baatt.lab.options import (
    add_options,
    chosen,
    given,
    options_of,
    read_dials,
    read_options,
    read_value,
    variants,
)
from baatt.sampling import SamplerConfig


@dataclass(frozen=True)
class Extended(BAAttConfig):
    """A config of next year.

    Args:
        delegates: tokens that stand for a block, 100 % of them real.
        ballot: who shares the kept blocks.
    """

    delegates: int = 16
    ballot: str = field(default="row", metadata={"choices": {"row": 1, "head": 2}})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.delegates < 1:
            raise ValueError(f"delegates must be positive, got {self.delegates}")


@dataclass(frozen=True)
class Arguments:
    """What a harness hands over."""

    pretrained: str
    folder: Path | None = None
    check: bool = False
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    sparse: Extended | None = field(default=None, metadata={"needs": "sparsity"})
    policy: Policy = field(default_factory=Policy, metadata={"needs": "sparsity"})


def parse(argv, cls, **keywords):
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser.add_argument_group("group"), cls, **keywords)
    return parser.parse_args(argv)


@pytest.mark.parametrize("cls", [BAAttConfig, Policy, SamplerConfig, Extended])
def test_every_field_is_an_option_with_help(cls):
    options = options_of(cls)
    from_file = {"layer_sparsity"}  # a profile of layers is a file: `Policy.load`
    assert list(options) == [one.name for one in dataclasses.fields(cls) if one.name not in from_file]
    assert all(option.help for option in options.values())


def test_nothing_given_leaves_the_base():
    arguments = parse([], BAAttConfig)
    assert given(arguments, BAAttConfig) == {}
    base = BAAttConfig.preset("paper")
    assert chosen(arguments, base) == base


def test_what_was_given_changes_the_base():
    argv = ["--sort", "q", "--segment", "whole", "--block-size", "64", "--beta", "1", "--sparsity=0.75"]
    expected = BAAttConfig(block_size=64, sparsity=0.75, sort="q", segment=None, beta=1.0)
    assert chosen(parse(argv, BAAttConfig), BAAttConfig()) == expected
    argv = ["--dense-layers", "0,-1", "--min-length", "2048", "--no-recover-padding"]
    expected = Policy(dense_layers=(0, -1), min_length=2048, recover_padding=False)
    assert chosen(parse(argv, Policy, defaults=Policy()), Policy()) == expected


def test_a_new_field_is_an_option_everywhere():
    argv = ["--delegates", "4", "--ballot", "head", "--sort", "k"]
    arguments = parse(argv, Extended)
    assert chosen(arguments, Extended()) == Extended(delegates=4, ballot="head", sort="k")
    assert given(arguments, BAAttConfig) == {}  # another class has other options
    assert read_options(Arguments, {"pretrained": "x", "sparsity": 0.5, "delegates": 4}).sparse == Extended(delegates=4)
    assert read_dials(["delegates=4,8"], Extended) == {"delegates": [4, 8]}
    with pytest.raises(ValueError, match=r"^--delegates must be positive, got 0"):
        chosen(parse(["--delegates", "0"], Extended), Extended())


def test_several_values_make_every_combination():
    many = {"sparsity": None, "sort": ["k", "q"]}
    arguments = parse(["--sparsity", "0.5,0.9,0.5", "--sort", "none,qk"], BAAttConfig, many=many)
    assert given(arguments, BAAttConfig) == {"sparsity": [0.5, 0.9], "sort": ["none", "qk"]}
    assert given(parse([], BAAttConfig, many=many), BAAttConfig) == {"sort": ["k", "q"]}
    found = variants(BAAttConfig(), given(arguments, BAAttConfig))
    assert [(one.sparsity, one.sort) for one in found] == [(0.5, "none"), (0.5, "qk"), (0.9, "none"), (0.9, "qk")]
    assert read_dials(["dense_layers=none,0,0+1", "dense_steps=0.5"], Policy) == {
        "dense_layers": [(), (0,), (0, 1)], "dense_steps": [0.5],
    }  # fmt: skip


def test_help_is_the_docstring_with_choices_and_defaults(capsys):
    parser = argparse.ArgumentParser(prog="x")
    add_options(parser, Extended, only=("sort", "segment", "delegates"), defaults=Extended(segment=None))
    text = " ".join(parser.format_help().split())
    assert "--sort {none,q,k,qk} which side is sorted by norm (E2)" in text
    assert "--segment N|whole tokens per sorting segment" in text
    assert "(default: whole)" in text
    assert "--delegates N tokens that stand for a block, 100 % of them real (default: 16)" in text
    assert "--beta" not in text


@pytest.mark.parametrize(
    ("cls", "name", "text", "value"),
    [
        (BAAttConfig, "segment", "whole", None),
        (BAAttConfig, "segment", "512", 512),
        (BAAttConfig, "sparsity", "0.5", 0.5),
        (BAAttConfig, "sparsity", 0, 0),
        (SamplerConfig, "threshold", "none", None),
        (SamplerConfig, "threshold", "0.9", 0.9),
        (SamplerConfig, "cache", "none", "none"),
        (SamplerConfig, "stop_at_eos", "True", True),
        *((Policy, "dense_layers", text, (0, 1)) for text in ("0,1", "0+1", [0, 1], (0.0, 1))),
        *((Policy, "dense_layers", text, (-1,)) for text in ("-1", -1, -1.0)),
        (Policy, "dense_layers", "none", ()),
        (Arguments, "pretrained", 2024, "2024"),
        (Arguments, "folder", "a/b", Path("a/b")),
    ],
)
def test_values(cls, name, text, value):
    assert read_value(cls, name, text) == value
    spelled = options_of(cls)[name].spell(value)
    assert read_value(cls, name, spelled) == value


@pytest.mark.parametrize(
    ("cls", "argv", "message"),
    [
        (BAAttConfig, ["--sort", "up"], r"--sort: must be one of \['none', 'q', 'k', 'qk'\], got 'up'"),
        (BAAttConfig, ["--segment", "none"], "--segment: must be a whole number, or \"whole\", got 'none'"),
        (BAAttConfig, ["--segment", "100"], "--segment must be a positive multiple of block_size=128, got 100"),
        (BAAttConfig, ["--sparsity", "much"], "--sparsity: must be a number, got 'much'"),
        (BAAttConfig, ["--sparsity", "1"], r"^--sparsity must be in \[0, 1\), got 1.0"),
        (BAAttConfig, ["--block-size", "24"], r"--block-size: must be one of \[16, .*\], got '24'"),
        (Policy, ["--dense-layers", "first"], "--dense-layers: must be numbers of layers such as .*, got 'first'"),
        (Policy, ["--dense-steps", "2"], r"^--dense-steps must be in \[0, 1\], got 2.0"),
        (SamplerConfig, ["--gen-length", "10"], "^--block-length must divide gen_length=10"),
    ],
)
def test_refused_options(cls, argv, message):
    with pytest.raises((argparse.ArgumentError, ValueError), match=message):
        chosen(parse(argv, cls), cls())


def test_flat_dicts():
    assert read_options(Arguments, {"pretrained": "x"}) == Arguments("x")
    values = {
        "pretrained": "x", "check": True, "folder": None, "gen_length": "64", "block_length": 64, "steps": 64,
        "sparsity": 0.7, "segment": "whole", "dense_layers": "0+-1", "min_length": 10,
    }  # fmt: skip
    assert read_options(Arguments, values) == Arguments(
        "x", check=True, sampler=SamplerConfig(64, 64, 64), sparse=Extended(sparsity=0.7, segment=None),
        policy=Policy(dense_layers=(0, -1), min_length=10),
    )  # fmt: skip
    assert read_options(Arguments, {"pretrained": "x", "sparsity": "none"}).sparse is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "model_args must have pretrained, got none"),
        ({"pretrained": ""}, "model_args must have pretrained, got none"),
        (
            {"pretrained": "x", "denselayers": 0},
            "must be among pretrained, .*; got denselayers .did you mean dense_lay",
        ),
        ({"pretrained": "x", "sparse": 0.5}, "must be among .*; got sparse"),
        ({"pretrained": "x", "beta": 1}, "must have sparsity beside beta, got none"),
        (
            {"pretrained": "x", "dense_layers": 0, "sparsity": "none"},
            "must have sparsity beside dense_layers, got none",
        ),
        ({"pretrained": "x", "sparsity": 2}, r"^sparsity must be in \[0, 1\), got 2"),
        ({"pretrained": "x", "sparsity": 0.5, "segment": "none"}, '^segment must be a whole number, or "whole", got'),
        ({"pretrained": "x", "steps": "many"}, "^steps must be a whole number, got 'many'"),
        ({"pretrained": "x", "cache": "all"}, "^cache must be one of .*, got 'all'"),
        ({"pretrained": "x", "check": "maybe"}, "^check must be true or false, got 'maybe'"),
    ],
)
def test_refused_flat_dicts(values, message):
    with pytest.raises(ValueError, match=message):
        read_options(Arguments, values)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["beta"], "^--dial must be NAME=VALUE,... once for each of block_size, .*, got 'beta'"),
        (["beta=0", "beta=1"], "^--dial must be NAME=VALUE,... once"),
        (["bta=1"], "^--dial must be among block_size, .*; got bta .did you mean beta"),
        (["beta=x"], "^--dial beta must be a number, got 'x'"),
        (["score=best"], "^--dial score must be one of .*, got 'best'"),
    ],
)
def test_refused_dials(texts, message):
    with pytest.raises(ValueError, match=message):
        read_dials(texts, BAAttConfig)
