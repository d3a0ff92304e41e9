"""RULER's metric on fixed strings."""

import pytest

from baatt.evaluation.scoring import matched_share, normalise


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("  plain \n", "plain"),
        ("a\x00b\x1fc", "a\nb\nc"),
        ("a\tb", "a\nb"),
        ("\x01 text \x02", "text"),
        ("a\x20b\x7fc", "a b\x7fc"),
        ("", ""),
    ],
)
def test_normalise(prediction, expected):
    assert normalise(prediction) == expected


def test_share_counts_the_references_found():
    assert matched_share(" 123, 456, and 789.", ["123", "456", "789"]) == 1
    assert matched_share(" 123, and 789.", ["123", "456", "789", "000"]) == 0.5
    assert matched_share("", ["123"]) == 0


def test_case_is_ignored_on_both_sides():
    assert matched_share("Answer: ABCD-ef", ["abcd-EF"]) == 1


def test_a_reference_may_be_part_of_a_word():
    assert matched_share("91234567.", ["1234567"]) == 1


def test_a_control_character_splits_a_reference():
    assert matched_share("123\x004567", ["1234567"]) == 0


def test_no_references_is_an_error():
    with pytest.raises(ValueError, match="references must hold at least one string"):
        matched_share("text", [])
