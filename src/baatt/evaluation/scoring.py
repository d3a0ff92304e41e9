"""RULER's text metrics: which of the expected values a prediction contains."""

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
    if not references:
        raise ValueError("references must hold at least one string, got none")
    text = normalise(prediction).lower()
    return sum(reference.lower() in text for reference in references) / len(references)
