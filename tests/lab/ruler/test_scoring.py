"""RULER's metrics, the stricter ones and the averages on fixed strings and published numbers."""

import pytest

from baatt.lab.ruler.scoring import averages, matched_any, matched_share, normalise, whole_any, whole_share


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


def test_part_is_the_best_reference():
    """The maximum over references, not their share."""
    assert matched_any("It was Normandy.", ["France", "in normandy", "normandy"]) == 1
    assert matched_any("Denmark", ["France", "Normandy"]) == 0
    assert matched_any("artful", ["art"]) == 1
    assert whole_any("artful", ["art"]) == 0
    assert whole_any("artful art.", ["x", "art"]) == 1


@pytest.mark.parametrize("share", [matched_share, matched_any, whole_share, whole_any])
@pytest.mark.parametrize("references", [[], [""], ["a", ""], "abc"])
def test_no_references_is_an_error(share, references):
    with pytest.raises(ValueError, match="references must hold at least one string and no empty one"):
        share("text", references)


@pytest.mark.parametrize(
    ("scores", "mean", "rising", "falling"),
    [
        ((96.7, 96.6, 96.4, 96.0, 95.4, 95.1), 96.0, 95.7, 96.3),
        ((96.2, 96.1, 95.1, 93.0, 78.8, 23.7), 80.5, 70.6, 90.4),
        ((95.5, 93.8, 91.6, 87.4, 84.7, 77.0), 88.3, 85.4, 91.3),
    ],
)
def test_averages_are_those_of_rulers_table(scores, mean, rising, falling):
    """Three rows of its README (Jamba-1.5-large, Mistral-Large, Llama3.1-8B), 4K to 128K, in any order."""
    lengths = [4096, 8192, 16384, 32768, 65536, 131072]
    table = {length: {"vt": value + 1, "cwe": value - 1} for length, value in zip(lengths, scores, strict=True)}
    found = averages(dict(reversed(table.items())))
    assert list(found.by_length) == lengths
    assert tuple(found.by_length.values()) == pytest.approx(scores)
    assert (round(found.mean, 1), round(found.rising, 1), round(found.falling, 1)) == (mean, rising, falling)


def test_averages_of_one_length():
    assert averages({4096: {"a": 10.0, "b": 30.0}})[1:] == (20, 20, 20)


@pytest.mark.parametrize("scores", [{}, {4096: {}}, {4096: {"a": 1.0}, 8192: {"b": 1.0}}, {4: {"a": 1.0}, 8: {}}])
def test_averages_of_different_tasks_are_refused(scores):
    with pytest.raises(ValueError, match="at every length, got"):
        averages(scores)
