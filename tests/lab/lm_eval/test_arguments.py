"""Model arguments of the harness: what they mean, what is refused, how long answers and steps become."""

import json
from dataclasses import dataclass, field, make_dataclass

import pytest

from baatt.config import BAAttConfig, Policy
from baatt.lab.lm_eval.arguments import ModelArguments, Sampling
from baatt.lab.options import read_options


def read(values):
    return read_options(ModelArguments, values)


def test_defaults_are_dense():
    arguments = read({"pretrained": "folder"})
    assert arguments == ModelArguments(pretrained="folder")
    assert (arguments.sparse, arguments.policy, arguments.truncation, arguments.mc_num) == (None, Policy(), "left", 128)


def test_everything_at_once():
    values = {
        "pretrained": "folder", "dtype": "bfloat16", "device": "cpu", "batch_size": 4, "max_length": 16000,
        "truncation": "middle", "mc_num": 32, "is_check_greedy": True, "save_dir": "answers", "impl": "reference",
        "gen_length": 64, "block_length": 64, "steps": 64, "threshold": 0.9, "cfg_scale": 0.5, "cache": "dual",
        "remasking": "low_confidence", "seed": 7, "sparsity": 0.7, "block_size": 64, "sort": "qk", "segment": 1024,
        "score": "covariance", "beta": 1, "dense_layers": "0+1+-1", "dense_steps": 0.2, "min_length": 2048,
        "min_queries": 512,
    }  # fmt: skip
    arguments = read(values)
    assert arguments.sparse == BAAttConfig(64, 0.7, "qk", 1024, "covariance", beta=1)
    assert arguments.policy == Policy(dense_layers=(0, 1, -1), dense_steps=0.2, min_length=2048, min_queries=512)
    assert arguments.sampling == Sampling(64, 64, 64, threshold=0.9, cfg_scale=0.5, cache="dual", seed=7)
    stored = json.loads(json.dumps(arguments.settings()))
    assert (stored["sparse"]["sparsity"], stored["policy"]["dense_layers"]) == (0.7, [0, 1, -1])
    assert stored["sampling"]["threshold"] == 0.9
    assert not {"save_dir", "device"} & set(stored)


@pytest.mark.parametrize(
    ("value", "layers"),
    [
        ("0", (0,)),
        ("0,1", (0, 1)),
        (0, (0,)),
        (-1, (-1,)),
        ("0+-1", (0, -1)),
        ([0, 1], (0, 1)),
        ((2,), (2,)),
        ("none", ()),
    ],
)
def test_layers(value, layers):
    values = {"pretrained": "folder", "sparsity": 0.5, "dense_layers": value}
    assert read(values).policy.dense_layers == layers


def test_whole_segment_and_absent_values():
    arguments = read_options(
        ModelArguments, {"pretrained": "folder", "sparsity": 0, "segment": "whole", "threshold": None}
    )
    assert arguments.sparse == BAAttConfig(sparsity=0, segment=None)
    assert read({"pretrained": 2024}).pretrained == "2024"  # the harness reads digits as a number


@pytest.mark.parametrize(
    ("tokens", "sampling", "length", "steps"),
    [
        (30, Sampling(), 32, 32),  # one step per token
        (32, Sampling(), 32, 32),
        (50, Sampling(block_length=64), 64, 64),
        (120, Sampling(), 128, 128),
        (128, Sampling(gen_length=64, block_length=64, steps=32), 128, 64),  # its share: half a step per token
        (30, Sampling(gen_length=256, steps=64), 32, 8),
        (30, Sampling(gen_length=256, steps=4), 32, 1),  # never fewer than one per block
        (100, Sampling(gen_length=32, steps=5), 128, 20),  # rounded up to whole steps per block
        (64, Sampling(gen_length=32, block_length=8, steps=1000), 64, 64),  # never more than tokens
    ],
)
def test_lengths_and_steps(tokens, sampling, length, steps):
    config = sampling.config(tokens)
    assert (config.gen_length, config.steps) == (length, steps)


def test_repetitions_have_other_seeds():
    sampling = Sampling(seed=5)
    assert [sampling.config(32, temperature=0.5, repeat=repeat).seed for repeat in range(2)] == [5, 6]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (
            {"trust_remote_code": True},
            ValueError,
            r"must be among pretrained, .*min_queries, .*; got trust_remote_code",
        ),
        ({"pretrained": None}, ValueError, "must have pretrained, got none"),
        ({"beta": 0.5}, ValueError, "must have sparsity beside beta, got none"),
        ({"dense_layers": 0}, ValueError, "must have sparsity beside dense_layers, got none"),
        ({"sparsity": 1}, ValueError, r"sparsity must be in \[0, 1\), got 1"),
        (
            {"sparsity": 0.5, "dense_layers": "0;1"},
            ValueError,
            "dense_layers must be numbers of layers .*'0;1'",
        ),
        ({"dtype": "int8"}, ValueError, "dtype must be one of .*, got 'int8'"),
        ({"truncation": "right"}, ValueError, r"truncation must be one of \['left', 'middle'\], got 'right'"),
        ({"batch_size": "auto"}, ValueError, "batch_size must be a whole number, got 'auto'"),
        ({"mc_num": 0}, ValueError, "mc_num must be positive, got 0"),
        ({"max_length": 0}, ValueError, "max_length must be positive, got 0"),
        ({"is_check_greedy": 1}, TypeError, "is_check_greedy must be a bool, got 1"),
        ({"steps": 0}, ValueError, "steps must be positive, got 0"),
        ({"block_length": 32.5}, TypeError, "block_length must be an int, got 32.5"),
        ({"threshold": 2}, ValueError, r"threshold must be in \[0, 1\], got 2"),
        ({"cache": "all"}, ValueError, "cache must be one of"),
    ],
)
def test_refused(values, error, message):
    with pytest.raises(error, match=message):
        read({"pretrained": "folder"} | values)


def test_a_new_field_of_the_config_is_an_argument():
    @dataclass(frozen=True)
    class Extended(BAAttConfig):
        representatives: int = 16

    Arguments = make_dataclass(
        "Arguments", [("sparse", Extended | None, field(default=None, metadata={"needs": "sparsity"}))],
        bases=(ModelArguments,), frozen=True,
    )  # fmt: skip
    found = read_options(Arguments, {"pretrained": "folder", "sparsity": 0.7, "representatives": 4})
    assert found.sparse == Extended(sparsity=0.7, representatives=4)
    assert found.settings()["sparse"]["representatives"] == 4
