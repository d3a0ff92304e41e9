"""Which of the expected values a prediction contains: RULER's text metric, and a stricter one."""

import re
from collections.abc import Sequence

CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f]")


def normalise(prediction: str) -> str:
    """RULER's clean-up of a prediction: strip, control characters to newlines, strip."""
    return CONTROL_CHARACTERS.sub("\n", prediction.strip()).strip()


def matched_share(prediction: str, references: Sequence[str]) -> float:
    """`string_match_all` of one sample: share of the references found in the prediction, ignoring case.

    Raises:
        ValueError: no references.
    """
    _check(references)
    text = normalise(prediction).lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def whole_share(prediction: str, references: Sequence[str]) -> float:
    """As `matched_share`, but a reference with a letter or digit directly next to it does not count: no 123 in 1123.

    Raises:
        ValueError: no references.
    """
    _check(references)
    text = normalise(prediction).lower()
    whole = (rf"(?<![^\W_]){re.escape(reference.lower())}(?![^\W_])" for reference in references)
    return sum(re.search(pattern, text) is not None for pattern in whole) / len(references)


def _check(references: Sequence[str]) -> None:
    if not references:
        raise ValueError("references must hold at least one string, got none")
