"""Which of the expected values a prediction contains: RULER's two text metrics, a stricter form of each, averages.

In: predictions and references as text. Out: shares in [0, 1] of one sample, scores in [0, 100] of many, and RULER's
averages over tasks and lengths. Knows no task and no model.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f]")


def normalise(prediction: str) -> str:
    """RULER's clean-up of a prediction: strip, control characters to newlines, strip."""
    return CONTROL_CHARACTERS.sub("\n", prediction.strip()).strip()


def matched_share(prediction: str, references: Sequence[str]) -> float:
    """`string_match_all` of one sample: share of the references found in the prediction, ignoring case.

    Raises:
        ValueError: no references, or an empty one.
    """
    return _mean(_matches(prediction, references))


def matched_any(prediction: str, references: Sequence[str]) -> float:
    """`string_match_part` of one sample: 1 if any reference is found in the prediction, ignoring case, else 0.

    Raises:
        ValueError: no references, or an empty one.
    """
    return float(any(_matches(prediction, references)))


def whole_share(prediction: str, references: Sequence[str]) -> float:
    """As `matched_share`, but a reference with a letter or digit directly next to it does not count: no 123 in 1123.

    Raises:
        ValueError: no references, or an empty one.
    """
    return _mean(_whole_matches(prediction, references))


def whole_any(prediction: str, references: Sequence[str]) -> float:
    """As `matched_any`, but a reference with a letter or digit directly next to it does not count.

    Raises:
        ValueError: no references, or an empty one.
    """
    return float(any(_whole_matches(prediction, references)))


def score(
    metric: str, predictions: Sequence[str], references: Sequence[Sequence[str]], *, whole: bool = False
) -> float:
    """RULER's score of a task: 100 times the mean over samples. RULER rounds it to two places; this does not.

    Args:
        metric: "all" (`string_match_all`) or "part" (`string_match_part`), as the task says.
        references: of each prediction.
        whole: count whole words only, which RULER does not.

    Raises:
        ValueError: an unknown metric, no predictions, or not as many predictions as lists of references.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {list(METRICS)}, got {metric!r}")
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"predictions must be as many as lists of references and at least one, "
            f"got {len(predictions)} and {len(references)}"
        )
    of_one = (WHOLE_METRICS if whole else METRICS)[metric]
    return 100 * _mean([of_one(*pair) for pair in zip(predictions, references, strict=True)])


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
    """Averages of scores by length and task.

    Raises:
        ValueError: no scores, or not the same tasks at every length.
    """
    if not scores or not all(scores.values()):
        raise ValueError(f"scores must hold at least one task at every length, got {dict(scores)}")
    tasks = [sorted(by_task) for by_task in scores.values()]
    if any(names != tasks[0] for names in tasks):
        raise ValueError(
            f"scores must be of the same tasks at every length, got {dict(zip(scores, tasks, strict=True))}"
        )
    by_length = {length: _mean(list(scores[length].values())) for length in sorted(scores)}
    values = list(by_length.values())
    weights = range(1, len(values) + 1)
    rising = sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)
    falling = sum(weight * value for weight, value in zip(reversed(weights), values, strict=True)) / sum(weights)
    return Averages(by_length, _mean(values), rising, falling)


def _matches(prediction: str, references: Sequence[str]) -> list[bool]:
    _check(references)
    text = normalise(prediction).lower()
    return [reference.lower() in text for reference in references]


def _whole_matches(prediction: str, references: Sequence[str]) -> list[bool]:
    _check(references)
    text = normalise(prediction).lower()
    whole = (rf"(?<![^\W_]){re.escape(reference.lower())}(?![^\W_])" for reference in references)
    return [re.search(pattern, text) is not None for pattern in whole]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _check(references: Sequence[str]) -> None:
    if isinstance(references, str) or not references or not all(references):
        raise ValueError(f"references must hold at least one string and no empty one, got {references!r}")


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {"all": matched_share, "part": matched_any}
WHOLE_METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {"all": whole_share, "part": whole_any}
