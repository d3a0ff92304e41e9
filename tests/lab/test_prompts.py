"""What is kept of a prompt that is too long, padding, and where the text of an answer ends."""

import pytest

from baatt.assets import shipped_model
from baatt.lab.prompts import TRUNCATIONS, answer_text, fit_prompt, keep_both_ends, keep_end, pad_left
from baatt.models.checkpoint import load_tokenizer

IDS = list(range(10))


@pytest.mark.parametrize(
    ("function", "limit", "kept"),
    [
        (keep_end, 4, [6, 7, 8, 9]),
        (keep_end, 10, IDS),
        (keep_end, 99, IDS),
        (keep_both_ends, 4, [0, 1, 8, 9]),
        (keep_both_ends, 5, [0, 1, 8, 9]),  # LongBench's pred.py halves and rounds down: int(max_length / 2)
        (keep_both_ends, 9, [0, 1, 2, 3, 6, 7, 8, 9]),
        (keep_both_ends, 10, IDS),
        (keep_both_ends, 99, IDS),
    ],
)
def test_what_is_kept(function, limit, kept):
    assert function(IDS, limit) == kept
    assert function(tuple(IDS), limit) == kept


def test_middle_is_what_longbench_keeps():
    """pred.py: half = int(max_length / 2); prompt[:half] + prompt[-half:]."""
    for limit in range(2, 12):
        half = int(limit / 2)
        assert keep_both_ends(IDS, limit) == (IDS[:half] + IDS[-half:] if len(IDS) > limit else IDS)


@pytest.mark.parametrize("side", list(TRUNCATIONS))
def test_room_for_the_answer(side):
    kept = fit_prompt(range(1000), side, max_length=100, answer_length=32)
    assert len(kept) == 68
    assert kept[-1] == 999
    assert (kept[0] == 0) is (side == "middle")
    assert fit_prompt(range(68), side, max_length=100, answer_length=32) == list(range(68))


def test_refused():
    with pytest.raises(ValueError, match=r"truncation must be one of \['left', 'middle'\], got 'right'"):
        fit_prompt(IDS, "right", max_length=100, answer_length=32)
    assert fit_prompt([], "left", max_length=100, answer_length=100) == []
    with pytest.raises(ValueError, match=r"max_length must leave two tokens .* beside 99 for the answer, got 100"):
        fit_prompt(IDS, "left", max_length=100, answer_length=99)


def test_pad_left():
    ids, mask = pad_left([[5, 6], [7, 8, 9, 10]], 0)
    assert ids.tolist() == [[0, 0, 5, 6], [7, 8, 9, 10]]
    assert mask.tolist() == [[False, False, True, True], [True] * 4]


def test_an_answer_stops_at_the_first_end():
    tokenizer = load_tokenizer(shipped_model())
    tokens = tokenizer.encode(" 123.").ids
    assert answer_text(tokenizer, [*tokens, 0, *tokens], {0}) == " 123."
    assert answer_text(tokenizer, tokens, {0}) == " 123."
    assert answer_text(tokenizer, tokens, {None}) == " 123."
