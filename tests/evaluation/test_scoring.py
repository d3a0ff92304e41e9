"""RULER's metric and the stricter one on fixed strings."""

import pytest

from baatt.evaluation.scoring import matched_share, normalise, whole_share


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


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("123", 1),
        (" 123.", 1),
        ("is: 123, and", 1),
        ("(123)", 1),
        ("_123_", 1),
        ("1123.", 0),
        (" 1234.", 0),
        ("x123", 0),
        ("123x", 0),
        ("é123", 0),
        ("1123, 123", 1),
        ("12 3", 0),
        ("", 0),
    ],
)
def test_a_whole_value_has_no_letter_or_digit_next_to_it(prediction, expected):
    assert whole_share(prediction, ["123"]) == expected


def test_whole_values_are_counted_like_parts():
    assert whole_share(" 123, 4567, and 789.", ["123", "456", "789", "000"]) == 0.5
    assert whole_share("ABC-1.5", ["abc-1.5"]) == 1
    assert whole_share("abc-1x5", ["abc-1.5"]) == 0
    assert whole_share("aabc-1", ["abc-1"]) == 0
    assert whole_share("123\x00456", ["123", "456"]) == 1


@pytest.mark.parametrize("share", [matched_share, whole_share])
def test_no_references_is_an_error(share):
    with pytest.raises(ValueError, match="references must hold at least one string"):
        share("text", [])
