"""Which of the expected values a prediction contains: RULER's two text metrics, a stricter form of each, averages.

In: predictions and references as text; no references, or an empty one, is a ValueError. Out: shares in [0, 1] of one
sample, and RULER's averages of scores over tasks and lengths. Knows no task and no model.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from operator import mul
from statistics import fmean
from typing import NamedTuple

CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f]")


def normalise(prediction: str) -> str:
    """RULER's clean-up of a prediction: strip, control characters to newlines, strip."""
    return CONTROL_CHARACTERS.sub("\n", prediction.strip()).strip()


def matched_share(prediction: str, references: Sequence[str]) -> float:
    """`string_match_all` of one sample: share of the references found in the prediction, ignoring case."""
    return fmean(_found(prediction, references, whole=False))


def matched_any(prediction: str, references: Sequence[str]) -> float:
    """`string_match_part` of one sample: 1 if any reference is found in the prediction, ignoring case, else 0."""
    return float(any(_found(prediction, references, whole=False)))


def whole_share(prediction: str, references: Sequence[str]) -> float:
    """As `matched_share`, but a reference with a letter or digit directly next to it does not count: no 123 in 1123."""
    return fmean(_found(prediction, references, whole=True))


def whole_any(prediction: str, references: Sequence[str]) -> float:
    """As `matched_any`, but a reference with a letter or digit directly next to it does not count."""
    return float(any(_found(prediction, references, whole=True)))


class Averages(NamedTuple):
    """RULER's averages. by_length: plain mean over tasks; mean: plain over lengths; rising, falling: wAvg (inc), (dec).

    The weights rise or fall linearly with the rank of the length, 1 to the number of lengths, as RULER's published
    table has them; not with the length itself.
    """

    by_length: dict[int, float]
    mean: float
    rising: float
    falling: float


def averages(scores: Mapping[int, Mapping[str, float]]) -> Averages:
    """Averages of scores by length and task, of the same tasks at every length (ValueError)."""
    if not scores or not all(scores.values()):
        raise ValueError(f"scores must hold at least one task at every length, got {dict(scores)}")
    tasks = {length: sorted(by_task) for length, by_task in scores.items()}
    if any(names != next(iter(tasks.values())) for names in tasks.values()):
        raise ValueError(f"scores must be of the same tasks at every length, got {tasks}")
    by_length = {length: sum(scores[length].values()) / len(scores[length]) for length in sorted(scores)}
    values = list(by_length.values())
    weights = range(1, len(values) + 1)
    rising, falling = (sum(map(mul, order, values)) / sum(weights) for order in (weights, reversed(weights)))
    return Averages(by_length, sum(values) / len(values), rising, falling)


def _found(prediction: str, references: Sequence[str], *, whole: bool) -> list[bool]:
    if isinstance(references, str) or not references or not all(references):
        raise ValueError(f"references must hold at least one string and no empty one, got {references!r}")
    text, pattern = normalise(prediction).lower(), r"(?<![^\W_]){}(?![^\W_])" if whole else "{}"
    return [re.search(pattern.format(re.escape(reference.lower())), text) is not None for reference in references]


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {"all": matched_share, "part": matched_any}
WHOLE_METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {"all": whole_share, "part": whole_any}
