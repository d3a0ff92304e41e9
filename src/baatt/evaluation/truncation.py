"""What is kept of a prompt that is longer than the model may see: its end, or its first and last half.

In: token ids and the longest prompt allowed, room for the answer already taken off. Out: at most as many ids. Knows
nothing of texts and tasks; every variant is a function in `TRUNCATIONS`.
"""

from collections.abc import Callable, Sequence


def keep_end(ids: Sequence[int], limit: int) -> list[int]:
    """The last `limit` ids, as lm-evaluation-harness cuts prompts."""
    return list(ids[max(0, len(ids) - limit) :])


def keep_both_ends(ids: Sequence[int], limit: int) -> list[int]:
    """The first and the last limit // 2 ids of a longer prompt, as LongBench's pred.py cuts the middle out."""
    if len(ids) <= limit:
        return list(ids)
    half = limit // 2
    return [*ids[:half], *ids[len(ids) - half :]]


TRUNCATIONS: dict[str, Callable[[Sequence[int], int], list[int]]] = {"left": keep_end, "middle": keep_both_ends}


def fit_prompt(ids: Sequence[int], side: str, *, max_length: int, answer_length: int) -> list[int]:
    """A prompt that leaves room for the answer.

    Args:
        ids: the whole prompt.
        side: where it is cut, a name in `TRUNCATIONS`.
        max_length: tokens of prompt and answer together.
        answer_length: tokens kept free for the answer.

    Raises:
        ValueError: an unknown side, or a longer prompt of which not even two tokens fit beside the answer.
    """
    if side not in TRUNCATIONS:
        raise ValueError(f"truncation must be one of {list(TRUNCATIONS)}, got {side!r}")
    limit = max_length - answer_length
    if len(ids) <= limit:
        return list(ids)
    if limit < 2:
        raise ValueError(
            f"max_length must leave two tokens for the prompt beside {answer_length} for the answer, got {max_length}"
        )
    return TRUNCATIONS[side](ids, limit)
