"""Requests as the harness's tasks write them, and what is left of a row of tokens."""

from pathlib import Path

import pytest

from baatt.assets import shipped_model
from baatt.lab.lm_eval.arguments import Generation, Sampling, read_generation
from baatt.lab.prompts import answer_text, end_tokens
from baatt.models.checkpoint import load_tokenizer

SAMPLING = Sampling(gen_length=96)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # ruler
        ({"do_sample": False, "temperature": 0.0, "max_gen_toks": 128, "until": []}, Generation(128, (), 0.0)),
        # longbench, whose temperature of 1 means nothing
        ({"max_gen_toks": 32, "temperature": 1, "do_sample": False, "until": []}, Generation(32, (), 0.0)),
        ({"max_gen_toks": 64, "temperature": 1, "do_sample": False, "until": ["\n"]}, Generation(64, ("\n",), 0.0)),
        ({"until": "Q:"}, Generation(96, ("Q:",), 0.0)),
        ({"until": ["", "a", "b"], "max_new_tokens": 5}, Generation(5, ("a", "b"), 0.0)),
        ({"max_gen_toks": 7, "max_tokens": 9, "until": None}, Generation(7, (), 0.0)),
        ({"temperature": 0.7}, Generation(96, (), 0.7)),
        ({"temperature": 0.7, "do_sample": True, "top_p": 1, "top_k": 0}, Generation(96, (), 0.7)),
        ({"do_sample": False, "temperature": None, "top_p": 0.9}, Generation(96, (), 0.0)),
    ],
)
def test_reads_tasks(options, expected):
    assert read_generation(options, SAMPLING) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_gen_toks": 0}, "max_gen_toks must be positive, got 0"),
        ({"temperature": -1}, r"temperature must be finite and at least 0, got -1\.0"),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 5}, "must not have top_p, top_k, which the sampler does not know"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        read_generation(options, SAMPLING)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = load_tokenizer(Path(shipped_model()))
    tokenizer.add_special_tokens(["<|eot_id|>", "<|im_end|>"])
    return tokenizer


def test_where_an_answer_ends(tokenizer):
    end, turn = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|eot_id|>")
    ends = end_tokens(tokenizer, 0, {"eos_token": "<|eot_id|>", "bos_token": "<|mask|>"})
    assert ends == {0, end, turn}
    assert end_tokens(tokenizer, None, {"eos_token": "no such token"}) == {turn}
    words = tokenizer.encode(" one two").ids
    assert answer_text(tokenizer, [*words, turn, *words], ends) == " one two"
    assert answer_text(tokenizer, [*words, end, *words], ends) == " one two"
    assert answer_text(tokenizer, [turn, *words], ends) == ""
    assert answer_text(tokenizer, words, ends) == " one two"


def test_stops(tokenizer):
    ids = tokenizer.encode("first\nsecond\n\nthird").ids
    ends = frozenset([0])
    assert answer_text(tokenizer, ids, ends, ("\n\n",)) == "first\nsecond"
    assert answer_text(tokenizer, ids, ends, ("third", "\n")) == "first"


def test_a_special_token_as_a_stop(tokenizer):
    """Special tokens have no text in an answer; one that a task names as a stop still ends it."""
    turn = tokenizer.token_to_id("<|im_end|>")
    ids = [*tokenizer.encode("one").ids, turn, *tokenizer.encode(" two").ids]
    assert answer_text(tokenizer, ids, frozenset(), ()) == "one two"
    assert answer_text(tokenizer, ids, frozenset(), ("<|im_end|>",)) == "one"
